"""Which drafting methods a benchmark can run, and with which drafter."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from ctc_spec_jax import demo, recipes
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.config import FAMILIES

PLAIN = "plain"
"""The baseline against itself: its interval is the noise of the machine."""

_DEPTH = 8
"""Deepest node of drafts that no folder gives a depth."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of ``recipes``, or ``PLAIN``.

    ``name`` is that of the recipe, a colon and the way to build trees behind it unless it is the
    default one. ``folder`` is None where there are no parameters.
    """

    name: str
    folder: str | None = None

    def engine(self, engine: Engine, nodes: int, dtype: Any) -> Engine:
        """The target of ``engine`` with this method's drafter; see ``Engine.with_drafter``."""
        if self.name == PLAIN:
            return engine.plain()
        name, _, tree = self.name.partition(":")
        if self.folder is None:
            return engine.with_method(name, nodes, _DEPTH, tree)
        return engine.with_drafter(self.folder, nodes, dtype, tree, name)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A method that is not measured, or a cell of one, and why."""

    method: str
    reason: str
    temperature: float | None = None
    batch: int | None = None


def demo_folders() -> list[str]:
    """Folders of the drafters that come with the demo target, one of each method.

    Those of ``drafters/`` were all trained alike; the demo's own, trained longer, stands in where
    its method is not among them.
    """
    own = demo.drafter_folder()
    found = sorted(path.parent for path in (own.parent / "drafters").glob("*/config.json"))
    if _kind(str(own)) not in {_kind(str(folder)) for folder in found}:
        found.insert(0, own)
    return [str(folder) for folder in found]


def by_method(folders: Sequence[str]) -> dict[str, str]:
    """Folder of every method that one of these drafter folders serves.

    A language model's folder serves all methods that draft with one.

    Raises:
      InputError: a folder without a readable config.json, or two for one method.
    """
    found: dict[str, str] = {}
    for folder in folders:
        kind = _kind(folder)
        for name in recipes.of_language_models() if kind in FAMILIES else [kind]:
            recipes.find(name)
            if name in found:
                raise InputError(
                    f"--drafters: expected one folder of each method, found {found[name]} and "
                    f"{folder} of {name}"
                )
            found[name] = folder
    return found


def _kind(folder: str) -> str:
    path = pathlib.Path(folder) / "config.json"
    try:
        return json.loads(path.read_text())["model_type"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"--drafters: expected a folder whose config.json names a method, found {folder}"
        ) from error


def choose(
    engine: Engine, names: str, folders: Sequence[str]
) -> tuple[list[Method], list[LeftOut]]:
    """The methods to measure, plain decoding first, and those of ``all`` that cannot run.

    Args:
      engine: of the target.
      names: ``all``, or names of ``Method`` with commas between them.
      folders: of trained drafters.

    Raises:
      InputError: an unknown method, or one asked for by name that cannot run.
    """
    trained = by_method(folders)
    wanted = [*recipes.RECIPES] if names == "all" else [n.strip() for n in names.split(",")]
    chosen, left_out = [Method(PLAIN)], []
    for name in dict.fromkeys(wanted):
        if name == PLAIN:
            continue
        method = name.partition(":")[0]
        recipes.find(method)
        if method in trained:
            chosen.append(Method(name, trained[method]))
            continue
        try:
            engine.with_method(method, 2, 1)
            chosen.append(Method(name))
        except InputError as error:
            reason = "needs the folder of a drafter (--drafters), and none was given"
            if names != "all":
                raise InputError(f"--methods: {name} {reason}") from error
            left_out.append(LeftOut(name, reason))
    return chosen, left_out
