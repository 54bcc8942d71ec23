"""The prefix tree of a CTC lattice whose frames know the last label.

As in ``tree.ctc_prefix``, but what frame f says after a text that ends in l is conditioned on l::

    p_f(c | l) = m_f softmax over C of (u_f(c) + B(l, c))

with C the candidate tokens, ``u_f`` the frame's log-probabilities and ``m_f`` their mass on C. The
blank keeps its probability, and a repeat of l is ``p_f(l | l)``, so the bias is a gate of merging
too. Every law still adds up to what it was, so masses still never grow along a path. Independent
frames cannot say "a b or c d" without saying "a d" as well; these can, and the alignment carries
the choice over tokens in between.

One row; callers lift with ``jax.vmap``. Shape letters: N tree nodes, M max depth, V vocabulary,
F draft frames, W states of a level, C candidate tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ctc_spec_jax.tree import ctc_prefix
from ctc_spec_jax.types import NO_PARENT

Bias = Callable[[jax.Array, jax.Array], jax.Array]
"""(labels int32 [X], candidates int32 [C]) -> B, float32 [X, C]."""


@dataclasses.dataclass(frozen=True)
class LabelTree:
    """The ``num_nodes`` most probable prefixes of the lattice; see ``prefix_tree``.

    ``top_k`` is part of the law: as many as in training.
    """

    num_nodes: int = 16
    max_depth: int = 8
    top_k: int = 16

    def __call__(self, log_probs, pending, bias: Bias):
        """(tokens, parents, valid), each [N], of log_probs [F, V+1] and the pending token []."""
        tokens = log_probs.shape[1] - 1
        sizes = (self.num_nodes, self.max_depth, min(self.top_k, tokens))
        return prefix_tree(log_probs, pending, bias, *sizes)[:3]


class _Level(NamedTuple):
    """Prefixes of one length; ``label`` of the root is out of range."""

    mass: jax.Array  # float32 [W]
    label: jax.Array  # int32 [W], index of the last label among the candidates
    parent: jax.Array  # int32 [W], index in the level above
    law: jax.Array  # float32 [W, F+1, C], p_f(c | label); frame 0 is the virtual one
    ending: jax.Array  # float32 [W, F+1], as in ``ctc_prefix``


def prefix_tree(
    log_probs: jax.Array, pending: jax.Array, bias: Bias, num_nodes: int, max_depth: int, top_k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The ``num_nodes - 1`` most probable prefixes, as a tree below the pending token.

    Args:
        log_probs: float32 [F, V+1], normalised, before any bias; class V is blank.
        pending: int32 [], token of the root: the last label before the first frame.
        bias: B.
        num_nodes: N, root included.
        max_depth: M; more than F cannot be reached.
        top_k: candidate tokens per frame.

    Returns:
        As ``ctc_prefix.prefix_tree``.
    """
    ids, probs = ctc_prefix.candidates(log_probs, top_k)
    biases = bias(jnp.append(ids, pending), ids)  # [C+1, C], the root's last
    runs = ctc_prefix.blank_runs(jnp.exp(log_probs[:, -1]))
    root = jnp.full((1,), ids.shape[0], jnp.int32)
    start = jnp.zeros((1, probs.shape[1]), jnp.float32).at[:, 0].set(1.0)
    no_parent = jnp.full((1,), NO_PARENT, jnp.int32)
    law = conditioned(probs, biases[root])
    levels = [_Level(jnp.ones((1,), jnp.float32), root, no_parent, law, start)]
    for depth in range(1, min(max_depth, log_probs.shape[0], num_nodes - 1) + 1):
        levels.append(_expand(levels[-1], probs, biases, runs, num_nodes - depth))
    return ctc_prefix.as_tree(levels, ids, pending, num_nodes)


def conditioned(probs: jax.Array, bias: jax.Array) -> jax.Array:
    """p_f(c | l) of W labels, float32 [W, F+1, C].

    Args:
        probs: float32 [C, F+1], of the candidates; 0 where one is not to be said.
        bias: float32 [W, C], B(l, c).
    """
    # Shifted by its maximum, so that no exponential overflows; the shift cancels.
    tilt = jnp.exp(bias - jnp.max(bias, axis=1, keepdims=True))
    weights = probs.T[None] * tilt[:, None, :]
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mass = jnp.sum(probs, axis=0)[None, :, None]
    return jnp.where(total > 0, weights * mass / jnp.where(total > 0, total, 1.0), 0.0)


def _expand(level: _Level, probs, biases, runs, width: int) -> _Level:
    """The ``width`` most probable children of a level's prefixes."""
    far = ctc_prefix.matmul(level.ending, runs)
    near = ctc_prefix.shift(level.ending, 1)
    entries = (far + near)[..., None] * level.law  # [W, F+1, C]
    again = far[..., None] * level.law
    count = probs.shape[0]
    # A repeated label enters through a blank only; the root's is out of range.
    repeated = jnp.arange(count, dtype=jnp.int32)[None] == level.label[:, None]
    enter = jnp.where(repeated[:, None], again, entries)
    scores = jnp.sum(enter, axis=1)
    mass, index = lax.top_k(scores.reshape(-1), min(width, scores.size))
    parent, label = lax.div(index, jnp.int32(count)), lax.rem(index, jnp.int32(count))
    law = conditioned(probs, biases[label])
    own = jnp.take_along_axis(law, label[:, None, None], axis=2)[..., 0]
    return _Level(
        # The sums of parent and child are rounded apart; a child must never rank above its parent.
        mass=jnp.minimum(mass, level.mass[parent]),
        label=label,
        parent=parent,
        law=law,
        ending=ctc_prefix.stay(enter[parent, :, label], own),
    )
