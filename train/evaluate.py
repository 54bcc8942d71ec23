"""What a drafter is judged by while it is trained: the accepted length of the real decoder.

Shape letters: R prompts, M max depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ctc_spec_jax import sharding, xla
from ctc_spec_jax.decode import Loop, decode
from ctc_spec_jax.types import NO_TOKEN, Request, Sampling
from infer import intervals
from train.loops import fresh_rounds


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Held-out prompts: token ids of any lengths and what kind of text each one is."""

    tokens: Sequence[Sequence[int]]
    categories: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Drafts:
    """Counts per prompt. ``tokens`` and ``rounds`` are those before an answer begins to loop.

    ``accepted`` and ``drafted`` [R, M] are by depth, of all ``all_rounds`` of the answers.
    """

    tokens: np.ndarray  # [R]
    rounds: np.ndarray  # [R]
    accepted: np.ndarray  # [R, M]
    drafted: np.ndarray  # [R, M]
    all_rounds: np.ndarray  # [R]


def measure(
    loop: Loop, params, draft_params, prompts: Prompts, stops: Sequence[int], mesh: Mesh, loops=0.4
) -> Drafts:
    """Decode held-out prompts greedily with the real decoder; the same result on every host.

    Args:
      loop: its capacity is the budget of every row.
      params: of the target.
      draft_params: of the drafter, in the dtype to decode in.
      prompts: at least one.
      stops: token ids that end an answer; nothing past them is counted.
      mesh: the prompts are spread over it.
      loops: share of repeated 8-token groups from which on an answer is a loop.
    """
    result = _decode(loop, params, draft_params, prompts, stops, mesh)
    tokens, ends, stats = sharding.host_copy((result.tokens, result.lengths, result.stats))
    return _counts(tokens, ends, stats, loops)


def tries(
    loop: Loop,
    params,
    draft_params,
    prompts: Prompts,
    stops: Sequence[int],
    mesh: Mesh,
    temperature: float,
) -> tuple[dict[str, jax.Array], dict[str, float]]:
    """Decode held-out prompts with drafts that are drawn, and find where one was tried.

    Arguments as for ``measure``; ``temperature`` is above 0.

    Returns:
      The texts as a batch of training rows whose labels, ``trained``, are the tokens in whose place
      a drafted one was tried; and ``acceptance``, the share of them that were kept, with its
      standard error ``acceptance_error``.
    """
    result = _decode(loop, params, draft_params, prompts, stops, mesh, temperature)
    record = result.record
    parts = (result.tokens, result.lengths, record.from_draft, record.refused)
    answers, lengths, kept, refused = sharding.host_copy(parts)
    size = xla.bucket(max(len(row) for row in prompts.tokens)) + answers.shape[1]
    rows = {name: np.zeros((len(answers), size), np.int32) for name in ("tokens", "segments")}
    rows["trained"] = np.zeros((len(answers), size), bool)
    for row, prompt in enumerate(prompts.tokens):
        ends = len(prompt), len(prompt) + lengths[row]
        rows["tokens"][row, : ends[0]] = prompt
        rows["tokens"][row, slice(*ends)] = answers[row, : lengths[row]]
        rows["trained"][row, slice(*ends)] = (kept | refused)[row, : lengths[row]]
        rows["segments"][row, : ends[1]] = 1
    rows["positions"] = np.broadcast_to(np.arange(size, dtype=np.int32), rows["tokens"].shape)
    tried = max(1, int(rows["trained"].sum()))
    share = float(kept.sum()) / tried
    error = (share * (1 - share) / tried) ** 0.5
    placed = jax.device_put(rows, sharding.rows(mesh, rows))
    return placed, {"acceptance": share, "acceptance_error": error}


def _decode(loop: Loop, params, draft_params, prompts, stops, mesh: Mesh, temperature=None) -> Any:
    batch = len(prompts.tokens)
    width = xla.bucket(max(len(row) for row in prompts.tokens))
    tokens = np.zeros((batch, width), np.int32)
    for index, row in enumerate(prompts.tokens):
        tokens[index, : len(row)] = row
    ends = np.asarray([*stops] or [NO_TOKEN], np.int32)
    request = Request(
        max_new_tokens=np.full((batch,), loop.capacity, np.int32),
        stops=np.tile(ends[None], (batch, 1)),
        keys=jax.random.split(jax.random.key(0), batch),
    )
    if temperature is not None:
        sampling = Sampling(temperature=np.full((batch,), temperature, np.float32))
        request = dataclasses.replace(request, sampling=sampling)
    lengths = np.asarray([len(row) for row in prompts.tokens], np.int32)
    inputs = [jax.device_put(x, sharding.inputs(mesh, x)) for x in (tokens, lengths, request)]
    with jax.set_mesh(mesh):
        return xla.jitted(decode)(loop, params, draft_params, *inputs)


def _counts(tokens, lengths, stats, loops: float) -> Drafts:
    kept = [
        fresh_rounds(row[:n], emitted[:rounds], loops)
        for row, n, emitted, rounds in zip(
            tokens, lengths, stats.emitted, stats.rounds, strict=True
        )
    ]
    fresh, rounds = np.asarray(kept, np.int64).T
    return Drafts(fresh, rounds, stats.accepted, stats.drafted, stats.rounds)


def summary(drafts: Drafts, categories: Sequence[str], resamples: int = 2000) -> dict[str, Any]:
    """Mean accepted length with its 95 % interval, by category, and acceptance by depth.

    Returns:
      ``accepted_length`` (tokens per target pass, the target's own token included),
      ``accepted_length_low`` and ``_high`` (bootstrap over prompts, fixed seed),
      ``accepted_prompts`` (how many), ``accepted_length/<category>`` where there are several, and
      ``accepted_at_<d>``: the share of rounds in which the drafted token of depth d was kept.
    """
    tokens, rounds = drafts.tokens, drafts.rounds
    mean = intervals.ratio(tokens, rounds, resamples)
    found = {"accepted_length": mean.value}
    found |= {"accepted_length_low": mean.low, "accepted_length_high": mean.high}
    found["accepted_prompts"] = float(len(tokens))
    names = sorted(set(categories))
    for name in names if len(names) > 1 else ():
        mine = np.asarray([category == name for category in categories])
        found[f"accepted_length/{name}"] = float(tokens[mine].sum() / rounds[mine].sum())
    for depth, kept in enumerate(drafts.accepted.sum(0), 1):
        found[f"accepted_at_{depth}"] = float(kept / drafts.all_rounds.sum())
    return found
