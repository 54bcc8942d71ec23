"""What a network over frames is trained on: target and drafter of a micro-batch.

Shape letters: B rows, T tokens, A anchors, F frames, K labels, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax.draft.anchors import sample_anchors
from ctc_spec_jax.draft.frames import FramesDrafter
from ctc_spec_jax.draft.frames_config import FramesConfig
from ctc_spec_jax.draft.training import Loss
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.types import Params


@dataclasses.dataclass(frozen=True)
class FramesLoss:
    """Losses of a network over frames over random anchors; a ``training.DraftLoss``.

    Methods add ``score``.

    ``shards`` counts the devices that share the rows of a batch; ``remat`` recomputes the
    drafter's layers in the backward pass instead of keeping their intermediates.
    """

    lm: DecoderLM
    drafter: FramesDrafter
    weights: Loss
    anchors: int
    dtype: Any = jnp.float32
    remat: bool = False
    shards: int = 1

    def loss(self, params: Params, frozen: Params, batch, keys):
        """Weighted objectives of one micro-batch; see ``training.DraftLoss``.

        Metrics are those of ``score``.
        """
        hidden, labels, label_lengths = self.draft(params, frozen, batch, keys)
        loss, values = self.score(params, frozen, hidden, labels, label_lengths)
        return loss, jnp.sum(label_lengths > 0), values

    def taps(self, frozen: Params, batch) -> tuple[jax.Array, ...]:
        """Hidden states of the target that the drafter sees, each [B, T, D].

        Those that come with the batch, as ``taps``, are taken as they are.
        """
        if "taps" in batch:
            return batch["taps"]
        places = batch["segments"], batch["positions"]
        return self.lm.packed_hidden(frozen, batch["tokens"], *places, self.drafter.taps)[1]

    def draft(self, params: Params, frozen: Params, batch, keys):
        """Hidden states of the frames [B*A, F, D], labels int32 [B*A, K] and their number [B*A]."""
        anchors, labels, lengths = sample_anchors(keys, batch, self.anchors, self.weights.labels)
        hidden: Any = self.drafter.network.clone(remat=self.remat).apply(
            {"params": self._cast(params)},
            self.taps(frozen, batch),
            layers.embed(frozen["embedding"], batch["tokens"]),
            anchors,
            batch["segments"],
            batch["positions"],
            method="anchor_hidden",
        )
        hidden = hidden.reshape(-1, *hidden.shape[2:])
        return hidden, labels.reshape(-1, self.weights.labels), lengths.reshape(-1)

    def score(self, params: Params, frozen: Params, hidden, labels, label_lengths):
        """Loss and metrics of what ``draft`` gives: the LM head and all after it."""
        raise NotImplementedError

    def _cast(self, params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(self.dtype), params)


def frames_products(config: FramesConfig, length: int, anchors: int) -> tuple[int, int]:
    """Multiply-adds of a row's forward pass: of the frozen LM head, and of all else.

    An anchor sees half of the row on average.
    """
    c = config
    heads, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
    context = (len(c.taps) + 2 * c.follows) * c.width * c.width + c.num_layers * 2 * c.width * kv
    layer = c.width * (heads + 2 * kv) + heads * c.width + 3 * c.width * c.mlp_width
    scores = heads * (length + 2 * c.frames)
    draft = 2 * c.width * c.width + c.frames * c.num_layers * (layer + scores)
    return anchors * c.frames * c.width * c.vocab_size, length * context + anchors * draft
