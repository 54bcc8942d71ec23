"""Which divergence and which mix of data: one short training run for each pair, and a table.

    python -m train.distill --config configs/demo_small_lm.yaml \
        --divergences forward_kl reverse_kl jensen_shannon total_variation --on-policy 0 0.5 1 \
        [section.field=value ...]

Every run is that of ``train.train`` with one weight of its loss at 1 and ``loss.on_policy`` at one
share; its folder lies in ``run.folder``, so a run that is complete is not repeated. Seeds, steps
and data are the same. The table holds shares of drafted tokens that the decoder keeps by rejection
on held-out prompts, before and after training, with one standard error; the mean of
``sum_v min(p, q)`` at the same places and over the drafter's own text; and the accepted length of
greedy drafts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys

import jax
from tqdm import tqdm

from ctc_spec_jax import recipes
from ctc_spec_jax.cli import exit_on_bad_input, use_compilation_cache
from ctc_spec_jax.draft.training import DIVERGENCES
from ctc_spec_jax.errors import InputError
from train import train as program
from train.config import TrainConfig, load_config

OBJECTIVES = ("cross_entropy", *DIVERGENCES)
"""What ``--divergences`` takes; cross-entropy learns the text alone."""

_COLUMNS = (
    ("before", "acceptance"),
    ("after", "acceptance"),
    ("error", "acceptance_error"),
    ("overlap", "acceptance_overlap"),
    ("own text", "own_text_overlap"),
    ("length", "accepted_length"),
)


def variant(config: TrainConfig, objective: str, share: float) -> TrainConfig:
    """The experiment with one objective and one share of the drafter's own text."""
    weights = {name: float(name == objective) for name in OBJECTIVES}
    folder = f"{config.run.folder}/{objective}_{share:g}"
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, folder=folder),
        loss=dataclasses.replace(config.loss, on_policy=share, **weights),
        evaluation=dataclasses.replace(config.evaluation, before=True),
    )


def measured(config: TrainConfig) -> list[float]:
    """Train, or take a finished run's word; numbers in the order of the columns."""
    mesh = program.make_mesh(config)
    objective = program.make_objective(config, mesh)
    after = program.train(config, objective, mesh, quiet=True)["metrics"]
    lines = (pathlib.Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()
    before = next(line for line in map(json.loads, lines) if "acceptance" in line)
    return [(before if title == "before" else after)[name] for title, name in _COLUMNS]


def table(rows: list[tuple[str, float, list[float]]]) -> str:
    """Aligned text, a line for every run."""
    titles = "".join(f"{title:>10}" for title, _ in _COLUMNS)
    lines = [f"{'divergence':18}{'on policy':>10}{titles}"]
    for objective, share, values in rows:
        numbers = "".join(f"{value:10.3f}" for value in values)
        lines.append(f"{objective:18}{share:10g}{numbers}")
    return "\n".join(lines)


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m train.distill``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="experiment file of configs/")
    parser.add_argument("--divergences", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--on-policy", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    parser.epilog = "further arguments: section.field=value"
    # Lists of values would take overrides that follow them for their own.
    words = sys.argv[1:]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    arguments = parser.parse_args([word for word in words if word not in overrides])
    config = load_config(arguments.config, overrides)
    if not recipes.find(config.drafter.method).drawn:
        names = ", ".join(name for name, recipe in recipes.RECIPES.items() if recipe.drawn)
        raise InputError(
            f"drafter.method: expected one that drafts by a law ({names}), found "
            f"{config.drafter.method!r}"
        )
    pairs = [(name, share) for name in arguments.divergences for share in arguments.on_policy]
    use_compilation_cache()
    rows = []
    for name, share in tqdm(pairs, unit=" run", disable=jax.process_index() > 0):
        rows.append((name, share, measured(variant(config, name, share))))
        tqdm.write(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
