"""The published tree: a slow reference, the definition of the collapse, and the release's faults.

``slow_transform`` builds the tree path by path in Python. Its switches plant the faults of the
published release (arXiv 2412.00061) and two likely slips; each must be told from the real thing
by ``assert_collapsed``, which knows only the definition of the collapse.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_spec_jax.tree import build, topology
from ctc_spec_jax.tree.ctc_transform import default_template, transform_tree
from ctc_spec_jax.types import NO_PARENT, DraftTree

VOCAB, FRAMES = 3, 4
BLANK, PENDING = VOCAB, 1
# Few classes and deep paths: most lattices hold blanks, repeats and copies at once.
TEMPLATE = build.counted_template((4, 9, 12, 10), top_k=VOCAB + 1)

transform = jax.jit(transform_tree, static_argnums=2)
depths = jax.jit(topology.depths, static_argnums=1)
lattices = st.lists(st.permutations(range(VOCAB + 1)), min_size=FRAMES, max_size=FRAMES)


def log_probs_of(ranked) -> jax.Array:
    """Frames whose classes rank as given: float32 [F, V+1]."""
    logits = -2.0 * np.argsort(ranked, axis=1)
    return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)


def collapse(symbols) -> tuple[int, ...]:
    merged = [s for i, s in enumerate(symbols) if i == 0 or s != symbols[i - 1]]
    return tuple(s for s in merged if s != BLANK)


def raw_paths(ranked, template=TEMPLATE) -> list[tuple[int, ...]]:
    """The symbols of every node's path, frame by frame, root excluded."""
    nodes = zip(template.parents[1:], template.depths[1:], template.ranks[1:], strict=True)
    paths = [()]
    for parent, depth, rank in nodes:
        paths.append((*paths[parent], ranked[depth - 1][rank]))
    return paths


def slow_transform(ranked, fault: str = "", template=TEMPLATE):
    """(tokens, parents, valid) as lists; ``fault`` plants one fault."""
    paths, raw = raw_paths(ranked, template), template.parents
    texts = [collapse(path) for path in paths]
    if fault == "blanks deleted before repeats are merged":
        texts = [collapse([s for s in path if s != BLANK]) for path in paths]
    if fault == "root compared":
        texts = [collapse((PENDING, *path))[1:] for path in paths]
    has_repeat = any(a == b for path in paths for a, b in itertools.pairwise(path))
    if fault == "blanks kept without repeats" and not has_repeat:
        texts = paths
    first = [texts.index(text) for text in texts]
    if fault == "copies kept":
        first = [0]
        for node in range(1, len(raw)):
            removed = texts[node] == texts[raw[node]]
            first.append(first[raw[node]] if removed else node)
    valid = [node == kept for node, kept in enumerate(first)]
    parents = [NO_PARENT] + [first[parent] for parent in raw[1:]]
    if fault == "positions not renumbered":
        parents = list(raw)
    symbols = [PENDING, *(path[-1] for path in paths[1:])]
    return [s if keep else 0 for s, keep in zip(symbols, valid, strict=True)], parents, valid


def assert_collapsed(ranked, tokens, parents, valid, template=TEMPLATE):
    """The tree holds each collapsed path exactly once, at the depth of its kept tokens."""
    arrays = (np.asarray(tokens, np.int32), np.asarray(parents, np.int32), np.asarray(valid))
    topology.check(DraftTree(*(a[None] for a in arrays)), FRAMES, vocab_size=VOCAB)
    texts = [()]
    for node in range(1, len(tokens)):
        texts.append((*texts[parents[node]], int(tokens[node])))
    expected = [collapse(path) for path in raw_paths(ranked, template)]
    kept = np.flatnonzero(arrays[2])
    assert sorted(texts[node] for node in kept) == sorted(set(expected))
    depth = depths(arrays[1], FRAMES)
    assert [texts[node] for node in kept] == [expected[node] for node in kept]
    assert [int(depth[node]) for node in kept] == [len(expected[node]) for node in kept]


