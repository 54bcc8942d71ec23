"""The prefix tree against enumeration of all alignments, and against a float64 recursion."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctc_spec_jax.tree import topology
from ctc_spec_jax.tree.ctc_prefix import prefix_tree
from ctc_spec_jax.types import NO_PARENT, DraftTree

VOCAB, FRAMES = 3, 5
PENDING = 1

build = jax.jit(prefix_tree, static_argnames=("num_nodes", "max_depth", "top_k", "beam"))


def sizes(num_nodes: int) -> dict[str, int]:
    """All depths, all tokens: the exact tree."""
    return {"num_nodes": num_nodes, "max_depth": FRAMES, "top_k": VOCAB}


def log_of(probs) -> jax.Array:
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(probs), jnp.float32)


def collapse(symbols, blank: int) -> tuple[int, ...]:
    return tuple(s for s, _ in itertools.groupby(symbols) if s != blank)


def text_law(probs) -> dict[tuple[int, ...], float]:
    """Probability of every text, by enumerating all alignments; float64."""
    frames, classes = probs.shape
    law = collections.defaultdict(float)
    for alignment in itertools.product(range(classes), repeat=frames):
        law[collapse(alignment, classes - 1)] += float(np.prod(probs[range(frames), alignment]))
    return law


def prefix_masses(probs) -> dict[tuple[int, ...], float]:
    """Probability that the text starts with a prefix, for every non-empty prefix."""
    masses = collections.defaultdict(float)
    for text, mass in text_law(probs).items():
        for length in range(1, len(text) + 1):
            masses[text[:length]] += mass
    return masses


def texts_of(tree) -> list[tuple[int, ...]]:
    """What the valid nodes spell, root first; the tree's contract is checked on the way."""
    tokens, parents, valid, log_prefix = (np.asarray(a) for a in tree)
    assert [a.dtype for a in tree] == [np.int32, np.int32, np.bool_, np.float32]
    batch = DraftTree(tokens[None], parents[None], valid[None])
    topology.check(batch, max_depth=len(tokens))
    assert parents[0] == NO_PARENT and log_prefix[0] == 0
    # Padding comes last and masses fall, above all from parent to child.
    assert (valid[1:] <= valid[:-1]).all() and (log_prefix[1:] <= log_prefix[:-1]).all()
    assert (tokens[~valid] == 0).all() and np.isneginf(log_prefix[~valid]).all()
    texts = [()]
    for node in range(1, int(valid.sum())):
        texts.append((*texts[parents[node]], int(tokens[node])))
    assert len(set(texts)) == len(texts)
    return texts


def assert_best_prefixes(tree, masses, num_nodes: int):
    """Each node has its prefix's mass, and no other choice of prefixes has larger masses."""
    texts = texts_of(tree)
    found = np.exp(np.asarray(tree[3], np.float64))[1:]
    best = sorted(masses.values(), reverse=True)[: num_nodes - 1]
    best = np.pad(best, (0, num_nodes - 1 - len(best)))
    np.testing.assert_allclose(
        [masses[text] for text in texts[1:]], found[: len(texts) - 1], atol=1e-6
    )
    np.testing.assert_allclose(found, best, atol=1e-6)
    assert len(texts) - 1 == np.count_nonzero(best)


@st.composite
def lattices(draw):
    """Frames of small integer weights: many ties, zeros and one-hot frames; some mostly blank."""
    weights = st.lists(st.integers(0, 3), min_size=VOCAB + 1, max_size=VOCAB + 1)
    frames = draw(st.lists(weights.filter(any), min_size=FRAMES, max_size=FRAMES))
    probs = np.asarray(frames, np.float64)
    probs[:, VOCAB] *= draw(st.sampled_from([0, 1, 1, 100]))
    probs[~probs.any(axis=1)] = 1.0
    return probs / probs.sum(axis=1, keepdims=True)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(lattices())
