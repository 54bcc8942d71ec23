"""Exact output laws of verification rules: all drafts, and all cells of the rule's uniforms.

A rule is a deterministic function of a draft and of a few numbers in [0, 1). A reference in plain
Python says, for every draft, into which cells the numbers' cube falls and what comes out in each
cell; the cells tile the cube, so their volumes add up to the exact output law. The real rule is run
at points just inside the lower and the upper edges of every cell: where it agrees, its thresholds
are those of the reference to ``EDGE``.

A *prefix* is the tuple of tokens after the root; a *table* maps every prefix to a law.
Shape letters: N tree nodes, M max depth, V vocabulary, R points.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np

from ctc_spec_jax import categorical
from ctc_spec_jax.tree import topology
from ctc_spec_jax.types import NO_PARENT, DraftTree, Law

EDGE = 1e-13
"""Distance of a point from the edge of its cell."""

LAST = 1 - 2.0**-53
"""Largest number below 1."""

ROWS = 2048
"""Points that are evaluated in one call; a fixed number, so that one program serves all cases."""

Table = dict[tuple[int, ...], tuple[float, ...]]


def random_table(seed: int, vocab: int, depth: int, zeros: float = 0.0) -> Table:
    """A law for every prefix of up to ``depth`` tokens; each entry is 0 at a rate of ``zeros``."""
    draw, table = np.random.default_rng(seed), {}
    for n in range(depth + 1):
        for prefix in itertools.product(range(vocab), repeat=n):
            weights = draw.dirichlet(np.ones(vocab)) * (draw.random(vocab) >= zeros)
            weights = weights if weights.any() else np.eye(vocab)[draw.integers(vocab)]
            table[prefix] = tuple(weights / weights.sum())
    return table


def _normalised(weights) -> tuple[float, ...]:
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def restricted(law, keep) -> tuple[float, ...]:
    """The law on the tokens for which ``keep(token)`` holds; all zeros if they have no mass."""
    weights = [weight if keep(token) else 0.0 for token, weight in enumerate(law)]
    return _normalised(weights) if any(weights) else tuple(weights)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Slots of a draft. ``ranks[i]`` of a fixed node is its token's rank in the draft's law at its
    parent, by falling probability; None marks a node that is drawn."""

    parents: tuple[int, ...]
    ranks: tuple[int | None, ...]

    @property
    def depth(self) -> int:
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return max(depths)

    def children(self, node: int) -> list[int]:
        return [i for i, parent in enumerate(self.parents) if parent == node]


def tree_of(*counts: int, fixed: bool = False) -> Shape:
    """Breadth-first tree whose nodes at depth d have ``counts[d]`` children each."""
    parents, ranks, level = [NO_PARENT], [0], [0]
    for count in counts:
        start = len(parents)
        parents += [node for node in level for _ in range(count)]
        ranks += [rank if fixed else None for _ in level for rank in range(count)]
        level = range(start, len(parents))
    return Shape(tuple(parents), tuple(ranks))


@dataclasses.dataclass(frozen=True)
class World:
    """Target law p and draft law q after every prefix, and how drafts are made.

    ``told`` is what the rule is told of q, q itself by default; drafting ends after the prefixes
    in ``ends``.
    """

    p: Table
    q: Table
    shape: Shape
    replacement: bool = False
    ends: frozenset[tuple[int, ...]] = frozenset()
    told: Table | None = None

    @property
    def vocab(self) -> int:
        return len(self.p[()])

    def fixed_tokens(self, node: int, prefix) -> dict[int, int]:
        """Slot -> token of the fixed children of a node."""
        law = self.q[prefix]
        ranked = sorted(range(self.vocab), key=lambda token: -law[token])
        ranks = self.shape.ranks
        return {i: ranked[ranks[i]] for i in self.shape.children(node) if ranks[i] is not None}


