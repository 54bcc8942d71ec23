"""Step 2 for drafts that were drawn at random: rules that need the law of the draws.

All of them are exact if every sampled child was drawn from the law that the draft states for its
parent, children of one node in the order of their slots, and if nothing that was drawn decided
whether it is offered (``valid`` may depend on laws and on earlier tokens only).

One row; lifted with ``jax.vmap``. Shape letters: B batch, N tree nodes, M max depth, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ctc_spec_jax import categorical
from ctc_spec_jax.types import ROOT, Acceptance, DraftTree, Law, Laws
from ctc_spec_jax.verify import first_argmax


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Accept x with probability min(1, p(x)/q(x)), else draw from the residual (p-q)+ and stop.

    For chains (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).
    """

    def __call__(
        self, keys, tree: DraftTree, depth, mask, laws: Laws, max_depth: int
    ) -> Acceptance:
        """See ``types.Verifier``."""
        del depth, mask
        _need_chain("Rejection", tree, max_depth)
        _need_law("Rejection", tree)
        return _walk(keys, tree, laws.everywhere(), max_depth, replacement=True)


@dataclasses.dataclass(frozen=True)
class MultiCandidate:
    """Try the children of a node in turn, each by rejection against what the others left over.

    After a failed try p becomes its residual (p-q)+, renormalised; where siblings were drawn
    without replacement, the token also leaves q, renormalised (arXiv 2401.06706).
    """

    replacement: bool = False

    def __call__(
        self, keys, tree: DraftTree, depth, mask, laws: Laws, max_depth: int
    ) -> Acceptance:
        """See ``types.Verifier``."""
        del depth, mask
        _need_law("MultiCandidate", tree)
        return _walk(keys, tree, laws.everywhere(), max_depth, self.replacement)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Fixed children beside sampled ones: the walk and the rejection rule at one node.

    With S the fixed children and q' the draft's law restricted to the rest: sampled children are
    tried by rejection against q'; what is left of p, which on S is p itself, is drawn from, and a
    fixed child that carries the draw is followed. With one sampled child it is accepted with
    probability p(S) + sum of min(p, q') over the rest: never below the walk of S alone, nor below
    one sampled child (the greedy multi-draft scheme of arXiv 2502.18779).
    """

    replacement: bool = False

    def __call__(
        self, keys, tree: DraftTree, depth, mask, laws: Laws, max_depth: int
    ) -> Acceptance:
        """See ``types.Verifier``."""
        del depth, mask
        _need_law("Mixed", tree)
        if tree.sampled is None:
            raise ValueError("Mixed: expected a tree that says which nodes are sampled, found none")
        return _walk(keys, tree, laws.everywhere(), max_depth, self.replacement)


@dataclasses.dataclass(frozen=True)
class Block:
    """Accept the prefix of a chain by a joint test; never shorter on average than ``Rejection``.

    Block verification (Sun et al. 2024, arXiv 2403.10444, algorithm 2): prefixes are weighed by
    the running ``w_i = min(1, w_{i-1} p(x_i)/q(x_i))``, the longest that passes is kept. A fixed
    node counts as drawn from a point mass.
    """

    def __call__(
        self, keys, tree: DraftTree, depth, mask, laws: Laws, max_depth: int
    ) -> Acceptance:
        """See ``types.Verifier``."""
        del depth, mask
        _need_chain("Block", tree, max_depth)
        draft_logits = _with_points(tree, _need_law("Block", tree))
        law = laws.everywhere()
        greedy = _greedy(law)
        uniform = categorical.uniforms(keys, max_depth + 1, law.logits.dtype)
        rows = jax.vmap(block_row)
        return rows(uniform, tree.tokens, tree.valid, law.logits, draft_logits, greedy)


def _need_law(rule: str, tree: DraftTree) -> jax.Array:
    if tree.draft_logits is None:
        raise ValueError(
            f"{rule}: expected a tree with draft_logits, the law its nodes were drawn from, "
            "found None; TargetSample is exact for trees without one"
        )
    return tree.draft_logits


def _need_chain(rule: str, tree: DraftTree, max_depth: int) -> None:
    if tree.tokens.shape[1] != max_depth + 1:
        raise ValueError(
            f"{rule}: expected a chain of {max_depth + 1} nodes for max_depth {max_depth}, found "
            f"{tree.tokens.shape[1]} nodes"
        )


def _with_points(tree: DraftTree, draft_logits):
    """Draft logits [B, N, V] of a chain; a point mass at a node whose child is fixed."""
    if tree.sampled is None:
        return draft_logits
    child, drawn = (jnp.roll(a, -1, axis=1)[..., None] for a in (tree.tokens, tree.sampled))
    index = jax.lax.broadcasted_iota(jnp.int32, draft_logits.shape, 2)
    point = jnp.where(index == child, 0.0, -jnp.inf).astype(draft_logits.dtype)
    return jnp.where(drawn, draft_logits, point)


def _greedy(law: Law):
    batch = law.logits.shape[0]
    return jnp.ones((batch,), bool) if law.greedy is None else law.greedy


def _walk(keys, tree: DraftTree, law: Law, max_depth: int, replacement: bool) -> Acceptance:
    sampled = jnp.ones_like(tree.valid) if tree.sampled is None else tree.sampled
    uniform = categorical.uniforms(keys, tree.tokens.shape[1], law.logits.dtype)

    def row(uniform, tokens, parents, valid, sampled, logits, draft_logits, greedy):
        one = _Row(tokens, parents, valid, sampled, logits, draft_logits, greedy)
        return walk_row(uniform, one, max_depth, replacement)

    return jax.vmap(row)(
        uniform,
        tree.tokens,
        tree.parents,
        tree.valid,
        sampled,
        law.logits,
        tree.draft_logits,
        _greedy(law),
    )


class _Row(NamedTuple):
    """One row of a draft and of the target's law: [N], or [N, V] for the laws; greedy is []."""

    tokens: jax.Array
    parents: jax.Array
    valid: jax.Array
    sampled: jax.Array
    logits: jax.Array
    draft_logits: jax.Array
    greedy: jax.Array


class _Place(NamedTuple):
    """Where the walk is, and what is left of both laws there."""

    step: jax.Array  # int32 []
    node: jax.Array  # int32 []
    tried: jax.Array  # int32 [], last child that was tried
    target: jax.Array  # float [V], sums to 1
    draft: jax.Array  # float [V], sums to 1 or is 0
    depth: jax.Array  # int32 []
    path: jax.Array  # int32 [M+1]
    next_token: jax.Array  # int32 []
    done: jax.Array  # bool []


def walk_row(uniform, row: _Row, max_depth: int, replacement: bool) -> Acceptance:
    """The walk from the root: try sampled children, then draw from what is left and follow.

    Args:
      uniform: float [N, 2] in [0, 1); step s of the walk uses pair s. A step tries a child, or
        draws and moves or ends: at most N steps, as every node is tried or entered once.
      row: of draft and target.
      max_depth: M.
      replacement: siblings were drawn with replacement.
    """
    zero = jnp.int32(0)
    start = _enter(row, jnp.int32(ROOT))
    path = jnp.zeros((max_depth + 1,), jnp.int32)
    place = _Place(zero, *start, zero, path, zero, jnp.array(False))

    def step(place: _Place) -> _Place:
        return _step(uniform[place.step], row, place, replacement)

    place = jax.lax.while_loop(lambda place: ~place.done, step, place)
    return Acceptance(place.path, place.depth + 1, place.next_token)


def _step(uniform, row: _Row, place: _Place, replacement: bool) -> _Place:
    index = jnp.arange(row.tokens.shape[0], dtype=jnp.int32)
    best = first_argmax(row.logits[place.node])
    below = (row.parents == place.node) & row.valid & (index > ROOT)
    untried = below & row.sampled & (index > place.tried)
    tries, child = jnp.any(untried), _first(untried)
    token = row.tokens[child]
    drawn, wanted = place.draft[token], place.target[token]
    # A law that underflows to 0 where the child lies says nothing that could be tested.
    passes = (drawn > 0) & (uniform[0] * drawn < wanted)
    passes = tries & jnp.where(row.greedy, token == best, passes)

    own = jnp.where(row.greedy, best, categorical.draw(place.target, uniform))
    carries = below & ~row.sampled & (row.tokens == own)
    follows = ~tries & jnp.any(carries)
    moves = passes | follows
    node = jnp.where(passes, child, _first(carries))

    entered = _enter(row, jnp.where(moves, node, place.node))
    left = _after_failure(place, token, replacement)
    stays = (place.node, child, *left)
    here = (jnp.where(moves, new, old) for new, old in zip(entered, stays, strict=True))
    at, tried, target, draft = here
    depth = place.depth + moves.astype(jnp.int32)
    path = place.path.at[depth].set(jnp.where(moves, node, place.path[depth]))
    done = ~tries & ~moves
    return _Place(place.step + 1, at, tried, target, draft, depth, path, own, done)


def _first(holds):
    return jnp.argmax(holds).astype(jnp.int32)


def _enter(row: _Row, node):
    """Node, last tried child and both laws on entering ``node``."""
    target = jax.nn.softmax(row.logits[node])
    draft = jax.nn.softmax(row.draft_logits[node])
    fixed = (row.parents == node) & row.valid & ~row.sampled
    tokens = jnp.where(fixed, row.tokens, draft.shape[0])
    rest = draft.at[tokens].set(0.0, mode="drop")
    draft = jnp.where(jnp.any(fixed), _normalised(rest, rest), draft)
    return node, node, target, draft


def _after_failure(place: _Place, token, replacement: bool):
    """Both laws after ``token`` was tried and refused."""
    target = _normalised(jnp.maximum(place.target - place.draft, 0.0), place.target)
    if replacement:
        return target, place.draft
    rest = place.draft.at[token].set(0.0)
    return target, _normalised(rest, rest)


def _normalised(weights, otherwise):
    """Weights that sum to 1; ``otherwise`` where they are all 0, which rounding alone can do."""
    total = jnp.sum(weights)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), otherwise)


