"""Where drafts of a training row begin, and what they should say.

Shape letters: B rows, T tokens, A anchors, K labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample_anchors(keys, batch, num_anchors: int, num_labels: int):
    """Draw one anchor from each of A equal parts of the places of a row where a draft may begin.

    An anchor is the place of a pending token: one whose successor is a label of the same document.
    ``keys`` [B] are consumed.

    Args:
      keys: typed keys [B].
      batch: ``segments`` int32 [B, T] (0 is padding), ``trained`` bool [B, T], ``tokens``; anchors
        are among its ``roots`` bool [B, T] if it has any.
      num_anchors: A.
      num_labels: K.

    Returns:
      anchors int32 [B, A], labels int32 [B, A, K] (the tokens after the anchor), and how many of
      them are labels of the same document without a gap, int32 [B, A]; 0 in rows without a place.
    """
    tokens, segments, trained = batch["tokens"], batch["segments"], batch["trained"]
    width = tokens.shape[1]
    follows = trained[:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    follows = jnp.pad(follows, ((0, 0), (0, 1)))  # at the place of the pending token
    follows &= batch.get("roots", True)
    order = jnp.cumsum(follows.astype(jnp.int32), axis=1)
    count = order[:, -1]
    part = jnp.arange(num_anchors, dtype=jnp.float32)[None]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (num_anchors,)))(keys)
    place = (part + uniform) / num_anchors * count[:, None].astype(jnp.float32)
    # Rounding may lift a place to the end of its row.
    rank = jnp.minimum(jnp.floor(place).astype(jnp.int32), count[:, None] - 1) + 1
    anchors = jax.vmap(jnp.searchsorted)(order, jnp.maximum(rank, 1)).astype(jnp.int32)
    anchors = jnp.minimum(anchors, width - 1)
    ahead = anchors[..., None] + 1 + jnp.arange(num_labels, dtype=jnp.int32)[None, None]
    inside = jnp.minimum(ahead, width - 1)

    def at(array):
        return jnp.take_along_axis(array[:, None], inside, axis=2)

    own = jnp.take_along_axis(segments, anchors, axis=1)[..., None]
    good = at(trained) & (at(segments) == own) & (ahead < width) & (own > 0)
    lengths = jnp.sum(jnp.cumprod(good.astype(jnp.int32), axis=-1), axis=-1, dtype=jnp.int32)
    return anchors, at(tokens), jnp.where(count[:, None] > 0, lengths, 0)