class Draft(NamedTuple):
    """One drafted tree; ``prefixes`` holds None at invalid nodes."""

    prob: float
    tokens: tuple[int, ...]
    prefixes: tuple[tuple[int, ...] | None, ...]


def drafts(world: World) -> list[Draft]:
    """All drafts of positive probability."""
    done = [Draft(1.0, (0,), ((),))]
    for node in range(1, len(world.shape.parents)):
        done = [longer for draft in done for longer in _add_node(world, node, draft)]
    return done


def _add_node(world: World, node: int, draft: Draft) -> Iterator[Draft]:
    parent = world.shape.parents[node]
    prefix = draft.prefixes[parent]
    law = (0.0,) * world.vocab
    if prefix is not None and prefix not in world.ends:
        fixed = world.fixed_tokens(parent, prefix)
        taken = set(fixed.values())
        if not world.replacement:
            siblings = [i for i in world.shape.children(parent) if i < node and i not in fixed]
            taken |= {draft.tokens[i] for i in siblings if draft.prefixes[i] is not None}
        law = restricted(world.q[prefix], lambda token: token not in taken)
        if node in fixed:
            law = tuple(float(token == fixed[node]) for token in range(world.vocab))
    if not any(law):
        yield Draft(draft.prob, (*draft.tokens, 0), (*draft.prefixes, None))
    for token, prob in enumerate(law):
        if prob > 0:
            prefixes = (*draft.prefixes, (*prefix, token))
            yield Draft(draft.prob * prob, (*draft.tokens, token), prefixes)


# Reference rules: the cells of a draft and what comes out in each.


class Leaf(NamedTuple):
    """A cell: slot of a uniform -> its interval (slots left out are free), and the outcome."""

    cell: dict[int, tuple[float, float]]
    path: tuple[int, ...]
    token: int


Reference = Callable[[World, Draft], Iterator[Leaf]]


def cuts(law) -> list[tuple[int, tuple[float, float]]]:
    """Token and interval of every token of positive weight, by cumulative sums."""
    kept = [token for token, weight in enumerate(law) if weight > 0]
    ends = np.cumsum([law[token] for token in kept])
    ends = [0.0, *(ends / ends[-1])]
    return [(token, (ends[i], ends[i + 1])) for i, token in enumerate(kept)]


def excess(p, q) -> tuple[float, ...]:
    return tuple(max(a - b, 0.0) for a, b in zip(p, q, strict=True))


def walk(world: World, draft: Draft) -> Iterator[Leaf]:
    """Rejection, multi-candidate and mixed nodes (A2 rules 1 and 4; rule C of 2502.18779)."""

    def enter(node, cell, path):
        prefix = draft.prefixes[node]
        q, fixed = (world.told or world.q)[prefix], {}
        untried = [i for i in world.shape.children(node) if draft.prefixes[i] is not None]
        if untried:
            fixed = world.fixed_tokens(node, prefix)
            q = restricted(q, lambda token: token not in fixed.values())
        untried = [i for i in untried if i not in fixed]
        yield from attempt(untried, fixed, world.p[prefix], q, cell, path)

    def attempt(untried, fixed, p, q, cell, path):
        step = len(cell)
        if not untried:
            for token, interval in cuts(p):
                child = next((i for i, carried in fixed.items() if carried == token), None)
                longer = {**cell, step: interval}
                if child is None:
                    yield Leaf(longer, path, token)
                else:
                    yield from enter(child, longer, (*path, child))
            return
        child, *untried = untried
        token = draft.tokens[child]
        passes = _snapped(p[token] / q[token])
        if passes > 0:
            yield from enter(child, {**cell, step: (0.0, passes)}, (*path, child))
        if passes < 1:
            left = _normalised(excess(p, q))
            q = q if world.replacement else restricted(q, lambda other: other != token)
            yield from attempt(untried, fixed, left, q, {**cell, step: (passes, 1.0)}, path)

    yield from enter(0, {}, (0,))


