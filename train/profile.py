"""Cost of drafter training: a step's time, where it goes, and its memory by number of anchors.

    python -m train.profile --model configs/models/llama2_7b.json --layers 2 --rows 1 \
        --length 256 --anchors 32 --json benchmarks/train_cost.json

For CPU, GPU and TPU, with random weights of a model's shape. All timed programs take turns in one
run; figures are medians of repeats. See ``train.cost`` for how the parts are told apart.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from jax.sharding import Mesh

from ctc_spec_jax import folders, recipes, sharding
from ctc_spec_jax.cli import DTYPES, exit_on_bad_input, use_compilation_cache
from ctc_spec_jax.draft.training import Loss, Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.decoder import DecoderLM
from infer.generate import check_counts, check_json, write_document
from infer.profile import hardware
from train.cost import Setting, memory_by_anchors, time_parts


def table(document: dict[str, Any]) -> str:
    """The figures as aligned text."""
    lines = []
    if time_of := document["time"]:
        whole = time_of["seconds"]["step"]
        lines.append(
            f"a step: {whole:.3f} s, {time_of['step_flops'] / 1e12:.3f} TFLOP, model FLOP "
            f"utilisation {time_of['model_flop_utilisation']:.1%} of "
            f"{time_of['peak_flops'] / 1e12:.3f} TFLOP/s ({time_of['peak']})"
        )
        for name, seconds in time_of["parts"].items():
            lines.append(f"  {name:<18}{seconds:>9.3f} s{seconds / whole:>8.1%}")
        lines.append(
            f"target in the step: {time_of['target_in_bare_forwards']:.2f} bare forward passes of "
            f"{time_of['seconds']['bare target']:.3f} s; alone with taps: "
            f"{time_of['taps_alone_in_bare_forwards']:.2f}"
        )
    if document["memory"]:
        names = ("anchors", "step, MiB", "with remat, MiB", "all logits, MiB")
        lines.append("".join(f"{name:>17}" for name in names))
        for row in document["memory"]:
            sizes = (row[name] / 2**20 for name in ("kept", "remat", "logits"))
            lines.append(f"{row['anchors']:>17}" + "".join(f"{size:>17,.1f}" for size in sizes))
        lines.append(
            "temporaries on a device; all logits: what a head that is not cut up would add"
        )
    return "\n".join(lines)


def plot(document: dict[str, Any], path: str) -> None:
    """Temporaries above those of the fewest anchors, by number of anchors."""
    import matplotlib.pyplot as plt

    rows = document["memory"]
    anchors = [row["anchors"] for row in rows]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    names = {"logits": "logits of all frames", "kept": "the step", "remat": "the step with remat"}
    for name, label in names.items():
        grown = [(row[name] - rows[0][name]) / 2**20 for row in rows]
        axes.plot(anchors, grown, marker="o", label=label)
    axes.set(xlabel="anchors in a row", ylabel=f"MiB more than with {anchors[0]} anchors")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def setting_of(given: argparse.Namespace, lm: DecoderLM, mesh: Mesh) -> Setting:
    """The setting that the arguments describe.

    Raises:
      InputError: rows that the mesh does not share evenly, or more labels than frames.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if given.rows % shards:
        raise InputError(f"--rows: expected a multiple of {shards} for --mesh, found {given.rows}")
    if given.labels > given.frames:
        raise InputError(f"--labels: expected at most --frames, found {given.labels}")
    recipe = recipes.find(recipes.DEFAULT)
    shape = Shape(layers=given.drafter_layers, frames=given.frames)
    drafter = recipe.drafter(recipe.network(lm.config, shape), 16, given.labels, "")
    weights, dtype = Loss(labels=given.labels, chunk=given.chunk), DTYPES[given.dtype]
    assert recipe.loss is not None
    loss = recipe.loss(lm, drafter, weights, given.anchors, dtype, given.remat, shards)
    return Setting(loss, mesh, given.rows, given.length)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--model", required=True, help="config.json of a target, or its folder")
    options.add_argument("--layers", type=int, default=0, help="the target's first layers alone")
    options.add_argument("--rows", type=int, default=4)
    options.add_argument("--length", type=int, default=2048, help="tokens of a row")
    options.add_argument("--anchors", type=int, default=64, help="of a row, where time is measured")
    options.add_argument("--memory-anchors", type=int, nargs="*", default=[8, 16, 32, 64, 128, 256])
    options.add_argument("--drafter-layers", type=int, default=1)
    options.add_argument("--frames", type=int, default=12)
    options.add_argument("--labels", type=int, default=8)
    options.add_argument("--chunk", type=int, default=64, help="anchors whose logits exist at once")
    options.add_argument("--remat", action="store_true", help="also where time is measured")
    options.add_argument("--mesh", default="data=-1", help="such as data=2,fsdp=4,tensor=1")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--json", help="file to write the figures to")
    options.add_argument("--plot", help="picture to draw (needs matplotlib, extra notebook)")
    return options


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m train.profile``."""
    given = parser().parse_args()
    counts = ("rows", "length", "anchors", "drafter_layers", "frames", "labels", "chunk", "repeats")
    check_counts(given, counts)
    if any(size < 1 for size in given.memory_anchors):
        raise InputError(f"--memory-anchors: expected at least 1, found {given.memory_anchors}")
    if given.plot and not given.memory_anchors:
        raise InputError("--plot: expected --memory-anchors, found none")
    check_json(given.json)
    lm, frozen = folders.abstract_target(given.model, DTYPES[given.dtype], given.layers)
    setting = setting_of(given, lm, sharding.mesh_of(given.mesh))
    use_compilation_cache()
    settings = {name: x for name, x in vars(given).items() if name not in ("json", "plot")}
    document = {**hardware(), "settings": settings, "time": None, "memory": []}

    def write() -> None:  # after every part: a run that is cut keeps what it has
        if given.json:
            write_document(given.json, document)

    document["time"] = time_parts(setting, frozen, given.repeats)
    write()
    for found in memory_by_anchors(setting, frozen, sorted(given.memory_anchors)):
        document["memory"].append(dataclasses.asdict(found))
        write()
    print(table(document))
    if given.plot:
        plot(document, given.plot)


if __name__ == "__main__":
    main()
