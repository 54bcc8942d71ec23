"""Verification rules: exact output laws by enumeration, draws, refusals, greedy rows, batches."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_spec_jax import categorical
from ctc_spec_jax.tree import build, topology
from ctc_spec_jax.types import NO_PARENT, DraftTree, Law
from ctc_spec_jax.verify import Greedy, TargetSample, Typical
from ctc_spec_jax.verify_sampled import Block, Mixed, MultiCandidate, Rejection
from tests import enumeration
from tests.enumeration import Shape, World, drafts, enumerate_rule, random_table, tree_of

CHAIN = tree_of(1, 1, 1)
NEW = None
"""Rank of a node that is drawn."""

FIXED_FIRST = Shape((NO_PARENT, 0, 0), (0, 0, NEW))
FIXED_LAST = Shape((NO_PARENT, 0, 0), (0, NEW, 0))
TWO_FIXED = Shape((NO_PARENT, 0, 0, 0), (0, 1, NEW, 0))
TWO_DRAWN = Shape((NO_PARENT, 0, 0, 0), (0, NEW, 0, NEW))
ALL_FOUR = Shape((NO_PARENT, 0, 0, 0, 0), (0, 0, NEW, 1, NEW))
BELOW_BOTH = Shape((NO_PARENT, 0, 0, 1, 1, 2, 2), (0, 0, NEW, NEW, 0, 0, NEW))
SWAPPED = Shape((NO_PARENT, 0, 0, 1, 1, 2, 2), (0, NEW, 0, 0, NEW, NEW, 0))
FIXED_INSIDE = Shape(CHAIN.parents, (0, NEW, 0, NEW))

# Name: rule, shape of the draft, V, siblings drawn with replacement, reference.
CASES = {
    "rejection": (Rejection(), CHAIN, 3, True, enumeration.walk),
    "rejection, wide": (Rejection(), tree_of(1, 1), 4, True, enumeration.walk),
    "rejection, fixed inside": (Rejection(), FIXED_INSIDE, 3, True, enumeration.walk),
    "block": (Block(), CHAIN, 3, True, enumeration.block),
    "block, wide": (Block(), tree_of(1, 1), 4, True, enumeration.block),
    "block, fixed inside": (Block(), FIXED_INSIDE, 3, True, enumeration.block),
    "mixed, two drawn, replaced": (Mixed(True), TWO_DRAWN, 4, True, enumeration.walk),
    "mixed, four, replaced": (Mixed(True), ALL_FOUR, 4, True, enumeration.walk),
}
for counts, vocab in (((1,), 4), ((2,), 4), ((3,), 4), ((2, 2), 3), ((3, 1), 3), ((1, 2, 1), 3)):
    for again in (False, True):
        name = f"multi-candidate {counts}{', replaced' * again}"
        rule = MultiCandidate(replacement=again)
        CASES[name] = (rule, tree_of(*counts), vocab, again, enumeration.walk)
for name, shape, vocab in (
    ("fixed first", FIXED_FIRST, 4),
    ("fixed last", FIXED_LAST, 4),
    ("two fixed", TWO_FIXED, 4),
    ("two drawn", TWO_DRAWN, 4),
    ("four", ALL_FOUR, 4),
    ("second level", BELOW_BOTH, 3),
    ("second level, swapped", SWAPPED, 3),
):
    CASES[f"mixed, {name}"] = (Mixed(), shape, vocab, False, enumeration.walk)
WALKS = {
    "fixed chain": (TargetSample(), tree_of(1, 1, 1, fixed=True), 3, False, enumeration.sample),
    "fixed tree": (TargetSample(), tree_of(2, 2, fixed=True), 3, False, enumeration.sample),
    "drawn chain": (TargetSample(), CHAIN, 3, True, enumeration.sample),
    "drawn tree": (TargetSample(), tree_of(2, 2), 3, False, enumeration.sample),
    # Siblings with one token are copies of one prefix, which gets one draw.
    "drawn tree, replaced": (TargetSample(), tree_of(2, 2), 3, True, enumeration.sample),
    "mixed tree": (TargetSample(), BELOW_BOTH, 3, False, enumeration.sample),
}

KINDS = (
    "plain",
    "p has zeros",
    "q has zeros",
    "both have zeros",
    "ends early",
    "equal",
    "disjoint",
)


def make_world(shape: Shape, vocab: int, replacement: bool, kind: str, seed: int = 0) -> World:
    """Random context-dependent laws of one kind."""
    zeros_p = 0.4 if kind in ("p has zeros", "both have zeros") else 0.0
    zeros_q = 0.4 if kind in ("q has zeros", "both have zeros") else 0.0
    p = random_table(2 * seed, vocab, shape.depth, zeros_p)
    q = random_table(2 * seed + 1, vocab, shape.depth, zeros_q)
    if kind == "equal":
        q = p
    if kind == "disjoint":
        p, q = (
            {
                prefix: enumeration.restricted(law, lambda token: (token + sum(prefix)) % 2 == side)  # noqa: B023
                for prefix, law in table.items()
            }
            for side, table in ((0, p), (1, q))
        )
    ends = {(0,), (1, 0), (2, 1)} if kind == "ends early" else ()
    return World(p, q, shape, replacement, frozenset(ends))


def report_of(case, kind: str, seed: int = 0, **options) -> enumeration.Report:
    rule, shape, vocab, replacement, reference = case
    world = make_world(shape, vocab, replacement, kind, seed)
    return enumerate_rule(rule, world, reference, **options)


@pytest.mark.parametrize("name", CASES)
def test_output_law_of_sampled_drafts(name):
    """T2, T5 and T6: thresholds are those of the reference, and the law is the target's."""
    shape = CASES[name][1]
    for kind in KINDS:
        report = report_of(CASES[name], kind)
        assert report.wrong == 0, (kind, report)
        assert report.tv < 1e-12, (kind, report)
        if kind == "disjoint":
            assert report.length == pytest.approx(1, abs=1e-12)
        if kind == "equal" and shape is not FIXED_INSIDE:
            assert report.length == pytest.approx(shape.depth + 1, abs=1e-12)


