"""Drafts as graphs (GSD): graph, tree, what sharing saves, and the lossy mode of the release.

Equality with plain decoding over ragged rows is in ``test_contract`` too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import categorical, decode
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.draft.gsd import GSD, gsd_drafter
from ctc_spec_jax.draft.small_lm import SmallLM
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.tree import graph as graphs
from ctc_spec_jax.tree import topology
from ctc_spec_jax.tree.graph import NO_NODE, Rules
from ctc_spec_jax.types import NO_PARENT, Acceptance, DraftContext, DraftTree
from ctc_spec_jax.verify import TargetSample
from ctc_spec_jax.verify_sampled import MultiCandidate
from tests import enumeration
from tests import test_sampling as sampling
from tests.enumeration import Leaf, Shape, World, enumerate_rule
from tests.helpers import make_request, plain_text, ragged_prompts, run, tiny_target

ROWS, SIZE, CHILDREN, WIDTH, LAYERS = 24, 64, 3, 20, 4
NODES, DEPTH = 12, 6
WORDS = 4


class SlowGraph:
    """The drafting of the paper's release, node after node, in lists."""

    def __init__(self, pending, rules: Rules):
        self.rules, self.token, self.father, self.depth = rules, [pending], [NO_PARENT], [0]
        self.leaf, self.children, self.redirect = [False], [[]], [NO_NODE]

    def path(self, node):
        return [] if node == NO_PARENT else [*self.path(self.father[node]), node]

    def twin(self, father, token):
        """The first node with this token, and the tokens before it, off the father's path."""
        repeat, own = self.rules.repeat, self.path(father)
        if repeat < 0:
            return None
        for node, other in enumerate(self.token):
            before = self.path(self.father[node])
            if node in own or other != token or min(len(own), len(before)) < repeat:
                continue
            last = [[self.token[n] for n in one[len(one) - repeat :]] for one in (own, before)]
            if last[0] == last[1]:
                return node
        return None

    def frontier(self, layer):
        here = [node for node, depth in enumerate(self.depth) if depth == layer]
        stops = all(self.leaf[node] for node in here) or len(self.token) == SIZE
        return [] if stops else here[:WIDTH]

    def add(self, nodes, tokens, probs):
        for father, row, weights in zip(nodes, tokens.tolist(), probs.tolist(), strict=False):
            self.children[father] = [NO_NODE] * len(row)
            for rank, (token, prob) in enumerate(zip(row, weights, strict=True)):
                if prob <= 0 or prob < np.float32(self.rules.siblings) * np.float32(max(weights)):
                    continue
                twin = self.twin(father, token)
                if twin is not None:
                    self.redirect[father] = twin
                elif len(self.token) < SIZE:
                    self.children[father][rank] = len(self.token)
                    self.token.append(token)
                    self.father.append(father)
                    self.depth.append(self.depth[father] + 1)
                    self.leaf.append(self.leaf[father] or prob < np.float32(self.rules.leaf))
                    self.children.append([])
                    self.redirect.append(NO_NODE)

    def paths(self, node=0, ranks=(), tokens=()):
        """Every path of the unrolled graph: ranks among children and redirect, and tokens."""
        yield ranks, tokens
        ahead = [*(self.children[node] or [NO_NODE] * CHILDREN), self.redirect[node]]
        for rank, child in enumerate(ahead):
            if child != NO_NODE and len(ranks) < DEPTH:
                yield from self.paths(child, (*ranks, rank), (*tokens, self.token[child]))


def rules_of(repeat: int) -> Rules:
    return Rules(0.3, repeat, 0.2)


def tables(seed: int, layers: int = LAYERS):
    """What may follow every token in every layer, rows that differ: tokens and probabilities
    [R, layers, V, E], and pending tokens [R]."""
    draw = np.random.default_rng(seed)
    shape = (ROWS, layers, WORDS, CHILDREN)
    tokens = np.argsort(draw.random((*shape[:3], WORDS)), axis=-1)[..., :CHILDREN]
    probs = -np.sort(-draw.random(shape), axis=-1) * (draw.random(shape) < 0.9)
    pending = draw.integers(0, WORDS, ROWS)
    return tokens.astype(np.int32), probs.astype(np.float32), pending.astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
def drafted(rules: Rules, tokens, probs, pending):
    """Graphs out of tables, their trees, and how many nodes were evaluated."""
    graph = graphs.root_graph(pending, SIZE, CHILDREN)

    def layer(graph, given):
        nodes = graphs.frontier(graph, given[0], WIDTH)
        last = graph.tokens[jnp.maximum(nodes, 0)]
        graph = graphs.add_layer(graph, nodes, given[1][last], given[2][last], rules)
        return graph, jnp.sum(nodes != NO_NODE, dtype=jnp.int32)

    index = jnp.arange(LAYERS, dtype=jnp.int32)
    graph, evaluated = jax.lax.scan(layer, graph, (index, tokens, probs))
    return graph, graphs.unroll(graph, NODES, DEPTH), jnp.sum(evaluated)


