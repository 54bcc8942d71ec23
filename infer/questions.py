"""Questions of a benchmark: files in the format of Spec-Bench, and what a model is asked.

A line is an object with ``turns``, a list of texts, ``question_id`` (or ``id``) and ``category``;
one with a ``prompt`` is a question of one turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from infer.prompts import heldout_prompts, read_lines

_CONTEXT_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Question:
    """Turns of a user, each a text or token ids."""

    question_id: int | str
    category: str
    turns: tuple[str | tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn as the model gets it: token ids of all turns and answers before it, and its own."""

    question_id: int | str
    category: str
    turn: int
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Turns that are decoded together; only the first ``counted`` of them are not repetitions."""

    turns: tuple[Turn, ...]
    counted: int


def read_questions(paths: Sequence[str], limit: int | None) -> tuple[list[Question], list[str]]:
    """Questions of JSONL files, at most ``limit`` of each, its categories in turns.

    Returns:
      The questions, and one sentence for each line that is none.

    Raises:
      InputError: an unreadable file, or no question at all.
    """
    found: list[Question] = []
    problems: list[str] = []
    for path in paths:
        mine: list[Question] = []
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            try:
                mine.append(_parse(line, number, pathlib.Path(path).stem))
            except InputError as error:
                problems.append(f"--prompts: line {number} of {path}: {error}")
        found += in_turns_of_categories(mine)[:limit]
    if not found:
        raise InputError(
            "\nerror: ".join(problems)
            or f"--prompts: expected at least one line in {', '.join(paths)}, found none"
        )
    return found, problems


def heldout_questions(engine: Engine, count: int) -> list[Question]:
    """Pieces of Python files that the demo target never saw, as questions of one turn."""
    pieces = heldout_prompts(engine.tokenizer, count)
    return [Question(i, "heldout", (tuple(ids),)) for i, ids in enumerate(pieces)]


def in_turns_of_categories(questions: Sequence[Question]) -> list[Question]:
    """One question of each category after the other, so that any beginning is a fair sample."""
    rows: dict[str, list[Question]] = {}
    for question in questions:
        rows.setdefault(question.category, []).append(question)
    columns = itertools.zip_longest(*rows.values())
    return [question for column in columns for question in column if question is not None]


def _parse(line: bytes, number: int, name: str) -> Question:
    expected = "expected an object with 'turns', a list of texts,"
    try:
        row = json.loads(line)
        turns = row["turns"] if "turns" in row else [row["prompt"]]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{expected} found {line[:40]!r}") from error
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        raise InputError(f"{expected} found {turns!r}")
    question_id = row.get("question_id", row.get("id", number))
    return Question(question_id, str(row.get("category", name)), tuple(turns))


def ask(
    engine: Engine, questions: Sequence[Question], max_new_tokens: int
) -> tuple[list[list[Turn]], list[str]]:
    """The turns of every question as token ids, the target's own plain answers between them.

    All methods are asked the same: what a later turn follows is the greedy text of plain decoding.
    Where the tokenizer has a chat template a turn is what ``Conversation`` would send; a base
    model gets turns and answers in order, an empty line before every turn but the first.

    Returns:
      A list per question, and a sentence for every turn that does not fit the target.
    """
    plain, problems = engine.plain(), []
    talks = [_Talk(engine, question) for question in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        open_talks = []
        for talk in talks:
            if turn < len(talk.question.turns) and len(talk.asked) == turn:
                try:
                    talk.ask(max_new_tokens)
                    open_talks.append(talk)
                except InputError as error:
                    sentence = str(error).removeprefix("prompt 0: ")
                    problems.append(f"question {talk.question.question_id}: {sentence}")
        going_on = [talk for talk in open_talks if turn + 1 < len(talk.question.turns)]
        for first in range(0, len(going_on), _CONTEXT_ROWS):
            part = going_on[first : first + _CONTEXT_ROWS]
            prompts = [talk.asked[-1].tokens for talk in part]
            answers = plain.generate(prompts, max_new_tokens=max_new_tokens)
            for talk, answer in zip(part, answers, strict=True):
                talk.answer(answer)
    return [talk.asked for talk in talks if talk.asked], problems


class _Talk:
    """A question that is being asked, turn by turn."""

    def __init__(self, engine: Engine, question: Question):
        self.engine, self.question = engine, question
        self.asked: list[Turn] = []
        self._messages: list[dict[str, str]] = []
        self._tokens: list[int] = []

    def ask(self, max_new_tokens: int) -> None:
        """Add the next turn; see ``Engine.encode`` for what is refused."""
        index = len(self.asked)
        text: Any = self.question.turns[index]
        tokenizer = self.engine.tokenizer
        if isinstance(text, str) and tokenizer.chat_template:
            self._messages.append({"role": "user", "content": text})
            tokens = tokenizer.apply_chat_template(
                self._messages, add_generation_prompt=True, return_dict=False
            )
        elif isinstance(text, str):
            text = "\n\n" + text if index else text
            new = tokenizer(text, verbose=False, add_special_tokens=not index)["input_ids"]
            tokens = self._tokens + new
        else:
            tokens = self._tokens + list(text)
        self.engine.encode([tokens], max_new_tokens)
        self._tokens = tokens
        mine = (self.question.question_id, self.question.category, index)
        self.asked.append(Turn(*mine, tuple(tokens)))

    def answer(self, answer: Any) -> None:
        """Add what the model said; a base model reads on after its text, not after its stop."""
        self._messages.append({"role": "assistant", "content": answer.text})
        stop = answer.finish == "stop"
        self._tokens = self._tokens + answer.tokens[: len(answer.tokens) - stop]


def batches(talks: Sequence[Sequence[Turn]], batch: int) -> Iterator[list[Batch]]:
    """Questions ``batch`` at a time: the batches of their first turns, second turns and so on.

    Every batch has ``batch`` rows, so that one size is measured and not several: where there are
    too few, the rows are repeated.
    """
    for first in range(0, len(talks), batch):
        group = talks[first : first + batch]
        found = []
        for turn in range(max(len(talk) for talk in group)):
            rows = [talk[turn] for talk in group if turn < len(talk)]
            full = tuple(itertools.islice(itertools.cycle(rows), batch))
            found.append(Batch(full, len(rows)))
        yield found
