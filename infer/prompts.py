"""Prompts of the programs: JSONL files with options per line, or held-out pieces of Python."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctc_spec_jax import options
from ctc_spec_jax.engine import Engine, seed_keys
from ctc_spec_jax.errors import InputError
from train import corpus

_NAMES = {field.name for field in dataclasses.fields(options.Options)}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, text or token ids, and its options; names as in ``Options``."""

    content: str | list[int]
    options: Mapping[str, Any]


def heldout_prompts(tokenizer, count: int, length: int = 96) -> list[list[int]]:
    """Token prompts from standard-library files that the demo target was not trained on."""
    _, texts = corpus.corpus(("stdlib",), corpus.HELDOUT)
    rows = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [row.ids for row in rows if len(row.ids) >= 2 * length]
    places = [(row, start) for row in ids for start in range(0, len(row) - length, 4 * length)]
    order = np.random.default_rng(0).permutation(len(places))[:count]
    return [places[i][0][places[i][1] : places[i][1] + length] for i in order]


def choose_prompts(
    engine: Engine, path: str | None, count: int, fields: Mapping[str, Any]
) -> tuple[list[Prompt], list[str]]:
    """Prompts of a JSONL file, or else ``count`` held-out ones, that ``engine`` can decode.

    A line is an object with ``prompt``, or ``turns`` of which the first is taken, and any options
    of its own beside ``fields``.

    Returns:
      The prompts, and one sentence for each line that cannot be decoded.

    Raises:
      InputError: an unreadable file, or no prompt at all.
    """
    if path is None:
        found = [Prompt(ids, fields) for ids in heldout_prompts(engine.tokenizer, count)]
        for prompt in found:
            _check(engine, prompt)
        return found, []
    prompts, problems = [], []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            prompt = _parse(line, fields)
            _check(engine, prompt)
            prompts.append(prompt)
        except InputError as error:
            # The line says which prompt it is.
            sentence = str(error).removeprefix("prompt 0: ")
            problems.append(f"--prompts: line {number} of {path}: {sentence}")
    if not prompts:
        raise InputError(
            "\nerror: ".join(problems)
            or f"--prompts: expected at least one line in {path}, found none"
        )
    return prompts, problems


def report(problems: Sequence[str]) -> None:
    """Say which lines are left out, one sentence each, on standard error."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)


def columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Options of several prompts as one list per name, as ``Engine.generate`` takes them."""
    names = sorted({name for prompt in prompts for name in prompt.options})
    default = options.Options()
    return {
        name: [prompt.options.get(name, getattr(default, name)) for prompt in prompts]
        for name in names
    }


def read_lines(path: str) -> list[bytes]:
    """Lines of a file of prompts.

    Raises:
      InputError: it cannot be read.
    """
    try:
        return pathlib.Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(
            f"--prompts: expected a readable file, found {path} ({error.strerror})"
        ) from error


def _parse(line: bytes, fields: Mapping[str, Any]) -> Prompt:
    expected = "expected an object with 'prompt' or 'turns'"
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8, found {line[error.start : error.end]!r}") from error
    try:
        row = json.loads(text)
        prompt = row["prompt"] if "prompt" in row else row["turns"][0]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{expected}, found {text[:40]!r}") from error
    if not isinstance(prompt, str):
        raise InputError(f"{expected} that is a text, found {prompt!r}")
    own = {name: value for name, value in row.items() if name in _NAMES}
    if isinstance(own.get("logit_bias"), dict):
        # The keys of a JSON object are texts; one that is no number is refused with the ids.
        bias = own["logit_bias"]
        own["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in bias.items()}
    return Prompt(prompt, {**fields, **own})


def _check(engine: Engine, prompt: Prompt) -> None:
    row = options.per_row(1, {name: [value] for name, value in prompt.options.items()})[0]
    engine.encode([prompt.content], [row.max_new_tokens])
    engine.request([row], seed_keys(0, 1))
