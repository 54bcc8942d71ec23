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

RUNNING, STOPPED, OUT_OF_BUDGET, STOPPED_BY_STRING, CACHE_FULL = range(5)
"""Finish reasons of a row: still running, stop token emitted, ``max_new_tokens`` reached, stop
string completed, no cache slots left."""

NO_STRINGS, MATCHED = 0, 1
"""States of a stop-string automaton: a row without stop strings; a stop string is complete."""

Array = Any
"""A ``jax.Array``, or what callers may hand over in its place: a NumPy array."""

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

    Children that were drawn at random are tried by the rules that need it in the order of their
    slots, so the slots of siblings must keep the order of the draws.
    """

    tokens: jax.Array  # int32 [B, N], slot ROOT = pending token
    parents: jax.Array  # int32 [B, N], NO_PARENT at the root
    valid: jax.Array  # bool [B, N]
    draft_logits: jax.Array | None = None  # float32 [B, N, V], law each node's children came from
    sampled: jax.Array | None = None  # bool [B, N], drawn from that law; None: all or none are
    memo: Any = None  # arrays [B, ..] that the drafter's ``commit`` finds in ``context.tree``


@pytree
class Law:
    """The target's processed law after every node: softmax of ``logits``."""

    logits: jax.Array  # float32 [B, N, V], -inf where a token is ruled out
    greedy: jax.Array | None = None  # bool [B], rows that take the arg-max; None: all of them

    def everywhere(self) -> Law:
        """See ``Laws``."""
        return self

    def at(self, nodes) -> Law:
        """See ``Laws``."""
        return Law(jnp.take_along_axis(self.logits, nodes[..., None], axis=1), self.greedy)


@pytree
class Sampling:
    """How every row's law is processed; see ``logits.process_logits``.

    A field that is None is off for the whole batch and no code is compiled for it. Where a field
    is an array, a row turns it off with the value in brackets.
    """

    temperature: Array | None = None  # float32 [B] (0: greedy)
    top_k: Array | None = None  # int32 [B] (0)
    top_p: Array | None = None  # float32 [B] (1)
    min_p: Array | None = None  # float32 [B] (0)
    repetition_penalty: Array | None = None  # float32 [B] (1)
    presence_penalty: Array | None = None  # float32 [B] (0)
    frequency_penalty: Array | None = None  # float32 [B] (0)
    bias: Array | None = None  # float32 [B, V], added to the logits (0)
    phrases: Array | None = None  # int32 [B, Y, W], token sequences, left-padded (NO_TOKEN)
    phrase_bias: Array | None = None  # float32 [B, Y], for a phrase's last token (0)
    min_new_tokens: Array | None = None  # int32 [B] (0)


@pytree
class StopStrings:
    """Automata over token ids that find stop strings, all rows' in one table; see ``stops.py``.

    ``NO_STRINGS`` leads to itself, and so does ``MATCHED``.
    """

    table: Array  # int32 [Q, V], state after a token
    start: Array  # int32 [B], state of each row before its first new token


