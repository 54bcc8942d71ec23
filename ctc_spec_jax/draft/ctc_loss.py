"""What a CTC drafter is trained on: objectives of the collapse of its frames.

Shape letters: B rows, A anchors, F frames, K labels, D width.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ctc_spec_jax import losses
from ctc_spec_jax.chunked_head import chunked_frame_log_probs
from ctc_spec_jax.draft.ctc import CTCDrafter
from ctc_spec_jax.draft.frames_loss import FramesLoss
from ctc_spec_jax.models.decoder import output_head
from ctc_spec_jax.types import Params


@dataclasses.dataclass(frozen=True)
class CTCLoss(FramesLoss):
    """Weighted CTC objectives over random anchors; a ``training.DraftLoss``.

    Metrics: the objectives, and by position ``loss_at`` and ``prefix_at`` of ``losses.draft_loss``.
    """

    drafter: CTCDrafter

    def score(self, params: Params, frozen: Params, hidden, labels, label_lengths):
        """Loss and objectives of what ``draft`` gives: the LM head and all after it."""
        params = self._cast(params)
        blank, label = chunked_frame_log_probs(
            hidden,
            output_head(frozen),
            params["blank"],
            labels,
            self.weights.chunk * self.shards,
            params["blank_bias"],
        )
        return losses.draft_loss(blank, label, labels, label_lengths, *self.objectives())

    def objectives(self):
        """Weights of ``losses.draft_loss``: of the objectives by name, of the prefixes [K]."""
        decay = self.weights.decay ** jnp.arange(self.weights.labels, dtype=jnp.float32)
        named = {name: getattr(self.weights, name) for name in losses.OBJECTIVES}
        return named, decay / jnp.sum(decay)
