"""Distillation of a target into any drafter: divergences between their laws of the next token.

At every position p is the target's law and q the drafter's, both the softmax of logits divided by
the same temperature. The target is data: no gradient flows into it. Only q changes in training, so
decoding stays lossless.

=====================  =================================================================
``forward_kl``         sum p log(p/q); covers what the target may say
``reverse_kl``         sum q log(q/p); keeps to what the target is sure of
``jensen_shannon``     b KL(p||m) + (1-b) KL(q||m) with m = b p + (1-b) q, b = ``beta``;
                       near 0 it is b times the forward KL, near 1 (1-b) times the reverse
``total_variation``    sum |p - q| / 2; 1 minus it is the acceptance of a token
``top_k``              forward KL between p and q with all tokens but the target's k most
                       probable ones merged into one class; never above the forward KL,
                       and 0 also where q differs from p among the merged ones alone
``hard_label``         -log q of the target's most probable token; for the tokens of a
                       text see ``losses.cross_entropy``
=====================  =================================================================

All are in nats but the total variation, which has no unit. Means are over the masked-in positions
of all rows together, not first within a row. Nothing is multiplied by the squared temperature.
The total variation has a kink where p = q: its gradient does not fade on the way there.

A logit of -inf (at most ``IMPOSSIBLE``) makes a token impossible. Where a divergence would then be
infinite, the logarithm of that probability counts as ``LOG_ZERO``, so that values and gradients
stay finite; impossible logits have no gradient.

Shape letters: V vocabulary, D width, B rows; ``...`` are any leading axes, the positions.
Arithmetic is in float32, or in float64 where the inputs are.

References:
  Zhou et al. 2024, DistillSpec, arXiv 2310.08461, section 4; Liu et al. 2024, Online Speculative
  Decoding, arXiv 2310.07177. The release of the latter calls 0.9 KL(p||q) + 0.1 KL(q||p)
  "jsd", which is not a Jensen-Shannon divergence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ctc_spec_jax.chunked_head import map_chunks, product, widen
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.losses import IMPOSSIBLE, masked_mean

LOG_ZERO = -100.0
"""Logarithm of an impossible token's probability: in float32 its exponential vanishes beside 1."""


class _Law(NamedTuple):
    """A law over V tokens, [..., V]: logarithms, never -inf, and probabilities, 0 if impossible."""

    log: Array
    prob: Array


def divergence(
    name: str,
    target_logits: Array,
    draft_logits: Array,
    *,
    temperature: float | Array = 1.0,
    beta: float = 0.5,
    k: int = 16,
) -> Array:
    """Divergence of the drafter's law from the target's at every position, float32 [...].

    Args:
      name: one of ``DIVERGENCES``.
      target_logits, draft_logits: [..., V], any float dtype.
      temperature: of both laws; number above 0 or scalar array.
      beta: between 0 and 1, weight of the target in ``jensen_shannon``.
      k: 1 or more, tokens that ``top_k`` keeps apart; V and more is the forward KL.

    Raises:
      InputError: another name, shapes that differ, a number out of range.
    """
    _check({name: 1.0}, temperature, beta, k)
    if target_logits.shape != draft_logits.shape:
        found = f"{target_logits.shape} and {draft_logits.shape}"
        raise InputError(f"logits: expected [..., V] of target and drafter alike, found {found}")
    return _RULES[name](*_laws(target_logits, draft_logits, temperature), beta, k)


def distillation_loss(
    weights: Mapping[str, float | Array],
    target_logits: Array,
    draft_logits: Array,
    mask: Array,
    *,
    temperature: float | Array = 1.0,
    beta: float = 0.5,
    k: int = 16,
) -> tuple[Array, dict[str, Array]]:
    """Weighted sum of divergences, each a mean over the positions where ``mask`` is true.

    Mask out prompts and what follows an end of text. 0 if the mask is false everywhere.

    Args:
      weights: by name of ``DIVERGENCES``, numbers or traced scalars; a weight of 0 only reports.
      target_logits, draft_logits, temperature, beta, k: as for ``divergence``.
      mask: bool [...].

    Returns:
      The loss, float32 [], and the mean of each named divergence, unweighted.

    Raises:
      InputError: as ``divergence``, or a mask of another shape.
    """
    _check(weights, temperature, beta, k)
    _check_mask(mask, target_logits)
    options: Any = {"temperature": temperature, "beta": beta, "k": k}
    terms = {name: divergence(name, target_logits, draft_logits, **options) for name in weights}
    return _combine(weights, terms, mask)


