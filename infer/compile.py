"""Compile a sharded decode for a slice of TPU chips or for GPUs, without chips, without weights.

    python -m infer.compile --topology v5e:2x4 --model configs/models/llama2_7b.json \
        --mesh tensor=8 --batch 8 --prompt 512 --new-tokens 512 --tree-nodes 16
    python -m infer.compile --topology h100 --model configs/models/llama2_7b.json \
        --batch 1 --tree-nodes 16 64

Needs package libtpu (extra tpu-aot) or JAX's plugin for CUDA (extra gpu-aot). Compiled are plain
rounds, rounds with a CTC drafter, whose weights do not matter, and the prefill. Printed per chip:
memory; collectives and copies of caches of one round (a turn of the loop: draft, verify, accept)
and of what runs outside the loop; of TPUs the compiler's estimate of cycles, of GPUs the kernels
of a round and what the host starts of them, with CTC_SPEC_XLA=graphs in the environment as a
decode with it would be compiled. The estimate adds up products, fusions and copies; time on the
wires is not in it, and nothing is measured. The exit status is 2 where a program does not fit.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from ctc_spec_jax import aot, decode, folders, sharding, xla
from ctc_spec_jax.cli import DTYPES, add_precision, exit_on_bad_input
from ctc_spec_jax.decode import Loop, NoDraft
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from ctc_spec_jax.types import Drafter, Params, Request
from ctc_spec_jax.verify import TargetSample
from infer import roofline
from infer.generate import check_counts, check_json, write_document


def drafter_of(lm: DecoderLM, nodes: int, layers: int, frames: int, depth: int):
    """A drafter for ``lm`` and the initialiser of its parameters; plain decoding for one node."""
    if nodes == 1:
        return NoDraft(), lambda key: ()
    if frames < 1 or layers < 1 or depth < 1:
        raise InputError("drafter: expected layers, frames and depth of at least 1, found less")
    tree = PrefixTree(nodes, min(depth, frames, nodes - 1))
    drafter = CTCDrafter(ctc_config(lm.config, layers, frames), tree)
    return drafter, drafter.init_params


def arguments_of(
    loop: Loop, params: Params, draft_params: Params, batch: int, prompt: int, mesh: Mesh
):
    """Shapes of everything that a greedy decode is given, and of its state, where they lie."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    request = Request(row, jax.ShapeDtypeStruct((batch, 1), jnp.int32), keys)
    given = (jax.ShapeDtypeStruct((batch, prompt), jnp.int32), row, request)
    weights = (params, draft_params)
    state = jax.eval_shape(lambda *a: decode.start(loop, *a), *weights, *given)
    return (
        aot.abstract(weights, sharding.homes(mesh, weights)),
        tuple(aot.abstract(x, sharding.inputs(mesh, x)) for x in given),
        aot.abstract(state, sharding.inputs(mesh, state)),
    )


def programs_of(
    lm: DecoderLM,
    params: Params,
    drafter: tuple[Drafter, Any],
    sizes: tuple[int, int, int],
    dtype,
    mesh: Mesh,
):
    """Prefill and rounds, each a function that lowers it, and the shapes of caches on a chip.

    ``sizes`` are batch, prompt and new tokens. The rounds are those of ``decode.advance``, to
    which the state is donated.
    """
    draft, init = drafter
    batch, prompt, new = sizes
    loop = Loop(lm, draft, TargetSample(), new)
    draft_params = folders.abstract_params(init, dtype)
    weights, given, state = arguments_of(loop, params, draft_params, batch, prompt, mesh)
    start = jax.jit(decode.start, static_argnums=0)
    advance = jax.jit(decode.advance, static_argnums=0, donate_argnums=3)
    rounds = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = {
        "prefill": lambda: start.lower(loop, *weights, *given),
        "rounds": lambda: advance.lower(loop, *weights, state, given[2], rounds),
    }
    return lowered, aot.part_shapes(state)


