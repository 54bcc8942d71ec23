"""Arithmetic shared by target and drafters: free functions over plain arrays.

Shape letters: B batch, N new rows, S cache slots, D width, H heads, K kv heads, G = H / K query
heads per kv head, C head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax.models.config import RopeScaling

MASKED = -1e30
"""Score of a masked key. Finite, so that a row whose keys are all masked gives no NaN."""


def rms_norm(x, scale, eps: float):
    """Root-mean-square norm over the last axis; statistics in float32, result in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + scale.shape
    return scale.astype(x.dtype).reshape(shape) * wide.astype(x.dtype)


def linear(x, kernel, bias=None):
    """``x [..., D] @ kernel [D, ...]``; trailing kernel axes are kept."""
    out = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
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


def _batched(x, y):
    """``x [B, K, X, Y] @ y [B, K, Y, Z]`` in float32.

    Spelled out: einsum may swap the operands, and the cache would be transposed in every step.
    """
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
