"""The host side for notebooks and programs: load, tokenise, bucket, jit once, detokenise.

Shape letters: B batch, T prompt tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ctc_spec_jax import decode as loop_of
from ctc_spec_jax import demo, folders, memory, options, recipes, sharding, stops, streaming, xla
from ctc_spec_jax.decode import Loop, NoDraft
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.generation import Generation, generation_of
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.options import Options
from ctc_spec_jax.types import Drafter, GenerateOutput, Params, Request, Verifier
from ctc_spec_jax.verify import TargetSample

Prompts = Sequence[str | Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Engine:
    """A target, its tokenizer and a drafter, ready to decode.

    ``drafter`` is ``NoDraft()`` for plain decoding; ``with_drafter`` and ``plain`` make siblings
    that share the parameters. ``verifier`` is the rule that keeps or refuses drafts; those methods
    set the best that is exact for the drafter, see ``recipes.verifier``. ``stop_ids`` end a
    row: those of ``generation_config.json``, or the tokenizer's end-of-text token. On a ``mesh``
    of ``sharding.make_mesh`` the rows of a batch are spread over ``data`` and ``fsdp`` where they
    divide, and the parameters must lie there already.
    """

    lm: DecoderLM
    params: Params
    tokenizer: Any
    drafter: Drafter = dataclasses.field(default_factory=NoDraft)
    draft_params: Params = ()
    verifier: Verifier = dataclasses.field(default_factory=TargetSample)
    stop_ids: tuple[int, ...] = ()
    mesh: Mesh | None = None

    @classmethod
    def from_pretrained(
        cls,
        target: str | None = None,
        drafter: str | None = None,
        tree_nodes: int = demo.TREE_NODES,
        dtype=jnp.float32,
        revision: str | None = None,
        mesh: Mesh | None = None,
        int8: bool = False,
    ) -> Engine:
        """Load a target (Hugging Face folder or hub id) and a drafter folder.

        Without arguments the embedded demo pair is loaded; a target without a drafter decodes
        plainly. On a ``mesh`` every tensor goes from the file to its places, so that neither the
        host nor a device ever holds the whole model. ``int8`` stores the target's matrices in
        eight bits: a step reads half of bfloat16's bytes, and the answers are those of the rounded
        model, see ``models.int8``. A drafter stays in ``dtype``.

        Raises:
          InputError: missing, broken or mismatched files.
        """
        if target is None:
            target, drafter = str(demo.target_folder()), drafter or str(demo.drafter_folder())
        lm, params, tokenizer = folders.load_target(target, dtype, revision, mesh, int8)
        ends = folders.stop_ids(target, tokenizer, revision)
        engine = cls(lm, params, tokenizer, stop_ids=ends, mesh=mesh)
        return engine if drafter is None else engine.with_drafter(drafter, tree_nodes, dtype)

    def with_drafter(
        self, folder: str, tree_nodes: int, dtype=jnp.float32, tree: str = "", method: str = ""
    ) -> Engine:
        """The same target with a drafter of a folder; see ``folders.load_drafter``."""
        drafter, params = folders.load_drafter(
            folder, self.lm, self.tokenizer, tree_nodes, dtype, tree, self.mesh, method
        )
        return self._drafting(drafter, params)

    def with_method(self, name: str, tree_nodes: int, depth: int, tree: str = "") -> Engine:
        """The same target with a method of ``recipes`` that has no parameters, by its name."""
        recipe = recipes.find(name)
        if tree_nodes < 2:
            raise InputError(f"tree nodes: expected at least 2, found {tree_nodes}")
        drafter = recipe.drafter(recipe.network(self.lm.config, Shape()), tree_nodes, depth, tree)
        params = jax.eval_shape(drafter.init_params, jax.random.key(0))
        if params:
            raise InputError(
                f"method: expected one without parameters, found {name!r}, which needs the folder "
                "of a drafter"
            )
        return self._drafting(drafter, params)

    def with_verifier(self, name: str) -> Engine:
        """The same engine with a rule of ``recipes.VERIFIERS``; empty: the drafter's own."""
        return dataclasses.replace(self, verifier=recipes.verifier(name, self.drafter))

    def _drafting(self, drafter: Drafter, params: Params) -> Engine:
        rule = recipes.verifier("", drafter)
        return dataclasses.replace(self, drafter=drafter, draft_params=params, verifier=rule)

    def plain(self) -> Engine:
        """The same target decoding plainly."""
        return self._drafting(NoDraft(), ())

    def decode_function(
        self, max_new_tokens: int, logprobs: int | None = None, **fields: Any
    ) -> Callable[..., GenerateOutput]:
        """The whole decode as one jitted function.

        Args:
          max_new_tokens: T of the output.
          logprobs: as in ``generate``.
          **fields: of ``Options``.

        Returns:
          ``decode(params, draft_params, prompt_tokens, prompt_lengths, key) -> GenerateOutput``
          with prompt_tokens int32 [B, T] right-padded, prompt_lengths int32 [B], and a typed key
          or one per row.
        """
        loop = self.loop(max_new_tokens, logprobs)

        def function(params, draft_params, prompt_tokens, prompt_lengths, key):
            batch = prompt_tokens.shape[0]
            rows = options.per_row(batch, {"max_new_tokens": max_new_tokens, **fields})
            request = self.request(rows, loop_of.row_keys(key, batch))
            own = dataclasses.replace(self, params=params, draft_params=draft_params)
            return own.run(loop_of.decode, loop, prompt_tokens, prompt_lengths, request)

        return function

    def run(self, function: Callable, loop: Loop, *arguments: Any, donated: bool = False) -> Any:
        """A function of ``decode`` on this engine's parameters, jitted once, on its mesh.

        ``arguments`` follow the parameters; the first of them is a state where it is ``donated``.
        """
        compiled = xla.jitted(function, *((3,) if donated else ()))
        if self.mesh is None:
            return compiled(loop, self.params, self.draft_params, *arguments)
        places = tuple(sharding.inputs(self.mesh, argument) for argument in arguments)
        with jax.set_mesh(self.mesh):
            arguments = jax.device_put(arguments, places)
            return compiled(loop, self.params, self.draft_params, *arguments)

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int | Sequence[int] = 128,
        seed: int | Sequence[int] = 0,
        logprobs: int | None = None,
        **fields: Any,
    ) -> list[Generation]:
        """Answers of a batch of prompts, texts or token ids; waits for the device.

        Args:
          prompts: of any lengths.
          max_new_tokens: of all rows, or one per row.
          seed: of the batch, or one per row. A row's answer depends on its own prompt, options and
            seed alone; row 0 of a batch with seed s is the answer to its prompt with seed s.
          logprobs: None for none, 0 for those of the answer's tokens, n for the n best too.
          **fields: of ``Options``: one value, or a sequence of one per row.

        Returns:
          One answer per prompt. ``seconds`` is the time of the whole batch, compilation included
          where it happens.

        Raises:
          InputError: bad prompts or options, or a batch that does not fit the memory.
        """
        rows = options.per_row(len(prompts), {"max_new_tokens": max_new_tokens, **fields})
        tokens, lengths = self.encode(prompts, [row.max_new_tokens for row in rows])
        loop = self.loop(xla.bucket(max(row.max_new_tokens for row in rows)), logprobs)
        request = self.request(rows, seed_keys(seed, len(rows)))
        self._check_memory(loop, tokens, lengths, request)
        began = time.perf_counter()
        result = jax.device_get(self.run(loop_of.decode, loop, tokens, lengths, request))
        seconds = time.perf_counter() - began
        return [
            generation_of(result, index, self.decode_text, row.stop_strings or (), seconds)
            for index, row in enumerate(rows)
        ]

    def compile_ahead(
        self,
        prompt_length: int,
        max_new_tokens: int = 128,
        batch: int = 1,
        logprobs: int | None = None,
        **fields: Any,
    ) -> None:
        """Compile what ``generate`` will need, so that its first call starts at once.

        Args:
          prompt_length: longest prompt; shorter ones of the same bucket need no other program.
          max_new_tokens: likewise.
          batch: B.
          logprobs: as in ``generate``.
          **fields: of ``Options``. Which options are used at all decides the program, not their
            values; stop strings and phrases also by their number.
        """
        rows = options.per_row(batch, {"max_new_tokens": max_new_tokens, **fields})
        loop = self.loop(xla.bucket(max_new_tokens), logprobs)
        request = self.request(rows, seed_keys(0, batch))
        tokens = np.zeros((batch, xla.bucket(prompt_length)), np.int32)
        lengths = np.full((batch,), prompt_length, np.int32)
        self._check_memory(loop, tokens, lengths, request)
        # A row without a budget is finished before its first round.
        request = dataclasses.replace(request, max_new_tokens=np.zeros((batch,), np.int32))
        jax.block_until_ready(self.run(loop_of.decode, loop, tokens, lengths, request))

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        rounds: int = 4,
        seed: int = 0,
        **fields: Any,
    ) -> Iterator[streaming.Piece]:
        """Pieces of one answer, one after every ``rounds`` rounds; ``str(piece)`` is its text.

        The state stays on the device and is donated from chunk to chunk; the text is that of
        ``generate`` with the same seed.

        Raises:
          InputError: as ``generate``.
        """
        rows = options.per_row(1, {"max_new_tokens": max_new_tokens, **fields})
        tokens, lengths = self.encode([prompt], [max_new_tokens])
        loop = self.loop(xla.bucket(max_new_tokens))
        request = self.request(rows, seed_keys(seed, 1))
        self._check_memory(loop, tokens, lengths, request)
        state = self.run(loop_of.start, loop, tokens, lengths, request)
        return streaming.pieces(self, loop, state, request, rounds)

    def encode(
        self, prompts: Prompts, max_new_tokens: int | Sequence[int] = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded token ids int32 [B, T], T the size of a bucket, and lengths [B].

        Raises:
          InputError: no prompt, or one without a token, with a token that the target does not
            have, or that leaves no room for ``max_new_tokens`` among the target's positions.
        """
        if isinstance(prompts, str):
            raise InputError("prompts: expected a list of prompts, found one text")
        if not len(prompts):
            raise InputError("prompts: expected at least one, found none")
        budgets = np.broadcast_to(np.asarray(max_new_tokens), (len(prompts),)).tolist()
        if min(budgets) < 1:
            raise InputError(f"max_new_tokens: expected at least 1, found {min(budgets)}")
        rows = [
            # Not verbose: a prompt that is too long is reported once, below.
            self.tokenizer(prompt, verbose=False)["input_ids"]
            if isinstance(prompt, str)
            else list(prompt)
            for prompt in prompts
        ]
        for index, (row, budget) in enumerate(zip(rows, budgets, strict=True)):
            self._check_prompt(index, row, budget)
        tokens = np.zeros((len(rows), xla.bucket(max(len(row) for row in rows))), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        return tokens, np.asarray([len(row) for row in rows], np.int32)

    def decode_text(self, tokens) -> str:
        """Text of token ids, special tokens left out."""
        # Stop strings and streams need a text that grows with its tokens: no clean-up of spaces.
        return self.tokenizer.decode(
            np.asarray(tokens).tolist(),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def phrase_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids of words as they stand at the start of a text and after a space."""
        spellings = [spelling for word in words for spelling in (word, " " + word)]
        return [self.tokenizer(s, add_special_tokens=False)["input_ids"] for s in spellings]

    def loop(self, capacity: int, logprobs: int | None = None, slots: int = 0) -> Loop:
        """The static parts of a decode; see ``decode.Loop``."""
        if logprobs is not None and not 0 <= logprobs <= self.lm.vocab_size:
            raise InputError(
                f"logprobs: expected 0 to {self.lm.vocab_size} or None, found {logprobs}"
            )
        pad = self.tokenizer.pad_token_id or 0
        return Loop(self.lm, self.drafter, self.verifier, capacity, pad, logprobs, slots)

    def request(self, rows: Sequence[Options], keys) -> Request:
        """Arrays of the options of every row."""
        return options.build_request(
            rows,
            keys,
            self.stop_ids,
            self.lm.vocab_size,
            lambda: stops.pieces_of(self.tokenizer, self.lm.vocab_size),
        )

    def _check_memory(self, loop: Loop, tokens, lengths, request: Request) -> None:
        params = (self.params, self.draft_params)
        needed = memory.decode_bytes(loop, *params, tokens, lengths, request, self.mesh)
        slots = loop.num_slots(tokens.shape[1])
        memory.check(needed, len(tokens), f"caches of {slots} slots each")

    def _check_prompt(self, index: int, row: list[int], max_new_tokens: int) -> None:
        vocab, positions = self.lm.vocab_size, self.tokenizer.model_max_length
        if not row:
            raise InputError(f"prompt {index}: expected at least one token, found none")
        if not 0 <= min(row) <= max(row) < vocab:
            raise InputError(
                f"prompt {index}: expected token ids below the target's vocabulary of {vocab}, "
                f"found {min(row) if min(row) < 0 else max(row)}"
            )
        room = positions - max_new_tokens
        if room < 1:
            raise InputError(f"max_new_tokens: expected below {positions}, found {max_new_tokens}")
        if len(row) > room:
            raise InputError(
                f"prompt {index}: expected at most {room} tokens, so that {max_new_tokens} new "
                f"ones fit the target's {positions} positions, found {len(row)}"
            )


def seed_keys(seed: int | Sequence[int], batch: int):
    """Typed keys [B]: the rows of one seed, or row 0 of every row's own seed."""
    for one in seed if isinstance(seed, Sequence | np.ndarray) else [seed]:
        if not isinstance(one, int | np.integer) or not -(2**63) <= one < 2**63:
            raise InputError(f"seed: expected whole numbers of 64 bits, found {one!r}")
    if isinstance(seed, int | np.integer):
        return loop_of.row_keys(jax.random.key(int(seed)), batch)
    if len(seed) != batch:
        raise InputError(f"seed: expected one for each of the {batch} prompts, found {len(seed)}")
    return jnp.stack([loop_of.row_keys(jax.random.key(int(s)), 1)[0] for s in seed])
