"""Key-value cache: committed tokens only, one length per row.

A cache is a tuple over layers of ``(k, v)``: keys [B, K, C, S], values [B, K, S, C]; slot s holds
position s. In these layouts both attention products read the cache as it lies; any other one is
transposed in every step. Slots at or past a row's length hold garbage that no mask lets through.
Per-layer arrays, because slices of one stacked array would be copied on every step.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from ctc_spec_jax.sharding import CACHE, constrain, current_mesh, spec

UNROLLED_ROWS = 8
"""Up to this batch size rows are written one by one."""


_SLOTS = (3, 2)
"""The slot axis of keys and of values."""


def from_heads(key, value):
    """Keys and values [B, N, K, C] in the layouts of the cache: [B, K, C, N] and [B, K, N, C]."""
    return jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3))


def first_row(kv):
    """The first of the new rows of ``kv``, as one row."""
    return tuple((k[:, :, :, :1], v[:, :, :1]) for k, v in kv)


def num_slots(cache) -> int:
    """S of a cache."""
    return cache[0][0].shape[_SLOTS[0]]


def fill(kv, num_slots: int):
    """Cache of ``num_slots`` slots whose first T slots are those of ``kv``."""

    def pad(rows, axis):
        widths = [(0, 0)] * rows.ndim
        widths[axis] = (0, num_slots - rows.shape[axis])
        return jnp.pad(rows, widths)

    return tuple(
        (constrain(pad(k, _SLOTS[0]), CACHE), constrain(pad(v, _SLOTS[1]), CACHE)) for k, v in kv
    )


def commit(cache, kv, path, length):
    """Write the rows of ``kv`` along ``path`` into slots ``length .. length + M``.

    All M+1 rows are written; those past the accepted length are garbage past the new length.
    ``dynamic_update_slice`` clamps its start, so S must be at least ``length + M + 1``.

    Args:
      cache: of S slots.
      kv: the same of N new rows.
      path: int32 [B, M+1], node per depth.
      length: int32 [B].
    """
    mesh = current_mesh()
    if mesh is None:
        return _commit(cache, kv, path, length)
    # Every chip writes its own rows and heads: left to the partitioner, a write to one row of a
    # batch that is spread over chips would move caches between them.
    places = jax.tree.map(lambda x: spec(mesh, CACHE, x.shape), cache)
    batch = spec(mesh, ("batch",), length.shape)
    write = jax.shard_map(
        _commit, in_specs=(places, places, P(*batch, None), batch), out_specs=places
    )
    return write(cache, kv, path, length)


def _commit(cache, kv, path, length):
    def write(slots, rows, axis):
        index = jnp.expand_dims(path, tuple({1, 2, 3} - {axis}))
        rows = jnp.take_along_axis(rows, index, axis=axis).astype(slots.dtype)
        if len(slots) == 1:
            return _one_by_one(axis, slots, rows, length)
        few = functools.partial(_one_by_one if len(slots) <= UNROLLED_ROWS else _at_once, axis)
        gpu = functools.partial(_in_order, axis)
        return jax.lax.platform_dependent(slots, rows, length, cuda=gpu, rocm=gpu, default=few)

    return tuple(
        (write(k, new_k, _SLOTS[0]), write(v, new_v, _SLOTS[1]))
        for (k, v), (new_k, new_v) in zip(cache, kv, strict=True)
    )


def _one_by_one(axis: int, slots, rows, length):
    for b in range(slots.shape[0]):
        start = [b, 0, 0, 0]
        start[axis] = length[b]
        slots = jax.lax.dynamic_update_slice(slots, rows[b : b + 1], start)
    return slots


def _at_once(axis: int, slots, rows, length):
    """A scatter, which XLA runs as a loop over its rows on CPU and as one kernel on GPUs."""

    def one(slots, rows, length):
        return jax.lax.dynamic_update_slice_in_dim(slots, rows, length, axis - 1)

    return jax.vmap(one)(slots, rows, length)


def _in_order(axis: int, slots, rows, length):
    """As GPUs write best, the caches kept in the order of their dimensions.

    For products of one row of several caches XLA would turn them over ahead of a loop and back
    after it, which takes as much memory again.
    """
    order = Layout(major_to_minor=tuple(range(slots.ndim)))
    slots = with_layout_constraint(slots, order)
    return with_layout_constraint(_at_once(axis, slots, rows, length), order)