@pytree
class Request:
    """What every row asks for. Arrays, so that the rows of a batch may differ in everything."""

    max_new_tokens: Array  # int32 [B]
    stops: Array  # int32 [B, X], stop token ids, padded with NO_TOKEN
    keys: Array  # typed PRNG keys [B]; a row's output depends on its own key alone
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_strings: StopStrings | None = None
    draft_depth: Array | None = None  # int32 [B], deepest drafted node that is used


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
    token included; 0 past ``rounds[b]``. Tokens past a stop or a budget are never counted. Column
    d of ``drafted`` and ``accepted`` is about depth d + 1: valid nodes, and kept drafted tokens.
    """

    rounds: jax.Array  # int32 [B], target passes while the row was running
    emitted: jax.Array  # int32 [B, R]
    drafted: jax.Array  # int32 [B, M]
    accepted: jax.Array  # int32 [B, M]


@pytree
class Record:
    """What is noted of every new token. Log-probabilities are None unless they were asked for.

    A drafted token was tried where one was kept or ``refused``; the other tokens came where a draft
    had ended or there was none.
    """

    from_draft: jax.Array  # bool [B, T], drafted and accepted; False: the target's own token
    logprobs: jax.Array | None = None  # float32 [B, T], under the processed law
    top_ids: jax.Array | None = None  # int32 [B, T, n], the n most probable tokens there
    top_logprobs: jax.Array | None = None  # float32 [B, T, n]
    refused: jax.Array | None = None  # bool [B, T], the target's own, in place of drafted tokens


@pytree
class KnownTokens:
    """Which tokens a row knows already, pending one included; None where nothing asks for it."""

    generated: jax.Array | None = None  # int32 [B, V], times generated
    seen: jax.Array | None = None  # bool [B, V], in the prompt or generated


@pytree
class DecodeState:
    """Carry of the decode loop.

    ``tokens[b, :length[b]]`` is in the target's cache and ``tokens[b, length[b]]`` is pending,
    so ``length + 1`` tokens of a row are known. What lies behind them is garbage.
    """

    tokens: jax.Array  # int32 [B, S+1]
    length: jax.Array  # int32 [B]
    prompt_length: jax.Array  # int32 [B]
    limit: jax.Array  # int32 [B], most known tokens a row may have: prompt and new ones
    cache: Any
    drafter: Any
    finish: jax.Array  # int32 [B], RUNNING or why the row ended
    stats: Stats
    record: Record
    known: KnownTokens
    stop_state: jax.Array | None  # int32 [B], of the stop-string automata


@pytree
class DraftContext:
    """Read-only view of what the target knows, for drafters."""

    params: Params  # the target's parameters
    tokens: jax.Array  # int32 [B, S+1]
    length: jax.Array  # int32 [B], tokens in the cache; the next one is pending
    cache: Any  # the target's cache
    request: Request
    tree: DraftTree | None = None  # in ``commit``: the draft that was verified, if it was one

    @property
    def pending(self) -> jax.Array:
        """int32 [B], the token that roots the next tree."""
        return jnp.take_along_axis(self.tokens, self.length[:, None], axis=1)[:, 0]


@pytree
class GenerateOutput:
    """Result of a decode.

    ``tokens`` holds the new tokens, right-padded with the pad id. The stop token that ended a
    row is kept, and so is the token that completed a stop string. ``record`` ends where the
    tokens end and is padded with False, 0 and -1 (``top_ids``).
    """

    tokens: jax.Array  # int32 [B, T]
    lengths: jax.Array  # int32 [B]
    finish: jax.Array  # int32 [B]
    stats: Stats
    record: Record


class Target(Protocol):
    """A causal language model that can score a tree of new nodes."""

    @property
    def vocab_size(self) -> int:
        """V, width of the logits."""
        ...

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


class Laws(Protocol):
    """The target's processed laws after the nodes of a draft; a ``Law`` is one."""

    @property
    def greedy(self) -> jax.Array | None:
        """bool [B], rows that take the arg-max; None: all of them."""
        ...

    def everywhere(self) -> Law:
        """The laws after all nodes."""
        ...

    def at(self, nodes) -> Law:
        """The laws after ``nodes`` int32 [B, K]."""
        ...


class Drafter(Protocol):
    """A frozen dataclass that proposes trees.

    One whose rounds take another course has a ``run_round`` of its own; see ``decode.round_of``.
    """

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

    def propose(self, params: Params, state: Any, context: DraftContext, keys) -> DraftTree:
        """A tree rooted at the pending token. ``keys`` [B] are consumed, one per row."""
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

        ``context`` is that of ``propose``, but the new tokens follow the pending one: ``tokens``
        is known up to ``context.length + acceptance.length``, the next pending token. All M+1 rows
        of the path may be written: those past the accepted length are overwritten by the next
        round.
        """
        ...


class Verifier(Protocol):
    """A frozen dataclass: the rule that decides which path of a tree is kept."""

    def __call__(
        self, keys, tree: DraftTree, depth, mask, laws: Laws, max_depth: int
    ) -> Acceptance:
        """Accept a path.

        Args:
          keys: typed PRNG keys [B], consumed.
          tree: the draft.
          depth: int32 [B, N].
          mask: bool [B, N, N], ancestors of each node and itself.
          laws: of the target after the nodes.
          max_depth: M.

        Raises:
          ValueError: the tree or the laws lack what the rule needs; at trace time.
        """
        ...
