"""What heads are trained on: the target's next tokens, or its law of them, after random anchors.

Head k of an anchor learns the k-th token after it, given the text before (teacher forcing), with
the weight ``decay ** (k - 1)``, normalised over the heads.

Shape letters: B rows, T tokens, A anchors, K heads in training, V vocabulary, D width, E width of a
head's output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax.chunked_head import chunked_token_log_probs
from ctc_spec_jax.distillation import chunked_distillation
from ctc_spec_jax.draft.anchors import sample_anchors
from ctc_spec_jax.draft.heads import head_of
from ctc_spec_jax.draft.training import DIVERGENCES, Loss, by_position
from ctc_spec_jax.models.decoder import DecoderLM, output_head
from ctc_spec_jax.types import Params


@dataclasses.dataclass(frozen=True)
class HeadsLoss:
    """Cross-entropy and divergences of heads over random anchors; a ``training.DraftLoss``.

    The first ``weights.labels`` heads are trained. The target's laws are those that it has on the
    text of the row.
    """

    lm: DecoderLM
    drafter: Any  # a ``heads.HeadsDrafter``, where ``read`` is as here
    weights: Loss
    anchors: int
    dtype: Any = jnp.float32
    remat: bool = False
    shards: int = 1

    @property
    def num_labels(self) -> int:
        """K, heads that are trained."""
        return min(self.weights.labels, self.drafter.config.heads)

    def loss(self, params: Params, frozen: Params, batch, keys):
        """See ``training.DraftLoss``.

        Metrics are means over the anchors, by head [K]; a head whose label lies past the end of
        the answer adds 0. ``loss_at``: nats; ``accuracy_at``: its most probable token is right;
        ``prefix_at``: its own and those of all heads before it are; then the divergences in use.
        """
        params = jax.tree.map(lambda x: x.astype(self.dtype), params)
        outputs, laws, labels, lengths = self.draft(params, frozen, batch, keys)
        real = jnp.arange(self.num_labels, dtype=jnp.int32)[None] < lengths[:, None]
        head = self.drafter.output_head(params, frozen)
        chunk = self.weights.chunk * self.shards
        log_prob, best = chunked_token_log_probs(outputs, head, labels, chunk)
        count = jnp.sum(lengths > 0)
        metrics = by_position(log_prob, best, lengths)
        decay = self.weights.decay ** jnp.arange(self.num_labels, dtype=jnp.float32)
        decay = decay / jnp.sum(decay)
        loss = self.weights.cross_entropy * jnp.sum(decay * metrics["loss_at"])
        used = {name: getattr(self.weights, name) for name in DIVERGENCES}
        used = {name: weight for name, weight in used.items() if weight}
        if used:
            found = self._divergences(used, outputs, head, laws, frozen, real)
            share = jnp.sum(real, axis=0).astype(jnp.float32)
            share = share / jnp.maximum(count, 1).astype(jnp.float32)
            metrics |= {name: value * share for name, value in found.items()}
            loss += sum(weight * jnp.sum(decay * metrics[name]) for name, weight in used.items())
        return loss, count, metrics

    def draft(self, params: Params, frozen: Params, batch, keys):
        """What there is to learn, for A anchors of every row.

        Returns:
          Outputs of the heads [B*A, K, E], the target's hidden states [B*A, K, D] that its laws of
          the labels come from, labels int32 [B*A, K], and how many of them count [B*A].
        """
        tokens = batch["tokens"]
        anchors, labels, lengths = sample_anchors(keys, batch, self.anchors, self.num_labels)
        pending = jnp.take_along_axis(tokens, anchors, axis=1)[..., None]
        known = jnp.concatenate([pending, labels[..., :-1]], axis=-1)
        final, outputs = self.read(params, frozen, batch, anchors, known)
        # The law of the k-th token after the anchor is known where the token before it was read.
        ahead = anchors[..., None] + jnp.arange(self.num_labels, dtype=jnp.int32)[None, None]
        ahead = jnp.minimum(ahead, tokens.shape[1] - 1).reshape(len(tokens), -1, 1)
        laws = jnp.take_along_axis(final, ahead, axis=1)
        whole = (outputs, laws.reshape(*outputs.shape[:3], -1), labels, lengths)
        outputs, laws, labels, lengths = (x.reshape(-1, *x.shape[2:]) for x in whole)
        return outputs, laws, labels, lengths

    def read(self, params: Params, frozen: Params, batch, anchors, known):
        """One pass of the target and of the heads.

        Args:
          params: of the drafter.
          frozen: of the target.
          batch: see ``loss``.
          anchors: int32 [B, A].
          known: int32 [B, A, K], the token before each one that is predicted.

        Returns:
          The target's hidden states [B, T, D], the inputs of its LM head, and outputs of the
          heads [B, A, K, E].
        """
        places = batch["segments"], batch["positions"]
        final, taps = self.lm.packed_hidden(frozen, batch["tokens"], *places, self.drafter.taps)
        feature = self.features(frozen, taps, anchors, batch["positions"])
        run = jax.checkpoint(self.drafter.outputs) if self.remat else self.drafter.outputs
        return final, run(params, frozen, feature, known)

    def features(self, frozen: Params, taps, anchors, positions):
        """What the heads read at anchors int32 [B, A]: [B, A, D], of the token before each.

        ``taps`` are of whole rows, [B, T, D]; ``positions`` int32 [B, T] count within a document.
        """
        before = jnp.maximum(anchors - 1, 0)[..., None]
        feature = self.drafter.feature(frozen, jnp.take_along_axis(taps[0], before, axis=1))
        place = jnp.take_along_axis(positions, anchors, axis=1)
        return jnp.where((place > 0)[..., None], feature, 0)

    def _divergences(self, used, outputs, head, laws, frozen, real):
        """Mean of every divergence by head, [K]."""
        options: Any = {"temperature": self.weights.temperature, "beta": self.weights.beta}
        found = []
        for k in range(self.num_labels):
            given = (laws[:, k], output_head(frozen), outputs[:, k], head_of(head, k), real[:, k])
            chunk = self.weights.chunk * self.shards
            found.append(chunked_distillation(*given, used, chunk, **options)[1])
        return {name: jnp.stack([values[name] for values in found]) for name in used}
