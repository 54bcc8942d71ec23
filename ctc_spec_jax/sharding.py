"""Where arrays lie on a mesh: one table of logical axes for parameters, batches and caches.

A mesh has the axes ``data`` (copies of the model), ``fsdp`` (rows of a batch, and slices of every
parameter that are gathered for use) and ``tensor`` (slices of heads, MLP and vocabulary that
compute on their own). ``RULES`` maps logical axes to them; an axis of the mesh that does not
divide a dimension leaves it whole, and a mesh may lack any of the three.

Shape letters: as in ``models.decoder`` and ``draft.ctc``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ctc_spec_jax.errors import InputError
from ctc_spec_jax.types import DecodeState, Request

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "wide": ("tensor",),
}
"""Logical axis -> mesh axes. ``wide`` is a width that a product makes and the next one gathers."""

Axes = tuple[str | None, ...]

PARAMETERS: dict[str, Axes] = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "qkv": ("embed", "heads", None, None),
    "qkv_bias": ("heads", None, None),
    "context_kv": ("embed", "heads", None, None),
    "output": ("heads", "embed"),
    "gate_up": ("embed", None, "mlp"),
    "gate_up_bias": (None, "mlp"),
    "down": ("mlp", "embed"),
    "cross_query": ("embed", "heads", None, None),
    "cross_output": ("heads", "embed"),
    "context": ("embed", "wide"),
    "start": ("embed", "wide"),
    "blocks": (None, "embed", "wide"),
    "mix": ("embed", None, "wide"),
    "own_heads": (None, "embed", "vocab"),
    "token_embedding": (None, "vocab", "embed"),
    "first_state": ("embed", "wide"),
    "states": (None, "embed", "wide"),
}
"""Parameter name, without its layer or head, -> logical axes; all others are small and copied."""

TPU_ORDER: dict[str, tuple[int, ...]] = {
    "qkv": (1, 2, 0, 3),
    "context_kv": (1, 2, 0, 3),
    "cross_query": (1, 2, 0, 3),
}
"""Dimensions of a parameter in the memory of a TPU, from the largest stride to the smallest.

A TPU pads the last two to tiles of 8 x 128 or so. As written, [D, K, G+2, C], that is up to twice
the memory, and every decode would begin with a copy in the order that its loop reads.
"""

CACHE: Axes = ("batch", "heads", None, None)
"""Axes of keys [B, K, C, S] and of values [B, K, S, C]."""

HIDDEN: Axes = ("batch", None, None)
"""Axes of hidden states [B, N, D]."""


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Mesh of all devices (or those given); one of the sizes may be -1: whatever is left.

    Raises:
      InputError: sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    open_axes = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    found = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh: expected sizes of at least 1 and one -1 at most, found {found}")
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise InputError(
            f"mesh: expected sizes whose product is the number of devices, {len(devices)}, "
            f"found {found}"
        )
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=kinds, devices=devices)


def mesh_of(sizes: str, devices: Sequence[Any] | None = None) -> Mesh:
    """``make_mesh`` of sizes like ``data=1,fsdp=1,tensor=8``; an axis that is left out is 1.

    Raises:
      InputError: another axis, no number, or a product that is not the number of devices.
    """
    found = {}
    for part in sizes.split(","):
        match = re.fullmatch(r"(data|fsdp|tensor)=(-?\d+)", part.strip())
        if not match:
            raise InputError(f"mesh: expected data=1,fsdp=1,tensor=8 or so, found {sizes!r}")
        found[match[1]] = int(match[2])
    return make_mesh(**found, devices=devices)


def spec(mesh, axes: Axes, shape: Sequence[int]) -> P:
    """Partition of an array of logical ``axes`` on a mesh; what does not divide stays whole."""
    places: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        kept: tuple[str, ...] = ()
        for name in RULES[axis] if axis else ():
            parts = mesh.shape.get(name, 1) * int(np.prod([mesh.shape[n] for n in kept]))
            if mesh.shape.get(name, 1) > 1 and size % parts == 0:
                kept += (name,)
        places.append(kept or None)
    return P(*places)


def parameter_axes(name: str, shape: Sequence[int]) -> Axes:
    """Logical axes of a parameter, by the last name of its path."""
    axes = PARAMETERS.get(_without_layer(name), ())
    return axes if len(axes) == len(shape) else (None,) * len(shape)


def parameters(mesh: Mesh, tree):
    """Shardings of a tree of parameters, of their gradients or of an optimiser's state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: parameter(mesh, _last_name(path), x.shape), tree
    )


def parameter(mesh: Mesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """Sharding of one parameter; see ``parameter_axes``."""
    return NamedSharding(mesh, spec(mesh, parameter_axes(name, shape), shape))


def home(mesh: Mesh, name: str, shape: Sequence[int]) -> NamedSharding | Format:
    """Where a parameter of a decode lies: its sharding, and on TPU its order in memory too."""
    place = parameter(mesh, name, shape)
    order = TPU_ORDER.get(_without_layer(name), ())
    if mesh.devices.flat[0].platform != "tpu" or len(order) != len(shape):
        return place
    return Format(Layout(major_to_minor=order), place)


def homes(mesh: Mesh, tree):
    """``home`` of every parameter of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: home(mesh, _last_name(path), x.shape), tree
    )


def rows(mesh: Mesh, tree, axis: int = 0):
    """Shardings of arrays whose ``axis`` counts rows; scalars are copied."""

    def one(x):
        axes = tuple("batch" if i == axis else None for i in range(np.ndim(x)))
        return NamedSharding(mesh, spec(mesh, axes, np.shape(x)))

    return jax.tree.map(one, tree)


def inputs(mesh: Mesh, argument):
    """Shardings of an argument of a decode: a ``DecodeState``, a ``Request`` or arrays of rows."""
    if isinstance(argument, DecodeState):
        return jax.tree.map(
            lambda x: NamedSharding(mesh, spec(mesh, _carried(x), x.shape)), argument
        )
    places = rows(mesh, argument)
    if isinstance(argument, Request) and argument.stop_strings is not None:
        # All rows look into one table.
        strings = dataclasses.replace(places.stop_strings, table=whole(mesh))
        places = dataclasses.replace(places, stop_strings=strings)
    return places


def _carried(x) -> Axes:
    return CACHE if x.ndim == len(CACHE) else ("batch",) + (None,) * (x.ndim - 1)


def whole(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def current_mesh():
    """The mesh of ``jax.set_mesh``; None without one and inside ``jax.shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or not mesh.are_all_axes_auto else mesh


def constrain(x, axes: Axes):
    """``x``, kept where its logical axes belong, inside ``jit`` under ``jax.set_mesh``.

    Without a mesh, and inside ``jax.shard_map``, nothing changes.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))


def gather_width(x):
    """Hidden states [B, N, D] that a product with a ``wide`` matrix made, whole on every chip.

    Told in two steps: told the second alone, the partitioner gathers the matrix.
    """
    return constrain(constrain(x, ("batch", None, "wide")), HIDDEN)


def parts(axis: str, size: int) -> int:
    """Into how many parts the mesh of ``jax.set_mesh`` cuts a dimension; 1 without one."""
    mesh = current_mesh()
    if mesh is None:
        return 1
    (names,) = spec(mesh, (axis,), (size,))
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh.shape[name] for name in names)


def _without_layer(name: str) -> str:
    return re.sub(r"^(layer|head)_\d+_", "", name)


def _last_name(path) -> str:
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return str(names[-1]) if names else ""


def host_copy(tree):
    """Whole arrays on this host, of arrays that may be spread over hosts."""

    def fetch(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(fetch, tree)
