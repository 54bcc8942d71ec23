"""Compile the training step of a drafter for TPU chips or GPUs, without them, weights or data.

    python -m train.compile --topology v5e:4x4 --config configs/llama2_7b_chat.yaml \
        --model configs/models/llama2_7b.json [section.field=value ...]

Needs package libtpu (extra tpu-aot) or JAX's plugin for CUDA (extra gpu-aot; ``--topology
h100:8``, kernels in the place of cycles). ``--model`` is the config.json that stands for the
config's target; without it, the target's own folder or hub model is asked for its own. Printed per
chip: memory; collectives and the compiler's estimate of cycles, of one micro-batch (a turn of the
loop) and of what runs outside the loop; where a step has one micro-batch there is no loop. The
estimate leaves out time on the wires, and nothing is measured. The exit status is 2 where the step
does not fit.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ctc_spec_jax import aot, folders, sharding
from ctc_spec_jax.cli import DTYPES, exit_on_bad_input
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.types import Params
from infer.compile import add_result
from infer.generate import check_json
from train import step
from train.config import Batch, TrainConfig, load_config
from train.drafter import drafter_of, loss_of


def batch_shapes(batch: Batch, mesh: Mesh):
    """Shapes of a step's batch, where it lies."""
    count = batch.rows // batch.microbatch
    row = (count, batch.microbatch)
    kinds = {"tokens": jnp.int32, "segments": jnp.int32, "positions": jnp.int32, "trained": bool}
    shapes = {
        name: jax.ShapeDtypeStruct((*row, batch.length), kind) for name, kind in kinds.items()
    }
    shapes["row"] = jax.ShapeDtypeStruct(row, jnp.int32)
    place = step.batch_sharding(mesh)
    return aot.abstract(shapes, jax.tree.map(lambda _: place, shapes))


def lower_step(config: TrainConfig, lm: DecoderLM, frozen: Params, mesh: Mesh):
    """The step of ``train.train`` for a drafter of ``lm``, lowered for shapes on a mesh."""
    drafter = drafter_of(config, lm)
    update = step.optimizer(config.optim, config.run.steps)
    average = config.optim.average
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda k: step.init_state(drafter.init_params(k), update, average), key)
    function = step.make_step(loss_of(config, mesh, lm, drafter), update, mesh, average)
    return function.lower(
        aot.abstract(state, sharding.parameters(mesh, state)),
        aot.abstract(frozen, sharding.homes(mesh, frozen)),
        batch_shapes(config.batch, mesh),
        key,
    )


def compile_step(config: TrainConfig, model: str, slice_: aot.Topology, layers: int = 0):
    """The compiled step of a configuration on a slice.

    Raises:
      InputError: a mesh or a micro-batch that does not suit the slice, or a step that needs more
        than a chip has.
    """
    if config.objective != "drafter":
        raise InputError(f"objective: expected 'drafter', found {config.objective!r}")
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    mesh = sharding.make_mesh(*sizes, devices=slice_.devices)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch.microbatch % shards:
        raise InputError(
            f"batch.microbatch: expected a multiple of data x fsdp ({shards}), "
            f"found {config.batch.microbatch}"
        )
    lm, frozen = folders.abstract_target(model, DTYPES[config.dtype], layers)
    what = f"training step of {config.batch.rows} rows on {slice_.name}"
    with jax.set_mesh(mesh):
        return aot.compile_program(lambda: lower_step(config, lm, frozen, mesh), what, slice_), what


def overview(results: list[dict[str, Any]]) -> str:
    """Training steps of a results file as aligned text, a line each."""
    rows = [("experiment", "model", "slice", "GiB a chip", "of it", "Mcycles a micro-batch")]
    for result in results:
        settings = result["settings"]
        if "config" not in settings or not result["programs"]:
            continue
        config, model = (pathlib.Path(settings[name]).stem for name in ("config", "model"))
        step_ = result["programs"]["step"]
        need, cycles = step_["memory"]["total"], step_["loop"]["cycles"]
        share = f"{need / result['chip_bytes']:.0%}"
        shown = f"{cycles / 1e6:.1f}" if cycles else "-"  # a step of one micro-batch has no loop
        rows.append((config, model, settings["topology"], f"{need / 2**30:.2f}", share, shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m train.compile``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", required=True, help="such as v5e:4x4, v5p:2x2x2 or h100:8")
    parser.add_argument("--config", required=True, help="experiment file of configs/")
    parser.add_argument("--model", help="config.json of the target, without weights")
    parser.add_argument("--layers", type=int, default=0, help="the target's first layers alone")
    parser.add_argument("--json", help="file to put the figures into, beside those it holds")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    given = parser.parse_args()
    check_json(given.json)
    config = load_config(given.config, given.overrides)
    model = given.model or str(convert.target_folder(config.target))
    slice_ = aot.topology(given.topology)
    settings = {name: value for name, value in vars(given).items() if name != "json"}
    figures, problem = {}, None
    try:
        program, what = compile_step(config, model, slice_, given.layers)
        figures["step"] = aot.as_dict(program)
        print(aot.columns({"step": program}, slice_.memory, "a micro-batch"), flush=True)
        if program.memory.total > slice_.memory:
            raise InputError(aot.does_not_fit(what, program.memory.total, slice_.memory))
    except InputError as error:
        problem = error
    if given.json:
        result = {
            "versions": aot.versions(slice_),
            "chip_bytes": slice_.memory,
            "programs": figures,
            "problem": str(problem or ""),
        }
        add_result(given.json, settings, result)
    if problem:
        raise problem


if __name__ == "__main__":
    main()
