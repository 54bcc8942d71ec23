"""Arithmetic shared by target and drafters: free functions over plain arrays.

Shape letters: B batch, N new rows, S cache slots, D width, H heads, K kv heads, G = H / K query
heads per kv head, C head width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax.chunked_head import map_chunks
from ctc_spec_jax.models.config import RopeScaling
from ctc_spec_jax.models.int8 import Int8
from ctc_spec_jax.sharding import HIDDEN, constrain

TILE = 8
"""Rows of the smallest tile of a TPU's registers."""

MASKED = -1e30
"""Score of a masked key. Finite, so that a row whose keys are all masked gives no NaN."""


def rms_norm(x, scale, eps: float):
    """Root-mean-square norm over the last axis; statistics in float32, result in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + scale.shape
    return scale.astype(x.dtype).reshape(shape) * wide.astype(x.dtype)


def embed(table, tokens):
    """Rows [B, N, D] of ``table`` [V, D] for tokens int32 [B, N]."""
    # Looked up in slices of the width, rows could not be spread over the same chips.
    table = constrain(table, ("vocab", None))
    return constrain(table[tokens], HIDDEN)


def project(x, kernel, dtype=None):
    """``x [..., D] @ kernel [D, ...]`` in ``dtype``, that of x if None; kernel axes are kept."""
    if isinstance(kernel, Int8):
        # Scaled after the sum, so that the product's operand is a mere widening of what is read.
        out = project(x, _stay(kernel.values, x).astype(x.dtype), jnp.float32)
        scale = kernel.scale.reshape((1,) * (x.ndim - 1) + kernel.scale.shape[1:])
        return (out * scale).astype(x.dtype if dtype is None else dtype)

    def product(x, kernel):
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, kernel, contract, preferred_element_type=dtype)

    if math.prod(x.shape[:-1]) != 1:
        return product(x, kernel)
    out = _one_row(product, x.reshape(1, -1), kernel, 0)
    return out.reshape(*x.shape[:-1], *kernel.shape[1:])


def _stay(values, x):
    """Eight-bit ``values``, widened where ``x`` is known and not before.

    On GPUs XLA would widen them once ahead of the loop of a decode, whose steps would then read the
    wide ones.
    """

    def beside(values, x):
        return jax.lax.optimization_barrier((values, x))[0]

    return jax.lax.platform_dependent(
        values, x, cuda=beside, rocm=beside, default=lambda values, x: values
    )


def _one_row(product, x, y, axis: int):
    """``product(x, y)`` of x with one row at ``axis``."""
    tile = functools.partial(product_of_tile, product, axis)
    return jax.lax.platform_dependent(x, y, tpu=tile, default=product)


def product_of_tile(product, axis: int, x, y):
    """``product(x, y)`` of the one row of x at ``axis`` in a tile of equal ones.

    XLA leaves a product of one row to the vector unit of a TPU, at four times the cycles that the
    matrix unit needs for a full tile.
    """
    tile = jax.lax.optimization_barrier(jnp.repeat(x, TILE, axis=axis))
    return jax.lax.slice_in_dim(product(tile, y), 0, 1, axis=axis)


def linear(x, kernel, bias=None):
    """``project`` with a bias."""
    out = project(x, kernel)
    if bias is None:
        return out
    return out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)


def rope_frequencies(head_width: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Rotary frequencies [C/2] in radians per token, float32 (RoPE; Llama 3.1 for ``llama3``)."""
    freq = 1.0 / theta ** (np.arange(0, head_width, 2, dtype=np.float32) / head_width)
    if scaling.kind == "linear":
        freq = freq / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_max_position * freq / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        keep = np.clip(keep, 0.0, 1.0)
        freq = keep * freq + (1 - keep) * freq / scaling.factor
    return freq.astype(np.float32)


