"""Decode prompts losslessly with a drafter, and compare with plain decoding.

    python -m infer.generate --compare
    python -m infer.generate --prompt "def fibonacci(n):" --max-new-tokens 128

Without --target the embedded demo pair is used; without prompts, pieces of Python files that the
demo target never saw.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ctc_spec_jax import demo
from ctc_spec_jax.cli import exit_on_bad_input, use_compilation_cache
from ctc_spec_jax.engine import Engine, Generation
from ctc_spec_jax.errors import InputError
from train import data

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_LOOPS = 0.4


@dataclasses.dataclass(frozen=True)
class Result:
    """Measurement of one tree size; names as in the JSON file.

    ``accepted_length`` is in tokens per target pass, the target's own (bonus) token included, over
    every answer up to where it begins to loop (``data.before_loop``): loops are easy to draft.
    ``accepted_length_without_loops`` is over the answers that never loop, None if all do.
    Tokens, rounds and times are those of whole answers.
    """

    tree_nodes: int
    text: list[str]
    tokens: int
    rounds: int
    accepted_length: float
    accepted_length_without_bonus: float
    accepted_length_without_loops: float | None
    accepted_length_with_loops: float
    looping_share: float
    tokens_per_second: float
    baseline_tokens_per_second: float | None
    speedup: float | None
    identical: bool | None


class Answerer(Protocol):
    """What can be measured: an ``Engine``, or another library behind the same method."""

    def generate(self, prompts: Any, max_new_tokens: int) -> list[Generation]:
        """See ``Engine.generate``."""
        ...


def heldout_prompts(tokenizer, count: int, length: int = 96) -> list[list[int]]:
    """Token prompts from standard-library files that the demo target was not trained on."""
    _, texts = data.corpus(("stdlib",), data.HELDOUT)
    rows = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [row.ids for row in rows if len(row.ids) >= 2 * length]
    places = [(row, start) for row in ids for start in range(0, len(row) - length, 4 * length)]
    order = np.random.default_rng(0).permutation(len(places))[:count]
    return [places[i][0][places[i][1] : places[i][1] + length] for i in order]


def read_prompts(path: str) -> list[str]:
    """The ``prompt`` of every line of a JSONL file, or its first turn (``turns``).

    Raises:
      InputError: unreadable file or a line without a prompt.
    """
    try:
        lines = pathlib.Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts: expected a readable file, found {path} ({error})") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"] if "prompt" in row else row["turns"][0]
            if not isinstance(prompt, str):
                raise TypeError
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"--prompts: expected an object with 'prompt' or 'turns' in line {number} of "
                f"{path}, found {line[:40]!r}"
            ) from error
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"--prompts: expected at least one line in {path}, found none")
    return prompts


def choose_prompts(engine: Engine, path: str | None, count: int, max_new_tokens: int):
    """Prompts of a JSONL file, or else ``count`` held-out ones.

    Raises:
      InputError: see ``read_prompts`` and ``Engine.encode``; before the first prompt is decoded.
    """
    prompts = read_prompts(path) if path else heldout_prompts(engine.tokenizer, count)
    engine.encode(prompts, max_new_tokens)
    return prompts


def measure(
    engine: Answerer, baseline: Answerer | None, prompts, max_new_tokens: int, repeats: int
):
    """Answers of every prompt, one at a time, and the median seconds of each.

    The two engines take turns, so that a change of the machine's speed hits both alike. A first
    call of each shape, which compiles, is not counted.

    Returns:
      answers, seconds, baseline answers, baseline seconds; one entry per prompt.
    """
    engines = [engine] if baseline is None else [engine, baseline]
    answers: list[list[Generation]] = [[] for _ in engines]
    seconds: list[list[float]] = [[] for _ in engines]
    for prompt in tqdm(prompts, unit=" prompts", leave=False):
        runs: list[list[Generation]] = [[] for _ in engines]
        for repeat in range(repeats + 1):
            for one, run in zip(engines, runs, strict=True):
                answer = one.generate([prompt], max_new_tokens)[0]
                if repeat:
                    run.append(answer)
        for run, all_answers, all_seconds in zip(runs, answers, seconds, strict=True):
            all_answers.append(run[0])
            all_seconds.append(statistics.median(answer.seconds for answer in run))
    return [*answers, *[[]] * (2 - len(engines))], [*seconds, *[[]] * (2 - len(engines))]


def summarise(tree_nodes: int, answers, seconds, baseline, baseline_seconds) -> Result:
    """The measurement of one tree size from ``measure``'s answers and seconds."""
    loops = [data.loop_share(answer.tokens) > _LOOPS for answer in answers]
    whole = [answer for answer, loop in zip(answers, loops, strict=True) if not loop]
    fresh = [_before_loop(answer) for answer in answers]
    accepted = sum(n for n, _ in fresh) / sum(rounds for _, rounds in fresh)
    tokens = sum(len(answer.tokens) for answer in answers)
    rounds = sum(answer.rounds for answer in answers)
    speed = tokens / sum(seconds)
    plain = sum(len(a.tokens) for a in baseline) / sum(baseline_seconds) if baseline else None
    same = [a.tokens == b.tokens for a, b in zip(answers, baseline, strict=False)]
    return Result(
        tree_nodes=tree_nodes,
        text=[answer.text for answer in answers],
        tokens=tokens,
        rounds=rounds,
        accepted_length=accepted,
        accepted_length_without_bonus=accepted - 1,
        accepted_length_without_loops=_mean_length(whole) if whole else None,
        accepted_length_with_loops=_mean_length(answers),
        looping_share=sum(loops) / len(loops),
        tokens_per_second=speed,
        baseline_tokens_per_second=plain,
        speedup=speed / plain if plain else None,
        identical=all(same) if baseline else None,
    )


