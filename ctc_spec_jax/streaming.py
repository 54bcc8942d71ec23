"""Answers piece by piece, and conversations that keep their cache on the device.

The program is left once per chunk of rounds: the host then reads the new tokens and starts the
next chunk, to which the state is donated.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jinja2
import numpy as np

from ctc_spec_jax import decode as loop_of
from ctc_spec_jax import options, xla
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.generation import FINISH
from ctc_spec_jax.types import RUNNING, DecodeState, Request

if TYPE_CHECKING:
    from ctc_spec_jax.engine import Engine


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of an answer; ``str(piece)`` is its text.

    ``from_draft[i]`` says whether token i was drafted; otherwise it is the target's own. ``finish``
    is why the answer ended, or ``running``; ``rounds`` counts the target passes so far.
    """

    text: str
    tokens: tuple[int, ...]
    from_draft: tuple[bool, ...]
    finish: str
    rounds: int

    def __str__(self) -> str:
        return self.text


def pieces(
    engine: Engine, loop: Loop, state: DecodeState, request: Request, rounds: int
) -> Iterator[Piece]:
    """Pieces of the one row of ``state``, which is consumed; see ``Engine.stream``."""
    for piece, _ in chunks(engine, loop, state, request, rounds):
        yield piece


def chunks(
    engine: Engine, loop: Loop, state: DecodeState, request: Request, rounds: int
) -> Iterator[tuple[Piece, DecodeState]]:
    """Pieces of the one row of ``state`` with the state after each; the next piece consumes it."""
    if rounds < 1:
        raise InputError(f"rounds: expected at least 1, found {rounds}")
    shown, text, finish = 0, "", RUNNING
    while finish == RUNNING:
        state = engine.run(loop_of.advance, loop, state, request, np.int32(rounds), donated=True)
        seen = (state.tokens, state.prompt_length, state.length, state.record.from_draft)
        tokens, first, length, drafted, finish, passes = jax.device_get(
            (*seen, state.finish[0], state.stats.rounds[0])
        )
        new = tokens[0, first[0] : length[0] + 1]
        whole = engine.decode_text(new)
        # A piece that ends inside a multi-byte character waits for its rest.
        waits = whole.endswith("\ufffd") or not whole.startswith(text)
        if finish == RUNNING and (waits or len(new) == shown):
            continue
        yield (
            Piece(
                whole[len(text) :] if whole.startswith(text) else "",
                tuple(new[shown:].tolist()),
                tuple(drafted[0, shown : len(new)].tolist()),
                FINISH[int(finish)],
                int(passes),
            ),
            state,
        )
        shown, text = len(new), whole


class Conversation:
    """Turns of a chat with the tokenizer's chat template; the cache stays from turn to turn.

    Only what the cache does not hold yet is prefilled. ``messages`` is the conversation so far.
    """

    def __init__(
        self,
        engine: Engine,
        context: int = 0,
        max_new_tokens: int = 256,
        system: str | None = None,
        rounds: int = 4,
        seed: int = 0,
        **fields: Any,
    ):
        """A conversation without a turn.

        Args:
          engine: of the model that answers.
          context: cache slots, the tokens of all turns; the target's positions by default.
          max_new_tokens: of one answer.
          system: first message.
          rounds: of one chunk.
          seed: of the first answer; every answer has keys of its own.
          **fields: of ``Options``.

        Raises:
          InputError: bad options, or a tokenizer without a chat template.
        """
        if not engine.tokenizer.chat_template:
            name = engine.tokenizer.name_or_path or "the target"
            raise InputError(
                f"chat template: expected one in the tokenizer of {name}, found none "
                "(infer.chat takes a file: --template)"
            )
        try:
            trial = [{"role": "user", "content": "x"}]
            engine.tokenizer.apply_chat_template(trial, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise InputError(f"chat template: expected a Jinja template, found {error}") from error
        positions = engine.tokenizer.model_max_length
        if not 2 <= (context or positions) <= positions:
            raise InputError(
                f"context: expected 2 to the target's {positions} positions, found {context}"
            )
        self.engine, self.rounds = engine, rounds
        self.context = context or positions
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._rows = options.per_row(1, {"max_new_tokens": max_new_tokens, **fields})
        self._key = jax.random.key(seed)
        self._loop = engine.loop(max_new_tokens, slots=self._slots())
        self._state: DecodeState | None = None
        self._turns = 0
        # Weak, so that an answer that is dropped ends at once.
        self._answering: weakref.ref[Generator[Piece, None, None]] | None = None

    def send(self, text: str) -> Iterator[Piece]:
        """Pieces of the answer to a message of the user.

        An answer that is not read to its end, or is still open at the next message, is kept up to
        the last piece that was read; a message of whose answer nothing is read is forgotten.

        Raises:
          InputError: the conversation does not fit its context any more; nothing is added to it.
        """
        still_open = self._answering and self._answering()
        if still_open:
            still_open.close()
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self.engine.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        room = self.context - self.engine.drafter.max_depth - 1
        if len(tokens) > room:
            raise InputError(
                f"conversation: expected at most {room} tokens in a context of {self.context}, "
                f"found {len(tokens)}"
            )
        keys = loop_of.row_keys(jax.random.fold_in(self._key, self._turns), 1)
        self._turns += 1
        request = self.engine.request(self._rows, keys)
        answer = self._answer(messages, tokens, request)
        self._answering = weakref.ref(answer)
        return answer

    def _slots(self) -> int:
        return self.context + self.engine.drafter.max_depth + 1

    def _begin(self, tokens: Sequence[int], request: Request) -> DecodeState:
        engine, known = self.engine, self._shared(tokens)
        width = min(xla.bucket(len(tokens) - known), self._slots() - known)
        new = np.zeros((1, width), np.int32)
        new[0, : len(tokens) - known] = tokens[known:]
        counts = np.asarray([len(tokens) - known], np.int32)
        if self._state is None or not known:
            return engine.run(loop_of.start, self._loop, new, counts, request)
        keep = np.asarray([known], np.int32)
        return engine.run(
            loop_of.extend, self._loop, self._state, keep, new, counts, request, donated=True
        )

    def _shared(self, tokens: Sequence[int]) -> int:
        """How many tokens ``decode.extend`` may keep; at least two are left for it."""
        if self._state is None:
            return 0
        cached, length = jax.device_get((self._state.tokens, self._state.length))
        old = cached[0, : min(int(length[0]) + 1, len(tokens) - 1)]
        same = old == np.asarray(tokens[: len(old)])
        return max(0, (len(old) if same.all() else int(np.argmin(same))) - 1)

    def _answer(
        self, messages: list[dict], tokens: Sequence[int], request: Request
    ) -> Generator[Piece, None, None]:
        parts: list[str] = []
        self.messages = messages
        try:
            state = self._begin(tokens, request)
            self._state = None  # a chunk consumes the state that it starts from
            for piece, after in chunks(self.engine, self._loop, state, request, self.rounds):
                parts.append(piece.text)
                self._state = after
                yield piece
                if piece.finish == FINISH[RUNNING]:
                    self._state = None
        finally:
            self.messages.append({"role": "assistant", "content": "".join(parts)})