@pytest.mark.parametrize("name", WALKS)
def test_output_law_of_the_targets_own_draws(name):
    for kind in KINDS:
        report = report_of(WALKS[name], kind)
        assert report.wrong == 0 and report.tv < 1e-12, (kind, report)
        if kind == "disjoint" and name.startswith("drawn"):
            assert report.length == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", [CHAIN, tree_of(2, 2)], ids=["chain", "tree"])
def test_greedy_is_the_argmax_path(shape):
    for kind in KINDS:
        case = (Greedy(), shape, 3, False, enumeration.greedy)
        report = report_of(case, kind, is_greedy=True)
        assert report.wrong == 0 and report.tv < 1e-12, (kind, report)


@pytest.mark.parametrize("name", [*CASES, *WALKS])
def test_greedy_rows_whatever_the_numbers(name):
    *case, _ = (CASES | WALKS)[name]
    for kind in ("plain", "p has zeros", "ends early"):
        report = report_of((*case, enumeration.greedy), kind, is_greedy=True)
        assert report.wrong == 0 and report.tv < 1e-12, (kind, report)


def test_typical_is_lossy_and_follows_its_rule():
    for kind in ("plain", "p has zeros", "ends early"):
        case = (Typical(), tree_of(2, 2), 3, False)
        report = report_of((*case, enumeration.typical), kind)
        assert report.wrong == 0 and report.tv > 0.01, (kind, report)
        report = report_of((*case, enumeration.greedy), kind, is_greedy=True)
        assert report.wrong == 0 and report.tv < 1e-12, (kind, report)


def _outcomes(leaves) -> dict:
    """Probability of every (path, next token) of one draft."""
    law = {}
    for cell, path, token in leaves:
        volume = math.prod(high - low for low, high in cell.values())
        law[path, token] = law.get((path, token), 0.0) + volume
    return law


def _point_mass(world: World, draft) -> dict:
    """Accept x with probability p(x), else draw from p without x, renormalised (A2 rule 5)."""
    law, reached = {}, 1.0
    for node, token in enumerate(draft.tokens[1:]):
        p = world.p[draft.prefixes[node]]
        path = tuple(range(node + 1))
        left = enumeration.restricted(p, lambda other: other != token)  # noqa: B023
        for other, weight in enumerate(left):
            law[path, other] = reached * (1 - p[token]) * weight
        reached *= p[token]
    path = tuple(range(len(draft.tokens)))
    for other, weight in enumerate(world.p[draft.prefixes[-1]]):
        law[path, other] = reached * weight
    return law


