"""Programs compiled for slices of TPU chips, or for GPUs, that need not be there.

The compiler of TPUs is package ``libtpu`` (extra ``tpu-aot``), that of GPUs is in JAX's plugin for
CUDA (extra ``gpu-aot``). They compile the very program that chips would run, from shapes alone,
and say what it needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax.experimental import topologies

from ctc_spec_jax import aot_gpu, hlo, sharding, thunks
from ctc_spec_jax.errors import InputError

HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
"""Generation -> GiB of memory of a chip."""

BANDWIDTH = {"v4": 1.228e12, "v5e": 0.819e12, "v5p": 2.765e12, "v6e": 1.64e12}
"""Generation -> bytes per second that a chip reads from its memory, by the vendor."""

CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
"""Generation -> cycles per second: the vendor's peak in bfloat16 by its matrix units' width."""

_SETTINGS = {"v4": {"chip_config_name": "megacore"}}
"""As on real chips: the two cores of a v4 are one device."""

_ENVIRONMENT = {
    # Without them the library asks the metadata server of a cloud machine, and waits for it.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # One process at a time may hold chips, but these hold none.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips: one chip's memory in bytes, bytes and cycles per second.

    ``clock`` is 0 for GPUs, whose compiler estimates no cycles.
    """

    name: str
    devices: tuple[Any, ...]
    memory: int
    bandwidth: float
    clock: float

    @property
    def gpus(self) -> bool:
        """Whether its chips are GPUs."""
        return not self.clock


def topology(name: str) -> Topology:
    """The slice of a name like ``v5e:4x4`` or ``v5p:2x2x2``, or GPUs: ``h100``, ``h100:8``.

    Raises:
      InputError: no such slice, or the package of the compiler is missing.
    """
    if aot_gpu.is_name(name):
        devices, gpu = aot_gpu.devices(name)
        return Topology(name, devices, gpu.memory, gpu.bandwidth, 0.0)
    match = re.fullmatch(r"(v4|v5e|v5p|v6e):\d+x\d+(x\d+)?", name)
    if not match:
        kinds = ", ".join(aot_gpu.GPUS)
        raise InputError(
            "topology: expected v4, v5e, v5p or v6e and a size such as v5e:2x2, or one to eight of "
            f"{kinds} such as h100:8, found {name!r}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("topology: expected package libtpu (extra tpu-aot), found none")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        chips = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **_SETTINGS.get(match[1], {})
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"topology: expected a slice that exists, found {name} ({reason})") from (
            error
        )
    kind = match[1]
    devices = tuple(chips.devices)
    return Topology(name, devices, HBM[kind] << 30, BANDWIDTH[kind], CLOCK[kind])


