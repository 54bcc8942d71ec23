"""The most probable paths of a law over continuations, as a tree: level by level, on device.

The law of the next token may depend on the path (heads in sequence, a small model) or on its depth
alone (independent heads). Either way the log-probability of a path never grows along it, so the
N-1 most probable paths form a tree below the pending token, and of all trees of N nodes this one
has the largest expected accepted length under the law: the sum of the probabilities of its paths.

``root``, ``expand`` once per depth, ``select``. Exactness: if depth d holds n of the N-1 best
paths, the d-1 ancestors of one of them are among the best too, so n <= N-d. A search that keeps
N-d paths at depth d therefore loses none; a narrower one may.

One row; callers lift with ``jax.vmap``. Shape letters: N tree nodes, W paths of a level,
V vocabulary, K depths.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ctc_spec_jax.tree import build
from ctc_spec_jax.types import NO_PARENT, ROOT


class Level(NamedTuple):
    """Paths of one length by falling log-probability; those of -inf are none."""

    score: jax.Array  # float32 [W], log-probability of the path
    token: jax.Array  # int32 [W], its last token
    parent: jax.Array  # int32 [W], index in the level above


def root(pending: jax.Array) -> Level:
    """The level of depth 0: the pending token [], a path of probability 1."""
    return Level(jnp.zeros((1,)), pending[None], jnp.full((1,), NO_PARENT, jnp.int32))


def expand(
    level: Level, log_probs: jax.Array, width: int, counts: jax.Array | None = None
) -> Level:
    """The ``width`` most probable children of a level's paths, or all if there are fewer.

    Args:
        level: W paths.
        log_probs: float32 [W, V], law after each path. NaN counts as probability 0.
        width: at least 1.
        counts: int32 [W], most children of each path; None: no such bound.
    """
    scores, tokens = _ranked(log_probs, width)
    if counts is not None:
        rank = jnp.arange(scores.shape[1], dtype=jnp.int32)
        scores = jnp.where(rank[None] < counts[:, None], scores, -jnp.inf)
    return _join(level, scores, tokens, width)


def most_probable(
    log_probs: jax.Array, pending: jax.Array, num_nodes: int, max_depth: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tree of the most probable paths where the law depends on the depth alone.

    Args:
        log_probs: float32 [K, V], row d-1 is the law at depth d. NaN counts as probability 0.
        pending: int32 [].
        num_nodes: N, root included.
        max_depth: at most K and at most N-1.

    Returns:
        As ``select``.
    """
    scores, tokens = _ranked(log_probs, num_nodes - 1)
    levels = [root(pending)]
    for depth in range(max_depth):
        law = scores[depth][None], tokens[depth][None]
        levels.append(_join(levels[-1], *law, num_nodes - 1 - depth))
    return select(levels, num_nodes)


def select(levels: list[Level], num_nodes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best nodes of all levels.

    Returns:
        tokens int32 [N], parents int32 [N], valid bool [N]. Nodes come by falling probability,
        parents before children. Where fewer paths are possible, the last slots are invalid: token
        0, parent ROOT.
    """
    offsets = np.cumsum([0] + [len(level.score) for level in levels])
    above = [0, *offsets[:-2].tolist()]
    missing = (0, max(num_nodes - int(offsets[-1]), 0))
    score = jnp.concatenate([level.score for level in levels])
    score = jnp.pad(score, missing, constant_values=-jnp.inf)
    token = jnp.pad(jnp.concatenate([level.token for level in levels]), missing)
    parent = jnp.concatenate([o + level.parent for o, level in zip(above, levels, strict=True)])
    # Equal scores come in index order, hence shorter paths first: since no child ranks above its
    # parent, a parent is always kept and always precedes its children.
    score, kept = lax.top_k(score, num_nodes)
    slot = jnp.argmax(jnp.pad(parent, missing)[kept][:, None] == kept[None], axis=1)
    valid = score > -jnp.inf
    is_root = np.arange(num_nodes) == ROOT
    parents = jnp.where(is_root, NO_PARENT, jnp.where(valid, slot.astype(jnp.int32), ROOT))
    return jnp.where(valid, token[kept], 0), parents, valid


def _ranked(log_probs: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """The ``width`` most probable tokens of every law, or all: scores and ids."""
    # NaN > -inf is false: a broken drafter costs speed, not a malformed tree.
    log_probs = jnp.where(log_probs > -jnp.inf, log_probs, -jnp.inf)
    scores, tokens = build.top_k(log_probs, min(width, log_probs.shape[1]))
    return scores, tokens.astype(jnp.int32)


def _join(level: Level, scores: jax.Array, tokens: jax.Array, width: int) -> Level:
    """The best children: scores and ids [W, C] of every path, or [1, C] of all of them."""
    shape = len(level.score), scores.shape[1]
    # Rounding may lift a log-probability above 0; a child must never rank above its parent.
    total = level.score[:, None] + jnp.minimum(jnp.broadcast_to(scores, shape), 0.0)
    score, index = lax.top_k(total.reshape(-1), min(width, total.size))
    token = jnp.broadcast_to(tokens, shape).reshape(-1)[index]
    return Level(score, token, lax.div(index, jnp.int32(shape[1])))
