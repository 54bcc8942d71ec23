"""Training objectives of drafters and targets.

Shape letters: A anchors, F draft frames, K labels (the tokens after an anchor), V vocabulary,
D width; ``...`` are any leading axes, the same in all arguments of a call.

A CTC drafter gives every frame a law over V tokens and one blank, class V. Frames collapse to
text: merge adjacent repeats, then delete blanks. All objectives read only the log-probabilities
of the blank, [..., F], and of the labels, [..., F, K]; ``gather_frame_log_probs`` makes them from
logits, ``chunked_frame_log_probs`` from hidden states. Labels are right-padded and
``label_lengths`` says how many count. Arithmetic is in float32, or in float64 where the inputs are.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax

from ctc_spec_jax.chunked_head import chunked_frame_log_probs as chunked_frame_log_probs
from ctc_spec_jax.chunked_head import widen

IMPOSSIBLE = -1e30
"""Log-probability of what no alignment reaches. Finite, since inf - inf and 0 * inf are NaN; so
large that no sum of real log-probabilities comes near it."""

OBJECTIVES = ("prefix", "ctc", "expected_length")
"""Names that ``draft_loss`` takes weights for."""


def gather_frame_log_probs(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Log-probabilities of the blank and of the labels at every frame.

    One logsumexp per frame and no normalised copy of the logits. A logit of -inf gives -inf for
    its class and no NaN, in values or gradients.

    Args:
      logits: [..., F, V+1], any float dtype; the blank is the last class.
      labels: int [..., K], token ids below V; padding may be any number.

    Returns:
      ``blank [..., F]`` and ``label [..., F, K]``, float32, nats.
    """
    if logits.shape[:-2] != labels.shape[:-1]:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape}: leading axes differ")
    logits = widen(logits)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    index = jnp.clip(labels, 0, logits.shape[-1] - 2)[..., None, :]
    index = jnp.broadcast_to(index, (*normaliser.shape, labels.shape[-1]))
    label = jnp.take_along_axis(logits, index, axis=-1)
    return logits[..., -1] - normaliser, label - normaliser[..., None]


def ctc_log_prob(blank: Array, label: Array, labels: Array, label_lengths: Array) -> Array:
    """Log-probability that the frames collapse to exactly ``labels[:label_lengths]``.

    Args:
      blank: [..., F], log-probability of the blank.
      label: [..., F, K], log-probability of ``labels[..., k]`` at each frame.
      labels: int [..., K]; read only to see which neighbours are equal.
      label_lengths: int [...], 0..K.

    Returns:
      float32 [...]. ``IMPOSSIBLE``, with zero gradient, where no alignment exists: n tokens with
      r adjacent repeats need n + r frames, and finite log-probabilities there.

    References:
      Graves et al. 2006, Connectionist Temporal Classification, section 4.1; their 2K+1 states,
      where a blank belongs to the token before it.
    """
    return _at_length(_alignment_log_probs(blank, label, labels)[1], label_lengths)


def prefix_log_probs(
    blank: Array, label: Array, labels: Array, label_lengths: Array | None = None
) -> Array:
    """Log-probability that the collapsed frames begin with ``labels[:k]``, for k = 1..K.

    Args:
      blank, label, labels: as for ``ctc_log_prob``.
      label_lengths: int [...]; None means that no label is padding.

    Returns:
      float32 [..., K], non-increasing. ``IMPOSSIBLE``, with zero gradient, for padding and for
      prefixes without an alignment.

    References:
      Graves et al. 2006, Connectionist Temporal Classification, section 3.2 (prefix search).
    """
    prefix = _alignment_log_probs(blank, label, labels)[0]
    return prefix if label_lengths is None else _drop_padding(prefix, label_lengths)


