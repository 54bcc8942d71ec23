"""Answers that loop, against a slow count."""

import numpy as np
import pytest

from train import loops


def test_loop_share():
    assert loops.loop_share(np.arange(100)) == 0.0
    assert loops.loop_share([1] * 8) == 0.0  # a single group
    # n tokens have n - 7 groups of 8, of which a text of period p has p different ones.
    for length, period in [(20, 1), (40, 3), (64, 16)]:
        groups = length - 7
        share = loops.loop_share(np.arange(length) % period)
        assert share == pytest.approx(1 - min(period, groups) / groups)
    # 23 groups lie in the first half, 7 across the border, and 23 repeat 2 in the second.
    halves = np.concatenate([np.arange(30), 100 + np.arange(30) % 2])
    assert loops.loop_share(halves) == pytest.approx(1 - (23 + 7 + 2) / 53)


@pytest.mark.parametrize("max_loop", [0.0, 0.2, 0.5, 1.0])
def test_before_loop_is_the_longest_beginning_that_does_not_loop(max_loop):
    draw = np.random.default_rng(1)
    for length in (0, 3, 7, 8, 9, 40, 60):
        # Repeating a short text and leaving it again raises and lowers the share.
        text = np.concatenate([draw.integers(0, 3, 12), np.arange(20), np.arange(20), np.ones(8)])
        tokens = text.astype(np.int32)[:length]
        fine = [n for n in range(length + 1) if slow_loop_share(tokens[:n]) <= max_loop]
        assert loops.before_loop(tokens, max_loop) == max(fine)
        assert loops.loop_share(tokens) == pytest.approx(slow_loop_share(tokens))


def slow_loop_share(tokens) -> float:
    groups = [tuple(tokens[i : i + 8].tolist()) for i in range(len(tokens) - 7)]
    return sum(group in groups[:i] for i, group in enumerate(groups)) / max(len(groups), 1)
