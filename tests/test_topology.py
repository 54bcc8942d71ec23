"""Topology: every function against a walk along the parents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_spec_jax.tree import topology
from ctc_spec_jax.types import NO_PARENT, ROOT, DraftTree

DEPTH = 4


@functools.partial(jax.jit, static_argnums=2)
def everything(parents, valid, max_depth):
    """All functions of parents at once; one compilation per shape."""
    nodes = jnp.arange(parents.shape[0], dtype=jnp.int32)
    return (
        topology.lineage(parents, max_depth),
        topology.depths(parents, max_depth),
        topology.ancestor_mask(parents, valid, max_depth),
        topology.positions(parents, jnp.int32(7), max_depth),
        jax.vmap(lambda node: topology.path_to(parents, node, max_depth))(nodes),
    )


def walk(parents, node: int) -> list[int]:
    """The node, its parent, and so on up to the root."""
    line = [node]
    while line[-1] != ROOT:
        line.append(int(parents[line[-1]]))
    return line


def random_parents(draw_index, nodes: int) -> np.ndarray:
    """Parents of a tree no deeper than DEPTH; ``draw_index(n)`` picks one of n choices."""
    parents, depth = [NO_PARENT], [0]
    for _ in range(1, nodes):
        shallow = [n for n, d in enumerate(depth) if d < DEPTH]
        parents.append(shallow[draw_index(len(shallow))])
        depth.append(depth[parents[-1]] + 1)
    return np.asarray(parents, np.int32)


@st.composite
def trees(draw, nodes: int = 9):
    parents = random_parents(lambda n: draw(st.integers(0, n - 1)), nodes)
    valid = np.asarray([True, *(draw(st.booleans()) for _ in range(nodes - 1))])
    return parents, valid


def assert_topology(parents, valid, max_depth: int):
    nodes = len(parents)
    lines = [walk(parents, node) for node in range(nodes)]
    expected = np.full((max_depth + 1, nodes), ROOT)
    related = np.eye(nodes, dtype=bool)
    paths = np.full((nodes, max_depth + 1), ROOT)
    for node, line in enumerate(lines):
        expected[: len(line), node] = line
        related[node, [a for a in line if valid[a]]] = True
        paths[node, : len(line)] = line[::-1]
    depth = np.asarray([len(line) - 1 for line in lines])
    found = everything(parents, valid, max_depth)
    assert [a.dtype for a in found] == [np.int32, np.int32, np.bool_, np.int32, np.int32]
    wanted = (expected, depth, related, depth + 7, paths)
    for array, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(array, want)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(trees())
def test_functions_of_parents_equal_a_walk(tree):
    assert_topology(*tree, DEPTH)


@pytest.mark.parametrize(("nodes", "max_depth"), [(1, 0), (2, 3), (70, DEPTH)])
def test_sizes(nodes, max_depth):
    rng = np.random.default_rng(nodes)
    parents = random_parents(lambda n: int(rng.integers(n)), nodes)
    assert_topology(parents, rng.random(nodes) < 0.8, max_depth)


def test_a_chain_reaches_the_deepest_node():
    parents = np.arange(-1, 16, dtype=np.int32)
    assert_topology(parents, np.ones(17, bool), 16)


def test_shape_of_a_batch_equals_its_rows():
    rng = np.random.default_rng(0)
    parents = np.stack([random_parents(lambda n: int(rng.integers(n)), 8) for _ in range(3)])
    valid = rng.random((3, 8)) < 0.7
    tree = DraftTree(jnp.zeros((3, 8), jnp.int32), jnp.asarray(parents), jnp.asarray(valid))
    lineage = topology.lineages(tree, DEPTH)
    depth, mask = jax.jit(topology.shape_of)(tree, lineage)
    for row in range(3):
        _, row_depth, row_mask, _, _ = everything(parents[row], valid[row], DEPTH)
        np.testing.assert_array_equal(depth[row], row_depth)
        np.testing.assert_array_equal(mask[row], row_mask)


def test_root_only_is_a_tree_of_its_root():
    tree = topology.root_only(jnp.asarray([5, 2], jnp.int32))
    topology.check(tree, max_depth=0, vocab_size=6)
    np.testing.assert_array_equal(tree.tokens, [[5], [2]])


SOUND = DraftTree(
    jnp.asarray([[3, 1, 2, 1], [0, 1, 0, 0]], jnp.int32),
    jnp.asarray([[-1, 0, 0, 1], [-1, 0, 1, 2]], jnp.int32),
    jnp.asarray([[True, True, True, True], [True, True, False, False]]),
)


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("parents", (1, 0), 0, "row 1: node 0: the root"),
        ("valid", (0, 0), False, "row 0: node 0: the root"),
        ("parents", (0, 2), 2, "row 0: node 2: parent not in"),
        ("parents", (1, 3), NO_PARENT, "row 1: node 3: parent not in"),
        ("valid", (0, 1), False, "row 0: node 3: valid node below"),
        ("tokens", (0, 2), 1, "row 0: node 2: repeats the token"),
        ("tokens", (1, 3), 4, "row 1: node 3: token id"),
        ("tokens", (1, 2), -1, "row 1: node 2: token id"),
    ],
)
def test_check_names_the_broken_rule(field, index, value, message):
    topology.check(SOUND, max_depth=3, vocab_size=4)
    broken = dataclasses.replace(SOUND, **{field: getattr(SOUND, field).at[index].set(value)})
    with pytest.raises(ValueError, match=message):
        topology.check(broken, max_depth=3, vocab_size=4)


def test_check_depth_dtype_and_shape():
    with pytest.raises(ValueError, match="row 1: node 3: deeper than max_depth=2"):
        topology.check(SOUND, max_depth=2)
    floats = dataclasses.replace(SOUND, tokens=SOUND.tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"tokens: expected int32 .* got float32"):
        topology.check(floats, max_depth=3)
    cut = dataclasses.replace(SOUND, valid=SOUND.valid[:, :3])
    with pytest.raises(ValueError, match=r"valid: .* got bool \(2, 3\)"):
        topology.check(cut, max_depth=3)


def test_check_allows_equal_siblings_on_request():
    twins = dataclasses.replace(SOUND, tokens=SOUND.tokens.at[0, 2].set(1))
    topology.check(twins, max_depth=3, distinct_children=False)
