"""Answers that were just served, in a ring of fixed shape, as rows to learn from.

Which token is the label: one that replaced a refused draft. Its law is that of the place *before*
it; the losses read it there, see ``training.DraftLoss``. The bonus token of a round that kept its
whole draft is no label: nothing was wrong there. (The release of Online Speculative Decoding,
arXiv 2310.07177, takes the loss one place late and counts bonus tokens as wrong.)

Shape letters: R rows of the ring, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax.generation import Generation
from ctc_spec_jax.types import pytree


@pytree
class Replay:
    """The newest R answers with their prompts, right-padded; ``written`` counts all there were."""

    tokens: jax.Array  # int32 [R, T]
    lengths: jax.Array  # int32 [R], 0 where nothing is stored yet
    trained: jax.Array  # bool [R, T], tokens of the answer
    refused: jax.Array  # bool [R, T], the target's own, in place of drafted ones
    roots: jax.Array  # bool [R, T], pending tokens of drafts that were not kept whole
    written: jax.Array  # int32 []


def empty(rows: int, length: int) -> Replay:
    """A ring of ``rows`` rows of ``length`` tokens with nothing in it."""

    def blank(dtype):
        return jnp.zeros((rows, length), dtype)

    lengths = jnp.zeros((rows,), jnp.int32)
    return Replay(blank(jnp.int32), lengths, blank(bool), blank(bool), blank(bool), jnp.int32(0))


def row_of(prompt: Sequence[int], answer: Generation, length: int) -> dict[str, np.ndarray]:
    """One row of a ring, of a prompt of at least one token and its answer.

    Args:
      prompt: token ids.
      answer: with what is known of its drafts.
      length: T, at least their tokens.
    """
    size = len(prompt) + len(answer.tokens)
    row = {name: np.zeros((length,), bool) for name in ("trained", "refused", "roots")}
    row["tokens"] = np.zeros((length,), np.int32)
    row["tokens"][:size] = [*prompt, *answer.tokens]
    row["trained"][len(prompt) : size] = True
    row["refused"][len(prompt) : size] = answer.refused
    begin = len(prompt)
    for count in answer.emitted:
        row["roots"][begin - 1] = row["refused"][begin : begin + count].any()
        begin += count
    return row | {"lengths": np.asarray(size, np.int32)}


def store(replay: Replay, row: Mapping[str, Any]) -> Replay:
    """The ring with a row of ``row_of`` in place of its oldest one."""
    place = replay.written % replay.lengths.shape[0]
    stored = {name: getattr(replay, name).at[place].set(value) for name, value in row.items()}
    return Replay(**stored, written=replay.written + 1)


def batch_of(replay: Replay, everywhere: bool) -> dict[str, jax.Array]:
    """A step's batch of one micro-batch, leaves [1, R, T] and row [1, R]; see ``step.make_step``.

    ``everywhere`` learns from all tokens of the answers, else from failed drafts alone.
    """
    rows, length = replay.tokens.shape
    index = jnp.arange(length, dtype=jnp.int32)
    real = index[None] < replay.lengths[:, None]
    batch = {
        "tokens": replay.tokens,
        "segments": real.astype(jnp.int32),
        "positions": jnp.broadcast_to(index[None], (rows, length)),
        "trained": replay.trained & real,
        "row": jnp.arange(rows, dtype=jnp.int32),
    }
    if not everywhere:
        batch |= {"refused": replay.refused & real, "roots": replay.roots & real}
    return jax.tree.map(lambda x: x[None], batch)
