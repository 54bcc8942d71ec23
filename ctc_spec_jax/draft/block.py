"""The block drafter: frame k says the k-th token, all frames at once and independent.

The network of ``draft.frames``, whose features of the target enter every layer as in DFlash (arXiv
2602.06036), with one token per frame in the place of a collapse. It is what a CTC drafter is
without CTC: the same network, data and tree size, so that the two can be compared. Frames attend to
each other both ways (preset ``marginal``, the default) or to those before them (preset ``causal``,
as in JetSpec, arXiv 2606.18394).

Where this differs from the published system: one pass without masked tokens in the queries, a
context that also tells which token came after each position, and a tree of the most probable paths
under the product of the frames' laws in the place of one chain.

Shape letters: A anchors, F frames, K labels, V vocabulary, D width, N tree nodes, M max depth.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ctc_spec_jax.chunked_head import chunked_token_log_probs
from ctc_spec_jax.draft.frames import FramesDrafter
from ctc_spec_jax.draft.frames_config import FramesConfig, frames_config
from ctc_spec_jax.draft.frames_loss import FramesLoss
from ctc_spec_jax.draft.training import Shape, by_position
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import output_head
from ctc_spec_jax.tree import best_paths
from ctc_spec_jax.types import Params


@dataclasses.dataclass(frozen=True)
class BlockConfig(FramesConfig):
    """Static description of a block drafter network; hashable by value."""


def block_config(target: DecoderConfig, shape: Shape) -> BlockConfig:
    """A network for ``target``; the preset says which frames see each other."""
    if shape.preset not in ("", "marginal", "causal"):
        raise InputError(f"drafter.preset: expected 'marginal' or 'causal', found {shape.preset!r}")
    given = (shape.layers, shape.frames, shape.taps, shape.mlp_width)
    network = frames_config(BlockConfig, target, *given)
    return dataclasses.replace(network, causal=shape.preset == "causal")


@dataclasses.dataclass(frozen=True)
class ProductTree:
    """The N most probable paths under the product of the frames' laws; a ``TreeBuilder``."""

    num_nodes: int
    max_depth: int

    def __call__(self, log_probs, pending):
        """(tokens, parents, valid), each [N], of log_probs [F, V] and the pending token []."""
        return best_paths.most_probable(log_probs, pending, self.num_nodes, self.max_depth)


@dataclasses.dataclass(frozen=True)
class BlockDrafter(FramesDrafter):
    """The ``Drafter``: a network over frames and the tree of their product."""

    config: BlockConfig
    tree: ProductTree


@dataclasses.dataclass(frozen=True)
class BlockLoss(FramesLoss):
    """Cross-entropy of frame k on the k-th token; a ``training.DraftLoss``.

    Frames past ``weights.labels`` are not trained. Metrics are means over the anchors, by position
    [K]; a label past the end of the answer adds 0. ``loss_at``: nats; ``accuracy_at``: the most
    probable token is right; ``prefix_at``: it is, and those of all frames before it are.
    """

    drafter: BlockDrafter

    def score(self, params: Params, frozen: Params, hidden, labels, label_lengths):
        """Loss and metrics of hidden [A, F, D]: the LM head and all after it."""
        del params
        count = min(labels.shape[1], hidden.shape[1])
        labels = labels[:, :count]
        chunk = self.weights.chunk * self.shards
        log_prob, best = chunked_token_log_probs(
            hidden[:, :count], output_head(frozen), labels, chunk
        )
        metrics = by_position(log_prob, best, label_lengths)
        decay = self.weights.decay ** jnp.arange(count, dtype=jnp.float32)
        return jnp.sum(decay / jnp.sum(decay) * metrics["loss_at"]), metrics
