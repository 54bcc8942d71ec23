"""Drafts of a small language model, phrase by phrase, with tails out of a pool: Ouroboros.

Zhao et al. 2024, arXiv 2402.13720 (EMNLP 2024), section 3. A draft is a chain of g tokens and up to
``tails`` phrases after its last token, all for one target pass.

- The chain is what the small model writes greedily, found by lookahead decoding (Fu et al. 2024,
  arXiv 2402.02057): a pass feeds, beside the chain, the pool's phrases after its last token, of
  which the longest right beginning is taken, and a window of W guesses of W continuations, whose
  columns give W new phrases. So a pass adds one to P + 1 tokens.
- The tails are the newest phrases after the last token; they cost the small model nothing.
- The pool learns from the windows, from what the target wrote after drafted tokens, refused ones
  too, and from what it wrote along the tails, which replaces the tails' phrases. Window and pool go
  on from round to round.

The tree is fixed before the target speaks: ``TargetSample`` and ``Greedy`` are exact for any pool.

Unlike the release: the tails' predictions refresh the pool after a refusal too (there a list that
is not flattened leaves that branch dead); a pool is a row's own and begins empty with every prompt
(there, benchmarks share it among prompts); window and phrases per token may differ in number; a
tail that is right to its end is followed by the target's own token, too; what the target says after
accepted tokens goes into the pool as well; rows of a batch, sampling and stop tokens anywhere.

Shape letters: B batch, g chain, R tails, P tokens of a phrase (the level N less one), W window,
G phrases of a token, N = 1 + g + R P tree nodes, M = g + P max depth, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax.draft.ngram import (
    Pool,
    PoolConfig,
    empty_pool,
    forget,
    insert,
    insert_all,
    insert_runs,
    newest,
)
from ctc_spec_jax.draft.small_lm import OfLanguageModel, SmallLM
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM, output_logits
from ctc_spec_jax.tree.build import merge_phrases
from ctc_spec_jax.types import (
    NO_PARENT,
    Acceptance,
    DraftContext,
    DraftTree,
    Params,
    TargetOutput,
    pytree,
)
from ctc_spec_jax.verify import first_argmax


@pytree
class Drafted:
    """A chain that grows, and what was learned meanwhile."""

    chain: jax.Array  # int32 [B, g]
    count: jax.Array  # int32 [B], tokens of the chain that are there
    window: jax.Array  # int32 [B, P, W]; a column is a token and P - 1 guesses of what follows
    pool: Pool


class _Layout(NamedTuple):
    """Rows of a pass: the chain, the window row by row, the phrases one by one."""

    mask: np.ndarray  # bool [rows, rows], self and what a row follows
    ahead: np.ndarray  # int32 [rows], places past the chain's next token; of a chain's token: 0


@functools.cache
def _layout(chain: int, width: int, phrases: int, length: int) -> _Layout:
    window = chain + np.arange(length * width).reshape(length, width)
    guesses = chain + length * width + np.arange(phrases * length).reshape(phrases, length)
    count = chain + length * (width + phrases)
    mask, ahead = np.eye(count, dtype=bool), np.zeros(count, np.int32)
    mask[:, :chain] = True
    mask[:chain] = np.tri(chain, count, dtype=bool)
    for level, column in np.ndindex(window.shape):
        row = window[level, column]
        mask[row, window[0, : column + 1]] = mask[row, window[: level + 1, column]] = True
        ahead[row] = level + column
    for phrase, place in np.ndindex(guesses.shape):
        mask[guesses[phrase, place], guesses[phrase, : place + 1]] = True
        ahead[guesses[phrase, place]] = place
    return _Layout(mask, ahead)


@dataclasses.dataclass(frozen=True)
class Ouroboros(OfLanguageModel):
    """The ``Drafter``: ``length`` tokens of the small model, then ``tails`` phrases of ``phrase``.

    ``width`` columns of the window and ``ways`` phrases of a token are looked at in every pass;
    tokens share one of ``buckets`` where the vocabulary is larger. State: that of ``SmallLM``, the
    window and the pool; what drafting made of the latter two comes back with the tree.
    """

    lm: DecoderLM
    length: int
    tails: int
    phrase: int
    width: int = 10
    ways: int = 10
    buckets: int = 4096
    taps: tuple[int, ...] = (0,)

    @property
    def max_depth(self) -> int:
        """M."""
        return self.length + (self.phrase if self.tails else 0)

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return 1 + self.length + self.tails * self.phrase

    @property
    def _reader(self) -> SmallLM:
        """What reads the text."""
        return SmallLM(self.lm, (1,))

    def init(self, params: Params, context: DraftContext, taps):
        """Pass over the prompt, a window of its tokens, no phrases; see ``types.Drafter``."""
        config = self.config
        pool = PoolConfig(config.width, config.vocab_size, self.phrase, self.buckets, self.ways)
        place = jnp.arange(self.phrase * self.width, dtype=jnp.int32)
        window = jnp.take_along_axis(
            context.tokens, place[None] % (context.length + 1)[:, None], axis=1
        )
        return {
            "text": self._reader.init(params, context, taps),
            "window": window.reshape(-1, self.phrase, self.width),
            "pool": empty_pool(context.length.shape[0], pool),
        }

    def propose(self, params: Params, state, context: DraftContext, keys) -> DraftTree:
        """See ``types.Drafter``; deterministic."""
        del keys
        drafted = self.draft(params, state, context)
        pending = context.pending[:, None]
        tokens, parents = [pending, drafted.chain], [jnp.full_like(pending, NO_PARENT)]
        index = jnp.arange(self.length, dtype=jnp.int32)
        parents.append(jnp.broadcast_to(index[None], drafted.chain.shape))
        valid = [jnp.ones_like(pending, bool), jnp.ones_like(drafted.chain, bool)]
        if self.tails:
            more, above, real = jax.vmap(self._tails)(drafted.pool, drafted.chain[:, -1])
            tokens, valid = [*tokens, more], [*valid, real]
            parents.append(above + self.length)  # the root of the tails is the chain's last token
        return DraftTree(
            jnp.concatenate(tokens, axis=1),
            jnp.concatenate(parents, axis=1),
            jnp.concatenate(valid, axis=1),
            memo={"window": drafted.window, "pool": drafted.pool},
        )

    def commit(
        self,
        params: Params,
        state,
        context: DraftContext,
        output: TargetOutput,
        acceptance: Acceptance,
    ):
        """Read what the round emitted, and learn from the target; see ``types.Drafter``."""
        text = self._reader.commit(params, state["text"], context, output, acceptance)
        tree = context.tree
        if tree is None:
            return {**state, "text": text}
        memo: Any = tree.memo
        running = acceptance.length > 0
        pool = insert_runs(memo["pool"], tree, output, running)
        if self.tails:
            best = first_argmax(output.logits)
            pool = jax.vmap(self._refresh)(pool, tree, best, running)
        return {"text": text, "window": memo["window"], "pool": pool}

    def draft(self, params: Params, state, context: DraftContext) -> Drafted:
        """The whole chain of every row, by as many passes as the slowest row needs."""
        first = self._best(state["text"]["logits"][:, None], context)
        chain = jnp.pad(first, ((0, 0), (0, self.length - 1)))
        drafted = Drafted(chain, jnp.ones_like(context.length), state["window"], state["pool"])

        def unfinished(drafted: Drafted):
            return jnp.any(drafted.count < self.length)

        def step(drafted: Drafted):
            return self.extend(params, state, context, drafted)

        return jax.lax.while_loop(unfinished, step, drafted) if self.length > 1 else drafted

    def extend(self, params: Params, state, context: DraftContext, drafted: Drafted) -> Drafted:
        """One pass of the small model over a chain that has at least one token."""
        last = jnp.take_along_axis(drafted.chain, drafted.count[:, None] - 1, axis=1)[:, 0]
        find = jax.vmap(lambda pool, key: newest(pool, key, self.ways))
        phrases, there = find(drafted.pool, last)
        best = self._pass(params, state["text"]["cache"], context, drafted, phrases)
        after, split = best[:, 0], 1 + self.ways * self.phrase
        right = best[:, 1:split].reshape(phrases.shape)
        new, count = jax.vmap(_longest)(phrases, there, after, right)
        active = drafted.count < self.length
        index = jnp.arange(self.phrase + 1, dtype=jnp.int32)
        place = jnp.where(
            index[None] < count[:, None], drafted.count[:, None] + index[None], self.length
        )
        rows = jnp.arange(len(count), dtype=jnp.int32)[:, None]
        chain = drafted.chain.at[rows, place].set(new, mode="drop")
        columns = jnp.concatenate([drafted.window[:, 1:], best[:, None, split:]], axis=1)
        made = jnp.swapaxes(columns, 1, 2)  # [B, W, P]
        wanted = jnp.broadcast_to(active[:, None], made.shape[:2])
        return Drafted(
            jnp.where(active[:, None], chain, drafted.chain),
            jnp.minimum(drafted.count + jnp.where(active, count, 0), self.length),
            jnp.where(active[:, None, None], columns, drafted.window),
            insert_all(drafted.pool, drafted.window[:, 0], made, wanted),
        )

    def _pass(self, params: Params, cache, context: DraftContext, drafted: Drafted, phrases):
        """The small model's best tokens after the chain's last token, every token of ``phrases``
        [B, G, P], and the window's columns: int32 [B, 1 + G P + W]."""
        layout, batch = _layout(self.length, self.width, self.ways, self.phrase), len(phrases)
        parts = (drafted.chain, drafted.window, phrases)
        tokens = jnp.concatenate([part.reshape(batch, -1) for part in parts], axis=1)
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        there = drafted.count[:, None]
        past = context.length + 1  # the root is in the cache
        offset = jnp.where(index[None] < self.length, index, there + layout.ahead[None])
        real = (index[None] >= self.length) | (index[None] < there)
        mask = jnp.asarray(layout.mask)[None] & real[:, None]
        mask |= (index[:, None] == index[None])[None]
        hidden: Any = self.lm.module.apply(
            {"params": params}, tokens, past[:, None] + offset, mask, cache, past, ()
        )[0]
        window_end = self.length + self.phrase * self.width
        columns = jnp.broadcast_to(
            index[None, window_end - self.width : window_end], (batch, self.width)
        )
        guesses = jnp.broadcast_to(index[None, window_end:], (batch, self.ways * self.phrase))
        rows = jnp.concatenate([there - 1, guesses, columns], axis=1)
        hidden = jnp.take_along_axis(hidden, rows[..., None], axis=1)
        return self._best(output_logits(params, hidden), context)

    def _best(self, logits, context: DraftContext):
        """The greedy tokens int32 [B, L] under the rows' biases; ``logits`` [B, L, V]."""
        bias = context.request.sampling.bias
        return first_argmax(logits if bias is None else logits + bias[:, None])

    def _tails(self, pool: Pool, key):
        """The newest phrases of one row after its chain as nodes; see ``merge_phrases``."""
        phrases, there = newest(pool, key, self.tails)
        return merge_phrases(phrases, jnp.where(there, self.phrase, 0))

    def _refresh(self, pool: Pool, tree: DraftTree, best, running) -> Pool:
        """The tails of one row as the target would have them, in the place of what they were."""
        key = tree.tokens[self.length]
        for tail in reversed(range(self.tails)):  # so that the order of their ages stays
            # A phrase is in the pool once, so its last token is a node of its own.
            node = jnp.int32(self.length + (tail + 1) * self.phrase)
            wanted, old, new = tree.valid[node] & running, [], []
            for _ in range(self.phrase):
                old.append(tree.tokens[node])
                node = tree.parents[node]
                new.append(best[node])
            pool = forget(pool, key, jnp.stack(old[::-1]), wanted)
            pool = insert(pool, key, jnp.stack(new[::-1]), wanted)
        return pool


