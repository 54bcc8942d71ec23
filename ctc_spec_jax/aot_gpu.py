"""Groups of GPUs for XLA's compiler, without GPUs: what it wants to know of each kind.

The compiler is part of JAX's plugin for CUDA (extra ``gpu-aot``). It never asks a device: a text
tells it how many multiprocessors there are, how much memory, and so on.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from ctc_spec_jax.errors import InputError

PACKAGE = "jax-cuda13-pjrt"
"""Where the compiler is."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of GPU by the vendor's data sheet and programming guide; sizes in bytes.

    ``lanes``: numbers in float32 that a multiprocessor computes at once. ``shared`` and
    ``block_shared``: fast memory of a multiprocessor, and what one block of threads may take of it.
    """

    title: str
    capability: tuple[int, int]
    processors: int
    lanes: int
    shared: int
    block_shared: int
    cache: int
    clock: float
    memory: int
    bandwidth: float


_H100 = Gpu(
    title="NVIDIA H100 SXM5 80GB",
    capability=(9, 0),
    processors=132,
    lanes=128,
    shared=228 << 10,
    block_shared=227 << 10,
    cache=50 << 20,
    clock=1.98e9,
    memory=80 * 10**9,
    bandwidth=3.35e12,
)

GPUS = {
    "a100": Gpu(
        title="NVIDIA A100 SXM4 80GB",
        capability=(8, 0),
        processors=108,
        lanes=64,
        shared=164 << 10,
        block_shared=163 << 10,
        cache=40 << 20,
        clock=1.41e9,
        memory=80 * 10**9,
        bandwidth=2.039e12,
    ),
    "h100": _H100,
    # The same chip beside more and faster memory.
    "h200": dataclasses.replace(
        _H100, title="NVIDIA H200 SXM 141GB", memory=141 * 10**9, bandwidth=4.8e12
    ),
}
"""Those that can be named."""

OPTIONS = {
    # Without a device no product can be tried for its time; XLA's own rules choose their tiles.
    "xla_gpu_autotune_level": "0",
}
"""Options of the compiler for every program."""

_CUDA = "13.0.0"

_ENVIRONMENT = {
    # Or the plugin looks for the libraries of CUDA, which only a program that runs needs.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}


def is_name(name: str) -> bool:
    """Whether a name is that of a group: a kind, and behind a colon how many of one host."""
    return re.fullmatch(rf"({'|'.join(GPUS)})(:[1-8])?", name) is not None


def devices(name: str) -> tuple[tuple[Any, ...], Gpu]:
    """The devices of a group like ``h100`` or ``h100:8``, and their kind.

    Raises:
      InputError: the compiler is not installed.
    """
    kind, _, count = name.partition(":")
    if not installed():
        raise InputError(f"topology: expected package {PACKAGE} (extra gpu-aot), found none")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        group = topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            topology=f"1x1x{count or 1}",
            target_config=target_config(GPUS[kind]),
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"topology: expected a working {PACKAGE}, found: {reason}") from error
    return tuple(group.devices), GPUS[kind]


def installed() -> bool:
    """Whether the compiler is there."""
    try:
        return bool(importlib.metadata.version(PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return False


def target_config(gpu: Gpu) -> str:
    """The text that stands for a device.

    Of the versions the compiler demands that they be recent, or it leaves loops out of graphs.
    """
    major, minor = gpu.capability
    # Instructions that later kinds lack, such as Hopper's asynchronous products.
    own = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  name: "{gpu.title}"
  cuda_compute_capability {{ major: {major} minor: {minor} {own} }}
  core_count: {gpu.processors}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock / 1e9}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {int(gpu.bandwidth)}
  l2_cache_size: {gpu.cache}
  shared_memory_per_core: {gpu.shared}
  shared_memory_per_block: {48 << 10}
  shared_memory_per_block_optin: {gpu.block_shared}
  registers_per_core_limit: {1 << 16}
  registers_per_block_limit: {1 << 16}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  driver_version: "{_CUDA}"
  runtime_version: "{_CUDA}"
  compile_time_toolkit_version: "{_CUDA}"
}}
platform_name: "CUDA"
"""
