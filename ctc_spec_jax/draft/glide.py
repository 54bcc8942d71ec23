"""GLIDE: one decoder layer that also attends to the target's own keys and values; CaPE trees.

Between self-attention and MLP the layer attends to the cache of one target layer, so it reads what
the target made of the text without a copy of it. Of the pending token and the drafted ones the
target has no keys yet; training hides them as decoding does (``sequential_loss``). CaPE sends the
greedy chain and, at each depth, as many siblings beside its token as the layer is unsure. GLIDE
with a CaPE: Du et al. 2024, arXiv 2402.02082, sections 3.1 to 3.3.

Where this differs from the published release: the layer has the target's width, and embedding and
LM head are the target's, frozen, in the place of a small model's own; a norm of its own precedes
the cross-attention, and in training the first block sees nothing of the target, as a prompt of one
token does, where the release shows it keys that decoding never has; blocks begin at drawn
anchors, so that every place of a text is met at every distance; where the wanted siblings are more
than the tree has nodes, the most probable nodes of all are kept; the length of the chain is a
parameter (the release drafts 4). The sampling branch of the release uses undefined names and cannot
run: here sampled rows walk the same trees (``TargetSample``), or draw a chain from the stated law
(tree ``sampled``, for ``Rejection``).

Shape letters: B batch, N rows, T tokens, S cache slots, D width, K kv heads, G query heads per kv
head, C head width.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from ctc_spec_jax.draft.layer import INIT, RESIDUAL, LayerConfig, LayerNetwork, layer_config
from ctc_spec_jax.draft.sequential import Confidence, SequentialDrafter
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.config import DecoderConfig

CAPE = Confidence((0.3, 0.6, 0.8), (8, 6, 4, 2))
"""How many tokens the release sends at a depth, the one of the chain included."""

CHAIN = Confidence((), (1,))
"""The greedy chain alone."""


@dataclasses.dataclass(frozen=True)
class GlideConfig(LayerConfig):
    """Static description of the layer; ``taps`` is the target layer whose cache it reads."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.taps) != 1:
            raise ValueError(f"taps: expected one target layer, found {len(self.taps)}")

    def products(self, length: int, anchors: int) -> tuple[int, int]:
        """Multiply-adds of a row's forward pass: of the frozen LM head, and of all else."""
        drafted, heads = anchors * self.steps, self.num_heads * self.head_width
        cross = drafted * heads * (2 * self.width + length)
        head = drafted * self.width * self.vocab_size
        return head, self.layer_products(length, drafted) + cross


def glide_config(target: DecoderConfig, shape: Shape) -> GlideConfig:
    """A layer for ``target``, trained to ``frames`` tokens; it reads the last target layer.

    Raises:
      InputError: several target layers, and see ``layer.layer_config``.
    """
    if len(shape.taps) > 1:
        raise InputError(f"drafter.taps: expected one layer at most, found {list(shape.taps)}")
    return layer_config(GlideConfig, target, shape, shape.taps or (target.num_layers - 1,))


def glide_notes(network: GlideConfig) -> dict[str, str]:
    """What a reader of config.json should know."""
    del network
    return {"target_reads": "cached keys and values of the layer in target_layer_ids"}


class GlideNetwork(LayerNetwork):
    """Parameters and forward pass; rows are embedded tokens, features have no width."""

    config: GlideConfig

    def setup(self):
        super().setup()
        c = self.config
        self.cross_norm = self.param("cross_norm", nn.initializers.ones, (c.width,))
        shape = (c.width, c.num_kv_heads, c.group, c.head_width)
        self.cross_query = self.param("cross_query", INIT, shape)
        heads = c.num_heads * c.head_width
        self.cross_output = self.param("cross_output", RESIDUAL, (heads, c.width))

    def features(self, taps):
        """None; see ``LayerNetwork``."""
        return taps[0][..., :0]

    def follow(self, embedded, before):
        """The embedded tokens; see ``LayerNetwork``."""
        del before
        return embedded

    def read(self, x, angles, seen, visible):
        """Attention to the target's keys and values; see ``LayerNetwork``."""
        c = self.config
        h = layers.rms_norm(x, self.cross_norm, c.norm_eps)
        # The target's keys are rotated by its own angles, which this layer has too.
        query = layers.rotate(layers.linear(h, self.cross_query), angles)
        mixed = layers.attend(query, seen, visible)
        mixed = mixed.reshape(*x.shape[:2], -1)
        # Before the first committed token a softmax over nothing would average what lies there.
        mixed = jnp.where(jnp.any(visible, axis=-1, keepdims=True), mixed, 0)
        return x + layers.linear(mixed, self.cross_output)


@dataclasses.dataclass(frozen=True)
class GlideDrafter(SequentialDrafter):
    """The ``Drafter``: the greedy chain, and siblings that are leaves."""

    @property
    def network(self) -> GlideNetwork:
        """The Linen module that owns the parameters."""
        return GlideNetwork(self.config)

    def seen(self, kv):
        """Keys and values of the layer that is read; see ``SequentialDrafter``."""
        return kv[self.taps[0]]


def glide_drafter(network: GlideConfig, nodes: int, depth: int, tree: str) -> GlideDrafter:
    """A drafter of at most so many nodes and that depth; ``tree`` is cape, chain or sampled.

    Raises:
      InputError: another tree.
    """
    trees = ("cape", "chain", "sampled")
    if tree not in ("", *trees):
        raise InputError(f"tree: expected one of {', '.join(trees)}, found {tree!r}")
    depth = max(1, min(depth, nodes - 1))
    if tree == "sampled":
        return GlideDrafter(network, depth + 1, depth, sampled=True)
    if tree == "chain":
        return GlideDrafter(network, depth + 1, depth, beam=1, children=CHAIN)
    return GlideDrafter(network, nodes, depth, beam=1, children=CAPE)
