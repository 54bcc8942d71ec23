"""Drafters that grow a draft one depth after another with one decoder layer (``draft.layer``).

Each depth is one pass over the paths to be continued, for all of them at once. Trees hold the most
probable of all paths that were found; a search over as many paths as ``best_paths`` asks for finds
the most probable ones of all. The text's keys and values, and its features where a method has some,
are kept in the drafter's cache and are a function of the text alone.

Shape letters: B batch, N tree nodes, M max depth, W paths of a level, R rows of a draft, T tokens,
S cache slots, A anchors, K tokens of a draft in training, V vocabulary, D width, E width of a
feature.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax import chunked_head
from ctc_spec_jax.draft.layer import LayerNetwork
from ctc_spec_jax.draft.small_lm import Drawn, proposal_law
from ctc_spec_jax.models import kv_cache, layers
from ctc_spec_jax.models.decoder import fresh_params, output_head, output_logits
from ctc_spec_jax.tree import best_paths, build
from ctc_spec_jax.types import Acceptance, DraftContext, DraftTree, Params, TargetOutput


@dataclasses.dataclass(frozen=True)
class Confidence:
    """How many children a node gets at most, by the probability of its likeliest one.

    ``counts[i]`` where it is below ``bounds[i]`` and not below the bound before; the last one of
    ``counts`` where it reaches all bounds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self):
        rising = all(a < b for a, b in zip(self.bounds, self.bounds[1:], strict=False))
        if not rising or len(self.counts) != len(self.bounds) + 1 or min(self.counts) < 1:
            raise ValueError(
                f"children: expected rising bounds and one more count, each at least 1, found "
                f"{self.bounds} and {self.counts}"
            )

    def __call__(self, log_probs):
        """int32 [...] of laws float32 [..., V]."""
        best = jnp.exp(jnp.max(log_probs, axis=-1))[..., None]
        bounds = jnp.asarray(self.bounds, jnp.float32)
        passed = jnp.sum(best >= bounds.reshape((1,) * (best.ndim - 1) + bounds.shape), axis=-1)
        return jnp.asarray(self.counts, jnp.int32)[passed]


class Growing(NamedTuple):
    """A draft that grows; ``W`` rows belong to the last pass."""

    hidden: jax.Array  # [B, W, D], the layer's output, or the newest feature [B, 1, E]
    rows: Any  # keys and values of all R rows, None before the first pass
    mask: jax.Array  # bool [B, W, R], ancestors and self