@example(np.eye(4)[[0, 3, 0, 0, 3]])  # a _ a a _ : the text is a a, for certain
@example(np.eye(4)[[0, 0, 0, 0, 0]])
@example(np.eye(4)[[3, 3, 3, 3, 3]])  # the root alone has mass
@example(np.full((FRAMES, VOCAB + 1), 0.25))
@example(np.tile([0.6, 0.0, 0.0, 0.4], (FRAMES, 1)))  # repeats only
def test_tree_holds_the_most_probable_prefixes(probs):
    tree = build(log_of(probs), jnp.int32(PENDING), **sizes(8))
    assert_best_prefixes(tree, prefix_masses(probs), 8)


@pytest.mark.parametrize("num_nodes", [2, 8, 30])
def test_set_of_prefixes_on_generic_lattices(num_nodes):
    """Without ties the set is unique. Row 2 has fewer prefixes with mass than 30."""
    rng = np.random.default_rng(num_nodes)
    for row in range(3):
        probs = rng.dirichlet(np.full(VOCAB + 1, 0.5), size=FRAMES)
        if row == 2:
            probs[:, :2] = 0.0
            probs[0, 2] = 0.0
            probs /= probs.sum(axis=1, keepdims=True)
        masses = prefix_masses(probs)
        tree = build(log_of(probs), jnp.int32(0), **sizes(num_nodes))
        ranked = sorted((text for text in masses if masses[text] > 0), key=lambda t: -masses[t])
        assert texts_of(tree)[1:] == ranked[: num_nodes - 1]
        assert_best_prefixes(tree, masses, num_nodes)


def test_expected_accepted_length_is_the_sum_of_masses():
    """Accepting a text walks down the tree while it has the next token."""
    probs = np.random.default_rng(5).dirichlet(np.ones(VOCAB + 1), size=FRAMES)
    tree = build(log_of(probs), jnp.int32(0), **sizes(8))
    nodes = set(texts_of(tree))

    def expected_length(nodes):
        return sum(
            mass * max(n for n in range(len(text) + 1) if text[:n] in nodes)
            for text, mass in text_law(probs).items()
        )

    best = expected_length(nodes)
    np.testing.assert_allclose(best, np.exp(np.asarray(tree[3], np.float64))[1:].sum(), atol=1e-6)
    # No exchange of one leaf for another prefix that keeps a tree is better.
    leaves = [u for u in nodes if u and not any(v[:-1] == u for v in nodes if v)]
    for leaf in leaves:
        rest = nodes - {leaf}
        for child in {(*u, c) for u in rest for c in range(VOCAB)} - rest:
            assert expected_length(rest | {child}) <= best + 1e-12


def test_depth_limit():
    probs = np.random.default_rng(3).dirichlet(np.ones(VOCAB + 1), size=FRAMES)
    masses = {u: m for u, m in prefix_masses(probs).items() if len(u) <= 2}
    tree = build(log_of(probs), jnp.int32(0), num_nodes=8, max_depth=2, top_k=VOCAB)
    assert_best_prefixes(tree, collections.defaultdict(float, masses), 8)


def test_candidates_are_the_union_of_frame_tops():
    """One token per frame: prefixes over just those tokens compete. The last frame adds one."""
    probs = np.random.default_rng(8).dirichlet(np.ones(VOCAB + 1), size=FRAMES)
    probs[:, [0, 1]] = np.sort(probs[:, [0, 1]], axis=1)
    probs[:, [2, 1]] = np.sort(probs[:, [2, 1]], axis=1)
    probs[-1, [0, 1]] = probs[-1, [1, 0]]
    tops = np.argmax(probs[:, :VOCAB], axis=1).tolist()
    assert tops == [1, 1, 1, 1, 0]
    masses = {u: m for u, m in prefix_masses(probs).items() if {*tops}.issuperset(u)}
    tree = build(log_of(probs), jnp.int32(0), num_nodes=8, max_depth=FRAMES, top_k=1)
    assert_best_prefixes(tree, collections.defaultdict(float, masses), 8)


