"""The exact prefix tree of a CTC lattice, on device.

Frames f = 1..F are independent given the drafter's input; frame f emits token c with probability
``p_f(c)`` or blank. An alignment (one symbol per frame) spells the text that is left after merging
adjacent repeats and deleting blanks. The mass of a prefix u is the probability that the text
starts with u. Collapse and recursions: Graves et al. 2006, "Connectionist Temporal
Classification", sections 3 and 4; prefix mass: Graves 2012, "Supervised Sequence Labelling",
section 7.5.

The state of a prefix u with last label l is ``ending[g]``: the mass of all ways to spell u in the
first g frames with l in frame g. Then label c is entered at frame f from any such g, with blanks
in between and, where c = l, at least one blank::

    far[f]     = sum over g < f-1 of ending[g] * prod over g < k < f of p_k(blank)
    near[f]    = ending[f-1]
    enter_c[f] = p_f(c) * (far[f] + [c != l] * near[f])
    mass(u+c)  = sum over f of enter_c[f]
    ending_c[f] = enter_c[f] + p_f(c) * ending_c[f-1]

so a matrix product gives ``far`` and another one the masses of all children of all states. Sums
of non-negative terms only: nothing cancels. The root is a label in a virtual frame 0.

One row; callers lift with ``jax.vmap``. Shape letters: N tree nodes, M max depth, V vocabulary,
F draft frames, W states of a level, C candidate tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ctc_spec_jax.tree import build
from ctc_spec_jax.types import NO_PARENT, ROOT


class _Level(NamedTuple):
    """Prefixes of one length. ``label`` and ``parent`` of the root are out of range."""

    mass: jax.Array  # float32 [W]
    label: jax.Array  # int32 [W], index of the last label among the candidates
    parent: jax.Array  # int32 [W], index in the level above
    probs: jax.Array  # float32 [W, F+1], p_f(label); frame 0 is the virtual one
    ending: jax.Array  # float32 [W, F+1]


@dataclasses.dataclass(frozen=True)
class PrefixTree:
    """The ``num_nodes`` most probable prefixes of the lattice; see ``prefix_tree``."""

    num_nodes: int = 16
    max_depth: int = 8
    top_k: int = 8
    beam: int = 0

    def __call__(self, log_probs, pending):
        """(tokens, parents, valid), each [N], of log_probs [F, V+1] and the pending token []."""
        return prefix_tree(
            log_probs,
            pending,
            num_nodes=self.num_nodes,
            max_depth=self.max_depth,
            top_k=min(self.top_k, log_probs.shape[1] - 1),
            beam=self.beam or None,
        )[:3]


def prefix_tree(
    log_probs: jax.Array,
    pending: jax.Array,
    *,
    num_nodes: int,
    max_depth: int,
    top_k: int,
    beam: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The ``num_nodes - 1`` most probable prefixes, as a tree below the pending token.

    Candidates are prefixes of at most ``max_depth`` tokens over the union of every frame's
    ``top_k`` tokens. The mass of a prefix is the sum of the masses of its continuations and of
    the mass of stopping there, so it never grows along a path: the best prefixes form a tree, and
    of all trees of N nodes this one has the largest expected accepted length under the lattice
    (the sum of its masses, root excluded).

    Exactness of the level-by-level search with ``beam=None``: if depth d holds n of the N-1 best
    prefixes, the d-1 ancestors of one of them are among the best too, so n <= N-d. They are the n
    best of their depth and, by induction, children of kept states. Keeping N-d states at depth d
    therefore loses none.

    Args:
        log_probs: float32 [F, V+1], normalised over classes; class V is blank. NaN counts as
            probability 0.
        pending: int32 [], token of the root; it is no part of the lattice.
        num_nodes: N, root included.
        max_depth: M; more than F cannot be reached.
        top_k: candidate tokens per frame, at most V.
        beam: states kept per level, at most N-d at depth d. Fewer are faster, and the tree may
            then miss prefixes whose parents were cut.

    Returns:
        tokens int32 [N], parents int32 [N], valid bool [N], log_prefix float32 [N]: log mass, 0
        at the root. Nodes come by falling mass, parents before children. Where fewer prefixes
        have mass, the last slots are invalid: token 0, parent ROOT, log mass -inf.

    Raises:
        ValueError: for a wrong shape or dtype, or a size below 1.
    """
    _validate(log_probs, num_nodes, max_depth, top_k, beam)
    ids, probs = candidates(log_probs, top_k)
    gaps = blank_runs(jnp.exp(log_probs[:, -1]))
    levels = [_root(ids.shape[0], log_probs.shape[0])]
    for depth in range(1, min(max_depth, log_probs.shape[0], num_nodes - 1) + 1):
        width = min(num_nodes - depth, num_nodes if beam is None else beam)
        levels.append(_expand(levels[-1], probs, gaps, width))
    return as_tree(levels, ids, pending, num_nodes)


