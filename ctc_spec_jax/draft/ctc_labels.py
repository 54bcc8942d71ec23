"""The label-conditioned CTC drafter: frames that know the last label.

Frames of a CTC drafter are independent, so where a text goes on "a b" or "c d", they say "a d" too.
Here the law of a frame is biased by the last label that was emitted, whichever frame emitted it: a
bias of low rank on pairs of neighbouring labels, as block drafters have on neighbouring slots
(DSpark, arXiv 2607.05147), but inside the lattice of alignments of CTC-drafter (arXiv 2412.00061).
The mass of a prefix stays an exact sum over alignments, for the loss and for the tree. No release
of such a drafter is known.

Shape letters: A anchors, F frames, K labels, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctc_spec_jax import losses
from ctc_spec_jax.chunked_head import chunked_labelled_log_probs
from ctc_spec_jax.draft.anchors import sample_anchors
from ctc_spec_jax.draft.ctc import CTCConfig, CTCDrafter, CTCNetwork
from ctc_spec_jax.draft.ctc_loss import CTCLoss
from ctc_spec_jax.draft.frames_config import frames_config
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import output_head
from ctc_spec_jax.models.int8 import columns
from ctc_spec_jax.tree.ctc_labels import LabelTree
from ctc_spec_jax.types import DraftContext, DraftTree, Params

CANDIDATES = 16
"""Tokens of a frame among which the last label shifts probability in training."""


@dataclasses.dataclass(frozen=True)
class LabelConfig(CTCConfig):
    """Static description of the network; ``label_rank`` is that of the bias."""

    label_rank: int = 256


def label_config(target: DecoderConfig, shape: Shape) -> LabelConfig:
    """A network for ``target``.

    Raises:
      InputError: a preset; there is none.
    """
    if shape.preset:
        raise InputError(f"drafter.preset: expected '', found {shape.preset!r}")
    given = (shape.layers, shape.frames, shape.taps, shape.mlp_width)
    network = frames_config(LabelConfig, target, *given)
    return dataclasses.replace(network, label_rank=min(256, target.width))


def label_drafter(network: LabelConfig, nodes: int, depth: int, tree: str) -> LabelDrafter:
    """A drafter of the most probable prefixes; ``tree`` knows one way."""
    if tree not in ("", "prefix"):
        raise InputError(f"tree: expected prefix, found {tree!r}")
    builder = LabelTree(nodes, min(depth, network.frames, nodes - 1), CANDIDATES)
    return LabelDrafter(network, builder)


class LabelNetwork(CTCNetwork):
    """A network over frames, and what the last label adds before the LM head."""

    config: LabelConfig

    def setup(self):
        super().setup()
        width, rank = self.config.width, self.config.label_rank
        self.label_norm = self.param("label_norm", nn.initializers.ones, (width,))
        self.label_down = self.param("label_down", nn.initializers.normal(0.02), (width, rank))
        # From zero on: a fresh network is that of frames that do not know the last label.
        self.label_up = self.param("label_up", nn.initializers.zeros, (rank, width))

    def label_shift(self, embedded):
        """What the last label, embedded [..., D], adds to hidden states before the LM head."""
        known = layers.rms_norm(embedded, self.label_norm, self.config.norm_eps)
        return layers.linear(jax.nn.silu(layers.linear(known, self.label_down)), self.label_up)


@dataclasses.dataclass(frozen=True)
class LabelDrafter(CTCDrafter):
    """The ``Drafter``: network and the tree of the conditioned lattice."""

    config: LabelConfig
    tree: Any  # a ``LabelTree``, which is also given the bias

    @property
    def network(self) -> LabelNetwork:
        """The Linen module that owns the parameters."""
        return LabelNetwork(self.config)

    def propose(self, params: Params, state, context: DraftContext, keys) -> DraftTree:
        """One pass of the network, then the tree of each row; deterministic."""
        del keys
        head, embedding = output_head(context.params), context.params["embedding"]

        def bias(labels, candidates):
            shift = self._apply(params, "label_shift", layers.embed(embedding, labels[None]))[0]
            return layers.project(shift, columns(head, candidates), jnp.float32)

        log_probs = self._log_probs(params, state, context)
        trees = jax.vmap(lambda one, pending: self.tree(one, pending, bias))
        return DraftTree(*trees(log_probs, context.pending))


@dataclasses.dataclass(frozen=True)
class LabelLoss(CTCLoss):
    """The objectives of ``CTCLoss`` for frames that know the last label."""

    drafter: LabelDrafter

    def draft(self, params: Params, frozen: Params, batch, keys):
        """Hidden states [B*A, F, D], pending token and labels int32 [B*A, K+1], lengths [B*A]."""
        hidden, labels, lengths = super().draft(params, frozen, batch, keys)
        # The same anchors: drawing them again costs nothing.
        anchors, *_ = sample_anchors(keys, batch, self.anchors, self.weights.labels)
        pending = jnp.take_along_axis(batch["tokens"], anchors, axis=1).reshape(-1, 1)
        return hidden, jnp.concatenate([pending, labels], axis=1), lengths

    def score(self, params: Params, frozen: Params, hidden, labels, label_lengths):
        """Loss and objectives of what ``draft`` gives: the LM head and all after it."""
        params = self._cast(params)
        known = jnp.clip(labels, 0, self.lm.vocab_size - 1)
        embedded = layers.embed(frozen["embedding"], known).astype(self.dtype)
        network: Any = self.drafter.network
        blank, label, stay = chunked_labelled_log_probs(
            hidden,
            output_head(frozen),
            params["blank"],
            labels,
            network.apply({"params": params}, embedded, method="label_shift"),
            CANDIDATES,
            self.weights.chunk * self.shards,
            params["blank_bias"],
        )
        given = self.objectives()
        return losses.draft_loss(blank, label, labels[:, 1:], label_lengths, *given, stay)
