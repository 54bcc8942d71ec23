"""How programs are compiled: options per kind of device, and which sizes share a program."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp

_CPU = {
    # Leave products to Eigen and reductions to XLA's newer library. Eigen packs the weights at
    # every product, which one pass over 16 rows repays; the newer library's products cost more
    # with every row, and the older reductions are not vectorised. A round of 16 nodes of the demo
    # pair took a quarter less time than with the defaults, a plain step the same.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}

_GPU = {
    # A plain step of a small batch is hundreds of short kernels, and the host starts each of them
    # and reads the loop's condition after every round. By default XLA records kernels and library
    # products into CUDA graphs, but leaves loops and branches to the host. The last two put the
    # whole loop of a decode into one graph where everything in it can be recorded; elsewhere XLA
    # records what it can, as before, and leaves out what drivers before CUDA 12.3 and ROCm lack.
    # The list replaces XLA's own, so it repeats that.
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,"
    "DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    # A loop counts as one instruction beside its neighbours, of which there may be none; with the
    # default of 5 it would stay with the host.
    "xla_gpu_graph_min_graph_size": "1",
}


@functools.cache
def jitted(function: Callable, *donated: int):
    """The jitted function with the device's compiler options; the loop (argument 0) is static."""
    return jax.jit(
        function,
        static_argnums=0,
        donate_argnums=donated,
        compiler_options=decode_options(),
    )


def bucket(size: int) -> int:
    """The size that stands for ``size``: a multiple of 32 or of an eighth of a power of two.

    One program serves all sizes of a bucket, and a bucket is at most a quarter larger than what
    it holds (above 128).
    """
    step = max(32, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


def aligned(slots: int) -> int:
    """Slots of a cache that has at least ``slots``.

    A multiple of 8, so that GPUs load several neighbouring numbers at a time.
    """
    return -(-slots // 8) * 8


def graphs() -> bool:
    """Whether decodes on GPUs are compiled so that a whole loop is one CUDA graph.

    With ``CTC_SPEC_XLA=graphs`` in the environment alone: no run on a GPU has shown yet that it
    helps.
    """
    return os.environ.get("CTC_SPEC_XLA") == "graphs"


def gpu_options() -> dict[str, str]:
    """Options of the compiler for a decode on a GPU in this environment."""
    return _GPU if graphs() else {}


@functools.cache
def decode_options() -> dict[str, str] | None:
    """Value for ``compiler_options`` of ``jax.jit``, or None where XLA's defaults are best.

    An option that this version of XLA does not know is left out.
    """
    wanted = {"cpu": _CPU, "gpu": gpu_options()}.get(jax.default_backend(), {})
    known = {name: value for name, value in wanted.items() if _accepts(name, value)}
    return known or None


def _accepts(name: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x + 1.0, compiler_options={name: value}).lower(jnp.float32(0)).compile()
    except Exception:  # the type of the error differs between versions
        return False
    return True
