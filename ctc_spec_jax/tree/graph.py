"""Drafts as graphs: runs of tokens that several branches share are drafted once.

Graph-structured speculative decoding (GSD: Gong et al. 2024, arXiv 2407.16207, section 3). Where a
node would get a child whose token, and the ``repeat`` tokens before it, stand already elsewhere in
the graph, it is redirected there instead. ``unroll`` makes a tree of the graph by copying what lies
behind redirects, so that sharing saves drafting and nothing else. Functions treat one row.

As in the release, of several nodes that match the first counts, and a node has one redirect, that
of its last candidate that has any. Unlike there, graph and tree have no more nodes than were asked
for, and the tree a greatest depth.

Shape letters: G graph nodes, E children of a node, L nodes of one layer, C = L E candidates, N tree
nodes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ctc_spec_jax.types import NO_PARENT, ROOT, pytree

NO_NODE = -1
"""In the place of a child or a redirect that is not there."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which candidates become nodes.

    ``siblings``: least probability beside the best sibling's. ``repeat``: how many tokens before a
    token must agree, too, for a redirect; -1 for a graph without redirects, which is a tree.
    ``leaf``: drafting goes on only below tokens at least that probable.
    """

    siblings: float = 0.3
    repeat: int = 1
    leaf: float = 0.3


@pytree
class Graph:
    """Nodes in the order in which they were drafted; slot ROOT is the pending token."""

    tokens: jax.Array  # int32 [G]
    fathers: jax.Array  # int32 [G], NO_PARENT at the root
    depth: jax.Array  # int32 [G], layer
    valid: jax.Array  # bool [G]
    leaf: jax.Array  # bool [G], improbable or below an improbable node
    children: jax.Array  # int32 [G, E], best first, or NO_NODE
    redirects: jax.Array  # int32 [G], where the text goes on as well, or NO_NODE
    ancestors: jax.Array  # bool [G, G], [i, j]: j is i or an ancestor of i


def root_graph(pending, num_nodes: int, num_children: int) -> Graph:
    """The graph of the pending token int32 [] alone."""
    is_root = jnp.arange(num_nodes, dtype=jnp.int32) == ROOT
    nothing = jnp.full((num_nodes,), NO_NODE, jnp.int32)
    return Graph(
        tokens=jnp.where(is_root, pending, 0),
        fathers=jnp.full((num_nodes,), NO_PARENT, jnp.int32),
        depth=jnp.zeros((num_nodes,), jnp.int32),
        valid=is_root,
        leaf=jnp.zeros((num_nodes,), bool),
        children=jnp.broadcast_to(nothing[:, None], (num_nodes, num_children)),
        redirects=nothing,
        ancestors=jnp.eye(num_nodes, dtype=bool),
    )


def frontier(graph: Graph, depth, width: int) -> jax.Array:
    """The nodes int32 [width] at a depth int32 [] that are to get children, or NO_NODE.

    There are none once a layer has nothing but leaves, or the graph is full; else its leaves are
    among them.
    """
    here = graph.valid & (graph.depth == depth)
    goes_on = jnp.any(here & ~graph.leaf) & ~jnp.all(graph.valid)
    index = jnp.arange(width, dtype=jnp.int32)
    real = goes_on & (index < jnp.sum(here, dtype=jnp.int32))
    return jnp.where(real, jnp.argmax(here).astype(jnp.int32) + index, NO_NODE)


class _Candidates(NamedTuple):
    """Of one layer, by father, then by probability."""

    fathers: jax.Array  # int32 [C]
    tokens: jax.Array  # int32 [C]
    probs: jax.Array  # float [C]
    wanted: jax.Array  # bool [C], real, and probable beside the best sibling


def add_layer(graph: Graph, nodes, tokens, probs, rules: Rules) -> Graph:
    """Add the children of a layer.

    Candidates take effect one after another, those of earlier nodes first: a later one may be
    redirected to what an earlier one has added. A full graph takes no more.

    Args:
      graph: what is drafted so far.
      nodes: int32 [L], of ``frontier``.
      tokens: int32 [L, E], their likeliest next tokens, best first.
      probs: float [L, E] of these; a token of probability 0 is none.
      rules: which of them count.
    """
    size = graph.tokens.shape[0]
    real = (nodes != NO_NODE)[:, None] & (probs > 0)
    wanted = real & (probs >= rules.siblings * jnp.max(probs, axis=1, keepdims=True))
    fathers = jnp.broadcast_to(jnp.maximum(nodes, ROOT)[:, None], tokens.shape)
    new = _Candidates(*(column.reshape(-1) for column in (fathers, tokens, probs, wanted)))
    slots, links = _places(graph, new, rules.repeat)
    at = jnp.where(slots == NO_NODE, size, slots)
    rows = jnp.where(nodes == NO_NODE, size, nodes)
    lineage = graph.ancestors[new.fathers] | (at[:, None] == jnp.arange(size)[None])

    def put(array, values):
        return array.at[at].set(values, mode="drop")

    return Graph(
        tokens=put(graph.tokens, new.tokens),
        fathers=put(graph.fathers, new.fathers),
        depth=put(graph.depth, graph.depth[new.fathers] + 1),
        valid=put(graph.valid, True),
        leaf=put(graph.leaf, graph.leaf[new.fathers] | (new.probs < rules.leaf)),
        children=graph.children.at[rows].set(slots.reshape(tokens.shape), mode="drop"),
        redirects=graph.redirects.at[rows].set(_last(links.reshape(tokens.shape)), mode="drop"),
        ancestors=put(graph.ancestors, lineage),
    )


def _places(graph: Graph, new: _Candidates, repeat: int) -> tuple[jax.Array, jax.Array]:
    """Slots int32 [C] of what is added, and nodes int32 [C] to redirect to, or NO_NODE."""
    alike = _alike(graph, repeat)[new.fathers]  # [C, G]
    same = (new.tokens[:, None] == graph.tokens[None]) & graph.valid[None]
    same &= alike[:, jnp.maximum(graph.fathers, ROOT)] & ~graph.ancestors[new.fathers]
    old, known = jnp.argmax(same, axis=1).astype(jnp.int32), jnp.any(same, axis=1)
    fresh = new.wanted & ~known
    twins = (new.tokens[:, None] == new.tokens[None]) & alike[:, new.fathers] & fresh[None]
    twins = jnp.tril(twins, -1)  # with what came before, which is never an ancestor
    twin = jnp.any(twins, axis=1)
    added = fresh & ~twin
    slots = jnp.sum(graph.valid, dtype=jnp.int32) + jnp.cumsum(added, dtype=jnp.int32) - 1
    slots = jnp.where(added & (slots < graph.tokens.shape[0]), slots, NO_NODE)
    links = jnp.where(fresh & twin, slots[jnp.argmax(twins, axis=1)], NO_NODE)
    return slots, jnp.where(new.wanted & known, old, links)


def _alike(graph: Graph, repeat: int):
    """bool [G, G]: the last ``repeat`` tokens up to two nodes, themselves included, agree."""
    size = graph.tokens.shape[0]
    up, alike = jnp.arange(size, dtype=jnp.int32), jnp.full((size, size), repeat >= 0)
    for _ in range(repeat):
        known, last = up != NO_PARENT, graph.tokens[up]
        alike &= (known[:, None] & known[None]) & (last[:, None] == last[None])
        up = jnp.where(known, graph.fathers[up], NO_PARENT)
    return alike


def _last(links):
    """int32 [L] of links int32 [L, E]: the last one of every row, or NO_NODE."""
    rank = jnp.arange(links.shape[1], dtype=jnp.int32)[None]
    last = jnp.max(jnp.where(links == NO_NODE, -1, rank), axis=1)
    found = jnp.take_along_axis(links, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    return jnp.where(last < 0, NO_NODE, found)


class Unrolled(NamedTuple):
    """A tree as in ``DraftTree``, and the graph's nodes that it was made of."""

    tokens: jax.Array  # int32 [N]
    parents: jax.Array  # int32 [N]
    valid: jax.Array  # bool [N]
    nodes: jax.Array  # int32 [N], of the graph


