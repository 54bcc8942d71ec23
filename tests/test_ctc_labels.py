"""CTC frames that know the last label: loss and tree against sums over all alignments."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import chunked_head, losses, recipes
from ctc_spec_jax.draft.training import Loss, Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.tree import ctc_labels, ctc_prefix
from tests.helpers import ragged_prompts, run, tiny_target
from tests.test_ctc_prefix import texts_of

VOCAB, FRAMES, PENDING = 3, 5, 1


def lattice(seed: int):
    """log-probabilities [F, V+1] and B [V, V]: label, next token."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(FRAMES, VOCAB + 1)) * 1.5
    bias = draw.normal(size=(VOCAB, VOCAB)) * 2
    return np.asarray(jax.nn.log_softmax(logits.astype(np.float32))), bias.astype(np.float32)


def laws(log_probs, bias):
    """p_f(c | l) [F, V, V+1], in float64: frame, last label, class."""
    probs = np.exp(log_probs.astype(np.float64))
    tokens = probs[:, None, :VOCAB] * np.exp(bias.astype(np.float64))[None]
    tokens *= probs[:, None, :VOCAB].sum(-1, keepdims=True) / tokens.sum(-1, keepdims=True)
    blank = np.broadcast_to(probs[:, None, VOCAB:], (FRAMES, VOCAB, 1))
    return np.concatenate([tokens, blank], axis=-1)


def text_law(log_probs, bias) -> dict[tuple[int, ...], float]:
    """Probability of every text: the sum over all alignments, one symbol at a time."""
    law, total = laws(log_probs, bias), collections.defaultdict(float)
    for alignment in itertools.product(range(VOCAB + 1), repeat=FRAMES):
        mass, text, before = 1.0, (), VOCAB
        for frame, symbol in enumerate(alignment):
            mass *= law[frame, text[-1] if text else PENDING, symbol]
            if symbol not in (VOCAB, before):
                text = (*text, symbol)
            before = symbol
        total[text] += mass
    return total


def prefix_masses(log_probs, bias):
    masses = collections.defaultdict(float)
    for text, mass in text_law(log_probs, bias).items():
        for length in range(1, len(text) + 1):
            masses[text[:length]] += mass
    return masses


@pytest.mark.parametrize("seed", range(4))
def test_tree_holds_the_best_prefixes(seed):
    log_probs, bias = lattice(seed)
    assert sum(text_law(log_probs, bias).values()) == pytest.approx(1, abs=1e-6)
    masses, nodes = prefix_masses(log_probs, bias), 9

    def of(labels, candidates):
        return jnp.asarray(bias)[labels][:, candidates]

    build = jax.jit(lambda x, p: ctc_labels.prefix_tree(x, p, of, nodes, 4, VOCAB))
    tree = build(log_probs, np.int32(PENDING))
    texts = texts_of(tree)[1:]
    best = sorted((m for t, m in masses.items() if len(t) <= 4), reverse=True)[: nodes - 1]
    found = np.exp(np.asarray(tree[3], np.float64))[1:]
    np.testing.assert_allclose([masses[text] for text in texts], found, atol=1e-6)
    np.testing.assert_allclose(found, best, atol=1e-6)


def test_without_a_bias_it_is_the_other_tree():
    log_probs, _ = lattice(7)

    def nothing(labels, candidates):
        return jnp.zeros((labels.shape[0], candidates.shape[0]))

    given = jnp.asarray(log_probs), jnp.int32(PENDING)
    tree = ctc_labels.prefix_tree(*given, nothing, 9, 4, VOCAB)
    sizes = dict(num_nodes=9, max_depth=4, top_k=VOCAB)
    other = ctc_prefix.prefix_tree(*given, **sizes)
    assert texts_of(tree) == texts_of(other)
    np.testing.assert_allclose(tree[3], other[3], atol=1e-5)


