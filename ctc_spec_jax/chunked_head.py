"""Output heads applied to a chunk of positions at a time: [positions, V] logits never exist whole.

Shape letters: A anchors or positions, F draft frames, K labels, V vocabulary, D width.
Arithmetic is in float32, or in float64 where the inputs are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def chunked_frame_log_probs(
    hidden: Array,
    head: Array,
    blank_row: Array,
    labels: Array,
    chunk: int,
    blank_bias: Array | None = None,
) -> tuple[Array, Array]:
    """``gather_frame_log_probs`` of ``hidden @ [head, blank_row]``, without the [A, F, V] logits.

    Matrix products run in the dtype of ``hidden`` and accumulate in float32. Differentiable in
    every array, in reverse mode; the [D, V] gradient of ``head`` is computed only if asked for.

    Args:
      hidden: [A, F, D], the drafter's output states.
      head: [D, V], the target's LM head.
      blank_row: [D], the drafter's own column for the blank.
      labels: int [A, K], token ids below V; padding may be any number.
      chunk: anchors whose logits exist at a time; A is padded to a multiple of it. If A is
        sharded, take a multiple of the number of shards: every chunk then lies on all devices.
      blank_bias: [], added to the blank's logit.

    Returns:
      ``blank [A, F]`` and ``label [A, F, K]``, float32, nats.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if hidden.ndim != 3 or labels.ndim != 2 or hidden.shape[0] != labels.shape[0]:
        got = f"{hidden.shape} and {labels.shape}"
        raise ValueError(f"expected hidden [A, F, D] and labels [A, K], got {got}")
    head, blank_row = head.astype(hidden.dtype), blank_row.astype(hidden.dtype)
    # Label logits are products with K gathered columns: picking them out of the chunk's logits
    # would need a scatter into [chunk, F, V] on the way back.
    columns = jnp.take(head.T, jnp.clip(labels, 0, head.shape[1] - 1), axis=0)  # [A, K, D]
    label = product("afd,akd->afk", hidden, columns)
    blank = product("afd,d->af", hidden, blank_row)
    if blank_bias is not None:
        blank = blank + blank_bias.astype(blank.dtype)
    normaliser = jnp.logaddexp(_vocab_logsumexp(chunk, hidden, head), blank)
    return blank - normaliser, label - normaliser[..., None]


def chunked_labelled_log_probs(
    hidden: Array,
    head: Array,
    blank_row: Array,
    text: Array,
    shifts: Array,
    top_k: int,
    chunk: int,
    blank_bias: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Log-probabilities at frames that know the last label, see ``tree.ctc_labels``.

    Candidates are every frame's ``top_k`` tokens, whether or not a label is among them: chosen with
    an eye on the labels, they would give them away. Other tokens keep their probability. The logits
    of a chunk are computed again in the backward pass.

    Args:
      hidden: [A, F, D].
      head: [D, V], frozen.
      blank_row: [D].
      text: int [A, K+1], the token before the first frame and the labels; padding is any number.
      shifts: [A, K+1, D], what is added to ``hidden`` in B(l, c) for l each of ``text``: B is the
        product of a shift and the head's column of c.
      top_k: of the candidates.
      chunk: anchors whose logits exist at a time; as for ``chunked_frame_log_probs``.
      blank_bias: [].

    Returns:
      ``blank [A, F]``; ``label [A, F, K]``, of label k after label k-1; ``stay [A, F, K]``, of
      label k after itself. Float32, nats.
    """
    bias = jnp.zeros(()) if blank_bias is None else blank_bias

    @jax.checkpoint
    def some(part):
        hidden, text, shifts = part
        logits = product("afd,dv->afv", hidden, head.astype(hidden.dtype))
        blank = product("afd,d->af", hidden, blank_row.astype(hidden.dtype)) + widen(bias)
        normaliser = jnp.logaddexp(jax.nn.logsumexp(logits, axis=-1), blank)
        _, best = lax.top_k(lax.stop_gradient(logits), min(top_k, head.shape[1]))
        known = jnp.clip(text, 0, head.shape[1] - 1).astype(best.dtype)
        ids = best.reshape(len(best), -1)  # [a, U]
        index = jnp.arange(ids.shape[1], dtype=jnp.int32)
        earlier = (ids[:, :, None] == ids[:, None, :]) & (index[None, :] < index[:, None])[None]
        first = ~jnp.any(earlier, axis=-1)  # equal ones count once
        turned = head.T.astype(hidden.dtype)
        columns = jnp.take(turned, ids, axis=0)
        own = jnp.where(first[:, None], product("afd,aud->afu", hidden, columns), -1e30)
        tilted = own[:, :, None] + product("akd,aud->aku", shifts, columns)[:, None]
        mass = jax.nn.logsumexp(own, axis=-1) - normaliser
        total = jax.nn.logsumexp(tilted, axis=-1) - mass[..., None]  # [a, F, K+1]
        columns = jnp.take(turned, known[:, 1:], axis=0)  # of the labels
        labels = product("afd,akd->afk", hidden, columns)
        among = jnp.any(known[:, 1:, None] == ids[:, None], axis=-1)[:, None]  # [a, 1, K]

        def after(shifts, total):
            biases = product("akd,akd->ak", shifts, columns)[:, None]
            return jnp.where(among, labels + biases - total, labels - normaliser[..., None])

        enter, stay = after(shifts[:, :-1], total[..., :-1]), after(shifts[:, 1:], total[..., 1:])
        return blank - normaliser, enter, stay

    return map_chunks(some, chunk, (hidden, text, shifts))


def chunked_token_log_probs(
    hidden: Array, head: Array, labels: Array, chunk: int
) -> tuple[Array, Array]:
    """Log-probabilities of labels under ``hidden @ head``, without the [A, K, V] logits.

    The logits of a chunk are computed again in the backward pass. Matrix products run in the dtype
    of ``hidden`` and accumulate in float32. Differentiable in ``hidden`` and ``head``; the gradient
    of the latter is computed only if asked for.

    Args:
      hidden: [A, K, D].
      head: [D, V], or one for each of the K positions [K, D, V].
      labels: int [A, K], token ids below V; padding may be any number.
      chunk: of A whose logits exist at a time, see ``chunked_frame_log_probs``.

    Returns:
      ``log_prob [A, K]``, float32, nats, and ``best`` bool [A, K]: no token is more probable.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        got = f"{hidden.shape} and {labels.shape}"
        raise ValueError(f"expected hidden [A, K, D] and labels [A, K], got {got}")
    subscripts = "akd,dv->akv" if head.ndim == 2 else "akd,kdv->akv"
    # Narrowed in each chunk, so that the gradient of the head adds up over chunks in float32.
    head = widen(head)

    @jax.checkpoint
    def per_position(part):
        hidden, labels = part
        logits = product(subscripts, hidden, head.astype(hidden.dtype))
        index = jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None]
        label = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
        best = label >= jnp.max(logits, axis=-1)
        return label - jax.nn.logsumexp(logits, axis=-1), best

    return map_chunks(per_position, chunk, (hidden, labels))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vocab_logsumexp(chunk: int, hidden: Array, head: Array) -> Array:
    """logsumexp over V of ``hidden @ head``: [A, F, D], [D, V] -> [A, F]."""
    return map_chunks(
        lambda h: jax.nn.logsumexp(product("afd,dv->afv", h, head), axis=-1), chunk, hidden
    )


