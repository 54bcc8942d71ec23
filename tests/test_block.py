"""The block drafter: its loss against sums by hand, its decoding against plain decoding."""

import jax
import numpy as np
import pytest

from ctc_spec_jax import recipes
from ctc_spec_jax.decode import NoDraft
from ctc_spec_jax.draft.training import Loss, Shape
from ctc_spec_jax.errors import InputError
from tests.helpers import ragged_prompts, run, tiny_target


@pytest.fixture(scope="module")
def setting():
    lm, params = tiny_target()
    recipe = recipes.find("block")
    network = recipe.network(lm.config, Shape(layers=1, frames=4, taps=(0, 1), mlp_width=24))
    drafter = recipe.drafter(network, 7, 3, "")
    draft_params = drafter.init_params(jax.random.key(0))
    return lm, params, drafter, jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, draft_params)


def test_loss_is_the_sum_by_hand(setting):
    """Three labels, four frames; rows with all, some and none of their labels."""
    lm, params, drafter, _ = setting
    draw = np.random.default_rng(0)
    hidden = draw.standard_normal((5, 4, 32)).astype(np.float32)
    labels = draw.integers(0, 17, (5, 3)).astype(np.int32)
    lengths = np.asarray([3, 1, 0, 2, 3], np.int32)
    weights = Loss(labels=3, decay=0.5, chunk=2)
    loss = recipes.find("block").loss(lm, drafter, weights, 1)
    value, metrics = jax.jit(loss.score)({}, params, hidden, labels, lengths)

    head = np.asarray(params["head"], np.float64)
    logits = hidden.astype(np.float64) @ head
    law = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    law -= logits.max(-1, keepdims=True)
    nats, right = np.zeros((5, 3)), np.zeros((5, 3))
    for row in range(5):
        for k in range(lengths[row]):
            nats[row, k] = -law[row, k, labels[row, k]]
            right[row, k] = law[row, k].argmax() == labels[row, k]
    at = nats.sum(0) / 4  # of the anchors that have a label
    np.testing.assert_allclose(metrics["loss_at"], at, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy_at"], right.sum(0) / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["prefix_at"], right.cumprod(1).sum(0) / 4, rtol=1e-6)
    np.testing.assert_allclose(value, (at * [4, 2, 1]).sum() / 7, rtol=1e-5)


def test_greedy_text_is_that_of_the_target(setting):
    lm, params, drafter, draft_params = setting
    prompts, lengths = ragged_prompts(1, (5, 9, 1, 7))
    plain = run(lm, params, NoDraft(), (), prompts, lengths, 16)
    drafted = run(lm, params, drafter, draft_params, prompts, lengths, 16)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    assert (np.asarray(drafted.stats.drafted)[:, 0] > 0).all()


def test_tree_names(setting):
    _, _, drafter, _ = setting
    with pytest.raises(InputError, match=r"^tree: expected product, found 'prefix'$"):
        recipes.find("block").drafter(drafter.config, 7, 3, "prefix")


@pytest.mark.parametrize(("preset", "sees_later"), [("marginal", True), ("causal", False)])
def test_which_frames_see_each_other(setting, preset, sees_later):
    """A change of the last frame's embedding reaches the others, or itself alone."""
    lm, params, _, _ = setting
    recipe = recipes.find("block")
    shape = Shape(preset=preset, layers=2, frames=4, taps=(0, 1), mlp_width=24)
    drafter = recipe.drafter(recipe.network(lm.config, shape), 7, 3, "")
    given = drafter.init_params(jax.random.key(1))
    other = given | {"frame_embedding": given["frame_embedding"].at[3].add(1.0)}
    tokens, lengths = ragged_prompts(1, (6, 9))
    taps = lm.hidden(params, tokens, lengths, (0, 1))[1]
    anchors = np.asarray([[2, 4], [3, 7]], np.int32)
    given_text = taps, params["embedding"][tokens], anchors, params
    run_network = jax.jit(lambda p: drafter.network.apply({"params": p}, *given_text))
    differs = np.abs(run_network(given) - run_network(other)).max((0, 1, 3)) > 1e-6
    assert differs.tolist() == [sees_later] * 3 + [True]


def test_presets_are_named(setting):
    with pytest.raises(InputError, match=r"expected 'marginal' or 'causal', found 'published'$"):
        recipes.find("block").network(setting[0].config, Shape(preset="published"))