def test_loss_is_the_mass_of_all_alignments():
    """Prefixes of the label, repeats among them, through hidden states and a head."""
    draw = np.random.default_rng(1)
    width, text = 4, np.asarray([[PENDING, 0, 0, 2], [PENDING, 2, 1, 2]], np.int32)
    hidden = draw.normal(size=(2, FRAMES, width)).astype(np.float32)
    head = draw.normal(size=(width, VOCAB)).astype(np.float32)
    blank, table = draw.normal(size=(2, width)).astype(np.float32)
    table = draw.normal(size=(VOCAB, width)).astype(np.float32)  # what a label adds

    def masses(table):
        parts = chunked_head.chunked_labelled_log_probs(
            *map(jnp.asarray, (hidden, head, blank, text, table[text])), top_k=VOCAB, chunk=1
        )
        labels = jnp.asarray(text[:, 1:])
        found = losses.draft_loss(
            parts[0], parts[1], labels, jnp.asarray([3, 3]), {}, stay=parts[2]
        )
        return found[1]["loss_at"]

    logits = np.concatenate([hidden @ head, (hidden @ blank)[..., None]], axis=-1)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = []
    for row in range(2):
        known = prefix_masses(log_probs[row], table @ head)
        expected.append([-np.log(known[tuple(text[row, 1 : k + 1])]) for k in (1, 2, 3)])
    np.testing.assert_allclose(jax.jit(masses)(table), np.mean(expected, axis=0), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda t: masses(t).sum()))(table)
    step = np.zeros_like(table)
    step[0, 1] = 1e-2
    slope = (masses(table + step).sum() - masses(table - step).sum()) / 2e-2
    assert float(gradient[0, 1]) == pytest.approx(float(slope), rel=1e-2)


def test_laws_add_up_whatever_the_label():
    """One frame, every token as the label once: candidates must not depend on the label."""
    draw = np.random.default_rng(2)
    vocab, width = 9, 4
    hidden = np.tile(draw.normal(size=(1, 1, width)), (vocab, 1, 1)).astype(np.float32)
    head, blank = (draw.normal(size=s).astype(np.float32) for s in ((width, vocab), width))
    table = draw.normal(size=(vocab, width)).astype(np.float32) * 3
    text = np.stack([np.full(vocab, 4), np.arange(vocab)], axis=1).astype(np.int32)
    parts = chunked_head.chunked_labelled_log_probs(
        *map(jnp.asarray, (hidden, head, blank, text, table[text])), top_k=3, chunk=4
    )
    mass = np.exp(parts[1][:, 0, 0]).sum() + np.exp(parts[0][0, 0])
    assert float(mass) == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def setting():
    lm, params = tiny_target(num_layers=1)
    recipe = recipes.find("ctc_labels")
    shape = Shape(layers=1, frames=4)
    return lm, params, recipe, recipe.network(lm.config, shape)


def test_fresh_frames_do_not_know_the_label_yet(setting):
    """The trees of a fresh network are those of the plain one; trained ones differ."""
    lm, params, recipe, network = setting
    drafter = recipe.drafter(network, 8, 3, "")
    given = drafter.init_params(jax.random.key(0))
    given = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, given)
    other = recipes.find("ctc")
    plain = other.drafter(other.network(lm.config, Shape(layers=1, frames=4)), 8, 3, "")
    less = {name: x for name, x in given.items() if not name.startswith("label")}
    up = jax.random.normal(jax.random.key(1), given["label_up"].shape)
    prompts, lengths = ragged_prompts(1, (5, 1, 7))
    outputs = [
        run(lm, params, one, own, prompts, lengths, 16)
        for one, own in ((drafter, given), (plain, less), (drafter, given | {"label_up": up}))
    ]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output.tokens, outputs[0].tokens)
    accepted = [output.stats.accepted.sum(0).tolist() for output in outputs]
    assert accepted[0] == accepted[1] != accepted[2]


def test_training_moves_the_bias(setting):
    lm, params, recipe, network = setting
    drafter = recipe.drafter(network, 8, 3, "")
    weights = Loss(labels=3, chunk=2)
    loss = recipe.loss(lm, drafter, weights, anchors=4)
    draw = np.random.default_rng(0)
    batch = {
        "tokens": draw.integers(0, lm.vocab_size, (2, 12)).astype(np.int32),
        "segments": np.ones((2, 12), np.int32),
        "positions": np.tile(np.arange(12, dtype=np.int32), (2, 1)),
        "trained": np.ones((2, 12), bool),
    }
    keys = jax.random.split(jax.random.key(0), 2)
    step = jax.jit(jax.grad(lambda p: loss.loss(p, params, batch, keys)[0]))
    gradient = step(drafter.init_params(jax.random.key(0)))
    assert float(jnp.abs(gradient["label_up"]).max()) > 0
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_the_published_tree_is_refused(setting):
    with pytest.raises(InputError, match="^tree: expected prefix, found 'transform'$"):
        setting[2].drafter(setting[3], 8, 3, "transform")
