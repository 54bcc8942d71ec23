"""Measure drafting methods against plain decoding of the same library in the same run.

    python -m infer.benchmark --prompts question.jsonl --methods all --json FILE --report FILE.html

Prompts are files in the format of Spec-Bench (``question_id``, ``category``, ``turns``), or pieces
of Python files that the demo target never saw. Every cell, a method at one temperature and batch
size, is written as soon as it is measured; ``--resume`` goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ctc_spec_jax import demo, recipes
from ctc_spec_jax.cli import (
    DTYPES,
    add_precision,
    exit_on_bad_input,
    load_engine,
    numbers,
    use_compilation_cache,
    use_precision,
)
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from infer import cells, methods, peers, report, roofline, split
from infer.generate import Answerer, check_counts, check_json, write_document
from infer.methods import LeftOut, Method
from infer.profile import hardware
from infer.prompts import report as report_lines
from infer.questions import Turn, ask, batches, heldout_questions, read_questions
from infer.rounds import PROMPT

_HELDOUT = 8
"""Held-out prompts where no file is given and no limit."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all cells share."""

    engine: Engine
    talks: list[list[Turn]]
    arguments: argparse.Namespace
    logits: Callable[[list[int]], np.ndarray]

    def options(self, temperature: float) -> dict[str, Any]:
        """Options of every row, the same for all decoders."""
        return {"max_new_tokens": self.arguments.max_new_tokens, "temperature": temperature}


def measure_cell(
    bench: Bench, name: str, engine: Answerer, nodes: int, temperature: float, batch: int
) -> dict[str, Any]:
    """One cell as it stands in the JSON file, its time split left out."""
    given = bench.arguments
    pair = (engine, bench.engine.plain())
    options = bench.options(temperature)
    runs = cells.measure(pair, bench.talks, batch, given.repeats, options, given.seed)
    found = cells.cell(name, temperature, batch, nodes, runs, bench.logits)
    return dataclasses.asdict(found)


