"""Runs of train.regenerate that die: killed at random moments, or by a full disk.

    python -m tests.killed TARGET PROMPTS FOLDER

Every run is a child of this process, which has imported everything and started no device. The
decoder is made up: a text drawn with the row's seed. Writes
FOLDER/{whole,killed,full}.jsonl, FOLDER/full.err and FOLDER/kills, the number of runs killed.
"""

import dataclasses
import functools
import os
import pathlib
import random
import resource
import signal
import sys
from typing import Any

import numpy as np

from ctc_spec_jax import folders
from ctc_spec_jax.generation import Generation
from train import regenerate

CHUNK, LIMIT = 40, 2000


@dataclasses.dataclass
class Engine:
    """The part of ``engine.Engine`` that a regeneration uses, without a model."""

    tokenizer: Any

    def encode(self, prompts, max_new_tokens):
        del prompts, max_new_tokens

    def generate(self, prompts, seed, max_new_tokens, **fields):
        del fields
        answers = []
        for prompt, row, budget in zip(prompts, seed, max_new_tokens, strict=True):
            draw = np.random.default_rng((row, len(prompt)))
            tokens = draw.integers(1, 300, draw.integers(1, budget + 1)).tolist()
            text = self.tokenizer.decode(tokens)
            answers.append(Generation(text, tokens, "stop", len(tokens), [], 0.0))
        return answers


def die_at(moment: int) -> None:
    """Let this process be killed at the n-th step of its work on files.

    A write is many steps, so that most of them lie within a line.
    """
    write, steps = os.write, iter(range(1, moment))

    def step():
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(call):
        def wrapped(*arguments):
            step()
            return call(*arguments)

        return wrapped

    os.write = lambda file, data: before(write)(file, bytes(data)[:CHUNK])
    for name in ("replace", "ftruncate", "fsync"):
        setattr(os, name, before(getattr(os, name)))


def run(arguments: list[str], errors: pathlib.Path, prepare=lambda: None) -> int:
    """Status of a child, as of ``os.waitpid``, that regenerates with these arguments."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.argv = ["regenerate", *arguments]
        prepare()
        regenerate.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    target, prompts, folder = sys.argv[1:]
    folder = pathlib.Path(folder)
    tokenizer = folders.load_tokenizer(target)
    tokenizer.model_max_length = 512
    regenerate.load = lambda arguments: Engine(tokenizer)
    regenerate.use_compilation_cache = lambda: None
    common = ["--target", target, "--prompts", prompts, "--rows", "3", "--max-new-tokens", "24"]

    def arguments(name):
        return [*common, "--out", str(folder / f"{name}.jsonl")]

    errors = folder / "err"
    assert run(arguments("whole"), errors) == 0, errors.read_text()

    draw, kills = random.Random(0), 0
    while True:
        moment = draw.randrange(1, 30)
        status = run(arguments("killed"), errors, functools.partial(die_at, moment))
        if status == 0:
            break
        assert os.WIFSIGNALED(status), errors.read_text()
        kills += 1
        assert kills < 1000, "the runs do not get on"
    (folder / "kills").write_text(str(kills))

    full = folder / "full.err"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))

    assert os.waitstatus_to_exitcode(run(arguments("full"), full, limit)) == 2, full.read_text()
    (folder / "partly.jsonl").write_bytes((folder / "full.jsonl").read_bytes())
    assert run(arguments("full"), errors) == 0, errors.read_text()


if __name__ == "__main__":
    main()
