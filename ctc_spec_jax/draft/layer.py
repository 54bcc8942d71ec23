"""One decoder layer that drafts a token at a time: the network of the drafters in ``sequential``.

A row is a token and what is known of the token before it (a feature). The layer attends to earlier
rows: those of the committed text, whose keys and values lie in the drafter's own cache, and those
of the draft. Keys and values of a row come from its input alone, so a cache never depends on how
the text was drafted. Methods add what a row is made of, and what else the layer reads.

Shape letters: B batch, N rows of a pass, R rows of a draft so far, T tokens, S cache slots,
V vocabulary, D width, E width of a feature, K kv heads, G query heads per kv head, C head width.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import flax.linen as nn
import jax.numpy as jnp

from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import kv_cache, layers
from ctc_spec_jax.models.config import DecoderConfig, RopeScaling
from ctc_spec_jax.sharding import HIDDEN, constrain

INIT = nn.initializers.normal(0.02)
RESIDUAL = nn.initializers.normal(0.02 / 2**0.5)
"""Of what is added to the residual stream: smaller, so that it begins as its input."""


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Static description of the layer; hashable by value.

    A draft is trained to ``steps`` tokens. ``taps`` are target layers. Heads and rotary positions
    are those of the target; ``rope_factor`` 1 means unscaled frequencies, otherwise those of
    ``models.config.RopeScaling``: ``linear`` where ``rope_original`` is 0, else ``llama3``.
    """

    width: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    steps: int
    taps: tuple[int, ...]
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    rope_low: float = 0.0
    rope_high: float = 0.0
    rope_original: int = 0

    def __post_init__(self):
        if not self.taps:
            raise ValueError("taps: expected at least one target layer, found none")
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, found {self.steps}")

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rope_scaling(self) -> RopeScaling:
        """Change of the rotary frequencies."""
        if self.rope_factor == 1:
            return RopeScaling()
        kind = "llama3" if self.rope_original else "linear"
        bounds = self.rope_low, self.rope_high, self.rope_original
        return RopeScaling(kind, self.rope_factor, *bounds)

    def layer_products(self, length: int, drafted: int) -> int:
        """Multiply-adds of a training row: of the layer at ``drafted`` rows, and of its context.

        A drafted row sees half of the training row on average.
        """
        heads, kv = self.num_heads * self.head_width, self.num_kv_heads * self.head_width
        row = self.width * (2 * heads + 2 * kv) + 3 * self.width * self.mlp_width
        return length * 2 * self.width * kv + drafted * (row + heads * length)


Config = TypeVar("Config", bound=LayerConfig)


def layer_config(
    kind: type[Config], target: DecoderConfig, shape: Shape, taps: tuple[int, ...]
) -> Config:
    """A layer of the shape of the target's own ones.

    Raises:
      InputError: a preset, a width of its own, or another number of layers than 1.
    """
    if shape.preset or shape.width or shape.layers != 1:
        found = f"preset {shape.preset!r}, width {shape.width}, layers {shape.layers}"
        raise InputError(
            f"drafter: expected no preset, width 0 (the target's) and layers 1, found {found}"
        )
    scaling = target.rope_scaling
    long = scaling.kind == "llama3"
    return kind(
        width=target.width,
        vocab_size=target.vocab_size,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_width=target.head_width,
        mlp_width=shape.mlp_width or target.mlp_width,
        steps=shape.frames,
        taps=taps,
        norm_eps=target.norm_eps,
        rope_theta=target.rope_theta,
        rope_factor=1.0 if scaling.kind == "default" else scaling.factor,
        rope_low=scaling.low_freq_factor if long else 0.0,
        rope_high=scaling.high_freq_factor if long else 0.0,
        rope_original=scaling.original_max_position if long else 0,
    )


