"""Plots of a benchmark as SVG text that needs nothing from outside itself (matplotlib)."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ctc_spec_jax.errors import InputError
from infer.methods import PLAIN

Rows = Sequence[dict[str, Any]]

_COLOURS = 8
_MARKERS = "osD^vPX*"
_LINES = ("-", "--", ":")
_WIDTH = 8.0  # inches


def require(flag: str = "--report") -> None:
    """Refuse to go on without matplotlib.

    Raises:
      InputError: it is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise InputError(
            f"{flag}: expected matplotlib to be installed (pip install -e '.[report]'), found none"
        ) from error


@contextlib.contextmanager
def _figure(found: list[str], salt: str, height: float = 4.0) -> Iterator[Any]:
    """A figure to draw on; the SVG is added to ``found``."""
    import matplotlib

    # Text stays text, and names of parts of a picture differ between the pictures of one page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure = _new_figure(height)
        yield figure
        out = io.StringIO()
        # No metadata: it would name the day and addresses in the net.
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=empty)
    found.append(_inline(out.getvalue(), salt))


def _new_figure(height: float) -> Any:
    figure_of = importlib.import_module("matplotlib.figure").Figure
    return figure_of(figsize=(_WIDTH, height), layout="constrained")


@contextlib.contextmanager
def _axes(found: list[str], salt: str, **labels: Any) -> Iterator[Any]:
    """Axes to draw lines on, whose names stand beside them."""
    with _figure(found, salt) as figure:
        axes = figure.subplots()
        yield axes
        axes.set(**labels)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            figure.legend(loc="outside right upper")


def _inline(svg: str, salt: str) -> str:
    """The ``svg`` element alone, its ids made unique, without what HTML does not need."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{salt}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{salt}-", svg)
    return svg.strip()


def _style(index: int) -> dict[str, Any]:
    """Look of a line: colours repeat with other dashes, and neighbours have other markers."""
    import matplotlib

    return {
        "color": matplotlib.colormaps["Dark2"](index % _COLOURS),
        "linestyle": _LINES[index // _COLOURS % len(_LINES)],
        "marker": _MARKERS[(index + index // _COLOURS) % len(_MARKERS)],
        "markersize": 5,
    }


def _methods(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def by_position(rows: Rows) -> str:
    """Share of rounds that keep the drafted token of each depth, a line per method."""
    found: list[str] = []
    deepest = max(len(row["accepted_by_position"]) for row in rows)
    labels = {"xlabel": "position in the draft", "ylabel": "share of rounds that keep it"}
    with _axes(found, "position", **labels, ylim=(0, 1)) as axes:
        for index, row in enumerate(rows):
            kept = row["accepted_by_position"]
            if any(kept):
                axes.plot(range(1, len(kept) + 1), kept, label=row["method"], **_style(index))
        axes.set_xticks(range(1, deepest + 1))
    return found[0]


def by_category(rows: Rows) -> str:
    """Speedup of every category with its interval, a panel per category, a line per method."""
    found: list[str] = []
    names = list(dict.fromkeys(name for row in rows for name in row["categories"]))
    methods, columns = _methods(rows), min(3, len(names))
    lines = -(-len(names) // columns)
    with _figure(found, "category", lines * max(2.0, 0.8 + 0.22 * len(methods)) + 0.2) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes, name in zip(panels.flat, names, strict=False):
            parts = [(row["method"], row["categories"].get(name)) for row in rows]
            places = [methods.index(method) for method, part in parts if part]
            _points(axes, places, [part for _, part in parts if part], "speedup")
            axes.set_title(name, fontsize="medium")
            axes.axvline(1, color="black", lw=0.8)
            axes.tick_params(labelbottom=True)
            _named(axes, methods)
        for axes in panels.flat[len(names) :]:
            axes.set_axis_off()
        figure.supxlabel("speedup", fontsize="medium")
    return found[0]


def _points(axes: Any, places: Sequence[float], parts: Rows, key: str, **look: Any) -> None:
    """Values with their intervals from left to right, each at its height."""
    value = [part[key] for part in parts]
    low, high = ([part.get(f"{key}_{end}") for part in parts] for end in ("low", "high"))
    errors = None if None in low or None in high else _errors(value, low, high)
    look = {"fmt": "o", "color": _style(0)["color"], "capsize": 2, "markersize": 5} | look
    axes.errorbar(value, places, xerr=errors, **look)


def _named(axes: Any, names: Sequence[str]) -> None:
    """A line for every name, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(alpha=0.3)


def _errors(value, low, high) -> list[list[float]]:
    # An estimate may lie outside its percentiles, and a bar cannot have a negative length.
    down = [max(0.0, v - l) for v, l in zip(value, low, strict=True)]
    return [down, [max(0.0, h - v) for v, h in zip(value, high, strict=True)]]


