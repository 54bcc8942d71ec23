"""Step 3: write the accepted tokens, commit cache rows, apply stops and budgets.

Shape letters: B batch, N tree nodes, M max depth, S cache slots, X stop tokens, R rounds.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ctc_spec_jax.types import (
    OUT_OF_BUDGET,
    RUNNING,
    STOPPED,
    Acceptance,
    DecodeState,
    DraftTree,
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


def cut(tokens, acceptance: Acceptance, state: DecodeState) -> tuple[Acceptance, jax.Array]:
    """Shorten the acceptance at the first stop token and at the row's budget.

    Args:
      tokens: int32 [B, M+1], see ``emitted_tokens``.
      acceptance: what the verifier kept.
      state: the carry before the round.

    Returns:
      The acceptance with the number of tokens that are kept (0 for a finished row), and the
      finish reason int32 [B] after the round. A stop token is kept; it wins over the budget.
    """
    running = state.finish == RUNNING
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    is_stop = jnp.any(tokens[:, :, None] == state.stops[:, None, :], axis=-1)
    room = state.limit - state.length - 1
    count = jnp.minimum(acceptance.length, room)
    is_stop &= index < count[:, None]
    stopped = jnp.any(is_stop, axis=1) & running
    count = jnp.where(stopped, jnp.argmax(is_stop, axis=1).astype(jnp.int32) + 1, count)
    count = jnp.where(running, count, 0)
    full = running & (count == room)
    reason = jnp.where(stopped, STOPPED, jnp.where(full, OUT_OF_BUDGET, state.finish))
    return dataclasses.replace(acceptance, length=count), reason.astype(jnp.int32)


def write_tokens(tokens, new, length):
    """Write ``new`` [B, M+1] behind the known tokens of each row; garbage ends up past the end."""

    def write(row, values, start):
        return jax.lax.dynamic_update_slice(row, values, (start + 1,))

    return jax.vmap(write)(tokens, new, length)


def count_round(stats: Stats, count) -> Stats:
    """Add one round that kept ``count`` [B] tokens; rows that kept none were finished."""
    index = jnp.arange(stats.emitted.shape[1], dtype=jnp.int32)[None]
    here = index == stats.rounds[:, None]
    emitted = stats.emitted + jnp.where(here, count[:, None], 0)
    return Stats(stats.rounds + (count > 0).astype(jnp.int32), emitted)
