"""Plots of a benchmark as SVG text that needs nothing from outside itself (matplotlib)."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ctc_spec_jax.errors import InputError

Rows = Sequence[dict[str, Any]]


def require() -> None:
    """Refuse to go on without matplotlib.

    Raises:
      InputError: it is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise InputError(
            "--report: expected matplotlib to be installed (pip install -e '.[report]'), found none"
        ) from error


@contextlib.contextmanager
def _axes(found: list[str], salt: str, **labels: Any) -> Iterator[Any]:
    """Axes to draw on; the SVG is added to ``found``."""
    import matplotlib

    # Text stays text, and names of parts of a picture differ between the pictures of one page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure_of = importlib.import_module("matplotlib.figure").Figure
        figure = figure_of(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        yield axes
        axes.set(**labels)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            figure.legend(loc="outside right upper", fontsize="small")
        out = io.StringIO()
        # No metadata: it would name the day and addresses in the net.
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=empty)
    found.append(_inline(out.getvalue(), salt))


def _inline(svg: str, salt: str) -> str:
    """The ``svg`` element alone, its ids made unique, without what HTML does not need."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{salt}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{salt}-", svg)
    return svg.strip()


def _colour(index: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab20"](index % 20)


def _methods(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def by_position(rows: Rows) -> str:
    """Share of rounds that keep the drafted token of each depth, a line per method."""
    found: list[str] = []
    labels = {"xlabel": "position in the draft", "ylabel": "share of rounds that keep it"}
    with _axes(found, "position", **labels, ylim=(0, 1)) as axes:
        for index, row in enumerate(rows):
            kept = row["accepted_by_position"]
            places = range(1, len(kept) + 1)
            if any(kept):
                axes.plot(places, kept, marker="o", color=_colour(index), label=row["method"])
    return found[0]


def by_category(rows: Rows) -> str:
    """Speedup of every category with its interval, a bar per method."""
    found: list[str] = []
    names = list(dict.fromkeys(name for row in rows for name in row["categories"]))
    with _axes(found, "category", ylabel="speedup") as axes:
        width = 0.8 / max(len(rows), 1)
        for index, row in enumerate(rows):
            parts = [row["categories"].get(name) for name in names]
            at = [i + width * index - 0.4 for i, part in enumerate(parts) if part]
            value, low, high = (
                [part[key] for part in parts if part]
                for key in ("speedup", "speedup_low", "speedup_high")
            )
            axes.bar(
                at,
                value,
                width,
                align="edge",
                color=_colour(index),
                label=row["method"],
                yerr=_errors(value, low, high),
                error_kw={"lw": 0.6},
            )
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    return found[0]


def _errors(value, low, high) -> list[list[float]]:
    # An estimate may lie outside its percentiles, and a bar cannot have a negative length.
    down = [max(0.0, v - l) for v, l in zip(value, low, strict=True)]
    return [down, [max(0.0, h - v) for v, h in zip(value, high, strict=True)]]


def by_batch(rows: Rows, name: str = "batch") -> str:
    """Speedup by batch size with its interval, a line per method.

    ``name`` tells the ids of several such pictures of one page apart.
    """
    found: list[str] = []
    sizes = sorted({row["batch"] for row in rows})
    with _axes(found, name, xlabel="batch", ylabel="speedup") as axes:
        _sizes(axes, sizes)
        for index, method in enumerate(_methods(rows)):
            mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["batch"])
            value, low, high = (
                [r[key] for r in mine] for key in ("speedup", "speedup_low", "speedup_high")
            )
            axes.errorbar(
                [r["batch"] for r in mine],
                value,
                _errors(value, low, high),
                marker="o",
                color=_colour(index),
                label=method,
                capsize=2,
            )
        axes.axhline(1, color="black", lw=0.8)
    return found[0]


def round_cost(costs: Rows) -> str:
    """Cost of a round in plain steps by tree size, a line per batch size."""
    found: list[str] = []
    sizes = sorted({cost["nodes"] for cost in costs})
    labels = {"xlabel": "tree nodes", "ylabel": "cost of a round in plain steps"}
    with _axes(found, "cost", **labels) as axes:
        _sizes(axes, sizes)
        for index, batch in enumerate(sorted({cost["batch"] for cost in costs})):
            mine = [cost for cost in costs if cost["batch"] == batch]
            steps = [cost["plain_steps"] for cost in mine]
            nodes = [cost["nodes"] for cost in mine]
            axes.plot(nodes, steps, marker="o", color=_colour(index), label=f"batch {batch}")
    return found[0]


def _sizes(axes: Any, sizes: Sequence[int]) -> None:
    """A logarithmic axis that names these sizes and no others."""
    axes.set_xscale("log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