@dataclasses.dataclass(frozen=True)
class SequentialDrafter:
    """The ``Drafter`` but for its network.

    Per depth the ``beam`` most probable paths are continued; 0 continues as many as the most
    probable tree needs. ``children`` bounds the children of each. A ``template`` fixes the tree by
    ranks instead. All of these are functions of the context that state no law. ``sampled`` drafts
    are chains drawn from the law that they state, for ``Rejection``.

    State: ``text``, keys and values of the committed tokens, and ``features``, as values of a layer
    without keys.
    """

    config: Any
    num_nodes: int
    max_depth: int
    beam: int = 0
    children: Confidence | None = None
    template: build.Template | None = None
    sampled: bool = False

    def __post_init__(self):
        if not 1 <= self.max_depth < self.num_nodes:
            most = self.num_nodes - 1
            raise ValueError(f"max_depth: expected 1 to {most}, found {self.max_depth}")
        if self.sampled and self.num_nodes != self.max_depth + 1:
            raise ValueError(
                f"num_nodes: expected {self.max_depth + 1} of a sampled chain, "
                f"found {self.num_nodes}"
            )
        own = self.template
        if own and (own.num_nodes, own.max_depth) != (self.num_nodes, self.max_depth):
            raise ValueError(
                f"template: expected {self.num_nodes} nodes of depth {self.max_depth}, "
                f"found {own.num_nodes} of depth {own.max_depth}"
            )

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers that are read."""
        return self.config.taps

    @property
    def states_law(self) -> bool:
        """Whether drafts state the law that their nodes were drawn from."""
        return self.sampled

    @property
    def network(self) -> LayerNetwork:
        """The Linen module that owns the parameters."""
        raise NotImplementedError

    def seen(self, kv) -> Any:
        """What the layer reads of the target's keys and values, a tuple over its layers."""
        del kv

    def init_params(self, key) -> Params:
        """Fresh float32 parameters. ``key`` is consumed."""
        return fresh_params(self.network, key, jnp.zeros((1, 1, self.config.width)))

    def output_head(self, params: Params, target_params: Params):
        """LM head [D, V], the target's."""
        del params
        return output_head(target_params)

    def init(self, params: Params, context: DraftContext, taps):
        """Cache of the prompt; see ``types.Drafter``."""
        features = self._apply(params, "features", taps)
        slots = context.tokens.shape[1] - 1  # as many as the target has
        tokens = context.tokens[:, : features.shape[1]]
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(index, tokens.shape)
        text = self._text(params, context.params, tokens, _shifted(features), positions)
        return {
            "text": kv_cache.fill((text,), slots),
            "features": kv_cache.fill((_as_layer(features),), slots),
        }

    def propose(self, params: Params, state, context: DraftContext, keys) -> DraftTree:
        """One pass of the layer per depth; see ``types.Drafter``."""
        before = jnp.maximum(context.length - 1, 0)[:, None, None]
        features = state["features"][0][1][:, 0]
        newest = jnp.take_along_axis(features, before, axis=1)
        newest = jnp.where((context.length > 0)[:, None, None], newest, 0)
        slots = jnp.arange(kv_cache.num_slots(state["text"]), dtype=jnp.int32)
        visible = (slots[None] < context.length[:, None])[:, None]
        one = jnp.ones((len(context.length), 1, 1), bool)
        grow = functools.partial(self._grow, params, state["text"][0], context, visible)
        growing = Growing(newest, None, one)
        if self.sampled:
            return self._drawn(grow, growing, context, keys)
        levels = [jax.vmap(best_paths.root)(context.pending)]
        for depth in range(self.max_depth):
            level = self._continued(levels[-1])
            growing, logits = grow(growing, level, depth)
            levels.append(self._next(level, jax.nn.log_softmax(logits, axis=-1), depth))
        return self._tree(levels)

    def commit(
        self,
        params: Params,
        state,
        context: DraftContext,
        output: TargetOutput,
        acceptance: Acceptance,
    ):
        """Append the accepted path with the target's features; see ``types.Drafter``."""
        path = acceptance.path
        taps = tuple(jnp.take_along_axis(t, path[..., None], axis=1) for t in output.taps)
        features = self._apply(params, "features", taps)
        steps = jnp.arange(path.shape[1], dtype=jnp.int32)[None]
        place = context.length[:, None] + steps
        tokens = jnp.take_along_axis(
            context.tokens, jnp.minimum(place, context.tokens.shape[1] - 1), axis=1
        )
        # Not the last feature in the cache: after ``extend`` the text ends before that.
        last = jnp.maximum(context.length - 1, 0)[:, None, None]
        newest = jnp.take_along_axis(state["features"][0][1][:, 0], last, axis=1)
        newest = jnp.where((context.length > 0)[:, None, None], newest, 0)
        before = jnp.concatenate([newest, features[:, :-1]], axis=1)
        text = self._text(params, context.params, tokens, before, place)
        rows = jnp.broadcast_to(steps, path.shape)
        return {
            "text": kv_cache.commit(state["text"], (text,), rows, context.length),
            "features": kv_cache.commit(
                state["features"], (_as_layer(features),), rows, context.length
            ),
        }

    def outputs(self, params: Params, target_params: Params, batch, taps, kv, anchors, known):
        """Outputs of the layer where the text is known, for training, with the passes of a draft.

        Args:
          params: of the drafter.
          target_params: of the target.
          batch: ``tokens``, ``segments``, ``positions``, see ``training.DraftLoss``.
          taps, kv: of the target on the batch.
          anchors: int32 [B, A], places of pending tokens: a draft sees of text and target what
            comes before its anchor in the same segment.
          known: int32 [B, A, K], the pending token and the K-1 tokens after it.

        Returns:
          Inputs of the LM head [B, A, K, D].
        """
        segments, positions = batch["segments"], batch["positions"]
        features = self._apply(params, "features", taps)
        before = jnp.where((positions > 0)[..., None], _shifted(features), 0)
        text = self._text(params, target_params, batch["tokens"], before, positions)
        slots = jnp.arange(positions.shape[1], dtype=jnp.int32)
        own = jnp.take_along_axis(segments, anchors, axis=1)[..., None]
        visible = (slots[None, None] < anchors[..., None]) & (segments[:, None] == own)
        embedded = layers.embed(target_params["embedding"], known.reshape(len(known), -1))
        embedded = embedded.reshape(*known.shape, -1)
        newest = jnp.take_along_axis(before, anchors[..., None], axis=1)
        place = jnp.take_along_axis(positions, anchors, axis=1)
        some = functools.partial(self._forced, params, text, self.seen(kv))
        parts = tuple(jnp.moveaxis(x, 1, 0) for x in (embedded, newest, place, visible))
        if anchors.shape[1] > ANCHORS_AT_A_TIME:
            # Scores of all anchors, kept for the backward pass, would grow with A times T.
            found = chunked_head.map_chunks(jax.checkpoint(some), ANCHORS_AT_A_TIME, parts)
        else:
            found = some(parts)
        return jnp.moveaxis(found, 0, 1)

    def _forced(self, params: Params, text, seen, parts):
        """``outputs`` [A, B, K, D] of some anchors, ``parts`` with A first."""
        embedded, hidden, place, visible = (jnp.moveaxis(x, 0, 1) for x in parts)
        batch, anchors, count, _ = embedded.shape
        own, rows, found = jnp.eye(anchors, dtype=bool), None, []
        for k in range(count):
            x = self._apply(params, "follow", embedded[:, :, k], hidden)
            mask = jnp.broadcast_to(jnp.tile(own, k + 1)[None], (batch, anchors, anchors * (k + 1)))
            given = x, place + k, rows, mask, text, visible, seen
            hidden, rows = self._apply(params, "step", *given)
            found.append(self._apply(params, "normed", hidden))
        return jnp.moveaxis(jnp.stack(found, axis=2), 1, 0)

    def _text(self, params: Params, target_params: Params, tokens, before, positions):
        """Keys and values of known tokens int32 [B, T] and the features [B, T, E] before them."""
        embedded = layers.embed(target_params["embedding"], tokens)
        x = self._apply(params, "follow", embedded, before)
        return self._apply(params, "keys_values", x, positions)

    def _grow(self, params: Params, text, context, visible, growing: Growing, level, depth: int):
        """One more pass, over a level's paths: the draft so far, and logits [B, W, V]."""
        hidden, mask = growing.hidden, growing.mask
        if depth:
            parent = level.parent[..., None]
            hidden = jnp.take_along_axis(hidden, parent, axis=1)
            own = jnp.eye(parent.shape[1], dtype=bool)[None]
            own = jnp.broadcast_to(own, (len(hidden), *own.shape[1:]))
            mask = jnp.concatenate([jnp.take_along_axis(mask, parent, axis=1), own], axis=2)
        embedded = layers.embed(context.params["embedding"], level.token)
        x = self._apply(params, "follow", embedded, hidden)
        positions = jnp.broadcast_to(context.length[:, None] + depth, level.token.shape)
        visible = jnp.broadcast_to(visible, (*positions.shape, visible.shape[2]))
        given = x, positions, growing.rows, mask, text, visible, self.seen(context.cache)
        hidden, rows = self._apply(params, "step", *given)
        logits = output_logits(context.params, self._apply(params, "normed", hidden))
        return Growing(hidden, rows, mask), logits

    def _continued(self, level: best_paths.Level) -> best_paths.Level:
        """Its most probable paths, which get children."""
        beam = self.beam or level.score.shape[1]
        return best_paths.Level(*(x[:, :beam] for x in level))

    def _next(self, level: best_paths.Level, law, depth: int) -> best_paths.Level:
        """The children of a level's paths, of laws [B, W, V]."""
        if self.template is not None:
            return _by_rank(self.template, law, depth)
        width = self.num_nodes - 1 - depth
        counts = None if self.children is None else self.children(law)
        expand = functools.partial(best_paths.expand, width=width)
        return jax.vmap(expand)(level, law, counts=counts)

    def _tree(self, levels: list[best_paths.Level]) -> DraftTree:
        if self.template is None:
            return DraftTree(*jax.vmap(lambda x: best_paths.select(x, self.num_nodes))(levels))
        tokens = jnp.concatenate([level.token for level in levels], axis=1)
        parents = jnp.asarray(self.template.parents, jnp.int32)[None]
        return DraftTree(
            tokens, jnp.broadcast_to(parents, tokens.shape), jnp.ones_like(tokens, bool)
        )

    def _drawn(self, grow, growing: Growing, context: DraftContext, keys) -> DraftTree:
        """A chain whose tokens are drawn from the law that is stated, the best in greedy rows."""
        tokens, laws = [context.pending[:, None]], []
        valid = [jnp.ones_like(tokens[0], bool)]
        above = jnp.zeros_like(tokens[0])
        for depth in range(self.max_depth):
            level = best_paths.Level(above.astype(jnp.float32), tokens[-1], above)
            growing, logits = grow(growing, level, depth)
            law = proposal_law(logits, context.request)
            drawn, real = Drawn()(keys, law, jnp.full((1,), depth, jnp.int32), 1)
            tokens.append(drawn[:, 0])
            valid.append(valid[-1] & real[:, 0])
            laws.append(law.logits)
        # Nothing is drawn after the last node.
        laws = jnp.concatenate([*laws, jnp.zeros_like(laws[0])], axis=1)
        parents = jnp.asarray(build.chain(self.num_nodes))[None]
        parents = jnp.broadcast_to(parents, (len(above), self.num_nodes))
        return DraftTree(jnp.concatenate(tokens, 1), parents, jnp.concatenate(valid, 1), laws)

    def _apply(self, params: Params, method: str, *args) -> Any:
        return self.network.apply({"params": params}, *args, method=method)


