"""Step 2: which path of a draft the target keeps.

Shape letters: B batch, N tree nodes, M max depth, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ctc_spec_jax.types import ROOT, Acceptance, DraftTree


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Keep the longest path whose every token is the target's arg-max at its parent.

    The output is that of greedy decoding whatever the draft is (greedy match: Chen et al. 2023,
    arXiv 2302.01318, with a one-hot target law). An arg-max path, not a one-hot softmax.
    """

    def __call__(self, key, tree: DraftTree, depth, mask, logits, max_depth: int) -> Acceptance:
        """See ``types.Verifier``; ``key`` is not used."""
        del key
        wanted = _first_argmax(logits)  # [B, N]
        at_parent = jnp.take_along_axis(wanted, jnp.maximum(tree.parents, 0), axis=1)
        is_root = jnp.arange(wanted.shape[1]) == ROOT
        matches = (tree.tokens == at_parent) & tree.valid | is_root[None]
        kept = jnp.all(matches[:, None, :] | ~mask, axis=-1) & matches  # [B, N]
        last = jnp.argmax(jnp.where(kept, depth, -1), axis=1)
        return _path_to(last, wanted, depth, mask, max_depth)


def _first_argmax(logits):
    """``jnp.argmax`` over the last axis, int32; two plain reductions, which XLA vectorises on CPU.

    The reduction of pairs behind ``jnp.argmax`` takes five times as long there.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_peak = logits == jnp.max(logits, axis=-1, keepdims=True)
    last = logits.shape[-1] - 1
    # A row of NaN has no peak; any index in range will do.
    return jnp.min(jnp.where(is_peak, index, last), axis=-1)


def _path_to(last, wanted, depth, mask, max_depth: int) -> Acceptance:
    """The path from the root to node ``last`` [B]; ``wanted`` [B, N] is the token after a node."""
    ancestors = jnp.take_along_axis(mask, last[:, None, None], axis=1)  # [B, 1, N]
    levels = jnp.arange(max_depth + 1, dtype=depth.dtype)
    path = jnp.argmax(ancestors & (depth[:, None, :] == levels[None, :, None]), axis=-1)
    return Acceptance(
        path.astype(jnp.int32),
        jnp.take_along_axis(depth, last[:, None], axis=1)[:, 0] + 1,
        jnp.take_along_axis(wanted, last[:, None], axis=1)[:, 0],
    )
