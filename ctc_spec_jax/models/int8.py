"""Matrices of a target in eight bits: half the bytes of bfloat16 that every step reads.

A weight is rounded to one of 255 multiples of a step size, which every output has of its own
(symmetric, to the nearest). The target is then the rounded model, and drafts are verified by it.

Shape letters: D width of what goes in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ctc_spec_jax import sharding
from ctc_spec_jax.types import Params

KERNELS = ("qkv", "output", "gate_up", "down", "head")
"""The matrices of layers and the LM head, all of which products read [D, ...]."""

_LARGEST = 127

Put = Callable[[tuple[str, ...], Any], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A kernel ``values * scale``: int8 [D, ...] and float32 [1, ...]."""

    values: Any
    scale: Any

    @property
    def ndim(self) -> int:
        """Of the kernel."""
        return len(self.values.shape)

    @property
    def size(self) -> int:
        """Of the kernel."""
        return math.prod(self.values.shape)


def rounded(kernel) -> Int8:
    """A kernel [D, ...] of numpy or JAX in eight bits."""
    wide = kernel.astype(np.float32)
    peak = abs(wide).max(axis=0, keepdims=True)
    # XLA turns a division by a constant into this product, and numpy does not.
    scale = (peak + (peak == 0).astype(np.float32)) * np.float32(1 / _LARGEST)
    return Int8((wide / scale).round().astype(np.int8), scale)


def columns(kernel, index):
    """``kernel[:, index]``, of an array [D, V] or of one in eight bits."""
    if not isinstance(kernel, Int8):
        return kernel[:, index]
    return Int8(kernel.values[:, index], kernel.scale[:, index])


def rounded_params(params: Params) -> Params:
    """Parameters of a target with its ``KERNELS`` in eight bits.

    A tied target gets an LM head of its own, since rows of its embedding are looked up too.
    """

    def one(path, leaf):
        return rounded(leaf) if path[-1].key in KERNELS else leaf

    head = {} if "head" in params else {"head": params["embedding"].T}
    return jax.tree_util.tree_map_with_path(one, {**params, **head})


def rounding(put: Put) -> Put:
    """``put`` of ``convert.load_target`` for arrays of numpy, which are rounded on the way."""

    def one(path, leaf):
        leaf = rounded(leaf) if path[-1] in KERNELS else leaf
        return jax.tree.map(lambda part: put(path, part), leaf)

    return one


def own_head(params: Params, put: Put) -> Params:
    """``params``, loaded with ``rounding(put)``, of a tied target too; see ``rounded_params``."""
    if "head" in params:
        return params
    table = sharding.host_copy(params["embedding"])
    return {**params, "head": rounding(put)(("head",), table.T)}
