"""Prompts that a target is to answer: chats and texts of JSONL files, or pieces of Python sources.

A line of a file is an object with ``messages`` (role, content), ``conversations`` (from, value;
the form of ShareGPT), ``turns`` (texts of the user) or ``prompt`` (one text), and with an ``id`` or
without one; its ``category`` or ``topic`` says what kind of text it asks for.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ctc_spec_jax.errors import InputError
from train import lines

Message = Mapping[str, Any]

_EXPECTED = "expected an object with 'messages', 'conversations', 'turns' or 'prompt'"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is to be answered: a text or token ids, or the turns of a chat.

    ``turns[i]`` are the messages that come before answer i, the last of them the user's. ``place``
    says where the prompt was found, for messages; ``category`` what kind of text it asks for.
    """

    id: str
    content: str | tuple[int, ...] = ""
    turns: tuple[tuple[Message, ...], ...] = ()
    place: str = dataclasses.field(default="", compare=False)
    category: str = dataclasses.field(default="", compare=False)


def read_prompts(paths: Sequence[str], first_turn: bool = False) -> tuple[list[Prompt], list[str]]:
    """Prompts of JSONL files, gzipped where the name ends in ``.gz``.

    A line without an id is named by a hash of what the target will see, with ``-2``, ``-3``, ...
    for repetitions; a line with an id that an earlier one has is a bad line. The file's own answers
    are left out.

    Args:
      paths: of the files.
      first_turn: take the first turn of a chat only.

    Returns:
      The prompts, and one sentence for each bad line.

    Raises:
      InputError: an unreadable file, or no prompt at all.
    """
    found: dict[str, Prompt] = {}
    problems = []
    for path in paths:
        for number, line in _numbered(path):
            place = f"line {number} of {path}"
            try:
                prompt = parse_prompt(line, first_turn, place)
                if prompt.id in found:
                    earlier = found[prompt.id].place
                    raise InputError(f"expected an id of its own, found {prompt.id!r} of {earlier}")
                prompt = prompt if prompt.id else _named(prompt, found)
                found[prompt.id] = prompt
            except InputError as error:
                problems.append(f"--prompts: {place}: {error}")
    if not found:
        names = ", ".join(paths)
        raise InputError(
            "\nerror: ".join(problems)
            or f"--prompts: expected at least one line in {names}, found none"
        )
    return list(found.values()), problems


def _numbered(path: str) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--prompts: expected a readable file, found {path} ({reason})") from error


def parse_prompt(line: bytes, first_turn: bool = False, place: str = "") -> Prompt:
    """The prompt of one line; its ``id`` is empty where the line has none.

    Raises:
      InputError: a line that is none of the forms above.
    """
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8, found {line[error.start : error.end]!r}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{_EXPECTED}, found {line[:40]!r}") from error
    if not isinstance(row, dict):
        raise InputError(f"{_EXPECTED}, found {line[:40]!r}")
    name = row.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int | None) or name == "":
        raise InputError(f"expected an id that is a text or a whole number, found {name!r}")
    name = "" if name is None else str(name)
    category = row.get("category", row.get("topic"))
    category = category if isinstance(category, str) else ""
    messages = _messages(row, line)
    if messages is None:
        return Prompt(name, _text("prompt", row.get("prompt")), place=place, category=category)
    turns = _turns(messages)
    turns = turns[:1] if first_turn else turns
    return Prompt(name, turns=turns, place=place, category=category)


def _messages(row: Mapping[str, Any], line: bytes) -> Sequence[Message] | None:
    """The messages of a chat, or None where the line is no chat."""
    if "messages" in row or "conversations" in row:
        try:
            content, _ = lines.parse(line)
        except lines.BrokenLine as error:
            raise InputError(f"expected a chat, found {error}") from error
        if not isinstance(content, lines.Chat):
            raise InputError(f"expected a chat, found {type(content).__name__.lower()} as well")
        return content.messages
    if "turns" in row:
        if not isinstance(row["turns"], list):
            raise InputError(f"turns: expected a list, found {row['turns']!r:.40}")
        return [{"role": "user", "content": _text("turn", t)} for t in row["turns"]]
    if "prompt" in row:
        return None
    raise InputError(f"{_EXPECTED}, found one with {', '.join(map(repr, row)) or 'nothing'}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name}: expected a text, found {value!r:.40}")
    return value


def _turns(messages: Iterable[Message]) -> tuple[tuple[Message, ...], ...]:
    """The messages before each answer that is to be given; those of the file are left out."""
    turns, waiting = [], []
    for message in messages:
        if message["role"] == "assistant":
            continue
        if message["role"] == "tool":
            raise InputError("expected a chat without tools, found a message with the role 'tool'")
        waiting.append(message)
        if message["role"] == "user":
            turns.append(tuple(waiting))
            waiting = []
    if not turns:
        raise InputError("expected a message of the user, found none")
    return tuple(turns)


def _named(prompt: Prompt, taken: Iterable[str]) -> Prompt:
    """The prompt with an id made of its content that is not taken yet."""
    seen = json.dumps([prompt.content, prompt.turns], sort_keys=True)
    base = name = hashlib.sha256(seen.encode()).hexdigest()[:16]
    copy = 1
    while name in taken:
        copy += 1
        name = f"{base}-{copy}"
    return dataclasses.replace(prompt, id=name)


def cut_prompts(tokens, count: int, shortest: int, longest: int, seed: int) -> list[Prompt]:
    """``count`` prompts of ``shortest`` to ``longest`` tokens from random places of a text.

    Args:
      tokens: int32 [T], the text.
      count: number of prompts.
      shortest: tokens.
      longest: tokens.
      seed: of places and lengths.

    Raises:
      InputError: lengths that do not fit the text.
    """
    if not 1 <= shortest <= longest < len(tokens):
        raise InputError(
            f"--prompt-lengths: expected 1 <= shortest <= longest < {len(tokens)} (the text), "
            f"found {shortest} and {longest}"
        )
    draw = np.random.default_rng(seed)
    lengths = draw.integers(shortest, longest + 1, count)
    starts = draw.integers(0, len(tokens) - longest, count)
    found: dict[str, Prompt] = {}
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        content = tuple(np.asarray(tokens)[start : start + length].tolist())
        prompt = _named(Prompt("", content, place=f"piece {index} of the sources"), found)
        found[prompt.id] = prompt
    return list(found.values())


def share_of(prompts: Iterable[Prompt], index: int, count: int) -> list[Prompt]:
    """The prompts of worker ``index`` of ``count``, by a hash of their ids."""
    return [p for p in prompts if _number("shard", p.id) % count == index]


def row_seed(prompt_id: str, turn: int, seed: int) -> int:
    """Seed of one answer in 0..2**31 - 1, from the prompt's id, the turn and the run's seed."""
    return _number("seed", prompt_id, turn, seed) % 2**31


def _number(*words: Any) -> int:
    digest = hashlib.sha256(json.dumps(words).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def file_digest(path: str | pathlib.Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
      InputError: an unreadable file.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"expected a readable file, found {path} ({error.strerror})") from error