def by_batch(rows: Rows, name: str = "batch") -> str:
    """Speedup by batch size with its interval, a line per method.

    ``name`` tells the ids of several such pictures of one page apart.
    """
    found: list[str] = []
    with _axes(found, name, xlabel="batch", ylabel="speedup") as axes:
        _speedups(axes, rows, _methods(rows))
    return found[0]


def _speedups(axes: Any, rows: Rows, methods: Sequence[str]) -> None:
    """A line for every method, on a scale of the batch sizes."""
    _sizes(axes, sorted({row["batch"] for row in rows}))
    for index, method in enumerate(methods):
        mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["batch"])
        value, low, high = (
            [r[key] for r in mine] for key in ("speedup", "speedup_low", "speedup_high")
        )
        aside = 1 + 0.02 * (index - (len(methods) - 1) / 2)  # intervals lie side by side
        places, errors = [r["batch"] * aside for r in mine], _errors(value, low, high)
        axes.errorbar(places, value, errors, label=method, capsize=2, **_style(index))
    axes.axhline(1, color="black", lw=0.8)


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
            axes.plot(nodes, steps, label=f"batch {batch}", **_style(index))
    return found[0]


def passes(rows: Rows) -> list[dict[str, Any]]:
    """Points of the roofline: name, bytes, operations and seconds of a pass."""
    points: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        for part, work in (row.get("work") or {}).items():
            name = PLAIN if part == "plain_step" else row["method"]
            point = {"name": name, "seconds": row["time_split"][part], **work}
            points.setdefault((name, row["batch"]), point)
    return [*points.values()]


def roofline(points: Rows, rates: dict[str, float]) -> str:
    """Rate of operations by operations per byte, a point per measured pass, under the roof."""
    found: list[str] = []
    labels = {"xlabel": "operations per byte", "ylabel": "billion operations a second"}
    density = [point["operations"] / point["bytes"] for point in points]
    corner = rates["operations"] / rates["bandwidth"]
    ends = min(*density, corner) / 2, max(*density, corner) * 2
    with _axes(found, "roofline", **labels) as axes:
        axes.set(xscale="log", yscale="log")
        places = sorted({*ends, corner})
        roof = [min(x * rates["bandwidth"], rates["operations"]) / 1e9 for x in places]
        axes.plot(places, roof, color="black", lw=1, label="roof of the device")
        speeds = [point["operations"] / point["seconds"] / 1e9 for point in points]
        axes.set_ylim(min(*speeds, *roof) / 2, 2 * max(*speeds, *roof))
        names = list(dict.fromkeys(point["name"] for point in points))
        for index, name in enumerate(names):
            mine = [i for i, point in enumerate(points) if point["name"] == name]
            look = _style(index) | {"linestyle": "none", "markersize": 6}
            reached = [speeds[i] for i in mine]
            axes.plot([density[i] for i in mine], reached, label=name, **look)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    return found[0]


def speedups(rows: Rows, path: str, description: str) -> None:
    """Write a PNG file: speedups as in ``by_batch``, a panel per temperature; see ``accepted``."""
    methods, temperatures = _methods(rows), sorted({row["temperature"] for row in rows})
    figure = _new_figure(0.6 + 3.4 * len(temperatures))
    panels = figure.subplots(len(temperatures), squeeze=False, sharex=True)[:, 0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        _speedups(axes, [row for row in rows if row["temperature"] == temperature], methods)
        axes.set_ylabel(f"speedup, {_drawing(temperature)}")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("batch")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, format="png", dpi=150, metadata={"Description": description})


def _drawing(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def accepted(rows: Rows, path: str, description: str) -> None:
    """Write a PNG file: accepted length of every method with its interval, by temperature.

    White behind, so that it can be read on pages of any colour. ``description`` is noted in it.
    """
    methods = _methods(rows)
    temperatures = sorted({row["temperature"] for row in rows})
    figure = _new_figure(1.0 + (0.24 + 0.08 * len(temperatures)) * len(methods))
    axes = figure.subplots()
    for index, temperature in enumerate(temperatures):
        mine = [row for row in rows if row["temperature"] == temperature]
        shift = (index - (len(temperatures) - 1) / 2) * 0.5 / len(temperatures)
        look = {"fmt": _MARKERS[index], "color": _style(index)["color"]}
        places = [methods.index(row["method"]) + shift for row in mine]
        label = _drawing(temperature)
        _points(axes, places, mine, "accepted_length", label=label, **look)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlabel("accepted length: tokens per target pass, its own included")
    _named(axes, methods)
    figure.legend(loc="outside upper right", ncols=len(temperatures))
    figure.savefig(path, format="png", dpi=150, metadata={"Description": description})


def _sizes(axes: Any, sizes: Sequence[int]) -> None:
    """A logarithmic axis that names these sizes and no others."""
    axes.set_xscale("log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
