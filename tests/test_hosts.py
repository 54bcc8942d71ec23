"""Two processes train as one does; a lost one is reported, and the rest is resumed by one alone.

Real processes on this machine, one CPU device each, that talk over gloo.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests import XLA_FLAGS
from train import hosts
from train import train as program
from train.config import load_config

ROOT = pathlib.Path(__file__).parents[1]
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR")

CONFIG = """
objective: target
run: {log_every: 1, eval_every: 10, checkpoint_every: 5}
optim: {rate: 1e-2, warmup: 4}
batch: {rows: 4, microbatch: 2, length: 32}
data: {sources: [asyncio], max_bytes: 40000, heldout: 0.3, vocab_size: 300}
model: {width: 16, layers: 1, heads: 2, kv_heads: 1, mlp_width: 24}
evaluation: {rows: 4}
"""


@pytest.fixture(scope="module", autouse=True)
def optimizer_promotes():
    """optax mixes Python floats with integer counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def start(folder, steps: int, *fields: str) -> list[subprocess.Popen]:
    """Two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {name: os.environ[name] for name in os.environ if name != "TPU_LIBRARY_PATH"}
    common = {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    common |= {"XLA_FLAGS": XLA_FLAGS}
    common |= {"JAX_COMPILATION_CACHE_DIR": CACHE or str(folder / "cache")}
    common |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", "train.train", "--multihost"]
    command += ["--config", str(folder / "config.yaml"), f"run.folder={folder / 'run'}"]
    return [
        subprocess.Popen(
            [*command, f"run.steps={steps}", *fields],
            cwd=ROOT,
            env=inherited | common | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def ends(processes) -> list[tuple[int, str, str]]:
    """Status and output of every process; none of them outlives this."""
    try:
        done = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, done, strict=True)]


def curve(folder) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_two_processes_are_one_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG)
    for status, _, errors in ends(start(tmp_path, 10)):
        assert status == 0, errors
    config = load_config(
        str(tmp_path / "config.yaml"), [f"run.folder={tmp_path / 'one'}", "run.steps=10"]
    )
    mesh = program.make_mesh(config)
    objective = program.make_objective(config, mesh)
    program.train(config, objective, mesh, quiet=True)
    two, one = curve(tmp_path / "run"), curve(tmp_path / "one")
    assert [line["step"] for line in two] == [line["step"] for line in one] == [*range(1, 11), 10]
    for line, expected in zip(two, one, strict=True):
        for name in {"loss", "gradient_norm", "heldout_loss"} & expected.keys():
            np.testing.assert_allclose(line[name], expected[name], rtol=1e-5)
    record = json.loads((tmp_path / "run" / "export" / "training.json").read_text())
    assert record["hardware"].startswith("2 x cpu")

    # The same folder, longer; process 1 is killed in the middle, with no checkpoint on its way.
    processes = start(tmp_path, 100000, "run.checkpoint_every=15", "run.eval_every=15")
    until = time.monotonic() + 200
    # A checkpoint is written beside the steps that follow it, and has its name once it is whole.
    kept = tmp_path / "run" / "checkpoints" / "15"
    while not kept.exists() or not any(line["step"] >= 17 for line in curve(tmp_path / "run")):
        assert time.monotonic() < until and processes[0].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    (status, output, errors), (killed, _, _) = ends(processes)
    assert (status, killed) == (1, -signal.SIGKILL), errors
    assert f"resumed from step 10 in {tmp_path / 'run'}" in output + errors
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: process 0 lost another process of the run (")
    assert line.endswith(f"the run resumes from its newest checkpoint in {tmp_path / 'run'}")

    # One process goes on alone, from the last complete checkpoint.
    last = curve(tmp_path / "run")[-1]["step"]
    longer = [f"run.folder={tmp_path / 'run'}", f"run.steps={last + 6}"]
    program.train(load_config(str(tmp_path / "config.yaml"), longer), objective, mesh, quiet=True)
    resumed = int(capsys.readouterr().out.split("resumed from step ")[1].split()[0])
    assert resumed % 15 == 0 and 15 <= resumed <= last
    assert [line["step"] for line in curve(tmp_path / "run") if "loss" in line] == [
        *range(1, last + 7)
    ]


def test_joining_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(hosts.InputError, match=r"^--multihost: expected a TPU pod, a cluster that"):
        hosts.join()