def block(world: World, draft: Draft) -> Iterator[Leaf]:
    """Algorithm 2 of arXiv 2403.10444; a fixed node is drawn from a point mass."""
    end = sum(prefix is not None for prefix in draft.prefixes) - 1
    weights, laws = [1.0], []
    for i in range(end):
        token, q = draft.tokens[i + 1], world.q[draft.prefixes[i]]
        if world.shape.ranks[i + 1] is not None:
            q = tuple(float(other == token) for other in range(world.vocab))
        laws.append(q)
        weights.append(min(1.0, weights[i] * world.p[draft.prefixes[i]][token] / q[token]))
    cell = {}
    for i in range(end, -1, -1):
        p = left = world.p[draft.prefixes[i]]
        passes = _snapped(weights[i])
        if i < end:
            left = excess((weights[i] * a for a in p), laws[i])
            scale = math.fsum(left) + 1 - weights[i]
            passes = _snapped(math.fsum(left) / scale) if i and scale > 0 else 1.0
        if passes > 0:
            for token, interval in cuts(left):
                test = {i: (0.0, passes)} if i else {}
                yield Leaf({**cell, **test, 0: interval}, tuple(range(i + 1)), token)
        if passes >= 1:
            return
        cell = {**cell, i: (passes, 1.0)}


def sample(world: World, draft: Draft) -> Iterator[Leaf]:
    """The target draws at depth d with number d; the first child with that token is followed."""

    def visit(path, cell):
        children = world.shape.children(path[-1])
        for token, interval in cuts(world.p[draft.prefixes[path[-1]]]):
            found = [
                i for i in children if draft.prefixes[i] is not None and draft.tokens[i] == token
            ]
            longer = {**cell, len(cell): interval}
            if found:
                yield from visit((*path, found[0]), longer)
            else:
                yield Leaf(longer, path, token)

    yield from visit((0,), {})


def greedy(world: World, draft: Draft) -> Iterator[Leaf]:
    """The arg-max path, whatever the numbers are."""
    path, moved = (0,), True
    while moved:
        law = world.p[draft.prefixes[path[-1]]]
        best = law.index(max(law))
        children = world.shape.children(path[-1])
        valid = [i for i in children if draft.prefixes[i] is not None]
        found = [i for i in valid if draft.tokens[i] == best]
        path, moved = (*path, *found[:1]), bool(found)
    yield Leaf({}, path, best)


def typical(world: World, draft: Draft, epsilon: float = 0.09, delta: float = 0.3):
    """Medusa's rule (arXiv 2401.10774, 2.3.1): the deepest plausible path, then a draw."""
    paths = {0: (0,)}
    for node, parent in enumerate(world.shape.parents):
        if node and draft.prefixes[node] is not None and parent in paths:
            law = world.p[draft.prefixes[parent]]
            entropy = -math.fsum(weight * math.log(weight) for weight in law if weight > 0)
            if law[draft.tokens[node]] > min(epsilon, delta * math.exp(-entropy)):
                paths[node] = (*paths[parent], node)
    path = max(paths.values(), key=lambda path: (len(path), -path[-1]))
    for token, interval in cuts(world.p[draft.prefixes[path[-1]]]):
        yield Leaf({path[-1]: interval}, path, token)


def _snapped(threshold: float) -> float:
    """A threshold, where rounding is taken off 0 and 1: no cell may be narrow but not empty."""
    threshold = min(threshold, 1.0)
    nearest = round(threshold)
    return float(nearest) if abs(threshold - nearest) < 1e-11 else threshold


# The real rule at the corners of the cells.


@dataclasses.dataclass(frozen=True)
class Report:
    """``wrong`` points came out unlike the reference; ``tv`` is between the law of what the rule
    emitted, completed with plain draws to M+1 tokens, and the target's; ``length`` its mean."""

    wrong: int
    points: int
    drafts: int
    tv: float
    length: float
    joint: np.ndarray


