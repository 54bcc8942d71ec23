"""Step 3: cut at stops and budgets, write the tokens, note what is to be known of them.

Shape letters: B batch, N tree nodes, M max depth, S cache slots, T new tokens, X stop tokens,
R rounds, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax.logits import token_log_probs
from ctc_spec_jax.types import (
    CACHE_FULL,
    MATCHED,
    OUT_OF_BUDGET,
    ROOT,
    RUNNING,
    STOPPED,
    STOPPED_BY_STRING,
    Acceptance,
    DecodeState,
    DraftTree,
    KnownTokens,
    Laws,
    Record,
    Request,
    Sampling,
    Stats,
)


def emitted_tokens(tree: DraftTree, acceptance: Acceptance):
    """Tokens of a round in order, int32 [B, M+1]: the accepted drafts, then the target's own.

    Entries at or past the accepted length are garbage.
    """
    drafted = jnp.take_along_axis(tree.tokens, acceptance.path[:, 1:], axis=1)  # [B, M]
    own = acceptance.next_token[:, None]
    index = jnp.arange(acceptance.path.shape[1], dtype=jnp.int32)[None]
    tokens = jnp.concatenate([drafted, own], axis=1)
    return jnp.where(index == acceptance.length[:, None] - 1, own, tokens)


def settle(
    state: DecodeState,
    request: Request,
    tree: DraftTree,
    depth,
    laws: Laws,
    acceptance: Acceptance,
    drafted,
) -> tuple[DecodeState, Acceptance]:
    """What a round leaves but for the caches of target and drafter, which are still the old ones.

    Args:
      state: the carry before the round.
      request: of every row.
      tree: the draft that was verified.
      depth: int32 [B, N].
      laws: of the target after the nodes.
      acceptance: what the verifier kept.
      drafted: int32 [B], how many of the emitted tokens were drafted; those behind are the
        target's own.

    Returns:
      The carry after the round, and the acceptance as ``cut`` leaves it.
    """
    new = emitted_tokens(tree, acceptance)
    index = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    refused = (index == drafted[:, None]) & _has_child(tree, acceptance)[:, None]
    acceptance, finish, stop_state = cut(new, acceptance, state, request)
    count = acceptance.length
    from_draft = index < drafted[:, None]
    record = note(state.record, new, state, acceptance.path, from_draft, laws)
    after = dataclasses.replace(
        state,
        tokens=write_tokens(state.tokens, new, state.length),
        length=state.length + count,
        finish=finish,
        stats=count_round(state.stats, tree, depth, count, drafted < count),
        record=_note_refused(record, refused, state),
        known=know(state.known, new, count),
        stop_state=stop_state,
    )
    return after, acceptance


def cut(tokens, acceptance: Acceptance, state: DecodeState, request: Request):
    """Shorten the acceptance at the first stop and at the row's limit.

    Args:
      tokens: int32 [B, M+1], see ``emitted_tokens``.
      acceptance: what the verifier kept.
      state: the carry before the round.
      request: of every row.

    Returns:
      The acceptance with the number of tokens that are kept (0 for a finished row), the finish
      reason int32 [B] after the round, and the state of the stop-string automata. The token that
      stops a row is kept; a stop wins over the limit, and a stop token over a string.
    """
    running = state.finish == RUNNING
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    ends = jnp.any(tokens[:, :, None] == request.stops[:, None, :], axis=-1)
    strings = _string_states(tokens, state, request)
    completes = jnp.zeros_like(ends) if strings is None else strings == MATCHED
    room = state.limit - state.length - 1
    count = jnp.minimum(acceptance.length, room)
    stops = (ends | completes) & (index < count[:, None])
    first = jnp.argmax(stops, axis=1).astype(jnp.int32)
    stopped = jnp.any(stops, axis=1) & running
    count = jnp.where(running, jnp.where(stopped, first + 1, count), 0)

    by_token = jnp.take_along_axis(ends, first[:, None], axis=1)[:, 0]
    within = state.limit == state.prompt_length + request.max_new_tokens
    reason = jnp.where(within, OUT_OF_BUDGET, CACHE_FULL)
    reason = jnp.where(running & (count == room), reason, state.finish)
    reason = jnp.where(stopped, jnp.where(by_token, STOPPED, STOPPED_BY_STRING), reason)
    if strings is not None and state.stop_state is not None:
        kept = jnp.take_along_axis(strings, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        strings = jnp.where(count > 0, kept, state.stop_state)
    return dataclasses.replace(acceptance, length=count), reason.astype(jnp.int32), strings


def _string_states(tokens, state: DecodeState, request: Request):
    """States of the automata after each token, int32 [B, M+1]; None where there are none."""
    if request.stop_strings is None or state.stop_state is None:
        return None
    states = [state.stop_state]
    for i in range(tokens.shape[1]):
        states.append(request.stop_strings.table[states[-1], tokens[:, i]])
    return jnp.stack(states[1:], axis=1)


def write_tokens(tokens, new, length):
    """Write ``new`` [B, M+1] behind the known tokens of each row; garbage ends up past the end."""
    return _write(tokens, new, length + 1)


def count_round(stats: Stats, tree: DraftTree, depth, count, own_kept) -> Stats:
    """Add one round that kept ``count`` [B] tokens; rows that kept none were finished.

    ``own_kept`` bool [B]: the last of them is the target's own. ``depth`` int32 [B, N].
    """
    index = jnp.arange(stats.emitted.shape[1], dtype=jnp.int32)[None]
    here = index == stats.rounds[:, None]
    emitted = stats.emitted + jnp.where(here, count[:, None], 0)
    running = count > 0
    levels = jnp.arange(1, stats.drafted.shape[1] + 1, dtype=jnp.int32)[None]
    offered = tree.valid & (jnp.arange(depth.shape[1]) > ROOT)[None] & running[:, None]
    at_level = offered[:, :, None] & (depth[:, :, None] == levels[:, None])
    accepted = levels <= (count - own_kept.astype(jnp.int32))[:, None]
    return Stats(
        stats.rounds + running.astype(jnp.int32),
        emitted,
        stats.drafted + jnp.sum(at_level, axis=1, dtype=jnp.int32),
        stats.accepted + accepted.astype(jnp.int32),
    )


def note(record: Record, new, state: DecodeState, path, from_draft, laws: Laws) -> Record:
    """Write what is asked for about the tokens ``new`` int32 [B, M+1] of a round.

    ``path`` int32 [B, M+1] holds the node after which each was emitted, ``from_draft`` bool
    [B, M+1] whether it was drafted; entries past the kept ones are garbage behind the record.
    """
    start = state.length + 1 - state.prompt_length
    drafted = _write(record.from_draft, from_draft, start)
    if record.logprobs is None:
        return dataclasses.replace(record, from_draft=drafted)
    scores = token_log_probs(laws.at(path))  # [B, M+1, V]
    own = jnp.take_along_axis(scores, new[..., None], axis=2)[..., 0]
    record = dataclasses.replace(
        record, from_draft=drafted, logprobs=_write(record.logprobs, own, start)
    )
    if record.top_ids is None or record.top_logprobs is None:
        return record
    values, ids = jax.lax.top_k(scores, record.top_ids.shape[-1])
    return dataclasses.replace(
        record,
        top_ids=_write(record.top_ids, ids, start),
        top_logprobs=_write(record.top_logprobs, values, start),
    )


def _has_child(tree: DraftTree, acceptance: Acceptance):
    """bool [B]: the draft went on after the accepted path."""
    last = jnp.maximum(acceptance.length - 1, 0)[:, None]
    node = jnp.take_along_axis(acceptance.path, last, axis=1)
    return jnp.any(tree.valid & (tree.parents == node), axis=1)


def _note_refused(record: Record, refused, state: DecodeState) -> Record:
    """Write which tokens of a round, bool [B, M+1], came in place of drafted ones."""
    if record.refused is None:
        return record
    start = state.length + 1 - state.prompt_length
    return dataclasses.replace(record, refused=_write(record.refused, refused, start))


def no_rounds(batch: int, capacity: int, depth: int) -> Stats:
    """Counters before the first round; R = ``capacity``, M = ``depth``."""

    def zeros(*shape):
        return jnp.zeros((batch, *shape), jnp.int32)

    return Stats(zeros(), zeros(capacity), zeros(depth), zeros(depth))


def blank_record(batch: int, size: int, top: int | None) -> Record:
    """A record of ``size`` tokens; ``top`` as ``top_logprobs`` of ``decode.Loop``."""
    drafted = jnp.zeros((batch, size), bool)
    record = Record(drafted, refused=jnp.zeros_like(drafted))
    if top is None:
        return record
    record = dataclasses.replace(record, logprobs=jnp.zeros((batch, size), jnp.float32))
    if top == 0:
        return record
    ids = jnp.zeros((batch, size, top), jnp.int32)
    return dataclasses.replace(record, top_ids=ids, top_logprobs=jnp.zeros(ids.shape, jnp.float32))


def known_prompt(sampling: Sampling, tokens, prompt_lengths, vocab_size: int) -> KnownTokens:
    """Counts before the first new token, of what the penalties of this batch ask for."""
    batch, size = tokens.shape
    generated = seen = None
    if sampling.presence_penalty is not None or sampling.frequency_penalty is not None:
        generated = jnp.zeros((batch, vocab_size), jnp.int32)
    if sampling.repetition_penalty is not None:
        rows = np.arange(batch)[:, None]
        prompt = jnp.arange(size, dtype=jnp.int32)[None] < prompt_lengths[:, None]
        seen = jnp.zeros((batch, vocab_size), bool).at[rows, tokens].max(prompt)
    return KnownTokens(generated, seen)


def know(known: KnownTokens, new, count) -> KnownTokens:
    """Add the first ``count`` [B] of the tokens ``new`` int32 [B, M+1] of a round."""
    kept = jnp.arange(new.shape[1], dtype=jnp.int32)[None] < count[:, None]
    rows = np.arange(new.shape[0])[:, None]
    generated, seen = known.generated, known.seen
    if generated is not None:
        generated = generated.at[rows, new].add(kept.astype(jnp.int32))
    if seen is not None:
        seen = seen.at[rows, new].max(kept)
    return KnownTokens(generated, seen)


def _write(array, values, start):
    """``values`` [B, M+1, ...] into ``array`` [B, T, ...] from ``start`` [B] on, row by row."""

    def write(row, new, at):
        return jax.lax.dynamic_update_slice(row, new, (at, *[0] * (row.ndim - 1)))

    return jax.vmap(write)(array, values.astype(array.dtype), start)
