"""A prompt on its way to a line of training data: its tokens, whose they are, and its answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from ctc_spec_jax.errors import InputError
from ctc_spec_jax.generation import Generation
from train.loops import loop_share
from train.prompts import Message, Prompt

_LOOPS = 0.4


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A prompt and the answers so far; ``ids`` is all text of both, ready for the next answer.

    ``mask[i]`` is 1 where token i was generated after exactly the tokens before it. ``finish`` has
    one reason per answer. ``rounds`` and ``generated`` count target passes and answer tokens.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    mask: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    finish: tuple[str, ...] = ()
    rounds: int = 0
    generated: int = 0


def begin(tokenizer, prompt: Prompt) -> Dialogue:
    """The prompt before its first answer.

    Raises:
      InputError: a chat that the template refuses, in any of its turns.
    """
    if not prompt.turns:
        text = prompt.content
        ids = tokenizer(text, verbose=False)["input_ids"] if isinstance(text, str) else text
        return Dialogue(prompt, tuple(ids), (0,) * len(ids))
    answer: Message = {"role": "assistant", "content": "x"}
    render(tokenizer, [m for turn in prompt.turns for m in (*turn, answer)][:-1])
    ids = render(tokenizer, prompt.turns[0])
    return Dialogue(prompt, ids, (0,) * len(ids), prompt.turns[0])


def with_answer(dialogue: Dialogue, answer: Generation) -> Dialogue:
    """The dialogue after one more answer."""
    said: Message = {"role": "assistant", "content": answer.text}
    return dataclasses.replace(
        dialogue,
        ids=(*dialogue.ids, *answer.tokens),
        mask=dialogue.mask + (1,) * len(answer.tokens),
        messages=(*dialogue.messages, said) if dialogue.prompt.turns else (),
        finish=(*dialogue.finish, answer.finish),
        rounds=dialogue.rounds + answer.rounds,
        generated=dialogue.generated + len(answer.tokens),
    )


def next_turn(tokenizer, dialogue: Dialogue) -> Dialogue | None:
    """The dialogue before its next answer, or None after the last one.

    The template writes the whole conversation anew, as it does in a chat. Where its tokens part
    from those that were generated (an answer that tokenizes otherwise, a template that drops
    thoughts), the rest is no longer what the target wrote there, and its mask is 0.

    Raises:
      InputError: a conversation that the template refuses.
    """
    if len(dialogue.finish) >= len(dialogue.prompt.turns):
        return None
    messages = (*dialogue.messages, *dialogue.prompt.turns[len(dialogue.finish)])
    ids = render(tokenizer, messages)
    kept = _common(ids, dialogue.ids)
    mask = dialogue.mask[:kept] + (0,) * (len(ids) - kept)
    return dataclasses.replace(dialogue, ids=ids, mask=mask, messages=messages)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two texts begin with together."""
    size = min(len(first), len(second))
    same = np.asarray(first[:size]) == np.asarray(second[:size])
    return size if same.all() else int(np.argmin(same))


def render(tokenizer, messages: Sequence[Message]) -> tuple[int, ...]:
    """Tokens of a conversation up to where the assistant speaks.

    Raises:
      InputError: no chat template, or one that refuses the messages.
    """
    if not tokenizer.chat_template:
        raise InputError("chat template: expected one in the tokenizer or --template, found none")
    try:
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False, verbose=False
        )
    except jinja2.TemplateError as error:
        raise InputError(f"expected messages that fit the chat template, found {error}") from error
    return tuple(ids)


def line_of(dialogue: Dialogue) -> dict[str, Any]:
    """The line of training data; ``accepted_length`` is in tokens per target pass."""
    line = {
        "id": dialogue.prompt.id,
        "input_ids": list(dialogue.ids),
        "loss_mask": list(dialogue.mask),
        "finish": list(dialogue.finish),
        "rounds": dialogue.rounds,
        "accepted_length": round(dialogue.generated / dialogue.rounds, 4),
    }
    if dialogue.prompt.turns:
        line["messages"] = [dict(message) for message in dialogue.messages]
    return line


@dataclasses.dataclass
class Totals:
    """Sums over lines: answered prompts, answer tokens, target passes, lines with a loop."""

    answers: int = 0
    tokens: int = 0
    rounds: int = 0
    loops: int = 0
    _generated: float = 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        """Count one line."""
        self.answers += 1
        self.tokens += sum(line["loss_mask"])
        self.rounds += line["rounds"]
        self._generated += line["accepted_length"] * line["rounds"]
        ids = np.asarray(line["input_ids"])
        self.loops += any(loop_share(ids[a:b]) > _LOOPS for a, b in _spans(line["loss_mask"]))

    def counts(self) -> dict[str, Any]:
        """The sums, and the means that are printed."""
        return {
            "answers": self.answers,
            "tokens": self.tokens,
            "rounds": self.rounds,
            "loop_share": self.loops / max(1, self.answers),
            "accepted_length": self._generated / max(1, self.rounds),
        }


def _spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Beginnings and ends of the runs of ones."""
    edges = np.flatnonzero(np.diff(np.pad(np.asarray(mask, np.int8), 1)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
