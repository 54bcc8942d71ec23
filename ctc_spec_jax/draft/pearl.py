"""A small language model that drafts ahead of the target's verdict: PEARL.

Liu et al. 2024, arXiv 2408.11850 (ICLR 2025). The schedule, what the release does otherwise and why
are in ``overlap``; here is the model's side of it: a round writes the root and the pending drafts
into the model's cache, which the verdict confirms or the next round overwrites, and drafts g tokens
in g passes. The release keeps the keys of its drafts and cuts the cache back; here no pass after
the first writes, so that a loop need not copy the cache.

Shape letters: B batch, M = g drafts of a round, T prompt tokens, K drafts so far, V vocabulary,
S cache slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax import overlap
from ctc_spec_jax.draft.small_lm import Best, Draw, Drawn, OfLanguageModel, proposal_law
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import kv_cache
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM, output_logits
from ctc_spec_jax.overlap import Chain, Overlapped, Seen
from ctc_spec_jax.types import (
    Acceptance,
    DraftContext,
    DraftTree,
    Params,
    Request,
    TargetOutput,
)
from ctc_spec_jax.verify import first_argmax


@dataclasses.dataclass(frozen=True)
class AheadLM(OfLanguageModel):
    """The ``overlap.AheadDrafter``: chains of ``max_depth`` tokens of a small language model."""

    lm: DecoderLM
    max_depth: int
    draw: Draw = dataclasses.field(default_factory=Best)
    # Only the width of the prompt is read off it, so the compiler leaves the layer's output out.
    taps: tuple[int, ...] = (0,)

    run_round = staticmethod(overlap.run_round)

    def __post_init__(self):
        """Refuse drafts that leave nothing to overlap.

        Raises:
          InputError: fewer than two tokens.
        """
        if self.max_depth < 2:
            raise InputError(
                "tree nodes: expected at least 3, a root and two drafts, for a drafter that works "
                f"ahead, found {self.max_depth + 1}"
            )

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return self.max_depth + 1

    @property
    def states_law(self) -> bool:
        """Whether chains hold the laws that they were drawn from."""
        return self.draw.states_law

    def prefill(self, params: Params, tokens, lengths, num_slots: int):
        """See ``overlap.AheadDrafter``."""
        return self.lm.prefill(params, tokens, lengths, num_slots)[0]

    def init(self, params: Params, context: DraftContext, taps) -> Overlapped:
        """Pass over the prompt; see ``types.Drafter``."""
        tokens, slots = context.tokens[:, : taps[0].shape[1]], context.tokens.shape[1]
        cache = self.prefill(params, tokens, context.length, slots)
        return Overlapped(cache, self._nothing_pending(tokens.shape[0]))

    def propose(self, params: Params, state: Overlapped, context: DraftContext, keys) -> DraftTree:
        """What the next round verifies: the pending drafts and one token after them."""
        seen = Seen(context.pending, context.length, state.pending, keys)
        drafts, _ = self.ahead(params, state.cache, seen, context.request)
        return overlap.chain_to_verify(context.pending, state.pending, drafts)

    def commit(
        self,
        params: Params,
        state: Overlapped,
        context: DraftContext,
        output: TargetOutput,
        acceptance: Acceptance,
    ) -> Overlapped:
        """Read a text that did not come out of rounds, as in ``decode.extend``."""
        del output
        index = jnp.arange(acceptance.path.shape[1], dtype=jnp.int32)
        tokens = jnp.take_along_axis(context.tokens, context.length[:, None] + index[None], axis=1)
        hidden, kv = self._run(params, state.cache, context.length, tokens)
        cache = _write(state.cache, kv, context.length, first_argmax(hidden[:, -1]))
        return Overlapped(cache, self._nothing_pending(tokens.shape[0]))

    def ahead(self, params: Params, cache, seen: Seen, request: Request) -> tuple[Chain, Any]:
        """One pass over root and pending drafts, then one per further token; see ``overlap``."""
        batch, most, pending = seen.root.shape[0], self.max_depth, seen.pending
        tokens = overlap.in_a_row(seen.root, pending)
        hidden, kv = self._run(params, cache, seen.length, tokens)
        newest = jnp.take_along_axis(hidden, pending.count[:, None, None], axis=1)
        logits = output_logits(params, newest)  # [B, 1, V]
        cache = _write(cache, kv, seen.length, first_argmax(logits[:, 0]))
        laws = jnp.zeros((batch, most, logits.shape[-1]), jnp.float32) if self.states_law else None
        drafts = Chain(jnp.zeros((batch, most), jnp.int32), jnp.zeros((batch,), jnp.int32), laws)
        drafts = self._longer(drafts, jnp.int32(0), logits, request, seen.keys)

        def step(index, drafts: Chain) -> Chain:
            index = jnp.asarray(index, jnp.int32)  # a number where jit is disabled
            past = seen.length + 1 + pending.count
            hidden, _ = self._run(params, cache, past, drafts.tokens[:, :-1])
            newest = jax.lax.dynamic_slice_in_dim(hidden, index - 1, 1, axis=1)
            return self._longer(drafts, index, output_logits(params, newest), request, seen.keys)

        return jax.lax.fori_loop(jnp.int32(1), jnp.int32(most), step, drafts), cache

    def _longer(self, drafts: Chain, index, logits, request: Request, keys) -> Chain:
        """One token more, the one in place ``index`` int32 []; ``logits`` [B, 1, V]."""
        law = proposal_law(logits, request)
        tokens, real = self.draw(keys, law, index[None], 1)
        goes_on = real[:, 0, 0] & (drafts.count == index)
        laws = drafts.laws
        if laws is not None:
            laws = jax.lax.dynamic_update_slice_in_dim(laws, law.logits, index, axis=1)
        return Chain(
            jax.lax.dynamic_update_slice_in_dim(drafts.tokens, tokens[:, 0], index, axis=1),
            drafts.count + goes_on.astype(jnp.int32),
            laws,
        )

    def _run(self, params: Params, cache, length, tokens) -> tuple[Any, Any]:
        """Hidden states of a chain of new rows [B, K] behind ``length`` cached ones, and its kv."""
        positions, mask = overlap.causal(length, tokens.shape[1])
        apply: Any = self.lm.module.apply
        hidden, _, kv = apply({"params": params}, tokens, positions, mask, cache, length, ())
        return hidden, kv

    def _nothing_pending(self, batch: int) -> Chain:
        laws_of = self.lm.vocab_size if self.states_law else 0
        return overlap.nothing_pending(batch, self.max_depth, laws_of)


def _write(cache, kv, length, index):
    """All rows of ``kv`` into the cache from ``length`` on, once ``index`` int32 [B] is known."""
    # Never negative, but XLA cannot know: so writes wait for all reads of the cache.
    start = length + (index < 0).astype(jnp.int32)
    count = kv_cache.num_slots(kv)
    rows = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], (length.shape[0], count))
    return kv_cache.commit(cache, kv, rows, start)


_TREES = {"greedy": Best(), "sampled": Drawn()}


def pearl_drafter(network: DecoderConfig, nodes: int, depth: int, tree: str) -> AheadLM:
    """Drafts of ``nodes`` - 1 tokens, or ``depth`` if that is less; greedy or drawn.

    Raises:
      InputError: another tree, or drafts of fewer than two tokens.
    """
    tree = tree or "greedy"
    if tree not in _TREES:
        raise InputError(f"tree: expected one of {', '.join(_TREES)}, found {tree!r}")
    return AheadLM(DecoderLM(network), min(depth, nodes - 1), _TREES[tree])
