"""Memory that a decode will need, told before it is allocated."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ctc_spec_jax import sharding
from ctc_spec_jax.decode import Loop, start
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.types import Request


def tree_bytes(tree, shardings=None) -> int:
    """Bytes of the arrays, or of the shapes, of a pytree; of one device's part with shardings."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.shape for leaf in leaves]
    if shardings is not None:
        places = jax.tree.leaves(shardings)
        shapes = [place.shard_shape(x) for place, x in zip(places, shapes, strict=True)]
    return sum(math.prod(x) * _width(leaf) for leaf, x in zip(leaves, shapes, strict=True))


def _width(leaf) -> int:
    return 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize


def available_bytes() -> int | None:
    """Free memory of the first local device, or of the host for a CPU; None where unknown."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    # Counts the page cache as free, which sysconf's number of free pages does not.
    amounts = dict(line.split(":") for line in lines)
    return int(amounts["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in amounts else None


def check(needed: int, batch: int, what: str) -> None:
    """Refuse a batch that cannot fit.

    Args:
      needed: bytes.
      batch: rows.
      what: the sizes that made it so large, for the message.

    Raises:
      InputError: more than is free, with both numbers.
    """
    free = available_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"batch: expected one that needs at most the {free / 2**30:.2f} GiB of memory that are "
            f"free, found {batch} rows ({what}) that need about {needed / 2**30:.2f} GiB"
        )


_needed: dict[Any, int] = {}


def decode_bytes(
    loop: Loop, params, draft_params, tokens, lengths, request: Request, mesh: Mesh | None = None
) -> int:
    """Bytes of a decode beside the parameters: its state, and the largest intermediate arrays.

    On a mesh, those of one device.
    """
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves((tokens, request)))
    place = (loop, shapes, jax.tree.structure(request), mesh)
    if place not in _needed:
        state = jax.eval_shape(
            lambda *a: start(loop, *a), params, draft_params, tokens, lengths, request
        )
        batch, width = tokens.shape
        config: DecoderConfig = vars(loop.target)["config"]
        scores = (batch, config.num_heads, width, width)
        laws = (batch, loop.drafter.num_nodes, config.vocab_size)
        places = None
        if mesh is not None:
            places = sharding.inputs(mesh, state)
            scores = _part(mesh, sharding.CACHE, scores)
            laws = _part(mesh, ("batch", None, "vocab"), laws)
        # Logits, what processing makes of them, and their exponentials.
        largest = 4 * max(math.prod(scores), 3 * math.prod(laws))
        _needed[place] = tree_bytes(state, places) + largest
    return _needed[place]


def _part(mesh: Mesh, axes: sharding.Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    return NamedSharding(mesh, sharding.spec(mesh, axes, shape)).shard_shape(shape)
