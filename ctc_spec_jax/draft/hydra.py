"""The Hydra drafter: heads in sequence, each of which also sees the tokens drafted before it.

Head k reads the hidden state of the newest committed token (``draft.heads``) and the target's
embeddings of the pending token and of the k-1 tokens drafted on the path: a projection of all of
them plus a gated one, residual blocks, an LM head. Hydra: Ankner et al. 2024, arXiv 2402.05109.

Where this differs from the published release: by default the LM head is the target's, shared and
frozen (``own_heads`` gives each head one, from random numbers; the release copies the target's);
embeddings are normed by an own scale, since those of many targets are far smaller than its hidden
states; the tree is that of the most probable paths, where the release has a fixed one. Hydra++'s
attention over the prefix is left out.

Shape letters: B batch, X drafts in parallel, K heads, L blocks of a head, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctc_spec_jax.draft.heads import (
    HeadsDrafter,
    check_config,
    last_tap,
    own_or_shared,
    residual_blocks,
)
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.sharding import gather_width
from ctc_spec_jax.types import Params


@dataclasses.dataclass(frozen=True)
class HydraConfig:
    """Static description of K heads of ``num_layers`` blocks, the first one over all it reads.

    ``own_heads`` is 1 where every head has an LM head of its own, 0 where all share the target's.
    ``norm_eps`` is that of the target's final norm.
    """

    width: int
    vocab_size: int
    heads: int
    taps: tuple[int, ...]
    num_layers: int = 1
    own_heads: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self):
        check_config(self, heads=1, num_layers=1, own_heads=0)

    def products(self, length: int, anchors: int) -> tuple[int, int]:
        """Multiply-adds of a row's forward pass: of the frozen LM head, and of all else."""
        del length
        head = anchors * self.heads * self.width * self.vocab_size
        read = sum(2 * (k + 2) for k in range(self.heads))
        blocks = anchors * (read + self.heads * (self.num_layers - 1)) * self.width**2
        return (0, blocks + head) if self.own_heads else (head, blocks)


def hydra_config(target: DecoderConfig, shape: Shape) -> HydraConfig:
    """Heads for ``target``: ``frames`` of ``layers`` blocks; preset ``published`` has own heads."""
    return HydraConfig(
        width=target.width,
        vocab_size=target.vocab_size,
        heads=shape.frames,
        taps=last_tap(target, shape, "published"),
        num_layers=shape.layers,
        own_heads=int(shape.preset == "published"),
        norm_eps=target.norm_eps,
    )


def _pass_on(key, shape):
    """A fresh head passes the hidden state on, so it says what the target's own head says."""
    del key
    return jnp.zeros(shape).at[: shape[2], 0].set(jnp.eye(shape[2]))


class HydraNetwork(nn.Module):
    """Parameters and forward pass of the heads; a ``heads.HeadsNetwork``.

    The carry is what a head reads: [B, X, (k+1) D], the hidden state and the tokens so far.
    """

    config: HydraConfig

    def setup(self):
        c, zeros = self.config, nn.initializers.zeros
        more, mixes, blocks = c.num_layers - 1, [], []
        for k in range(c.heads):
            name, read = f"head_{k}_", (k + 2) * c.width
            mixes.append(
                (
                    self.param(name + "mix", _pass_on, (read, 2, c.width)),
                    self.param(name + "mix_bias", zeros, (2, c.width)),
                )
            )
            if more:
                kernels = self.param(name + "blocks", zeros, (more, c.width, c.width))
                blocks.append((kernels, self.param(name + "biases", zeros, (more, c.width))))
        self.mixes, self.blocks = mixes, blocks
        self.token_norm = self.param("token_norm", nn.initializers.ones, (c.width,))
        own = (c.heads, c.width, c.vocab_size)
        init = nn.initializers.normal(0.02)
        self.own = self.param("own_heads", init, own) if c.own_heads else None

    def __call__(self, feature):
        return self.start(feature)

    def start(self, feature):
        """The hidden state; tokens follow."""
        return feature

    def step(self, head: int, carry, tokens, table):
        """The mix of hidden state and tokens, then the blocks of a head: [B, X, D]."""
        embedded = layers.embed(table, tokens).astype(carry.dtype)
        embedded = layers.rms_norm(embedded, self.token_norm, self.config.norm_eps)
        carry = jnp.concatenate([carry, embedded], axis=-1)
        both = layers.linear(carry, *self.mixes[head])  # [B, X, 2, D]
        mixed = gather_width(both[..., 0, :] + jax.nn.silu(both[..., 1, :]))
        return carry, residual_blocks(mixed, *self.blocks[head]) if self.blocks else mixed

    def output(self, target_params: Params):
        """LM heads [K, D, V], or the target's [D, V]."""
        return own_or_shared(self.own, target_params)


@dataclasses.dataclass(frozen=True)
class HydraDrafter(HeadsDrafter):
    """The ``Drafter``; its tree is a beam over the heads."""

    @property
    def network(self) -> HydraNetwork:
        """The Linen module that owns the parameters."""
        return HydraNetwork(self.config)
