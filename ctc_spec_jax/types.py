"""Types that flow through one round: draft -> verify -> accept.

Shape letters: B batch, N tree nodes, M max depth, T new tokens, S cache slots, V vocabulary,
D width, H heads, K kv heads, L layers, F draft frames.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Protocol

import jax
import jax.numpy as jnp

ROOT = 0
"""Slot of the root node: the pending token, emitted but not yet in the target's cache."""

NO_PARENT = -1
"""Parent of the root."""

NO_TOKEN = -1
"""Padding of stop-token tables; never equal to a vocabulary id."""

RUNNING, STOPPED, OUT_OF_BUDGET = 0, 1, 2
"""Finish reasons of a row: still running, stop token emitted, ``max_new_tokens`` reached."""

Params = Any
"""A nested dict of arrays."""


@typing.dataclass_transform(frozen_default=True)
def pytree(cls):
    """Frozen dataclass registered as a pytree; every field is data."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@pytree
class DraftTree:
    """A draft: a tree of candidate continuations of the pending token.

    A node's parent has a smaller index than the node. Invalid nodes are never on a path; they
    may sit anywhere but in the root slot.
    """

    tokens: jax.Array  # int32 [B, N], slot ROOT = pending token
    parents: jax.Array  # int32 [B, N], NO_PARENT at the root
    valid: jax.Array  # bool [B, N]
    draft_logits: jax.Array | None = None  # float32 [B, N, V], law of each node's children


@pytree
class TargetOutput:
    """What the target says about N new nodes; nothing is committed yet."""

    logits: jax.Array  # float32 [B, N, V]
    taps: tuple[jax.Array, ...]  # each [B, N, D], the hidden states that the drafter asked for
    kv: Any  # per layer keys and values of the new nodes


@pytree
class Acceptance:
    """The accepted path of every row.

    ``length`` counts the root, so it is the number of tokens the round emits: the accepted
    drafts and ``next_token``. It is 0 for a finished row.
    """

    path: jax.Array  # int32 [B, M+1], node index per depth; entries past length are 0
    length: jax.Array  # int32 [B]
    next_token: jax.Array  # int32 [B], the target's own token after the path


@pytree
class Stats:
    """Counters of one decode; a round is one target pass after the prefill.

    ``emitted[b, r]`` is the number of tokens that row b kept from its round r, the target's own
    token included; 0 past ``rounds[b]``. Tokens past a stop or a budget are never counted.
    """

    rounds: jax.Array  # int32 [B], target passes while the row was running
    emitted: jax.Array  # int32 [B, R]


@pytree
class DecodeState:
    """Carry of the decode loop.

    ``tokens[b, :length[b]]`` is in the target's cache and ``tokens[b, length[b]]`` is pending,
    so ``length + 1`` tokens of a row are known. What lies behind them is garbage.
    """

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B]
    limit: jax.Array  # int32 [B], most known tokens a row may have: prompt and max_new_tokens
    stops: jax.Array  # int32 [B, X], stop token ids, padded with NO_TOKEN
    cache: Any
    drafter: Any
    key: jax.Array
    finish: jax.Array  # int32 [B], RUNNING, STOPPED or OUT_OF_BUDGET
    stats: Stats


@pytree
class DraftContext:
    """Read-only view of what the target knows, for drafters."""

    params: Params  # the target's parameters
    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B], tokens in the cache; the next one is pending
    cache: Any  # the target's cache

    @property
    def pending(self) -> jax.Array:
        """int32 [B], the token that roots the next tree."""
        return jnp.take_along_axis(self.tokens, self.length[:, None], axis=1)[:, 0]


@pytree
class GenerateOutput:
    """Result of a decode.

    ``tokens`` holds the new tokens, right-padded with the pad id; a stop token that ended the
    row is kept.
    """

    tokens: jax.Array  # int32 [B, T]
    lengths: jax.Array  # int32 [B]
    finish: jax.Array  # int32 [B]
    stats: Stats


class Target(Protocol):
    """A causal language model that can score a tree of new nodes."""

    def prefill(
        self, params: Params, tokens, lengths, num_slots: int, taps: tuple[int, ...]
    ) -> tuple[Any, tuple[jax.Array, ...]]:
        """Cache of the first ``lengths[b]`` tokens of each row, and the taps of all of them."""
        ...

    def forward_tree(
        self, params: Params, cache, length, tokens, positions, mask, taps: tuple[int, ...]
    ) -> TargetOutput:
        """Score N new nodes against the cache; commits nothing."""
        ...

    def commit(self, cache, kv, path, length) -> Any:
        """Write the rows of ``kv`` along ``path`` into the cache, from slot ``length`` on."""
        ...


class Drafter(Protocol):
    """A frozen dataclass that proposes trees."""

    @property
    def max_depth(self) -> int:
        """M, the longest path of a tree, root excluded."""
        ...

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose outputs it reads."""
        ...

    def init(self, params: Params, context: DraftContext, taps: tuple[jax.Array, ...]) -> Any:
        """State after the prompt; ``taps`` hold the prompt's hidden states, each [B, T, D]."""
        ...

    def propose(self, params: Params, state: Any, context: DraftContext, key) -> DraftTree:
        """A tree rooted at the pending token. ``key`` is consumed."""
        ...

    def commit(
        self,
        params: Params,
        state: Any,
        context: DraftContext,
        output: TargetOutput,
        acceptance: Acceptance,
    ) -> Any:
        """State after the accepted path entered the cache at ``context.length``.

        ``context`` is that of ``propose``. All M+1 rows of the path may be written: those past
        the accepted length are overwritten by the next round.
        """
        ...


class Verifier(Protocol):
    """A frozen dataclass: the rule that decides which path of a tree is kept."""

    def __call__(self, key, tree: DraftTree, depth, mask, logits, max_depth: int) -> Acceptance:
        """Accept a path.

        Args:
          key: consumed.
          tree: the draft.
          depth: int32 [B, N].
          mask: bool [B, N, N], ancestors of each node and itself.
          logits: float32 [B, N, V], processed.
          max_depth: M.
        """
        ...
