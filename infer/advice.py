"""Which tree size pays on this device: what a round costs against the tokens that it keeps.

Rounds that keep L tokens (the accepted length, the target's own token included) and take C plain
steps decode L / C times as fast as plain decoding; prefills are left out. C is measured for every
size and batch on the prompts themselves, L for every size by decoding them: how much a tree loses
when it shrinks is a matter of the method. L does not depend on the batch, whose rows are decoded
each on its own.

Shape letters: B batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ctc_spec_jax.cli import with_drafts
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.generation import Generation
from infer.intervals import Interval, speedup
from infer.prompts import Prompt, choose_prompts, columns
from infer.rounds import in_turns, round_timer
from train.data import before_loop

SIZES = (2, 4, 8, 16, 32, 64)
"""Tree sizes to choose from."""
PROMPTS = 8
"""Prompts that a curve is measured on."""
NEW_TOKENS = 64
"""Tokens of an answer that a curve is measured on."""

Curve = Mapping[int, Sequence[Sequence[int]]]
"""Tree size -> prompts -> tokens that each round kept."""

_AUTO = "auto"
_LOOPS = 0.4
_ENOUGH = 0.99
_CAPACITY = 256
"""Tokens that timed rounds have room for: the cache is as large for every tree size."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What rounds of trees of ``nodes`` nodes, root included, promise.

    ``depth`` is the smallest that has 99 % of the accepted length. ``plain_steps`` is the cost of
    a round. The interval of ``speedup`` is over prompts; the cost is taken as it is.
    """

    nodes: int
    depth: int
    accepted_length: float
    plain_steps: float
    speedup: Interval


@dataclasses.dataclass(frozen=True)
class Advice:
    """The best size for a batch; 1 node, depth 0 and speedup 1 say that drafting does not pay."""

    batch: int
    nodes: int
    depth: int
    speedup: Interval
    sizes: tuple[Size, ...]


def recommend(costs: Mapping[int, float], curve: Curve, batch: int = 1) -> Advice:
    """The size with the largest expected speedup, the smaller of equal ones; plain if none gains.

    Args:
      costs: tree size -> cost of a round in plain steps, at this batch.
      curve: of the same sizes, see ``acceptance_curve``.
      batch: B, for the record.

    Raises:
      InputError: other sizes in one than in the other, a cost that is no positive number, or a
        size without rounds.
    """
    if not curve or set(costs) != set(curve):
        raise InputError(f"costs: expected those of sizes {sorted(curve)}, found {sorted(costs)}")
    sizes = tuple(_size(nodes, costs[nodes], curve[nodes]) for nodes in sorted(curve))
    best = _best(sizes)
    if best.speedup.value <= 1:
        return Advice(batch, 1, 0, Interval(1.0, 1.0, 1.0), sizes)
    return Advice(batch, best.nodes, best.depth, best.speedup, sizes)


def _best(sizes: Sequence[Size]) -> Size:
    # Nine digits: rounding may part ratios that are equal, and the first of equal ones is smaller.
    return max(sizes, key=lambda size: round(size.speedup.value, 9))


def _size(nodes: int, cost: float, prompts: Sequence[Sequence[int]]) -> Size:
    if not (math.isfinite(cost) and cost > 0):
        raise InputError(f"costs: expected positive numbers, found {cost} for {nodes} nodes")
    prompts = [rounds for rounds in prompts if len(rounds)]
    if not prompts:
        raise InputError(f"curve: expected at least one round of {nodes} nodes, found none")
    tokens = np.asarray([sum(rounds) for rounds in prompts], np.float64)
    steps = cost * np.asarray([len(rounds) for rounds in prompts])
    times = np.stack([steps, tokens], axis=-1)[:, None]  # a plain step gives one token
    gain = speedup(np.stack([tokens, tokens], axis=-1), times)
    kept = np.concatenate([np.asarray(rounds) for rounds in prompts])
    return Size(nodes, _depth(kept), float(kept.mean()), cost, gain)


def _depth(kept: np.ndarray) -> int:
    """The smallest depth d >= 1 for which rounds of at most d + 1 tokens keep enough of them."""
    depths = range(1, max(2, int(kept.max())))
    return next(d for d in depths if np.minimum(kept, d + 1).sum() >= _ENOUGH * kept.sum())


def candidates(
    sized: Callable[[int], Engine], sizes: Sequence[int] | None = None
) -> dict[int, Engine]:
    """Engines by tree size, one of each drafter: a size that changes nothing is left out.

    Args:
      sized: the engine with drafts of so many nodes.
      sizes: None for those of ``SIZES`` that the method knows.

    Raises:
      InputError: what ``sized`` raises, or engines that draft nothing.
    """
    found: dict[int, Engine] = {}
    problem = InputError("--tree-nodes: expected --drafter or --method beside it, found neither")
    for nodes in sorted(set(sizes or SIZES)):
        try:
            engine = sized(nodes)
        except InputError as error:
            if sizes:
                raise
            problem = error
            continue
        known = {one.drafter for one in found.values()}
        if engine.drafter.num_nodes > 1 and engine.drafter not in known:
            # The parameters are those of one folder; several copies might not fit the memory.
            first = next(iter(found.values()), engine)
            found[nodes] = dataclasses.replace(engine, draft_params=first.draft_params)
    if not found:
        raise problem
    return found


def acceptance_curve(
    engines: Mapping[int, Engine], prompts: Sequence[Prompt], new_tokens: int = NEW_TOKENS
) -> dict[int, list[list[int]]]:
    """Tokens kept by every round of every prompt, by tree size; see ``Curve``.

    Rounds count that begin before an answer has ``new_tokens`` tokens, or begins to loop. They
    are decoded to their ends, so that the budget cuts none of them.

    Args:
      engines: by tree size.
      prompts: decoded as one batch with their own options; row i has seed i.
      new_tokens: fewer where the target's positions leave no room.
    """
    curve = {}
    for nodes, engine in tqdm(engines.items(), unit=" tree sizes", leave=False):
        deepest = engine.drafter.max_depth + 1
        budget = min(new_tokens + deepest, _room(engine, prompts))
        fields = {**columns(prompts), "max_new_tokens": budget}
        contents = [prompt.content for prompt in prompts]
        answers = engine.generate(contents, seed=list(range(len(prompts))), **fields)
        curve[nodes] = [_rounds(answer, budget - deepest) for answer in answers]
    return curve


def _rounds(answer: Generation, new_tokens: int) -> list[int]:
    emitted = np.asarray(answer.emitted, np.int64)
    begins = np.cumsum(emitted) - emitted
    last = min(new_tokens, before_loop(answer.tokens, _LOOPS))
    return emitted[begins < max(1, last)].tolist()


def _room(engine: Engine, prompts: Sequence[Prompt]) -> int:
    """Tokens that every prompt may be continued by."""
    lengths = engine.encode([prompt.content for prompt in prompts])[1]
    return int(engine.tokenizer.model_max_length - max(lengths))


def round_costs(
    engines: Mapping[int, Engine], prompts: Sequence[Prompt], batch: int, repeats: int
) -> dict[int, float]:
    """Cost of a round in plain steps by tree size; all sizes and the plain step take turns.

    Args:
      engines: by tree size, of one target.
      prompts: with their options; the rows of the batch are these in turns.
      batch: B.
      repeats: turns.
    """
    rows = [prompts[index % len(prompts)] for index in range(batch)]
    endless = {"ignore_eos": True, "stop_strings": None, "stop_token_ids": None}
    plain = next(iter(engines.values())).plain()
    room = min(_CAPACITY, _room(plain, rows))
    fields: dict[str, Any] = {**columns(rows), **endless, "max_new_tokens": room}
    contents = [row.content for row in rows]
    timers = {}
    for nodes, engine in tqdm({1: plain, **engines}.items(), unit=" tree sizes", leave=False):
        timers[nodes] = round_timer(engine, batch, fields, contents)
    seconds = in_turns(timers, repeats)
    return {nodes: seconds[nodes] / seconds[1] for nodes in engines}


def advise(
    engines: Mapping[int, Engine],
    prompts: Sequence[Prompt],
    batches: Sequence[int],
    repeats: int = 5,
    new_tokens: int = NEW_TOKENS,
) -> Iterator[Advice]:
    """Advice for one batch size after another; the curve is measured once.

    Args:
      engines: of ``candidates``.
      prompts: to measure on.
      batches: values of B.
      repeats: turns of every program that is timed.
      new_tokens: see ``acceptance_curve``.
    """
    curve = acceptance_curve(engines, prompts, new_tokens)
    for batch in tqdm(batches, unit=" batch sizes", leave=False):
        yield recommend(round_costs(engines, prompts, batch, repeats), curve, batch)


def tree_sizes(texts: Sequence[str | int]) -> list[int] | None:
    """Values of ``--tree-nodes``; None for ``auto``.

    Raises:
      InputError: something else, or a size below 2.
    """
    if list(texts) == [_AUTO]:
        return None
    for text in texts:
        if not str(text).removeprefix("-").isdecimal():
            raise InputError(f"--tree-nodes: expected whole numbers or {_AUTO}, found {text!r}")
    sizes = [int(text) for text in texts]
    if min(sizes) < 2:
        raise InputError(f"--tree-nodes: expected at least 2, found {min(sizes)}")
    return sizes


def held_out(engine: Engine, fields: Mapping[str, Any], count: int = PROMPTS) -> list[Prompt]:
    """Prompts to measure on where there are none; ``fields`` are options of all of them."""
    return choose_prompts(engine, None, count, {**fields, "max_new_tokens": 1})[0]


def choose_size(
    engine: Engine, arguments: argparse.Namespace, prompts: Sequence[Prompt], batch: int
) -> int:
    """The size that ``--tree-nodes auto`` stands for, 1 for plain decoding; says why in one line.

    Args:
      engine: of the target.
      arguments: with the flags of ``cli.add_method``.
      prompts: the first ``PROMPTS`` of them are measured.
      batch: B.

    Raises:
      InputError: flags that do not fit, or name no way to draft.
    """
    engines = candidates(lambda nodes: with_drafts(engine, arguments, nodes))
    advice = next(advise(engines, prompts[:PROMPTS], [batch]))
    print(f"--tree-nodes {_AUTO}: {sentence(advice)}", file=sys.stderr)
    return advice.nodes


def sentence(advice: Advice) -> str:
    """The advice in one line."""
    best = _best(advice.sizes)
    gain = best.speedup
    why = (
        f"{gain.value:.2f} times as fast as plain decoding (95 % {gain.low:.2f} to "
        f"{gain.high:.2f}), {best.accepted_length:.2f} tokens a round of {best.plain_steps:.2f} "
        "plain steps"
    )
    if advice.nodes == 1:
        return f"batch {advice.batch}: do not speculate; {best.nodes} nodes, the best, were {why}"
    doubt = ", not certain" if gain.low <= 1 else ""
    return f"batch {advice.batch}: {best.nodes} nodes, depth {best.depth}{doubt}; expected {why}"


def table(advice: Advice) -> str:
    """The figures of one batch size as aligned text; a star marks the size that is recommended."""
    names = ("batch", "nodes", "depth", "accepted", "plain steps", "speedup", "95 %")
    lines = ["".join(f"{name:>14}" for name in names)]
    for size in advice.sizes:
        gain = size.speedup
        row = (
            *(str(advice.batch), str(size.nodes), str(size.depth)),
            *(f"{size.accepted_length:.2f}", f"{size.plain_steps:.2f}", f"{gain.value:.2f}"),
            f"{gain.low:.2f} - {gain.high:.2f}",
        )
        mark = " *" if size.nodes == advice.nodes else ""
        lines.append("".join(f"{x:>14}" for x in row) + mark)
    return "\n".join(lines)
