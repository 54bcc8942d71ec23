"""What a step costs by arithmetic: bytes and operations at rates that this device shows.

A step takes at least the time of its bytes at the memory's bandwidth and of its operations at the
rate of large products, whichever is longer. Counted are the operands and results of products, each
read or written once; nothing else, and no time of starting anything.

Shape letters: B batch, N tree nodes, S cache slots, V vocabulary, D width, H heads, K kv heads,
C head width, F draft frames.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax import memory
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.int8 import Int8
from ctc_spec_jax.types import Params

_CALLS = 8
_TURNS = 5
_ARRAY = {"cpu": 512 << 20}  # bytes; a cache of a processor holds none of them
_OTHER_ARRAY = 2 << 30
_SIDE = {"cpu": 1024}  # of the products, rows and columns
_OTHER_SIDE = 8192


@dataclasses.dataclass(frozen=True)
class Rates:
    """Bytes a second that are read, and operations a second of large products."""

    bandwidth: float
    operations: float


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes and operations of one step or round; a multiply-add is two operations."""

    bytes: float
    operations: float

    def seconds(self, rates: Rates) -> float:
        """Least time of the work."""
        return max(self.bytes / rates.bandwidth, self.operations / rates.operations)

    def ruled_by(self, rates: Rates) -> str:
        """``bytes`` or ``operations``: which of the two takes longer."""
        longer = self.bytes / rates.bandwidth >= self.operations / rates.operations
        return "bytes" if longer else "operations"


def read_each_step(params: Params) -> Params:
    """The weights of a target that every step reads in full.

    Of an embedding table that is not the LM head too, a step reads rows.
    """
    if "head" not in params:
        return params
    return {name: leaf for name, leaf in params.items() if name != "embedding"}


def cache_bytes(config: DecoderConfig, tokens: int, width: int, windows: bool = False) -> int:
    """Bytes of the keys and values of ``tokens`` tokens of one row, ``width`` bytes a number.

    ``windows``: of those alone that a new token attends to.
    """
    seen = [
        min(tokens, config.window(i) or tokens) if windows else tokens
        for i in range(config.num_layers)
    ]
    return 2 * sum(seen) * config.num_kv_heads * config.head_width * width


def plain_bound(config: DecoderConfig, params: Params, context: int, batch: int) -> Work:
    """What no plain step can do without: its weights and the caches of its rows, read once."""
    read = read_each_step(params)
    width = params["embedding"].dtype.itemsize
    size = memory.tree_bytes(read) + batch * cache_bytes(config, context, width, windows=True)
    return Work(size, 2 * batch * _product_weights(read))


def target_work(config: DecoderConfig, params: Params, batch: int, nodes: int, slots: int) -> Work:
    """Of a pass over B trees of N nodes beside caches of S slots, all of which are read."""
    read = read_each_step(params)
    width, rows = params["embedding"].dtype.itemsize, batch * nodes
    heads = config.num_heads * config.num_layers
    scores, logits = heads * rows * (slots + nodes), rows * config.vocab_size
    size = memory.tree_bytes(read) + batch * cache_bytes(config, slots, width)
    # Scores and logits are float32, written and read.
    return Work(
        size + 8 * (scores + logits),
        2 * rows * _product_weights(read) + 4 * config.head_width * scores,
    )


def drafter_work(
    network: Any, draft_params: Params, params: Params, batch: int, slots: int
) -> Work:
    """Of one pass of a network over F frames that reads the target's LM head and its own cache.

    Args:
      network: its configuration: ``frames``, ``num_layers`` and sizes of heads.
      draft_params: of the network.
      params: of the target.
      batch: B.
      slots: S of its cache.
    """
    head = params["head"] if "head" in params else params["embedding"]
    width, rows = params["embedding"].dtype.itemsize, batch * network.frames
    size = memory.tree_bytes((draft_params, head))
    size += (
        batch * slots * 2 * network.num_layers * network.num_kv_heads * network.head_width * width
    )
    scores = network.num_layers * network.num_heads * rows * (slots + network.frames)
    weights = _product_weights(draft_params) + head.size
    return Work(
        size + 8 * (scores + rows * network.vocab_size),
        2 * rows * weights + 4 * network.head_width * scores,
    )


def _product_weights(params: Params) -> int:
    """Numbers in the matrices of a pytree; the rest are norms and biases."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8))
    return sum(x.size for x in leaves if x.ndim > 1)


def measure(dtype) -> Rates:
    """Rates of the first device for numbers of ``dtype``, the best of several ways.

    Read is an array that no cache holds, by a product with one vector and by sums of its rows;
    the products are of square matrices.
    """
    platform = jax.default_backend()
    size = _ARRAY.get(platform, _OTHER_ARRAY)
    free = memory.available_bytes()
    size = size if free is None else min(size, free // 4)
    columns = 4096
    rows = max(1, size // (columns * jnp.dtype(dtype).itemsize))
    array = jax.jit(lambda: jnp.full((rows, columns), 0.01, dtype))()
    vector = jnp.full((columns,), 0.01, dtype)
    ways = (jax.jit(_product), jax.jit(_row_sums))
    read = min(_seconds(way, array, vector) for way in ways)
    bandwidth = array.nbytes / read
    del array
    side = _SIDE.get(platform, _OTHER_SIDE)
    # Random, because processors run equal numbers faster than they run real ones.
    square = jax.jit(lambda key: jax.random.normal(key, (side, side), dtype))(jax.random.key(0))
    return Rates(bandwidth, 2 * side**3 / _seconds(jax.jit(_product), square, square))


def _product(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _row_sums(x, unused):
    del unused
    return jnp.sum(x, axis=1, dtype=jnp.float32)


def _seconds(function: Callable, *arguments: Any) -> float:
    """Median seconds of a call; several are on their way at once, so that starting is hidden."""
    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(_TURNS):
        began = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(_CALLS)])
        found.append((time.perf_counter() - began) / _CALLS)
    return statistics.median(found)
