"""A round in which draft and target work at the same time: PEARL's schedule.

Liu et al. 2024, arXiv 2408.11850 (ICLR 2025), the strategies pre-verify and post-verify. A round
starts from the root, the pending token, and m *pending drafts* d_1..d_m behind it: m = 0 after a
refusal (pre-verify), else g-1 (post-verify). At once

- the small model drafts g tokens y_0..y_{g-1} after d_m,
- the target scores root, d_1..d_m.

Then the chain d_1..d_m, y_0 is verified. Where all of it is kept, y_0 is the next root and
y_1..y_{g-1} are the next pending drafts; at a refusal the target's own token is the next root and
the drafts are dropped. No row of the target is left for a bonus token: its place verifies y_0. So
the length of a draft adapts by itself, and with an acceptance rate a per token a round emits
``(1 - a^g) / ((1 - a) (1 + a - a^g))`` tokens and takes as long as g passes of the small model or
one of the target, whichever is longer.

Exact as the verifier is: it sees a chain that was drafted before it draws, from the laws that are
stated. Unlike the release, which seeds by position, every test has fresh numbers of its own round
and slot (there, the number that accepted a token tests the next one too when a refused row gets
going again, which biases samples); stops and budgets end a row inside accepted drafts; prompts may
be shorter than g + 1; rows of a batch are independent; both caches hold committed tokens only.

Here both sides are in one program, whose parts XLA is free to overlap; ``device_groups`` runs them
on devices of their own.

Shape letters: B batch, M = g most drafts of a round, N = M + 1 nodes, K drafts, V vocabulary,
S cache slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ctc_spec_jax import accept
from ctc_spec_jax import logits as processing
from ctc_spec_jax.decode import Loop, depth_of_use, round_keys
from ctc_spec_jax.tree import topology
from ctc_spec_jax.types import (
    Acceptance,
    DecodeState,
    Drafter,
    DraftTree,
    Params,
    Request,
    TargetOutput,
    pytree,
)


@pytree
class Chain:
    """Drafted tokens in a row, and the law each of them came from."""

    tokens: jax.Array  # int32 [B, K]
    count: jax.Array  # int32 [B], how many of them there are
    laws: jax.Array | None  # float32 [B, K, V], or None where no law is stated


@pytree
class Seen:
    """What the drafter is told of a round."""

    root: jax.Array  # int32 [B]
    length: jax.Array  # int32 [B], tokens before the root
    pending: Chain  # K = M - 1
    keys: jax.Array  # typed keys [B], consumed


@pytree
class Overlapped:
    """A drafter's part of ``DecodeState``."""

    cache: Any  # of the small model: the same tokens as in the target's
    pending: Chain


class AheadDrafter(Drafter, Protocol):
    """A drafter that goes on from drafts of which the target has said nothing yet."""

    @property
    def states_law(self) -> bool:
        """Whether its chains hold laws."""
        ...

    def prefill(self, params: Params, tokens, lengths, num_slots: int) -> Any:
        """Cache of the first ``lengths[b]`` tokens of each row of ``tokens`` [B, T]."""
        ...

    def ahead(self, params: Params, cache, seen: Seen, request: Request) -> tuple[Chain, Any]:
        """M tokens after the pending ones, and the cache with root and pending drafts behind.

        What is written there but refused later is overwritten by the next round.
        """
        ...


def nothing_pending(batch: int, depth: int, laws_of: int) -> Chain:
    """No pending drafts; ``laws_of`` is V, or 0 where no law is stated."""
    shape = (batch, depth - 1)
    laws = jnp.zeros((*shape, laws_of), jnp.float32) if laws_of else None
    return Chain(jnp.zeros(shape, jnp.int32), jnp.zeros((batch,), jnp.int32), laws)


def run_round(
    loop: Loop, params: Params, draft_params: Params, state: DecodeState, request: Request
) -> DecodeState:
    """One round; see ``decode.run_round``. The drafter is an ``AheadDrafter``."""
    drafter: Any = loop.drafter
    with jax.named_scope("draft"):
        seen = look(state, request)
        drafts, cache = drafter.ahead(draft_params, state.drafter.cache, seen, request)
    with jax.named_scope("verify"):
        scored = score(loop, params, state)
    state = judge(loop, state, request, scored, drafts)
    return dataclasses.replace(state, drafter=dataclasses.replace(state.drafter, cache=cache))


def look(state: DecodeState, request: Request) -> Seen:
    """What the drafter is told before a round."""
    keys, _ = round_keys(request, state)
    return Seen(_root(state), state.length, state.drafter.pending, keys)


def _root(state: DecodeState):
    return jnp.take_along_axis(state.tokens, state.length[:, None], axis=1)[:, 0]


def score(loop: Loop, params: Params, state: DecodeState) -> TargetOutput:
    """The target on root and pending drafts, M rows; knows nothing of what is being drafted."""
    tokens = in_a_row(_root(state), state.drafter.pending)
    positions, mask = causal(state.length, tokens.shape[1])
    return loop.target.forward_tree(
        params, state.cache, state.length, tokens, positions, mask, taps=()
    )