@pytest.mark.parametrize("level", [0, 1])
def test_every_node_but_a_chain_may_lie_on_one_level(level):
    """The widest level that an exact tree of 5 nodes needs: 4 nodes at depth 1, 3 at depth 2."""
    probs = np.tile([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], (3, 1))
    probs[0] = [1, 0, 0, 0, 0, 0]
    probs[level] = [0, 0.19, 0.2, 0.21, 0.22, 0.18]
    tree = build(log_of(probs), jnp.int32(0), num_nodes=5, max_depth=3, top_k=5)
    widest = [(4,), (3,), (2,), (1,)] if level == 0 else [(0,), (0, 4), (0, 3), (0, 2)]
    assert texts_of(tree)[1:] == widest


def test_narrow_beam_is_a_tree_with_exact_masses():
    probs = np.random.default_rng(1).dirichlet(np.ones(VOCAB + 1), size=FRAMES)
    masses = prefix_masses(probs)
    tree = build(log_of(probs), jnp.int32(0), **sizes(30), beam=3)
    texts = texts_of(tree)
    found = np.exp(np.asarray(tree[3], np.float64))[1 : len(texts)]
    np.testing.assert_allclose([masses[u] for u in texts[1:]], found, atol=1e-6)
    assert collections.Counter(map(len, texts)) == {0: 1, 1: 3, 2: 3, 3: 3, 4: 3, 5: 3}
    full = build(log_of(probs), jnp.int32(0), **sizes(30), beam=29)
    for left, right in zip(full, build(log_of(probs), jnp.int32(0), **sizes(30)), strict=True):
        np.testing.assert_array_equal(left, right)


def recursion_masses(log_probs, texts) -> list[float]:
    """Log mass of prefixes by the recursion over a label's two kinds of ends, in float64."""
    log_probs = np.asarray(log_probs, np.float64)
    probs, blank = np.exp(log_probs), np.exp(log_probs[:, -1])
    out = []
    for text in texts:
        spelled, ends_blank, last = np.zeros(len(probs) + 1), np.cumprod([1.0, *blank]), None
        mass = 1.0
        for label in text:
            p = probs[:, label]
            entering = ends_blank[:-1] + (0.0 if label == last else spelled[:-1])
            enter = p * entering
            mass = enter.sum()
            spelled, ends_blank = np.zeros(len(probs) + 1), np.zeros(len(probs) + 1)
            for f in range(len(probs)):
                spelled[f + 1] = enter[f] + p[f] * spelled[f]
                ends_blank[f + 1] = blank[f] * (ends_blank[f] + spelled[f])
            last = label
        out.append(np.log(mass))
    return out


def test_relative_precision_on_a_long_lattice():
    """24 frames of 400 tokens, some mostly blank: masses hold to 1e-5 relative, tails included."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(24, 401))
    logits[:, 400] += rng.choice([4.0, 12.0], size=24)
    logits[np.arange(24), rng.integers(0, 2, 24)] += 8  # few tokens, so that repeats matter
    log_probs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    tree = build(log_probs, jnp.int32(0), num_nodes=32, max_depth=6, top_k=4)
    texts = texts_of(tree)
    assert len(texts) == 32 and any(a == b for u in texts for a, b in itertools.pairwise(u))
    expected = recursion_masses(log_probs, texts)
    np.testing.assert_allclose(np.asarray(tree[3], np.float64), expected, atol=1e-5)

    held = log_of(np.eye(401)[[7] * 20 + [9] * 4])  # one label held for 20 frames, for certain
    tree = build(held, jnp.int32(0), num_nodes=32, max_depth=6, top_k=4)
    assert texts_of(tree) == [(), (7,), (7, 9)] and (np.asarray(tree[3])[:3] == 0).all()


def test_rare_repeats_keep_relative_precision():
    """A repeat behind a rare blank is a small part of a large mass: no difference may be taken."""
    probs = np.tile([1 - 3e-7, 1e-7, 1e-7, 1e-7], (FRAMES, 1))
    tree = build(log_of(probs), jnp.int32(0), **sizes(8))
    texts = texts_of(tree)
    assert (0, 0) in texts
    expected = recursion_masses(log_of(probs), texts)
    np.testing.assert_allclose(np.asarray(tree[3], np.float64), expected, atol=1e-5)


def test_rounding_never_ranks_a_child_above_its_parent():
    """Near-certain texts: parent and child differ by less than float32 resolves."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        logits = rng.normal(size=(FRAMES, VOCAB + 1)) * 0.5
        logits[np.arange(FRAMES), [0, 0, 1, 1, 2]] += rng.uniform(8, 18)
        log_probs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
        tree = build(log_probs, jnp.int32(0), **sizes(8))
        assert texts_of(tree)[:4] == [(), (0,), (0, 1), (0, 1, 2)]


