"""Compile a sharded decode for a slice of TPU chips, without chips and without weights.

    python -m infer.compile --topology v5e:2x4 --model configs/models/llama2_7b.json \
        --mesh tensor=8 --batch 8 --prompt 512 --new-tokens 512 --tree-nodes 16

Needs package libtpu (extra tpu-aot). Plain decoding is compiled and, for more than one tree node,
decoding with an untrained CTC drafter. Printed per chip: memory; collectives, copies of caches and
the compiler's estimate of cycles of one round (a turn of the loop: draft, verify, accept), and of
the prefill with all else. The estimate adds up products, fusions and copies; time on the wires is
not in it, nor is anything measured. The exit status is 2 where a program does not fit.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from ctc_spec_jax import aot, decode, recipes, sharding
from ctc_spec_jax.cli import DTYPES, exit_on_bad_input
from ctc_spec_jax.decode import Loop, NoDraft
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from ctc_spec_jax.types import Drafter, Params, Request
from ctc_spec_jax.verify import TargetSample
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


def compile_decode(
    slice_: aot.Topology,
    mesh: Mesh,
    lm: DecoderLM,
    params: Params,
    drafter: tuple[Drafter, Any],
    sizes: tuple[int, int, int],
    dtype,
) -> aot.Program:
    """The program of a whole decode; ``sizes`` are batch, prompt and new tokens."""
    draft, init = drafter
    batch, prompt, new = sizes
    loop = Loop(lm, draft, TargetSample(), new)
    draft_params = recipes.abstract_params(init, dtype)
    weights, given, state = arguments_of(loop, params, draft_params, batch, prompt, mesh)
    jitted = jax.jit(decode.decode, static_argnums=0)
    what = f"decode of {batch} rows on {slice_.name}"
    with jax.set_mesh(mesh):
        return aot.compile_program(
            lambda: jitted.lower(loop, *weights, *given),
            what,
            slice_.memory,
            aot.part_shapes(state),
        )


def add_result(path: str, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Put a result into a JSON file, in the place of an earlier one of the same settings."""
    document: dict[str, Any] = {"results": []}
    if pathlib.Path(path).exists():
        try:
            document = json.loads(pathlib.Path(path).read_text())
            document["results"] = [r for r in document["results"] if r["settings"] != settings]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"--json: expected results of this program in {path}") from error
    document["results"].append({"settings": settings, "versions": aot.versions(), **found})
    write_document(path, document)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--topology", required=True, help="such as v5e:2x4 or v5p:2x2x2")
    options.add_argument(
        "--model", required=True, help="config.json of the target, without weights"
    )
    options.add_argument("--mesh", default="tensor=-1", help="such as data=2,fsdp=1,tensor=4")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--prompt", type=int, default=512, help="tokens of the longest prompt")
    options.add_argument("--new-tokens", type=int, default=512)
    options.add_argument("--tree-nodes", type=int, default=16, help="1: plain decoding alone")
    options.add_argument("--depth", type=int, default=8, help="deepest node of a tree")
    options.add_argument("--drafter-layers", type=int, default=1)
    options.add_argument("--frames", type=int, default=12)
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options.add_argument("--layers", type=int, default=0, help="the target's first layers alone")
    options.add_argument("--json", help="file to put the figures into, beside those it holds")
    return options


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.compile``."""
    given = parser().parse_args()
    check_counts(given, ("batch", "prompt", "new_tokens", "tree_nodes"))
    check_json(given.json)
    dtype = DTYPES[given.dtype]
    lm, params = recipes.abstract_target(given.model, dtype, given.layers)
    slice_ = aot.topology(given.topology)
    mesh = slice_.mesh(given.mesh)
    shape = (given.drafter_layers, given.frames, given.depth)
    settings = {name: value for name, value in vars(given).items() if name != "json"}
    programs, problem = {}, None
    for nodes in tqdm(sorted({1, given.tree_nodes}), unit=" programs"):
        try:
            program = compile_decode(
                slice_,
                mesh,
                lm,
                params,
                (drafter_of(lm, nodes, *shape)),
                (given.batch, given.prompt, given.new_tokens),
                dtype,
            )
        except InputError as error:
            problem = error
            break
        programs["plain" if nodes == 1 else f"{nodes} nodes"] = program
        if program.memory.total > slice_.memory:
            what = f"decode of {given.batch} rows on {slice_.name}"
            problem = InputError(aot.does_not_fit(what, program.memory.total, slice_.memory))
    if programs:
        print(f"one chip of {slice_.name}, mesh {given.mesh}, {pathlib.Path(given.model).stem}")
        print(aot.columns(programs, slice_.memory, "a round", "prefill and the rest"))
    if given.json:
        figures = {name: aot.as_dict(program) for name, program in programs.items()}
        found = {"chip_bytes": slice_.memory, "programs": figures, "problem": str(problem or "")}
        add_result(given.json, settings, found)
    sys.stdout.flush()
    if problem:
        raise problem


if __name__ == "__main__":
    main()