@pytest.mark.parametrize("kind", ["plain", "p has zeros"])
def test_point_mass_proposals_are_walks_of_one_child(kind):
    """Drawing from p and following equals testing with p(x); of every node fixed, so does Mixed."""
    shape = tree_of(1, 1, 1, fixed=True)
    world = make_world(shape, 3, False, kind)
    for rule, reference in ((TargetSample(), enumeration.sample), (Mixed(), enumeration.walk)):
        assert enumerate_rule(rule, world, reference).wrong == 0
        for draft in drafts(world):
            found, expected = _outcomes(reference(world, draft)), _point_mass(world, draft)
            for key in found.keys() | expected.keys():
                assert abs(found.get(key, 0.0) - expected.get(key, 0.0)) < 1e-14


def test_block_accepts_no_less_than_rejection():
    gains = []
    for seed in range(8):
        for kind in ("plain", "both have zeros", "ends early"):
            block = report_of((Block(), CHAIN, 3, True, enumeration.block), kind, seed)
            plain = report_of((Rejection(), CHAIN, 3, True, enumeration.walk), kind, seed)
            assert block.wrong == plain.wrong == 0 and block.tv < 1e-12
            gains.append(block.length - plain.length)
    assert min(gains) > -1e-12 and max(gains) > 0.01


@pytest.mark.parametrize("shape", [FIXED_FIRST, FIXED_LAST, TWO_FIXED, TWO_DRAWN, ALL_FOUR])
def test_mixed_nodes_accept_what_the_formula_says(shape):
    """p(S) + sum of min(p, q') over the rest: equal with one drawn child, more with two."""
    for seed in range(6):
        for kind in ("plain", "both have zeros"):
            world = make_world(shape, 4, False, kind, seed)
            report = enumerate_rule(Mixed(), world, enumeration.walk)
            fixed = world.fixed_tokens(0, ()).values()
            p, q = world.p[()], world.q[()]
            rest = enumeration.restricted(q, lambda token: token not in fixed)  # noqa: B023
            walk = sum(p[token] for token in fixed)
            formula = walk + sum(min(a, b) for a, b in zip(p, rest, strict=True))
            formula -= sum(min(p[token], rest[token]) for token in fixed)
            accepted = report.length - 1
            assert report.wrong == 0
            assert accepted > max(walk, formula) - 1e-12
            if shape.ranks.count(NEW) == 1:
                assert accepted == pytest.approx(formula, abs=1e-12)


# Whole batches, in float32 and with keys.


def random_batch(shape: Shape, vocab: int, batch: int, seed: int, *, sampled=True):
    """Trees whose siblings differ, laws with zeros, and every second row greedy."""
    draw = np.random.default_rng(seed)
    nodes = len(shape.parents)
    tokens = np.zeros((batch, nodes), np.int32)
    for node in range(nodes):
        children = shape.children(node)
        order = draw.permuted(np.tile(np.arange(vocab), (batch, 1)), axis=1)
        tokens[:, children] = order[:, : len(children)]
    valid = np.ones((batch, nodes), bool)
    for node in range(1, nodes):
        valid[:, node] = valid[:, shape.parents[node]] & (draw.random(batch) > 0.1)
    logits, draft_logits = draw.normal(0, 2, (2, batch, nodes, vocab)).astype(np.float32)
    logits[draw.random(logits.shape) < 0.2] = -np.inf
    logits[..., 0] = np.maximum(logits[..., 0], -3)
    is_drawn = draw.random((batch, nodes)) < 0.5
    tree = DraftTree(
        jnp.asarray(tokens),
        jnp.broadcast_to(jnp.array(shape.parents, jnp.int32), (batch, nodes)),
        jnp.asarray(valid),
        jnp.asarray(draft_logits),
        jnp.asarray(is_drawn) if sampled else None,
    )
    law = Law(jnp.asarray(logits), jnp.arange(batch) % 2 == 0)
    return jax.random.split(jax.random.key(seed), batch), tree, law