def chunked_distillation(
    target_hidden: Array,
    target_head: Array,
    draft_hidden: Array,
    draft_head: Array,
    mask: Array,
    weights: Mapping[str, float | Array],
    chunk: int,
    *,
    temperature: float | Array = 1.0,
    beta: float = 0.5,
    k: int = 16,
) -> tuple[Array, dict[str, Array]]:
    """``distillation_loss`` of ``hidden @ head`` without the [..., V] logits of either model.

    The logits of a chunk are computed again in the backward pass. Matrix products run in the dtype
    of the hidden states and accumulate in float32. Differentiable in ``draft_hidden`` and
    ``draft_head``; the [D, V] gradient of the latter is computed only if asked for.

    Args:
      target_hidden, draft_hidden: [..., D], each with the width of its own model.
      target_head, draft_head: [D, V].
      mask: bool [...].
      weights, temperature, beta, k: as for ``distillation_loss``.
      chunk: positions whose logits exist at a time, see ``chunked_head.chunked_frame_log_probs``.

    Raises:
      InputError: as ``distillation_loss``, or a chunk below 1.
    """
    _check(weights, temperature, beta, k)
    _check_mask(mask, target_hidden)
    _check_mask(mask, draft_hidden)
    if chunk < 1:
        raise InputError(f"chunk: expected at least 1, found {chunk}")
    # Narrowed in each chunk, so that the gradient of the head adds up over chunks in float32.
    target_head, draft_head = lax.stop_gradient(target_head), widen(draft_head)
    options: Any = {"temperature": temperature, "beta": beta, "k": k}

    @jax.checkpoint
    def per_position(part):
        target, draft = part
        target_logits = product("ad,dv->av", target, target_head.astype(target.dtype))
        draft_logits = product("ad,dv->av", draft, draft_head.astype(draft.dtype))
        return {name: divergence(name, target_logits, draft_logits, **options) for name in weights}

    hidden = lax.stop_gradient(target_hidden), draft_hidden
    flat = tuple(x.reshape(-1, x.shape[-1]) for x in hidden)
    return _combine(weights, map_chunks(per_position, chunk, flat), mask.reshape(-1))


def acceptance_rate(
    target_logits: Array, draft_logits: Array, mask: Array, *, temperature: float | Array = 1.0
) -> Array:
    """Mean of ``sum_v min(p, q)`` where ``mask`` is true, float32 [], 0..1.

    The probability that ``verify_sampled.Rejection`` keeps a token drawn from q. What counts in
    decoding is its mean over text that the drafter itself wrote. Arguments as ``divergence``.
    """
    _check_mask(mask, target_logits)
    p, q = _laws(target_logits, draft_logits, temperature)
    return masked_mean(jnp.sum(jnp.minimum(p.prob, q.prob), axis=-1), mask)


def top_k_targets(
    target_logits: Array, k: int, *, temperature: float | Array = 1.0
) -> tuple[Array, Array]:
    """The k most probable tokens and their log-probabilities: what is worth storing of a target.

    Returns ``tokens`` int32 and ``log_probs`` float32, both [..., min(k, V)], in falling order.
    """
    return _top_k(_law(target_logits, temperature), k)


def top_k_divergence(
    tokens: Array, log_probs: Array, draft_logits: Array, *, temperature: float | Array = 1.0
) -> Array:
    """Divergence ``top_k`` from stored ``top_k_targets`` of the same temperature, float32 [...].

    Over k + 1 classes, the k tokens and the rest R, whose mass in both laws is what the k tokens
    leave: ``sum_k p log(p/q) + p(R) log(p(R)/q(R))``. How p spreads over R is not looked at.
    """
    return _top_k_kl(tokens, lax.stop_gradient(log_probs), _law(draft_logits, temperature))


