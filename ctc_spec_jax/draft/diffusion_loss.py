"""What a diffusion drafter is trained on: windows of the target's text, a share of each masked.

The bound of masked diffusion (MDLM, arXiv 2406.07524, sections 3.3 to 3.5) with the log-linear
schedule sigma(t) = -log(1 - (1 - e) t): every position is masked with the chance 1 - exp(-sigma)
and costs its cross-entropy times sigma' / (exp(sigma) - 1), which is 1/t.

A draft of T passes meets the times 1/T, 2/T, .. 1 alone, and first of all a window that is masked
throughout, which times between 0 and 1 hardly show. So a network for T passes is trained at those
times: the bound of T steps, whose weights (alpha_s - alpha_t) / (1 - alpha_t) are 1/(T t).

Differences from MDLM's release: that, unless the network is for any number of passes; a window
follows an anchor, whose text and features it sees; times are spread over the anchors of a row;
position k counts ``decay ** (k - 1)``, normalised, and 1 for the bound itself. What lies past the
end of an answer is masked and costs nothing.

Shape letters: B rows, T tokens of a row or passes, A anchors, F positions of the window, K labels,
D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax.chunked_head import chunked_token_log_probs
from ctc_spec_jax.draft.anchors import sample_anchors
from ctc_spec_jax.draft.denoising import MASK
from ctc_spec_jax.draft.diffusion import DiffusionDrafter
from ctc_spec_jax.draft.frames_loss import FramesLoss
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.decoder import output_head
from ctc_spec_jax.types import Params

EPSILON = 1e-3
"""e of the schedule, and the earliest time that is drawn."""


def mask_chance(time):
    """1 - exp(-sigma) of the log-linear schedule, at times in (0, 1]."""
    return (1 - EPSILON) * time


def antithetic_times(key, count: int, passes: int = 0):
    """Float32 [count], one in each of as many equal parts of (0, 1], in a random order.

    The order, because anchors go along the text. With ``passes`` T the times are 1/T, 2/T, .. 1;
    else they begin at ``EPSILON``. ``key`` is consumed.
    """
    order, inside = jax.random.split(key)
    part = jax.random.permutation(order, count).astype(jnp.float32)
    uniform = (part + jax.random.uniform(inside, (count,))) / count
    if passes:
        # Rounding may lift a number to 1.
        return (jnp.minimum(jnp.floor(uniform * passes), passes - 1) + 1) / passes
    return EPSILON + (1 - EPSILON) * uniform


def masked_windows(keys, labels, lengths, passes: int = 0):
    """Windows of labels int32 [B, A, F], of which ``lengths`` [B, A] count, and times [B, A].

    The times are those of so many passes, or any if that is 0.

    Returns:
      int32 [B, A, F], ``MASK`` at masked positions and past the lengths; float32 [B, A].
    """

    def row(key, labels, lengths):
        when, which = jax.random.split(key)
        time = antithetic_times(when, len(lengths), passes)
        masked = jax.random.uniform(which, labels.shape) < mask_chance(time)[:, None]
        past = jnp.arange(labels.shape[1], dtype=jnp.int32)[None] >= lengths[:, None]
        return jnp.where(masked | past, MASK, labels), time

    return jax.vmap(row)(keys, labels, lengths)


@dataclasses.dataclass(frozen=True)
class DiffusionLoss(FramesLoss):
    """Cross-entropy of masked positions over random anchors; a ``training.DraftLoss``.

    Metrics are means over the anchors, by position [F], weighted by 1/t as the loss is, which
    makes of both an average over all times. ``loss_at``: nats, a bound on
    those of the window; ``accuracy_at``: the most probable token is right.
    """

    drafter: DiffusionDrafter

    def __post_init__(self):
        frames = self.drafter.config.frames
        if self.weights.labels < frames:
            raise InputError(
                f"loss.labels: expected at least the {frames} tokens of a window (drafter.frames), "
                f"found {self.weights.labels}"
            )

    def loss(self, params: Params, frozen: Params, batch, keys):
        """See ``training.DraftLoss``."""
        anchor_keys, mask_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        frames, passes = self.drafter.config.frames, self.drafter.config.passes
        anchors, labels, lengths = sample_anchors(anchor_keys, batch, self.anchors, frames)
        windows, times = masked_windows(mask_keys, labels, lengths, passes)
        hidden = self.hidden(params, frozen, batch, anchors, windows)
        whole = (hidden, windows == MASK, times, labels, lengths)
        hidden, masked, times, labels, lengths = (x.reshape(-1, *x.shape[2:]) for x in whole)
        value, metrics = self.score_windows(frozen, hidden, masked, times, labels, lengths)
        return value, jnp.sum(lengths > 0), metrics

    def hidden(self, params: Params, frozen: Params, batch, anchors, windows):
        """Hidden states [B, A, F, D] of windows int32 [B, A, F] after anchors int32 [B, A]."""
        params = self._cast(params)
        network: Any = self.drafter.network.clone(remat=self.remat)
        said = network.apply({"params": params}, windows, frozen["embedding"], method="said")
        return network.apply(
            {"params": params},
            self.taps(frozen, batch),
            layers.embed(frozen["embedding"], batch["tokens"]),
            anchors,
            batch["segments"],
            batch["positions"],
            said,
            method="anchor_hidden",
        )

    def score_windows(self, frozen: Params, hidden, masked, times, labels, lengths):
        """Loss and metrics of hidden [A, F, D]: the LM head and all after it.

        Args:
          frozen: of the target.
          hidden: [A, F, D].
          masked: bool [A, F].
          times: float32 [A].
          labels: int32 [A, F].
          lengths: int32 [A], labels that count.
        """
        chunk = self.weights.chunk * self.shards
        log_prob, best = chunked_token_log_probs(hidden, output_head(frozen), labels, chunk)
        place = jnp.arange(labels.shape[1], dtype=jnp.int32)[None]
        counts = masked & (place < lengths[:, None])
        weight = jnp.where(counts, 1 / times[:, None], 0.0)
        anchors = jnp.maximum(jnp.sum(lengths > 0), 1).astype(jnp.float32)

        def at(x):
            return jnp.sum(weight * x, axis=0) / anchors

        metrics = {"loss_at": at(-log_prob), "accuracy_at": at(best.astype(jnp.float32))}
        decay = self.weights.decay ** jnp.arange(labels.shape[1], dtype=jnp.float32)
        return jnp.sum(decay / jnp.sum(decay) * metrics["loss_at"]), metrics