class LayerNetwork(nn.Module):
    """Parameters and forward pass of the layer; embedding and LM head are the target's, frozen.

    Its parameters are made in ``setup``.
    """

    config: LayerConfig

    def setup(self):
        c, ones = self.config, nn.initializers.ones
        heads = c.num_heads * c.head_width
        self.attention_norm = self.param("attention_norm", ones, (c.width,))
        shape = (c.width, c.num_kv_heads, c.group + 2, c.head_width)
        self.qkv = self.param("qkv", INIT, shape)
        self.attention_output = self.param("output", RESIDUAL, (heads, c.width))
        self.mlp_norm = self.param("mlp_norm", ones, (c.width,))
        self.gate_up = self.param("gate_up", INIT, (c.width, 2, c.mlp_width))
        self.down = self.param("down", RESIDUAL, (c.mlp_width, c.width))
        self.norm = self.param("norm", ones, (c.width,))

    def __call__(self, hidden):
        return self.normed(hidden)

    def features(self, taps):
        """What is kept of the target's taps, each [B, T, D]: [B, T, E]."""
        raise NotImplementedError

    def follow(self, embedded, before):
        """Input of rows [B, N, D]: embedded tokens [B, N, D] and what is known of those before.

        ``before`` is a feature [B, N, E], zeros before the first token; or, of a drafted token,
        the layer's own output [B, N, D].
        """
        raise NotImplementedError

    def read(self, x, angles, seen, visible):
        """What the layer adds between attention and MLP; ``seen`` as for ``step``."""
        del angles, seen, visible
        return x

    def keys_values(self, x, positions):
        """Keys and values of rows [B, N, D] at positions int32 [B, N], as in ``kv_cache``."""
        group = self.config.group
        x = layers.rms_norm(x, self.attention_norm, self.config.norm_eps)
        both = layers.linear(x, self.qkv[:, :, group:])
        key = layers.rotate(both[..., 0, :], self.angles(positions))
        return kv_cache.from_heads(key, both[..., 1, :])

    def step(self, x, positions, rows, mask, past, visible, seen=None):
        """The layer at N rows.

        Args:
          x: [B, N, D], see ``follow``.
          positions: int32 [B, N].
          rows: keys and values of the draft's earlier rows, or None.
          mask: bool [B, N, R], which rows of the draft a row attends to; its own N come last.
          past: keys and values of the text, S slots.
          visible: bool [B, N, S], those that a row attends to.
          seen: keys and values of the target at the same S slots, for methods that read them.

        Returns:
          Output [B, N, D], and keys and values of all R rows.
        """
        c, angles = self.config, self.angles(positions)
        h = layers.rms_norm(x, self.attention_norm, c.norm_eps)
        fused = layers.linear(h, self.qkv)
        query = layers.rotate(fused[..., : c.group, :], angles)
        key = layers.rotate(fused[..., c.group, :], angles)
        own = kv_cache.from_heads(key, fused[..., c.group + 1, :])
        rows = own if rows is None else _joined(rows, own)
        mixed = layers.attend(query, rows, mask, past, visible)
        x = x + layers.linear(mixed.reshape(*x.shape[:2], -1), self.attention_output)
        x = self.read(x, angles, seen, visible)
        h = layers.rms_norm(x, self.mlp_norm, c.norm_eps)
        return constrain(x + layers.gated_mlp(h, self.gate_up, self.down), HIDDEN), rows

    def normed(self, hidden):
        """Input of the LM head, of the layer's output [..., D]."""
        return layers.rms_norm(hidden, self.norm, self.config.norm_eps)

    def angles(self, positions):
        """Rotary angles of positions int32 [B, N], those of the target."""
        c = self.config
        given = c.head_width, c.rope_theta, c.rope_scaling
        return layers.rope_angles(positions, layers.rope_frequencies(*given))


def _joined(rows, own):
    """Rows of a draft with those of one more pass behind them."""
    (keys, values), (new_keys, new_values) = rows, own
    return (
        jnp.concatenate([keys, new_keys], axis=3),
        jnp.concatenate([values, new_values], axis=2),
    )
