"""The loop: speculative output equals plain greedy decoding, whatever the draft is."""

import jax
import numpy as np
import pytest

from ctc_spec_jax.decode import NoDraft
from ctc_spec_jax.types import NO_TOKEN, OUT_OF_BUDGET, STOPPED
from tests.helpers import OracleTree, ragged_prompts, reference_greedy, run, tiny_target

NEW = 24


@pytest.fixture(scope="module")
def setting():
    """Target, prompts of unequal lengths, and the slow reference's text of every row."""
    lm, params = tiny_target()
    prompts, lengths = ragged_prompts(1, (5, 9, 1, 7))
    texts = [
        reference_greedy(lm, params, row[:n], NEW) for row, n in zip(prompts, lengths, strict=True)
    ]
    truth = np.zeros((len(prompts), prompts.shape[1] + NEW + 8), np.int32)
    for row, (prompt, n, text) in enumerate(zip(prompts, lengths, texts, strict=True)):
        truth[row, :n] = prompt[:n]
        truth[row, n : n + NEW] = text
    return lm, params, prompts, lengths, np.asarray(texts), truth


def test_reference_text_varies(setting):
    """A target that repeats itself would hide position and cache errors."""
    texts = setting[4]
    assert all(len(set(row.tolist())) >= 5 for row in texts)


def test_plain_decoding_equals_reference(setting):
    lm, params, prompts, lengths, texts, _ = setting
    result = run(lm, params, NoDraft(), (), prompts, lengths, NEW)
    np.testing.assert_array_equal(result.tokens, texts)
    np.testing.assert_array_equal(result.stats.rounds, [NEW] * 4)
    assert (np.asarray(result.finish) == OUT_OF_BUDGET).all()


@pytest.mark.parametrize("quality", [0.0, 0.5, 0.9, 1.0])
def test_trees_of_any_quality_equal_reference(setting, quality):
    lm, params, prompts, lengths, texts, truth = setting
    result = run(lm, params, OracleTree(quality=quality), truth, prompts, lengths, NEW)
    np.testing.assert_array_equal(result.tokens, texts)
    rounds, emitted = np.asarray(result.stats.rounds), np.asarray(result.stats.emitted)
    np.testing.assert_array_equal(emitted.sum(1), [NEW] * 4)
    assert ((emitted > 0).sum(1) == rounds).all()
    if quality >= 0.9:
        assert (rounds < NEW).all()


def test_stops_and_budgets_per_row(setting):
    """A stop inside an accepted block cuts it; the budget cuts the rest; row 3 emits nothing."""
    lm, params, prompts, lengths, texts, truth = setting
    budget = np.asarray([NEW, 5, NEW, 0], np.int32)
    stops = np.full((4, 2), NO_TOKEN, np.int32)
    stops[0] = [texts[0][7], texts[0][11]]
    result = run(lm, params, OracleTree(quality=1.0), truth, prompts, lengths, NEW, stops, budget)
    first = min(texts[0].tolist().index(stop) for stop in stops[0])
    expected = [first + 1, 5, NEW, 0]
    np.testing.assert_array_equal(result.lengths, expected)
    np.testing.assert_array_equal(
        result.finish, [STOPPED, OUT_OF_BUDGET, OUT_OF_BUDGET, OUT_OF_BUDGET]
    )
    np.testing.assert_array_equal(np.asarray(result.stats.emitted).sum(1), expected)
    for row, length in enumerate(expected):
        np.testing.assert_array_equal(result.tokens[row, :length], texts[row][:length])
        assert (np.asarray(result.tokens)[row, length:] == 0).all()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rows_do_not_depend_on_the_batch(setting, batch):
    lm, params, prompts, lengths, texts, truth = setting
    rows = slice(0, batch)
    result = run(
        lm, params, OracleTree(quality=0.7), truth[rows], prompts[rows], lengths[rows], NEW
    )
    np.testing.assert_array_equal(result.tokens, texts[rows])


def test_second_call_compiles_nothing(setting):
    from tests.helpers import jitted_decode

    lm, params, prompts, lengths, _, truth = setting
    run(lm, params, OracleTree(), truth, prompts, lengths, NEW)
    before = jitted_decode._cache_size()
    run(lm, params, OracleTree(), truth, prompts[::-1], lengths[::-1], NEW)
    assert jitted_decode._cache_size() == before


def test_disable_jit_gives_the_same(setting):
    lm, params, prompts, lengths, texts, truth = setting
    with jax.disable_jit():
        result = run(lm, params, OracleTree(2, 5), truth[:2], prompts[:2], lengths[:2], 2)
    np.testing.assert_array_equal(result.tokens, texts[:2, :2])
