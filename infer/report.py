"""The results of a benchmark as one page that needs no network, and the same as Markdown.

python -m infer.report results.json --report results.html --round-cost round_cost.json
python -m infer.report results.json --plot results.png
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from ctc_spec_jax.cli import exit_on_bad_input
from ctc_spec_jax.errors import InputError
from infer import page, plots
from infer.methods import PLAIN
from infer.page import Block

_IDENTICAL = {True: "yes", False: "no", None: "law"}


def check(path: str | None, round_cost: str | None) -> None:
    """Refuse a report that could not be written, before any work is done for it.

    Raises:
      InputError: a bad place or name, unreadable figures, or no matplotlib.
    """
    if round_cost is not None:
        read_costs(round_cost)
    if path is not None:
        _check_place("--report", path, ".html")


def _check_place(flag: str, path: str, ending: str) -> None:
    folder = pathlib.Path(path).absolute().parent
    if not path.endswith(ending) or pathlib.Path(path).is_dir():
        raise InputError(f"{flag}: expected a file that ends in {ending}, found {path}")
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"{flag}: expected a file in a writable folder, found {folder}")
    plots.require(flag)


def read_costs(path: str) -> list[dict[str, Any]]:
    """Costs of rounds as ``infer.profile`` writes them.

    Raises:
      InputError: the file is not one of those.
    """
    try:
        costs = json.loads(pathlib.Path(path).read_text())["results"]
        return [{key: cost[key] for key in ("nodes", "batch", "plain_steps")} for cost in costs]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"--round-cost: expected a file of infer.profile, found {path} ({error})"
        ) from error


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


_HEADER = (
    *("method", "T", "batch", "nodes", "accepted", "no bonus", "with loops", "tokens/s"),
    *("speedup", "95 %", "identical", "drafter"),
)


def _row(row: dict[str, Any]) -> list[str]:
    return [
        *(row["method"], f"{row['temperature']:g}", str(row["batch"]), str(row["tree_nodes"])),
        _number(row["accepted_length"]),
        _number(row["accepted_length_without_bonus"]),
        _number(row["accepted_length_with_loops"]),
        _number(row["tokens_per_second"], 1),
        _number(row["speedup"]),
        f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}",
        _IDENTICAL[row["identical"]],
        _number(row["drafter_cost"]),
    ]


def text(document: dict[str, Any]) -> str:
    """The results as aligned text, and what was left out."""
    rows = [_HEADER, *map(_row, [*document["results"], *document["peers"]])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    found = [f"{name}: {found}" for name, found in _first_differences(document)]
    return "\n".join([*lines, *found, *(" ".join(row) for row in _left_out(document))])


def _first_differences(document: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for row in [*document["results"], *document["peers"]]:
        for one in row["differences"]:
            gap = one["logit_gap"]
            where = f"question {one['question_id']}, turn {one['turn']}, token {one['position']}"
            gap = "one answer ends" if gap is None else f"logit gap {gap:.2e}"
            found.append((f"{row['method']}, batch {row['batch']}", f"{where}: {gap}"))
    return found


def _left_out(document: dict[str, Any]) -> list[list[str]]:
    return [
        [
            one["method"] + ("" if one["batch"] is None else f", batch {one['batch']}:"),
            one["reason"],
        ]
        for one in document["left_out"]
    ]


def pays(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Per method and temperature: the batch sizes that pay, and the first that does not.

    A size pays where the whole interval of the speedup is above 1.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    drafting = [row for row in rows if row["method"] != PLAIN]
    for row in sorted(drafting, key=lambda row: row["batch"]):
        groups.setdefault((row["method"], row["temperature"]), []).append(row)
    found = []
    for (method, temperature), mine in groups.items():
        paying = [str(row["batch"]) for row in mine if row["speedup_low"] > 1]
        losing = [str(row["batch"]) for row in mine if row["speedup"] <= 1]
        best = max(mine, key=lambda row: row["speedup"])
        figures = f"{best['speedup']:.2f} at batch {best['batch']}"
        cells = [", ".join(paying) or "none", losing[0] if losing else "not reached", figures]
        found.append([method, f"{temperature:g}", *cells])
    return found


def blocks(document: dict[str, Any], costs: list[dict[str, Any]] | None) -> list[Block]:
    """The whole report, piece by piece."""
    rows, peers = document["results"], document["peers"]
    settings = document["settings"]
    about = (
        f"{document['device']}; "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + f"; commit {document['commit']}; {document['date']}. Target {settings['target']}, "
        f"{settings['dtype']}; {settings['questions']} questions with {settings['turns']} turns of "
        f"{', '.join(settings['prompts'])}; at most {settings['max_new_tokens']} new tokens; "
        f"{settings['repeats']} timed runs of each batch."
    )
    found = [Block("Speculative decoding against plain decoding", about)]
    found.append(Block("Results", _RESULTS, [_HEADER, *map(_row, rows)]))
    if peers:
        found.append(Block("Other libraries", _PEERS, [_HEADER, *map(_row, peers)]))
    found += _sweeps(rows)
    found += _details(rows)
    if costs:
        svg = plots.round_cost(costs)
        found.append(Block("Cost of a round by tree size", "In plain steps.", svg=svg))
    points = plots.passes(rows)
    if points:
        svg = plots.roofline(points, document["rates"])
        found.append(Block("Roofline", _ROOFLINE, svg=svg))
    different = _first_differences(document)
    if different:
        found.append(Block("First differences", _DIFFERENT, [("cell", "where"), *different]))
    if document["left_out"]:
        table = [("method", "reason"), *_left_out(document)]
        found.append(Block("Left out", table=table))
    absent = [
        (part, flag) for part, (there, flag) in _optional(document, costs).items() if not there
    ]
    if absent:
        found.append(Block("Not in this report", table=[("part", "what adds it"), *absent]))
    return found


def _optional(document: dict[str, Any], costs) -> dict[str, tuple[bool, str]]:
    """Whether each part is there that a run may lack, and what adds it."""
    rows = document["results"]
    batches = {row["batch"] for row in rows}
    split = any(row["time_split"] for row in rows)
    return {
        "Speedup by batch": (len(batches) > 1, "several sizes, such as --batch 1 4 16"),
        "Speedup by category": (1 in batches, "--batch 1 among the sizes"),
        "Where the time of a round goes": (split, "a run without --no-split"),
        "Roofline": (bool(plots.passes(rows)), "a run without --no-split"),
        "Cost of a round by tree size": (
            bool(costs),
            "--round-cost FILE, the file of python -m infer.profile --json FILE",
        ),
        "Other libraries": (bool(document["peers"]), "--peers"),
    }


def digest(document: dict[str, Any]) -> str:
    """What stands in a picture of these results, so that it cannot be taken for that of others."""
    return hashlib.sha256(json.dumps(document["results"]).encode()).hexdigest()


def draw(document: dict[str, Any], path: str) -> None:
    """Write a PNG file of the speedups by batch size, or of the accepted lengths of one size."""
    rows = document["results"]
    if not rows:
        raise InputError("results: expected at least one cell, found none")
    several = len({row["batch"] for row in rows}) > 1
    (plots.speedups if several else plots.accepted)(rows, path, digest(document))


_RESULTS = (
    "Accepted: tokens per target pass, the target's own (bonus) token included, of every answer up "
    "to where it begins to loop; with loops: of whole answers. Speedup: tokens per second in those "
    "of plain decoding, which took turns with the method on every batch; its 95 % interval is a "
    "bootstrap over questions and repeats, and that of plain against itself is the noise of the "
    "machine. Identical: the same greedy tokens as plain decoding; law: the answers are drawn, and "
    "exact by proof, not by comparison. Drafter: its time in a round, in plain steps."
)
_ROOFLINE = (
    "The target's pass over a draft (verify, rule included) and a plain step, a point per batch "
    "size: operations of their "
    "products, and bytes that they read and write, by arithmetic; times as measured. The roof is "
    "the bandwidth and the rate of large products that the same run measured."
)
_PEERS = (
    "Same weights, device, prompts, stops and caps; speedup over plain decoding of this library. "
    "Identical: the same tokens as this library's plain decoding."
)
_DIFFERENT = (
    "How much higher the target scores the token of plain decoding, after the text that both agree "
    "on: small gaps are ties that rounding decides."
)


def _at(rows: Sequence[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """The cells of one batch size at the lowest temperature."""
    lowest = min(row["temperature"] for row in rows)
    return [row for row in rows if row["batch"] == batch and row["temperature"] == lowest]


def _sweeps(rows: Sequence[dict[str, Any]]) -> list[Block]:
    found = []
    if len({row["batch"] for row in rows}) > 1:
        for index, temperature in enumerate(sorted({row["temperature"] for row in rows})):
            mine = [row for row in rows if row["temperature"] == temperature]
            heading = f"Speedup by batch, temperature {temperature:g}"
            found.append(Block(heading, svg=plots.by_batch(mine, f"batch{index}")))
    if rows:
        header = ("method", "T", "batch sizes that pay", "first that does not", "best")
        said = "A size pays where the whole interval of its speedup is above 1."
        found.append(Block("Where speculation stops paying", said, [header, *pays(rows)]))
    return found


def _details(rows: Sequence[dict[str, Any]]) -> list[Block]:
    if not rows:
        return []
    smallest = min(row["batch"] for row in rows)
    mine, found = _at(rows, smallest), []
    drafts = [row for row in mine if any(row["accepted_by_position"])]
    if drafts:
        depth = max(len(row["accepted_by_position"]) for row in drafts)
        header = ("method", *map(str, range(1, depth + 1)))
        table = [(r["method"], *map(_number, r["accepted_by_position"])) for r in drafts]
        table = [(*row, *[""] * (depth + 1 - len(row))) for row in table]
        heading = "Accepted length by position"
        said = "Share of rounds that keep the drafted token of each depth, loops included."
        found.append(Block(heading, said, [header, *table], plots.by_position(mine)))
    names = list(dict.fromkeys(name for row in mine for name in row["categories"]))
    parts = [[row["categories"].get(name) for name in names] for row in mine]
    header = ("method", *names)
    table = [
        (row["method"], *(_number(p["accepted_length"] if p else None) for p in mine_parts))
        for row, mine_parts in zip(mine, parts, strict=True)
    ]
    found.append(Block("Accepted length by category", f"Batch {smallest}.", [header, *table]))
    if smallest == 1:
        table = [
            (row["method"], *(_number(p["speedup"] if p else None) for p in mine_parts))
            for row, mine_parts in zip(mine, parts, strict=True)
        ]
        svg = plots.by_category(mine)
        found.append(Block("Speedup by category", "Batch 1.", [header, *table], svg))
    return [*found, *_time_split(rows)]


_PARTS = ("draft", "tree", "verify", "accept", "update", "round", "plain_step")


def _time_split(rows: Sequence[dict[str, Any]]) -> list[Block]:
    first = {(row["method"], row["batch"]): row["time_split"] for row in reversed(rows)}
    table = [
        (method, str(batch), *(_number(1e3 * parts[name], 3) for name in _PARTS))
        for (method, batch), parts in reversed(first.items())
        if parts
    ]
    if not table:
        return []
    header = ("method", "batch", *(name.replace("_", " ") for name in _PARTS))
    return [Block("Where the time of a round goes", _SPLIT, [header, *table])]


_SPLIT = (
    "Milliseconds. Draft: the proposal; tree: ancestors and mask; verify: target pass and rule; "
    "accept: tokens and cache rows; update: the drafter's own state; round: all of it in one "
    "program, timed by itself."
)


def write(document: dict[str, Any], path: str, round_cost: str | None = None) -> None:
    """Write ``path``, and beside it the Markdown and its pictures; see ``page.write``."""
    page.write(blocks(document, None if round_cost is None else read_costs(round_cost)), path)


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.report``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", help="JSON file of infer.benchmark")
    parser.add_argument("--report", metavar="FILE.html", help="page, with FILE.md beside it")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="speedups by batch size, or accepted lengths of one"
    )
    parser.add_argument("--round-cost", metavar="FILE", help="figures of infer.profile")
    arguments = parser.parse_args()
    if not (arguments.report or arguments.plot):
        raise InputError("--report: expected it or --plot, found neither")
    check(arguments.report, arguments.round_cost)
    if arguments.plot:
        _check_place("--plot", arguments.plot, ".png")
    try:
        document = json.loads(pathlib.Path(arguments.results).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"results: expected a JSON file, found {arguments.results}") from error
    if arguments.report:
        write(document, arguments.report, arguments.round_cost)
    if arguments.plot:
        draw(document, arguments.plot)


if __name__ == "__main__":
    main()
