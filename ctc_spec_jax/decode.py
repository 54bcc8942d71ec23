"""The loop: prefill, then ``lax.while_loop(draft -> verify -> accept)``; one XLA program.

Plain decoding is the same loop with a drafter that proposes nothing. The prompt's last token is
the first pending token, so every emitted token comes out of a round and a round is exactly one
target pass.

Shape letters: B batch, N tree nodes, M max depth, T prompt tokens, S cache slots, X stop tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax import accept
from ctc_spec_jax import logits as processing
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.tree import topology
from ctc_spec_jax.types import (
    CACHE_FULL,
    OUT_OF_BUDGET,
    RUNNING,
    Acceptance,
    DecodeState,
    DraftContext,
    Drafter,
    GenerateOutput,
    Params,
    Record,
    Request,
    Target,
    Verifier,
)
from ctc_spec_jax.xla import aligned


@dataclasses.dataclass(frozen=True)
class Loop:
    """The static parts of a decode; hashable by value.

    ``capacity`` bounds ``max_new_tokens``. ``top_logprobs`` is None for no log-probabilities, 0
    for those of the emitted tokens, n for the n most probable tokens too. ``slots`` sets the size
    of the cache; by default it is what prompt and capacity need.
    """

    target: Target
    drafter: Drafter
    verifier: Verifier
    capacity: int
    pad_id: int = 0
    top_logprobs: int | None = None
    slots: int = 0

    def num_slots(self, prompt_width: int) -> int:
        """Cache slots S, at least: prompt, new tokens and one round's overhang of M+1 rows."""
        return self.slots or aligned(prompt_width + self.capacity + self.drafter.max_depth + 1)


Round = Callable[[Loop, Params, Params, DecodeState, Request], DecodeState]
"""One round: ``(loop, params, draft_params, state, request) -> state``."""


def decode(
    loop: Loop,
    params: Params,
    draft_params: Params,
    prompt_tokens,
    prompt_lengths,
    request: Request,
) -> GenerateOutput:
    """Decode a batch of prompts to their ends; ``jit`` it with ``loop`` static.

    A row's output depends on its own prompt, request and key, not on other rows.

    Args:
      loop: static parts.
      params: of the target.
      draft_params: of the drafter.
      prompt_tokens: int32 [B, T], right-padded.
      prompt_lengths: int32 [B], at least 1.
      request: what every row asks for.
    """
    state = start(loop, params, draft_params, prompt_tokens, prompt_lengths, request)
    state = advance(loop, params, draft_params, state, request, loop.capacity)
    return output(loop, state)


def start(
    loop: Loop,
    params: Params,
    draft_params: Params,
    prompt_tokens,
    prompt_lengths,
    request: Request,
) -> DecodeState:
    """State after the prefill; arguments as in ``decode``."""
    width = prompt_tokens.shape[1]
    slots = loop.num_slots(width)
    length = prompt_lengths - 1
    with jax.named_scope("prefill"):
        cache, taps = loop.target.prefill(params, prompt_tokens, length, slots, loop.drafter.taps)
    tokens = jnp.pad(prompt_tokens, ((0, 0), (0, slots + 1 - width)))
    context = DraftContext(params, tokens, length, cache, request)
    drafter = loop.drafter.init(draft_params, context, taps)
    return begin(loop, tokens, prompt_lengths, cache, drafter, request)