@functools.cache
def both(repeat: int):
    """Graphs and trees of random tables, and the reference's graphs."""
    rules, (tokens, probs, pending) = rules_of(repeat), tables(repeat + 1)
    found = jax.device_get(drafted(rules, tokens, probs, pending))[:2]
    slow = [SlowGraph(int(token), rules) for token in pending]
    for row, one in enumerate(slow):
        for layer in range(LAYERS):
            nodes = one.frontier(layer)
            last = [one.token[node] for node in nodes]
            one.add(nodes, tokens[row, layer, last], probs[row, layer, last])
    return *found, slow


@pytest.mark.parametrize("repeat", [-1, 0, 1, 2])
def test_graph_is_that_of_the_reference(repeat):
    graph, _, slow = both(repeat)
    redirects = 0
    for row, one in enumerate(slow):
        count = len(one.token)
        assert graph.valid[row].tolist() == [True] * count + [False] * (SIZE - count)
        names = {"tokens": one.token, "fathers": one.father, "depth": one.depth, "leaf": one.leaf}
        for name, expected in (names | {"redirects": one.redirect}).items():
            assert getattr(graph, name)[row, :count].tolist() == expected, (row, name)
        for node in range(count):
            kept = [child for child in graph.children[row, node].tolist() if child != NO_NODE]
            assert kept == [child for child in one.children[node] if child != NO_NODE]
            assert np.flatnonzero(graph.ancestors[row, node]).tolist() == one.path(node)
        redirects += sum(target != NO_NODE for target in one.redirect)
    assert redirects == 0 if repeat < 0 else redirects > ROWS
    assert graph.valid.all(axis=1).any() or repeat >= 0, "no graph was ever full"


@pytest.mark.parametrize("repeat", [-1, 0, 1, 2])
def test_unrolled_tree_is_that_of_a_recursion(repeat):
    """Breadth-first, children before the redirect: paths by length, then by ranks."""
    _, tree, slow = both(repeat)
    full = DraftTree(*(getattr(tree, name) for name in ("tokens", "parents", "valid")))
    topology.check(full, DEPTH, vocab_size=WORDS)
    cut = 0
    for row, one in enumerate(slow):
        expected = sorted(one.paths(), key=lambda path: (len(path[0]), path[0]))[:NODES]
        found = [()]
        for node in range(1, int(tree.valid[row].sum())):
            found.append((*found[tree.parents[row, node]], int(tree.tokens[row, node])))
        assert found == [tokens for _, tokens in expected]
        cut += len(expected) < len([*one.paths()])
    assert 0 < cut


def test_sharing_saves_passes_over_nodes_and_no_tree():
    """Where three tokens out of four follow every token: what is merged is not evaluated."""
    tokens, probs, pending = tables(9, 1)
    tokens, probs = (np.repeat(x, LAYERS, axis=1) for x in (tokens, np.full_like(probs, 0.3)))
    found = [drafted(rules_of(repeat), tokens, probs, pending) for repeat in (-1, 1, 0)]
    every, pairs, single = (np.asarray(evaluated) for _, _, evaluated in found)
    sizes = [np.asarray(tree.valid.sum(axis=1)) for _, tree, _ in found]
    assert (every > pairs).all() and (pairs > single).all()
    assert all((size == NODES).all() for size in sizes)


@functools.cache
def target():
    return tiny_target(num_layers=1)


BUDGET = 24


def prompts():
    tokens, lengths = ragged_prompts(0, (1, 4, 9))
    return np.pad(tokens, ((0, 0), (0, BUDGET + 1))), lengths


@functools.partial(jax.jit, static_argnums=0)
def first_draft(drafter, params, tokens, lengths, request):
    context = DraftContext((), tokens, lengths - 1, None, request)
    state = drafter.init(params, context, (jnp.zeros((*tokens.shape, 1)),))
    return drafter.propose(params, state, context, request.keys)


def paths(tree, row):
    found = {0: ()}
    for node in np.flatnonzero(tree.valid[row])[1:]:
        found[node] = (*found[int(tree.parents[row, node])], int(tree.tokens[row, node]))
    return set(found.values())


def test_without_redirects_it_is_a_tree_of_the_likeliest_tokens():
    (lm, params), (tokens, lengths) = target(), prompts()
    merged = GSD(lm, 15, 3, 3, Rules(0.0, -1, 0.0), children=2)
    trees = [
        jax.device_get(first_draft(one, params, tokens, lengths, make_request(3, BUDGET)))
        for one in (merged, SmallLM(lm, (2, 2, 2)))
    ]
    assert trees[0].valid.all()
    assert [paths(trees[0], row) for row in range(3)] == [paths(trees[1], row) for row in range(3)]


def test_accepted_paths_through_redirects_keep_the_text():
    """A small vocabulary, single tokens merged, and the target itself as the small model: only
    redirects lead deeper than there were passes."""
    (lm, params), (tokens, lengths) = target(), prompts()
    drafter = GSD(lm, 24, 6, 2, Rules(0.0, 0, 0.0), children=4)
    output = run(lm, params, drafter, params, tokens, lengths, BUDGET)
    assert output.tokens.tolist() == plain_text(lm, params, tokens, lengths, BUDGET)[0].tolist()
    assert output.stats.accepted[:, drafter.layers :].sum() > 2


