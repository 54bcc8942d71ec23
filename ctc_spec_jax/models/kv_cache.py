"""Key-value cache: committed tokens only, one length per row.

A cache is a tuple over layers of ``(k, v)``, each [B, K, S, C]; slot s holds position s. Slots at
or past a row's length hold garbage that no mask lets through. Per-layer arrays, because slices of
one stacked array would be copied on every step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

UNROLLED_ROWS = 8
"""Up to this batch size rows are written one by one."""


def fill(kv, num_slots: int):
    """Cache of ``num_slots`` slots whose first T slots are ``kv`` (pairs of [B, K, T, C])."""

    def pad(rows):
        return jnp.pad(rows, ((0, 0), (0, 0), (0, num_slots - rows.shape[2]), (0, 0)))

    return jax.tree.map(pad, kv)


def commit(cache, kv, path, length):
    """Write the rows of ``kv`` along ``path`` into slots ``length .. length + M``.

    All M+1 rows are written; those past the accepted length are garbage past the new length.
    ``dynamic_update_slice`` clamps its start, so S must be at least ``length + M + 1``.

    Args:
      cache: tuple of pairs [B, K, S, C].
      kv: tuple of pairs [B, K, N, C], the new rows.
      path: int32 [B, M+1], node per depth.
      length: int32 [B].
    """

    def write(slots, rows):
        rows = jnp.take_along_axis(rows, path[:, None, :, None], axis=2).astype(slots.dtype)
        if slots.shape[0] > UNROLLED_ROWS:
            return jax.vmap(_write_row)(slots, rows, length)
        # vmap of the update is a scatter, which XLA runs as a loop over its rows on CPU.
        for b in range(slots.shape[0]):
            start = (b, 0, length[b], 0)
            slots = jax.lax.dynamic_update_slice(slots, rows[b : b + 1], start)
        return slots

    return jax.tree.map(write, cache, kv)


def _write_row(slots, rows, length):
    return jax.lax.dynamic_update_slice(slots, rows, (0, length, 0))
