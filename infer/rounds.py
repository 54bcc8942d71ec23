"""Times of rounds: programs that take turns, so that noise hits all alike.

Shape letters: B batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ctc_spec_jax import decode as loop_of
from ctc_spec_jax import options, xla
from ctc_spec_jax.engine import Engine, Prompts, seed_keys

ROUNDS = 16
"""Rounds of one timed call."""
PROMPT = 64
"""Tokens of a made-up prompt."""


def round_state(engine: Engine, batch: int, fields: dict[str, Any], prompts: Prompts | None = None):
    """Loop, both parameters, state after the prefill and request of a batch of prompts.

    Args:
      engine: target and drafter.
      batch: B.
      fields: of ``Options``; without ``max_new_tokens`` there is room for ``ROUNDS`` rounds.
      prompts: B of them; made-up ones if None.
    """
    new = fields.get("max_new_tokens", ROUNDS * (engine.drafter.max_depth + 1))
    rows = options.per_row(batch, {"ignore_eos": True, **fields, "max_new_tokens": new})
    draw = np.random.default_rng(0)
    made_up = draw.integers(1, engine.lm.vocab_size, (batch, PROMPT)).tolist()
    tokens, lengths = engine.encode(made_up if prompts is None else prompts, [new] * batch)
    loop, request = engine.loop(xla.bucket(new)), engine.request(rows, seed_keys(0, batch))
    params = (engine.params, engine.draft_params)
    return loop, params, xla.jitted(loop_of.start)(loop, *params, tokens, lengths, request), request


def round_timer(
    engine: Engine, batch: int, fields: dict[str, Any], prompts: Prompts | None = None
) -> Callable[[], float]:
    """A function that runs rounds of a batch from the same state and gives seconds per round.

    Arguments as in ``round_state``. There are ``ROUNDS`` rounds, or as many as ``max_new_tokens``
    have room for, so that no row is finished in one that is timed.
    """
    loop, params, state, request = round_state(engine, batch, fields, prompts)
    deepest = engine.drafter.max_depth + 1
    rounds = max(1, min(ROUNDS, fields.get("max_new_tokens", ROUNDS * deepest) // deepest))
    advance = xla.jitted(loop_of.advance)

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(advance(loop, *params, state, request, np.int32(rounds)))
        return (time.perf_counter() - began) / rounds

    run()  # compiles
    return run


def in_turns(timers: dict[Any, Callable[[], float]], repeats: int) -> dict[Any, float]:
    """Median seconds of every timer; they take turns, so that noise hits all alike."""
    found: dict[Any, list[float]] = {name: [] for name in timers}
    for _ in tqdm(range(repeats), unit=" turns", leave=False):
        for name, timer in timers.items():
            # A turn lasts a quarter of a second at least: one call of a small program would not.
            began = time.perf_counter()
            while True:
                found[name].append(timer())
                if time.perf_counter() - began > 0.25:
                    break
    return {name: statistics.median(times) for name, times in found.items()}
