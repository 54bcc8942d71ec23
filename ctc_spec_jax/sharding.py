"""Where arrays lie on a mesh: one table of logical axes for parameters, batches and caches.

A mesh has the axes ``data`` (copies of the model), ``fsdp`` (rows of a batch, and slices of every
parameter that are gathered for use) and ``tensor`` (slices of heads, MLP and vocabulary that
compute on their own). ``RULES`` maps logical axes to them; an axis of the mesh that does not
divide a dimension leaves it whole, and a mesh may lack any of the three.

Shape letters: as in ``models.decoder`` and ``draft.ctc``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ctc_spec_jax.errors import InputError

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
    "context": ("embed", "wide"),
    "start": ("embed", "wide"),
}
"""Parameter name, without its layer, -> logical axes; every other one is small and copied."""

CACHE: Axes = ("batch", "heads", None, None)
"""Axes of keys [B, K, C, S] and of values [B, K, S, C]."""


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
        raise InputError(f"mesh: expected sizes whose product is {len(devices)}, found {found}")
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=kinds, devices=devices)


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


def parameter_axes(path, shape: Sequence[int]) -> Axes:
    """Logical axes of the parameter at the end of a key path of a tree."""
    name = re.sub(r"^layer_\d+_", "", _last_name(path))
    axes = PARAMETERS.get(name, ())
    return axes if len(axes) == len(shape) else (None,) * len(shape)


def parameters(mesh: Mesh, tree):
    """Shardings of a tree of parameters, of their gradients or of an optimiser's state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec(mesh, parameter_axes(path, x.shape), x.shape)),
        tree,
    )


def rows(mesh: Mesh, tree, axis: int = 0):
    """Shardings of arrays whose ``axis`` counts rows; scalars are copied."""

    def one(x):
        axes = tuple("batch" if i == axis else None for i in range(np.ndim(x)))
        return NamedSharding(mesh, spec(mesh, axes, np.shape(x)))

    return jax.tree.map(one, tree)


def whole(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def constrain(x, axes: Axes):
    """``x``, kept where its logical axes belong, inside ``jit`` under ``jax.set_mesh``.

    Without a mesh nothing changes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))


def _last_name(path) -> str:
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return str(names[-1]) if names else ""
