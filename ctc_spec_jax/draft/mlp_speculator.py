"""The MLP speculator: a short recurrent chain that mixes a state with the token drafted last.

With s_0 the hidden state of the newest committed token (``draft.heads``), v_0 the pending token,
v_i the token drafted by head i, heads i = 0..K-1::

    h       = s_i P_i + (e/w) E_i[v_i]
    s_{i+1} = gelu(norm(h) * a_i + b_i)
    logits  = s_{i+1} H_i                      w = 0.5^(1/(2K)),  e = sqrt((1 - w^2) E / 2)

with a norm by the root mean square. All matrices begin with standard deviation 1/sqrt(E). Where
states have a mean square of 1/2 (the scaled input does, gelu of a normed state nearly), every head
keeps w^2 of the variance that is left of s_0, so after K heads half of the state is still s_0.
Wertheimer et al. 2024, arXiv 2404.19124, and its release.

Where this differs from the release: the tree is that of the most probable paths of any depth, where
the release takes the best of the paths of full depth with a few candidates per head. The release
trains in two stages, on text and then on what the target writes after short prompts: two runs of
the same program, see ``configs/demo_mlp_speculator.yaml``.

Shape letters: B batch, X drafts in parallel, K heads, V vocabulary, D width of the target, E inner
width.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctc_spec_jax.draft.heads import HeadsDrafter, check_config, last_tap
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.sharding import gather_width
from ctc_spec_jax.types import Params

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class MLPSpeculatorConfig:
    """Static description of K heads of width ``inner``; hashable by value.

    ``tied`` 1: all heads share embedding, LM head and norm, and all but the first the projection of
    the state. ``scale_input`` 1: s_0 is normed without parameters and divided by sqrt(2).
    ``norm_eps`` is that of the target's final norm.
    """

    width: int
    vocab_size: int
    heads: int
    inner: int
    taps: tuple[int, ...]
    tied: int = 0
    scale_input: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self):
        check_config(self, heads=1, inner=1, tied=0, scale_input=0)

    @property
    def state_weight(self) -> float:
        """w, the share of a state that comes from the state before, as magnitude."""
        return 0.5 ** (0.5 / self.heads)

    @property
    def token_weight(self) -> float:
        """e / w, the factor of the embedding beside a state of full weight."""
        w = self.state_weight
        return math.sqrt((1 - w**2) * self.inner / 2) / w

    def products(self, length: int, anchors: int) -> tuple[int, int]:
        """Multiply-adds of a row's forward pass: of the frozen LM head (none), and of all else."""
        del length
        state = self.width + (self.heads - 1) * self.inner
        return 0, anchors * self.inner * (state + self.heads * self.vocab_size)


def mlp_speculator_config(target: DecoderConfig, shape: Shape) -> MLPSpeculatorConfig:
    """A speculator for ``target`` with ``frames`` heads of inner width ``width``, or the target's.

    Preset ``tied`` shares weights among heads and scales the input, as the larger releases do.
    """
    return MLPSpeculatorConfig(
        width=target.width,
        vocab_size=target.vocab_size,
        heads=shape.frames,
        inner=shape.width or target.width,
        taps=last_tap(target, shape, "tied"),
        tied=int(shape.preset == "tied"),
        scale_input=int(shape.preset == "tied"),
        norm_eps=target.norm_eps,
    )


class MLPSpeculatorNetwork(nn.Module):
    """Parameters and forward pass of the heads; a ``heads.HeadsNetwork``."""

    config: MLPSpeculatorConfig

    def setup(self):
        c = self.config
        own, inner = 1 if c.tied else c.heads, c.inner
        init = nn.initializers.normal(inner**-0.5)
        self.first_state = self.param("first_state", init, (c.width, inner))
        later = min(own, c.heads - 1)
        self.states = self.param("states", init, (later, inner, inner)) if later else ()
        self.tokens = self.param("token_embedding", init, (own, c.vocab_size, inner))
        self.scales = self.param("scales", nn.initializers.ones, (own, inner))
        self.shifts = self.param("shifts", nn.initializers.zeros, (own, inner))
        self.own = self.param("own_heads", init, (own, inner, c.vocab_size))

    def __call__(self, feature):
        return self.start(feature)

    def start(self, feature):
        """s_0 [B, X, D]."""
        if not self.config.scale_input:
            return feature
        ones = jnp.ones(feature.shape[-1:], feature.dtype)
        return layers.rms_norm(feature, ones, _EPS) * 2**-0.5

    def step(self, head: int, carry, tokens, table):
        """s_{i+1} [B, X, E], carry and output in one."""
        del table
        own = 0 if self.config.tied else head
        mixed = self.mix(head, carry, tokens)
        normed = layers.rms_norm(mixed, self.scales[own], _EPS)
        shift = self.shifts[own].reshape((1,) * (normed.ndim - 1) + (-1,))
        state = jax.nn.gelu(normed + shift, approximate=False)
        return state, state

    def mix(self, head: int, carry, tokens):
        """h [B, X, E]: the state and the token, weighted."""
        c = self.config
        kernel = self.states[0 if c.tied else head - 1] if head else self.first_state
        embedded = layers.embed(self.tokens[0 if c.tied else head], tokens)
        return gather_width(layers.linear(carry, kernel)) + c.token_weight * embedded

    def output(self, target_params: Params):
        """LM heads [K, E, V], or [E, V] where they are tied."""
        del target_params
        return self.own[0] if self.config.tied else self.own


@dataclasses.dataclass(frozen=True)
class MLPSpeculatorDrafter(HeadsDrafter):
    """The ``Drafter``; its tree is a beam over the heads."""

    @property
    def network(self) -> MLPSpeculatorNetwork:
        """The Linen module that owns the parameters."""
        return MLPSpeculatorNetwork(self.config)