def _longest(phrases, there, after, right):
    """What one pass adds to the chain of one row.

    Args:
      phrases: int32 [G, P], guesses.
      there: bool [G].
      after: int32 [], the small model's token after the chain.
      right: int32 [G, P], its token after every token of the guesses.

    Returns:
      int32 [P + 1] and int32 [], how many of them count: at least one.
    """
    expected = jnp.concatenate([jnp.broadcast_to(after, (len(phrases), 1)), right], axis=1)
    same = (phrases == expected[:, :-1]) & there[:, None]
    matches = jnp.sum(jnp.cumprod(same.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    longest = jnp.argmax(matches)
    return expected[longest], matches[longest] + 1


def ouroboros_drafter(network: DecoderConfig, nodes: int, depth: int, tree: str) -> Ouroboros:
    """The drafter of at most ``nodes`` nodes and ``depth``: up to 3 tails of up to 4 tokens."""
    if tree:
        raise InputError(f"tree: expected '', the only way of this method, found {tree!r}")
    depth = max(1, min(depth, nodes - 1))
    phrase = max(1, min(4, (nodes - 1) // 4, depth - 2))
    tails = min(3, (nodes - 2) // phrase) if depth > 1 else 0
    length = max(1, min(nodes - 1 - tails * phrase, depth - (phrase if tails else 0)))
    return Ouroboros(DecoderLM(network), length, tails, phrase)
