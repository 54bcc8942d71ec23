"""Drafts out of text that is there already: no network, no training.

``PromptLookup`` finds where the last tokens of a row stood before and proposes what followed
(prompt lookup decoding, Saxena 2023; ``transformers`` calls it ``prompt_lookup_num_tokens``).
``PhrasePool`` keeps phrases by the token before them, also those that the target wrote after tokens
it refused: the pool of Ouroboros (Zhao et al. 2024, arXiv 2402.13720) and of lookahead decoding,
without their drafting by Jacobi iterations.

Both propose several continuations as one tree that is fixed before the target speaks.

Shape letters: B batch, R phrases side by side, M max depth, N = 1 + R M tree nodes, S cache slots,
H buckets, G phrases of a bucket, W tokens of a phrase, K phrases to insert.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax.tree.build import merge_phrases
from ctc_spec_jax.types import (
    NO_PARENT,
    NO_TOKEN,
    ROOT,
    Acceptance,
    DraftContext,
    DraftTree,
    Params,
    TargetOutput,
    pytree,
)
from ctc_spec_jax.verify import first_argmax


def phrase_tree(pending, phrases, lengths) -> DraftTree:
    """Phrases int32 [B, R, M] below the pending token; ``lengths`` [B, R] of their tokens count."""
    tokens, parents, valid = jax.vmap(merge_phrases)(phrases, lengths)
    root = pending[:, None]
    return DraftTree(
        jnp.concatenate([root, tokens], axis=1),
        jnp.concatenate([jnp.full_like(root, NO_PARENT), parents], axis=1),
        jnp.concatenate([jnp.ones_like(root, bool), valid], axis=1),
    )


@dataclasses.dataclass(frozen=True)
class LookupConfig:
    """Of ``PromptLookup``: matches of more than ``longest`` tokens count as so many."""

    width: int
    vocab_size: int
    longest: int = 3
    taps: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """The ``Drafter`` that proposes what followed the row's last tokens before; stateless.

    The R best places are those with the longest match; among equals, the latest. At least the
    pending token itself must match. A continuation that reaches the end of the known text goes on
    as if the text repeated from the match on.
    """

    config: LookupConfig
    branches: int
    max_depth: int

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return 1 + self.branches * self.max_depth

    @property
    def taps(self) -> tuple[int, ...]:
        """None."""
        return self.config.taps

    def init_params(self, key) -> Params:
        """No parameters."""
        del key
        return {}

    def init(self, params: Params, context: DraftContext, taps) -> Any:
        """No state."""
        del params, context, taps
        return ()

    def propose(self, params: Params, state: Any, context: DraftContext, keys) -> DraftTree:
        """See ``types.Drafter``; deterministic."""
        del params, state, keys
        phrases, lengths = jax.vmap(self._lookup)(context.tokens, context.length)
        return phrase_tree(context.pending, phrases, lengths)

    def commit(
        self,
        params: Params,
        state: Any,
        context: DraftContext,
        output: TargetOutput,
        acceptance: Acceptance,
    ) -> Any:
        """No state."""
        del params, context, output, acceptance
        return state

    def _lookup(self, tokens, length):
        """Phrases int32 [R, M] and their lengths [R] of one row, pending token at ``length``."""
        place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        back = jnp.arange(self.config.longest, dtype=jnp.int32)
        there, here = place[:, None] - back[None], length - back
        same = tokens[jnp.maximum(there, 0)] == tokens[jnp.maximum(here, 0)][None]
        same &= (there >= 0) & (here >= 0)[None]
        match = jnp.sum(jnp.cumprod(same.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
        match = jnp.where(place < length, match, 0)
        score = jnp.where(match > 0, match * tokens.shape[0] + place, 0)
        best, ends = best_of(score, self.branches)
        ahead = jnp.arange(self.max_depth, dtype=jnp.int32)
        period = jnp.maximum(length - ends, 1)[:, None]
        phrases = tokens[ends[:, None] + 1 + ahead[None] % period]
        return phrases, jnp.where(best > 0, self.max_depth, 0)


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Of ``PhrasePool``: ``ways`` phrases of ``phrase`` tokens in each of ``buckets`` buckets.

    Tokens share a bucket where the vocabulary is larger than their number.
    """

    width: int
    vocab_size: int
    phrase: int = 4
    buckets: int = 4096
    ways: int = 8
    taps: tuple[int, ...] = ()