@functools.partial(jax.jit, static_argnums=(0, 4))
def accept(rule, keys, tree: DraftTree, law: Law, max_depth: int):
    """Path, length and next token side by side, int32 [B, M+3]."""
    depth, mask = topology.shape_of(tree, topology.lineages(tree, max_depth))
    found = rule(keys, tree, depth, mask, law, max_depth)
    return jnp.concatenate([found.path, found.length[:, None], found.next_token[:, None]], axis=1)


SAMPLED_RULES = (
    (TargetSample(), tree_of(2, 2)),
    (Typical(), tree_of(2, 2)),
    (Rejection(), CHAIN),
    (MultiCandidate(), tree_of(2, 2)),
    (MultiCandidate(replacement=True), tree_of(2, 2)),
    (Mixed(), tree_of(2, 2)),
    (Block(), CHAIN),
)


@pytest.mark.parametrize(("rule", "shape"), SAMPLED_RULES, ids=lambda x: type(x).__name__)
def test_greedy_and_sampled_rows_of_one_batch(rule, shape):
    """Greedy rows are those of ``Greedy``; sampled rows do not care what the others are."""
    keys, tree, law = random_batch(shape, 3, 128, 5, sampled=isinstance(rule, Mixed))
    together = np.asarray(accept(rule, keys, tree, law, shape.depth))
    greedy = np.asarray(accept(Greedy(), keys, tree, Law(law.logits), shape.depth))
    np.testing.assert_array_equal(together[::2], greedy[::2])
    alone = accept(rule, keys, tree, Law(law.logits, jnp.zeros((128,), bool)), shape.depth)
    np.testing.assert_array_equal(together[1::2], alone[1::2])
    np.testing.assert_array_equal(accept(rule, keys, tree, Law(law.logits), shape.depth), greedy)
    assert (together[1::2] != greedy[1::2]).any()
    assert len(np.unique(greedy[:, -2])) == shape.depth + 1


@pytest.mark.parametrize("replacement", [False, True])
def test_one_candidate_is_plain_rejection(replacement):
    keys, tree, law = random_batch(CHAIN, 5, 256, 3, sampled=False)
    found = np.asarray(accept(MultiCandidate(replacement), keys, tree, law, 3))
    np.testing.assert_array_equal(found, accept(Rejection(), keys, tree, law, 3))
    assert len(np.unique(found[:, -2])) == 4


def test_children_that_a_law_cannot_have_drawn_are_refused():
    """In float32 exp(-200) is 0: what is left of q after its only token is no law at all.

    A test of u * 0 < p would accept the second child always. The share of token 1 is 1/2; off by
    more than 0.06 in 4000 rows has probability 1e-13.
    """
    rows = 4000
    logits = np.full((rows, 3, 3), [-np.inf, 0, 0], np.float32)
    draft_logits = np.full((rows, 3, 3), [0, -200, -201], np.float32)
    tree = DraftTree(
        jnp.tile(jnp.array([[2, 0, 1]], jnp.int32), (rows, 1)),
        jnp.tile(jnp.array([[NO_PARENT, 0, 0]], jnp.int32), (rows, 1)),
        jnp.ones((rows, 3), bool),
        jnp.asarray(draft_logits),
    )
    law = Law(jnp.asarray(logits), jnp.zeros((rows,), bool))
    keys = jax.random.split(jax.random.key(2), rows)
    *_, length, token = np.asarray(accept(MultiCandidate(), keys, tree, law, 1)).T
    emitted = np.where(length == 2, 1, token)
    assert abs((emitted == 1).mean() - 0.5) < 0.06


def test_block_passes_what_cannot_fail_where_laws_nearly_agree():
    """A prefix of weight 1 passes every number, however small the excess after it, in float32."""
    rows = 200
    gap = np.geomspace(1e-6, 1e-3, rows)
    p, q = np.full((rows, 3, 2), 0.5), np.full((rows, 3, 2), 0.5)
    p[:, 1] += np.stack([-gap, gap], axis=1)  # the second draft has less of p than of q
    tree = DraftTree(
        jnp.zeros((rows, 3), jnp.int32),
        jnp.tile(jnp.array([[NO_PARENT, 0, 1]], jnp.int32), (rows, 1)),
        jnp.ones((rows, 3), bool),
        jnp.asarray(np.log(q), jnp.float32),
    )
    law = Law(jnp.asarray(np.log(p), jnp.float32), jnp.zeros((rows,), bool))
    uniform = jnp.full((rows, 3), 1 - 2**-24, jnp.float32)
    found = enumeration.run_rule(Block(), 2, uniform, tree, law)
    np.testing.assert_array_equal(found.length, np.full(rows, 2))
    np.testing.assert_array_equal(found.next_token, np.ones(rows))


