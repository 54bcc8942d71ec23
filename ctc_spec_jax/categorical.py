"""Draws from unnormalised laws by inverting their cumulative sums.

One uniform number makes one draw, so a rule's randomness is a few numbers that a test can set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BLOCK = 64
"""Weights are summed in blocks of this size; entry by entry only in the block that is hit."""


def draw(weights, uniform):
    """Index of an entry, with probability ``weights / sum(weights)``; never one of weight 0.

    Args:
      weights: float [..., V], not negative, with a positive sum.
      uniform: float [...] in [0, 1), same dtype.

    Returns:
      int32 [...].
    """
    size = weights.shape[-1]
    blocks = -(-size // _BLOCK)
    if blocks == 1:
        return _invert(weights, uniform)[0]
    padding = [(0, 0)] * (weights.ndim - 1) + [(0, blocks * _BLOCK - size)]
    split = jnp.pad(weights, padding).reshape(*weights.shape[:-1], blocks, _BLOCK)
    block, rest = _invert(jnp.sum(split, axis=-1), uniform)
    inside = jnp.take_along_axis(split, block[..., None, None], axis=-2)[..., 0, :]
    return block * _BLOCK + _invert(inside, rest)[0]


def uniforms(keys, count: int, dtype):
    """float [B, count] in [0, 1); ``keys`` [B] are consumed."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), dtype))(keys)


def _invert(weights, uniform):
    """The entry in which ``uniform`` of the total lies, and where in it: int32, float in [0, 1)."""
    # Long cumulative sums add in another order for every entry: rounding lets them grow at a weight
    # of 0, and fall. So the ends of such entries do not count.
    ends = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    # Below the largest end whatever the rounding, because the uniform is at most 1 - 2^-24: so some
    # entry ends past it.
    place = uniform * jnp.max(ends, axis=-1)
    index = jnp.argmax(ends > place[..., None], axis=-1).astype(jnp.int32)
    end, weight = (
        jnp.take_along_axis(a, index[..., None], axis=-1)[..., 0] for a in (ends, weights)
    )
    inside = 1.0 - (end - place) / jnp.where(weight > 0, weight, 1.0)
    top = 1.0 - jnp.finfo(weights.dtype).eps
    return index, jnp.clip(inside, 0.0, top).astype(weights.dtype)