def rope_angles(positions, frequencies: np.ndarray):
    """Cosine and sine [B, N, C/2] of positions int32 [B, N].

    Float32: bfloat16 cannot tell position 256 from 257.
    """
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, angles):
    """Rotate the two halves of the last axis of x [B, N, ..., C] by ``angles`` [B, N, C/2]."""
    cos, sin = (
        a.reshape(a.shape[:2] + (1,) * (x.ndim - 3) + a.shape[2:]).astype(x.dtype) for a in angles
    )
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attend(query, new, new_mask, past=None, past_mask=None):
    """Attention of N new rows to the new rows and to a cache, as one softmax.

    The two score blocks share one maximum and one sum, which is the softmax of the joined scores;
    keys and values are never concatenated, so the cache is read in place.

    Args:
      query: [B, N, K, G, C].
      new: keys [B, K, C, N] and values [B, K, N, C] of the new rows.
      new_mask: bool [B, N, N], row attends to column.
      past: cached keys [B, K, C, S] and values [B, K, S, C], or None.
      past_mask: bool [B, N, S].

    Returns:
      [B, N, K, G, C] in the query's dtype.
    """
    batch, rows, kv_heads, group, head = query.shape
    query = jnp.transpose(query * (head**-0.5), (0, 2, 3, 1, 4))  # [B, K, G, N, C]
    query = query.reshape(batch, kv_heads, group * rows, head)
    blocks = [(new, new_mask)] if past is None else [(past, past_mask), (new, new_mask)]
    scores = []
    for (keys, _), mask in blocks:
        score = _batched(query, keys).reshape(batch, kv_heads, group, rows, -1)
        scores.append(jnp.where(mask[:, None, None], score, MASKED))
    # Softmax does not depend on the shift, so no gradient flows through the maximum.
    peak = jax.lax.stop_gradient(
        _join(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores])
    )
    weights = [jnp.exp(s - peak) for s in scores]
    total = _join(jnp.add, [jnp.sum(w, axis=-1, keepdims=True) for w in weights])
    mixed = _join(
        jnp.add,
        [
            _batched(w.reshape(batch, kv_heads, group * rows, -1).astype(query.dtype), values)
            for w, ((_, values), _) in zip(weights, blocks, strict=True)
        ],
    )
    mixed = mixed.reshape(batch, kv_heads, group, rows, head) / total
    return jnp.transpose(mixed, (0, 3, 1, 2, 4)).astype(query.dtype)


def attend_groups(query, key, value, past, visible, at_a_time: int, causal: bool = False):
    """Attention of A groups of F rows: a row attends to its group and to what that sees of a cache.

    ``causal``: of its group to itself and the rows before it.

    With more than ``at_a_time`` groups, scores exist for that many, and a backward pass makes them
    again: kept, they would grow with A times S.

    Args:
      query: [B, A*F, K, G, C], the rows of a group side by side.
      key, value: [B, A*F, K, C].
      past: cached keys [B, K, C, S] and values [B, K, S, C].
      visible: bool [B, A, S].
      at_a_time: of A.

    Returns:
      [B, A*F, K, G, C] in the query's dtype.
    """

    def some(part):
        query, key, value, visible = (jnp.moveaxis(x, 0, 1) for x in part)
        batch, groups, rows = query.shape[:3]
        owner = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), rows)
        own = owner[:, None] == owner[None]
        own = jnp.broadcast_to((jnp.tril(own) if causal else own)[None], (batch, *2 * owner.shape))
        key, value = (x.reshape(batch, groups * rows, *x.shape[3:]) for x in (key, value))
        # As in kv_cache: keys [B, K, C, N], values [B, K, N, C].
        new = jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3))
        flat = query.reshape(batch, groups * rows, *query.shape[3:])
        mixed = attend(flat, new, own, past, jnp.repeat(visible, rows, axis=1))
        return jnp.moveaxis(mixed.reshape(query.shape), 1, 0)

    batch, groups = visible.shape[:2]
    parts = (x.reshape(batch, groups, -1, *x.shape[2:]) for x in (query, key, value))
    parts = tuple(jnp.moveaxis(x, 1, 0) for x in (*parts, visible))
    if groups > at_a_time:
        mixed = map_chunks(jax.checkpoint(some), at_a_time, parts)
    else:
        mixed = some(parts)
    return jnp.moveaxis(mixed, 0, 1).reshape(query.shape)


def _batched(x, y):
    """``x [B, K, X, Y] @ y [B, K, Y, Z]`` in float32.

    Spelled out: einsum may swap the operands, and the cache would be transposed in every step.
    """
    return _product(x, y) if x.shape[2] > 1 else _one_row(_product, x, y, 2)


def _product(x, y):
    dimensions = (((3,), (2,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _join(function, parts):
    return parts[0] if len(parts) == 1 else function(*parts)


def gated_mlp(x, gate_up, down, gate_up_bias=None, down_bias=None):
    """SwiGLU: ``(silu(x W_gate) * x W_up) W_down``; ``gate_up`` [D, 2, W], ``down`` [W, D]."""
    both = linear(x, gate_up, gate_up_bias)
    return linear(jax.nn.silu(both[..., 0, :]) * both[..., 1, :], down, down_bias)


def within_window(mask, query_positions, key_positions, window: int):
    """Restrict mask [B, N, X] to keys less than ``window`` positions before the query.

    ``query_positions`` [B, N], ``key_positions`` [B, X] or [1, X]. A window of 0 restricts nothing.
    """
    if not window:
        return mask
    return mask & (query_positions[:, :, None] - key_positions[:, None, :] < window)
