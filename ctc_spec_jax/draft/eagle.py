"""EAGLE: one decoder layer over features of the target; dynamic trees.

A row is a token and the feature of the token before it: the target's hidden states of a few layers,
concatenated and projected, where the target has read that token, and the layer's own output where
it has not. The layer's output is the next feature and, after a norm, the input of the target's LM
head. The cache holds rows with the target's own features alone: when a round is committed, those of
the accepted path are made of what the target said of it. EAGLE: Li et al. 2024, arXiv 2401.15077;
dynamic trees, EAGLE-2: Li et al. 2024, arXiv 2406.16858, section 4; several layers and training on
the layer's own outputs, EAGLE-3: Li et al. 2025, arXiv 2503.01840, section 3.

Trees, ``dynamic``: per depth the most probable paths are continued (10 in the release, the default
here); of all children that were found the N most probable paths are kept, which form a tree.
``static`` is a tree fixed by ranks; ``sampled`` a chain drawn from the law that it states.

Where this differs from the published releases: token and feature are normed and joined by one
product before the layer, as in EAGLE-1 (EAGLE-3 gives the attention both and adds its output to the
feature); the vocabulary is whole, so no token is out of reach; training has no loss on features and
no weights by a fixed 0.8, but those of ``heads_loss``, and its drafts begin at drawn anchors in the
place of every token; a path's candidates are as many as the tree can keep, not 10.

Shape letters: B batch, N rows, T tokens, D width.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from ctc_spec_jax.draft.layer import INIT, LayerConfig, LayerNetwork, layer_config
from ctc_spec_jax.draft.sequential import SequentialDrafter
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.sharding import gather_width
from ctc_spec_jax.tree.ctc_transform import default_template

BEAM = 10
"""Paths that are continued per depth in the release."""


@dataclasses.dataclass(frozen=True)
class EagleConfig(LayerConfig):
    """Static description of the layer; ``taps`` are the target layers that features come from."""

    def products(self, length: int, anchors: int) -> tuple[int, int]:
        """Multiply-adds of a row's forward pass: of the frozen LM head, and of all else."""
        drafted, square = anchors * self.steps, self.width**2
        inputs = length * (len(self.taps) + 2) * square + drafted * 2 * square
        head = drafted * self.width * self.vocab_size
        return head, self.layer_products(length, drafted) + inputs


def eagle_config(target: DecoderConfig, shape: Shape) -> EagleConfig:
    """A layer for ``target``, trained to ``frames`` tokens; by default it reads a low, a middle
    and the last layer of the target.

    Raises:
      InputError: see ``layer.layer_config``.
    """
    last = target.num_layers - 1
    taps = shape.taps or tuple(sorted({last // 4, last // 2, last}))
    return layer_config(EagleConfig, target, shape, taps)


class EagleNetwork(LayerNetwork):
    """Parameters and forward pass; a feature has the target's width."""

    config: EagleConfig

    def setup(self):
        super().setup()
        c, ones = self.config, nn.initializers.ones
        self.tap_norms = self.param("tap_norms", ones, (len(c.taps), c.width))
        self.context = self.param("context", INIT, (len(c.taps) * c.width, c.width))
        self.start_norm = self.param("start_norm", ones, (2, c.width))
        self.start = self.param("start", INIT, (2 * c.width, c.width))

    def features(self, taps):
        """See ``LayerNetwork``."""
        eps = self.config.norm_eps
        normed = [layers.rms_norm(t, self.tap_norms[i], eps) for i, t in enumerate(taps)]
        return gather_width(layers.linear(jnp.concatenate(normed, axis=-1), self.context))

    def follow(self, embedded, before):
        """Token and feature, normed and joined; see ``LayerNetwork``."""
        eps = self.config.norm_eps
        both = (embedded, self.start_norm[0]), (before.astype(embedded.dtype), self.start_norm[1])
        joined = jnp.concatenate([layers.rms_norm(x, scale, eps) for x, scale in both], axis=-1)
        return gather_width(layers.linear(joined, self.start))


@dataclasses.dataclass(frozen=True)
class EagleDrafter(SequentialDrafter):
    """The ``Drafter``."""

    @property
    def network(self) -> EagleNetwork:
        """The Linen module that owns the parameters."""
        return EagleNetwork(self.config)


def eagle_drafter(network: EagleConfig, nodes: int, depth: int, tree: str) -> EagleDrafter:
    """A drafter of at most so many nodes and that depth; ``tree`` is dynamic, static or sampled.

    Raises:
      InputError: another tree.
    """
    trees = ("dynamic", "static", "sampled")
    if tree not in ("", *trees):
        raise InputError(f"tree: expected one of {', '.join(trees)}, found {tree!r}")
    depth = max(1, min(depth, nodes - 1))
    if tree == "sampled":
        return EagleDrafter(network, depth + 1, depth, sampled=True)
    if tree == "static":
        template = default_template(nodes, depth, network.vocab_size)
        return EagleDrafter(network, template.num_nodes, template.max_depth, template=template)
    return EagleDrafter(network, nodes, depth, beam=BEAM)
