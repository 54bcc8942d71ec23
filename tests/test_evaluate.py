"""The measure of a drafter: counts of the real decoder, their mean, interval and parts."""

import jax
import numpy as np
import pytest

from ctc_spec_jax import sharding
from ctc_spec_jax.decode import Loop, NoDraft
from ctc_spec_jax.verify import Greedy
from tests.helpers import OracleTree, reference_greedy, tiny_target
from train import evaluate
from train.loops import before_loop


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


def test_counts_are_those_of_the_decoder(mesh):
    """Against one full forward per token: ends at stops, rounds of an oracle drafter."""
    lm, params = tiny_target()
    tokens = [[3, 1, 4], [5, 9, 2, 6, 5], [7]]
    texts = [reference_greedy(lm, params, np.asarray(row, np.int32), 12) for row in tokens]
    stop = texts[0][5]
    ends = [text.index(stop) + 1 if stop in text else 12 for text in texts]
    prompts = evaluate.Prompts(tokens, ["a", "b", "a"])
    guesses = np.zeros((3, 40), np.int32)
    for row, (prompt, text) in enumerate(zip(tokens, texts, strict=True)):
        guesses[row, : len(prompt) + 12] = [*prompt, *text]
    plain = evaluate.measure(
        Loop(lm, NoDraft(), Greedy(), 12), params, (), prompts, [stop], mesh, loops=1.0
    )
    np.testing.assert_array_equal(plain.tokens, ends)
    np.testing.assert_array_equal(plain.rounds, ends)
    drafter = OracleTree(quality=0.9)
    drafted = evaluate.measure(
        Loop(lm, drafter, Greedy(), 12), params, guesses, prompts, [stop], mesh, loops=1.0
    )
    np.testing.assert_array_equal(drafted.tokens, ends)
    assert (drafted.rounds < ends).all()
    kept = drafted.accepted.sum(1) + drafted.rounds  # a stop may be a drafted token
    np.testing.assert_array_equal(np.minimum(kept, ends), ends)
    assert (drafted.accepted <= drafted.drafted).all()


def test_rounds_before_a_loop():
    tokens = [*range(20), *([1, 2] * 20)]
    emitted = [3, 4, 5, 1, 2, 5, 10, 10, 10, 10]
    limit = before_loop(tokens, 0.4)
    assert 20 < limit < 60
    begins = np.cumsum([0, *emitted[:-1]])
    rounds = int((begins < limit).sum())
    assert evaluate.fresh_rounds(tokens, emitted, 0.4) == (sum(emitted[:rounds]), rounds)
    assert evaluate.fresh_rounds(tokens, emitted, 1.0) == (60, 10)
    assert evaluate.fresh_rounds([5], [1], 0.4) == (1, 1)


def drafts(draw, prompts: int) -> evaluate.Drafts:
    rounds = draw.integers(5, 30, prompts)
    lengths = rounds * draw.uniform(1.5, 3.5, prompts)
    accepted = np.stack([rounds // 2, rounds // 4], axis=1)
    several = 3 * np.stack([rounds] * 2, axis=1)  # siblings
    return evaluate.Drafts(lengths.astype(int), rounds, accepted, several, rounds)


def test_summary():
    found = evaluate.summary(
        evaluate.Drafts(
            np.asarray([10, 30, 8]),
            np.asarray([5, 10, 8]),
            np.asarray([[3, 1], [9, 6], [0, 0]]),
            np.asarray([[15, 5], [30, 10], [24, 1]]),
            np.asarray([5, 12, 8]),
        ),
        ["code", "chat", "code"],
    )
    assert found["accepted_length"] == pytest.approx(48 / 23)
    assert found["accepted_length/code"] == pytest.approx(18 / 13)
    assert found["accepted_length/chat"] == pytest.approx(3.0)
    assert found["accepted_at_1"] == pytest.approx(12 / 25)
    assert found["accepted_at_2"] == pytest.approx(7 / 25)
    assert found["accepted_prompts"] == 3
    assert found["accepted_length_low"] <= found["accepted_length"]
    assert found["accepted_length"] <= found["accepted_length_high"]
    alone = evaluate.summary(drafts(np.random.default_rng(0), 4), ["", "", "", ""])
    assert not any("/" in name for name in alone)


def test_interval_covers_the_truth():
    """200 samples of 40 prompts: 95 % intervals miss the truth 10 times on average.

    A ratio of means of bounded numbers; 25 misses or more happen with probability below 1e-4.
    """
    draw = np.random.default_rng(0)
    everything = drafts(draw, 20000)
    truth = everything.tokens.sum() / everything.rounds.sum()
    misses = 0
    for _ in range(200):
        found = evaluate.summary(drafts(draw, 40), [""] * 40, resamples=400)
        inside = found["accepted_length_low"] <= truth <= found["accepted_length_high"]
        misses += not inside
    assert 1 <= misses < 25
