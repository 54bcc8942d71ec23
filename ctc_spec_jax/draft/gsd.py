"""Drafts of a small language model that share runs of tokens: GSD.

Graph-structured speculative decoding (Gong et al. 2024, arXiv 2407.16207, section 3). The draft
grows layer by layer as a graph (``tree.graph``), one pass of the small model per layer, and is
unrolled to a tree for the target. Through redirects paths get longer than there were passes.

The tree is fixed before the target speaks: greedy rows take the target's best tokens, sampled rows
its draws (``TargetSample``). A node that was reached by a redirect has no law of its own, for its
candidates were drafted behind another text; so none is stated, and the rules that need one refuse.

Unlike the release: its other mode, which accepts siblings independently of each other and takes the
longest path, is lossy and left out; after a round the small model reads what was emitted, whether a
redirect was used or not; passes feed all nodes of a draft again (see ``small_lm``); a layer has a
greatest width; rows of a batch stop by themselves; sampled rows draft from their processed law.

Shape letters: B batch, N tree nodes, M max depth, L nodes of one layer, E children of a node,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax.draft.small_lm import OfLanguageModel, SmallLM, proposal_law
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM, output_logits
from ctc_spec_jax.tree import build
from ctc_spec_jax.tree import graph as graphs
from ctc_spec_jax.tree.graph import NO_NODE, Graph, Rules
from ctc_spec_jax.types import (
    ROOT,
    Acceptance,
    DraftContext,
    DraftTree,
    Params,
    TargetOutput,
)


@dataclasses.dataclass(frozen=True)
class GSD(OfLanguageModel):
    """The ``Drafter``: ``layers`` passes at most make a graph of at most N nodes, and it a tree.

    ``children`` candidates of every node are looked at, of at most ``width`` nodes of a layer.
    State: as of ``SmallLM``.
    """

    lm: DecoderLM
    num_nodes: int
    max_depth: int
    layers: int
    rules: Rules = dataclasses.field(default_factory=Rules)
    children: int = 4
    width: int = 16
    taps: tuple[int, ...] = (0,)

    @property
    def _reader(self) -> SmallLM:
        """What reads the text."""
        return SmallLM(self.lm, (1,))

    def init(self, params: Params, context: DraftContext, taps):
        """Pass over the prompt; see ``types.Drafter``."""
        return self._reader.init(params, context, taps)

    def propose(self, params: Params, state, context: DraftContext, keys) -> DraftTree:
        """See ``types.Drafter``; deterministic."""
        del keys
        graph = self.draft(params, state, context)
        tree = jax.vmap(lambda one: graphs.unroll(one, self.num_nodes, self.max_depth))(graph)
        return DraftTree(tree.tokens, tree.parents, tree.valid)

    def commit(
        self,
        params: Params,
        state,
        context: DraftContext,
        output: TargetOutput,
        acceptance: Acceptance,
    ):
        """Read what the round emitted; see ``types.Drafter``."""
        return self._reader.commit(params, state, context, output, acceptance)

    def draft(self, params: Params, state, context: DraftContext) -> Graph:
        """Graphs of all rows, layer by layer until every row's has stopped."""
        count, width = min(self.children, self.lm.vocab_size), min(self.width, self.num_nodes)
        empty = jax.vmap(lambda pending: graphs.root_graph(pending, self.num_nodes, count))
        root = jnp.where(jnp.arange(width, dtype=jnp.int32) == 0, ROOT, NO_NODE)
        nodes = jnp.broadcast_to(root[None], (context.length.shape[0], width))
        first = jnp.broadcast_to(
            state["logits"][:, None], (*nodes.shape, state["logits"].shape[-1])
        )
        graph = self._grow(empty(context.pending), nodes, first, context)

        def frontier(graph, layer):
            return jax.vmap(lambda one: graphs.frontier(one, layer, width))(graph)

        def unfinished(carry: tuple[jax.Array, jax.Array, Graph]):
            layer, nodes, _ = carry
            return (layer < self.layers) & jnp.any(nodes != NO_NODE)

        def step(carry: tuple[jax.Array, jax.Array, Graph]):
            layer, nodes, graph = carry
            logits = self._logits(params, state, context, graph, nodes)
            graph = self._grow(graph, nodes, logits, context)
            return layer + 1, frontier(graph, layer + 1), graph

        if self.layers > 1:
            carry = jnp.int32(1), frontier(graph, jnp.int32(1)), graph
            _, _, graph = jax.lax.while_loop(unfinished, step, carry)
        return graph

    def _grow(self, graph: Graph, nodes, logits, context: DraftContext) -> Graph:
        """Add the children of ``nodes`` int32 [B, L]; ``logits`` float [B, L, V] after them."""
        law = proposal_law(logits, context.request).logits
        flat = law.reshape(-1, law.shape[-1])
        scores, tokens = build.top_k(flat, graph.children.shape[-1])
        probs = jnp.exp(scores - jax.nn.logsumexp(flat, axis=-1, keepdims=True))
        tokens, probs = (x.reshape(*nodes.shape, -1) for x in (tokens.astype(jnp.int32), probs))

        def add(graph, nodes, tokens, probs):
            return graphs.add_layer(graph, nodes, tokens, probs, self.rules)

        return jax.vmap(add)(graph, nodes, tokens, probs)

    def _logits(self, params: Params, state, context: DraftContext, graph: Graph, nodes):
        """Logits float [B, L, V] after ``nodes`` int32 [B, L], none of them the root."""
        tokens, positions = graph.tokens[:, 1:], context.length[:, None] + graph.depth[:, 1:]
        mask, past = graph.ancestors[:, 1:, 1:], context.length + 1  # the root is in the cache
        hidden: Any = self.lm.module.apply(
            {"params": params}, tokens, positions, mask, state["cache"], past, ()
        )[0]
        rows = jnp.maximum(nodes - 1, 0)[..., None]
        return output_logits(params, jnp.take_along_axis(hidden, rows, axis=1))


_TREES = {"": Rules(), "suffix": Rules(), "token": Rules(repeat=0), "unmerged": Rules(repeat=-1)}


def gsd_drafter(network: DecoderConfig, nodes: int, depth: int, tree: str) -> GSD:
    """The drafter of at most ``nodes`` nodes and ``depth``; ``tree`` says what is merged.

    ``suffix``: equal pairs of tokens, the default; ``token``: equal tokens; ``unmerged``: nothing.
    """
    if tree not in _TREES:
        raise InputError(f"tree: expected one of {', '.join([*_TREES][1:])}, found {tree!r}")
    depth = max(1, min(depth, nodes - 1))
    return GSD(DecoderLM(network), nodes, depth, depth, _TREES[tree])