def _vocab_logsumexp_fwd(chunk, hidden, head):
    # The gradient in hidden is the softmax-weighted mean of the head's columns, no larger than
    # hidden: one matmul now, where recomputing the logits in the backward pass would take two.
    def one(h):
        logits = product("afd,dv->afv", h, head.value)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mean = product("afv,dv->afd", weights.astype(h.dtype), head.value) / total
        return (jnp.log(total) + top)[..., 0], mean.astype(h.dtype)

    normaliser, mean_column = map_chunks(one, chunk, hidden.value)
    for_head = (hidden.value, head.value, normaliser) if head.perturbed else None
    return normaliser, (mean_column, for_head)


def _vocab_logsumexp_bwd(chunk, residuals, cotangent):
    mean_column, for_head = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None
    d_hidden = (cotangent[..., None] * widen(mean_column)).astype(mean_column.dtype)
    if for_head is None:
        return d_hidden, None
    hidden, head, normaliser = for_head

    def add(total, part):
        h, lse, weight = part
        softmax = jnp.exp(product("afd,dv->afv", h, head) - lse[..., None])
        weighted = (softmax * weight[..., None]).astype(h.dtype)
        return total + product("afd,afv->dv", h, weighted), None

    parts = split(chunk, (hidden, normaliser, cotangent))
    d_head, _ = lax.scan(add, jnp.zeros(head.shape, normaliser.dtype), parts)
    return d_hidden, d_head.astype(head.dtype)


_vocab_logsumexp.defvjp(_vocab_logsumexp_fwd, _vocab_logsumexp_bwd, symbolic_zeros=True)


def split(chunk: int, tree: Any) -> Any:
    """Leaves [A, ...] -> [chunks, positions per chunk, ...], padded with zeros."""

    def one(x):
        # Chunk j holds the positions j, j + chunks, ...: with A sharded over devices it takes an
        # equal part from each, where a chunk of neighbours would lie on one device.
        size = min(chunk, x.shape[0])
        num_chunks = -(-x.shape[0] // size)
        x = jnp.pad(x, [(0, num_chunks * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return jnp.moveaxis(x.reshape(size, num_chunks, *x.shape[1:]), 1, 0)

    return jax.tree.map(one, tree)


def map_chunks(function: Callable[[Any], Any], chunk: int, tree: Any) -> Any:
    """``function`` over chunks of the leading axis A of all leaves; its outputs have that axis."""
    count = jax.tree.leaves(tree)[0].shape[0]

    def join(y):
        return jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:])[:count]

    return jax.tree.map(join, lax.map(function, split(chunk, tree)))


def product(subscripts: str, x: Array, y: Array) -> Array:
    """``einsum`` of two arrays of one dtype, accumulated and returned in float32 (or float64)."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=_wide_dtype(x.dtype))


def widen(x: Array) -> Array:
    """``x`` in float32, or in float64 if it is that already."""
    return x.astype(_wide_dtype(x.dtype))


def _wide_dtype(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
