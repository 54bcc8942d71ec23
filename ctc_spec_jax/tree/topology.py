"""What follows from a tree's parents: ancestors, depths, attention mask, positions, paths.

Functions of ``parents`` treat one row; callers lift them with ``jax.vmap``. Those of a whole
``DraftTree`` treat a batch. Shape letters: B batch, N tree nodes, M max depth. Trees follow
``types.DraftTree``: slot ROOT is the root, a parent's index is smaller than its child's, and no
node is deeper than M.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax.types import NO_PARENT, ROOT, DraftTree


def lineage(parents: jax.Array, max_depth: int) -> jax.Array:
    """The k-th ancestor of every node.

    Args:
        parents: int32 [N].
        max_depth: M, at least the depth of the deepest node.

    Returns:
        int32 [M+1, N]; row 0 is the node itself, row 1 its parent, and so on; entries past the
        root are ROOT.
    """
    up = jnp.maximum(parents, ROOT)
    rows = [jnp.arange(parents.shape[0], dtype=jnp.int32)]
    # M gathers of N indices cost less than log2(M) products or unions of [N, N] masks, which
    # XLA on CPU recomputes inside their consumers.
    for _ in range(max_depth):
        rows.append(up[rows[-1]])
    return jnp.stack(rows)


def depths(parents: jax.Array, max_depth: int) -> jax.Array:
    """Depth of every node: 0 at the root.

    Args:
        parents: int32 [N].
        max_depth: M, at least the depth of the deepest node.

    Returns:
        int32 [N].
    """
    return jnp.sum(lineage(parents, max_depth) != ROOT, axis=0, dtype=jnp.int32)


def ancestor_mask(parents: jax.Array, valid: jax.Array, max_depth: int) -> jax.Array:
    """Which new nodes a node attends to: itself and its ancestors.

    A chain of three nodes whose last one is invalid, row = query, column = key::

        1 0 0
        1 1 0
        1 1 1   <- only the diagonal: column 2 is cleared for every other row

    Args:
        parents: int32 [N].
        valid: bool [N].
        max_depth: M, at least the depth of the deepest node.

    Returns:
        bool [N, N]; ``[i, j]`` is true where j is i or an ancestor of i. Columns of invalid
        nodes are false but for the diagonal, which stays true so that no softmax row is empty.
    """
    return _mask(lineage(parents, max_depth), valid)


def _mask(lineage: jax.Array, valid: jax.Array) -> jax.Array:
    """``ancestor_mask`` of one row from its lineage [M+1, N]."""
    nodes = jnp.arange(valid.shape[0], dtype=jnp.int32)
    related = jnp.any(lineage[:, :, None] == nodes[None, None, :], axis=0)
    return (related & valid[None, :]) | (nodes[:, None] == nodes[None, :])


def positions(parents: jax.Array, length: jax.Array, max_depth: int) -> jax.Array:
    """Position of every node in the sequence: cached tokens plus depth.

    A node removed by a collapse is no one's ancestor, so depth along ``parents`` counts kept
    nodes only and a position never skips.

    Args:
        parents: int32 [N].
        length: int32 [], tokens of the row that are in the cache.
        max_depth: M, at least the depth of the deepest node.

    Returns:
        int32 [N].
    """
    return length + depths(parents, max_depth)


def path_to(parents: jax.Array, node: jax.Array, max_depth: int) -> jax.Array:
    """The nodes from the root down to ``node``, one per depth.

    Args:
        parents: int32 [N].
        node: int32 [].
        max_depth: M, at least the depth of ``node``.

    Returns:
        int32 [M+1]; entries past the node's depth are ROOT.
    """
    line = lineage(parents, max_depth)[:, node]
    depth = jnp.sum(line != ROOT, dtype=jnp.int32)
    steps_up = depth - jnp.arange(max_depth + 1, dtype=jnp.int32)
    return jnp.where(steps_up >= 0, line[jnp.maximum(steps_up, 0)], ROOT)


def lineages(tree: DraftTree, max_depth: int) -> jax.Array:
    """``lineage`` of a batch of trees, int32 [B, M+1, N]."""
    return jax.vmap(lambda parents: lineage(parents, max_depth))(tree.parents)


def trim(tree: DraftTree, lineage: jax.Array, deepest: jax.Array) -> DraftTree:
    """The tree without its nodes below a depth; the root stays.

    Args:
        tree: arrays [B, N].
        lineage: int32 [B, M+1, N].
        deepest: int32 [B], greatest depth that is kept.
    """
    depth = jnp.sum(lineage != ROOT, axis=1, dtype=jnp.int32)
    valid = tree.valid & (depth <= jnp.maximum(deepest, 0)[:, None])
    return dataclasses.replace(tree, valid=valid)


def shape_of(tree: DraftTree, lineage: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Depth and attention mask of a batch of trees.

    Args:
        tree: arrays [B, N].
        lineage: int32 [B, M+1, N], see ``lineages``.

    Returns:
        Depths int32 [B, N] and masks bool [B, N, N] as of ``ancestor_mask``.
    """
    return (
        jnp.sum(lineage != ROOT, axis=1, dtype=jnp.int32),
        jax.vmap(_mask)(lineage, tree.valid),
    )


