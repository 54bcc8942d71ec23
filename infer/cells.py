"""One cell of a benchmark: a method at one temperature and batch size against plain decoding.

Shape letters: G groups of questions, R repeats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ctc_spec_jax import xla
from ctc_spec_jax.engine import Engine, Generation
from ctc_spec_jax.models.decoder import DecoderLM, output_logits
from ctc_spec_jax.types import Params
from infer.generate import LOOPS, Answerer, summarise
from infer.intervals import find_differences, ratio, speedup
from infer.questions import Batch, Turn, batches
from train.loops import fresh_rounds


@dataclasses.dataclass(frozen=True)
class Run:
    """What a method and the baseline did with one group of questions.

    ``tokens`` of the two, and ``seconds`` [R, 2], are those of all rows of the batches; the turns
    and the answers leave repeated rows out.
    """

    turns: list[Turn]
    answers: list[Generation]
    baseline: list[Generation]
    tokens: tuple[int, int]
    seconds: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Figures of one category; speeds only where its questions have batches of their own."""

    turns: int
    tokens: int
    rounds: int
    accepted_length: float
    accepted_length_without_bonus: float
    tokens_per_second: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """Measurement of one cell; names as in the JSON file.

    ``accepted_length`` is in tokens per target pass, the target's own (bonus) token included, over
    every answer up to where it begins to loop; ``_without_loops`` is over the answers that never
    loop and ``_with_loops`` over all of them whole, as tokens, rounds and times are.
    ``accepted_by_position[d]`` is the share of rounds in which the drafted token of depth d + 1
    was kept. ``identical`` compares greedy tokens with plain decoding in batches of the same size
    and is None where answers are drawn. ``drafter_cost`` is the time of drafting and of the
    drafter's own bookkeeping in plain steps, ``time_split`` that of the parts of a round in
    seconds; see ``split``, and ``work`` the bytes and operations of two of them. Intervals are 95 %
    ones; see ``intervals``: that of the accepted length is over questions.
    """

    method: str
    temperature: float
    batch: int
    tree_nodes: int
    questions: int
    turns: int
    tokens: int
    rounds: int
    accepted_length: float
    accepted_length_low: float
    accepted_length_high: float
    accepted_length_without_bonus: float
    accepted_length_without_loops: float | None
    accepted_length_with_loops: float
    looping_share: float
    accepted_by_position: list[float]
    tokens_per_second: float
    baseline_tokens_per_second: float
    speedup: float
    speedup_low: float
    speedup_high: float
    identical: bool | None
    differences: list[dict[str, Any]]
    categories: dict[str, dict[str, Any]]
    drafter_cost: float | None = None
    time_split: dict[str, float] | None = None
    work: dict[str, dict[str, float]] | None = None


def measure(
    engines: tuple[Answerer, Answerer],
    talks: Sequence[Sequence[Turn]],
    batch: int,
    repeats: int,
    options: Mapping[str, Any],
    seed: int = 0,
) -> list[Run]:
    """Answers and times of a method and its baseline, which take turns on every batch.

    Who goes first changes with every repeat. A first call of each shape, which compiles, is not
    counted.

    Args:
      engines: the method, the baseline.
      talks: turns of every question.
      batch: rows decoded together.
      repeats: timed runs R of every batch.
      options: of all rows, as ``Engine.generate`` takes them.
      seed: of the first row; every other row has the next one.
    """
    runs, warm = [], set()
    groups = list(batches(talks, batch))
    for index, group in enumerate(tqdm(groups, unit=" groups", leave=False)):
        seeds = list(range(seed + index * batch, seed + (index + 1) * batch))
        times = np.zeros((repeats, 2))
        run = Run([], [], [], (0, 0), [])
        for one in group:
            found, seconds = _take_turns(
                engines, one, repeats, index, {**options, "seed": seeds}, warm
            )
            times += seconds
            run.turns.extend(one.turns[: one.counted])
            run.answers.extend(found[0][: one.counted])
            run.baseline.extend(found[1][: one.counted])
            counts = [sum(len(answer.tokens) for answer in answers) for answers in found]
            tokens = (run.tokens[0] + counts[0], run.tokens[1] + counts[1])
            run = dataclasses.replace(run, tokens=tokens)
        runs.append(dataclasses.replace(run, seconds=times.tolist()))
    return runs


def _take_turns(
    engines, batch: Batch, repeats: int, first: int, options: dict[str, Any], warm: set[int]
):
    """Answers of both, and their seconds [R, 2]; the one that begins changes from ``first`` on."""
    prompts = [turn.tokens for turn in batch.turns]
    shape = xla.bucket(max(len(prompt) for prompt in prompts))
    if shape not in warm:
        for engine in engines:
            engine.generate(prompts, **options)
        warm.add(shape)
    seconds = np.zeros((repeats, 2))
    answers: list[list[Generation]] = [[], []]
    for repeat in range(repeats):
        for side in (0, 1) if (first + repeat) % 2 else (1, 0):
            answers[side] = engines[side].generate(prompts, **options)
            seconds[repeat, side] = answers[side][0].seconds
    return answers, seconds