def test_pending_token_is_no_part_of_the_lattice():
    probs = np.random.default_rng(4).dirichlet(np.ones(VOCAB + 1), size=FRAMES)
    trees = [build(log_of(probs), jnp.int32(p), **sizes(8)) for p in range(VOCAB)]
    for p, tree in enumerate(trees):
        assert int(tree[0][0]) == p
        np.testing.assert_array_equal(tree[0][1:], trees[0][0][1:])
        np.testing.assert_array_equal(tree[1], trees[0][1])


def test_rows_of_a_batch_equal_single_rows():
    rng = np.random.default_rng(6)
    rows = [
        rng.dirichlet(np.ones(VOCAB + 1), size=FRAMES),
        np.eye(4)[[0, 3, 0, 1, 1]],
        np.tile([0.01, 0.02, 0.03, 0.94], (FRAMES, 1)),
    ]
    log_probs, pending = log_of(np.stack(rows)), jnp.asarray([2, 0, 1], jnp.int32)
    batch = jax.jit(jax.vmap(functools.partial(prefix_tree, **sizes(8))))(log_probs, pending)
    for row in range(3):
        single = build(log_probs[row], pending[row], **sizes(8))
        for left, right in zip(batch[:3], single[:3], strict=True):
            np.testing.assert_array_equal(left[row], right)
        np.testing.assert_allclose(batch[3][row], single[3], rtol=1e-6)


def test_nan_frames_still_give_a_tree():
    """A drafter that diverged costs speed only: the output is a tree with a valid root."""
    probs = np.random.default_rng(4).dirichlet(np.ones(VOCAB + 1), size=FRAMES)
    log_probs = log_of(probs).at[2].set(jnp.nan)
    tree = build(log_probs, jnp.int32(0), **sizes(8))
    assert len(texts_of(tree)) > 1
    nothing = build(jnp.full_like(log_probs, jnp.nan), jnp.int32(2), **sizes(8))
    assert texts_of(nothing) == [()] and int(nothing[0][0]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": jnp.zeros((2, 4), jnp.bfloat16)}, "log_probs: expected float32"),
        ({"log_probs": jnp.zeros((1, 2, 4))}, r"got float32 \(1, 2, 4\)"),
        ({"num_nodes": 0}, "num_nodes: expected at least 1, got 0"),
        ({"max_depth": 0}, "max_depth"),
        ({"top_k": 4}, "top_k: expected at most V=3, got 4"),
        ({"beam": 0}, "beam: expected at least 1"),
    ],
)
def test_bad_arguments(change, message):
    good = {"log_probs": jnp.zeros((2, 4)), "num_nodes": 4, "max_depth": 2, "top_k": 2}
    with pytest.raises(ValueError, match=message):
        prefix_tree(pending=jnp.int32(0), **{**good, **change})