@pytree
class Pool:
    """Phrases of every row by the token before them."""

    keys: jax.Array  # int32 [B, H, G], the token before; NO_TOKEN in an empty place
    phrases: jax.Array  # int32 [B, H, G, W]
    ages: jax.Array  # int32 [B, H, G], when a phrase was last inserted; 0 in an empty place
    clock: jax.Array  # int32 [B], insertions so far


def empty_pool(batch: int, config: PoolConfig) -> Pool:
    """A pool without phrases."""
    shape = (batch, min(config.buckets, config.vocab_size), config.ways)
    return Pool(
        jnp.full(shape, NO_TOKEN, jnp.int32),
        jnp.zeros((*shape, config.phrase), jnp.int32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros((batch,), jnp.int32),
    )


def insert(pool: Pool, key, phrase, wanted) -> Pool:
    """Put one phrase into the pool of one row, without axis B.

    It becomes the newest of its bucket. If it is there already it moves, else the oldest leaves.

    Args:
      pool: of one row.
      key: int32 [], the token before the phrase.
      phrase: int32 [W].
      wanted: bool []; False changes nothing.
    """
    bucket = key % pool.keys.shape[0]
    known = (pool.keys[bucket] == key) & jnp.all(pool.phrases[bucket] == phrase[None], axis=1)
    # An age is never negative, so a phrase that is known is the oldest of all.
    way = jnp.argmin(jnp.where(known, -1, pool.ages[bucket])).astype(jnp.int32)
    clock = pool.clock + wanted.astype(jnp.int32)

    def put(array, new):
        return array.at[bucket, way].set(jnp.where(wanted, new, array[bucket, way]))

    return Pool(put(pool.keys, key), put(pool.phrases, phrase), put(pool.ages, clock), clock)


def best_of(scores, count: int) -> tuple[jax.Array, jax.Array]:
    """The ``count`` largest of scores int32 [K], falling, and where they stand; zeros past K."""
    values, index = jax.lax.top_k(scores, min(count, len(scores)))
    missing = (0, count - len(values))
    return jnp.pad(values, missing), jnp.pad(index, missing)


def newest(pool: Pool, key, count: int):
    """Phrases int32 [count, W] after ``key`` int32 [], newest first, and bool [count] if there."""
    bucket = key % pool.keys.shape[0]
    ages = jnp.where(pool.keys[bucket] == key, pool.ages[bucket], 0)
    found, way = best_of(ages, count)
    return pool.phrases[bucket][way], found > 0


def forget(pool: Pool, key, phrase, wanted) -> Pool:
    """Take one phrase out of the pool of one row where it is there; see ``insert``."""
    bucket = key % pool.keys.shape[0]
    known = (pool.keys[bucket] == key) & jnp.all(pool.phrases[bucket] == phrase[None], axis=1)
    known &= wanted
    keys = jnp.where(known, NO_TOKEN, pool.keys[bucket])
    ages = jnp.where(known, 0, pool.ages[bucket])
    return dataclasses.replace(
        pool, keys=pool.keys.at[bucket].set(keys), ages=pool.ages.at[bucket].set(ages)
    )


def insert_all(pool: Pool, keys, phrases, wanted) -> Pool:
    """Insert K phrases per row in order: keys [B, K], phrases [B, K, W], wanted [B, K]."""

    def row(pool, keys, phrases, wanted):
        def one(pool, entry):
            return insert(pool, *entry), None

        return jax.lax.scan(one, pool, (keys, phrases, wanted))[0]

    return jax.vmap(row)(pool, keys, phrases, wanted)


def runs(tree: DraftTree, best, width: int):
    """What the target would write after every node of one row, as far as the draft tells.

    Args:
      tree: of one row.
      best: int32 [N], the target's best token after every node.
      width: W.

    Returns:
      int32 [N, W], and bool [N]: all W tokens are known and the node is a draft.
    """
    nodes = jnp.arange(best.shape[0], dtype=jnp.int32)
    follows = (tree.parents[None] == nodes[:, None]) & (tree.tokens[None] == best[:, None])
    follows &= tree.valid[None] & (nodes > ROOT)[None]  # [N, N], child of a node
    child, some = jnp.argmax(follows, axis=1).astype(jnp.int32), jnp.any(follows, axis=1)
    at, whole, run = nodes, tree.valid & (nodes > ROOT), [best]
    for _ in range(width - 1):
        whole, at = whole & some[at], child[at]
        run.append(best[at])
    return jnp.stack(run, axis=1), whole


def insert_runs(pool: Pool, tree: DraftTree, output: TargetOutput, wanted) -> Pool:
    """Insert what the target wrote after drafted tokens, see ``runs``, in rows ``wanted`` [B]."""
    best, width = first_argmax(output.logits), pool.phrases.shape[-1]
    phrases, whole = jax.vmap(lambda row, tokens: runs(row, tokens, width))(tree, best)
    return insert_all(pool, tree.tokens, phrases, whole & wanted[:, None])


@dataclasses.dataclass(frozen=True)
class PhrasePool:
    """The ``Drafter`` that proposes the newest phrases after the pending token; state: a ``Pool``.

    Each of the R phrases goes on with the newest one after its last token, up to M tokens. After a
    round the pool gets the phrases that end in the new text and, from every drafted token on, the
    target's own best tokens, wherever the draft held all but the last of them. Rows share nothing.
    """

    config: PoolConfig
    branches: int
    max_depth: int

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return 1 + self.branches * self.max_depth

    @property
    def taps(self) -> tuple[int, ...]:
        """None."""
        return self.config.taps

    def init_params(self, key) -> Params:
        """No parameters."""
        del key
        return {}

    def init(self, params: Params, context: DraftContext, taps) -> Pool:
        """The phrases of the prompt; see ``types.Drafter``."""
        del params, taps
        pool = empty_pool(context.length.shape[0], self.config)

        def add(end, pool):
            ends = jnp.full((context.length.shape[0], 1), end, jnp.int32)
            return self._insert_text(pool, context.tokens, ends, ends <= context.length[:, None])

        return jax.lax.fori_loop(self.config.phrase, jnp.max(context.length) + 1, add, pool)

    def propose(self, params: Params, state: Pool, context: DraftContext, keys) -> DraftTree:
        """See ``types.Drafter``; deterministic."""
        del params, keys
        phrases, lengths = jax.vmap(self._phrases)(state, context.pending)
        return phrase_tree(context.pending, phrases, lengths)

    def commit(
        self,
        params: Params,
        state: Pool,
        context: DraftContext,
        output: TargetOutput,
        acceptance: Acceptance,
    ) -> Pool:
        """Phrases of refused text, then those of the new text; see ``types.Drafter``."""
        del params
        running = acceptance.length > 0
        if context.tree is not None:
            state = insert_runs(state, context.tree, output, running)
        index = jnp.arange(1, acceptance.path.shape[1] + 1, dtype=jnp.int32)
        ends = context.length[:, None] + index[None]
        new = (index[None] <= acceptance.length[:, None]) & (ends >= self.config.phrase)
        return self._insert_text(state, context.tokens, ends, new)

    def _insert_text(self, pool: Pool, tokens, ends, wanted) -> Pool:
        """Insert the phrases of ``tokens`` [B, S+1] whose last tokens are at ``ends`` [B, K]."""
        back = jnp.arange(self.config.phrase, -1, -1, dtype=jnp.int32)
        place = jnp.clip(ends[..., None] - back[None, None], 0, tokens.shape[1] - 1)
        windows = jnp.take_along_axis(tokens[:, None], place, axis=2)  # [B, K, W+1]
        return insert_all(pool, windows[..., 0], windows[..., 1:], wanted)

    def _phrases(self, pool: Pool, pending):
        """Phrases int32 [R, M] and their lengths [R] of one row."""
        phrases, there = newest(pool, pending, self.branches)
        lengths = jnp.where(there, self.config.phrase, 0)
        while phrases.shape[1] < self.max_depth:
            more, there_too = jax.vmap(lambda key: newest(pool, key, 1))(phrases[:, -1])
            there &= there_too[:, 0]
            phrases = jnp.concatenate([phrases, more[:, 0]], axis=1)
            lengths += jnp.where(there, self.config.phrase, 0)
        return phrases[:, : self.max_depth], jnp.minimum(lengths, self.max_depth)