def compile_all(
    given: argparse.Namespace, slice_: aot.Topology, found: dict[str, aot.Program]
) -> None:
    """Compile plain rounds, rounds with a drafter and the prefill, into ``found`` by title.

    Raises:
      InputError: bad sizes, or a program that does not fit; those before it are in ``found``.
    """
    dtype, mesh = DTYPES[given.dtype], sharding.mesh_of(given.mesh, slice_.devices)
    lm, params = folders.abstract_target(given.model, dtype, given.layers, given.int8)
    sizes = (given.batch, given.prompt, given.new_tokens)
    shape = (given.drafter_layers, given.frames, given.depth)
    nodes = sorted({1, *given.tree_nodes})
    options = xla.gpu_options() if slice_.gpus else {}
    work = [(n, "rounds") for n in nodes] + [(nodes[-1], "prefill")]
    for count, kind in tqdm(work, unit=" programs"):
        title = "prefill" if kind == "prefill" else "plain" if count == 1 else f"{count} nodes"
        what = f"{title} of {given.batch} rows on {slice_.name}"
        lowered, caches = programs_of(lm, params, drafter_of(lm, count, *shape), sizes, dtype, mesh)
        with jax.set_mesh(mesh):
            found[title] = aot.compile_program(lowered[kind], what, slice_, caches, options)
        needed = found[title].memory.total
        if needed > slice_.memory:
            raise InputError(aot.does_not_fit(what, needed, slice_.memory))


def bound_seconds(given: argparse.Namespace, slice_: aot.Topology) -> float:
    """Seconds in which a chip reads its part of the target's weights and caches once.

    No plain step can take fewer.
    """
    dtype, mesh = DTYPES[given.dtype], sharding.mesh_of(given.mesh, slice_.devices)
    lm, params = folders.abstract_target(given.model, dtype, given.layers, given.int8)
    loop = Loop(lm, NoDraft(), TargetSample(), given.new_tokens)
    (placed, _), _, state = arguments_of(loop, params, (), given.batch, given.prompt, mesh)
    read = jax.tree.leaves((roofline.read_each_step(placed), state.cache))
    parts = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in read]
    return sum(parts) / slice_.bandwidth


