"""Compiler options of the decode step, per kind of device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_CPU = {
    # Leave products to Eigen and reductions to XLA's newer library. Eigen packs the weights at
    # every product, which one pass over 16 rows repays; the newer library's products cost more
    # with every row, and the older reductions are not vectorised. A round of 16 nodes of the demo
    # pair took a quarter less time than with the defaults, a plain step the same.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}


@functools.cache
def decode_options() -> dict[str, str] | None:
    """Value for ``compiler_options`` of ``jax.jit``, or None where XLA's defaults are best.

    An option that this version of XLA does not know is left out.
    """
    if jax.default_backend() != "cpu":
        return None
    known = {name: value for name, value in _CPU.items() if _accepts(name, value)}
    return known or None


def _accepts(name: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x + 1.0, compiler_options={name: value}).lower(jnp.float32(0)).compile()
    except Exception:  # the type of the error differs between versions
        return False
    return True
