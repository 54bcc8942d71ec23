"""The host side for notebooks and programs: load, tokenise, bucket, jit once, stream, detokenise.

Shape letters: B batch, T prompt tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax import demo, recipes, xla
from ctc_spec_jax.decode import Loop, NoDraft, advance, decode, start
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.types import NO_TOKEN, Drafter, GenerateOutput, Params
from ctc_spec_jax.verify import Greedy

_BUCKET = 32
"""Prompts are padded to a multiple of this, so that one program serves many lengths."""

FINISH = ("running", "stop", "length")
"""Names of the finish reasons, by their number."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """One decoded answer. ``emitted[r]`` is the number of tokens kept from round r."""

    text: str
    tokens: list[int]
    finish: str
    rounds: int
    emitted: list[int]
    seconds: float

    @property
    def accepted_length(self) -> float:
        """Tokens per target pass, the target's own (bonus) token included."""
        return len(self.tokens) / max(self.rounds, 1)


@dataclasses.dataclass(frozen=True)
class Engine:
    """A target, its tokenizer and a drafter, ready to decode.

    ``drafter`` is ``NoDraft()`` for plain decoding; ``with_drafter`` and ``plain`` make siblings
    that share the parameters.
    """

    lm: DecoderLM
    params: Params
    tokenizer: Any
    drafter: Drafter = dataclasses.field(default_factory=NoDraft)
    draft_params: Params = ()

    @classmethod
    def from_pretrained(
        cls,
        target: str | None = None,
        drafter: str | None = None,
        tree_nodes: int = demo.TREE_NODES,
        dtype=jnp.float32,
        revision: str | None = None,
    ) -> Engine:
        """Load a target (Hugging Face folder or hub id) and a drafter folder.

        Without arguments the embedded demo pair is loaded; a target without a drafter decodes
        plainly.

        Raises:
          InputError: missing, broken or mismatched files.
        """
        if target is None:
            target, drafter = str(demo.target_folder()), drafter or str(demo.drafter_folder())
        lm, params, tokenizer = recipes.load_target(target, dtype, revision)
        engine = cls(lm, params, tokenizer)
        return engine if drafter is None else engine.with_drafter(drafter, tree_nodes, dtype)

    def with_drafter(
        self, folder: str, tree_nodes: int, dtype=jnp.float32, tree: str = "prefix"
    ) -> Engine:
        """The same target with a drafter of a folder; see ``recipes.load_drafter`` for ``tree``."""
        drafter, params = recipes.load_drafter(
            folder, self.lm, self.tokenizer, tree_nodes, dtype, tree
        )
        return dataclasses.replace(self, drafter=drafter, draft_params=params)

    def plain(self) -> Engine:
        """The same target decoding plainly."""
        return dataclasses.replace(self, drafter=NoDraft(), draft_params=())

    def decode_function(self, max_new_tokens: int) -> Callable[..., GenerateOutput]:
        """The whole decode as one jitted function.

        Returns:
          ``decode(params, draft_params, prompt_tokens, prompt_lengths, key) -> GenerateOutput``
          with prompt_tokens int32 [B, T] right-padded and prompt_lengths int32 [B]. Rows end at
          the tokenizer's end-of-text token or after ``max_new_tokens``.
        """
        loop, end = self._loop(max_new_tokens), self._stops()

        def function(params, draft_params, prompt_tokens, prompt_lengths, key):
            batch = prompt_tokens.shape[0]
            budget = jnp.full((batch,), max_new_tokens, jnp.int32)
            stops = jnp.tile(jnp.asarray(end, jnp.int32)[None], (batch, 1))
            return _jitted(decode)(
                loop, params, draft_params, prompt_tokens, prompt_lengths, key, budget, stops
            )

        return function

    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], max_new_tokens: int, seed: int = 0
    ) -> list[Generation]:
        """Answers of a batch of prompts, texts or token ids; waits for the device.

        ``seconds`` of each answer is the time of the whole batch, compilation included where it
        happens.
        """
        tokens, lengths = self.encode(prompts, max_new_tokens)
        began = time.perf_counter()
        result = self.decode_function(max_new_tokens)(
            self.params, self.draft_params, tokens, lengths, jax.random.key(seed)
        )
        result = jax.device_get(result)
        seconds = time.perf_counter() - began
        return [self._generation(result, row, seconds) for row in range(len(prompts))]

    def stream(
        self, prompt: str | Sequence[int], max_new_tokens: int, rounds: int = 4, seed: int = 0
    ) -> Iterator[str]:
        """Pieces of one answer's text, one after every ``rounds`` rounds.

        The state stays on the device and is donated from chunk to chunk.
        """
        tokens, lengths = self.encode([prompt], max_new_tokens)
        loop = self._loop(max_new_tokens)
        budget = np.full((1,), max_new_tokens, np.int32)
        stops = np.asarray([self._stops()], np.int32)
        state = _jitted(start)(
            loop,
            self.params,
            self.draft_params,
            tokens,
            lengths,
            jax.random.key(seed),
            budget,
            stops,
        )
        first, shown, running = int(lengths[0]), "", True
        while running:
            state = _jitted(advance, 3)(
                loop, self.params, self.draft_params, state, np.int32(rounds)
            )
            running = int(state.finish[0]) == 0
            new = np.asarray(state.tokens)[0, first : int(state.length[0]) + 1]
            text = self.decode_text(new)
            # A piece that ends inside a multi-byte character waits for its rest.
            if text.startswith(shown) and (not running or not text.endswith("\ufffd")):
                yield text[len(shown) :]
                shown = text

    def encode(self, prompts, max_new_tokens: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded token ids int32 [B, T], T a multiple of the bucket, and lengths [B].

        Raises:
          InputError: no prompt, or one without a token, with a token that the target does not
            have, or that leaves no room for ``max_new_tokens`` among the target's positions.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
        if not prompts:
            raise InputError("prompts: expected at least one, found none")
        rows = [
            # Not verbose: a prompt that is too long is reported once, below.
            self.tokenizer(prompt, verbose=False)["input_ids"]
            if isinstance(prompt, str)
            else list(prompt)
            for prompt in prompts
        ]
        for index, row in enumerate(rows):
            self._check_prompt(index, row, max_new_tokens)
        width = -(-max(len(row) for row in rows) // _BUCKET) * _BUCKET
        tokens = np.zeros((len(rows), width), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        return tokens, np.asarray([len(row) for row in rows], np.int32)

    def decode_text(self, tokens) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def _generation(self, result: GenerateOutput, row: int, seconds: float) -> Generation:
        tokens = np.asarray(result.tokens)[row, : int(result.lengths[row])].tolist()
        rounds = int(result.stats.rounds[row])
        emitted = np.asarray(result.stats.emitted)[row, :rounds].tolist()
        finish = FINISH[int(result.finish[row])]
        return Generation(self.decode_text(tokens), tokens, finish, rounds, emitted, seconds)

    def _loop(self, max_new_tokens: int) -> Loop:
        return Loop(self.lm, self.drafter, Greedy(), max_new_tokens, self._pad())

    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def _stops(self) -> tuple[int, ...]:
        end = self.tokenizer.eos_token_id
        return (NO_TOKEN if end is None else end,)

    def _check_prompt(self, index: int, row: list[int], max_new_tokens: int) -> None:
        vocab, positions = self.lm.config.vocab_size, self.tokenizer.model_max_length
        if not row:
            raise InputError(f"prompt {index}: expected at least one token, found none")
        if not 0 <= min(row) <= max(row) < vocab:
            raise InputError(
                f"prompt {index}: expected token ids below the target's vocabulary of {vocab}, "
                f"found {min(row) if min(row) < 0 else max(row)}"
            )
        if len(row) + max_new_tokens > positions:
            raise InputError(
                f"prompt {index}: expected at most {max(0, positions - max_new_tokens)} tokens, so "
                f"that {max_new_tokens} new ones fit the target's {positions} positions, found "
                f"{len(row)}"
            )


@functools.cache
def _jitted(function: Callable, *donated: int):
    """The jitted function with the device's compiler options; the loop (argument 0) is static."""
    return jax.jit(
        function,
        static_argnums=0,
        donate_argnums=donated,
        compiler_options=xla.decode_options(),
    )