def in_a_row(root, pending: Chain):
    """Root [B] and pending drafts, int32 [B, M]."""
    return jnp.concatenate([root[:, None], pending.tokens], axis=1)


def causal(length, width: int) -> tuple[jax.Array, jax.Array]:
    """Positions [B, K] and mask [B, K, K] of a chain of ``width`` = K rows from ``length`` on."""
    index = jnp.arange(width, dtype=jnp.int32)
    mask = jnp.broadcast_to(index[None] <= index[:, None], (length.shape[0], width, width))
    return length[:, None] + index[None], mask


def chain_to_verify(root, pending: Chain, drafts: Chain) -> DraftTree:
    """Root, pending drafts and the first of the new ones, as a tree of M + 1 nodes."""
    depth = drafts.tokens.shape[1]
    index = jnp.arange(depth, dtype=jnp.int32)[None]
    count = pending.count[:, None]

    def joined(before, new):
        """Of [B, M-1, ...] the pending ones, then the first of ``new`` [B, M, ...]."""
        wide = jnp.concatenate([before, new[:, :1]], axis=1)
        is_pending = (index < count).reshape(*count.shape[:1], depth, *(1,) * (new.ndim - 2))
        return jnp.where(is_pending, wide, new[:, :1])

    laws = None
    if pending.laws is not None and drafts.laws is not None:
        laws = joined(pending.laws, drafts.laws)
        # The last node has no children.
        laws = jnp.concatenate([laws, jnp.zeros_like(laws[:, :1])], axis=1)
    tokens = jnp.concatenate([root[:, None], joined(pending.tokens, drafts.tokens)], axis=1)
    parents = jnp.broadcast_to(jnp.arange(-1, depth, dtype=jnp.int32)[None], tokens.shape)
    drafted = (index < count) | (index == count) & (drafts.count > 0)[:, None]
    is_root = jnp.ones((*count.shape[:1], 1), bool)
    return DraftTree(tokens, parents, jnp.concatenate([is_root, drafted], axis=1), laws)


def judge(
    loop: Loop, state: DecodeState, request: Request, scored: TargetOutput, drafts: Chain
) -> DecodeState:
    """Verify and accept; all that a round leaves but the small model's cache.

    Args:
      loop: static parts.
      state: before the round.
      request: of every row.
      scored: what ``score`` gave.
      drafts: what was drafted meanwhile, K = M.
    """
    most = loop.drafter.max_depth
    with jax.named_scope("verify"):
        pending = state.drafter.pending
        tree = chain_to_verify(_root(state), pending, drafts)
        lineage = topology.lineages(tree, most)
        tree = topology.trim(tree, lineage, depth_of_use(state, request))
        depth, mask = topology.shape_of(tree, lineage)
        # The node of y_0 may lie behind the scored rows. Any law will do: it is not drawn from.
        logits = jnp.concatenate([scored.logits, scored.logits[:, -1:]], axis=1)
        before = processing.prefixes(state, request, tree, lineage)
        laws = processing.NodeLaws(logits, request, state.known, before)
        keys = round_keys(request, state)[1]
        kept = loop.verifier(keys, tree, depth, mask, laws, most)
        acceptance, everything = without_bonus(kept, pending.count + 1, drafts.tokens[:, 0])
    with jax.named_scope("accept"):
        own = (~everything).astype(jnp.int32)
        settled, acceptance = accept.settle(
            state, request, tree, depth, laws, acceptance, acceptance.length - own
        )
        path = acceptance.path[:, :most]
        cache = loop.target.commit(state.cache, scored.kv, path, state.length)
        after = dataclasses.replace(state.drafter, pending=_rest(drafts, everything, request))
        return dataclasses.replace(settled, cache=cache, drafter=after)


def without_bonus(kept: Acceptance, last, token) -> tuple[Acceptance, jax.Array]:
    """Where the whole chain is kept, its last node is the next token instead of the verifier's.

    Args:
      kept: of the verifier.
      last: int32 [B], slot and depth of the chain's last node.
      token: int32 [B], that of the last node.

    Returns:
      The acceptance, and bool [B] whether the whole chain was kept.
    """
    everything = kept.length == last + 1
    levels = jnp.arange(kept.path.shape[1], dtype=jnp.int32)[None]
    length = jnp.where(everything, last, kept.length)
    path = jnp.where(levels < length[:, None], kept.path, 0)
    own = jnp.where(everything, token, kept.next_token)
    return Acceptance(path, length, own), everything


def _rest(drafts: Chain, everything, request: Request) -> Chain:
    """What is pending after a round: all drafts but the first where ``everything`` was kept.

    A row with a ``draft_depth`` below M gets along with as many: its chains are never deeper.
    """
    count = drafts.count
    if request.draft_depth is not None:
        count = jnp.minimum(count, request.draft_depth)
    count = jnp.where(everything, jnp.maximum(count - 1, 0), 0)
    laws = None if drafts.laws is None else drafts.laws[:, 1:]
    return Chain(drafts.tokens[:, 1:], count, laws)
