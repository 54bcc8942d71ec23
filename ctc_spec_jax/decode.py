"""The loop: prefill, then ``lax.while_loop(draft -> verify -> accept)``; one XLA program.

Plain decoding is the same loop with a drafter that proposes nothing. The prompt's last token is
the first pending token, so every emitted token comes out of a round and a round is exactly one
target pass.

Shape letters: B batch, N tree nodes, M max depth, T prompt tokens, S cache slots, X stop tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax import accept
from ctc_spec_jax.tree import topology
from ctc_spec_jax.types import (
    OUT_OF_BUDGET,
    RUNNING,
    DecodeState,
    DraftContext,
    Drafter,
    GenerateOutput,
    Params,
    Stats,
    Target,
    Verifier,
)


@dataclasses.dataclass(frozen=True)
class Loop:
    """The static parts of a decode; hashable by value. ``capacity`` bounds ``max_new_tokens``."""

    target: Target
    drafter: Drafter
    verifier: Verifier
    capacity: int
    pad_id: int = 0

    def num_slots(self, prompt_width: int) -> int:
        """Cache slots S: prompt, new tokens and one round's overhang of M+1 rows."""
        return prompt_width + self.capacity + self.drafter.max_depth + 1


def decode(
    loop: Loop,
    params: Params,
    draft_params: Params,
    prompt_tokens,
    prompt_lengths,
    key,
    max_new_tokens,
    stops,
) -> GenerateOutput:
    """Decode a batch of prompts to their ends; ``jit`` it with ``loop`` static.

    Args:
      loop: static parts.
      params: of the target.
      draft_params: of the drafter.
      prompt_tokens: int32 [B, T], right-padded.
      prompt_lengths: int32 [B], at least 1.
      key: typed PRNG key, consumed.
      max_new_tokens: int32 [B], at most ``loop.capacity``.
      stops: int32 [B, X], stop token ids padded with ``NO_TOKEN``.
    """
    state = start(
        loop, params, draft_params, prompt_tokens, prompt_lengths, key, max_new_tokens, stops
    )
    state = advance(loop, params, draft_params, state, loop.capacity)
    return output(loop, state, prompt_lengths)


def start(
    loop: Loop,
    params: Params,
    draft_params: Params,
    prompt_tokens,
    prompt_lengths,
    key,
    max_new_tokens,
    stops,
) -> DecodeState:
    """State after the prefill; arguments as in ``decode``."""
    batch, width = prompt_tokens.shape
    slots = loop.num_slots(width)
    length = prompt_lengths - 1
    with jax.named_scope("prefill"):
        cache, taps = loop.target.prefill(params, prompt_tokens, length, slots, loop.drafter.taps)
    tokens = jnp.pad(prompt_tokens, ((0, 0), (0, slots + 1 - width)))
    context = DraftContext(params, tokens, length, cache)
    finish = jnp.where(max_new_tokens > 0, RUNNING, OUT_OF_BUDGET).astype(jnp.int32)
    return DecodeState(
        tokens=tokens,
        length=length,
        limit=prompt_lengths + jnp.minimum(max_new_tokens, loop.capacity),
        stops=stops,
        cache=cache,
        drafter=loop.drafter.init(draft_params, context, taps),
        key=key,
        finish=finish,
        stats=Stats(jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, loop.capacity), jnp.int32)),
    )


def advance(
    loop: Loop, params: Params, draft_params: Params, state: DecodeState, max_rounds
) -> DecodeState:
    """Run rounds until every row has finished or ``max_rounds`` (int or int32 []) have run.

    Donate ``state`` to update the caches in place.
    """

    def unfinished(carry: tuple[jax.Array, DecodeState]):
        rounds, state = carry
        return (rounds < max_rounds) & jnp.any(state.finish == RUNNING)

    def step(carry: tuple[jax.Array, DecodeState]):
        rounds, state = carry
        return rounds + 1, run_round(loop, params, draft_params, state)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def run_round(loop: Loop, params: Params, draft_params: Params, state: DecodeState) -> DecodeState:
    """One round: draft -> verify -> accept."""
    target, drafter = loop.target, loop.drafter
    key, draft_key, verify_key = jax.random.split(state.key, 3)
    context = DraftContext(params, state.tokens, state.length, state.cache)

    with jax.named_scope("draft"):
        tree = drafter.propose(draft_params, state.drafter, context, draft_key)
    with jax.named_scope("verify"):
        depth, mask = topology.shape_of(tree, drafter.max_depth)
        positions = state.length[:, None] + depth
        result = target.forward_tree(
            params, state.cache, state.length, tree.tokens, positions, mask, drafter.taps
        )
        acceptance = loop.verifier(verify_key, tree, depth, mask, result.logits, drafter.max_depth)
    with jax.named_scope("accept"):
        # No token is negative, so this is the length; but XLA cannot know, and so every write to
        # the cache waits for the logits, hence for all reads of the cache. Where a write could
        # come first (a tree of one node), XLA would copy the cache. Barriers are gone by then.
        slot = state.length + (acceptance.next_token < 0).astype(jnp.int32)
        new = accept.emitted_tokens(tree, acceptance)
        acceptance, finish = accept.cut(new, acceptance, state)
        return dataclasses.replace(
            state,
            tokens=accept.write_tokens(state.tokens, new, state.length),
            length=state.length + acceptance.length,
            cache=target.commit(state.cache, result.kv, acceptance.path, slot),
            drafter=drafter.commit(draft_params, state.drafter, context, result, acceptance),
            key=key,
            finish=finish,
            stats=accept.count_round(state.stats, acceptance.length),
        )


def output(loop: Loop, state: DecodeState, prompt_lengths) -> GenerateOutput:
    """The new tokens of every row, cut out of the state and padded."""
    lengths = state.length + 1 - prompt_lengths
    index = jnp.arange(loop.capacity, dtype=jnp.int32)[None]
    tokens = jnp.take_along_axis(state.tokens, prompt_lengths[:, None] + index, axis=1)
    tokens = jnp.where(index < lengths[:, None], tokens, loop.pad_id)
    return GenerateOutput(tokens, lengths, state.finish, state.stats)


@dataclasses.dataclass(frozen=True)
class NoDraft:
    """The drafter of plain decoding: a tree that is its root."""

    max_depth: int = 0
    num_nodes: int = 1
    taps: tuple[int, ...] = ()

    def init(self, params: Params, context: DraftContext, taps) -> Any:
        """No state."""
        del params, context, taps
        return ()

    def propose(self, params: Params, state: Any, context: DraftContext, key):
        """The pending token alone."""
        del params, state, key
        return topology.root_only(context.pending)

    def commit(self, params: Params, state: Any, context, output, acceptance) -> Any:
        """No state."""
        del params, context, output, acceptance
        return state
