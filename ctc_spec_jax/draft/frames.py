"""A network that drafts all frames in one pass, from features of the target.

Queries come from the frames alone: frame embedding, pending token and newest feature. Target
features are keys and values of every layer, kept in the drafter's own cache (DFlash, arXiv
2602.06036), each joined with the token after it (as in EAGLE, arXiv 2401.15077). What a frame says,
and how frames become a tree, is up to the methods that use it.

Shape letters: B batch, A anchors, F frames, T tokens, S cache slots, M max depth, N tree nodes,
V vocabulary, D width, K kv heads, C head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctc_spec_jax.draft.frames_config import FramesConfig
from ctc_spec_jax.models import kv_cache, layers
from ctc_spec_jax.models.config import RopeScaling
from ctc_spec_jax.models.decoder import fresh_params, output_logits
from ctc_spec_jax.sharding import HIDDEN, constrain, gather_width
from ctc_spec_jax.types import Acceptance, DraftContext, DraftTree, Params, TargetOutput
from ctc_spec_jax.xla import aligned

_INIT = nn.initializers.normal(0.02)


class FramesNetwork(nn.Module):
    """Parameters and forward pass; the LM head is the target's, frozen.

    ``remat`` recomputes every layer in a backward pass instead of keeping its intermediates.
    Scores exist for ``attention_chunk`` anchors at a time.
    """

    config: FramesConfig
    remat: bool = False
    attention_chunk: int = 16

    def setup(self):
        c = self.config
        kv, head, ones = c.num_kv_heads, c.head_width, nn.initializers.ones
        residual = nn.initializers.normal(0.02 / (2 * c.num_layers) ** 0.5)
        group = c.num_heads // kv

        def layer(i: int) -> dict[str, Any]:
            shapes = {
                "attention_norm": (ones, (c.width,)),
                "qkv": (_INIT, (c.width, kv, group + 2, head)),
                "context_kv": (_INIT, (c.width, kv, 2, head)),
                "output": (residual, (c.num_heads * head, c.width)),
                "mlp_norm": (ones, (c.width,)),
                "gate_up": (_INIT, (c.width, 2, c.mlp_width)),
                "down": (residual, (c.mlp_width, c.width)),
            }
            return {
                name: self.param(f"layer_{i}_{name}", init, shape)
                for name, (init, shape) in shapes.items()
            }

        self.layers = [layer(i) for i in range(c.num_layers)]
        self.context = self.param("context", _INIT, (len(c.taps) * c.width, c.width))
        self.context_norm = self.param("context_norm", ones, (c.width,))
        self.tap_norms = self.param("tap_norms", ones, (len(c.taps), c.width))
        self.start = self.param("start", _INIT, (2 * c.width, c.width))
        self.frame_embedding = self.param("frame_embedding", _INIT, (c.frames, c.width))
        self.start_norm = self.param("start_norm", ones, (2, c.width))
        self.norm = self.param("norm", ones, (c.width,))
        if c.follows:
            self.follow_norm = self.param("follow_norm", ones, (c.width,))

    def features(self, taps):
        """Context features [B, T, D] of taps, each [B, T, D]."""
        eps = self.config.norm_eps
        normed = [layers.rms_norm(t, self.tap_norms[i], eps) for i, t in enumerate(taps)]
        projected = gather_width(layers.linear(jnp.concatenate(normed, axis=-1), self.context))
        return layers.rms_norm(projected, self.context_norm, eps)

    def context_kv(self, features, positions, following):
        """Keys and values of every layer of a context: pairs as in ``kv_cache``.

        Args:
          features: [B, T, D].
          positions: int32 [B, T].
          following: embeddings [B, T, D] of the tokens after them.
        """
        angles = self._angles(positions)
        if self.config.follows:
            # What a draft that began there would start with.
            begun = self._begin(following, features)
            features = layers.rms_norm(begun, self.follow_norm, self.config.norm_eps)

        def one(layer):
            both = layers.linear(features, layer["context_kv"])  # [B, T, K, 2, C]
            key = layers.rotate(both[..., 0, :], angles)
            return kv_cache.from_heads(key, both[..., 1, :])

        return tuple(one(layer) for layer in self.layers)

    def draft(self, pending, newest, context, positions, visible, said=None):
        """Hidden states of the frames of A anchors per row, after the final norm.

        Args:
          pending: embeddings [B, A, D] of the token at each anchor.
          newest: features [B, A, D] of the position before it.
          context: keys and values of every layer, pairs as in ``kv_cache``.
          positions: int32 [B, A] of the pending tokens.
          visible: bool [B, A, S], the slots that come before an anchor in its text.
          said: [B, A, F, D], what is known of every frame, for methods that know something.

        Returns:
          [B, A, F, D].
        """
        c = self.config
        batch, num_anchors, width = pending.shape
        x = self._begin(pending, newest)[:, :, None] + self.frame_embedding[None, None]
        x = x if said is None else x + said
        x = x.reshape(batch, num_anchors * c.frames, width)
        frame = jnp.arange(c.frames, dtype=jnp.int32)
        places = positions[..., None] + frame[None, None]
        angles = self._angles(places.reshape(batch, num_anchors * c.frames))
        run = jax.checkpoint(self._layer) if self.remat else self._layer
        for layer, past in zip(self.layers, context, strict=True):
            x = constrain(run(layer, x, angles, past, visible), HIDDEN)
        x = layers.rms_norm(x, self.norm, c.norm_eps)
        return x.reshape(batch, num_anchors, c.frames, width)

    def _begin(self, pending, newest):
        """What a token, embedded [B, X, D], and the feature before it say together."""
        both = zip((pending, newest), self.start_norm, strict=True)
        known = [layers.rms_norm(x, scale, self.config.norm_eps) for x, scale in both]
        return gather_width(layers.linear(jnp.concatenate(known, axis=-1), self.start))

    def log_probs(self, hidden, target_params: Params):
        """Log-probabilities [..., V] float32 of tokens at frames of hidden [..., D]."""
        return jax.nn.log_softmax(output_logits(target_params, hidden), axis=-1)

    def _layer(self, layer, x, angles, past, visible):
        c = self.config
        group = c.num_heads // c.num_kv_heads
        fused = layers.linear(layers.rms_norm(x, layer["attention_norm"], c.norm_eps), layer["qkv"])
        query = layers.rotate(fused[..., :group, :], angles)
        key = layers.rotate(fused[..., group, :], angles)
        value = fused[..., group + 1, :]
        mixed = layers.attend_groups(
            query, key, value, past, visible, self.attention_chunk, c.causal
        )
        x = x + layers.linear(mixed.reshape(*x.shape[:2], -1), layer["output"])
        h = layers.rms_norm(x, layer["mlp_norm"], c.norm_eps)
        return x + layers.gated_mlp(h, layer["gate_up"], layer["down"])

    def _angles(self, positions):
        c = self.config
        frequencies = layers.rope_frequencies(c.head_width, c.rope_theta, RopeScaling())
        return layers.rope_angles(positions, frequencies)

    def __call__(self, taps, embedded, anchors, target_params, said=None):
        """Frame log-probabilities [B, A, F, classes] of A anchors per row; touches every parameter.

        ``taps``: the target's hidden states of rows of one text each, [B, T, D]; ``embedded``
        [B, T, D], their tokens; ``said`` as for ``draft``.
        """
        index = jnp.arange(taps[0].shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(index, taps[0].shape[:2])
        one = jnp.ones_like(positions)
        hidden = self.anchor_hidden(taps, embedded, anchors, one, positions, said)
        return self.log_probs(hidden, target_params)

    def anchor_hidden(self, taps, embedded, anchors, segments, positions, said=None):
        """Hidden states [B, A, F, D] of the frames of A anchors per row, for training.

        Args:
          taps: the target's hidden states of whole rows, each [B, T, D].
          embedded: [B, T, D], their tokens.
          anchors: int32 [B, A], their places in the row.
          segments, positions: int32 [B, T], as for ``DecoderLM.packed_hidden``.
          said: as for ``draft``.

        Returns:
          [B, A, F, D]. An anchor sees what comes before it in its own segment.
        """
        features = self.features(taps)
        context = self.context_kv(features, positions, jnp.roll(embedded, -1, axis=1))
        pending = jnp.take_along_axis(embedded, anchors[..., None], axis=1)
        place = jnp.take_along_axis(positions, anchors, axis=1)
        before = jnp.maximum(anchors - 1, 0)
        newest = jnp.take_along_axis(features, before[..., None], axis=1)
        newest = jnp.where((place > 0)[..., None], newest, 0)
        slots = jnp.arange(features.shape[1], dtype=jnp.int32)
        own = jnp.take_along_axis(segments, anchors, axis=1)
        visible = (slots[None, None] < anchors[..., None]) & (segments[:, None] == own[..., None])
        return self.draft(pending, newest, context, place, visible, said)


class TreeBuilder(Protocol):
    """Turns one row's frame log-probabilities into a tree; frozen, hashable."""

    @property
    def max_depth(self) -> int:
        """M, the longest path."""
        ...

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        ...

    def __call__(self, log_probs, pending) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(tokens, parents, valid), each [N], of log_probs [F, classes] and a pending token []."""
        ...


@dataclasses.dataclass(frozen=True)
class FramesDrafter:
    """The ``Drafter``: network and tree builder. State: context keys and values, newest feature."""

    config: FramesConfig
    tree: TreeBuilder

    @property
    def max_depth(self) -> int:
        """M, the longest path of a tree."""
        return self.tree.max_depth

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return self.tree.num_nodes

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose outputs feed the drafter."""
        return self.config.taps

    @property
    def network(self) -> FramesNetwork:
        """The Linen module that owns the parameters."""
        return FramesNetwork(self.config)

    def init_params(self, key) -> Params:
        """Fresh float32 parameters. ``key`` is consumed."""
        c = self.config
        taps = tuple(jnp.zeros((1, 1, c.width)) for _ in c.taps)
        head = {"head": jnp.zeros((c.width, c.vocab_size))}
        anchors = jnp.zeros((1, 1), jnp.int32)
        return fresh_params(self.network, key, taps, jnp.zeros((1, 1, c.width)), anchors, head)

    def init(self, params: Params, context: DraftContext, taps):
        """Context of the prompt; see ``types.Drafter``."""
        features = self._apply(params, "features", taps)
        positions = jnp.arange(features.shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(positions, features.shape[:2])
        tokens = context.tokens[:, 1 : features.shape[1] + 1]
        kv = self._context_kv(params, context, features, positions, tokens)
        newest = jnp.take_along_axis(
            features, jnp.maximum(context.length - 1, 0)[:, None, None], axis=1
        )
        # A prompt of one token leaves nothing committed, so there is no newest feature yet.
        newest = jnp.where((context.length > 0)[:, None, None], newest, 0)
        return {"kv": kv_cache.fill(kv, aligned(context.tokens.shape[1])), "newest": newest}

    def propose(self, params: Params, state, context: DraftContext, keys) -> DraftTree:
        """One pass of the network, then the tree of each row; deterministic."""
        del keys
        log_probs = self._log_probs(params, state, context)
        return DraftTree(*jax.vmap(self.tree)(log_probs, context.pending))

    def commit(
        self,
        params: Params,
        state,
        context: DraftContext,
        output: TargetOutput,
        acceptance: Acceptance,
    ):
        """Append the features of the accepted path; see ``types.Drafter``."""
        path = acceptance.path
        taps = tuple(jnp.take_along_axis(t, path[..., None], axis=1) for t in output.taps)
        features = self._apply(params, "features", taps)
        steps = jnp.arange(path.shape[1], dtype=jnp.int32)
        place = context.length[:, None] + steps[None]
        after = jnp.minimum(place + 1, context.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(context.tokens, after, axis=1)
        kv = self._context_kv(params, context, features, place, tokens)
        rows = jnp.broadcast_to(steps[None], path.shape)
        last = jnp.maximum(acceptance.length - 1, 0)
        return {
            "kv": kv_cache.commit(state["kv"], kv, rows, context.length),
            "newest": jnp.take_along_axis(features, last[:, None, None], axis=1),
        }

    def _context_kv(self, params: Params, context: DraftContext, features, positions, following):
        embedded = layers.embed(context.params["embedding"], following)
        return self._apply(params, "context_kv", features, positions, embedded)

    def _log_probs(self, params: Params, state, context: DraftContext, said=None):
        """Of the frames after the pending tokens, [B, F, classes]; ``said`` as for the network."""
        pending = layers.embed(context.params["embedding"], context.pending[:, None])
        place = context.length[:, None]
        slots = jnp.arange(kv_cache.num_slots(state["kv"]), dtype=jnp.int32)
        known = pending, state["newest"], state["kv"], place, slots[None, None] < place[..., None]
        hidden = self._apply(params, "draft", *known, said)
        return self._apply(params, "log_probs", hidden[:, 0], context.params)

    def _apply(self, params: Params, method: str, *args) -> Any:
        return self.network.apply({"params": params}, *args, method=method)
