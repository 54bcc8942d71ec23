"""Draws from unnormalised laws by inverting their cumulative sums.

Two uniform numbers make one draw: one picks a block of entries, the other an entry of the block.
One float32 number alone would round probabilities to multiples of 2^-23, which over a vocabulary
of 32,000 adds up to a total variation of 5e-4. A rule's randomness is a few numbers that a test can
set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 64
"""Weights are summed in blocks of this size; entry by entry only in the block that is hit."""

_SHORT = 256
"""Longest sums that are made by a product with a triangle of ones."""


def draw(weights, uniform):
    """Index of an entry, with probability ``weights / sum(weights)``; never one of weight 0.

    Args:
      weights: float [..., V], not negative, with a positive sum.
      uniform: float [..., 2] in [0, 1), same dtype. Up to 64 entries need only the first number.

    Returns:
      int32 [...].
    """
    size = weights.shape[-1]
    blocks = -(-size // _BLOCK)
    if blocks == 1:
        return _invert(weights, uniform[..., 0])
    padding = [(0, 0)] * (weights.ndim - 1) + [(0, blocks * _BLOCK - size)]
    split = jnp.pad(weights, padding).reshape(*weights.shape[:-1], blocks, _BLOCK)
    block = _invert(jnp.sum(split, axis=-1), uniform[..., 0])
    inside = jnp.take_along_axis(split, block[..., None, None], axis=-2)[..., 0, :]
    return block * _BLOCK + _invert(inside, uniform[..., 1])


def running_sum(weights):
    """Cumulative sums along the last axis of float [..., n]; each is rounded on its own."""
    size = weights.shape[-1]
    if size > _SHORT:
        return jnp.cumsum(weights, axis=-1)
    # A product, because XLA on CPU adds up a window per entry and computes the weights anew in
    # every one. Accelerators would round the weights without the precision.
    upper = np.triu(np.ones((size, size), weights.dtype))
    return jnp.matmul(weights, upper, precision=jax.lax.Precision.HIGHEST)


def uniforms(keys, count: int, dtype):
    """Pairs of numbers, float [B, count, 2] in [0, 1); ``keys`` [B] are consumed."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count, 2), dtype))(keys)


def _invert(weights, uniform):
    """The entry in which ``uniform`` of the total lies, int32."""
    # Long cumulative sums add in another order for every entry: rounding lets them grow at a weight
    # of 0, and fall. So the ends of such entries do not count.
    ends = jnp.where(weights > 0, running_sum(weights), 0.0)
    # Below the largest end, because the uniform is at most 1 - 2^-24: so some entry ends past it.
    past = ends > (uniform * jnp.max(ends, axis=-1))[..., None]
    index = jax.lax.broadcasted_iota(jnp.int32, ends.shape, ends.ndim - 1)
    first = jnp.min(jnp.where(past, index, ends.shape[-1]), axis=-1)
    # XLA may make the sums anew to compare them, rounded differently, so that none is past it.
    return jnp.minimum(first, jnp.max(jnp.where(weights > 0, index, 0), axis=-1))
