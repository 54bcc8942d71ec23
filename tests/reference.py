"""Slow and obvious second implementations, one row and one position at a time, in NumPy."""

from __future__ import annotations

import numpy as np


def reference_scores(
    scores,
    prompt,
    generated,
    *,
    stops=(),
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    bias=None,
    phrases=(),
    min_new_tokens=0,
) -> np.ndarray:
    """Processed scores of the next token; what ``logits.process_logits`` does at one node.

    The law of the next token is their softmax; of a greedy row it is their arg-max. Options keep
    the order of ``transformers`` ``generate``; a default value turns an option off.

    Args:
      scores: float [V], raw logits of the target after the last known token.
      prompt: token ids of the prompt.
      generated: token ids after it, in order: committed ones, the pending one and, at a node of a
        draft, the path from below the root down to the node.
      stops: token ids that are ruled out before ``min_new_tokens``; a negative id is padding.
      temperature: 0 is greedy: no temperature and no filters.
      top_k: number of tokens kept; tokens that tie with the last of them stay. 0: off.
      top_p: a token stays if those strictly above it have less than this mass, after top-k and
        renormalised. Ties stay or go together, and the best token always stays. 1: off.
      min_p: a token stays if its probability is at least this fraction of the best one's.
      repetition_penalty: positive scores of tokens in prompt or generated are divided by it,
        negative ones multiplied.
      presence_penalty: taken off the scores of generated tokens.
      frequency_penalty: taken off once for every time that a token was generated.
      bias: {token id: value}, added.
      phrases: (token ids, value) pairs; the value is added to the last id where the others are
        the last known tokens. Minus infinity forbids the phrase.
      min_new_tokens: as long as fewer tokens were generated, ``stops`` are ruled out.

    Returns:
      float64 [V]; minus infinity where a token is ruled out.
    """
    scores = np.array(scores, np.float64)
    prompt, generated = [int(t) for t in prompt], [int(t) for t in generated]
    known = prompt + generated
    for token, value in (bias or {}).items():
        scores[token] += value
    for ids, value in phrases:
        *start, last = ids
        if known[len(known) - len(start) :] == start and len(start) <= len(known):
            scores[last] += value
    for token in set(known):
        if scores[token] < 0:
            scores[token] *= repetition_penalty
        else:
            scores[token] /= repetition_penalty
    for token in set(generated):
        scores[token] -= frequency_penalty * generated.count(token) + presence_penalty
    if len(generated) < min_new_tokens:
        scores[[token for token in stops if token >= 0]] = -np.inf
    if temperature == 0:
        return scores
    scores /= temperature
    if 0 < top_k < len(scores):
        scores[scores < np.sort(scores)[-top_k]] = -np.inf
    if top_p < 1:
        weights = _weights(scores)
        above = np.array([weights[scores > score].sum() for score in scores])
        scores[(above >= top_p * weights.sum()) & (scores < scores.max())] = -np.inf
    scores[_weights(scores) < min_p] = -np.inf
    return scores


def _weights(scores) -> np.ndarray:
    """Probabilities relative to the best one's."""
    return np.exp(scores - scores.max())
