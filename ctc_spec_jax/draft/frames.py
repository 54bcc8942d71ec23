"""A network that drafts all frames in one pass, from features of the target.

Queries come from the frames alone: frame embedding, pending token and newest feature. Target
features are keys and values of every layer, kept in the drafter's own cache (DFlash, arXiv
2602.06036). What a frame says, and how frames become a tree, is up to the methods that use it.

Shape letters: B batch, A anchors, F frames, T tokens, S cache slots, M max depth, N tree nodes,
V vocabulary, D width, K kv heads, C head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctc_spec_jax.models import kv_cache, layers
from ctc_spec_jax.models.config import DecoderConfig, RopeScaling
from ctc_spec_jax.models.decoder import fresh_params, output_logits
from ctc_spec_jax.sharding import HIDDEN, constrain, gather_width
from ctc_spec_jax.types import Acceptance, DraftContext, DraftTree, Params, TargetOutput

_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class FramesConfig:
    """Static description of a network over frames; hashable by value.

    ``taps`` are target layers; a tap is the residual stream after that layer. ``causal`` frames
    attend to the frames before them alone, others to all frames of the draft.
    """

    width: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    frames: int
    taps: tuple[int, ...]
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    causal: bool = False

    def __post_init__(self):
        if not self.taps:
            raise ValueError("taps: expected at least one target layer, found none")
        if self.frames < 1 or self.num_layers < 1:
            raise ValueError(
                f"frames and num_layers: expected at least 1, found {self.frames} and "
                f"{self.num_layers}"
            )


Config = TypeVar("Config", bound=FramesConfig)


def frames_config(
    kind: type[Config],
    target: DecoderConfig,
    num_layers: int = 1,
    frames: int = 12,
    taps: tuple[int, ...] = (),
    mlp_width: int = 0,
) -> Config:
    """A network for ``target``: its width and heads; taps spread over its layers by default."""
    last = target.num_layers - 1
    return kind(
        width=target.width,
        vocab_size=target.vocab_size,
        num_layers=num_layers,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_width=target.head_width,
        mlp_width=mlp_width or target.mlp_width,
        frames=frames,
        taps=taps or tuple(sorted({last // 4, last // 2, last})),
        norm_eps=target.norm_eps,
        rope_theta=target.rope_theta,
    )


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

    def features(self, taps):
        """Context features [B, T, D] of taps, each [B, T, D]."""
        eps = self.config.norm_eps
        normed = [layers.rms_norm(t, self.tap_norms[i], eps) for i, t in enumerate(taps)]
        projected = gather_width(layers.linear(jnp.concatenate(normed, axis=-1), self.context))
        return layers.rms_norm(projected, self.context_norm, eps)

    def context_kv(self, features, positions):
        """Keys and values of every layer from features [B, T, D]: pairs as in ``kv_cache``."""
        angles = self._angles(positions)

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
        known = jnp.concatenate(
            [
                layers.rms_norm(pending, self.start_norm[0], c.norm_eps),
                layers.rms_norm(newest, self.start_norm[1], c.norm_eps),
            ],
            axis=-1,
        )
        x = (
            gather_width(layers.linear(known, self.start))[:, :, None]
            + self.frame_embedding[None, None]
        )
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

    def __call__(self, taps, pending, anchors, target_params, said=None):
        """Frame log-probabilities [B, A, F, classes] of A anchors per row; touches every parameter.

        ``taps``: the target's hidden states of rows of one text each, [B, T, D]; ``pending``
        [B, A, D]; ``said`` as for ``draft``.
        """
        index = jnp.arange(taps[0].shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(index, taps[0].shape[:2])
        one = jnp.ones_like(positions)
        hidden = self.anchor_hidden(taps, pending, anchors, one, positions, said)
        return self.log_probs(hidden, target_params)

    def anchor_hidden(self, taps, pending, anchors, segments, positions, said=None):
        """Hidden states [B, A, F, D] of the frames of A anchors per row, for training.

        Args:
          taps: the target's hidden states of whole rows, each [B, T, D].
          pending: embeddings [B, A, D] of the tokens at the anchors.
          anchors: int32 [B, A], their places in the row.
          segments, positions: int32 [B, T], as for ``DecoderLM.packed_hidden``.
          said: as for ``draft``.

        Returns:
          [B, A, F, D]. An anchor sees what comes before it in its own segment.
        """
        features = self.features(taps)
        context = self.context_kv(features, positions)
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
        kv = self._apply(params, "context_kv", features, positions)
        newest = jnp.take_along_axis(
            features, jnp.maximum(context.length - 1, 0)[:, None, None], axis=1
        )
        # A prompt of one token leaves nothing committed, so there is no newest feature yet.
        newest = jnp.where((context.length > 0)[:, None, None], newest, 0)
        return {"kv": kv_cache.fill(kv, context.tokens.shape[1]), "newest": newest}

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
        kv = self._apply(params, "context_kv", features, context.length[:, None] + steps[None])
        rows = jnp.broadcast_to(steps[None], path.shape)
        last = jnp.maximum(acceptance.length - 1, 0)
        return {
            "kv": kv_cache.commit(state["kv"], kv, rows, context.length),
            "newest": jnp.take_along_axis(features, last[:, None, None], axis=1),
        }

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
