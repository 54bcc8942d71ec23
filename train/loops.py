"""Answers that repeat themselves: how much of one does, and where it begins to."""

from __future__ import annotations

import numpy as np


def loop_share(tokens, group: int = 8) -> float:
    """Share of the 8-token groups of an answer that occurred earlier in it; above 0.4 it loops."""
    repeats = _repeats(tokens, group)
    return float(np.mean(repeats)) if len(repeats) else 0.0


def before_loop(tokens, max_loop: float, group: int = 8) -> int:
    """Length of the longest beginning of an answer whose ``loop_share`` is at most ``max_loop``."""
    repeats = _repeats(tokens, group)
    shares = np.cumsum(repeats) / np.arange(1, len(repeats) + 1)
    fine = np.flatnonzero(shares <= max_loop)
    return min(len(tokens), group - 1) if not len(fine) else int(fine[-1]) + group


def fresh_rounds(tokens, emitted, loops: float) -> tuple[int, int]:
    """Tokens and rounds of the rounds that began before the answer began to loop."""
    emitted = np.asarray(emitted)
    begins = np.cumsum(emitted) - emitted
    rounds = int(np.sum(begins < max(1, before_loop(tokens, loops))))
    return int(emitted[:rounds].sum()), rounds


def _repeats(tokens, group: int) -> np.ndarray:
    """Whether the group that starts at each place occurred earlier; bool, one per group."""
    tokens = np.asarray(tokens)
    if len(tokens) < group:
        return np.zeros((0,), bool)
    groups = np.lib.stride_tricks.sliding_window_view(tokens, group)
    _, first, inverse = np.unique(groups, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)] < np.arange(len(groups))
