"""What training asks of a drafting method: a shape for its network, and a loss.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array

from ctc_spec_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an experiment says about a network; 0 and () leave it to the method.

    ``frames`` counts what one pass predicts: frames, heads or steps. ``taps`` are layers of the
    target whose outputs are read; ``width`` and ``mlp_width`` are those of the method's own layers.
    """

    preset: str = ""
    layers: int = 1
    frames: int = 12
    taps: tuple[int, ...] = ()
    width: int = 0
    mlp_width: int = 0


@dataclasses.dataclass(frozen=True)
class Loss:
    """Weights of the objectives over ``labels`` future tokens.

    ``decay`` weights the k-th prefix, or the k-th token, by ``decay ** (k - 1)``. Drafts without a
    law per token take ``prefix``, ``ctc`` and ``expected_length``; the others ``cross_entropy``
    (the data's next token) and divergences from the target's law at ``temperature``; see
    ``distillation``, also for ``beta``. Where drafts are text of a model of its own, a row's
    answers are drawn from the drafter with probability ``on_policy``. ``chunk`` anchors have logits
    at a time, on each of the devices that share the rows.
    """

    labels: int = 8
    prefix: float = 1.0
    ctc: float = 0.0
    expected_length: float = 0.0
    cross_entropy: float = 1.0
    forward_kl: float = 0.0
    reverse_kl: float = 0.0
    jensen_shannon: float = 0.0
    total_variation: float = 0.0
    beta: float = 0.5
    temperature: float = 1.0
    on_policy: float = 0.0
    decay: float = 0.9
    chunk: int = 64


DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
"""Fields of ``Loss`` that weigh a divergence of a drafter's law from the target's."""


def by_position(log_prob, best, label_lengths) -> dict[str, Array]:
    """Metrics of K labels after every anchor, means over the anchors that have one, by position.

    Args:
      log_prob: float32 [A, K], of the labels, nats.
      best: bool [A, K], no token is more probable.
      label_lengths: int32 [A], labels that count; one past them adds 0.

    Returns:
      ``loss_at`` [K]: nats; ``accuracy_at`` [K]: the label is the most probable token;
      ``prefix_at`` [K]: it is, and so are all before it.
    """
    real = jnp.arange(log_prob.shape[1], dtype=jnp.int32)[None] < label_lengths[:, None]
    anchors = jnp.maximum(jnp.sum(label_lengths > 0), 1).astype(jnp.float32)
    right = (best & real).astype(jnp.float32)

    def at(x):
        return jnp.sum(jnp.where(real, x, 0.0), axis=0) / anchors

    prefix = jnp.cumprod(right, axis=1)
    return {"loss_at": at(-log_prob), "accuracy_at": at(right), "prefix_at": at(prefix)}


class DraftLoss(Protocol):
    """The loss of a method: a frozen dataclass made of ``(lm, drafter, weights, anchors, dtype,
    remat, shards)``.

    ``anchors`` drafts are trained per row; ``dtype`` is that of the computation; ``remat``
    recomputes the drafter's layers in the backward pass; ``shards`` devices share the rows.
    """

    def loss(self, params: Params, frozen: Params, batch, keys) -> tuple[Array, Array, Any]:
        """Mean loss of a micro-batch, what it is a mean over, and metrics that are such means.

        Args:
          params: of the drafter, float32.
          frozen: of the target.
          batch: tokens, segments (0 is padding) and positions int32 [B, T], trained bool [B, T];
            stops int32 [X] where known. Rows of a decode may say where drafts failed: ``refused``
            bool [B, T], tokens that replaced a refused one, and ``roots`` bool [B, T], pending
            tokens of those drafts; then no others are learnt from.
          keys: typed keys [B], one per row.
        """
        ...
