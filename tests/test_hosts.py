"""Two processes train as one does; a lost one is reported, and two or one alone resume.

Real processes on this machine, one CPU device each, that talk over gloo.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from ctc_spec_jax import errors
from tests import XLA_FLAGS
from train import hosts
from train import train as program
from train.config import load_config

ROOT = pathlib.Path(__file__).parents[1]
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR")

CONFIG = """
objective: target
run: {steps: 20, log_every: 1, eval_every: 10, checkpoint_every: 5}
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


def run(folder, *module: str) -> list[tuple[int, str, str]]:
    """Status and output of the two processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {name: os.environ[name] for name in os.environ if name != "TPU_LIBRARY_PATH"}
    common = {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    common |= {"XLA_FLAGS": XLA_FLAGS}
    common |= {"JAX_COMPILATION_CACHE_DIR": CACHE or str(folder / "cache")}
    common |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", *module, "--multihost"]
    command += ["--config", str(folder / "config.yaml"), f"run.folder={folder / 'run'}"]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=inherited | common | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        done = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, done, strict=True)]


def run_alone(folder, name: str) -> None:
    """The same run in this process."""
    config = load_config(str(folder / "config.yaml"), [f"run.folder={folder / name}"])
    mesh = program.make_mesh(config)
    program.train(config, program.make_objective(config, mesh), mesh, quiet=True)


def curve(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_are_one_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG)
    folder = tmp_path / "run"
    for moment, step, resumed, complete in (("save", 10, None, 5), ("write", 20, 5, 15)):
        (status, output, messages), (killed, _, _) = run(
            tmp_path, "tests.lost_host", moment, str(step)
        )
        assert (status, killed) == (1, -signal.SIGKILL), output + messages
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: process 0 lost another process of the run (")
        assert line.endswith(f"the run resumes from its newest checkpoint in {folder}")
        assert "error: " not in messages
        assert (f"resumed from step {resumed} in" in output) == (resumed is not None)
        steps = [
            int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()
        ]
        assert max(steps) == complete

    shutil.copytree(folder, tmp_path / "rest")
    for status, output, messages in run(tmp_path, "train.train"):
        assert status == 0, messages
        assert f"resumed from step 15 in {folder}" in output
    record = json.loads((folder / "export" / "training.json").read_text())
    assert record["hardware"].startswith("2 x cpu")
    run_alone(tmp_path, "rest")
    assert f"resumed from step 15 in {tmp_path / 'rest'}" in capsys.readouterr().out
    run_alone(tmp_path, "alone")
    for name in ("run", "rest"):
        lines, expected = curve(tmp_path / name), curve(tmp_path / "alone")
        steps = [*range(1, 11), 10, *range(11, 21), 20]
        assert [x["step"] for x in lines] == [x["step"] for x in expected] == steps
        for one, other in zip(lines, expected, strict=True):
            for key in {"loss", "gradient_norm", "heldout_loss"} & other.keys():
                np.testing.assert_allclose(one[key], other[key], rtol=1e-5)


def test_silent_and_failed_processes_are_missed(monkeypatch):
    monkeypatch.setattr(hosts, "SILENCE", 10.0)
    seen = {}

    def missed(now: float, first: str, second: str) -> str:
        return hosts.gone([("peers/0", first), ("peers/12", second)], seen, now)

    assert missed(100, "a", "a") == missed(109, "b", "a") == ""
    assert missed(110, "b", "b") == missed(119, "b", "finished") == ""
    assert missed(119.5, "b", "finished") == "process 0 was silent for 10 seconds"
    assert missed(200, "c", "finished") == ""
    assert missed(201, "c", "gone: process 12 failed") == "process 12 failed"


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_failed_computations_are_told_from_failed_writes():
    """Both come as ValueError with the same codes; a barrier's as the cause of TimeoutError."""
    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: a task has gone")
    assert errors.of_computation(lost)
    assert errors.of_computation(raised(TimeoutError("Timed out"), lost))
    code = "def fail(): raise ValueError('UNKNOWN: Gloo or disk')"
    for module, expected in (("jax.experimental.multihost_utils", True), ("orbax.x", False)):
        exec(code, places := {"__name__": module})
        with pytest.raises(ValueError) as error:
            places["fail"]()
        assert errors.of_computation(error.value) == expected
    for error in (OSError(28, "UNKNOWN: full"), ValueError("no code"), ValueError("UNKNOWN: x")):
        assert not errors.of_computation(error)
        assert not errors.of_computation(raised(TimeoutError("late"), error))


def test_joining_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(hosts.InputError, match=r"^--multihost: expected a TPU pod, a cluster that"):
        hosts.join()
