"""A masked discrete-diffusion drafter: a window of masked tokens, filled in a few passes.

SpecDiff (arXiv 2408.05636, section 3) drafts with a masked diffusion model (MDLM, arXiv
2406.07524): a position of the window is masked or says a token; a pass gives the law of every
masked position given all that the window says, and some of them then say a token for good. A draft
costs T passes however long it is. SUBS parameterisation (MDLM, section 3.2.3): the mask is no
class, so it is never drafted, and what a position says is copied. As in MDLM's release the network
is not told t.

Where this differs from the releases: the context is not part of the bidirectional window, which
would forbid a cache of it. Features of the target are keys and values of every layer instead, as in
``draft.frames``, and kept exactly. How a window becomes a draft, and which laws are stated, is in
``draft.denoising``.

Shape letters: B batch, A anchors, F positions of the window, T passes, N tree nodes, M max depth,
V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from ctc_spec_jax.draft.denoising import (
    MASK,
    PASSES,
    BestPaths,
    Conditional,
    LeftToRight,
    WindowTree,
)
from ctc_spec_jax.draft.frames import FramesDrafter, FramesNetwork
from ctc_spec_jax.draft.frames_config import FramesConfig, frames_config
from ctc_spec_jax.draft.frames_loss import frames_products
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import output_head
from ctc_spec_jax.types import DraftContext, DraftTree, Params


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(FramesConfig):
    """Static description of a diffusion drafter network; hashable by value.

    ``passes`` is the T that it is trained for and drafts with unless told otherwise; 0 is any.
    """

    passes: int = PASSES


def diffusion_config(target: DecoderConfig, shape: Shape) -> DiffusionConfig:
    """A network for ``target``; ``shape.frames`` is the length of the window.

    Preset ``published`` is trained for all times, as MDLM is.

    Raises:
      InputError: another preset.
    """
    if shape.preset not in ("", "published"):
        raise InputError(f"drafter.preset: expected 'published' or '', found {shape.preset!r}")
    given = (shape.layers, shape.frames, shape.taps, shape.mlp_width)
    network = frames_config(DiffusionConfig, target, *given)
    return dataclasses.replace(network, passes=0) if shape.preset else network


class DiffusionNetwork(FramesNetwork):
    """A network over frames that say tokens or are masked; the mask is a vector of its own."""

    config: DiffusionConfig

    def setup(self):
        super().setup()
        width = self.config.width
        init = nn.initializers.normal(0.02)
        self.mask = self.param("mask", init, (width,))
        self.window = self.param("window", init, (width, width))
        self.window_norm = self.param("window_norm", nn.initializers.ones, (width,))

    def said(self, tokens, embedding):
        """What int32 [B, A, F] tokens or ``MASK`` add to the queries: [B, A, F, D].

        ``embedding`` [V, D] is the target's.
        """
        batch, anchors, frames = tokens.shape
        known = layers.embed(embedding, jnp.maximum(tokens, 0).reshape(batch, anchors * frames))
        known = layers.rms_norm(known, self.window_norm, self.config.norm_eps)
        known = layers.linear(known, self.window).reshape(*tokens.shape, -1)
        return jnp.where(tokens[..., None] == MASK, self.mask.reshape(1, 1, 1, -1), known)

    def __call__(self, taps, pending, anchors, target_params):
        """As that of ``FramesNetwork``, of windows that say nothing."""
        tokens = jnp.full((*anchors.shape, self.config.frames), MASK, jnp.int32)
        said = self.said(tokens, output_head(target_params).T)  # of no token, so of any table
        return super().__call__(taps, pending, anchors, target_params, said)


def diffusion_products(config: DiffusionConfig, length: int, anchors: int) -> tuple[int, int]:
    """As ``frames_products``."""
    head, others = frames_products(config, length, anchors)
    return head, others + anchors * config.frames * config.width * config.width


@dataclasses.dataclass(frozen=True)
class DiffusionDrafter(FramesDrafter):
    """The ``Drafter``: network and a ``WindowTree``. State as that of ``FramesDrafter``."""

    config: DiffusionConfig
    tree: WindowTree

    @property
    def states_law(self) -> bool:
        """Whether the drafts are drawn, from a law that they state."""
        return self.tree.states_law

    @property
    def network(self) -> DiffusionNetwork:
        """The Linen module that owns the parameters."""
        return DiffusionNetwork(self.config)

    def propose(self, params: Params, state, context: DraftContext, keys) -> DraftTree:
        """The passes, then the tree; see ``types.Drafter``."""

        def laws(tokens):
            said = self._apply(params, "said", tokens[:, None], context.params["embedding"])
            return self._log_probs(params, state, context, said)

        shape = self.config.frames, self.config.vocab_size
        return self.tree.draft(laws, shape, context, keys)


def diffusion_drafter(
    network: DiffusionConfig, nodes: int, depth: int, tree: str
) -> DiffusionDrafter:
    """A drafter; ``tree`` is ``greedy`` (the default), ``marginal``, ``siblings``, ``conditional``
    or ``left_to_right``; ``greedy-T`` and ``conditional-T`` take T passes.

    Raises:
      InputError: no such tree.
    """
    depth = max(1, min(depth, network.frames, nodes - 1))
    name, _, passes = tree.partition("-")
    known = tree in ("", "greedy", "marginal", "siblings", "conditional", "left_to_right")
    if not known and not (name in ("greedy", "conditional") and passes.isdecimal() and int(passes)):
        raise InputError(
            "tree: expected greedy, conditional (or with T passes, as in greedy-4), marginal, "
            f"siblings or left_to_right, found {tree!r}"
        )
    count = int(passes or network.passes or PASSES)
    if name == "siblings":
        depth = max(1, min(depth, (nodes - 1) // 4))
        branches = min((nodes - 1) // depth, network.vocab_size)  # siblings differ
        return DiffusionDrafter(network, Conditional(branches, depth, 1))
    chains = {
        "marginal": Conditional(1, depth, 1),
        "conditional": Conditional(1, depth, count),
        "left_to_right": LeftToRight(depth),
    }
    best = BestPaths(nodes, depth, count)
    return DiffusionDrafter(network, chains.get(name, best))