def enumerate_rule(
    rule,
    world: World,
    reference: Reference,
    *,
    is_greedy: bool = False,
    redraft: Callable[[World, Draft], Draft] = lambda world, draft: draft,
) -> Report:
    """Exact law of a rule over a world.

    Args:
      rule: a verifier; the real code, called through its public method.
      world: laws and shape of the drafts.
      reference: its cells.
      is_greedy: rows are greedy; the target's law is then its arg-max.
      redraft: a fault in the drafting: changes a draft after it was drawn.
    """
    made = [redraft(world, draft) for draft in drafts(world)]
    found = [(i, leaf) for i, draft in enumerate(made) for leaf in reference(world, draft)]
    row = np.repeat([i for i, _ in found], 4)
    uniform, volume = _points([leaf.cell for _, leaf in found], len(world.shape.parents))
    outcome = _run(rule, world, made, row, uniform, is_greedy)
    wrong = _unlike(outcome, [leaf for _, leaf in found])
    prob = np.repeat(volume / 4, 4) * np.array([draft.prob for draft in made])[row]
    emitted = _emitted(np.array([draft.tokens for draft in made])[row], *outcome)
    target = _joint(world, is_greedy)
    joint = _completed(emitted, outcome[1], prob, world, is_greedy)
    tv = 0.5 * float(np.abs(joint - target).sum())
    length = float((outcome[1] * prob).sum())
    return Report(wrong, len(row), len(made), tv, length, joint)


