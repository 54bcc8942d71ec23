"""The target: one decoder for the Llama family, by configuration.

Shape letters: B batch, N new rows, T tokens, S cache slots, V vocabulary, D width, K kv heads,
G query heads per kv head, C head width, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctc_spec_jax.models import kv_cache, layers
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.sharding import HIDDEN, constrain
from ctc_spec_jax.types import Params, TargetOutput

_INIT = nn.initializers.normal(0.02)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU; owns the parameters of one layer.

    ``qkv`` [D, K, G+2, C] holds, for every kv head, its G query heads, its key and its value, so
    one product makes all three and the K axis can be sharded. ``gate_up`` is [D, 2, W].
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, angles, new_mask, past, past_mask):
        """x [B, N, D] -> ([B, N, D], (k, v) as in ``kv_cache``)."""
        c = self.config
        kv, group, head = c.num_kv_heads, c.group, c.head_width
        # Residual branches start small so that depth does not blow up the variance.
        residual = nn.initializers.normal(0.02 / (2 * c.num_layers) ** 0.5)

        h = layers.rms_norm(
            x, self.param("attention_norm", nn.initializers.ones, (c.width,)), c.norm_eps
        )
        qkv = self.param("qkv", _INIT, (c.width, kv, group + 2, head))
        fused = layers.linear(h, qkv, self._bias("qkv_bias", c.qkv_bias, (kv, group + 2, head)))
        query, key, value = fused[..., :group, :], fused[..., group, :], fused[..., group + 1, :]
        if c.qk_norm:
            query = layers.rms_norm(
                query, self.param("q_norm", nn.initializers.ones, (head,)), c.norm_eps
            )
            key = layers.rms_norm(
                key, self.param("k_norm", nn.initializers.ones, (head,)), c.norm_eps
            )
        query, key = layers.rotate(query, angles), layers.rotate(key, angles)
        new = kv_cache.from_heads(key, value)
        mixed = layers.attend(query, new, new_mask, past, past_mask)
        output = self.param("output", residual, (c.num_heads * head, c.width))
        x = x + layers.linear(
            mixed.reshape(*mixed.shape[:2], -1),
            output,
            self._bias("output_bias", c.output_bias, (c.width,)),
        )

        h = layers.rms_norm(x, self.param("mlp_norm", nn.initializers.ones, (c.width,)), c.norm_eps)
        x = x + layers.gated_mlp(
            h,
            self.param("gate_up", _INIT, (c.width, 2, c.mlp_width)),
            self.param("down", residual, (c.mlp_width, c.width)),
            self._bias("gate_up_bias", c.mlp_bias, (2, c.mlp_width)),
            self._bias("down_bias", c.mlp_bias, (c.width,)),
        )
        return x, new

    def _bias(self, name: str, used: bool, shape: tuple[int, ...]):
        return self.param(name, nn.initializers.zeros, shape) if used else None


class Decoder(nn.Module):
    """Token embedding, layers and final norm; the LM head is ``output_logits``."""

    config: DecoderConfig
    remat: bool = False

    @nn.compact
    def __call__(self, tokens, positions, mask, past=None, length=None, taps=()):
        """Hidden states of N new rows.

        Args:
          tokens: int32 [B, N].
          positions: int32 [B, N].
          mask: bool [B, N, N], which new rows a new row attends to.
          past: cache of S slots, or None; see ``kv_cache``.
          length: int32 [B], slots of ``past`` in use.
          taps: layers whose outputs are returned (the residual stream after that layer).

        Returns:
          hidden [B, N, D] after the final norm, taps (each [B, N, D]), and per layer (k, v).
        """
        c = self.config
        embedding = self.param("embedding", _INIT, (c.vocab_size, c.width))
        if not c.tied_embeddings:
            self.param("head", _INIT, (c.width, c.vocab_size))
        x = layers.embed(embedding, tokens)
        frequencies = layers.rope_frequencies(c.head_width, c.rope_theta, c.rope_scaling)
        angles = layers.rope_angles(positions, frequencies)
        masks = {w: _masks(mask, positions, past, length, w) for w in {*c.windows} or {0}}
        layer = nn.remat(DecoderLayer) if self.remat else DecoderLayer
        tapped, kv = {}, []
        for i in range(c.num_layers):
            new_mask, past_mask = masks[c.window(i)]
            layer_past = None if past is None else past[i]
            x, new = layer(c, name=f"layer_{i}")(x, angles, new_mask, layer_past, past_mask)
            x = constrain(x, HIDDEN)
            kv.append(new)
            tapped[i] = x
        hidden = layers.rms_norm(
            x, self.param("norm", nn.initializers.ones, (c.width,)), c.norm_eps
        )
        return hidden, tuple(tapped[i] for i in taps), tuple(kv)


def _masks(mask, positions, past, length, window: int):
    """Masks over the new rows and over the cache for one window size."""
    new_mask = layers.within_window(mask, positions, positions, window)
    if past is None:
        return new_mask, None
    slots = jnp.arange(kv_cache.num_slots(past), dtype=jnp.int32)[None]
    past_mask = jnp.broadcast_to(
        (slots < length[:, None])[:, None], (*positions.shape, slots.shape[1])
    )
    return new_mask, layers.within_window(past_mask, positions, slots, window)


@functools.partial(jax.jit, static_argnums=0)
def fresh_params(module: nn.Module, key, *inputs) -> Params:
    """Parameters of a module for inputs of these shapes; ``key`` is consumed.

    Jitted, so that the forward pass, which ``init`` runs for the shapes alone, is left out.
    """
    return module.init(key, *inputs)["params"]


def output_logits(params: Params, hidden):
    """Logits [..., V] float32 of hidden states [..., D] after the final norm."""
    return layers.project(hidden, output_head(params), jnp.float32)


def output_head(params: Params):
    """LM head [D, V]; the transposed embedding where the two are tied."""
    return params["head"] if "head" in params else params["embedding"].T


def packed_mask(segments):
    """bool [B, T, T]: row i attends to j <= i of its own segment, int32 [B, T].

    Padding is a segment of its own, so every row has itself to attend to.
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    causal = index[:, None] >= index[None, :]
    return causal[None] & (segments[:, :, None] == segments[:, None, :])


