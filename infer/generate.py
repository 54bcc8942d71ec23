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
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from tqdm import tqdm

from ctc_spec_jax import demo
from ctc_spec_jax.cli import (
    add_method,
    add_options,
    add_precision,
    exit_on_bad_input,
    load_engine,
    option_fields,
    painted,
    use_compilation_cache,
    use_precision,
    with_drafts,
)
from ctc_spec_jax.engine import Engine, Generation
from ctc_spec_jax.errors import InputError
from infer import advice
from infer.prompts import Prompt, choose_prompts, columns, report
from train import data
from train.loops import fresh_rounds

LOOPS = 0.4
"""Answers loop whose share of repeated groups of tokens is above this; see ``train.loops``."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Measurement of one tree size; names as in the JSON file.

    ``accepted_length`` is in tokens per target pass, the target's own (bonus) token included, over
    every answer up to where it begins to loop (``data.before_loop``): loops are easy to draft.
    ``accepted_length_without_bonus`` counts drafted tokens alone; rounds that end in one, at a stop
    or where draft and target overlap, have no bonus token.
    ``accepted_length_without_loops`` is over the answers that never loop, None if all do.
    Tokens, rounds and times are those of whole answers.
    """

    tree_nodes: int
    text: list[str]
    finish: list[str]
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

    def generate(self, prompts: Any, **options: Any) -> list[Generation]:
        """See ``Engine.generate``."""
        ...


def measure(
    engine: Answerer,
    baseline: Answerer | None,
    prompts: Sequence[Prompt],
    repeats: int,
    batch: int = 1,
    seed: int = 0,
):
    """Answers of all prompts, ``batch`` at a time, and the median seconds of each batch.

    The two engines take turns, so that a change of the machine's speed hits both alike. A first
    call of each shape, which compiles, is not counted. Prompt i is decoded with seed ``seed + i``.

    Returns:
      answers, baseline answers, one per prompt; seconds, baseline seconds, one per batch.
    """
    engines = [engine] if baseline is None else [engine, baseline]
    answers: list[list[Generation]] = [[] for _ in engines]
    seconds: list[list[float]] = [[] for _ in engines]
    for first in tqdm(range(0, len(prompts), batch), unit=" batches", leave=False):
        part = prompts[first : first + batch]
        contents, options = [prompt.content for prompt in part], columns(part)
        seeds = list(range(seed + first, seed + first + len(part)))
        runs: list[list[list[Generation]]] = [[] for _ in engines]
        for _ in range(repeats + 1):
            for one, run in zip(engines, runs, strict=True):
                run.append(one.generate(contents, seed=seeds, **options))
        for run, all_answers, all_seconds in zip(runs, answers, seconds, strict=True):
            all_answers.extend(run[0])
            all_seconds.append(statistics.median(rows[0].seconds for rows in run[1:]))
    return [*answers, *[[]] * (2 - len(engines))], [*seconds, *[[]] * (2 - len(engines))]


def summarise(
    tree_nodes: int, answers, seconds, baseline, baseline_seconds, sampled: bool = False
) -> Result:
    """The measurement of one tree size from ``measure``'s answers and seconds.

    Sampled answers are drawn anew by every decoder, so there is nothing to be identical.
    """
    loops = [data.loop_share(answer.tokens) > LOOPS for answer in answers]
    whole = [answer for answer, loop in zip(answers, loops, strict=True) if not loop]
    fresh = [fresh_rounds(answer.tokens, answer.emitted, LOOPS) for answer in answers]
    passes = sum(rounds for _, rounds in fresh)
    drafted = sum(sum(answer.from_draft[:n]) for answer, (n, _) in zip(answers, fresh, strict=True))
    tokens = sum(len(answer.tokens) for answer in answers)
    rounds = sum(answer.rounds for answer in answers)
    speed = tokens / sum(seconds)
    plain = sum(len(a.tokens) for a in baseline) / sum(baseline_seconds) if baseline else None
    same = [a.tokens == b.tokens for a, b in zip(answers, baseline, strict=False)]
    return Result(
        tree_nodes=tree_nodes,
        text=[answer.text for answer in answers],
        finish=[answer.finish for answer in answers],
        tokens=tokens,
        rounds=rounds,
        accepted_length=sum(n for n, _ in fresh) / passes,
        accepted_length_without_bonus=drafted / passes,
        accepted_length_without_loops=_mean_length(whole) if whole else None,
        accepted_length_with_loops=_mean_length(answers),
        looping_share=sum(loops) / len(loops),
        tokens_per_second=speed,
        baseline_tokens_per_second=plain,
        speedup=speed / plain if plain else None,
        identical=all(same) if baseline and not sampled else None,
    )