def _mean_length(answers: list[Generation]) -> float:
    return sum(len(a.tokens) for a in answers) / sum(a.rounds for a in answers)


def _before_loop(answer: Generation) -> tuple[int, int]:
    """Tokens and rounds of the rounds that began before the answer began to loop."""
    ends = np.cumsum(answer.emitted)
    begins = ends - np.asarray(answer.emitted)
    rounds = int(np.sum(begins < max(1, data.before_loop(answer.tokens, _LOOPS))))
    return int(ends[rounds - 1]), rounds


def table(results: list[Result]) -> str:
    """The results as aligned text, one column per tree size."""

    def show(value, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rows = [
        ("tree nodes", [str(r.tree_nodes) for r in results]),
        ("tokens", [str(r.tokens) for r in results]),
        ("rounds (target passes)", [str(r.rounds) for r in results]),
        ("mean accepted length", [show(r.accepted_length) for r in results]),
        ("  without the bonus token", [show(r.accepted_length_without_bonus) for r in results]),
        ("  of answers without loops", [show(r.accepted_length_without_loops) for r in results]),
        ("  loops included", [show(r.accepted_length_with_loops) for r in results]),
        ("share of answers that loop", [f"{r.looping_share:.0%}" for r in results]),
        ("tokens/s", [show(r.tokens_per_second, 1) for r in results]),
        ("tokens/s plain", [show(r.baseline_tokens_per_second, 1) for r in results]),
        ("speedup", [show(r.speedup) for r in results]),
        ("identical", [{True: "yes", False: "no", None: "-"}[r.identical] for r in results]),
    ]
    return "\n".join(f"{name:<28}" + "".join(f"{v:>10}" for v in values) for name, values in rows)


def write_json(path: str, results: list[Result]) -> None:
    """Write the fastest result, and all of them under ``sizes``, in one piece."""
    best = max(results, key=lambda r: r.tokens_per_second)
    document = dataclasses.asdict(best) | {
        "sizes": [{k: v for k, v in dataclasses.asdict(r).items() if k != "text"} for r in results]
    }
    write_document(path, document)


def write_document(path: str, document: dict[str, Any]) -> None:
    """Write a JSON file in one piece; no part of it stays where writing fails."""
    part = pathlib.Path(f"{path}.part")
    try:
        part.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(
            f"--json: expected a writable file, found {path} ({error.strerror})"
        ) from error


def check_json(path: str | None) -> None:
    """Refuse a result file that could not be written, before any work is done for it."""
    if path is None:
        return
    folder = pathlib.Path(path).absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"--json: expected a file in a writable folder, found {folder}")
    if pathlib.Path(path).is_dir():
        raise InputError(f"--json: expected a file, found the folder {path}")


def check_counts(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse counts below 1; ``names`` are attributes of ``arguments``."""
    for name in names:
        if getattr(arguments, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: expected at least 1, found {getattr(arguments, name)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", help="Hugging Face folder or hub id (default: the demo)")
    parser.add_argument("--drafter", help="folder of a drafter (default: the demo's)")
    parser.add_argument("--prompt", help="one prompt")
    parser.add_argument("--prompts", help="JSONL file with 'prompt' or 'turns'")
    parser.add_argument("--num-prompts", type=int, default=24, help="held-out prompts to take")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--tree-nodes", type=int, nargs="+", default=[demo.TREE_NODES], help="one or more sizes"
    )
    parser.add_argument(
        "--tree",
        choices=("prefix", "transform"),
        default="prefix",
        help="the most probable prefixes, or the published static template",
    )
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--compare", action="store_true", help="also decode plainly")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each prompt")
    parser.add_argument("--json", help="file to write the results to")
    arguments = parser.parse_args()
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    if arguments.target and not arguments.drafter:
        raise InputError("--drafter: expected a folder beside --target, found none")
    if arguments.prompt is not None and arguments.prompts:
        raise InputError("--prompt: expected it or --prompts, found both")
    check_counts(arguments, ("repeats", "num_prompts", "max_new_tokens"))
    if min(arguments.tree_nodes) < 2:
        raise InputError(f"--tree-nodes: expected at least 2, found {min(arguments.tree_nodes)}")
    check_json(arguments.json)


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.generate``."""
    arguments = _parse()
    use_compilation_cache()
    dtype = _DTYPES[arguments.dtype]
    if arguments.dtype == "float32":
        # Accelerators round the inputs of float32 products by default, which can swap near ties.
        jax.config.update("jax_default_matmul_precision", "highest")
    engine = Engine.from_pretrained(
        arguments.target, arguments.drafter, arguments.tree_nodes[0], dtype
    )
    folder = arguments.drafter or str(demo.drafter_folder())
    if arguments.prompt is not None:
        prompts = [arguments.prompt]
    else:
        prompts = choose_prompts(
            engine, arguments.prompts, arguments.num_prompts, arguments.max_new_tokens
        )
    for piece in engine.stream(prompts[0], arguments.max_new_tokens):
        print(piece, end="", flush=True)
    print("\n", flush=True)

    results = []
    for nodes in arguments.tree_nodes:
        sized = engine.with_drafter(folder, nodes, dtype, arguments.tree)
        baseline = sized.plain() if arguments.compare else None
        answers, seconds = measure(
            sized, baseline, prompts, arguments.max_new_tokens, arguments.repeats
        )
        results.append(summarise(nodes, answers[0], seconds[0], answers[1], seconds[1]))
    print(table(results))
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