def measure_method(
    bench: Bench, method: Method, temperature: float, batch: int, done: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The cell of a method of this library; its time split is taken from ``done`` if it is there.

    Raises:
      InputError: it cannot draft for this target, or the batch does not fit the memory.
    """
    given = bench.arguments
    engine = method.engine(bench.engine, given.tree_nodes, DTYPES[given.dtype])
    nodes = engine.drafter.num_nodes
    row = measure_cell(bench, method.name, engine, nodes, temperature, batch)
    if method.name == methods.PLAIN or given.no_split:
        return row
    same = (r for r in done if (r["method"], r["batch"]) == (method.name, batch))
    parts = next((r["time_split"] for r in same), None)
    first = next(batches(bench.talks, batch))[0].turns
    prompts = [turn.tokens[-PROMPT:] for turn in first]
    try:
        parts = parts or split.time_split(engine, batch, {}, given.repeats, prompts)
    except InputError as error:
        print(f"note: {method.name} without a time split: {error}", file=sys.stderr)
        return row
    works = split.works(engine, batch, prompts)
    return row | {"time_split": parts, "drafter_cost": split.drafter_cost(parts), "work": works}


def place(row: dict[str, Any]) -> tuple[str, float, int]:
    """What tells the cells of a file apart."""
    return row["method"], row["temperature"], row["batch"]


def run(bench: Bench, chosen: list[Method], document: dict[str, Any], save: Callable[[], None]):
    """Measure every cell that the document lacks; ``save`` is called after each."""
    given = bench.arguments
    decoders: list[Method | peers.Peer] = [*chosen]
    if given.peers:
        trained = methods.by_method(given.drafters)
        folder = next((trained[n] for n in recipes.of_language_models() if n in trained), None)
        others, absent = peers.peers(folder)
        decoders += others
        document["left_out"] += [dataclasses.asdict(LeftOut(*pair)) for pair in absent.items()]
    if not (given.no_split or document["rates"]):
        document["rates"] = dataclasses.asdict(roofline.measure(DTYPES[given.dtype]))
    plan = [(d, t, b) for b in given.batch for t in given.temperature for d in decoders]
    for decoder, temperature, batch in tqdm(plan, unit=" cells"):
        ours = isinstance(decoder, Method)
        rows = document["results" if ours else "peers"]
        if (decoder.name, temperature, batch) in map(place, rows):
            continue
        try:
            if isinstance(decoder, Method):
                rows.append(measure_method(bench, decoder, temperature, batch, rows))
            else:
                rows.append(_measure_peer(bench, decoder, temperature, batch))
        except InputError as error:
            left_out = LeftOut(decoder.name, str(error), temperature, batch)
            document["left_out"].append(dataclasses.asdict(left_out))
        save()


def _measure_peer(bench: Bench, peer: peers.Peer, temperature: float, batch: int):
    if peer.one_row and batch > 1:
        raise InputError(f"batch: expected 1, all that this way to decode takes, found {batch}")
    folder = str(convert.target_folder(bench.arguments.target or str(demo.target_folder())))
    engine = peers.Transformers(bench.engine, folder, peer, bench.arguments.dtype)
    return measure_cell(bench, peer.name, engine, 1, temperature, batch)


def new_document(bench: Bench, left_out: list[LeftOut]) -> dict[str, Any]:
    """The file before the first cell: machine, versions, commit, settings and no results."""
    given = bench.arguments
    tokens = json.dumps([[turn.tokens for turn in talk] for talk in bench.talks])
    names = ("max_new_tokens", "tree_nodes", "repeats", "seed")
    versions = {name: importlib.metadata.version(name) for name in ("flax", "numpy")}
    machine = hardware()
    return {
        **machine,
        "versions": machine["versions"] | versions | (peers.versions() if given.peers else {}),
        "settings": {
            "target": given.target or "demo",
            **{name: getattr(given, name) for name in names},
            "dtype": numbers(given),
            "prompts": [pathlib.Path(path).name for path in given.prompts or ["heldout"]],
            "questions": len(bench.talks),
            "turns": sum(map(len, bench.talks)),
            "prompts_sha256": hashlib.sha256(tokens.encode()).hexdigest(),
        },
        "left_out": [dataclasses.asdict(one) for one in left_out],
        "rates": None,
        "results": [],
        "peers": [],
    }


def resumed(path: str, fresh: dict[str, Any]) -> dict[str, Any]:
    """The document to go on with: that of the file, if there is one, with its cells.

    Raises:
      InputError: it was measured with other settings or on another device, which would not
        compare.
    """
    try:
        old = json.loads(pathlib.Path(path).read_text())
        cells_of = {name: old[name] for name in ("results", "peers")}
        settings = {**old["settings"], "device": old["device"], "versions": old["versions"]}
        commits, rates = old["commit"], old.get("rates")
    except FileNotFoundError:
        return fresh
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"--resume: expected a result file, found {path} ({error})") from error
    now = {**fresh["settings"], "device": fresh["device"]}
    for name, value in now.items():
        if settings.get(name) != value:
            raise InputError(f"--resume: expected {name} {settings.get(name)!r}, found {value!r}")
    for name in fresh["versions"].keys() & settings["versions"].keys():
        if settings["versions"][name] != fresh["versions"][name]:
            raise InputError(
                f"--resume: expected {name} {settings['versions'][name]}, "
                f"found {fresh['versions'][name]}"
            )
    if fresh["commit"] not in commits.split(", "):
        commits = f"{commits}, {fresh['commit']}"
    versions = settings["versions"] | fresh["versions"]
    return {**fresh, **cells_of, "commit": commits, "versions": versions, "rates": rates}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--prompts", nargs="+", metavar="FILE", help="JSONL files in the format of Spec-Bench")
    add("--limit", type=int, help="questions taken of each file, its categories in turns")
    add(
        "--methods",
        default="all",
        help="names with commas between them, such as a,b or b:tree, the name of a way to build "
        "trees behind it; or all that can run",
    )
    add("--temperature", type=float, nargs="+", default=[0.0], help="0 is greedy")
    add("--batch", type=int, nargs="+", default=[1], help="questions decoded at a time")
    add("--max-new-tokens", type=int, default=128)
    add("--tree-nodes", type=int, default=demo.TREE_NODES, help="nodes of a draft, root included")
    add("--drafters", nargs="+", default=[], metavar="FOLDER", help="folders of trained drafters")
    add("--target", help="Hugging Face folder or hub id (default: the demo)")
    add_precision(parser)
    add("--template", help="Jinja file with a chat template")
    add("--repeats", type=int, default=3, help="timed runs of each batch")
    add("--seed", type=int, default=0)
    add("--no-split", action="store_true", help="leave out where the time of a round goes")
    add("--peers", action="store_true", help="also measure transformers (torch)")
    add("--json", metavar="FILE", help="file to write the results to, after every cell")
    add("--resume", action="store_true", help="go on with --json: measure what it lacks")
    add("--report", metavar="FILE.html", help="page to write, with FILE.md beside it")
    add("--round-cost", metavar="FILE", help="figures of infer.profile, for the report")
    arguments = parser.parse_args()
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    check_counts(arguments, ("max_new_tokens", "repeats"))
    if min(arguments.batch) < 1:
        raise InputError(f"--batch: expected at least 1, found {min(arguments.batch)}")
    if arguments.limit is not None:
        check_counts(arguments, ("limit",))
    if not 0 <= min(arguments.temperature) <= max(arguments.temperature) < float("inf"):
        raise InputError(f"--temperature: expected 0 or more, found {arguments.temperature}")
    if arguments.tree_nodes < 2:
        raise InputError(f"--tree-nodes: expected at least 2, found {arguments.tree_nodes}")
    if arguments.resume and not arguments.json:
        raise InputError("--resume: expected --json, the file to go on with, found none")
    check_json(arguments.json)
    report.check(arguments.report, arguments.round_cost)
    if arguments.peers and arguments.int8:
        raise InputError("--int8: expected no --peers, whose weights are not rounded, found both")
    if arguments.peers:
        peers.load_torch()
        # Both libraries share one GPU: JAX must not take most of its memory at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def prepare(arguments: argparse.Namespace) -> tuple[Bench, list[str]]:
    """The target and its questions, and a sentence for every line that is none.

    Turns that are too long for the target are left out, which is noted on standard error.
    """
    use_precision(arguments.dtype)
    if arguments.target is None:
        taken = methods.by_method(arguments.drafters)
        own = [f for f in methods.demo_folders() if not methods.by_method([f]).keys() & taken]
        arguments.drafters = [*arguments.drafters, *own]
    target = arguments.target or str(demo.target_folder())
    engine = load_engine(target, arguments)
    if arguments.template:
        try:
            engine.tokenizer.chat_template = pathlib.Path(arguments.template).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--template: expected a readable file, found {arguments.template} ({error})"
            ) from error
    if arguments.prompts:
        questions, problems = read_questions(arguments.prompts, arguments.limit)
    else:
        questions, problems = heldout_questions(engine, arguments.limit or _HELDOUT), []
    talks, dropped = ask(engine, questions, arguments.max_new_tokens)
    if not talks:
        raise InputError("\nerror: ".join([*problems, *dropped]))
    if dropped:
        print(f"note: {len(dropped)} turns left out, such as {dropped[0]}", file=sys.stderr)
    return Bench(engine, talks, arguments, cells.target_logits(engine)), problems


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.benchmark``."""
    arguments = _parse()
    use_compilation_cache()
    bench, problems = prepare(arguments)
    chosen, left_out = methods.choose(bench.engine, arguments.methods, arguments.drafters)
    report_lines(problems)
    if arguments.repeats == 1 and len(bench.talks) <= max(arguments.batch):
        print("note: a batch that is timed once has no interval", file=sys.stderr)
    document = new_document(bench, left_out)
    if arguments.resume:
        document = resumed(arguments.json, document)

    def save() -> None:
        if arguments.json:
            write_document(arguments.json, document)

    run(bench, chosen, document, save)
    save()
    print(report.text(document))
    if arguments.report:
        report.write(document, arguments.report, arguments.round_cost)
    if problems:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
