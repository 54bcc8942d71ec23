"""Batches of prompts through the decoder until every one has all its answers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ctc_spec_jax import xla
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.generation import Generation
from train.dialogue import Dialogue, begin, line_of, next_turn, with_answer
from train.ledger import Ledger
from train.prompts import Prompt, row_seed

Pool = dict[int, list[Dialogue]]
"""Dialogues that wait for an answer, by the bucket of their length."""


def take(pool: Pool, rows: int) -> list[Dialogue]:
    """Remove and return up to ``rows`` dialogues of one bucket.

    A full batch of long ones goes first, so that chats come to their end; else the shortest bucket,
    whose next turns can still fill up a longer one.
    """
    full = [bucket for bucket, waiting in pool.items() if len(waiting) >= rows]
    bucket = max(full) if full else min(pool)
    batch, rest = pool[bucket][:rows], pool[bucket][rows:]
    if rest:
        pool[bucket] = rest
    else:
        del pool[bucket]
    return batch


def put(pool: Pool, dialogue: Dialogue) -> None:
    """Let a dialogue wait for its next answer."""
    pool.setdefault(xla.bucket(len(dialogue.ids)), []).append(dialogue)


def answer(
    engine: Engine, batch: Sequence[Dialogue], rows: int, seed: int, fields: Mapping[str, Any]
) -> list[Generation]:
    """The next answer of every dialogue; ``fields`` are options of ``Engine.generate``."""
    # Copies that end after one round keep the shape, and so the program, of a full batch.
    filled = [*batch, *[batch[0]] * (rows - len(batch))]
    budgets = [fields["max_new_tokens"]] * len(batch) + [1] * (rows - len(batch))
    answers = engine.generate(
        [d.ids for d in filled],
        seed=[row_seed(d.prompt.id, len(d.finish), seed) for d in filled],
        **{**fields, "max_new_tokens": budgets},
    )
    return answers[: len(batch)]


def answer_all(
    engine: Engine,
    dialogues: Iterable[Dialogue],
    ledger: Ledger,
    rows: int,
    seed: int,
    fields: Mapping[str, Any],
) -> int:
    """Answer all turns of all dialogues, writing every line as soon as it is complete.

    Returns:
      How many chats ended before their last turn, because it would not have fitted.
    """
    pool: Pool = {}
    for dialogue in dialogues:
        put(pool, dialogue)
    new, shortened, done = 0, 0, len(ledger.done)
    total = done + sum(map(len, pool.values()))
    with tqdm(total=total, initial=done, unit=" prompts") as bar:
        while pool:
            batch, lines = take(pool, rows), []
            answers = answer(engine, batch, rows, seed, fields)
            for dialogue, said in zip(batch, answers, strict=True):
                dialogue = with_answer(dialogue, said)
                following, reason = _follow(engine, dialogue, fields["max_new_tokens"])
                if reason:
                    bar.write(f"{label(dialogue.prompt)} ends early: {reason}", file=sys.stderr)
                    shortened += 1
                if following:
                    put(pool, following)
                else:
                    lines.append(line_of(dialogue))
                new += len(said.tokens)
            ledger.append(lines)
            bar.set_postfix_str(f"{new / bar.format_dict['elapsed']:.0f} tokens/s", refresh=False)
            bar.update(len(lines))
    return shortened


def _follow(
    engine: Engine, dialogue: Dialogue, max_new_tokens: int
) -> tuple[Dialogue | None, str | None]:
    """The dialogue before its next turn, if there is one, or why it cannot be answered."""
    try:
        following = next_turn(engine.tokenizer, dialogue)
    except InputError as error:
        return None, str(error)
    reason = no_room(engine, following, max_new_tokens) if following else None
    return (None, reason) if reason else (following, None)


def label(prompt: Prompt) -> str:
    """How messages call a prompt."""
    return f"prompt {prompt.id} ({prompt.place})"


def no_room(engine: Engine, dialogue: Dialogue, max_new_tokens: int) -> str | None:
    """Why an answer would not fit the target's positions, or None where it does."""
    room = engine.tokenizer.model_max_length - max_new_tokens
    if len(dialogue.ids) <= room:
        return None
    return (
        f"expected at most {max(0, room)} tokens, so that {max_new_tokens} new ones fit, found "
        f"{len(dialogue.ids)}"
    )


def prepare(
    engine: Engine, prompts: Iterable[Prompt], max_new_tokens: int
) -> tuple[list[Dialogue], list[str], int]:
    """Dialogues before their first answer.

    Returns:
      The dialogues, one sentence per prompt that cannot be decoded, and how many are too long, each
      of which is named on standard error.
    """
    ready, problems, too_long = [], [], 0
    for prompt in prompts:
        try:
            dialogue = begin(engine.tokenizer, prompt)
            if reason := no_room(engine, dialogue, max_new_tokens):
                print(f"{label(prompt)} is skipped: {reason}", file=sys.stderr)
                too_long += 1
                continue
            engine.encode([dialogue.ids], max_new_tokens)
            ready.append(dialogue)
        except InputError as error:
            sentence = str(error).removeprefix("prompt 0: ")
            problems.append(f"--prompts: {prompt.place}: {sentence}")
    return ready, problems, too_long