def mix_on_policy(keys: Array, fixed: Any, sampled: Any, share: float | Array) -> tuple[Any, Array]:
    """Rows to learn from: with probability ``share`` the drafter's own, else those of a fixed set.

    No gradient flows through sampling: rows are data, and what is returned is constant.

    Args:
      keys: [B], one per row, consumed.
      fixed: pytree of [B, ...], rows that the target or a person wrote.
      sampled: the same tree, shapes and dtypes; rows that the drafter drew.
      share: 0..1, number, [] or [B].

    Returns:
      The mixed pytree, and which rows are the drafter's, bool [B].
    """
    share = jnp.broadcast_to(jnp.asarray(share, jnp.float32), keys.shape)
    on_policy = jax.vmap(jax.random.bernoulli)(keys, share)

    def pick(own, other):
        chosen = on_policy.reshape(-1, *[1] * (own.ndim - 1))
        return lax.stop_gradient(jnp.where(chosen, own, other))

    return jax.tree.map(pick, sampled, fixed), on_policy


def _laws(target_logits, draft_logits, temperature):
    """p without, q with gradients."""
    return _law(lax.stop_gradient(target_logits), temperature), _law(draft_logits, temperature)


def _law(logits, temperature):
    logits = widen(logits)
    logits = logits / jnp.asarray(temperature, logits.dtype)
    possible = logits > IMPOSSIBLE
    # Not -inf: the gradient of what is replaced below would be NaN.
    log = jax.nn.log_softmax(jnp.where(possible, logits, IMPOSSIBLE))
    return _Law(jnp.where(possible, log, LOG_ZERO), jnp.where(possible, jnp.exp(log), 0.0))


def _kl(p: _Law, q_log):
    return jnp.sum(p.prob * (p.log - q_log), axis=-1)


def _jensen_shannon(p: _Law, q: _Law, beta, k):
    del k
    middle = jnp.logaddexp(math.log(beta) + p.log, math.log1p(-beta) + q.log)
    return beta * _kl(p, middle) + (1 - beta) * _kl(q, middle)


def _top_k(p: _Law, k):
    log_probs, tokens = lax.top_k(p.log, min(k, p.log.shape[-1]))
    return tokens, log_probs


def _top_k_kl(tokens, log_probs, q: _Law):
    top = jnp.take_along_axis(q.log, tokens, axis=-1)
    divergence = jnp.sum(jnp.exp(log_probs) * (log_probs - top), axis=-1)
    if tokens.shape[-1] == q.log.shape[-1]:
        return divergence  # no rest
    others = jnp.put_along_axis(q.log, tokens, IMPOSSIBLE, axis=-1, inplace=False)
    q_rest = jax.nn.logsumexp(others, axis=-1)
    p_rest = jnp.maximum(1.0 - jnp.sum(jnp.exp(log_probs), axis=-1), 0.0)
    p_rest_log = jnp.log(jnp.where(p_rest > 0, p_rest, 1.0))
    return divergence + p_rest * (p_rest_log - q_rest)


def _hard_label(p: _Law, q: _Law, beta, k):
    del beta, k
    best = jnp.argmax(p.log, axis=-1)[..., None]
    return -jnp.take_along_axis(q.log, best, axis=-1)[..., 0]


_RULES = {
    "forward_kl": lambda p, q, beta, k: _kl(p, q.log),
    "reverse_kl": lambda p, q, beta, k: _kl(q, p.log),
    "jensen_shannon": _jensen_shannon,
    "total_variation": lambda p, q, beta, k: 0.5 * jnp.sum(jnp.abs(p.prob - q.prob), axis=-1),
    "top_k": lambda p, q, beta, k: _top_k_kl(*_top_k(p, k), q),
    "hard_label": _hard_label,
}

DIVERGENCES = tuple(_RULES)
"""Names that ``divergence`` and weights of the losses take."""


def _combine(weights, terms, mask):
    values = {name: masked_mean(term, mask) for name, term in terms.items()}
    weighted = [jnp.asarray(weights[name], x.dtype) * x for name, x in values.items()]
    return functools.reduce(jnp.add, weighted), values


def _check(weights, temperature, beta, k):
    if not weights or set(weights) - set(DIVERGENCES):
        found = ", ".join(weights) or "none"
        raise InputError(f"divergences: expected some of {', '.join(DIVERGENCES)}, found {found}")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise InputError(f"temperature: expected a number above 0, found {temperature}")
    if not 0 < beta < 1:
        raise InputError(f"beta: expected a number between 0 and 1, found {beta}")
    if k < 1:
        raise InputError(f"k: expected at least 1, found {k}")


def _check_mask(mask, array):
    if mask.shape != array.shape[:-1]:
        expected = f"{array.shape[:-1]} as in logits or hidden states"
        raise InputError(f"mask: expected shape {expected}, found {mask.shape}")
