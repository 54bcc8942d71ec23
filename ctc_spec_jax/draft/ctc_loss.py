"""What a CTC drafter is trained on: objectives of the collapse of its frames.

Shape letters: B rows, A anchors, F frames, K labels, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ctc_spec_jax import losses
from ctc_spec_jax.chunked_head import chunked_frame_log_probs, chunked_labelled_log_probs
from ctc_spec_jax.draft.anchors import sample_anchors
from ctc_spec_jax.draft.ctc import CTCDrafter
from ctc_spec_jax.draft.frames_loss import FramesLoss
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.decoder import output_head
from ctc_spec_jax.types import Params

CANDIDATES = 16
"""Tokens of a frame among which the last label shifts probability in training."""


@dataclasses.dataclass(frozen=True)
class CTCLoss(FramesLoss):
    """Weighted CTC objectives over random anchors; a ``training.DraftLoss``.

    Metrics: the objectives, and by position ``loss_at`` and ``prefix_at`` of ``losses.draft_loss``.
    """

    drafter: CTCDrafter

    def draft(self, params: Params, frozen: Params, batch, keys):
        """As elsewhere; labels [B*A, K+1], the pending token first, if frames know the last."""
        hidden, labels, lengths = super().draft(params, frozen, batch, keys)
        if self.drafter.config.label_rank:
            # The same anchors: drawing them again costs nothing.
            anchors, *_ = sample_anchors(keys, batch, self.anchors, self.weights.labels)
            pending = jnp.take_along_axis(batch["tokens"], anchors, axis=1).reshape(-1, 1)
            labels = jnp.concatenate([pending, labels], axis=1)
        return hidden, labels, lengths

    def score(self, params: Params, frozen: Params, hidden, labels, label_lengths):
        """Loss and objectives of what ``draft`` gives: the LM head and all after it."""
        params, weights = self._cast(params), self.weights
        decay = weights.decay ** jnp.arange(weights.labels, dtype=jnp.float32)
        named = {name: getattr(weights, name) for name in losses.OBJECTIVES}
        given: Any = (named, decay / jnp.sum(decay))
        if self.drafter.config.label_rank:
            blank, label, stay = self._labelled(params, frozen, hidden, labels)
            return losses.draft_loss(blank, label, labels[:, 1:], label_lengths, *given, stay)
        blank, label = chunked_frame_log_probs(
            hidden,
            output_head(frozen),
            params["blank"],
            labels,
            weights.chunk * self.shards,
            params["blank_bias"],
        )
        return losses.draft_loss(blank, label, labels, label_lengths, *given)

    def _labelled(self, params: Params, frozen: Params, hidden, text):
        """Log-probabilities of frames that know the last of ``text`` [A, K+1]."""
        known = jnp.clip(text, 0, self.lm.vocab_size - 1)
        embedded = layers.embed(frozen["embedding"], known).astype(self.dtype)
        network: Any = self.drafter.network
        shifts = network.apply({"params": params}, embedded, method="label_shift")
        return chunked_labelled_log_probs(
            hidden,
            output_head(frozen),
            params["blank"],
            text,
            shifts,
            CANDIDATES,
            self.weights.chunk * self.shards,
            params["blank_bias"],
        )
