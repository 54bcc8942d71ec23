"""Builders: templates against enumeration of all rank-paths, top-k against ``lax.top_k``."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ctc_spec_jax.tree import build, topology
from ctc_spec_jax.types import DraftTree


def rank_paths(template: build.Template) -> list[tuple[int, ...]]:
    """Every node's ranks from depth 1 down, root excluded."""
    paths = [()]
    for parent, rank in zip(template.parents[1:], template.ranks[1:], strict=True):
        paths.append((*paths[parent], rank))
    assert [len(path) for path in paths] == list(template.depths)
    return paths[1:]


def all_paths(top_k: int, max_depth: int) -> list[tuple[int, ...]]:
    lengths = range(1, max_depth + 1)
    return [path for n in lengths for path in itertools.product(range(top_k), repeat=n)]


def test_chain():
    parents = build.chain(4)
    assert parents.dtype == np.int32 and parents.tolist() == [-1, 0, 1, 2]
    assert build.chain(1).tolist() == [-1]
    with pytest.raises(ValueError, match="num_nodes"):
        build.chain(0)


def test_static_template_orders_nodes_by_depth():
    template = build.static_template([(1, 0), (0,), (1,), (0, 3), (0, 3, 2)])
    assert template.parents == (-1, 0, 0, 1, 2, 3)
    assert template.depths == (0, 1, 1, 2, 2, 3)
    assert template.ranks == (0, 0, 1, 3, 0, 2)
    assert (template.num_nodes, template.max_depth, template.top_k) == (6, 3, 4)
    expected = [[0, 0, 0], [1, 0, 0], [2, 0, 0], [1, 3, 0], [2, 4, 0], [1, 3, 5]]
    assert template.paths().tolist() == expected


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "at least one"),
        ([(0,), ()], "non-empty"),
        ([(-1,)], "ranks >= 0"),
        ([(0,), (0,)], r"duplicate path \(0,\)"),
        ([(0,), (1, 0)], r"\(1, 0\) needs its prefix \(1,\)"),
    ],
)
def test_static_template_rejects(choices, message):
    with pytest.raises(ValueError, match=message):
        build.static_template(choices)


def test_fill_puts_ranked_candidates_into_slots():
    template = build.static_template([(0,), (1,), (0, 1), (1, 1)])
    ranked = jnp.asarray([[10, 11, 12], [20, 21, 22], [30, 31, 32]], jnp.int32)
    tokens = template.fill(ranked, jnp.int32(7))
    assert tokens.dtype == jnp.int32 and tokens.tolist() == [7, 10, 11, 21, 21]
    with pytest.raises(ValueError, match=r"ranked: expected at least \[2, 2\], got \(1, 3\)"):
        template.fill(ranked[:1], jnp.int32(7))
    with pytest.raises(ValueError, match="ranked"):
        template.fill(ranked[:, :1], jnp.int32(7))


def test_equal_templates_compile_once():
    fill = jax.jit(lambda ranked, template: template.fill(ranked, jnp.int32(0)), static_argnums=1)
    ranked = jnp.zeros((2, 2), jnp.int32)
    for _ in range(2):
        fill(ranked, build.static_template([(0,), (0, 1)]))
    assert fill._cache_size() == 1


@pytest.mark.parametrize(
    ("nodes", "depth", "ranks"), [(2, 1, 1), (7, 3, 3), (15, 2, 4), (21, 4, 3)]
)
def test_zipf_template_keeps_the_most_probable_paths(nodes, depth, ranks):
    template = build.zipf_template(nodes, depth, ranks)
    law = 1 / np.arange(1, ranks + 1)
    law /= law.sum()
    scored = sorted((-math.prod(law[list(path)]), path) for path in all_paths(ranks, depth))
    kept = sorted(-math.prod(law[list(path)]) for path in rank_paths(template))
    np.testing.assert_allclose(kept, [score for score, _ in scored[: nodes - 1]])
    assert template.num_nodes == nodes and template.max_depth <= depth


def test_zipf_template_breaks_ties_by_order():
    """With two ranks, (0, 1) and (1, 0) tie."""
    assert rank_paths(build.zipf_template(5, 2, 2)) == [(0,), (1,), (0, 0), (0, 1)]


def test_zipf_template_rejects_more_nodes_than_paths():
    assert build.zipf_template(7, 2, 2).num_nodes == 7
    with pytest.raises(ValueError, match="num_nodes=8: only 7 nodes exist"):
        build.zipf_template(8, 2, 2)


def test_published_counts():
    template = build.counted_template()
    assert template.num_nodes == 64 and template.max_depth == 4 and template.top_k == 10
    assert [template.depths.count(d) for d in range(1, 5)] == [10, 28, 23, 2]
    tree = DraftTree(
        jnp.arange(64, dtype=jnp.int32)[None],
        jnp.asarray(template.parents, jnp.int32)[None],
        jnp.ones((1, 64), bool),
    )
    topology.check(tree, max_depth=4)


@pytest.mark.parametrize(("counts", "ranks"), [((3, 5, 4, 1), 4), ((1, 1, 1), 1), ((4, 16, 64), 4)])
def test_counted_template_follows_its_rule(counts, ranks):
    kept = rank_paths(build.counted_template(counts, ranks))
    above = {()}
    for depth, count in enumerate(counts, start=1):
        level = [path for path in kept if len(path) == depth]
        rivals = [p for p in all_paths(ranks, depth) if len(p) == depth and p[:-1] in above]
        rivals.sort(key=lambda path: (math.prod(r + 1 for r in path), path))
        assert sorted(rivals[:count]) == level
        above = set(level)


def test_counted_template_rejects_counts_without_paths():
    with pytest.raises(ValueError, match="expected 1 to 3 nodes at depth 1, got 4"):
        build.counted_template((4,), top_k=3)
    with pytest.raises(ValueError, match="depth 2, got 0"):
        build.counted_template((2, 0), top_k=3)


@pytest.mark.parametrize("n", [1, 7, 500, 1024, 4096, 4097, 5003])
@pytest.mark.parametrize("k", [1, 8])
def test_top_k_is_exact(n, k):
    """Wide rows take the two-stage path; integers make ties, -inf makes rows with few entries."""
    k = min(k, n)
    rng = np.random.default_rng(n + k)
    scores = rng.normal(size=(6, n)).astype(np.float32)
    scores[1:3] = rng.integers(0, 4, (2, n))
    scores[3] = -np.inf
    scores[4, rng.random(n) > 3 / n] = -np.inf
    scores[5] = np.arange(n)  # the best entries lie in the incomplete last row
    expected, _ = lax.top_k(scores, k)
    values, indices = jax.jit(build.top_k, static_argnums=1)(scores, k)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.take_along_axis(scores, np.asarray(indices), -1), expected)
    ordered = np.sort(indices, axis=-1)
    assert (ordered[:, 1:] > ordered[:, :-1]).all()


def test_top_k_rejects_k_out_of_range():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k: expected 1 to 3, got {k}"):
            build.top_k(jnp.zeros((2, 3)), k)
