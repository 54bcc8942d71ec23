"""Building blocks of drafts: chains, static templates, an exact top-k for wide vocabularies, and
children that are drawn at random.

Shape letters: N tree nodes, M max depth, V vocabulary, F draft frames. Everything here that does
not depend on data is Python or NumPy, made once.
"""

from __future__ import annotations

import dataclasses
import fractions
import heapq
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ctc_spec_jax import categorical, sharding
from ctc_spec_jax.types import NO_PARENT, ROOT

PUBLISHED_COUNTS = (10, 28, 23, 2)
"""Nodes at depth 1, 2, 3, 4 of the published CTC drafter's template (arXiv 2412.00061, code)."""


def chain(num_nodes: int) -> np.ndarray:
    """Parents of a chain: every node is the child of the node before it.

    Args:
        num_nodes: N, root included.

    Returns:
        int32 [N].
    """
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1 (the root), got {num_nodes}")
    return np.arange(NO_PARENT, num_nodes - 1, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Template:
    """A tree fixed before any token is known; hashable by value.

    A node at depth d stands for the token of rank ``ranks[node]`` at draft position d - 1 (the
    d-th head, frame or step), whatever its parent is. Slot ROOT is the pending token; its rank
    is 0 and means nothing. Nodes are ordered by depth.
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return len(self.parents)

    @property
    def max_depth(self) -> int:
        """M, depth of the deepest node."""
        return max(self.depths)

    @property
    def top_k(self) -> int:
        """How many ranks per position the template uses."""
        return max(self.ranks) + 1

    def paths(self) -> np.ndarray:
        """int32 [N, M]: a node's ancestor or self at depth 1..M, ROOT past the node's depth."""
        paths = np.full((self.num_nodes, self.max_depth), ROOT, np.int32)
        for node in range(1, self.num_nodes):
            paths[node] = paths[self.parents[node]]
            paths[node, self.depths[node] - 1] = node
        return paths

    def fill(self, ranked: jax.Array, pending: jax.Array) -> jax.Array:
        """Put ranked candidates into the slots.

        Args:
            ranked: int32 [F, K], ids of position f by falling score; F >= max_depth,
                K >= top_k.
            pending: int32 [], the root's token.

        Returns:
            int32 [N].

        Raises:
            ValueError: if ``ranked`` has too few positions or ranks.
        """
        if ranked.shape[0] < self.max_depth or ranked.shape[1] < self.top_k:
            raise ValueError(
                f"ranked: expected at least [{self.max_depth}, {self.top_k}], got {ranked.shape}"
            )
        position = np.asarray(self.depths[1:], np.int32) - 1
        drafted = ranked[position, np.asarray(self.ranks[1:], np.int32)]
        return jnp.concatenate([pending[None], drafted])


def static_template(choices: Iterable[Sequence[int]]) -> Template:
    """Template from a set of rank-paths, e.g. ``[(0,), (1,), (0, 0)]``.

    Args:
        choices: one path of ranks per node below the root, in any order; every proper prefix
            of a path must be present too.

    Returns:
        The template, nodes ordered by depth, then by ranks.

    Raises:
        ValueError: for no paths, an empty path, a negative rank, a duplicate or a missing prefix.
    """
    paths = sorted((tuple(choice) for choice in choices), key=lambda path: (len(path), path))
    slots: dict[tuple[int, ...], int] = {(): ROOT}
    for path in paths:
        if not path or min(path) < 0:
            raise ValueError(f"choices: expected non-empty paths of ranks >= 0, got {path}")
        if path in slots:
            raise ValueError(f"choices: duplicate path {path}")
        if path[:-1] not in slots:
            raise ValueError(f"choices: path {path} needs its prefix {path[:-1]}")
        slots[path] = len(slots)
    if not paths:
        raise ValueError("choices: expected at least one path")
    return Template(
        parents=(NO_PARENT, *(slots[path[:-1]] for path in paths)),
        depths=(0, *(len(path) for path in paths)),
        ranks=(0, *(path[-1] for path in paths)),
    )


def zipf_template(num_nodes: int, max_depth: int, top_k: int = 10) -> Template:
    """The most probable template if rank r is right with probability proportional to 1/(r+1).

    Positions are taken as independent, so a path's probability is the product over its ranks of
    ``1 / ((r+1) H)`` with ``H = 1 + 1/2 + .. + 1/top_k``; the best ``num_nodes - 1`` paths are
    kept. Ties go to the lexicographically smaller path.

    Args:
        num_nodes: N, root included, at least 2.
        max_depth: M.
        top_k: ranks per position.

    Raises:
        ValueError: if fewer than ``num_nodes - 1`` paths exist.
    """
    # Inverse probabilities as exact fractions: ties are real, not rounding.
    one = fractions.Fraction(1)
    harmonic = sum((one / (rank + 1) for rank in range(top_k)), start=0 * one)
    kept: list[tuple[int, ...]] = []
    frontier: list[tuple[fractions.Fraction, tuple[int, ...]]] = [(one, ())]
    while len(kept) < num_nodes:
        if not frontier:
            raise ValueError(f"num_nodes={num_nodes}: only {len(kept)} nodes exist")
        cost, path = heapq.heappop(frontier)
        kept.append(path)
        if len(path) < max_depth:
            for rank in range(top_k):
                heapq.heappush(frontier, (cost * (rank + 1) * harmonic, (*path, rank)))
    return static_template(kept[1:])


def counted_template(counts: Sequence[int] = PUBLISHED_COUNTS, top_k: int = 10) -> Template:
    """Template with a given number of nodes per depth.

    Rule: at each depth, of all children of the nodes kept one depth above, keep those whose
    product of ``rank + 1`` along the path is smallest; ties go to the lexicographically smaller
    path. The default has the node counts of the published CTC drafter, not its list of paths.

    Args:
        counts: nodes at depth 1, 2, ...
        top_k: ranks per position.

    Raises:
        ValueError: if a depth has fewer paths than asked for.
    """
    level: list[tuple[int, ...]] = [()]
    kept: list[tuple[int, ...]] = []
    for depth, count in enumerate(counts, start=1):
        children = [(*path, rank) for path in level for rank in range(top_k)]
        if not 1 <= count <= len(children):
            raise ValueError(
                f"counts: expected 1 to {len(children)} nodes at depth {depth}, got {count}"
            )
        children.sort(key=lambda path: (math.prod(rank + 1 for rank in path), path))
        level = children[:count]
        kept += level
    return static_template(kept)


def top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Exact top-k of every row, faster than ``lax.top_k`` when a row is a vocabulary.

    Entry i belongs to block ``i % blocks``. The k blocks with the largest maxima contain the
    top k, so only they are searched. The first stage is an elementwise maximum over rows of
    ``blocks`` entries, which every backend vectorises; with about ``sqrt(n k)`` blocks both
    searches are short.

    Args:
        scores: float [F, n].
        k: at most n.

    Returns:
        values float [F, k], falling, and indices int32 [F, k]. The values are those of
        ``lax.top_k``; among equal scores any may be returned.

    Raises:
        ValueError: if ``k`` is not in 1..n.
    """
    n = scores.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, got {k}")
    parts = sharding.parts("vocab", n)
    if parts > 1 and n // parts >= k:
        return _top_k_of_parts(scores, k, parts)
    return _top_k(scores, k)


def _top_k_of_parts(scores: jax.Array, k: int, parts: int) -> tuple[jax.Array, jax.Array]:
    """``top_k`` where every chip searches its own part of the vocabulary; only winners travel."""
    rows, n = scores.shape
    split = sharding.constrain(scores.reshape(rows, parts, n // parts), (None, "vocab", None))
    values, index = jax.vmap(lambda part: _top_k(part, k), in_axes=1, out_axes=1)(split)
    index = index + jnp.arange(parts, dtype=jnp.int32)[None, :, None] * (n // parts)
    values, index = (sharding.constrain(x, (None, None, None)) for x in (values, index))
    values, at = lax.top_k(values.reshape(rows, -1), k)
    return values, jnp.take_along_axis(index.reshape(rows, -1), at, axis=1)


def _top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    rows, n = scores.shape
    blocks = 2 ** round(math.log2(math.sqrt(n * k)))
    full = n // blocks
    if full < 8:
        return lax.top_k(scores, k)
    best = jnp.max(scores[:, : full * blocks].reshape(rows, full, blocks), axis=1)
    tail = n - full * blocks
    if tail:
        padded = jnp.pad(scores[:, -tail:], ((0, 0), (0, blocks - tail)), constant_values=-jnp.inf)
        best = jnp.maximum(best, padded)
    _, block = lax.top_k(best, k)  # [F, k]
    start = jnp.arange(full + bool(tail), dtype=jnp.int32) * blocks
    index = (start[None, :, None] + block[:, None, :]).reshape(rows, -1)
    # Slots past the end come last, so no real entry loses a tie against them.
    found = jnp.take_along_axis(scores, jnp.minimum(index, n - 1), axis=1)
    values, at = lax.top_k(jnp.where(index < n, found, -jnp.inf), k)
    return values, jnp.take_along_axis(index, at, axis=1)


def sample_children(
    key: jax.Array, logits: jax.Array, num_children: int, replacement: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Children of one node, drawn from the softmax of ``logits``, in the order of the draws.

    The rules for sampled drafts try siblings in that order: give them slots in it, and state the
    same logits to the rule. Without replacement the largest logits perturbed by Gumbel noise, by
    falling value, are successive draws (Gumbel top-k: Kool et al. 2019, arXiv 1903.06059).

    Args:
        key: typed PRNG key [], consumed.
        logits: float [V], -inf where a token is ruled out; one finite at least.
        num_children: K.
        replacement: draw every child from the whole law; else siblings differ.

    Returns:
        Tokens int32 [K] and bool [K] which of them are children: without replacement there are no
        more than tokens of positive probability.

    Raises:
        ValueError: if ``num_children`` is not in 1..V.
    """
    if not 1 <= num_children <= logits.shape[-1]:
        raise ValueError(f"num_children: expected 1 to {logits.shape[-1]}, got {num_children}")
    probs = jax.nn.softmax(logits)
    if replacement:
        uniform = categorical.uniforms(key[None], num_children, probs.dtype)[0]
        tokens = jax.vmap(lambda u: categorical.draw(probs, u))(uniform)
        return tokens, jnp.ones((num_children,), bool)
    # With less range ("low") a wide flat law has equal scores, whose order is that of the ids.
    noise = jax.random.gumbel(key, logits.shape, logits.dtype, mode="high")
    # What underflows to 0 is out: a rule could not renormalise a law of nothing but zeros.
    scores, tokens = top_k(jnp.where(probs > 0, logits + noise, -jnp.inf)[None], num_children)
    return tokens[0].astype(jnp.int32), scores[0] > -jnp.inf


def merge_phrases(phrases: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    """One tree of R phrases that follow the root: what several of them begin with is there once.

    Node ``1 + r * D + d`` is token d of phrase r; where an earlier phrase begins with the same
    d + 1 tokens the node is invalid, and what follows hangs on the earlier one.

    Args:
        phrases: int32 [R, D].
        lengths: int32 [R], how many tokens of a phrase count.

    Returns:
        Tokens int32 [R * D], parents int32 [R * D] and valid bool [R * D] of the nodes from slot 1
        on.
    """
    rows, width = phrases.shape
    place = jnp.arange(width, dtype=jnp.int32)
    real = place[None] < lengths[:, None]  # [R, D]
    equal = (phrases[:, None] == phrases[None]) & real[:, None] & real[None]
    same = jnp.cumprod(equal.astype(jnp.int32), axis=-1) > 0  # [R, R, D]
    own = jnp.arange(rows, dtype=jnp.int32)[:, None]
    first = jnp.where(real, jnp.argmax(same, axis=1).astype(jnp.int32), own)  # [R, D]
    slot = 1 + first * width + place[None]
    parents = jnp.concatenate([jnp.full_like(slot[:, :1], ROOT), slot[:, :-1]], axis=1)
    return phrases.reshape(-1), parents.reshape(-1), (real & (first == own)).reshape(-1)