def cell(
    method: str,
    temperature: float,
    batch: int,
    tree_nodes: int,
    runs: Sequence[Run],
    logits: Callable[[list[int]], np.ndarray],
) -> Cell:
    """The figures of what ``measure`` found; ``logits`` are the target's after a text."""
    answers = [answer for run in runs for answer in run.answers]
    baseline = [answer for run in runs for answer in run.baseline]
    turns = [turn for run in runs for turn in run.turns]
    accepted = _accepted(answers)
    rounds = accepted["rounds"]
    deepest = max((len(answer.accepted) for answer in answers), default=0)
    kept = np.zeros(deepest)
    for answer in answers:
        kept[: len(answer.accepted)] += answer.accepted
    found = [] if temperature else _differences(turns, answers, baseline, logits)
    names = dict.fromkeys(turn.category for turn in turns)
    return Cell(
        method=method,
        temperature=temperature,
        batch=batch,
        tree_nodes=tree_nodes,
        questions=len({(turn.category, turn.question_id) for turn in turns}),
        turns=len(turns),
        accepted_by_position=(kept / rounds).tolist(),
        identical=None if temperature else not found,
        differences=found,
        categories={name: dataclasses.asdict(_part(name, runs, batch)) for name in names},
        **accepted,
        **_accepted_interval(turns, answers),
        **_speeds(runs),
    )


_ACCEPTED = (
    *("tokens", "rounds", "accepted_length", "accepted_length_without_bonus"),
    *("accepted_length_without_loops", "accepted_length_with_loops", "looping_share"),
)


def _accepted(answers: list[Generation]) -> dict[str, Any]:
    seconds = [answer.seconds for answer in answers]
    result = summarise(0, answers, seconds, [], [])
    return {name: getattr(result, name) for name in _ACCEPTED}


def _accepted_interval(turns: list[Turn], answers: list[Generation]) -> dict[str, float]:
    counts: dict[Any, np.ndarray] = {}  # tokens and rounds of every question
    for turn, answer in zip(turns, answers, strict=True):
        fresh = np.asarray(fresh_rounds(answer.tokens, answer.emitted, LOOPS))
        question = turn.category, turn.question_id
        counts[question] = counts.get(question, 0) + fresh
    tokens, rounds = np.stack([*counts.values()]).T
    interval = ratio(tokens, rounds)
    return {"accepted_length_low": interval.low, "accepted_length_high": interval.high}


def _speeds(runs: Sequence[Run]) -> dict[str, Any]:
    tokens = np.asarray([run.tokens for run in runs])
    seconds = np.asarray([run.seconds for run in runs])  # [G, R, 2]
    mine, plain = tokens.sum(0) / np.median(seconds, axis=1).sum(0)
    interval = speedup(tokens, seconds)
    return {
        "tokens_per_second": float(mine),
        "baseline_tokens_per_second": float(plain),
        "speedup": interval.value,
        "speedup_low": interval.low,
        "speedup_high": interval.high,
    }


def _part(category: str, runs: Sequence[Run], batch: int) -> Part:
    answers = [
        answer
        for run in runs
        for turn, answer in zip(run.turns, run.answers, strict=True)
        if turn.category == category
    ]
    accepted = _accepted(answers)
    speeds: dict[str, Any] = {}
    if batch == 1:
        speeds = _speeds([run for run in runs if run.turns[0].category == category])
        del speeds["baseline_tokens_per_second"]
    return Part(len(answers), **{name: accepted[name] for name in _ACCEPTED[:4]}, **speeds)


def _differences(turns, answers, baseline, logits) -> list[dict[str, Any]]:
    prompts = [turn.tokens for turn in turns]
    ours, theirs = ([answer.tokens for answer in side] for side in (answers, baseline))
    return [
        {
            "question_id": turns[found.prompt].question_id,
            "turn": turns[found.prompt].turn,
            "position": found.position,
            "logit_gap": found.logit_gap,
        }
        for found in find_differences(prompts, ours, theirs, logits)
    ]


def target_logits(engine: Engine) -> Callable[[list[int]], np.ndarray]:
    """A function that gives the target's logits, float32 [V], after a text of token ids."""

    def logits(tokens: list[int]) -> np.ndarray:
        padded = np.zeros((1, xla.bucket(len(tokens))), np.int32)
        padded[0, : len(tokens)] = tokens
        length = np.asarray([len(tokens)], np.int32)
        return np.asarray(xla.jitted(_last_logits)(engine.lm, engine.params, padded, length))

    return logits


def _last_logits(lm: DecoderLM, params: Params, tokens, lengths) -> jax.Array:
    hidden, _, _ = lm.hidden(params, tokens, lengths)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return output_logits(params, last)[0, 0].astype(jnp.float32)
