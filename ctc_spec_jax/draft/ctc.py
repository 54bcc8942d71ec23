"""The CTC drafter: all frames in one pass, collapsed into a tree of distinct continuations.

A frame carries probabilities over V tokens and one own blank class (class V, never a reused token
id). Collapse: merge adjacent repeats, then delete blanks (Graves et al. 2006). Drafting with it is
CTC-drafter (Wen et al., NeurIPS 2024, arXiv 2412.00061); the network is that of ``draft.frames``.

Where this differs from the published release: one non-autoregressive pass instead of four
sequential ones, an own blank class instead of token 0, and, by default, the exact prefix tree
instead of a static template. ``published`` builds the paper's configuration, ``label_conditioned``
one whose frames know the last label: a bias of low rank on every pair of neighbouring labels, as
other block drafters have on neighbouring slots (DSpark, arXiv 2607.05147), inside the lattice.

Shape letters: F frames, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctc_spec_jax.chunked_head import product
from ctc_spec_jax.draft.frames import FramesConfig, FramesDrafter, FramesNetwork, frames_config
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import output_head, output_logits
from ctc_spec_jax.types import DraftContext, DraftTree, Params


@dataclasses.dataclass(frozen=True)
class CTCConfig(FramesConfig):
    """Static description of a CTC drafter network; hashable by value.

    ``label_rank`` is that of the bias on neighbouring labels; 0: frames do not know the last label.
    """

    label_rank: int = 0


def ctc_config(
    target: DecoderConfig,
    num_layers: int = 1,
    frames: int = 12,
    taps: tuple[int, ...] = (),
    mlp_width: int = 0,
) -> CTCConfig:
    """A drafter for ``target``; see ``frames_config``."""
    return frames_config(CTCConfig, target, num_layers, frames, taps, mlp_width)


def published(target: DecoderConfig) -> CTCConfig:
    """The paper's network: one layer on the last hidden state; decode it with ``TransformTree``."""
    return ctc_config(target, num_layers=1, frames=6, taps=(target.num_layers - 1,))


def label_conditioned(network: CTCConfig) -> CTCConfig:
    """The same network with frames that know the last label."""
    return dataclasses.replace(network, label_rank=min(256, network.width))


class CTCNetwork(FramesNetwork):
    """A network over frames with one more class, the blank: one row and a bias of its own."""

    config: CTCConfig

    def setup(self):
        super().setup()
        self.blank = self.param("blank", nn.initializers.normal(0.02), (self.config.width,))
        self.blank_bias = self.param("blank_bias", nn.initializers.zeros, ())
        if self.config.label_rank:
            width, rank = self.config.width, self.config.label_rank
            self.label_norm = self.param("label_norm", nn.initializers.ones, (width,))
            self.label_down = self.param("label_down", nn.initializers.normal(0.02), (width, rank))
            # From zero on: a fresh network is that of frames that do not know the last label.
            self.label_up = self.param("label_up", nn.initializers.zeros, (rank, width))

    def log_probs(self, hidden, target_params: Params):
        """Frame log-probabilities [..., V+1] float32 of hidden [..., D]; class V is the blank."""
        tokens = output_logits(target_params, hidden)
        blank = jnp.sum((hidden * self._row(hidden.ndim)).astype(jnp.float32), -1, keepdims=True)
        blank = blank + self.blank_bias.astype(jnp.float32).reshape((1,) * hidden.ndim)
        return jax.nn.log_softmax(jnp.concatenate([tokens, blank], axis=-1), axis=-1)

    def label_shift(self, embedded):
        """What the last label, embedded [..., D], adds to hidden states before the LM head."""
        known = layers.rms_norm(embedded, self.label_norm, self.config.norm_eps)
        return layers.linear(jax.nn.silu(layers.linear(known, self.label_down)), self.label_up)

    def _row(self, rank: int):
        return self.blank.reshape((1,) * (rank - 1) + self.blank.shape)


@dataclasses.dataclass(frozen=True)
class CTCDrafter(FramesDrafter):
    """The ``Drafter``: network and tree builder, which collapses frames into a tree."""

    config: CTCConfig
    tree: Any  # a ``frames.TreeBuilder``, or a ``LabelTree`` where frames know the last label

    @property
    def network(self) -> CTCNetwork:
        """The Linen module that owns the parameters."""
        return CTCNetwork(self.config)

    def propose(self, params: Params, state, context: DraftContext, keys) -> DraftTree:
        """One pass of the network, then the tree of each row; deterministic."""
        if not self.config.label_rank:
            return super().propose(params, state, context, keys)
        head, embedding = output_head(context.params), context.params["embedding"]

        def bias(labels, candidates):
            shift = self._apply(params, "label_shift", layers.embed(embedding, labels[None]))[0]
            return product("xd,cd->xc", shift, jnp.take(head, candidates, axis=1).T)

        log_probs = self._log_probs(params, state, context)
        trees = jax.vmap(lambda one, pending: self.tree(one, pending, bias))
        return DraftTree(*trees(log_probs, context.pending))