def test_sampled_rows_are_drawn_from_the_target():
    """T3: 1,928 decodes of each kind of sampled rows; four tests at 1e-5, false alarm 4e-5."""
    lm, params = target()
    drafter = GSD(lm, 8, 3, 2, Rules(0.1, 0, 0.05), children=3)
    counts, drafted, offered = sampling.count(drafter, TargetSample(), params, 4)
    assert drafted > 0 and offered[2] > 0, "no draft went through a redirect"
    assert (counts[2] > 0).sum() == 1
    assert min(sampling.p_values(counts)) > 1e-5


def test_a_redirected_node_states_no_law():
    """Rules that need the law of a proposal refuse."""
    (lm, params), (tokens, lengths) = target(), prompts()
    loop = Loop(lm, gsd_drafter(lm.config, 8, 4, "token"), MultiCandidate(), BUDGET)
    with pytest.raises(ValueError, match="draft_logits"):
        jax.eval_shape(
            lambda *given: decode.decode(loop, *given),
            *(params, params, tokens, lengths, make_request(3, BUDGET)),
        )


@dataclasses.dataclass(frozen=True)
class IndependentSiblings:
    """The release's other mode: every node is accepted by itself with min(1, p/q), the longest
    path is kept, its first one of several, and the target's best token comes after it."""

    def __call__(self, keys, tree, depth, mask, laws, max_depth) -> Acceptance:
        law = laws.everywhere().logits
        up = jnp.maximum(tree.parents, 0)
        rows = jnp.arange(len(up))[:, None]
        p, q = (jax.nn.softmax(x, axis=-1)[rows, up, tree.tokens] for x in (law, tree.draft_logits))
        uniform = categorical.uniforms(keys, up.shape[1], law.dtype)[..., 0]
        passes = (uniform * q < p) | (jnp.arange(up.shape[1])[None] == 0)
        passes = jnp.all(passes[:, None] | ~mask, axis=-1)
        last = jnp.argmax(jnp.where(passes, depth, -1), axis=1)[:, None]
        path = jnp.concatenate([jnp.zeros_like(last), last], axis=1).astype(jnp.int32)
        best = jnp.argmax(law, axis=-1).astype(jnp.int32)
        token = jnp.take_along_axis(best, last, axis=1)[:, 0]
        return Acceptance(path, 1 + (last[:, 0] > 0).astype(jnp.int32), token)


def independent(world: World, draft):
    """The cells of that mode for a tree of one level."""
    children = world.shape.children(0)
    passes = [
        min(1.0, world.p[()][draft.tokens[i]] / world.q[()][draft.tokens[i]]) for i in children
    ]

    def leaf(cell, child):
        law = world.p[draft.prefixes[child]]
        return Leaf(cell, (0, child) if child else (0,), law.index(max(law)))

    cell = {}
    for child, bar in zip(children, passes, strict=True):
        if bar > 0:
            yield leaf({**cell, child: (0.0, bar)} if bar < 1 else cell, child)
        if bar >= 1:
            return
        cell = {**cell, child: (bar, 1.0)}
    yield leaf(cell, 0)


def test_lossy_mode_of_the_release_is_found_and_is_not_ours():
    """Top two tokens of q = (.2, .3, .5) against p = (.5, .3, .2), one level: the release emits
    (0, .6, .4), TV 0.5; drawing from the target on the same tree emits p. The tests of exact rules,
    which ask for a TV below 1e-12, would see it."""
    shape = Shape((NO_PARENT, 0, 0), (0, 0, 1))
    p = {(): (0.5, 0.3, 0.2)} | {(token,): (0.2, 0.5, 0.3) for token in range(3)}
    world = World(p, dict.fromkeys(p, (0.2, 0.3, 0.5)), shape)
    lossy = enumerate_rule(IndependentSiblings(), world, independent)
    assert lossy.wrong == 0
    first = lossy.joint.sum(axis=1)
    np.testing.assert_allclose(first, [0, 0.6, 0.4], atol=1e-12)
    assert 0.5 * np.abs(first - p[()]).sum() == pytest.approx(0.5, abs=1e-12)
    assert lossy.tv > 1e-12
    ours = enumerate_rule(TargetSample(), world, enumeration.sample)
    assert ours.wrong == 0 and ours.tv < 1e-12
    np.testing.assert_allclose(ours.joint.sum(axis=1), p[()], atol=1e-12)


def test_trees_by_name():
    config = target()[0].config
    assert gsd_drafter(config, 9, 30, "").rules == gsd_drafter(config, 9, 30, "suffix").rules
    assert gsd_drafter(config, 9, 30, "token").rules.repeat == 0
    assert gsd_drafter(config, 9, 30, "unmerged").max_depth == 8
    with pytest.raises(InputError, match="tree: expected one of suffix, .* found 'beam'"):
        gsd_drafter(config, 9, 3, "beam")