def extend(
    loop: Loop,
    params: Params,
    draft_params: Params,
    state: DecodeState,
    keep,
    new_tokens,
    counts,
    request: Request,
) -> DecodeState:
    """A new prompt that shares its first ``keep`` tokens, and the next, with what is in the cache.

    That next one a drafter may have read together with the last that is kept.
    The rest is a chain whose every node is accepted. Rolling back is not writing: what lies
    behind ``keep`` is overwritten.

    Args:
      loop: static parts.
      params: of the target.
      draft_params: of the drafter.
      state: of the decode before; donate it.
      keep: int32 [B], at most ``state.length``.
      new_tokens: int32 [B, T], right-padded; keep + T is at most S.
      counts: int32 [B], at least 2, so that the drafter sees a committed token.
      request: what every row asks for now.
    """
    batch, width = new_tokens.shape
    index = jnp.arange(width, dtype=jnp.int32)
    chain = jnp.broadcast_to((index[:, None] >= index[None])[None], (batch, width, width))
    path = jnp.broadcast_to(index[None], (batch, width))
    last = jnp.take_along_axis(new_tokens, counts[:, None] - 1, axis=1)[:, 0]
    tokens = accept.write_tokens(state.tokens, new_tokens, keep - 1)
    context = DraftContext(params, tokens, keep, state.cache, request)
    with jax.named_scope("prefill"):
        result = loop.target.forward_tree(
            params, state.cache, keep, new_tokens, keep[:, None] + path, chain, loop.drafter.taps
        )
        everything = Acceptance(path, counts - 1, last)
        drafter = loop.drafter.commit(draft_params, state.drafter, context, result, everything)
        cache = loop.target.commit(state.cache, result.kv, path, keep)
    return begin(loop, tokens, keep + counts, cache, drafter, request)


def begin(loop: Loop, tokens, prompt_lengths, cache, drafter: Any, request: Request) -> DecodeState:
    """State before the first round of prompts that are committed but for their last token."""
    batch, size = tokens.shape
    depth = loop.drafter.max_depth
    # A round writes M+1 cache rows from the pending token on.
    capacity = jnp.minimum(loop.capacity, size - 1 - depth - prompt_lengths)
    room = jnp.minimum(request.max_new_tokens, capacity)
    reason = jnp.where(request.max_new_tokens > capacity, CACHE_FULL, OUT_OF_BUDGET)
    strings = request.stop_strings
    return DecodeState(
        tokens=tokens,
        length=prompt_lengths - 1,
        prompt_length=prompt_lengths,
        limit=prompt_lengths + room,
        cache=cache,
        drafter=drafter,
        finish=jnp.where(room > 0, RUNNING, reason).astype(jnp.int32),
        stats=accept.no_rounds(batch, loop.capacity, depth),
        record=accept.blank_record(batch, loop.capacity + depth + 1, loop.top_logprobs),
        known=accept.known_prompt(request.sampling, tokens, prompt_lengths, loop.target.vocab_size),
        stop_state=None if strings is None else strings.start,
    )


def advance(
    loop: Loop,
    params: Params,
    draft_params: Params,
    state: DecodeState,
    request: Request,
    max_rounds,
) -> DecodeState:
    """Run rounds until every row has finished or ``max_rounds`` (int or int32 []) have run.

    Donate ``state`` to update the caches in place. How the rounds of a decode are shared out
    among calls changes nothing.
    """

    def unfinished(carry: tuple[jax.Array, DecodeState]):
        rounds, state = carry
        return (rounds < max_rounds) & jnp.any(state.finish == RUNNING)

    run = round_of(loop)

    def step(carry: tuple[jax.Array, DecodeState]):
        rounds, state = carry
        return rounds + 1, run(loop, params, draft_params, state, request)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def round_of(loop: Loop) -> Round:
    """What a round of the loop is: ``run_round``, or a function of that name of the drafter."""
    return getattr(loop.drafter, "run_round", run_round)


