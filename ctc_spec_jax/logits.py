"""Logits processing: the one function that makes the target's law at every node of a draft.

Verification tests against this law and draws the target's own token from it. Order, sentinels and
edge cases are those of ``transformers`` ``generate``: bias of tokens and phrases, repetition
penalty, (presence and frequency penalties, which it lacks, as in the OpenAI API,) minimum of new
tokens, temperature, top-k, top-p, min-p. A node's law depends on its own prefix: on the committed
tokens and the node's ancestors.

Every filter keeps the tokens above a threshold. It is found among the largest few logits or, where
they do not reach so far, by bisection over the bits of all: exact, without sorting a vocabulary.

Shape letters: B batch, N tree nodes, M max depth, V vocabulary, Y phrases, W phrase length,
S cache slots.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax import categorical
from ctc_spec_jax.types import (
    NO_TOKEN,
    ROOT,
    DecodeState,
    DraftTree,
    KnownTokens,
    Law,
    Request,
    Sampling,
    pytree,
)

_CANDIDATES = 64
"""Largest logits that are sorted; filters that need more fall back to bisection."""


@pytree
class Prefixes:
    """What comes before the next token at every node."""

    line: jax.Array  # int32 [B, N, M], the node and its ancestors below the root; NO_TOKEN past it
    recent: jax.Array | None  # int32 [B, N, W-1], last known tokens, newest last; NO_TOKEN before
    num_new: jax.Array  # int32 [B, N], new tokens up to the node, its own included


@dataclasses.dataclass(frozen=True)
class NodeLaws:
    """Laws of a draft's nodes, processed when they are asked for; see ``types.Laws``.

    A walk visits few nodes of a tree, and the filters cost more than everything else in it.
    """

    logits: jax.Array  # float [B, N, V], of the target
    request: Request
    known: KnownTokens
    before: Prefixes

    @property
    def greedy(self) -> jax.Array | None:
        """bool [B], rows that take the arg-max; None: all of them."""
        temperature = self.request.sampling.temperature
        return None if temperature is None else temperature <= 0

    def everywhere(self) -> Law:
        """The law after every node."""
        return process_logits(self.logits, self.request, self.known, self.before)

    def at(self, nodes) -> Law:
        """The laws after ``nodes`` int32 [B, K]."""
        logits = jnp.take_along_axis(self.logits, nodes[..., None], axis=1)
        before = jax.tree.map(lambda rows: _take(rows, nodes), self.before)
        return process_logits(logits, self.request, self.known, before)


def _take(rows, nodes):
    """``rows`` [B, N, ...] at ``nodes`` [B, K]: [B, K, ...]."""
    index = nodes.reshape(*nodes.shape, *(1,) * (rows.ndim - 2))
    return jnp.take_along_axis(rows, index, axis=1)


def prefixes(state: DecodeState, request: Request, tree: DraftTree, lineage) -> Prefixes:
    """Prefixes of the nodes of a draft.

    Args:
      state: the carry before the round.
      request: decides how far back ``recent`` reaches.
      tree: the draft.
      lineage: int32 [B, M+1, N], see ``topology.lineage``.
    """
    batch, levels, _ = lineage.shape
    tokens = jnp.take_along_axis(tree.tokens, lineage.reshape(batch, -1), axis=1)
    tokens = jnp.where(lineage == ROOT, NO_TOKEN, tokens.reshape(lineage.shape))
    line = jnp.swapaxes(tokens[:, : levels - 1], 1, 2)
    depth = jnp.sum(lineage != ROOT, axis=1, dtype=jnp.int32)
    first_new = state.length + 1 - state.prompt_length
    recent, phrases = None, request.sampling.phrases
    if phrases is not None:
        back = jnp.arange(phrases.shape[2] - 2, -1, -1, dtype=jnp.int32)[None, None]  # W-2 .. 0
        position = (state.length[:, None] + depth)[..., None] - back  # [B, N, W-1]
        known = jnp.take_along_axis(state.tokens[:, None], jnp.maximum(position, 0), axis=2)
        known = jnp.where(position >= 0, known, NO_TOKEN)
        index = jnp.broadcast_to(jnp.minimum(back, levels - 1), known.shape)
        drafted = jnp.take_along_axis(jnp.swapaxes(tokens, 1, 2), index, axis=2)
        recent = jnp.where(back < depth[..., None], drafted, known)
    return Prefixes(line, recent, first_new[:, None] + depth)


def process_logits(logits, request: Request, known: KnownTokens, before: Prefixes) -> Law:
    """The law of the next token after every node.

    Args:
      logits: float [B, N, V] of the target; statistics in float32 or wider.
      request: of every row.
      known: tokens of the committed prefix and the root.
      before: prefixes of the nodes.
    """
    sampling = request.sampling
    if jnp.finfo(logits.dtype).bits < 32:
        logits = logits.astype(jnp.float32)
    logits = _add_bias(logits, sampling, before)
    logits = _penalise(logits, sampling, known, before)
    if sampling.min_new_tokens is not None:
        early = before.num_new < sampling.min_new_tokens[:, None]
        ends = _members(request.stops, logits.shape[-1])
        logits = jnp.where(early[..., None] & ends[:, None], -jnp.inf, logits)
    if sampling.temperature is None:
        return Law(logits)
    greedy = sampling.temperature <= 0
    return Law(_warp(logits, sampling, greedy), greedy)


def token_log_probs(law: Law):
    """Log-probabilities [B, N, V] of a law.

    A greedy row's law has no temperature and no filters, so these are not just 0 and -inf.
    """
    return jax.nn.log_softmax(law.logits, axis=-1)


def _add_bias(logits, sampling: Sampling, before: Prefixes):
    if sampling.bias is not None:
        logits = logits + sampling.bias[:, None].astype(logits.dtype)
    if sampling.phrases is None or sampling.phrase_bias is None or before.recent is None:
        return logits
    start, last = sampling.phrases[:, None, :, :-1], sampling.phrases[:, None, :, -1]
    same = (start == before.recent[:, :, None]) | (start == NO_TOKEN)
    applies = jnp.all(same, axis=-1) & (last != NO_TOKEN)  # [B, N, Y]
    bias = jnp.where(applies, sampling.phrase_bias[:, None], 0.0).astype(logits.dtype)
    rows, nodes = np.ogrid[: logits.shape[0], : logits.shape[1]]
    last = jnp.broadcast_to(jnp.maximum(last, 0), bias.shape)
    return logits.at[rows[..., None], nodes[..., None], last].add(bias)


def _penalise(logits, sampling: Sampling, known: KnownTokens, before: Prefixes):
    repetition = _column(sampling.repetition_penalty, logits)
    presence = _column(sampling.presence_penalty, logits)
    frequency = _column(sampling.frequency_penalty, logits)
    if repetition is None and presence is None and frequency is None:
        return logits
    # Compared, not scattered: one fused pass over the logits whatever M is.
    count = jnp.zeros(logits.shape, jnp.int32)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    for level in range(before.line.shape[2]):
        count += (before.line[:, :, level, None] == index).astype(jnp.int32)
    if repetition is not None and known.seen is not None:
        seen = known.seen[:, None] | (count > 0)
        scaled = jnp.where(logits < 0, logits * repetition, logits / repetition)
        logits = jnp.where(seen, scaled, logits)
    if known.generated is not None:
        count = (known.generated[:, None] + count).astype(logits.dtype)
        if frequency is not None:
            logits = logits - frequency * count
        if presence is not None:
            logits = logits - presence * (count > 0).astype(logits.dtype)
    return logits


def _warp(logits, sampling: Sampling, greedy):
    """Temperature and filters; greedy rows are left alone."""
    temperature = jnp.where(greedy[:, None, None], 1.0, _column(sampling.temperature, logits))
    logits = logits / temperature
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return logits
    # A branch reads its operands from memory. Left among what makes the logits, XLA may make them
    # twice, for a threshold and where they are compared with it, and round them differently (a
    # product and a sum in one): the very token that a filter ends at would be ruled out.
    filtered = functools.partial(_filtered, sampling=sampling, greedy=greedy)
    return jax.lax.cond(jnp.all(greedy), lambda x: x, filtered, logits)


def _filtered(logits, sampling: Sampling, greedy):
    """Minus infinity for tokens below the thresholds of top-k, top-p and min-p."""
    best = jax.lax.top_k(logits, min(_CANDIDATES, logits.shape[-1]))[0]
    # Not the first of the best: XLA on CPU would sort the vocabulary for a slice of a top-k.
    ordered, peak = _ordered(logits), jnp.max(logits, axis=-1, keepdims=True)
    threshold = jnp.full(peak.shape, jnp.iinfo(ordered.dtype).min, ordered.dtype)
    if sampling.top_k is not None:
        off = (greedy | (sampling.top_k <= 0))[:, None, None]
        k = jnp.minimum(sampling.top_k, logits.shape[-1])[:, None, None]
        threshold = jnp.where(off, threshold, _top_k_threshold(ordered, best, off, k))
    if sampling.top_p is not None:
        off = (greedy | (sampling.top_p >= 1))[:, None, None]
        weights = jnp.where(ordered >= threshold, jnp.exp(logits - peak), 0.0)
        share = _column(sampling.top_p, logits)
        inside = _ordered(best) >= threshold
        masses = jnp.where(inside, jnp.exp(best - peak), 0.0)
        nucleus = _top_p_threshold(ordered, weights, best, masses, off, share)
        threshold = jnp.where(off, threshold, jnp.maximum(threshold, nucleus))
    keep = ordered >= threshold
    if sampling.min_p is not None:
        off = (greedy | (sampling.min_p <= 0))[:, None, None]
        floor = jnp.log(jnp.where(off, 1.0, _column(sampling.min_p, logits)))
        keep &= (logits >= peak + floor) | off
    return jnp.where(keep, logits, -jnp.inf)


def _top_k_threshold(ordered, best, off, k):
    """The k-th largest of ``ordered`` [.., V]; ``best`` [.., C] holds the largest, falling."""
    known = best.shape[-1]
    place = jnp.broadcast_to(jnp.clip(k - 1, 0, known - 1), (*best.shape[:-1], 1))
    found = _ordered(jnp.take_along_axis(best, place, axis=-1))
    closed = off | (k <= known)

    def enough(at):
        return jnp.sum(ordered >= at, axis=-1, keepdims=True, dtype=jnp.int32) >= k

    # Fewer than C tokens lie above the last of the best, and C < k where that one is asked for.
    low = jnp.where(closed, found, jnp.iinfo(ordered.dtype).min)
    return _largest(enough, low, found + 1)


def _top_p_threshold(ordered, weights, best, masses, off, share):
    """The smallest value whose larger ones weigh less than ``share`` of all; equal ones stay.

    ``weights`` [.., V] of all tokens and ``masses`` [.., C] of the best are 0 where top-k removed
    a token.
    """
    budget = share * jnp.sum(weights, axis=-1, keepdims=True)
    candidates = _ordered(best)
    ends = categorical.running_sum(masses)
    place = jnp.sum(ends - masses < budget, axis=-1, keepdims=True, dtype=jnp.int32) - 1
    found = jnp.take_along_axis(candidates, jnp.maximum(place, 0), axis=-1)
    closed = off | (ends[..., -1:] >= budget) | (best.shape[-1] == ordered.shape[-1])

    def full(at):
        above = jnp.where(ordered > at, weights, 0.0)
        return jnp.sum(above, axis=-1, keepdims=True) >= budget

    low = jnp.where(closed, found - 1, jnp.iinfo(ordered.dtype).min)
    return _largest(full, low, found) + 1


def _ordered(x):
    """Integers in the order of the floats x."""
    kind, bits = (jnp.int64, 63) if x.dtype == jnp.float64 else (jnp.int32, 31)
    raw = jax.lax.bitcast_convert_type(x, kind)
    ordered = raw ^ ((raw >> bits) & jnp.iinfo(kind).max)
    # -0 equals +0. Not x + 0, which XLA takes for x.
    return jnp.where(ordered == -1, 0, ordered)


def _largest(holds, low, high):
    """Largest integer for which ``holds``, a falling predicate, true of low and false of high.

    Bisection; none where high is low + 1, which is where the candidates gave the answer.
    """

    def unsettled(bounds):
        low, high = bounds
        return jnp.any(low < high - 1)

    def halve(bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    return jax.lax.while_loop(unsettled, halve, (low, high))[0]


def _members(ids, vocab_size: int):
    """bool [B, V]: which tokens are among ``ids`` int32 [B, X], padded with NO_TOKEN."""
    rows = np.arange(ids.shape[0])[:, None]
    # A negative index would count from the end; one past the end is dropped.
    index = jnp.where(ids < 0, vocab_size, ids)
    return jnp.zeros((ids.shape[0], vocab_size), bool).at[rows, index].set(True, mode="drop")


def _column(values, like) -> Any:
    """[B] -> [B, 1, 1] in the dtype of ``like``."""
    return None if values is None else values[:, None, None].astype(like.dtype)
