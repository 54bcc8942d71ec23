"""What a run writes down: metrics.jsonl, TensorBoard, and what its progress bar shows.

Only the first of several processes writes.
"""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from ctc_spec_jax.errors import InputError


class Log:
    """``metrics.jsonl``: one line per log or evaluation; lines past a resumed step are dropped.

    ``newest`` holds the last value of every metric, ``seconds`` the time of the run so far,
    compilation and evaluation included, over all its resumes.
    """

    def __init__(self, folder: epath.Path, start: int, tensorboard: bool = False):
        self.path, self.newest, self.last_line = folder / "metrics.jsonl", {}, ""
        self._first = jax.process_index() == 0
        kept = []
        for text in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break  # a kill cut it off
            if line["step"] <= start:
                kept.append(text + "\n")
                self.newest |= line
        self.lines = kept
        self._began = time.monotonic() - self.newest.get("seconds", 0.0)
        self._board = _board(folder, start) if tensorboard and self._first else None
        if self._first:
            _replace(self.path, "".join(kept))

    def write(self, step: int, metrics) -> None:
        """Append a line; waits for the device. Vectors become one number per entry."""
        line: dict[str, Any] = {"step": step} | numbers(metrics)
        line["seconds"] = round(time.monotonic() - self._began, 1)
        self.newest |= line
        self.last_line = json.dumps(line)
        if not self._first:
            return
        self.lines.append(self.last_line + "\n")
        if is_remote(self.path):
            self.path.write_text("".join(self.lines))  # objects of a bucket cannot grow
        else:
            with self.path.open("a") as file:
                file.write(self.last_line + "\n")
        for name, value in line.items():
            if self._board and name != "step":
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what TensorBoard still holds back."""
        if self._board:
            self._board.close()


def numbers(metrics) -> dict[str, float]:
    """Metrics as plain numbers; entry i of a vector ``name`` is ``name_i``, counted from 1."""
    found = {}
    for name, value in metrics.items():
        value = np.asarray(value)
        if value.ndim == 0:
            found[name] = float(value)
        else:
            found |= {f"{name}_{i}": float(x) for i, x in enumerate(value.reshape(-1), 1)}
    return found


def _board(folder: epath.Path, start: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            "run.tensorboard: expected the package tensorboardX (pip install 'ctc-spec-jax[logs]')"
            ", found none"
        ) from error
    # Events of a killed run past the step that it resumes from are hidden, not shown twice.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)


def is_remote(path) -> bool:
    """Whether a path is in a bucket."""
    return "://" in str(path)


def _replace(path: epath.Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


class Rates:
    """Tokens per second, model FLOP utilisation and memory since the last log.

    ``flops`` is the arithmetic of one step (see ``plan.step_flops``), ``tokens`` its rows' tokens.
    """

    def __init__(self, tokens: int, flops: float):
        self.tokens, self.flops = tokens, flops
        self.peak = peak_flops() * jax.device_count()
        self._began, self._steps = time.perf_counter(), 0

    def restart(self) -> None:
        """Count anew from here: what came before was not training."""
        self._began, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        """One more step has been dispatched."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The rates, after the device has finished the steps; counts anew."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rate = self._steps / seconds
        found = {"tokens_per_second": self.tokens * rate, "step_seconds": 1 / max(rate, 1e-9)}
        if self.peak:
            found["model_flop_utilisation"] = self.flops * rate / self.peak
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            found["peak_memory_gib"] = stats["peak_bytes_in_use"] / 2**30
        self.restart()
        return found


_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops() -> float:
    """Dense bfloat16 FLOP/s of one device by its data sheet, or 0 where it is not known."""
    kind = jax.devices()[0].device_kind
    names = sorted((name for name in _PEAKS if kind.startswith(name)), key=len)
    return _PEAKS[names[-1]] if names else 0.0