def run_round(
    loop: Loop, params: Params, draft_params: Params, state: DecodeState, request: Request
) -> DecodeState:
    """One round: draft -> verify -> accept."""
    target, drafter = loop.target, loop.drafter
    draft_keys, verify_keys = round_keys(request, state)
    context = DraftContext(params, state.tokens, state.length, state.cache, request)

    with jax.named_scope("draft"):
        tree = drafter.propose(draft_params, state.drafter, context, draft_keys)
    with jax.named_scope("verify"):
        lineage = topology.lineages(tree, drafter.max_depth)
        tree = topology.trim(tree, lineage, depth_of_use(state, request))
        depth, mask = topology.shape_of(tree, lineage)
        positions = state.length[:, None] + depth
        result = target.forward_tree(
            params, state.cache, state.length, tree.tokens, positions, mask, drafter.taps
        )
        before = processing.prefixes(state, request, tree, lineage)
        laws = processing.NodeLaws(result.logits, request, state.known, before)
        acceptance = loop.verifier(verify_keys, tree, depth, mask, laws, drafter.max_depth)
    with jax.named_scope("accept"):
        # No token is negative, so this is the length; but XLA cannot know, and so every write to
        # the cache waits for the logits, hence for all reads of the cache. Where a write could
        # come first (a tree of one node), XLA would copy the cache. Barriers are gone by then.
        slot = state.length + (acceptance.next_token < 0).astype(jnp.int32)
        own = acceptance.length - 1
        settled, acceptance = accept.settle(state, request, tree, depth, laws, acceptance, own)
        context = dataclasses.replace(context, tokens=settled.tokens, tree=tree)
        return dataclasses.replace(
            settled,
            cache=target.commit(state.cache, result.kv, acceptance.path, slot),
            drafter=drafter.commit(draft_params, state.drafter, context, result, acceptance),
        )


def row_keys(key, batch: int):
    """Typed keys [B] of the rows of a batch: ``key`` folded with the row's number.

    A ``key`` of shape [B] is taken as it is.

    Raises:
      InputError: a key of the old kind, or another number of keys.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (batch,)):
        raise InputError(
            f"key: expected one of jax.random.key, or {batch} of them, found {key.dtype} of shape "
            f"{key.shape}"
        )
    if key.ndim:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch, dtype=jnp.int32))


def round_keys(request: Request, state: DecodeState):
    """Keys [B] of this round for drafter and verifier.

    A row's keys depend on its own key and on how many rounds it has run, so neither other rows
    nor the chunks of a stream change them.
    """
    keys = jax.vmap(jax.random.fold_in)(request.keys, state.stats.rounds)
    both = jax.vmap(jax.random.split)(keys)
    return both[:, 0], both[:, 1]


def depth_of_use(state: DecodeState, request: Request):
    """int32 [B], deepest node that a row can still use.

    Known before anything is drawn, so that cutting there keeps every rule exact.
    """
    room = state.limit - state.length - 1  # tokens that may still be emitted
    return room if request.draft_depth is None else jnp.minimum(room, request.draft_depth)


def output(loop: Loop, state: DecodeState) -> GenerateOutput:
    """The new tokens of every row and their record, cut out of the state and padded."""
    lengths = state.length + 1 - state.prompt_length
    index = jnp.arange(loop.capacity, dtype=jnp.int32)[None]
    place = jnp.minimum(state.prompt_length[:, None] + index, state.tokens.shape[1] - 1)
    real = index < lengths[:, None]

    def cut(array, filler) -> Any:
        if array is None:
            return None
        array = array[:, : loop.capacity]
        here = real.reshape(real.shape + (1,) * (array.ndim - 2))
        return jnp.where(here, array, jnp.asarray(filler, array.dtype))

    record = Record(
        cut(state.record.from_draft, False),
        cut(state.record.logprobs, 0),
        cut(state.record.top_ids, -1),
        cut(state.record.top_logprobs, 0),
        cut(state.record.refused, False),
    )
    tokens = cut(jnp.take_along_axis(state.tokens, place, axis=1), loop.pad_id)
    return GenerateOutput(tokens, lengths, state.finish, state.stats, record)


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

    def propose(self, params: Params, state: Any, context: DraftContext, keys):
        """The pending token alone."""
        del params, state, keys
        return topology.root_only(context.pending)

    def commit(self, params: Params, state: Any, context, output, acceptance) -> Any:
        """No state."""
        del params, context, output, acceptance
        return state