def block_row(uniform, tokens, valid, logits, draft_logits, greedy) -> Acceptance:
    """Block verification of one chain.

    Args:
      uniform: float [M+1, 2] in [0, 1); pair i tests prefix i, pair 0 draws the next token.
      tokens: int32 [M+1], the root first.
      valid: bool [M+1]; the chain ends before the first invalid node.
      logits: float [M+1, V], processed, of the target.
      draft_logits: float [M+1, V].
      greedy: bool [].
    """
    steps = tokens.shape[0]
    target, draft = jax.nn.softmax(logits), jax.nn.softmax(draft_logits)
    drafted = jnp.cumprod(valid.astype(jnp.int32))  # 1 up to the end of the chain
    end = jnp.sum(drafted, dtype=jnp.int32) - 1
    weight = jnp.ones((), target.dtype)
    weights, passes = [weight], [jnp.array(True)]
    for i in range(1, steps):
        p, q = target[i - 1, tokens[i]], draft[i - 1, tokens[i]]
        weight = jnp.minimum(weight * p / jnp.where(q > 0, q, 1.0), 1.0)
        excess = jnp.sum(jnp.maximum(weight * target[i] - draft[i], 0.0))
        # In this order: adding 1 to a small excess first would round it away.
        scale = excess + (1.0 - weight)
        # Where nothing is left to test (p = q, weight 1), later prefixes pass anyway.
        inner = jnp.where(scale > 0, excess / jnp.where(scale > 0, scale, 1.0), 1.0)
        passes.append(uniform[i, 0] < jnp.where(i == end, weight, inner))
        weights.append(weight)
    best = first_argmax(logits)
    matches = jnp.cumprod((tokens[1:] == best[:-1]).astype(jnp.int32), dtype=jnp.int32)
    index = jnp.arange(steps, dtype=jnp.int32)
    sampled_length = jnp.max(jnp.where(jnp.stack(passes) & (index <= end), index, 0))
    greedy_length = jnp.minimum(jnp.sum(matches, dtype=jnp.int32), end)
    length = jnp.where(greedy, greedy_length, sampled_length)
    residual = jnp.maximum(jnp.stack(weights)[length] * target[length] - draft[length], 0.0)
    rest, own = (categorical.draw(law, uniform[0]) for law in (residual, target[length]))
    # Asked of the drawn token: asked of all, the answer may be that of a residual which was rounded
    # differently from the one that is drawn from, where all that is left of p is rounding.
    sampled = jnp.where((length < end) & (residual[rest] > 0), rest, own)
    token = jnp.where(greedy, best[length], sampled)
    path = jnp.where(index <= length, index, 0)
    return Acceptance(path, length + 1, token)