def unroll(graph: Graph, num_nodes: int, max_depth: int) -> Unrolled:
    """The first ``num_nodes`` nodes breadth-first, children before the redirect, to a depth."""
    ahead = jnp.concatenate([graph.children, graph.redirects[:, None]], axis=1)  # [G, E + 1]
    index = jnp.arange(num_nodes, dtype=jnp.int32)
    nodes = jnp.where(index == ROOT, ROOT, NO_NODE)
    parents = jnp.where(index == ROOT, NO_PARENT, ROOT)

    def level(_, carry):
        nodes, parents, start, end = carry
        here = (index >= start) & (index < end)
        new = jnp.where(here[:, None], ahead[nodes], NO_NODE).reshape(-1)
        slots = end + jnp.cumsum(new != NO_NODE, dtype=jnp.int32) - 1
        slots = jnp.where(new == NO_NODE, num_nodes, slots)
        above = jnp.repeat(index, ahead.shape[1])
        nodes = nodes.at[slots].set(new, mode="drop")
        parents = parents.at[slots].set(above, mode="drop")
        return nodes, parents, end, jnp.sum(nodes != NO_NODE, dtype=jnp.int32)

    carry = nodes, parents, jnp.int32(0), jnp.int32(1)
    nodes, parents, _, _ = jax.lax.fori_loop(0, max_depth, level, carry)
    valid, nodes = nodes != NO_NODE, jnp.maximum(nodes, ROOT)
    return Unrolled(graph.tokens[nodes], parents, valid, nodes)