def root_only(pending: jax.Array) -> DraftTree:
    """The tree of no draft: its root.

    Args:
        pending: int32 [B].

    Returns:
        Arrays [B, 1].
    """
    tokens = pending[:, None]
    return DraftTree(tokens, jnp.full_like(tokens, NO_PARENT), jnp.ones_like(tokens, bool))


def check(
    tree: DraftTree,
    max_depth: int,
    *,
    vocab_size: int | None = None,
    distinct_children: bool = True,
) -> None:
    """Raise unless a concrete batch of trees keeps the contract of ``DraftTree``.

    Host side, for tests and debugging.

    Args:
        tree: concrete arrays [B, N].
        max_depth: M.
        vocab_size: if given, every token must lie in ``[0, vocab_size)``, invalid nodes
            included: they are embedded too.
        distinct_children: demand that valid children of one node carry different tokens. False
            for drafts that are sampled with replacement.

    Raises:
        ValueError: naming the row, the node and the broken rule.
    """
    tokens, parents, valid = (np.asarray(a) for a in (tree.tokens, tree.parents, tree.valid))
    for name, array, dtype in (
        ("tokens", tokens, np.int32),
        ("parents", parents, np.int32),
        ("valid", valid, np.bool_),
    ):
        if array.ndim != 2 or array.shape != tokens.shape or array.dtype != dtype:
            raise ValueError(
                f"{name}: expected {np.dtype(dtype)} [B, N] like tokens {tokens.shape}, "
                f"got {array.dtype} {array.shape}"
            )
    for row in range(tokens.shape[0]):
        try:
            _check_row(tokens[row], parents[row], valid[row], max_depth, distinct_children)
            if vocab_size is not None:
                _reject((tokens[row] < 0) | (tokens[row] >= vocab_size), "token id out of range")
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from None


def _check_row(tokens, parents, valid, max_depth: int, distinct_children: bool) -> None:
    nodes = np.arange(len(parents))
    if parents[ROOT] != NO_PARENT or not valid[ROOT]:
        raise ValueError(f"node {ROOT}: the root must be valid and have parent {NO_PARENT}")
    _reject((nodes != ROOT) & ((parents < ROOT) | (parents >= nodes)), "parent not in [0, node)")
    up = np.maximum(parents, ROOT)
    _reject(valid & ~valid[up], "valid node below an invalid one")
    ancestor = nodes
    for _ in range(max_depth):
        ancestor = up[ancestor]
    _reject(ancestor != ROOT, f"deeper than max_depth={max_depth}")
    if distinct_children:
        twin = (parents[:, None] == parents) & (tokens[:, None] == tokens) & valid[:, None] & valid
        _reject(np.any(np.tril(twin, -1), axis=1), "repeats the token of an earlier sibling")


def _reject(broken, rule: str) -> None:
    if np.any(broken):
        raise ValueError(f"node {int(np.argmax(broken))}: {rule}")
