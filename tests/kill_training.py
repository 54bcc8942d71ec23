"""Kill a training run again and again, and compare it with one that nothing interrupted.

    python -m tests.kill_training [--kills 20] [--seed 0]

Trains a tiny target, lets it answer, then trains its drafter twice: once in peace, once with
SIGKILL at random moments, during steps, evaluations and saves. Metrics of every step and exported
weights have to be the same, and after every kill the newest checkpoint has to be whole.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from safetensors.numpy import load_file
from tqdm import tqdm

ROOT = pathlib.Path(__file__).parents[1]

TARGET = """
objective: target
run: {steps: 30, eval_every: 30, checkpoint_every: 30}
optim: {rate: 1e-2, warmup: 4}
batch: {rows: 4, microbatch: 2, length: 64}
data: {sources: [asyncio], max_bytes: 40000, heldout: 0.3, vocab_size: 300}
model: {width: 32, layers: 2, heads: 2, kv_heads: 1, mlp_width: 48}
evaluation: {rows: 4}
"""

DRAFTER = """
objective: drafter
run: {steps: STEPS, log_every: 1, eval_every: 60, checkpoint_every: 9}
optim: {rate: 1e-2, warmup: 4, average: 0.9}
batch: {rows: 4, microbatch: 2, length: 48, anchors: 4}
data: {max_loop: 1.0, heldout: 0.25}
drafter: {frames: 5, taps: [0, 1], mlp_width: 24, tree_nodes: 6}
loss: {labels: 4, chunk: 8}
evaluation: {rows: 3, prompts: 2, prompt_length: 8, new_tokens: 12}
"""


def program(folder: pathlib.Path, module: str, *arguments) -> subprocess.Popen:
    """A program of the library in a process of its own."""
    inherited = {name: os.environ[name] for name in os.environ if name != "TPU_LIBRARY_PATH"}
    cache = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=inherited | cache,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "errors.txt").open("w"),
    )


def finish(folder: pathlib.Path, module: str, *arguments) -> None:
    """Run a program to its end."""
    status = program(folder, module, *arguments).wait()
    assert status == 0, (folder / "errors.txt").read_text()


def lines_of(path: pathlib.Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def curve(folder: pathlib.Path) -> list[dict]:
    """Metrics of a run without the clock."""
    clock = {"seconds", "tokens_per_second", "step_seconds"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in clock} for line in lines]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "target.yaml").write_text(TARGET)
        (folder / "drafter.yaml").write_text(DRAFTER.replace("STEPS", str(arguments.steps)))
        train = ("train.train", "--config")
        finish(folder, *train, folder / "target.yaml", f"run.folder={folder / 'target'}")
        target, answers = folder / "target" / "export", folder / "answers.jsonl"
        sources = ("--sources", "asyncio", "--count", 40, "--prompt-lengths", 4, 8)
        sources += ("--max-new-tokens", 40, "--rows", 20)
        finish(folder, "train.regenerate", "--target", target, "--out", answers, *sources)
        command = (*train, folder / "drafter.yaml", f"target={target}", f"data.files=[{answers}]")
        finish(folder, *command, f"run.folder={folder / 'first'}")
        finish(folder, *command, f"run.folder={folder / 'whole'}")

        killed, metrics = 0, folder / "killed" / "metrics.jsonl"
        for _ in tqdm(range(arguments.kills), unit=" kills"):
            # On average a kill costs the steps since the last checkpoint, five of them.
            until = lines_of(metrics) + draw.randint(1, 2 * arguments.steps // arguments.kills)
            process = program(folder, *command, f"run.folder={folder / 'killed'}")
            while process.poll() is None and lines_of(metrics) < until:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        finish(folder, *command, f"run.folder={folder / 'killed'}")
        whole, other = folder / "whole", folder / "killed"
        assert curve(whole) == curve(other), "the curves differ"
        first, second = (load_file(f / "export" / "model.safetensors") for f in (whole, other))
        assert first.keys() == second.keys()
        assert all((first[key] == second[key]).all() for key in first), "the weights differ"
        steps = len([line for line in curve(other) if "loss" in line])
        print(f"{killed} kills, {steps} steps: metrics and weights are those of a run in peace")


if __name__ == "__main__":
    main()
