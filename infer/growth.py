"""Costs of steps and rounds by context, tree size and batch beside what arithmetic predicts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ctc_spec_jax import memory
from ctc_spec_jax.engine import Engine
from infer import roofline
from infer.roofline import Rates, Work

AXES = {
    "context": "tokens in the cache of every row",
    "nodes": "nodes of a tree, its root included; 1: plain decoding",
    "batch": "rows",
}
"""Axes of growth in the order of ``Case``, and what they count."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a measurement, see ``AXES``."""

    context: int
    nodes: int
    batch: int

    def __str__(self) -> str:
        return f"context {self.context}, {self.nodes} nodes, batch {self.batch}"


def axes_of(given: argparse.Namespace) -> dict[str, list[int]]:
    """Sizes along every axis; none where it is not varied."""
    return {axis: getattr(given, axis) for axis in AXES}


def cases(base: Sequence[int], axes: Mapping[str, Sequence[int]]) -> list[Case]:
    """The base and every axis varied alone, each case once, the base first."""
    first = Case(*base)
    varied = [
        dataclasses.replace(first, **{axis: size}) for axis, sizes in axes.items() for size in sizes
    ]
    return list(dict.fromkeys([first, *varied]))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a plain step, a round, what of it is outside of the models, and other programs.

    ``slots`` is S of the caches, ``bound`` what a plain step cannot do without; ``step``,
    ``target`` and ``drafter`` are the work of a plain step and of the two parts of a round as they
    are done.
    """

    case: Case
    slots: int
    seconds: Mapping[str, float]
    rates: Rates
    bound: Work
    step: Work
    target: Work
    drafter: Work

    @property
    def share_of_bound(self) -> float:
        """Least time of a plain step in its time."""
        return self.bound.seconds(self.rates) / self.seconds["plain"]

    @property
    def plain_steps(self) -> float:
        """Time of a round in plain steps."""
        return self.seconds["round"] / self.seconds["plain"]

    @property
    def share_outside(self) -> float:
        """Of a round, outside of the two models."""
        return self.seconds["outside"] / self.seconds["round"]

    @property
    def predicted(self) -> dict[str, float]:
        """Seconds of a plain step and of a round by arithmetic."""
        both = self.target.seconds(self.rates) + self.drafter.seconds(self.rates)
        return {"plain": self.step.seconds(self.rates), "round": both}


def cost(
    engine: Engine, case: Case, slots: int, rates: Rates, seconds: Mapping[str, float]
) -> Cost:
    """Measured ``seconds`` of a case beside its arithmetic."""
    config, params, batch = engine.lm.config, engine.params, case.batch
    drafter = Work(0, 0)
    if case.nodes > 1:
        network = vars(engine.drafter)["config"]
        drafter = roofline.drafter_work(network, engine.draft_params, params, batch, slots)
    return Cost(
        case,
        slots,
        seconds,
        rates,
        roofline.plain_bound(config, params, case.context, batch),
        roofline.target_work(config, params, batch, 1, slots),
        roofline.target_work(config, params, batch, case.nodes, slots),
        drafter,
    )


def as_dict(one: Cost) -> dict[str, Any]:
    """The figures as plain types."""
    works = {name: getattr(one, name) for name in ("bound", "step", "target", "drafter")}
    return {
        **dataclasses.asdict(one.case),
        "slots": one.slots,
        "seconds": dict(one.seconds),
        "predicted_seconds": {"bound": one.bound.seconds(one.rates), **one.predicted},
        "share_of_bound": one.share_of_bound,
        "plain_steps": one.plain_steps,
        "share_outside": one.share_outside,
        "work": {
            name: {**dataclasses.asdict(work), "ruled_by": work.ruled_by(one.rates)}
            for name, work in works.items()
        },
    }


def heading(engine: Engine, rates: Rates, random: bool) -> str:
    """What is measured, and the rates that this device showed."""
    config, size = engine.lm.config, memory.tree_bytes(engine.params)
    read = memory.tree_bytes(roofline.read_each_step(engine.params))
    weights = "random weights" if random else "weights of the demo"
    return (
        f"{weights}: {config.num_layers} layers of width {config.width}, "
        f"{size / 1e9:.3f} GB, of which a step reads {read / 1e9:.3f} GB\n"
        f"measured: {rates.bandwidth / 1e9:.1f} GB/s read, "
        f"{rates.operations / 1e12:.3f} T operations/s in products"
    )


_TITLES = ("context", "nodes", "batch", "ms a step", "predicted", "of bound", "ms a round")
_TITLES += ("predicted", "in steps", "outside", "GB", "G operations", "ruled by")


def _aligned(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>13}" for cell in cells)


def titles() -> str:
    """Heads of the columns of ``line``."""
    return _aligned(_TITLES)


def line(one: Cost) -> str:
    """A case as aligned text; the last three columns are those of the target in a round."""
    case, ms = one.case, {name: f"{x * 1e3:.2f}" for name, x in one.seconds.items()}
    plain, both = (f"{one.predicted[name] * 1e3:.2f}" for name in ("plain", "round"))
    return _aligned(
        [
            *(str(size) for size in dataclasses.astuple(case)),
            *(ms["plain"], plain, f"{one.share_of_bound:.1%}"),
            *(ms["round"], both, f"{one.plain_steps:.2f}", f"{one.share_outside:.1%}"),
            *(f"{one.target.bytes / 1e9:.3f}", f"{one.target.operations / 1e9:.2f}"),
            one.target.ruled_by(one.rates),
        ]
    )


def peers(base: Cost, left_out: Mapping[str, str]) -> str:
    """Lines about ``transformers`` beside this library; empty without it."""
    names = [name for name in base.seconds if name.startswith("transformers")]
    if not names and not left_out:
        return ""
    lines = [f"ms per token at {base.case} (random weights in transformers)"]
    for name in ("plain", *names):
        shown = "this library" if name == "plain" else name
        lines.append(f"{shown:>24}{base.seconds[name] * 1e3:>10.2f}")
    lines += [f"{name:>24}  left out: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def plot(costs: Sequence[Cost], base: Sequence[int], path: str) -> None:
    """A panel per axis: milliseconds of steps and rounds as points, predictions as lines."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(13, 4), layout="constrained")
    colours = {"plain": "tab:blue", "round": "tab:orange", "outside": "tab:green"}
    shown = {"plain": "plain step", "round": "round", "outside": "outside of the models"}
    for axes, axis, held in zip(panels, AXES, range(len(AXES)), strict=True):
        mine = [
            one
            for one in costs
            if all(
                size == base[i] for i, size in enumerate(dataclasses.astuple(one.case)) if i != held
            )
        ]
        mine.sort(key=lambda one: getattr(one.case, axis))
        sizes = [getattr(one.case, axis) for one in mine]
        for name, colour in colours.items():
            measured = [one.seconds[name] * 1e3 for one in mine]
            axes.plot(sizes, measured, "o", color=colour, label=f"{shown[name]}, measured")
            if name != "outside":
                line_ = [one.predicted[name] * 1e3 for one in mine]
                axes.plot(sizes, line_, color=colour, label=f"{shown[name]}, by arithmetic")
        others = [f"{n} {base[i]}" for i, n in enumerate(AXES) if n != axis]
        axes.set(xscale="log", yscale="log", xlabel=axis, title=", ".join(others))
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
    panels[0].set_ylabel("milliseconds")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