def abstract(tree, places):
    """Shapes of a tree of arrays or shapes, each where ``places`` says."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


def part_shapes(tree) -> set[hlo.Shape]:
    """Shapes of one chip's part of the caches of a tree of placed shapes."""
    names = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}
    return {
        (names[x.dtype.name], x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(tree)
        if x.ndim == len(sharding.CACHE) and x.dtype.name in names  # phrases are no caches
    }


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip that a program needs; ``alias`` is output in the place of arguments."""

    arguments: int
    temporaries: int
    output: int
    alias: int
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.temporaries + self.output - self.alias + self.code


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its memory, one turn of its main loop, and the rest of it.

    ``kernels`` are those of a turn on a GPU.
    """

    memory: Memory
    loop: hlo.Part
    rest: hlo.Part
    compile_seconds: float
    kernels: thunks.Kernels | None = None


def compile_program(
    lower: Callable[[], Any],
    what: str,
    slice_: Topology,
    caches: Collection[hlo.Shape] = (),
    options: Mapping[str, str] | None = None,
) -> Program:
    """Compile what ``lower()`` gives, a lowered program.

    Args:
      lower: called once, such as ``lambda: jax.jit(f).lower(*shapes)``.
      what: the program, for the message.
      slice_: the chips that ``lower`` lowers it for.
      caches: shapes on one chip whose copies are counted.
      options: of the compiler, beside those that every program needs.

    Raises:
      InputError: the compiler finds no way to fit it into a chip.
    """
    began = time.perf_counter()
    try:
        compiled, text, kernels = _compile(lower(), slice_, options or {})
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"required for ([\w ]+) \(([\d.]+)([GM])\) exceeds", str(error))
        used = used or re.search(r"(program): [Uu]sed ([\d.]+)([GM])\S* of \S+ hbm", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        needed = float(used[2]) * (1 << (30 if used[3] == "G" else 20))
        raise InputError(does_not_fit(f"{what}, {used[1]} alone", needed, slice_.memory)) from error
    loop, rest = hlo.summary(text, caches)
    found = compiled.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    return Program(memory, loop, rest, round(time.perf_counter() - began, 1), kernels)


def _compile(lowered, slice_: Topology, options: Mapping[str, str]):
    """A compiled program, its text and, for GPUs, its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        needed = aot_gpu.OPTIONS if slice_.gpus else {}
        with _nothing_kept():
            compiled = lowered.compile(compiler_options={**dump, **needed, **options})
        if slice_.gpus:
            return compiled, compiled.as_text(), thunks.summary(_thunks(folder))
        # jaxlib cannot read all programs of a libtpu that is newer than itself; the compiler's own
        # text of the finished program holds the same estimates.
        (path,) = pathlib.Path(folder).glob("*.after_codegen.txt")
        return compiled, path.read_text(), None


def _thunks(folder: str) -> str:
    """The compiler's list of what it starts, last state; passes that change nothing write none."""
    for ending in ("thunk_sequence_after_thunk_passes.txt", "thunk_sequence.txt"):
        for path in pathlib.Path(folder).glob(f"*.{ending}"):
            return path.read_text()
    raise InputError(f"{aot_gpu.PACKAGE}: expected a version that lists its kernels, found none")


@contextlib.contextmanager
def _nothing_kept():
    """Keeps programs out of a persistent compilation cache: without chips none can be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def does_not_fit(what: str, needed: float, chip: int) -> str:
    """The sentence for a program that needs more than a chip has, both in bytes."""
    return (
        f"{what}: expected at most the {chip / 2**30:.2f} GiB of a chip, "
        f"found a need of {needed / 2**30:.2f} GiB"
    )


def as_dict(program: Program) -> dict[str, Any]:
    """The figures as plain types."""
    found = dataclasses.asdict(program)
    found["memory"]["total"] = program.memory.total
    if program.kernels is None:
        del found["kernels"]
    return found


def versions(slice_: Topology) -> dict[str, str]:
    """Versions of what decides how a program is compiled."""
    names = ("jax", "jaxlib", aot_gpu.PACKAGE if slice_.gpus else "libtpu")
    return {name: importlib.metadata.version(name) for name in names}


def columns(programs: dict[str, Program], chip: int, turn: str) -> str:
    """The figures as aligned text, a column per program.

    Args:
      programs: by their titles; cycles of a turn are also given in those of the first.
      chip: bytes of a chip.
      turn: what one turn of the main loop is.
    """
    mib, found = 2**20, list(programs.values())
    lines = [("", *programs)]
    for name in ("arguments", "temporaries", "output", "alias", "code", "total"):
        if name == "code" and not any(p.memory.code for p in found):
            continue
        lines.append((f"{name}, MiB", *(f"{getattr(p.memory, name) / mib:,.1f}" for p in found)))
    lines.append(("of a chip's memory", *(f"{p.memory.total / chip:.1%}" for p in found)))
    for title, parts in ((turn, [p.loop for p in found]), ("outside", [p.rest for p in found])):
        lines.append((title, *("" for _ in parts)))
        for kind in sorted({kind for part in parts for kind in part.collectives}):
            traffic = [part.collectives.get(kind, hlo.Traffic(0, 0)) for part in parts]
            shown = (f"{t.count} x, {t.bytes / mib:.2f}" for t in traffic)
            lines.append((f"  {kind}, MiB", *shown))
        lines.append(("  copies of caches", *(str(part.copies) for part in parts)))
        if any(p.kernels for p in found):
            lines += _kernel_lines([p.kernels for p in found]) if title == turn else []
            continue
        lines.append(("  cycles", *(f"{part.cycles:,}" if part.cycles else "-" for part in parts)))
        if title == turn:
            first = parts[0].cycles or 1
            lines.append(("  in the first's", *(f"{part.cycles / first:.2f}" for part in parts)))
    return "\n".join(f"{name:<26}" + "".join(f"{x:>18}" for x in row) for name, *row in lines)


def _kernel_lines(found: list[thunks.Kernels | None]) -> list[tuple[str, ...]]:
    """Rows of ``columns``; a program without a loop has no turn to count."""

    def row(title: str, name: str):
        shown = (f"{getattr(k, name):,}" if k and k.total else "-" for k in found)
        return (title, *shown)

    names = ("products", "sorts", "copies", "collectives")
    return [
        row("  kernels", "total"),
        *(row(f"    {name} of them", name) for name in names),
        row("  started by the host", "starts"),
        (
            "  the loop is one graph",
            *("-" if not (k and k.total) else "yes" if k.one_graph else "no" for k in found),
        ),
    ]