def causal_mask(lengths, num_tokens: int):
    """bool [B, T, T]: row i attends to j <= i; the columns of padding are cleared.

    The diagonal stays set, so that rows of padding have a key to attend to.
    """
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    causal = index[:, None] >= index[None, :]
    real = index[None] < lengths[:, None]
    return (causal[None] & real[:, None, :]) | (index[:, None] == index[None, :])[None]


@dataclasses.dataclass(frozen=True)
class DecoderLM:
    """The ``Target`` of this library: static, hashable, without parameters.

    ``remat`` recomputes every layer in a backward pass instead of keeping its intermediates.
    """

    config: DecoderConfig
    remat: bool = False

    @property
    def module(self) -> Decoder:
        """The Linen module that owns the parameters."""
        return Decoder(self.config, self.remat)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    def init(self, key) -> Params:
        """Fresh float32 parameters. ``key`` is consumed."""
        row = jnp.zeros((1, 1), jnp.int32)
        return fresh_params(self.module, key, row, row, jnp.ones((1, 1, 1), bool))

    def _apply(self, params: Params, *args, **kwargs) -> Any:
        return self.module.apply({"params": params}, *args, **kwargs)

    def hidden(self, params: Params, tokens, lengths, taps: tuple[int, ...] = ()):
        """Plain causal forward of right-padded tokens [B, T]: (hidden, taps, kv)."""
        positions = jnp.broadcast_to(
            jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
        )
        mask = causal_mask(lengths, tokens.shape[1])
        return self._apply(params, tokens, positions, mask, taps=taps)

    def packed_hidden(
        self, params: Params, tokens, segments, positions, taps: tuple[int, ...] = ()
    ):
        """``packed`` without keys and values."""
        return self.packed(params, tokens, segments, positions, taps)[:2]

    def packed(self, params: Params, tokens, segments, positions, taps: tuple[int, ...] = ()):
        """Causal forward of packed documents: (hidden, taps, kv).

        ``segments`` int32 [B, T] tells documents (and padding) of a row apart, which do not see
        each other; ``positions`` int32 [B, T] count within a document. Hidden states and taps are
        [B, T, D] each; slot t of ``kv`` is token t of the row, see ``kv_cache``.
        """
        return self._apply(params, tokens, positions, packed_mask(segments), taps=taps)

    def prefill(self, params: Params, tokens, lengths, num_slots: int, taps: tuple[int, ...] = ()):
        """Cache and taps of right-padded tokens [B, T] with ``lengths`` [B]; no logits."""
        _, tapped, kv = self.hidden(params, tokens, lengths, taps)
        return kv_cache.fill(kv, num_slots), tapped

    def forward_tree(self, params, cache, length, tokens, positions, mask, taps=()) -> TargetOutput:
        """Score N new rows against the cache; see ``Decoder.__call__`` for shapes."""
        given = params, cache, length, tokens, positions, mask
        if tokens.size > 1:
            return self._forward_rows(taps, *given)
        return jax.lax.platform_dependent(
            *given,
            tpu=functools.partial(self._forward_tile, taps),
            default=functools.partial(self._forward_rows, taps),
        )

    def _forward_rows(self, taps, params, cache, length, tokens, positions, mask):
        hidden, tapped, kv = self._apply(params, tokens, positions, mask, cache, length, taps)
        return TargetOutput(output_logits(params, hidden), tapped, kv)

    def _forward_tile(self, taps, params, cache, length, tokens, positions, mask):
        """``_forward_rows`` of the one row in a tile of equal ones.

        XLA leaves products of one row to the vector unit of a TPU, at four times the cycles that
        the matrix unit needs for a full tile, and cuts what is between them into more pieces.
        """
        del mask
        tokens, positions = (jnp.repeat(x, layers.TILE, axis=1) for x in (tokens, positions))
        tokens, positions = jax.lax.optimization_barrier((tokens, positions))
        mask = jnp.eye(layers.TILE, dtype=bool)[None]
        out = self._forward_rows(taps, params, cache, length, tokens, positions, mask)
        return TargetOutput(
            out.logits[:, :1], tuple(x[:, :1] for x in out.taps), kv_cache.first_row(out.kv)
        )

    def commit(self, cache, kv, path, length):
        """Write the accepted rows; see ``kv_cache.commit``."""
        return kv_cache.commit(cache, kv, path, length)
