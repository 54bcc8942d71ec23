"""The published tree of a CTC drafter: a static template over frames, collapsed path by path.

CTC-drafter (Wen et al., NeurIPS 2024, arXiv 2412.00061, "CTC Transform Module"). One row; callers
lift with ``jax.vmap``. Shape letters: N tree nodes, M max depth, V vocabulary, F draft frames.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax.tree.build import (
    PUBLISHED_COUNTS,
    Template,
    counted_template,
    top_k,
    zipf_template,
)
from ctc_spec_jax.types import NO_PARENT, ROOT


def default_template(num_nodes: int = 64, num_frames: int = 4, classes: int = 10) -> Template:
    """A template of a given size.

    64 nodes over at least 4 frames get the published node counts per depth; any other size gets
    the most probable paths of ``zipf_template``, or all paths where there are fewer.

    Args:
        num_nodes: N, root included, at least 2.
        num_frames: F, the deepest a path may be.
        classes: how many there are; at most 10 ranks of them are used.
    """
    ranks = min(10, classes)
    published = num_nodes == sum(PUBLISHED_COUNTS) + 1 and num_frames >= len(PUBLISHED_COUNTS)
    if published and ranks == 10:
        return counted_template(PUBLISHED_COUNTS)
    paths = sum(ranks**depth for depth in range(1, num_frames + 1))
    return zipf_template(min(num_nodes, 1 + paths), num_frames, ranks)


@dataclasses.dataclass(frozen=True)
class TransformTree:
    """The published builder, a static template, collapsed; see ``transform_tree``."""

    template: Template

    @property
    def max_depth(self) -> int:
        """Frames of the template."""
        return self.template.max_depth

    @property
    def num_nodes(self) -> int:
        """Nodes of the template, root included."""
        return self.template.num_nodes

    def __call__(self, log_probs, pending):
        """(tokens, parents, valid), each [N], of log_probs [F, V+1] and the pending token []."""
        return transform_tree(log_probs, pending, self.template)


def transform_tree(
    log_probs: jax.Array, pending: jax.Array, template: Template
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Collapsed tree of a template whose depth d holds the top symbols of frame d.

    A node spells the collapse of its path's symbols: adjacent repeats merged, then blanks
    deleted. A node stays valid if it is the first to spell its text; the others (blanks, repeats
    and copies) become invalid, and their children move to the node that stayed. So depth along
    the new parents is the number of kept tokens. Example, ``_`` blank, root ``r``::

        r - a - a - b         r - a - b    the second a repeats the first
              - _ - a    ->         - a    a blank between equal tokens keeps both
          - _ - a - c               - c    the blank goes; its a is a copy of the first

    Symbols are compared frame by frame, before blanks are deleted. The pending token belongs to
    no frame and is never compared.

    Where this differs from the published code: new parents (hence positions and logits that are
    read), blanks deleted whether or not the tree has a repeat, copies merged, and an own blank
    class instead of token 0.

    Args:
        log_probs: float32 [F, V+1]; class V is blank. Only the order within a frame matters.
        pending: int32 [], token of the root.
        template: frozen, over at most F frames and V+1 ranks.

    Returns:
        tokens int32 [N], parents int32 [N], valid bool [N]; slots as in the template. Invalid
        slots hold token 0 and a valid parent.

    Raises:
        ValueError: if the template needs more frames or ranks than ``log_probs`` has.
    """
    frames, classes = log_probs.shape
    if template.max_depth > frames or template.top_k > classes:
        raise ValueError(
            f"template: needs {template.max_depth} frames and {template.top_k} classes, "
            f"got log_probs {log_probs.shape}"
        )
    _, ranked = top_k(log_probs[: template.max_depth], template.top_k)
    symbols = template.fill(ranked, pending)
    texts = _collapse(symbols, template.paths(), blank=classes - 1)
    # The first node of a text is never a removed one: a removed node spells what its parent
    # spells, and the parent's index is smaller. This one rule therefore drops blanks, repeats and
    # copies alike, and keeps parent index < child index.
    same = jnp.all(texts[:, None, :] == texts[None, :, :], axis=-1)
    first = jnp.argmax(same, axis=1).astype(jnp.int32)
    valid = first == jnp.arange(template.num_nodes, dtype=jnp.int32)
    parents = first[np.asarray(template.parents[1:], np.int32)]
    parents = jnp.concatenate([jnp.full((1,), NO_PARENT, jnp.int32), parents])
    return jnp.where(valid, symbols, 0), parents, valid


def _collapse(symbols: jax.Array, paths: np.ndarray, blank: int) -> jax.Array:
    """Collapsed text of every node's path: int32 [N, M], padded with ``blank`` at the end."""
    depth = paths.shape[1]
    spelled = jnp.where(paths != ROOT, symbols[paths], blank)  # [N, frame]
    # Nothing precedes depth 1: -1 is no class.
    previous = jnp.pad(spelled[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    kept = (spelled != blank) & (spelled != previous)
    before = np.tri(depth, k=-1, dtype=bool)[None]  # [1, frame, earlier frame]
    place = jnp.sum(kept[:, None, :] & before, axis=-1, dtype=jnp.int32)
    slots = np.arange(depth, dtype=np.int32)[None, :, None]
    lands = kept[:, None, :] & (place[:, None, :] == slots)  # [N, slot, frame]
    # At most one frame lands in a slot, so the sum picks it; an empty slot is left at ``blank``.
    text = jnp.sum(jnp.where(lands, spelled[:, None, :] - blank, 0), axis=-1, dtype=jnp.int32)
    return text + blank
