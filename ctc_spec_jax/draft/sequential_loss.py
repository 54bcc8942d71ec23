"""What a layer that drafts token by token is trained on: ``heads_loss`` of the passes of drafts.

A draft of K tokens begins at every anchor and is trained as it is decoded: it reads of the target
only what comes before the anchor, and after that its own outputs where decoding has nothing else.
With an anchor at every multiple of K the layer sees of the target what the block mask of GLIDE
(arXiv 2402.02082) shows, ``floor(j / K) < floor(i / K)``.

Shape letters: B rows, T tokens, A anchors, K tokens of a draft in training, D width.
"""

from __future__ import annotations

import dataclasses

import jax

from ctc_spec_jax.draft.heads_loss import HeadsLoss
from ctc_spec_jax.draft.sequential import SequentialDrafter
from ctc_spec_jax.types import Params


@dataclasses.dataclass(frozen=True)
class SequentialLoss(HeadsLoss):
    """Cross-entropy and divergences over random anchors; a ``training.DraftLoss``."""

    drafter: SequentialDrafter

    @property
    def num_labels(self) -> int:
        """K, tokens of a draft that are trained."""
        return min(self.weights.labels, self.drafter.config.steps)

    def read(self, params: Params, frozen: Params, batch, anchors, known):
        """See ``HeadsLoss.read``."""
        places = batch["tokens"], batch["segments"], batch["positions"]
        final, taps, kv = self.lm.packed(frozen, *places, self.drafter.taps)
        run = jax.checkpoint(self.drafter.outputs) if self.remat else self.drafter.outputs
        texts = {name: batch[name] for name in ("tokens", "segments", "positions")}
        return final, run(params, frozen, texts, taps, kv, anchors, known)