def as_tree(levels: Sequence[Any], ids: jax.Array, pending: jax.Array, num_nodes: int):
    """The best nodes of all levels below the pending token; returns as ``prefix_tree``."""
    mass, label, parents = select(levels, num_nodes)
    valid = mass > 0
    is_root = np.arange(num_nodes) == ROOT
    tokens = jnp.where(is_root, pending, jnp.where(valid, ids[label], 0))
    parents = jnp.where(is_root, NO_PARENT, jnp.where(valid, parents, ROOT))
    return tokens, parents, valid, jnp.log(mass)


def candidates(log_probs: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Union of every frame's top tokens: ids int32 [C] and probabilities float32 [C, F+1]."""
    vocab_size = log_probs.shape[1] - 1
    _, ids = build.top_k(log_probs[:, :vocab_size], top_k)
    ids = ids.reshape(-1)
    # A token that several frames propose keeps its first entry; the others get probability 0, so
    # no prefix occurs twice. A scatter, because comparing all pairs costs more than a level does.
    order = jnp.arange(ids.shape[0], dtype=jnp.int32)
    first = jnp.full((vocab_size,), ids.shape[0], jnp.int32).at[ids].min(order)
    probs = jnp.exp(log_probs[:, ids].T)
    # NaN > 0 is false: a broken drafter costs speed, not a malformed tree.
    probs = jnp.where((first[ids] == order)[:, None] & (probs > 0), probs, 0.0)
    return ids, jnp.pad(probs, ((0, 0), (1, 0)))


def blank_runs(blank: jax.Array) -> jax.Array:
    """Probability that all frames strictly between g and f are blank, for g < f-1, else 0.

    ``blank`` is float32 [F]; the result [F+1, F+1] counts the virtual frame 0.
    """
    g, f, k = np.ogrid[: len(blank) + 1, : len(blank) + 1, 1 : len(blank) + 1]
    blank = jnp.where(blank > 0, blank, 0.0)
    # A product of the selected factors, not a ratio of cumulative products: blanks may be 0.
    runs = jnp.prod(jnp.where((g < k) & (k < f), blank[None, None, :], 1.0), axis=-1)
    return jnp.where((g < f - 1)[:, :, 0], runs, 0.0)


def _root(num_candidates: int, frames: int) -> _Level:
    return _Level(
        mass=jnp.ones((1,), jnp.float32),
        label=jnp.full((1,), num_candidates, jnp.int32),
        parent=jnp.full((1,), NO_PARENT, jnp.int32),
        probs=jnp.zeros((1, frames + 1), jnp.float32),
        ending=jnp.zeros((1, frames + 1), jnp.float32).at[:, 0].set(1.0),
    )


def _expand(level: _Level, probs: jax.Array, runs: jax.Array, width: int) -> _Level:
    """The ``width`` most probable children of a level's prefixes."""
    far = matmul(level.ending, runs)
    near = shift(level.ending, 1)
    scores = matmul(far + near, probs.T)  # [W, C]
    # A repeated label enters through a blank only. Recomputed without the near term rather than
    # corrected by a difference, which would cancel. The root's label is out of range.
    count = scores.shape[1]
    repeated = jnp.arange(count, dtype=jnp.int32)[None] == level.label[:, None]
    repeats = jnp.sum(level.probs * far, axis=1, keepdims=True)
    scores = jnp.where(repeated, repeats, scores)
    # The sums of parent and child are rounded apart; a child must never rank above its parent.
    scores = jnp.minimum(scores, level.mass[:, None])

    mass, index = lax.top_k(scores.reshape(-1), min(width, scores.size))
    parent, label = lax.div(index, jnp.int32(count)), lax.rem(index, jnp.int32(count))
    # One look-up for all that a child has of its parent: each is several operations on an
    # accelerator. The index of a candidate is exact in float32.
    labels = level.label[:, None].astype(jnp.float32)
    above = rows(jnp.concatenate([far + near, far, labels], axis=1), parent)
    same = above[:, -1:] == label[:, None].astype(jnp.float32)
    size = far.shape[1]
    before = jnp.where(same, above[:, size:-1], above[:, :size])
    own = rows(probs, label)
    return _Level(mass, label, parent, own, stay(own * before, own))


def rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """``x[index]`` for an index that is in range."""
    return x.at[index].get(mode="promise_in_bounds")


def stay(enter: jax.Array, probs: jax.Array) -> jax.Array:
    """Solve ``x[f] = enter[f] + probs[f] * x[f-1]`` along the last axis, by doubling.

    After the step that shifts by s, x covers the last 2s entries into each frame and ``probs`` is
    the probability of 2s frames of the label: log2(F) fused steps instead of F.
    """
    total, by = enter, 1
    while by < enter.shape[-1]:
        total = total + probs * shift(total, by)
        probs = probs * shift(probs, by)
        by *= 2
    return total


def select(levels: Sequence[Any], num_nodes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best nodes of all levels: mass, label and parent slot, each [N], by falling mass.

    A level has ``mass``, ``label`` and ``parent``, each [W]; see ``_Level``.
    """
    offsets = np.cumsum([0] + [len(level.mass) for level in levels[:-1]])
    above = [0, *offsets[:-1].tolist()]
    missing = (0, max(num_nodes - sum(len(level.mass) for level in levels), 0))
    mass = jnp.pad(jnp.concatenate([level.mass for level in levels]), missing)
    label = jnp.pad(jnp.concatenate([level.label for level in levels]), missing)
    parent = jnp.concatenate([o + level.parent for o, level in zip(above, levels, strict=True)])
    # Equal masses come in index order, hence shorter prefixes first: with masses clamped, a
    # parent is always kept and always precedes its children.
    mass, kept = lax.top_k(mass, num_nodes)
    parent = jnp.pad(parent, missing)[kept]
    slot = jnp.argmax(parent[:, None] == kept[None, :], axis=1).astype(jnp.int32)
    return mass, label[kept], slot


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of float32 matrices in full precision."""
    # Accelerators would round the factors to bfloat16 or TF32, and masses would lose their order.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def shift(x: jax.Array, by: int) -> jax.Array:
    """Move the last axis ``by`` frames later; zeros come in."""
    return jnp.pad(x[:, :-by], ((0, 0), (by, 0)))


def _validate(log_probs, num_nodes: int, max_depth: int, top_k: int, beam: int | None) -> None:
    if log_probs.ndim != 2 or log_probs.shape[1] < 2 or log_probs.dtype != jnp.float32:
        raise ValueError(
            f"log_probs: expected float32 [F, V+1], got {log_probs.dtype} {log_probs.shape}"
        )
    sizes = {"num_nodes": num_nodes, "max_depth": max_depth, "top_k": top_k, "beam": beam}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if top_k > log_probs.shape[1] - 1:
        raise ValueError(f"top_k: expected at most V={log_probs.shape[1] - 1}, got {top_k}")
