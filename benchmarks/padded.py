"""A target whose weights do not fit the processor's cache, and that answers like a small one.

    python benchmarks/padded.py runs/padded
    python -m infer.benchmark --target runs/padded --drafters ctc_spec_jax/demo/drafters/ctc

A step of a large model takes the time of reading its weights from memory. Those of the demo target
lie in the cache of a processor, where a draft of n tokens costs as much as n steps. Here the MLP of
every layer is widened by units whose weights are zeros: silu(0) * 0 = 0, so the target is the same
function and drafts are kept as before, while every step reads all of the weights. The folder is an
ordinary one of transformers, in float32.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from ctc_spec_jax import demo, folders, memory
from ctc_spec_jax.cli import exit_on_bad_input
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.decoder import DecoderLM

MLP_WIDTH = 25600
"""Of the demo target: 149 million parameters."""

_UNITS = {"gate_up": 2, "gate_up_bias": 1, "down": 0}
"""Axis of the units of the MLP in the arrays of a layer; the others have none."""


def widened(lm: DecoderLM, params, mlp_width: int):
    """The same function with MLPs of ``mlp_width`` units, those behind its own all zeros."""
    more = mlp_width - lm.config.mlp_width

    def padded(name: str, x) -> np.ndarray:
        return np.pad(x, [(0, more * (axis == _UNITS.get(name))) for axis in range(x.ndim)])

    params = dict(params)
    for i in tqdm(range(lm.config.num_layers), unit=" layers"):
        layer = params[f"layer_{i}"]
        params[f"layer_{i}"] = {name: padded(name, x) for name, x in layer.items()}
    return DecoderLM(dataclasses.replace(lm.config, mlp_width=mlp_width)), params


def write(target: str, out: pathlib.Path, mlp_width: int = MLP_WIDTH) -> int:
    """Write the folder, which appears under its name only when it is complete.

    Returns:
      The number of parameters.

    Raises:
      InputError: a target or a width that cannot be, or a place where no folder can.
    """
    if out.exists():
        raise InputError(f"out: expected a folder that is not there yet, found {out}")
    lm, params, tokenizer = folders.load_target(target)
    _check_width(lm, mlp_width)
    given = convert.target_folder(target)
    described = json.loads((given / "config.json").read_text())
    wide, params = widened(lm, params, mlp_width)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise InputError(
            f"out: expected a writable place, found {out} ({error.strerror})"
        ) from error
    try:
        convert.save_target(part, wide, params, described)
        tokenizer.save_pretrained(part)
        if (given / "generation_config.json").is_file():
            shutil.copy(given / "generation_config.json", part)
        part.chmod(0o755)
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sum(x.size for x in jax.tree.leaves(params))


def _check_width(lm: DecoderLM, mlp_width: int) -> None:
    config = lm.config
    if mlp_width < config.mlp_width:
        raise InputError(
            f"--mlp-width: expected at least the target's {config.mlp_width}, found {mlp_width}"
        )
    needed, free = 12 * config.num_layers * config.width * mlp_width, memory.available_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"--mlp-width: expected MLPs that fit the {free / 2**30:.1f} GiB of memory that are "
            f"free, found {mlp_width} units, which take {needed / 2**30:.1f} GiB"
        )


@exit_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; see the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, metavar="OUT", help="folder to make")
    parser.add_argument("--mlp-width", type=int, default=MLP_WIDTH, help="units of every MLP")
    parser.add_argument("--target", help="Hugging Face folder or hub id (default: the demo)")
    given = parser.parse_args(arguments)
    count = write(given.target or str(demo.target_folder()), given.out, given.mlp_width)
    print(f"{given.out}: {count / 1e6:.1f} million parameters, {4 * count / 1e6:.0f} MB in float32")


if __name__ == "__main__":
    main()