def test_refusals_at_trace_time():
    keys, tree, law = random_batch(tree_of(2, 2), 3, 2, 0)
    chain_keys, chain, chain_law = random_batch(CHAIN, 3, 2, 0)
    message = "{}: expected a tree with draft_logits, .*, found None"
    for rule in (MultiCandidate(), Mixed()):
        with pytest.raises(ValueError, match=message.format(type(rule).__name__)):
            accept(rule, keys, dataclasses.replace(tree, draft_logits=None), law, 2)
    for rule in (Rejection(), Block()):
        name = type(rule).__name__
        with pytest.raises(ValueError, match=message.format(name)):
            accept(rule, chain_keys, dataclasses.replace(chain, draft_logits=None), chain_law, 3)
        wanted = f"{name}: expected a chain of 3 nodes for max_depth 2, found 7 nodes"
        with pytest.raises(ValueError, match=wanted):
            accept(rule, keys, tree, law, 2)
    with pytest.raises(ValueError, match="Mixed: expected .* which nodes are sampled, found none"):
        accept(Mixed(), keys, dataclasses.replace(tree, sampled=None), law, 2)
    with pytest.raises(ValueError, match="Greedy: expected a request without temperatures, found"):
        accept(Greedy(), keys, tree, law, 2)


# Draws.


@pytest.mark.parametrize("size", [1, 3, 64, 65, 300, 5000])
def test_draw_changes_at_the_cumulative_sums(size):
    """Just inside both ends of the intervals of a block and of an entry in it, in float64."""
    draw = np.random.default_rng(size)
    weights = draw.random(size) * (draw.random(size) < 0.7)
    weights[draw.integers(size)] = 1.0
    index = np.flatnonzero(weights)
    split = np.pad(weights, (0, -size % 64)).reshape(-1, 64)
    inner = np.cumsum(split, axis=1) / np.maximum(split.sum(axis=1, keepdims=True), 1e-300)
    outer = np.cumsum(split.sum(axis=1)) / weights.sum()
    block, place = index // 64, index % 64

    def interval(ends, at):
        starts = np.concatenate([np.zeros_like(ends[..., :1]), ends[..., :-1]], axis=-1)
        return starts[at] + 1e-13, ends[at] - 1e-13

    pairs = [interval(inner, (block, place))]
    pairs.insert(0, interval(outer, (block,)) if len(split) > 1 else pairs[0])
    assert all((low < high).all() for low, high in pairs)
    with jax.enable_x64(True):
        found = jax.jit(jax.vmap(categorical.draw, (None, 0)))
        for ends in itertools.product((0, 1), repeat=2):
            uniform = np.stack([pair[end] for pair, end in zip(pairs, ends, strict=True)], axis=1)
            uniform = np.clip(uniform, 0, enumeration.LAST)
            np.testing.assert_array_equal(found(weights, uniform), index)
            np.testing.assert_array_equal(found(3 * weights, uniform), index)


def test_draw_is_as_fine_as_the_laws_of_large_vocabularies():
    """Both numbers count: with one alone, no more than 2^23 laws of a draw exist."""
    weights = jnp.ones((32000,), jnp.float32)
    pairs = jnp.asarray([[0.25, 0.5], [0.25, 0.99], [0.75, 0.5]], jnp.float32)
    first, same_block, other = np.asarray(_draws(weights, pairs))
    assert first != same_block and first // 64 == same_block // 64 != other // 64