def _alignment_log_probs(blank, label, labels, stay=None):
    """``prefix [..., K]`` and ``whole [..., K+1]``, the log-masses of all alignments.

    ``prefix[k-1]`` is the mass whose collapse begins with the first k labels, ``whole[k]`` the
    mass whose collapse is exactly those. Over the frames so far, ``in_label`` and ``in_blank``
    hold, for every k at once, the mass that spells k labels and ends in the last one, or after
    it in a blank; ``whole`` is their sum. An alignment enters a prefix once: entries are disjoint.
    """
    if label.shape != (*blank.shape, *labels.shape[-1:]) or blank.shape[:-1] != labels.shape[:-1]:
        got = f"{blank.shape}, {label.shape} and {labels.shape}"
        raise ValueError(f"expected blank [..., F], label [..., F, K], labels [..., K], got {got}")
    # Anchors go last: they fill the vector lanes, and the shift by one label moves whole rows.
    blank = jnp.maximum(widen(jnp.moveaxis(blank, -1, 0)), IMPOSSIBLE)[:, None]  # [F, 1, ...]
    label = jnp.maximum(widen(jnp.moveaxis(label, (-2, -1), (0, 1))), IMPOSSIBLE)  # [F, K, ...]
    if stay is None:
        stay = label
    else:
        stay = jnp.maximum(widen(jnp.moveaxis(stay, (-2, -1), (0, 1))), IMPOSSIBLE)
    labels = jnp.moveaxis(labels, -1, 0)
    repeat = jnp.concatenate([jnp.zeros_like(labels[:1], bool), labels[1:] == labels[:-1]])

    def step(state, frame):
        in_blank, in_label, whole = state  # [K+1, ...], [K, ...], [K+1, ...]
        frame_blank, frame_label, frame_stay = frame
        # A token equal to the last one is a new one only after a blank.
        enter = frame_label + jnp.where(repeat, in_blank[:-1], whole[:-1])
        in_blank = frame_blank + whole
        in_label = jnp.logaddexp(enter, frame_stay + in_label)
        whole = jnp.concatenate([in_blank[:1], jnp.logaddexp(in_blank[1:], in_label)])
        return (in_blank, in_label, whole), enter

    never = jnp.full_like(label[0], IMPOSSIBLE)
    start = jnp.concatenate([jnp.zeros_like(blank[0]), never])
    (_, _, whole), enter = lax.scan(step, (start, never, start), (blank, label, stay))
    prefix = jax.nn.logsumexp(enter, axis=0)
    return _floor(jnp.moveaxis(prefix, 0, -1)), _floor(jnp.moveaxis(whole, 0, -1))


def _floor(log_probs):
    # States without mass lie near multiples of IMPOSSIBLE. The constant stops the gradient here;
    # inside the recursion their weight next to a real state is exactly zero.
    return jnp.where(log_probs > 0.1 * IMPOSSIBLE, log_probs, IMPOSSIBLE)


def _at_length(whole, label_lengths):
    return jnp.take_along_axis(whole, label_lengths[..., None], axis=-1)[..., 0]


def _drop_padding(prefix, label_lengths):
    position = lax.broadcasted_iota(label_lengths.dtype, prefix.shape, prefix.ndim - 1)
    return jnp.where(position < label_lengths[..., None], prefix, IMPOSSIBLE)


