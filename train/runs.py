"""The folder of a run: who it belongs to, what it says about its result."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import yaml
from etils import epath

from ctc_spec_jax.errors import InputError
from train.config import TrainConfig, load_config, to_dict
from train.log import Log, is_remote

SCORE = "accepted_length"
"""The metric that picks the best checkpoint and stops early."""

_FREE = {
    "batch": ("microbatch", "remat"),
    "loss": ("chunk",),
    "data": ("cache",),
}
"""Fields that change how a run computes, not what."""


def check_writable(folder: epath.Path) -> None:
    """Refuse a folder that cannot be written, before anything long begins.

    Raises:
      InputError: says which and why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"run.folder: expected a writable folder, found {folder} ({error.strerror})"
        ) from error


def open_run(folder: epath.Path, config: TrainConfig, fingerprint: str):
    """The checkpoints of a run and its newest step, or 0; writes ``run.yaml``.

    Raises:
      InputError: the folder cannot be written, or holds another experiment or other data.
    """
    # Imported here because it takes as long as everything else that --help waits for.
    from ctc_spec_jax.checkpoint import Checkpoints

    check_writable(folder)
    path = folder / "run.yaml"
    checkpoints = Checkpoints(folder / "checkpoints", config.run.keep, SCORE)
    start = checkpoints.latest() or 0
    if start:
        _check_same_run(path, config)
        before = checkpoints.notes(start)["fingerprint"]
        if before != fingerprint:
            raise InputError(
                f"data: expected the documents that {folder} was trained on (fingerprint "
                f"{before}), found others ({fingerprint}); choose another folder"
            )
    if jax.process_index() == 0:
        path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    return checkpoints, start


def _check_same_run(path: epath.Path, config: TrainConfig) -> None:
    """Refuse to continue a run whose curve would be another one from its start."""
    # Read with the defaults of today, so that a run survives a new key.
    before, now = (_meaning(c) for c in (load_config(str(path)), config))
    for name, value in now.items():
        if before[name] != value:
            raise InputError(
                f"run.folder: expected {name} {before[name]!r} as in {path}, which has "
                f"checkpoints, found {value!r}; choose another folder"
            )


def _meaning(config: TrainConfig) -> dict:
    """Every field that decides what a run computes, by its dotted name."""
    tree = to_dict(config)
    tree["run"] = {"seed": config.run.seed}
    for name in ("evaluation", "mesh"):
        del tree[name]
    sections = {name: part for name, part in tree.items() if isinstance(part, dict)}
    fields = {
        f"{section}.{name}": value
        for section, part in sections.items()
        for name, value in part.items()
        if name not in _FREE.get(section, ())
    }
    return fields | {name: tree[name] for name in tree.keys() - sections.keys()}


@contextlib.contextmanager
def local_folder(folder: str) -> Iterator[str]:
    """A folder of this machine to write in; what it holds is copied to ``folder`` in a bucket.

    Libraries for weights and tokenizers write files of a disk only.
    """
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        local = pathlib.Path(name) / "export"
        yield str(local)
        for path in sorted(local.rglob("*")):
            if path.is_file():
                copy = epath.Path(folder) / path.relative_to(local).as_posix()
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())


class EarlyStop:
    """Whether a run should end: ``patience`` evaluations without a longer accepted length."""

    def __init__(self, patience: int, log: Log):
        self.patience = patience
        lines = [json.loads(line) for line in log.lines]
        self._scores = [line[SCORE] for line in lines if SCORE in line]

    def __call__(self, scores: dict[str, float]) -> bool:
        if SCORE in scores:
            self._scores.append(scores[SCORE])
        if not self.patience or len(self._scores) <= self.patience:
            return False
        recent = self._scores[-self.patience :]
        return max(recent) <= max(self._scores[: -self.patience])


def point_to_best(folder: epath.Path, log: Log) -> None:
    """Write ``best.json``: the step with the longest accepted length so far, and that length."""
    scored = [line for line in map(json.loads, log.lines) if SCORE in line]
    if jax.process_index() or not scored:
        return
    best = max(scored, key=lambda line: (line[SCORE], line["step"]))
    part = folder / ".best.json.part"
    part.write_text(json.dumps({"step": best["step"], SCORE: best[SCORE]}) + "\n")
    part.replace(folder / "best.json")


def shown(newest: dict[str, float]) -> dict[str, str]:
    """What the progress bar says."""
    names = {
        "loss": "loss",
        SCORE: "accepted",
        "tokens_per_second": "tokens/s",
        "model_flop_utilisation": "MFU",
        "peak_memory_gib": "GiB",
    }
    return {short: f"{newest[name]:.4g}" for name, short in names.items() if name in newest}


def sentence(step: int, scores: dict[str, Any]) -> str:
    """What an evaluation found, in a line; everything is in metrics.jsonl."""
    parts = [f"step {step}: held-out loss {float(scores['heldout_loss']):.4f}"]
    if SCORE in scores:
        ends = (scores[f"{SCORE}_{end}"] for end in ("low", "high"))
        parts.append(
            f"accepted length {scores[SCORE]:.2f} ({' to '.join(f'{x:.2f}' for x in ends)}) "
            f"over {scores['accepted_prompts']:.0f} prompts"
        )
    return ", ".join(parts)


def record(config: TrainConfig, objective, log: Log, best: int | None) -> dict:
    """How a result was made: what ``training.json`` says."""
    device = jax.devices()[0].device_kind
    return {
        "config": to_dict(config),
        "command": "python -m train.train " + shlex.join(sys.argv[1:]),
        "data": objective.record,
        "metrics": log.newest,
        "exported_step": best if best is not None else log.newest.get("step"),
        "hardware": f"{jax.device_count()} x {device} ({platform.machine()}, "
        f"{os.cpu_count()} cores)",
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "grain")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }
