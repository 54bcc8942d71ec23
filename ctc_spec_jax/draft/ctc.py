"""The CTC drafter: all frames in one pass, collapsed into a tree of distinct continuations.

A frame carries probabilities over V tokens and one own blank class (class V, never a reused token
id). Collapse: merge adjacent repeats, then delete blanks (Graves et al. 2006). Drafting with it is
CTC-drafter (Wen et al., NeurIPS 2024, arXiv 2412.00061); the network is that of ``draft.frames``.

Where this differs from the published release: one non-autoregressive pass instead of four
sequential ones, an own blank class instead of token 0, and, by default, the exact prefix tree
instead of a static template and a context that also tells which token came after each position.
``published`` builds the paper's configuration.

Shape letters: F frames, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctc_spec_jax.draft.frames import FramesDrafter, FramesNetwork
from ctc_spec_jax.draft.frames_config import FramesConfig, frames_config
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import output_logits
from ctc_spec_jax.types import Params


@dataclasses.dataclass(frozen=True)
class CTCConfig(FramesConfig):
    """Static description of a CTC drafter network; hashable by value."""


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
    last = (target.num_layers - 1,)
    return frames_config(CTCConfig, target, num_layers=1, frames=6, taps=last, follows=False)


class CTCNetwork(FramesNetwork):
    """A network over frames with one more class, the blank: one row and a bias of its own."""

    config: CTCConfig

    def setup(self):
        super().setup()
        self.blank = self.param("blank", nn.initializers.normal(0.02), (self.config.width,))
        self.blank_bias = self.param("blank_bias", nn.initializers.zeros, ())

    def log_probs(self, hidden, target_params: Params):
        """Frame log-probabilities [..., V+1] float32 of hidden [..., D]; class V is the blank."""
        tokens = output_logits(target_params, hidden)
        blank = jnp.sum((hidden * self._row(hidden.ndim)).astype(jnp.float32), -1, keepdims=True)
        blank = blank + self.blank_bias.astype(jnp.float32).reshape((1,) * hidden.ndim)
        return jax.nn.log_softmax(jnp.concatenate([tokens, blank], axis=-1), axis=-1)

    def _row(self, rank: int):
        return self.blank.reshape((1,) * (rank - 1) + self.blank.shape)


@dataclasses.dataclass(frozen=True)
class CTCDrafter(FramesDrafter):
    """The ``Drafter``: network and tree builder, which collapses frames into a tree."""

    config: CTCConfig

    @property
    def network(self) -> CTCNetwork:
        """The Linen module that owns the parameters."""
        return CTCNetwork(self.config)