ANCHORS_AT_A_TIME = 64
"""In training."""


def _shifted(features):
    """The feature of the token before each, [B, T, E]; zeros before the first."""
    return jnp.pad(features, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def _as_layer(features):
    """Features [B, T, E] in the form of a cache layer: values of one head without keys."""
    values = features[:, None]
    return jnp.zeros((len(values), 1, 0, values.shape[2]), values.dtype), values


def _by_rank(template: build.Template, law, depth: int) -> best_paths.Level:
    """The nodes of a template below those at ``depth``, of these nodes' laws [B, W, V]."""
    depths, parents = np.asarray(template.depths), np.asarray(template.parents)
    nodes = np.flatnonzero(depths == depth + 1)
    place = np.searchsorted(np.flatnonzero(depths == depth), parents[nodes]).astype(np.int32)
    rank = np.asarray(template.ranks)[nodes]
    _, tokens = build.top_k(law.reshape(-1, law.shape[-1]), int(rank.max()) + 1)
    tokens = tokens.reshape(*law.shape[:2], -1).astype(jnp.int32)[:, place, rank]
    parent = jnp.broadcast_to(jnp.asarray(place)[None], tokens.shape)
    return best_paths.Level(jnp.zeros(tokens.shape, jnp.float32), tokens, parent)
