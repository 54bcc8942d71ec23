"""Windows of masked tokens: how passes of a network fill them, and the drafts that come of it.

A position of a window says a token, for good, or is masked. Which laws may be stated to a rule for
sampled drafts is what this file is careful about. Where position 2 was revealed before position 1,
the law of the first depends on the second, so that once the first is accepted the law under which
the second was revealed is no longer its law: stating the laws of revealing gives an inexact output.
Exact are one pass, whose laws do not depend on each other; the last of several passes, where what
was revealed before counts as given; and passes from left to right.

Differences from SpecDiff (arXiv 2408.05636), which says no more than that the drafter's
distributions are verified: the exact laws; where nothing is drawn, passes from the left and a tree
in the place of a chain; siblings (as in SpecDiff-2, arXiv 2511.00606, which draws them with
replacement). From MDLM (arXiv 2406.07524): tokens are drawn from laws processed like the target's,
and the last pass draws where its sampler takes the best.

Shape letters: B batch, F positions of the window, T passes, N tree nodes, M max depth,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ctc_spec_jax.draft.small_lm import Drawn, proposal_law
from ctc_spec_jax.tree import best_paths
from ctc_spec_jax.types import NO_PARENT, DraftContext, DraftTree, Law, Request
from ctc_spec_jax.verify import first_argmax

MASK = -1
"""Stands for a masked position where a window is written as tokens."""

PASSES = 2
"""T unless it is said."""

Laws = Callable[[Array], Array]
"""One pass of the network: logits [B, F, V] of the positions of a window int32 [B, F]."""


def reveal(tokens, drawn, shown):
    """The window int32 [B, F] where masked positions that are ``shown`` [B, F] say ``drawn``."""
    return jnp.where((tokens == MASK) & shown, drawn, tokens)


def copied(logits, tokens):
    """Logits [B, F, V] of a pass, a point mass where the window already says a token."""
    index = lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    point = jnp.where(index == tokens[..., None], 0.0, -jnp.inf).astype(logits.dtype)
    return jnp.where(tokens[..., None] == MASK, logits, point)


def denoise(laws: Laws, say, shows, tokens, vocab_size: int, passes: int) -> tuple[Array, Array]:
    """Some passes over a window.

    Args:
      laws: one pass.
      say: (pass, logits [B, F, V]) -> tokens int32 [B, F] that masked positions would say.
      shows: pass -> bool [B, F] or [1, F], positions that from then on say it if they are masked.
      tokens: int32 [B, F], window to begin with.
      vocab_size: V.
      passes: how many.

    Returns:
      The window int32 [B, F] after them; logits [B, F, V] under which each position was revealed,
      those of the last pass where it is still masked.
    """
    shape = (*tokens.shape, vocab_size)
    if passes == 0:
        return tokens, jnp.zeros(shape)
    dtype = jax.eval_shape(laws, tokens).dtype

    def one(index, carry):
        tokens, seen = carry
        seen = jnp.where(tokens[..., None] == MASK, laws(tokens), seen)
        return reveal(tokens, say(index, seen), shows(index)), seen

    return lax.fori_loop(0, passes, one, (tokens, jnp.zeros(shape, dtype)))


def from_left(frames: int, depth: int, passes: int):
    """Shows the first ``depth`` of F positions in T passes, equal parts from the left.

    A draft is worth no more than its beginning. The order of confidence, which most samplers take,
    lets tokens that are far ahead, and often wrong, bear on the first one.
    """
    place = np.arange(frames, dtype=np.int32)[None]

    def shows(index):
        return place < lax.div(depth * (index + 1), passes)

    return shows


def by_chance(keys, frames: int, depth: int, passes: int, greedy):
    """Shows every position with the chance of a reverse step from t to t - 1/T, on its own.

    From t = 1 - i/T that is (t - s)/t = 1/(T - i). Greedy rows go ``from_left``. ``keys`` [B] are
    consumed.
    """
    ordered = from_left(frames, depth, passes)

    def shows(index):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (frames,)))(own)
        chance = 1.0 / (passes - index).astype(jnp.float32)
        return jnp.where(greedy[:, None], ordered(index), uniform < chance)

    return ordered if greedy is None else shows


def _best(index, logits):
    return first_argmax(logits)


def drawn_by(keys, greedy):
    """Draws a token for every position; the best one in greedy rows. ``keys`` [B] are consumed."""

    def say(index, logits):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        slots = jnp.arange(logits.shape[1], dtype=jnp.int32)
        return Drawn()(own, Law(logits, greedy), slots, 1)[0][..., 0]

    return say


def _masked(context: DraftContext, frames: int):
    return jnp.full((context.length.shape[0], frames), MASK, jnp.int32)


def _processed(laws: Laws, request: Request) -> Laws:
    """The laws that tokens are drawn from."""
    return lambda tokens: proposal_law(laws(tokens), request).logits


def _greedy(request: Request):
    temperature = request.sampling.temperature
    return None if temperature is None else temperature <= 0


def _split(keys, count: int):
    """Keys [count, B] of keys [B], which are consumed."""
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, count))(keys), 0, 1)


class WindowTree(Protocol):
    """A frozen dataclass: how a window becomes a tree.

    ``states_law``: tokens are drawn, and the draft states from what law.
    """

    states_law: ClassVar[bool]

    @property
    def max_depth(self) -> int:
        """M, at most F."""
        ...

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        ...

    def draft(self, laws: Laws, shape: tuple[int, int], context: DraftContext, keys) -> DraftTree:
        """The draft of every row; ``shape`` is F and V, ``keys`` [B] are consumed."""
        ...


@dataclasses.dataclass(frozen=True)
class BestPaths:
    """The likeliest paths, fixed before the target speaks. Exact by ``Greedy`` or ``TargetSample``.

    Every pass reveals its best tokens, from the left; the tree is that of the most probable paths
    under the product of the laws under which positions were revealed.
    """

    states_law: ClassVar[bool] = False
    num_nodes: int
    max_depth: int
    passes: int = PASSES

    def draft(self, laws: Laws, shape: tuple[int, int], context: DraftContext, keys) -> DraftTree:
        """See ``WindowTree``."""
        del keys
        frames, vocab = shape
        shows = from_left(frames, self.max_depth, self.passes)
        given = _masked(context, frames), vocab, self.passes
        _, seen = denoise(laws, _best, shows, *given)
        log_probs = jax.nn.log_softmax(seen, axis=-1)

        def row(log_probs, pending):
            return best_paths.most_probable(log_probs, pending, self.num_nodes, self.max_depth)

        return DraftTree(*jax.vmap(row)(log_probs, context.pending))


@dataclasses.dataclass(frozen=True)
class Conditional:
    """Draws from the last pass, given what the window said before it.

    Positions revealed before are point masses, and stated as such; the others are independent
    draws. With one pass that is the product of its marginals. ``branches`` chains that share the
    root: its children are drawn without replacement. Exact by ``MultiCandidate``; one chain by
    ``Rejection`` and ``Block`` too.
    """

    states_law: ClassVar[bool] = True
    branches: int
    max_depth: int
    passes: int = PASSES

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return 1 + self.branches * self.max_depth

    def draft(self, laws: Laws, shape: tuple[int, int], context: DraftContext, keys) -> DraftTree:
        """See ``WindowTree``."""
        frames, vocab = shape
        greedy, laws = _greedy(context.request), _processed(laws, context.request)
        say_keys, show_keys, last_keys = _split(keys, 3)
        say = drawn_by(say_keys, greedy)
        shows = by_chance(show_keys, frames, self.max_depth, self.passes, greedy)
        tokens, _ = denoise(laws, say, shows, _masked(context, frames), vocab, self.passes - 1)
        law = Law(copied(laws(tokens), tokens), greedy)
        return drawn_tree(last_keys, law, context.pending, self.branches, self.max_depth)


@dataclasses.dataclass(frozen=True)
class LeftToRight:
    """A chain whose every token is drawn given all before it: as many passes as tokens.

    Exact by ``Rejection`` and ``Block``.
    """

    states_law: ClassVar[bool] = True
    max_depth: int

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return 1 + self.max_depth

    def draft(self, laws: Laws, shape: tuple[int, int], context: DraftContext, keys) -> DraftTree:
        """See ``WindowTree``."""
        frames, vocab = shape
        tokens, seen = denoise(
            _processed(laws, context.request),
            drawn_by(keys, _greedy(context.request)),
            from_left(frames, self.max_depth, self.max_depth),
            _masked(context, frames),
            vocab,
            self.max_depth,
        )
        rest = tokens[:, : self.max_depth]
        return _tree(jnp.ones_like(rest, bool), rest, seen, context.pending, 1, self.max_depth)


def drawn_tree(keys, law: Law, pending, branches: int, depth: int) -> DraftTree:
    """Chains below one root, drawn from laws [B, F, V] that depend on the depth alone.

    The children of the root are drawn without replacement. ``keys`` [B] are consumed.
    """
    inner = np.arange(1, 1 + branches * (depth - 1), dtype=np.int32)
    root = jnp.zeros((1,), jnp.int32)
    tokens, real = Drawn()(keys, Law(law.logits[:, :1], law.greedy), root, branches)
    tokens, real = tokens[:, 0], real[:, 0]  # [B, branches]
    if depth > 1:
        below = Law(law.logits[:, _level(inner, branches)], law.greedy)
        tokens = jnp.concatenate(
            [tokens, Drawn()(keys, below, jnp.asarray(inner), 1)[0][..., 0]], axis=1
        )
    return _tree(jnp.tile(real, (1, depth)), tokens, law.logits, pending, branches, depth)


def _level(nodes, branches: int):
    """Depth of the nodes of chains below one root; slots go by depth."""
    return (nodes + branches - 1) // branches


def _tree(real, tokens, logits, pending, branches: int, depth: int) -> DraftTree:
    """Nodes below the root: tokens and whether they exist [B, N-1]; laws [B, F, V] by position."""
    batch, nodes = len(pending), np.arange(1 + branches * depth, dtype=np.int32)
    parents = np.where(nodes == 0, NO_PARENT, np.maximum(nodes - branches, 0))
    # Leaves have no children; any law will do.
    laws = logits[:, np.minimum(_level(nodes, branches), depth - 1)]
    return DraftTree(
        jnp.concatenate([pending[:, None], tokens], axis=1),
        jnp.broadcast_to(jnp.asarray(parents, jnp.int32)[None], (batch, len(nodes))),
        jnp.concatenate([jnp.ones((batch, 1), bool), real], axis=1),
        laws,
    )