@settings(deadline=None, derandomize=True, max_examples=80)
@given(lattices)
def test_equals_the_slow_reference(ranked):
    tokens, parents, valid = transform(log_probs_of(ranked), jnp.int32(PENDING), TEMPLATE)
    assert tokens.dtype == parents.dtype == jnp.int32 and valid.dtype == bool
    expected = slow_transform(ranked)
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_array_equal(parents, expected[1])
    np.testing.assert_array_equal(valid, expected[2])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(lattices)
def test_holds_every_collapsed_path_once(ranked):
    tree = transform(log_probs_of(ranked), jnp.int32(PENDING), TEMPLATE)
    assert_collapsed(ranked, *(np.asarray(a) for a in tree))


@pytest.mark.parametrize(
    ("fault", "template"),
    [
        ("positions not renumbered", TEMPLATE),
        ("blanks kept without repeats", build.static_template([(0,), (0, 0), (0, 0, 0)])),
        ("copies kept", TEMPLATE),
        ("blanks deleted before repeats are merged", TEMPLATE),
        ("root compared", TEMPLATE),
    ],
)
def test_faults_are_told_apart(fault, template):
    """The first three are defects 2, 3 and 4 of the release; the oracle rejects every one."""
    ranked = [[1, BLANK, 0, 2], [BLANK, 1, 2, 0], [1, 0, BLANK, 2], [2, 1, BLANK, 0]]
    assert_collapsed(ranked, *slow_transform(ranked, template=template), template)
    with pytest.raises((AssertionError, ValueError)):
        assert_collapsed(ranked, *slow_transform(ranked, fault, template), template)


def test_layout_of_an_earlier_round_is_told_apart():
    """Defect 1 of the release: tokens of this round, indices of the first one."""
    early, late = (
        [[0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 3, 2], [2, 1, 0, 3]],
        [[2, 3, 0, 1], [1, 2, 3, 0], [1, 3, 0, 2], [0, 3, 1, 2]],
    )
    _, parents, valid = slow_transform(early)
    tokens, _, _ = slow_transform(late)
    with pytest.raises((AssertionError, ValueError)):
        assert_collapsed(late, tokens, parents, valid)


def test_the_example_of_the_docstring():
    a, b, c, root, blank = range(5)
    choices = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 1), (1, 0, 2)]
    ranked = [[a, blank, b, c, root], [a, blank, b, c, root], [b, a, c, root, blank]]
    template = build.static_template(choices)
    tokens, parents, valid = transform(log_probs_of(ranked), jnp.int32(root), template)
    np.testing.assert_array_equal(tokens, [root, a, 0, 0, 0, 0, b, a, c])
    np.testing.assert_array_equal(valid, [1, 1, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(parents, [-1, 0, 0, 1, 1, 0, 1, 1, 1])


def test_rows_of_a_batch_equal_single_rows():
    ranked = [
        [[0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 3, 2], [2, 1, 0, 3]],
        [[3, 2, 0, 1], [1, 2, 3, 0], [1, 3, 0, 2], [0, 3, 1, 2]],
        [[3, 0, 1, 2]] * 4,
    ]
    log_probs = jnp.stack([log_probs_of(row) for row in ranked])
    pending = jnp.asarray([0, 2, 1], jnp.int32)
    builder = functools.partial(transform_tree, template=TEMPLATE)
    batch = jax.jit(jax.vmap(builder))(log_probs, pending)
    for row in range(3):
        single = transform(log_probs[row], pending[row], TEMPLATE)
        for left, right in zip(batch, single, strict=True):
            np.testing.assert_array_equal(left[row], right)


def test_default_template():
    assert default_template(64, 6) == build.counted_template()
    assert default_template(16, 3) == build.zipf_template(16, 3)
    assert default_template(64, 2).max_depth == 2


def test_template_must_fit_the_lattice():
    log_probs = log_probs_of([[0, 1, 2, 3]] * 2)
    with pytest.raises(ValueError, match=r"needs 4 frames and 4 classes, got .* \(2, 4\)"):
        transform_tree(log_probs, jnp.int32(0), TEMPLATE)
    wide = build.static_template([(4,)])
    with pytest.raises(ValueError, match="1 frames and 5 classes"):
        transform_tree(log_probs, jnp.int32(0), wide)
