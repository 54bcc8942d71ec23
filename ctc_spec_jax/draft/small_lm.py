"""A separate, smaller language model of the same vocabulary as drafter.

It has its own parameters and cache. A draft grows one depth after another: a chain (Leviathan et
al. 2023, arXiv 2211.17192) or a tree with a fixed number of children per node (multi-candidate
speculative decoding: Yang et al. 2024, arXiv 2401.06706). The model reads what a round emitted when
the round is committed, which also gives the first law of the next draft: a draft of depth g costs g
passes in all.

Passes within a draft feed all of its inner nodes again instead of keeping their keys: the weights
are read once per pass either way, and the cache, which a loop would have to copy, is only read.

Shape letters: B batch, N tree nodes, M max depth, L most nodes of one depth, K most children of a
node, T prompt tokens, S cache slots, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax.draft.stop import Never, StopRule
from ctc_spec_jax.logits import Prefixes, process_logits
from ctc_spec_jax.models import kv_cache
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM, output_logits
from ctc_spec_jax.tree import build, topology
from ctc_spec_jax.types import (
    ROOT,
    Acceptance,
    DraftContext,
    DraftTree,
    KnownTokens,
    Law,
    Params,
    Request,
    Sampling,
    TargetOutput,
)
from ctc_spec_jax.verify import first_argmax
from ctc_spec_jax.xla import aligned


def proposal_law(logits, request: Request) -> Law:
    """The law that drafted tokens are drawn from, of the small model's ``logits`` [B, L, V].

    The row's bias, temperature, top-k, top-p and min-p apply as they do to the target. Penalties,
    phrases and the minimum of new tokens, which depend on the text, do not.
    """
    own = request.sampling
    sampling = Sampling(own.temperature, own.top_k, own.top_p, own.min_p, bias=own.bias)
    shape = logits.shape[:2]
    nothing = Prefixes(jnp.zeros((*shape, 0), jnp.int32), None, jnp.zeros(shape, jnp.int32))
    request = dataclasses.replace(request, sampling=sampling)
    return process_logits(logits, request, KnownTokens(), nothing)


class Draw(Protocol):
    """A frozen dataclass: how the children of nodes come from the law after them."""

    @property
    def states_law(self) -> bool:
        """Whether the law is stated, for the rules that need it."""
        ...

    def __call__(self, keys, law: Law, nodes, count: int) -> tuple[jax.Array, jax.Array]:
        """Children of L nodes in the order of their slots.

        Args:
          keys: typed keys [B].
          law: logits [B, L, V].
          nodes: int32 [L], slots of the nodes.
          count: K.

        Returns:
          Tokens int32 [B, L, K] and bool [B, L, K] which of them are children.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Best:
    """The likeliest tokens, best first: trees that are fixed before the target speaks."""

    states_law: bool = False

    def __call__(self, keys, law: Law, nodes, count: int) -> tuple[jax.Array, jax.Array]:
        """See ``Draw``."""
        del keys, nodes
        shape = (*law.logits.shape[:2], count)
        scores, tokens = build.top_k(law.logits.reshape(-1, law.logits.shape[-1]), count)
        return tokens.reshape(shape).astype(jnp.int32), scores.reshape(shape) > -jnp.inf


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Draws from the law, siblings with or without replacement; the best ones in greedy rows."""

    replacement: bool = False
    states_law: bool = True

    def __call__(self, keys, law: Law, nodes, count: int) -> tuple[jax.Array, jax.Array]:
        """See ``Draw``."""
        best, real = Best()(keys, law, nodes, count)
        if law.greedy is None:
            return best, real

        def children(key, node, logits):
            own = jax.random.fold_in(key, node)
            return build.sample_children(own, logits, count, self.replacement)

        rows = jax.vmap(jax.vmap(children, (None, 0, 0)), (0, None, 0))
        drawn, drawable = rows(keys, nodes, law.logits)
        greedy = law.greedy[:, None, None]
        return jnp.where(greedy, best, drawn), jnp.where(greedy, real, drawable)


class _Layout(NamedTuple):
    """A tree of fixed numbers of children, nodes by depth; N stands for no node."""

    parents: np.ndarray  # int32 [N]
    depth: np.ndarray  # int32 [N]
    nodes: np.ndarray  # int32 [M, L], nodes of a depth
    children: np.ndarray  # int32 [M, L, K], of those nodes
    mask: np.ndarray  # bool [N, N], ancestors and self


@functools.cache
def _layout(branching: tuple[int, ...]) -> _Layout:
    ranks = [range(width) for width in branching]
    depths = range(1, len(branching) + 1)
    tree = build.static_template(p for depth in depths for p in itertools.product(*ranks[:depth]))
    parents, depth = np.asarray(tree.parents, np.int32), np.asarray(tree.depths, np.int32)
    count, levels = tree.num_nodes, len(branching)
    nodes = np.full((levels, max(np.bincount(depth)[:levels])), count, np.int32)
    children = np.full((*nodes.shape, max(branching)), count, np.int32)
    mask = np.eye(count, dtype=bool)
    for level in range(levels):
        for place, node in enumerate(np.flatnonzero(depth == level)):
            nodes[level, place] = node
            children[level, place, : branching[level]] = np.flatnonzero(parents == node)
    for node in range(1, count):
        mask[node] |= mask[parents[node]]
    return _Layout(parents, depth, nodes, children, mask)


class _Draft(NamedTuple):
    """What is drafted so far."""

    tokens: jax.Array  # int32 [B, N]
    valid: jax.Array  # bool [B, N]
    laws: jax.Array | None  # float [B, N, V]


class OfLanguageModel:
    """What all drafters have whose network is a language model."""

    lm: DecoderLM

    @property
    def config(self) -> DecoderConfig:
        """Of the small model."""
        return self.lm.config

    def init_params(self, key) -> Params:
        """Fresh float32 parameters. ``key`` is consumed."""
        return self.lm.init(key)


@dataclasses.dataclass(frozen=True)
class SmallLM(OfLanguageModel):
    """The ``Drafter``: ``branching[d]`` children for every node at depth d; all 1 is a chain.

    State: the model's cache, which holds the pending token too; its logits after that; the state of
    the stop rule. At least one token is drafted whatever that rule says.
    """

    lm: DecoderLM
    branching: tuple[int, ...]
    draw: Draw = dataclasses.field(default_factory=Best)
    stop: StopRule = dataclasses.field(default_factory=Never)
    # Only the width of the prompt is read off it, so the compiler leaves the layer's output out.
    taps: tuple[int, ...] = (0,)

    @property
    def max_depth(self) -> int:
        """M, the longest path of a tree."""
        return len(self.branching)

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return len(_layout(self.branching).parents)

    @property
    def states_law(self) -> bool:
        """Whether drafts state the law that their nodes were drawn from."""
        return self.draw.states_law

    def init(self, params: Params, context: DraftContext, taps):
        """Pass over the prompt; see ``types.Drafter``."""
        width, batch = taps[0].shape[1], context.length.shape[0]
        tokens = context.tokens[:, :width]
        hidden, _, kv = self.lm.hidden(params, tokens, context.length + 1)
        last = jnp.take_along_axis(hidden, context.length[:, None, None], axis=1)
        return {
            "cache": kv_cache.fill(kv, aligned(context.tokens.shape[1])),
            "logits": output_logits(params, last)[:, 0],
            "stop": self.stop.init(batch),
        }

    def propose(self, params: Params, state, context: DraftContext, keys) -> DraftTree:
        """Depth by depth until every row has stopped; see ``types.Drafter``."""
        layout, request = _layout(self.branching), context.request
        batch, vocab = state["logits"].shape
        shape = (batch, self.num_nodes)
        is_root = jnp.arange(self.num_nodes, dtype=jnp.int32)[None] == ROOT
        draft = _Draft(
            jnp.where(is_root, context.pending[:, None], 0),
            jnp.broadcast_to(is_root, shape),
            jnp.zeros((*shape, vocab), jnp.float32) if self.draw.states_law else None,
        )
        first = jnp.broadcast_to(state["logits"][:, None], (batch, layout.nodes.shape[1], vocab))
        draft = self._grow(state, draft, jnp.int32(0), first, request, keys)

        def unfinished(carry: tuple[jax.Array, _Draft]):
            level, draft = carry
            here = jnp.asarray(layout.depth)[None] == level
            return (level < self.max_depth) & jnp.any(draft.valid & here)

        def step(carry: tuple[jax.Array, _Draft]):
            level, draft = carry
            logits = self._logits(params, state, context, draft.tokens, level)
            return level + 1, self._grow(state, draft, level, logits, request, keys)

        if self.max_depth > 1:
            _, draft = jax.lax.while_loop(unfinished, step, (jnp.int32(1), draft))
        parents = jnp.broadcast_to(jnp.asarray(layout.parents)[None], shape)
        return DraftTree(draft.tokens, parents, draft.valid, draft.laws)

    def commit(
        self,
        params: Params,
        state,
        context: DraftContext,
        output: TargetOutput,
        acceptance: Acceptance,
    ):
        """Read what the round emitted, the next pending token too; see ``types.Drafter``."""
        del output
        # The old pending token once more: after ``extend`` another one may be in its place.
        index = jnp.arange(acceptance.path.shape[1] + 1, dtype=jnp.int32)
        place = context.length[:, None] + index[None]
        last = context.tokens.shape[1] - 1
        tokens = jnp.take_along_axis(context.tokens, jnp.minimum(place, last), axis=1)
        causal = jnp.broadcast_to((index[:, None] >= index[None])[None], (*place.shape, len(index)))
        hidden, kv = self._run(params, state["cache"], context.length, tokens, place, causal)
        newest = jnp.take_along_axis(hidden, acceptance.length[:, None, None], axis=1)
        logits = output_logits(params, newest)[:, 0]
        kept = acceptance.length > 0
        # Never negative, but XLA cannot know: so writes wait for all reads of the cache.
        start = context.length + (first_argmax(logits) < 0).astype(jnp.int32)
        rows = jnp.broadcast_to(index[None], place.shape)
        return {
            "cache": kv_cache.commit(state["cache"], kv, rows, start),
            "logits": jnp.where(kept[:, None], logits, state["logits"]),
            "stop": self._stop_state(state["stop"], context.tree, acceptance),
        }

    def _grow(self, state, draft: _Draft, level, logits, request: Request, keys) -> _Draft:
        """Draw the children of the nodes at depth ``level`` int32 []; ``logits`` [B, L, V]."""
        layout, batch = _layout(self.branching), draft.tokens.shape[0]
        nodes, children = (jnp.asarray(a)[level] for a in (layout.nodes, layout.children))
        law = proposal_law(logits, request)
        alive = draft.valid[:, jnp.minimum(nodes, self.num_nodes - 1)]
        alive &= self.stop.goes_on(state["stop"], law.logits) | (level == 0)
        tokens, real = self.draw(keys, law, nodes, children.shape[1])
        slots, valid = children.reshape(-1), (alive[..., None] & real).reshape(batch, -1)
        laws = draft.laws
        if laws is not None:
            laws = laws.at[:, nodes].set(law.logits, mode="drop")
        return _Draft(
            draft.tokens.at[:, slots].set(tokens.reshape(batch, -1), mode="drop"),
            draft.valid.at[:, slots].set(valid, mode="drop"),
            laws,
        )

    def _logits(self, params: Params, state, context: DraftContext, tokens, level):
        """Logits [B, L, V] after the nodes at depth ``level``."""
        layout, batch = _layout(self.branching), tokens.shape[0]
        inner = slice(1, int(np.sum(layout.depth < self.max_depth)))
        positions = context.length[:, None] + layout.depth[None, inner]
        mask = jnp.broadcast_to(layout.mask[None, inner, inner], (batch, *2 * positions.shape[1:]))
        past = context.length + 1  # the root is in the cache
        hidden, _ = self._run(params, state["cache"], past, tokens[:, inner], positions, mask)
        rows = jnp.clip(jnp.asarray(layout.nodes)[level] - 1, 0, hidden.shape[1] - 1)
        return output_logits(params, hidden[:, rows])

    def _run(self, params: Params, cache, length, tokens, positions, mask) -> tuple[Any, Any]:
        """Hidden states of new rows against the cache, and their keys and values."""
        apply: Callable[..., Any] = self.lm.module.apply
        hidden, _, kv = apply({"params": params}, tokens, positions, mask, cache, length, ())
        return hidden, kv

    def _stop_state(self, before: Any, tree: DraftTree | None, acceptance: Acceptance) -> Any:
        if tree is None:
            return before
        depth = jax.vmap(lambda parents: topology.depths(parents, self.max_depth))(tree.parents)
        deepest = jnp.max(jnp.where(tree.valid, depth, 0), axis=1)
        drafted = jnp.where(acceptance.length > 0, deepest, 0)
        accepted = jnp.maximum(acceptance.length - 1, 0)
        return self.stop.update(before, accepted, drafted, self.max_depth)