_draws = jax.jit(jax.vmap(categorical.draw, (None, 0)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([3, 64, 300, 19000]),
    density=st.sampled_from([1e-4, 0.02, 0.5]),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
)
def test_draw_never_returns_an_entry_of_weight_0(seed, size, density, spread):
    """At both ends of the unit interval and around every cumulative sum, in float32.

    Long sums are not added from left to right; they may grow where nothing is added.
    """
    draw = np.random.default_rng(seed)
    runs = np.repeat(draw.random(-(-size // 64)) < 0.5, 64)[:size]  # whole blocks of zeros too
    weights = np.exp(draw.normal(0, spread, size)) * (draw.random(size) < density) * runs
    weights[draw.integers(size)] = 1.0
    weights = weights.astype(np.float32)
    ends = (np.cumsum(weights, dtype=float) / weights.sum(dtype=float)).astype(np.float32)
    near = np.concatenate([ends + np.float32(2**-24) * k for k in range(-4, 5)])
    uniform = np.concatenate([[0.0, 1 - 2**-24], draw.choice(near, 2000)])
    uniform = np.clip(uniform, 0, 1 - 2**-24).astype(np.float32)
    uniform = np.stack([uniform, draw.permutation(uniform)], axis=1)
    found = np.asarray(_draws(weights, uniform))
    assert (weights[found] > 0).all()


def test_uniforms_are_one_rows_own():
    keys = jax.random.split(jax.random.key(0), 4)
    found = categorical.uniforms(keys, 5, jnp.float32)
    assert found.shape == (4, 5, 2) and found.dtype == jnp.float32
    assert 0 <= found.min() and found.max() < 1 and len(np.unique(found)) == 40
    np.testing.assert_array_equal(found[2:], categorical.uniforms(keys[2:], 5, jnp.float32))


LAW = np.array([0.4, 0.0, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("replacement", [False, True])
def test_children_follow_the_law_of_successive_draws(replacement):
    """Law of the drawn order: chi-square of all triples in 200000 draws, false alarm 1e-4."""
    count, k = 200_000, 3
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(LAW), jnp.float32) + 3.0
    keys = jax.random.split(jax.random.key(11), count)
    draw = jax.jit(jax.vmap(lambda key: build.sample_children(key, logits, k, replacement)))
    tokens, valid = (np.asarray(a) for a in draw(keys))
    assert tokens.dtype == np.int32 and valid.all()
    expected = np.zeros((5,) * k)
    for triple in np.ndindex(expected.shape):
        left, expected[triple] = LAW.copy(), 1.0
        for token in triple:
            expected[triple] *= left[token] / left.sum()
            left[token] *= replacement
    assert expected.sum() == pytest.approx(1)
    found = np.zeros_like(expected)
    np.add.at(found, tuple(tokens.T), 1)
    assert (found[expected == 0] == 0).all()
    likely = expected > 0
    statistic = ((found - count * expected)[likely] ** 2 / (count * expected[likely])).sum()
    freedom = likely.sum() - 1
    assert jax.scipy.stats.chi2.sf(statistic, float(freedom)) > 1e-4


def test_children_of_probability_0_are_never_offered():
    """-inf and what underflows; a row with fewer tokens than children says so."""
    logits = jnp.array([-jnp.inf, 0.0, -300.0, 2.0, -jnp.inf], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 500)
    tokens, valid = jax.vmap(lambda key: build.sample_children(key, logits, 4, False))(keys)
    np.testing.assert_array_equal(valid, np.tile([True, True, False, False], (500, 1)))
    assert set(np.asarray(tokens)[:, :2].ravel()) == {1, 3}
    assert (tokens[:, 0] != tokens[:, 1]).all() and ((tokens >= 0) & (tokens < 5)).all()
    tokens, valid = jax.vmap(lambda key: build.sample_children(key, logits, 4, True))(keys)
    assert valid.all() and set(np.asarray(tokens).ravel()) == {1, 3}
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"num_children: expected 1 to 5, got {k}"):
            build.sample_children(keys[0], logits, k)


def test_children_of_a_wide_law_are_the_largest_perturbed_logits():
    """Against a sort, over a vocabulary where ``top_k`` searches in two stages."""
    logits = 3 * jax.random.normal(jax.random.key(1), (5000,))
    key = jax.random.key(2)
    scores = logits + jax.random.gumbel(key, (5000,), mode="high")
    tokens, valid = build.sample_children(key, logits, 6)
    np.testing.assert_array_equal(tokens, np.argsort(-np.asarray(scores))[:6])
    assert valid.all()