def _points(cells, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Four points in every cell, float64 [4 cells, N], and the cells' volumes.

    Two of them touch all lower and all upper edges, one alternates, one lies anywhere inside.
    Free slots take the smallest and the largest number that exists.
    """
    low, high = np.zeros((len(cells), slots)), np.ones((len(cells), slots))
    free = np.ones(low.shape, bool)
    for row, cell in enumerate(cells):
        for slot, (a, b) in cell.items():
            low[row, slot], high[row, slot], free[row, slot] = a, b, False
    width = high - low
    assert width.min() > 1e-9, "a cell is too narrow for its edges: choose other tables"
    below, above = np.where(low > 0, low + EDGE, 0.0), np.where(free, LAST, high - EDGE)
    inside = low + width * np.random.default_rng(0).uniform(0.01, 0.99, width.shape)
    turns = np.arange(slots)[None] + np.arange(len(cells))[:, None]
    mixed = np.where(turns % 2 == 0, below, above)
    return np.stack([below, above, mixed, inside], axis=1).reshape(-1, slots), width.prod(axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_rule(rule, max_depth: int, uniform, tree: DraftTree, law: Law):
    """The rule with given numbers [R, N] in the place of those that it draws."""
    depth, mask = topology.shape_of(tree, topology.lineages(tree, max_depth))

    def given(keys, count, dtype):
        del dtype  # as exact as the laws are
        # Small laws are drawn from with the first number of a pair.
        return jax.numpy.repeat(keys[:, :count, None], 2, axis=2)

    with mock.patch.object(categorical, "uniforms", given):
        return rule(uniform, tree, depth, mask, law, max_depth)


def forget_programs() -> None:
    """Trace rules anew, after a fault was planted or taken out."""
    run_rule.clear_cache()


def _run(rule, world: World, made, row, uniform, is_greedy: bool):
    """Paths [R, M+1], lengths [R] and next tokens [R] at the points."""
    tokens = np.array([draft.tokens for draft in made], np.int32)
    valid = np.array([[prefix is not None for prefix in draft.prefixes] for draft in made])
    logits = np.stack([_target_logits(world, draft) for draft in made])
    draft_logits = np.stack([_draft_logits(world, draft) for draft in made])
    parents = np.array(world.shape.parents, np.int32)
    sampled = np.array([rank is None for rank in world.shape.ranks])
    out = []
    with jax.enable_x64(True):
        for start in range(0, len(row), ROWS):
            at = np.resize(row[start : start + ROWS], ROWS)
            tree = DraftTree(
                tokens[at],
                np.broadcast_to(parents, (ROWS, len(parents))),
                valid[at],
                draft_logits[at],
                np.broadcast_to(sampled, (ROWS, len(parents))) if not sampled.all() else None,
            )
            has_rows = type(rule).__name__ != "Greedy"
            law = Law(logits[at], np.full((ROWS,), is_greedy) if has_rows else None)
            numbers = np.resize(uniform[start : start + ROWS], (ROWS, uniform.shape[1]))
            got = run_rule(rule, world.shape.depth, numbers, tree, law)
            out.append([np.asarray(x) for x in (got.path, got.length, got.next_token)])
    return tuple(np.concatenate(parts)[: len(row)] for parts in zip(*out, strict=True))


def _target_logits(world: World, draft: Draft):
    """Log of p at every node; NaN at invalid nodes, which nothing may look at."""
    nothing = (math.nan,) * world.vocab
    laws = [nothing if prefix is None else world.p[prefix] for prefix in draft.prefixes]
    with np.errstate(divide="ignore"):
        return np.log(laws)


def _draft_logits(world: World, draft: Draft):
    """Log of what the rule is told of q; NaN at nodes without valid children."""
    parents = {
        parent
        for parent, prefix in zip(world.shape.parents, draft.prefixes, strict=True)
        if prefix is not None
    }
    table, nothing = world.told or world.q, (math.nan,) * world.vocab
    laws = [
        table[prefix] if node in parents else nothing for node, prefix in enumerate(draft.prefixes)
    ]
    with np.errstate(divide="ignore"):
        return np.log(laws)


def _unlike(outcome, leaves) -> int:
    """Number of points whose outcome is not that of their leaf."""
    path, length, token = outcome
    padded = np.zeros((len(leaves), path.shape[1]), int)
    for row, leaf in enumerate(leaves):
        padded[row, : len(leaf.path)] = leaf.path
    same = (path == np.repeat(padded, 4, axis=0)).all(axis=1)
    same &= length == np.repeat([len(leaf.path) for leaf in leaves], 4)
    same &= token == np.repeat([leaf.token for leaf in leaves], 4)
    return int((~same).sum())


def _emitted(tokens, path, length, next_token) -> np.ndarray:
    """Emitted tokens [R, M+1]: the path below the root, then the target's own; 0 past them."""
    drafted = np.take_along_axis(tokens, path, axis=1)[:, 1:]
    drafted = np.concatenate([drafted, np.zeros_like(drafted[:, :1])], axis=1)
    index = np.arange(path.shape[1])[None]
    drafted = np.where(index < length[:, None] - 1, drafted, 0)
    return np.where(index == length[:, None] - 1, next_token[:, None], drafted)


def _completed(emitted, length, prob, world: World, is_greedy: bool) -> np.ndarray:
    """Law of M+1 tokens [V, .., V] when what was emitted goes on with draws from the target."""
    size, joint = emitted.shape[1], 0.0
    for n in range(1, size + 1):
        rows = length == n
        mass = np.zeros((world.vocab,) * n)
        np.add.at(mass, tuple(emitted[rows, :n].T), prob[rows])
        joint = _plain(mass, world, size, is_greedy) + joint
    return joint


def _joint(world: World, is_greedy: bool) -> np.ndarray:
    """The target's law of M+1 tokens."""
    return _plain(np.ones(()), world, world.shape.depth + 1, is_greedy)


def _plain(mass, world: World, size: int, is_greedy: bool) -> np.ndarray:
    """Extend a law of prefixes [V] * n to ``size`` tokens with draws from the target."""
    for n in range(mass.ndim, size):
        prefixes = itertools.product(range(world.vocab), repeat=n)
        laws = np.array([world.p[prefix] for prefix in prefixes])
        if is_greedy:
            laws = np.eye(world.vocab)[laws.argmax(axis=1)]
        mass = mass[..., None] * laws.reshape((*mass.shape, world.vocab))
    return mass