def draft_loss(
    blank: Array,
    label: Array,
    labels: Array,
    label_lengths: Array,
    weights: Mapping[str, float | Array],
    prefix_weights: Array | None = None,
    stay: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Weighted combination of the three objectives from one recursion.

    Each is a mean over the valid anchors, those with a label. What has no alignment adds nothing
    and has no gradient, but its anchor counts: the denominator depends on the data alone.

    Args:
      blank, label, labels, label_lengths: as for ``ctc_log_prob``.
      weights: one for each of ``OBJECTIVES``, numbers or traced scalars; a missing name is 0.
        ``expected_length`` is maximised: it enters with a minus sign.
      prefix_weights: ``weights`` of ``prefix_loss``.
      stay: [..., F, K], log-probability of ``labels[..., k]`` at each frame where it is the last
        label already; ``label`` itself where frames do not know it.

    Returns:
      The loss, float32 [], and the value of each of ``OBJECTIVES``, unweighted; beside them, by
      position, ``loss_at`` [K] (the mean charge of the first k labels) and ``prefix_at`` [K] (the
      mean probability that a draft begins with them).
    """
    if unknown := set(weights) - set(OBJECTIVES):
        raise ValueError(f"weights must be among {OBJECTIVES}, got {sorted(unknown)}")
    prefix, whole = _alignment_log_probs(blank, label, labels, stay)
    prefix = _drop_padding(prefix, label_lengths)
    charges, valid = _charge(prefix), label_lengths > 0
    by_position = {"loss_at": charges, "prefix_at": jnp.exp(prefix)}
    if prefix_weights is not None:
        charges *= jnp.broadcast_to(prefix_weights.astype(charges.dtype), charges.shape)
    terms = {
        "prefix": jnp.sum(charges, axis=-1),
        "ctc": _charge(_at_length(whole, label_lengths)),
        "expected_length": jnp.sum(jnp.exp(prefix), axis=-1),
    }
    values = {name: masked_mean(term, valid) for name, term in terms.items()}
    costs = values | {"expected_length": -values["expected_length"]}
    loss = sum((weights[name] * costs[name] for name in weights), jnp.zeros_like(values["ctc"]))
    each = jax.vmap(masked_mean, (-1, None))
    return loss, values | {name: each(term, valid) for name, term in by_position.items()}


def ctc_loss(blank: Array, label: Array, labels: Array, label_lengths: Array) -> Array:
    """``-log P(collapse == label)``, mean as in ``draft_loss``: nats per anchor, float32 []."""
    return draft_loss(blank, label, labels, label_lengths, {})[1]["ctc"]


def prefix_loss(
    blank: Array, label: Array, labels: Array, label_lengths: Array, weights: Array | None = None
) -> Array:
    """``sum_k weights[k] * -log P(labels[:k] is a prefix)``, mean as in ``draft_loss``.

    A prefix's log-probability is the sum of its tokens' conditional ones, so uniform weights
    charge token j (of n) n - j + 1 times: the early tokens, on which the acceptance of all later
    ones depends, count most. All weight on the last k charges every token once.

    ``weights`` [K], not renormalised over padding; None means 1 for every k. Returns float32 [].
    """
    return draft_loss(blank, label, labels, label_lengths, {}, weights)[1]["prefix"]


def expected_accepted_length(
    blank: Array, label: Array, labels: Array, label_lengths: Array
) -> Array:
    """``sum_k P(labels[:k] is a prefix)``, mean as in ``draft_loss``: 0..K tokens, float32 [].

    How many labels a sample of the drafter's own law gets right before its first error. Its
    gradient vanishes with the probability of a prefix, so it cannot start a training.
    """
    return draft_loss(blank, label, labels, label_lengths, {})[1]["expected_length"]


def cross_entropy(logits: Array, labels: Array, mask: Array) -> Array:
    """Mean negative log-likelihood where ``mask`` is true: nats per token, float32 [].

    ``logits`` [..., V], any float dtype; ``labels`` int [...], ids below V, anything where the
    mask is false; ``mask`` bool [...]. 0 if the mask is false everywhere.
    """
    logits = widen(logits)
    index = jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None]
    label = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    return masked_mean(jax.nn.logsumexp(logits, axis=-1) - label, mask)


def _charge(log_probs):
    return jnp.where(log_probs > IMPOSSIBLE, -log_probs, 0.0)


def masked_mean(x: Array, valid: Array) -> Array:
    """Mean of ``x`` over the places where ``valid`` is true, 0 if there is none."""
    count = jnp.maximum(jnp.sum(valid), 1).astype(x.dtype)
    return jnp.sum(jnp.where(valid, x, 0.0)) / count
