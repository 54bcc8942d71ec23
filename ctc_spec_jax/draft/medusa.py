"""The Medusa drafter: independent heads, a tree of the most probable paths under their product.

Every head is residual blocks on the hidden state of the newest committed token (``draft.heads``)
and an LM head; it ignores the drafted tokens and the pending one. Medusa: Cai et al. 2024, arXiv
2401.10774.

Where this differs from the published release: by default the LM head is the target's, shared and
frozen, where the release gives every head a copy and trains it (``own_heads`` does, but from random
numbers); the tree is by default that of the most probable paths, made anew every round, where the
release has a fixed one; that one (``template``) has the release's number of nodes at each depth,
not its list of paths. The release's typical acceptance is not lossless and is not used.

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
    head_of,
    last_tap,
    log_probs,
    own_or_shared,
    residual_blocks,
)
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.tree import best_paths
from ctc_spec_jax.tree.build import Template, top_k
from ctc_spec_jax.types import DraftContext, DraftTree, Params


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """Static description of K heads of ``num_layers`` residual blocks; hashable by value.

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
        blocks = anchors * self.heads * self.num_layers * self.width**2
        return (0, blocks + head) if self.own_heads else (head, blocks)


def medusa_config(target: DecoderConfig, shape: Shape) -> MedusaConfig:
    """Heads for ``target``: ``frames`` of ``layers`` blocks; preset ``published`` has own heads."""
    return MedusaConfig(
        width=target.width,
        vocab_size=target.vocab_size,
        heads=shape.frames,
        taps=last_tap(target, shape, "published"),
        num_layers=shape.layers,
        own_heads=int(shape.preset == "published"),
        norm_eps=target.norm_eps,
    )


class MedusaNetwork(nn.Module):
    """Parameters and forward pass of the heads; a ``heads.HeadsNetwork``."""

    config: MedusaConfig

    def setup(self):
        c = self.config
        # A fresh head says what the target's own head says, as in the release.
        zeros, square = nn.initializers.zeros, (c.num_layers, c.width, c.width)
        names = [f"head_{k}_" for k in range(c.heads)]
        self.blocks = [self.param(name + "blocks", zeros, square) for name in names]
        self.biases = [self.param(name + "biases", zeros, square[:2]) for name in names]
        own = (c.heads, c.width, c.vocab_size)
        init = nn.initializers.normal(0.02)
        self.own = self.param("own_heads", init, own) if c.own_heads else None

    def __call__(self, feature):
        return self.start(feature)

    def start(self, feature):
        """Every head reads the hidden state."""
        return feature

    def step(self, head: int, carry, tokens, table):
        """The blocks of a head on [B, X, D]."""
        del tokens, table
        return carry, residual_blocks(carry, self.blocks[head], self.biases[head])

    def output(self, target_params: Params):
        """LM heads [K, D, V], or the target's [D, V]."""
        return own_or_shared(self.own, target_params)


@dataclasses.dataclass(frozen=True)
class MedusaDrafter(HeadsDrafter):
    """The ``Drafter``. With a ``template``, whose size is then that of the tree, it is static."""

    template: Template | None = None

    @property
    def network(self) -> MedusaNetwork:
        """The Linen module that owns the parameters."""
        return MedusaNetwork(self.config)

    def propose(self, params: Params, state, context: DraftContext, keys) -> DraftTree:
        """One pass of all heads, then the tree of each row; deterministic."""
        del keys
        tokens = jnp.broadcast_to(context.pending[:, None, None], (len(state), 1, self.max_depth))
        outputs = self.outputs(params, context.params, state[:, None], tokens)[:, 0]
        head = self.output_head(params, context.params)
        if head.ndim == 2:
            laws = log_probs(outputs, head)
        else:
            every = [
                log_probs(outputs[:, k], head_of(head, k))[:, None] for k in range(self.max_depth)
            ]
            laws = jnp.concatenate(every, axis=1)
        return DraftTree(*jax.vmap(self._tree)(laws, context.pending))

    def _tree(self, laws, pending):
        """(tokens, parents, valid), each [N], of laws [M, V] and the pending token []."""
        if self.template is None:
            return best_paths.most_probable(laws, pending, self.num_nodes, self.max_depth)
        _, ranked = top_k(laws, self.template.top_k)
        parents = jnp.asarray(self.template.parents, jnp.int32)
        tokens = self.template.fill(ranked.astype(jnp.int32), pending)
        return tokens, parents, jnp.ones_like(parents, bool)