def add_result(path: str, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Put a result into a JSON file, in the place of an earlier one of the same settings."""
    document: dict[str, Any] = {"results": []}
    if pathlib.Path(path).exists():
        try:
            document = json.loads(pathlib.Path(path).read_text())
            document["results"] = [r for r in document["results"] if r["settings"] != settings]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"--json: expected results of this program in {path}") from error
    document["results"].append({"settings": settings, **found})
    write_document(path, document)


def overview(results: list[dict[str, Any]]) -> str:
    """Decodes of a results file as aligned text, a line each.

    ``bound`` is the time of reading a chip's weights and caches once, in the unit of the rounds.
    """
    titles = ("model", "slice", "mesh", "rows", "GiB a chip", "bound", "Mcycles a round", "copies")
    rows: list[tuple[str, ...]] = [titles]
    for result in results:
        settings, programs = result["settings"], result["programs"]
        if "mesh" not in settings:
            continue
        place = _place(settings)
        if result["problem"]:
            rows.append((*place, result["problem"].rpartition("found a need of ")[2] + " (no)"))
            continue
        turns = _turns(settings, programs)
        cycles = _joined(turns, lambda p: f"{p['loop']['cycles'] / 1e6:.2f}")
        bound = f"{result['bound_cycles'] / 1e6:.2f}"
        rows.append((*place, _joined(turns, _gib), bound, cycles, _joined(turns, _copies)))
    return _aligned(rows)


def gpu_overview(results: list[dict[str, Any]]) -> str:
    """Decodes on GPUs of a results file as aligned text, a line each.

    ``bound ms`` is the time of reading a GPU's weights and caches once, ``starts`` what the host
    starts in a round; both counts of copies are of caches, in a round and outside the loop.
    """
    titles = ("model", "GPUs", "mesh", "rows", "XLA", "GiB a GPU", "bound ms", "kernels a round")
    rows: list[tuple[str, ...]] = [(*titles, "starts", "copies", "outside")]
    for result in results:
        settings = result["settings"]
        place = (*_place(settings), settings["xla"])
        if result["problem"]:
            rows.append((*place, result["problem"].rpartition("found a need of ")[2] + " (no)"))
            continue
        turns = _turns(settings, result["programs"])
        kernels = _joined(turns, lambda p: str(p["kernels"]["total"]))
        starts = _joined(turns, lambda p: str(p["kernels"]["starts"]))
        outside = _joined(turns, lambda p: str(p["rest"]["copies"]))
        found = _joined(turns, _gib), f"{result['bound_ms']:.2f}", kernels, starts
        rows.append((*place, *found, _joined(turns, _copies), outside))
    return _aligned(rows)


def _place(settings: dict[str, Any]) -> tuple[str, str, str, str]:
    model = pathlib.Path(settings["model"]).stem + " int8" * settings.get("int8", False)
    return model, settings["topology"], settings["mesh"], str(settings["batch"])


def _turns(settings: dict[str, Any], programs: dict[str, Any]) -> list[dict[str, Any]]:
    """Plain rounds and those of every size of tree."""
    trees = (programs[f"{n} nodes"] for n in settings["tree_nodes"] if n > 1)
    return [programs["plain"], *trees]


def _gib(program: dict[str, Any]) -> str:
    return f"{program['memory']['total'] / 2**30:.2f}"


def _copies(program: dict[str, Any]) -> str:
    return str(program["loop"]["copies"])


def _joined(programs: list[dict[str, Any]], shown: Callable[[dict[str, Any]], str]) -> str:
    return " / ".join(map(shown, programs))


def _aligned(rows: list[tuple[str, ...]]) -> str:
    count = len(rows[0])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(count)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--topology", required=True, help="such as v5e:2x4, v5p:2x2x2 or h100:8")
    options.add_argument(
        "--model", required=True, help="config.json of the target, without weights"
    )
    options.add_argument("--mesh", default="tensor=-1", help="such as data=2,fsdp=1,tensor=4")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--prompt", type=int, default=512, help="tokens of the longest prompt")
    options.add_argument("--new-tokens", type=int, default=512)
    options.add_argument(
        "--tree-nodes", type=int, nargs="+", default=[16], help="sizes; 1: plain decoding alone"
    )
    options.add_argument("--depth", type=int, default=8, help="deepest node of a tree")
    options.add_argument("--drafter-layers", type=int, default=1)
    options.add_argument("--frames", type=int, default=12)
    add_precision(options, "bfloat16")
    options.add_argument("--layers", type=int, default=0, help="the target's first layers alone")
    options.add_argument("--json", help="file to put the figures into, beside those it holds")
    return options


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.compile``."""
    given = parser().parse_args()
    check_counts(given, ("batch", "prompt", "new_tokens"))
    if min(given.tree_nodes) < 1:
        raise InputError(f"--tree-nodes: expected at least 1, found {min(given.tree_nodes)}")
    check_json(given.json)
    slice_ = aot.topology(given.topology)
    settings = {name: value for name, value in vars(given).items() if name != "json"}
    if not given.int8:  # as results were named before there was a choice
        del settings["int8"]
    if slice_.gpus:
        settings["xla"] = "graphs" if xla.graphs() else "default"
    found: dict[str, aot.Program] = {}
    problem, bound = None, bound_seconds(given, slice_)
    try:
        compile_all(given, slice_, found)
    except InputError as error:
        problem = error
    if found:
        print(f"one chip of {slice_.name}, mesh {given.mesh}, {pathlib.Path(given.model).stem}")
        print(aot.columns(found, slice_.memory, "a round"))
        print(f"reading weights and caches once takes {bound * 1e3:.2f} ms by the vendor's figure")
    if given.json:
        figures = {name: aot.as_dict(program) for name, program in found.items()}
        unit = {"bound_ms": round(bound * 1e3, 6)}
        result = {
            "versions": aot.versions(slice_),
            "chip_bytes": slice_.memory,
            **(unit if slice_.gpus else {"bound_cycles": round(bound * slice_.clock)}),
            "programs": figures,
            "problem": str(problem or ""),
        }
        add_result(given.json, settings, result)
    if problem:
        raise problem


if __name__ == "__main__":
    main()
