"""The CTC drafter in the loop: exact for lattices of any quality, full of repeats and blanks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax.decode import Loop, start
from ctc_spec_jax.draft.ctc import CTCDrafter, CTCNetwork, ctc_config, published
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from ctc_spec_jax.tree.ctc_transform import TransformTree, default_template
from ctc_spec_jax.types import DraftContext, DraftTree
from ctc_spec_jax.verify import Greedy
from tests.helpers import VOCAB, make_request, plain_text, ragged_prompts, run, tiny_target

NEW = 20
FRAMES = 6


@dataclasses.dataclass(frozen=True)
class OracleLattice:
    """Lattices that spell the true text with random repeats and blanks, blurred by noise.

    ``draft_params`` is the true text, int32 [B, S]. The tree builders are the real ones.
    """

    tree: Any
    sharpness: float = 4.0
    taps: tuple[int, ...] = ()

    @property
    def max_depth(self):
        return self.tree.max_depth

    @property
    def num_nodes(self):
        return self.tree.num_nodes

    def init(self, params, context, taps):
        return ()

    def propose(self, params, state, context, keys):
        def row(key, truth, length):
            place, kind, noise = jax.random.split(key, 3)
            advance = jax.random.uniform(place, (FRAMES,)) < 0.7
            index = length + jnp.cumsum(advance.astype(jnp.int32))
            label = truth[jnp.minimum(index, truth.shape[0] - 1)]
            # A frame that does not advance repeats the label before it or is blank; between two
            # equal tokens of the text this merges them, which is a legitimate wrong draft.
            rest = jnp.where(jax.random.uniform(kind, (FRAMES,)) < 0.5, VOCAB, label)
            label = jnp.where(advance, label, rest)
            logits = self.sharpness * jax.nn.one_hot(label, VOCAB + 1)
            logits += jax.random.normal(noise, logits.shape)
            return jax.nn.log_softmax(logits, axis=-1)

        lattice = jax.vmap(row)(keys, params, context.length)
        return DraftTree(*jax.vmap(self.tree)(lattice, context.pending))

    def commit(self, params, state, context, output, acceptance):
        return state


TREES = {
    "prefix": PrefixTree(10, 4, top_k=4),
    "transform": TransformTree(default_template(16, 4)),
}


@pytest.fixture(scope="module")
def setting():
    lm, params = tiny_target()
    prompts, lengths = ragged_prompts(7, (4, 9, 2, 6))
    return lm, params, prompts, lengths, *plain_text(lm, params, prompts, lengths, NEW)


@pytest.mark.parametrize("sharpness", [1.0, 4.0, 9.0])
@pytest.mark.parametrize("name", TREES)
def test_lattice_trees_equal_plain(setting, name, sharpness):
    lm, params, prompts, lengths, plain, truth = setting
    drafter = OracleLattice(TREES[name], sharpness)
    result = run(lm, params, drafter, truth, prompts, lengths, NEW)
    np.testing.assert_array_equal(result.tokens, plain)
    if sharpness == 9.0:
        assert (np.asarray(result.stats.rounds) < 0.8 * NEW).all()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", TREES)
def test_network_equals_plain(setting, name, batch):
    """A drafter with random weights, taps, its own cache and the shared head."""
    lm, params, prompts, lengths, plain, _ = setting
    drafter = CTCDrafter(ctc_config(lm.config, 2, FRAMES, taps=(0, 1)), TREES[name])
    draft_params = drafter.init_params(jax.random.key(4))
    rows = slice(0, batch)
    result = run(lm, params, drafter, draft_params, prompts[rows], lengths[rows], NEW)
    np.testing.assert_array_equal(result.tokens, plain[rows])


def test_published_preset(setting):
    lm, params, prompts, lengths, plain, _ = setting
    network = published(lm.config)
    assert network.num_layers == 1 and network.taps == (lm.config.num_layers - 1,)
    drafter = CTCDrafter(network, TREES["transform"])
    result = run(lm, params, drafter, drafter.init_params(jax.random.key(0)), prompts, lengths, NEW)
    np.testing.assert_array_equal(result.tokens, plain)


def test_training_pass_equals_decoding_pass(setting):
    """The frames of an anchor in training are those of the decoder at that position.

    Anchors of one row do not see each other nor what lies at or after them.
    """
    lm, params, _, _, _, truth = setting
    drafter = CTCDrafter(ctc_config(lm.config, 2, FRAMES, taps=(0, 1)), TREES["prefix"])
    draft_params = drafter.init_params(jax.random.key(4))
    tokens = jnp.asarray(truth[:2, :14])
    anchors = jnp.asarray([[0, 3, 9], [5, 6, 12]], jnp.int32)
    full = jnp.full((2,), 14, jnp.int32)
    _, taps, _ = lm.hidden(params, tokens, full, drafter.taps)
    embedded = params["embedding"][tokens]
    apply = drafter.network.apply
    places = jnp.tile(jnp.arange(14, dtype=jnp.int32)[None], (2, 1))
    text = (taps, embedded, anchors, jnp.ones_like(places), places)
    trained = apply({"params": draft_params}, *text, method="anchor_hidden")
    for row in range(2):
        for a in range(3):
            n = int(anchors[row, a])
            if n == 0:
                continue
            # What lies at the anchor itself is another thing here.
            widths = ((0, 0), (0, 1), (0, 0))
            cut = tuple(jnp.pad(t[row : row + 1, :n], widths, constant_values=7) for t in taps)
            one = apply(
                {"params": draft_params},
                cut,
                embedded[row : row + 1, : n + 1],
                anchors[row : row + 1, a : a + 1],
                jnp.ones((1, n + 1), jnp.int32),
                places[:1, : n + 1],
                method="anchor_hidden",
            )
            np.testing.assert_allclose(trained[row, a], one[0, 0], rtol=2e-5, atol=2e-5)


def test_decoder_reads_what_was_trained(setting):
    """Frames after a prompt, by the decoder's own state, are those of an anchor at its last token.

    A token that follows one place late in the context would change them.
    """
    lm, params, _, _, _, truth = setting
    drafter = CTCDrafter(ctc_config(lm.config, 2, FRAMES, taps=(0, 1)), TREES["prefix"])
    # Larger than fresh ones, so that what a draft sees changes it by far more than rounding.
    fresh = drafter.init_params(jax.random.key(4))
    draft_params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, fresh)
    tokens = jnp.asarray(truth[:2, :10])
    lengths = jnp.asarray([10, 7], jnp.int32)
    loop, request = Loop(lm, drafter, Greedy(), 4), make_request(2, 4)
    state = start(loop, params, draft_params, tokens, lengths, request)
    seen = DraftContext(params, state.tokens, state.length, state.cache, request)
    decoded = drafter._log_probs(draft_params, state.drafter, seen)
    taps = lm.hidden(params, tokens, lengths, drafter.taps)[1]

    def trained(tokens):
        given = taps, params["embedding"][tokens], lengths[:, None] - 1, params
        return drafter.network.apply({"params": draft_params}, *given)[:, 0]

    np.testing.assert_allclose(decoded, trained(tokens), rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(decoded - trained(jnp.roll(tokens, 1, axis=1)))).max() > 1e-2


def test_few_anchors_at_a_time_change_nothing(setting):
    """Frames and gradients are those of all anchors at once, also where the last part is short."""
    lm, params, _, _, _, truth = setting
    config = ctc_config(lm.config, 1, 3, taps=(0, 1))
    draft_params = CTCDrafter(config, TREES["prefix"]).init_params(jax.random.key(4))
    tokens = jnp.asarray(truth[:2, :14])
    anchors = jnp.asarray([[0, 3, 9, 10, 12], [5, 6, 7, 8, 12]], jnp.int32)
    taps = lm.hidden(params, tokens, jnp.full((2,), 14, jnp.int32), config.taps)[1]
    embedded = params["embedding"][tokens]
    places = jnp.tile(jnp.arange(14, dtype=jnp.int32)[None], (2, 1))
    text = (taps, embedded, anchors, (places > 4).astype(jnp.int32), places)

    def run_with(at_a_time):
        network = CTCNetwork(config, attention_chunk=at_a_time)

        def total(p):
            hidden = network.apply({"params": p}, *text, method="anchor_hidden")
            return jnp.sum(jnp.sin(hidden)), hidden

        (_, hidden), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(draft_params)
        return hidden, grads

    (hidden, grads), (other, other_grads) = run_with(5), run_with(2)
    np.testing.assert_allclose(other, hidden, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        scale = float(jnp.max(jnp.abs(grad))) or 1.0
        np.testing.assert_allclose(other_grads[name], grad, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_blank_is_its_own_class(setting):
    """Frame laws have V+1 classes that sum to one; raising the blank bias moves all else down."""
    lm, params, *_ = setting
    drafter = CTCDrafter(ctc_config(lm.config, 1, FRAMES), TREES["prefix"])
    draft_params = drafter.init_params(jax.random.key(4))
    hidden = jax.random.normal(jax.random.key(1), (2, FRAMES, lm.config.width))

    def law(p):
        return drafter.network.apply({"params": p}, hidden, params, method="log_probs")

    low, high = law(draft_params), law(draft_params | {"blank_bias": jnp.float32(3.0)})
    assert low.shape == (2, FRAMES, VOCAB + 1)
    np.testing.assert_allclose(jnp.exp(low).sum(-1), 1.0, rtol=1e-5)
    assert (high[..., VOCAB] > low[..., VOCAB]).all()
    assert (high[..., :VOCAB] < low[..., :VOCAB]).all()