def _mean_length(answers: list[Generation]) -> float:
    return sum(len(a.tokens) for a in answers) / sum(a.rounds for a in answers)


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
        "sizes": [
            {k: v for k, v in dataclasses.asdict(r).items() if k not in ("text", "finish")}
            for r in results
        ]
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
    add_method(parser)
    parser.add_argument("--prompt", help="one prompt")
    parser.add_argument("--prompts", help="JSONL file with 'prompt' or 'turns'")
    parser.add_argument("--num-prompts", type=int, default=24, help="held-out prompts to take")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--tree-nodes",
        nargs="+",
        default=[demo.TREE_NODES],
        help="one or more sizes, or auto: measure first which one pays here, if any",
    )
    add_precision(parser)
    parser.add_argument("--compare", action="store_true", help="also decode plainly")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each prompt")
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded at a time")
    parser.add_argument(
        "--stream", action="store_true", help="show the answers as they grow, and time nothing"
    )
    parser.add_argument("--json", help="file to write the results to")
    add_options(parser)
    arguments = parser.parse_args()
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    if arguments.prompt is not None and arguments.prompts:
        raise InputError("--prompt: expected it or --prompts, found both")
    check_counts(arguments, ("repeats", "num_prompts", "max_new_tokens", "batch"))
    arguments.tree_nodes = advice.tree_sizes(arguments.tree_nodes)
    check_json(arguments.json)


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.generate``."""
    arguments = _parse()
    use_compilation_cache()
    use_precision(arguments.dtype)
    target = arguments.target or str(demo.target_folder())
    engine = load_engine(target, arguments)
    sizes = arguments.tree_nodes
    if sizes is not None:
        engine = with_drafts(engine, arguments, sizes[0])
        sizes = sizes if engine.drafter.num_nodes > 1 else [1]
    if sizes == [1] and arguments.compare:
        raise InputError("--compare: expected --drafter or --method for --target, found neither")
    fields = option_fields(arguments, engine)
    if arguments.prompt is not None:
        engine.encode([arguments.prompt], arguments.max_new_tokens)
        prompts, problems = [Prompt(arguments.prompt, fields)], []
    else:
        prompts, problems = choose_prompts(engine, arguments.prompts, arguments.num_prompts, fields)
    report(problems)
    if sizes is None:
        sizes = [_auto(engine, arguments, prompts, fields)]
        engine = sized(engine, arguments, sizes[0])
    if arguments.stream:
        for index, prompt in enumerate(prompts):
            show(engine, prompt, arguments.seed + index)
    else:
        show(engine, prompts[0], arguments.seed)
        results = compare_sizes(engine, sizes, prompts, arguments)
        print(table(results))
        if arguments.json:
            write_json(arguments.json, results)
    if problems:
        raise SystemExit(2)


def sized(engine: Engine, arguments: argparse.Namespace, nodes: int) -> Engine:
    """The engine with drafts of so many nodes; 1 is plain decoding."""
    return engine.plain() if nodes == 1 else with_drafts(engine, arguments, nodes)


def _auto(
    engine: Engine, arguments: argparse.Namespace, prompts: Sequence[Prompt], fields: dict[str, Any]
) -> int:
    """The advised size; one prompt is too few to measure on."""
    given = prompts if arguments.prompt is None else advice.held_out(engine, fields)
    return advice.choose_size(engine, arguments, given, min(arguments.batch, len(prompts)))


def show(engine: Engine, prompt: Prompt, seed: int) -> None:
    """Print one answer as it grows, and what it took."""
    began, count, piece = time.perf_counter(), 0, None
    for piece in engine.stream(prompt.content, seed=seed, **prompt.options):
        count += len(piece.tokens)
        print(painted(engine, piece), end="", flush=True)
    print("\n", flush=True)
    if piece is not None:
        seconds = time.perf_counter() - began
        print(
            f"[{piece.finish}: {count} tokens in {piece.rounds} target passes, "
            f"{count / piece.rounds:.2f} a pass, {seconds:.1f} s with compilation]",
            file=sys.stderr,
        )


def compare_sizes(
    engine: Engine, sizes: Sequence[int], prompts: Sequence[Prompt], arguments: argparse.Namespace
) -> list[Result]:
    """Measure every tree size."""
    sampled = any(prompt.options.get("temperature") for prompt in prompts)
    results = []
    for nodes in sizes:
        one = sized(engine, arguments, nodes)
        baseline = one.plain() if arguments.compare else None
        answers, seconds = measure(
            one, baseline, prompts, arguments.repeats, arguments.batch, arguments.seed
        )
        results.append(summarise(nodes, answers[0], seconds[0], answers[1], seconds[1], sampled))
    return results


if __name__ == "__main__":
    main()
