"""Figures of a benchmark: bootstrap intervals, first differences of two answers.

Shape letters: G groups of questions, R repeats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

_AT_A_TIME = 100
"""Resamples that are in memory together."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def ratio(over, under, resamples: int = 2000, seed: int = 0) -> Interval:
    """Ratio of two sums over groups, which are drawn with replacement, by bootstrap percentiles.

    Args:
      over: [G], such as tokens.
      under: [G], such as rounds.
      resamples: draws.
      seed: of the draws.
    """
    over, under = np.asarray(over), np.asarray(under)
    pick = np.random.default_rng(seed).integers(0, len(over), (resamples, len(over)))
    low, high = np.quantile(over[pick].sum(1) / under[pick].sum(1), (0.025, 0.975))
    return Interval(float(over.sum() / under.sum()), float(low), float(high))


def speedup(tokens, seconds, resamples: int = 2000, seed: int = 0) -> Interval:
    """Ratio of the tokens per second of two decoders, by bootstrap percentiles.

    Groups are drawn with replacement, and so are the repeats of every group, one repeat of both
    decoders together because they ran one after the other. A group's time is the median of its
    repeats.

    Args:
      tokens: [G, 2], of the method and of the baseline.
      seconds: [G, R, 2], of the two.
      resamples: draws.
      seed: of the draws.
    """
    tokens, seconds = np.asarray(tokens, np.float64), np.asarray(seconds, np.float64)
    draw = np.random.default_rng(seed)
    parts = np.array_split(np.arange(resamples), -(-resamples // _AT_A_TIME))
    ratios = np.concatenate([_resampled(draw, len(part), tokens, seconds) for part in parts])
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Interval(float(_ratio(tokens, seconds)), float(low), float(high))


def _resampled(draw: np.random.Generator, count: int, tokens, seconds) -> np.ndarray:
    groups, repeats, _ = seconds.shape
    group = draw.integers(0, groups, (count, groups))
    repeat = draw.integers(0, repeats, (count, groups, repeats))
    return _ratio(tokens[group], seconds[group[..., None], repeat])


def _ratio(tokens: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Of tokens [.., G, 2] and seconds [.., G, R, 2]."""
    speeds = tokens.sum(-2) / np.median(seconds, axis=-2).sum(-2)
    return speeds[..., 0] / speeds[..., 1]


@dataclasses.dataclass(frozen=True)
class Difference:
    """First token in which an answer differs from the one that it is compared with.

    ``logit_gap`` is how much higher the target scores the token of ``theirs`` than that of
    ``ours``, after the text that both agree on; None where one of the answers ends.
    """

    prompt: int
    position: int
    logit_gap: float | None


def find_differences(
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    logits: Callable[[list[int]], np.ndarray],
) -> list[Difference]:
    """The first difference of every prompt whose two answers differ.

    Args:
      prompts: token ids.
      ours: answers, token ids.
      theirs: answers to the same prompts.
      logits: of the target, [V] after a text of token ids.
    """
    found = []
    for index, (prompt, mine, other) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if list(mine) == list(other):
            continue
        shared = min(len(mine), len(other))
        position = next((i for i in range(shared) if mine[i] != other[i]), shared)
        gap = None
        if position < shared:
            scores = logits([*prompt, *other[:position]])
            gap = float(scores[other[position]] - scores[mine[position]])
        found.append(Difference(index, position, gap))
    return found
