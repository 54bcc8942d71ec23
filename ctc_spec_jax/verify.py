"""Step 2: which path of a draft the target keeps.

=================  ==========================================================  =======
rule               exact for                                                   here
=================  ==========================================================  =======
``Greedy``         any tree, rows at temperature 0                             below
``TargetSample``   any tree that was fixed before the target's draw            below
``Typical``        nothing: lossy                                              below
``Rejection``      a chain drawn from the law that it states                   sampled
``MultiCandidate`` a tree whose siblings were drawn from the law it states     sampled
``Mixed``          fixed children and children drawn from the rest of the law  sampled
``Block``          a chain drawn from the law that it states                   sampled
=================  ==========================================================  =======

The rules for drafts that were drawn at random are in ``verify_sampled.py``.

Shape letters: B batch, N tree nodes, M max depth, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ctc_spec_jax import categorical, sharding
from ctc_spec_jax.types import ROOT, Acceptance, DraftTree, Law, Laws

_BLOCK = 64
"""Entries of a block of ``first_argmax``: about as many as a vocabulary of 32,000 has blocks."""


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Keep the longest path whose every token is the target's arg-max at its parent.

    The output is that of greedy decoding whatever the draft is (greedy match: Chen et al. 2023,
    arXiv 2302.01318, with a one-hot target law). An arg-max path, not a one-hot softmax.
    """

    def __call__(
        self, keys, tree: DraftTree, depth, mask, laws: Laws, max_depth: int
    ) -> Acceptance:
        """See ``types.Verifier``; ``keys`` are not used.

        Raises:
          ValueError: the request has temperatures.
        """
        del keys
        if laws.greedy is not None:
            raise ValueError("Greedy: expected a request without temperatures, found some")
        wanted = first_argmax(laws.everywhere().logits)
        return _follow(wanted, tree, depth, mask, max_depth)


@dataclasses.dataclass(frozen=True)
class TargetSample:
    """Draw the target's token at every node and follow the children that carry it.

    What is emitted is always the target's draw, so this is exact for every tree that was fixed
    before the draws, whatever it holds. A child of probability p is accepted with probability p,
    which for a tree of one child per node is the rejection rule of a point-mass proposal. Known
    as naive multi-candidate sampling (arXiv 2401.06706) and as the walk of deterministic trees.
    """

    def __call__(
        self, keys, tree: DraftTree, depth, mask, laws: Laws, max_depth: int
    ) -> Acceptance:
        """See ``types.Verifier``."""
        if laws.greedy is None:
            return Greedy()(keys, tree, depth, mask, laws, max_depth)
        # One pair per depth: the target draws once after every node that the walk visits.
        uniform = categorical.uniforms(keys, max_depth + 1, jnp.float32)
        return walk_down(uniform, tree, laws, max_depth)


@dataclasses.dataclass(frozen=True)
class Typical:
    """LOSSY: keep every token that the target finds plausible enough; for comparison only.

    A drafted token stays if its probability exceeds ``min(epsilon, delta * exp(-entropy))`` of
    the law at its parent; the deepest path wins and the target's own token is drawn after it
    (Medusa, arXiv 2401.10774, section 2.3.1). The output does not follow the target's law. Greedy
    rows are exact: only the arg-max stays.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __call__(
        self, keys, tree: DraftTree, depth, mask, laws: Laws, max_depth: int
    ) -> Acceptance:
        """See ``types.Verifier``."""
        law = laws.everywhere()
        wanted = target_tokens(categorical.uniforms(keys, depth.shape[1], jnp.float32), law)
        if law.greedy is None:
            return _follow(wanted, tree, depth, mask, max_depth)
        log_probs = jax.nn.log_softmax(law.logits, axis=-1)
        probs = jnp.exp(log_probs)
        terms = jnp.where(probs > 0, probs * log_probs, 0.0)  # 0 * -inf is NaN
        entropy = -jnp.sum(terms, axis=-1)
        bar = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))  # [B, N]
        up = jnp.maximum(tree.parents, ROOT)
        rows = jnp.arange(up.shape[0], dtype=jnp.int32)[:, None]
        plausible = probs[rows, up, tree.tokens] > jnp.take_along_axis(bar, up, axis=1)
        is_peak = tree.tokens == jnp.take_along_axis(wanted, up, axis=1)
        matches = jnp.where(law.greedy[:, None], is_peak, plausible)
        return _longest(matches, wanted, tree, depth, mask, max_depth)


def target_tokens(uniform, law: Law):
    """The target's own token after every node, int32 [B, N]; ``uniform`` [B, N, 2] for ``draw``."""
    best = first_argmax(law.logits)
    if law.greedy is None:
        return best
    weights = jnp.exp(law.logits - jnp.max(law.logits, axis=-1, keepdims=True))
    drawn = categorical.draw(weights, uniform.astype(weights.dtype))
    return jnp.where(law.greedy[:, None], best, drawn)


def walk_down(uniform, tree: DraftTree, laws: Laws, max_depth: int) -> Acceptance:
    """From the root on, draw the target's token and follow the child that carries it.

    ``uniform`` is float [B, M+1, 2], see ``categorical.draw``; pair d makes the draw at depth d.
    """
    batch, nodes = tree.tokens.shape
    below_root = jnp.arange(nodes, dtype=jnp.int32) > ROOT
    levels = jnp.arange(max_depth + 1, dtype=jnp.int32)[None]

    def step(place):
        depth, node, path, _, walks = place
        law = laws.at(node[:, None])
        at_depth = jax.lax.dynamic_slice_in_dim(uniform, depth, 1, axis=1)
        wanted = target_tokens(at_depth, law)  # [B, 1]
        carries = (tree.parents == node[:, None]) & (tree.tokens == wanted)
        carries &= tree.valid & below_root[None]
        moves = walks & jnp.any(carries, axis=1)
        node = jnp.where(moves, jnp.argmax(carries, axis=1).astype(jnp.int32), node)
        path = jnp.where(moves[:, None] & (levels == depth + 1), node[:, None], path)
        return depth + 1, node, path, jnp.where(walks, wanted[:, 0], place[3]), moves

    zeros = jnp.zeros((batch,), jnp.int32)
    path = jnp.zeros((batch, max_depth + 1), jnp.int32)
    place = (jnp.int32(0), zeros, path, zeros, jnp.ones((batch,), bool))
    if max_depth:
        place = jax.lax.while_loop(lambda place: jnp.any(place[4]), step, place)
    else:  # one turn: a loop would let the host of a GPU wait for its condition
        place = step(place)
    _, _, path, token, _ = place
    length = 1 + jnp.sum(path != ROOT, axis=1, dtype=jnp.int32)
    return Acceptance(path, length, token)


def first_argmax(logits):
    """``jnp.argmax`` over the last axis, int32, in a form that the device is fast at.

    XLA may make the logits anew for every reduction that reads them, and round them differently
    (a product and a sum in one). So nothing is looked for that equals a maximum found before.
    """
    # A reduction of pairs; of parts on several chips, only the winners travel.
    pairs = functools.partial(jax.lax.argmax, axis=logits.ndim - 1, index_dtype=jnp.int32)
    size = logits.shape[-1]
    if size <= _BLOCK or sharding.parts("vocab", size) > 1:
        return pairs(logits)
    return jax.lax.platform_dependent(logits, cpu=_argmax_of_blocks, default=pairs)


def _argmax_of_blocks(logits):
    """The arg-max of the block that the largest entry lies in.

    XLA on CPU vectorises a maximum and not a reduction of pairs, which takes ten times as long.
    """
    *lead, size = logits.shape
    blocks, rest = divmod(size, _BLOCK)
    whole = logits[..., : blocks * _BLOCK].reshape(*lead, blocks, _BLOCK)
    tops = jnp.max(whole, axis=-1)
    if rest:  # padding would cost more than all else
        last = jnp.max(logits[..., -rest:], axis=-1, keepdims=True)
        tops = jnp.concatenate([tops, last], axis=-1)
    start = jnp.argmax(tops, axis=-1, keepdims=True).astype(jnp.int32) * _BLOCK
    index = start + jax.lax.broadcasted_iota(jnp.int32, (*lead, _BLOCK), len(lead))
    inside = jnp.take_along_axis(logits, jnp.minimum(index, size - 1), axis=-1)
    best = start[..., 0] + jnp.argmax(inside, axis=-1).astype(jnp.int32)
    return jnp.minimum(best, size - 1)


def _follow(wanted, tree: DraftTree, depth, mask, max_depth: int) -> Acceptance:
    """The path whose every token is the one that is ``wanted`` [B, N] after its parent."""
    at_parent = jnp.take_along_axis(wanted, jnp.maximum(tree.parents, ROOT), axis=1)
    return _longest(tree.tokens == at_parent, wanted, tree, depth, mask, max_depth)


def _longest(matches, wanted, tree: DraftTree, depth, mask, max_depth: int) -> Acceptance:
    """The deepest path of nodes that all match [B, N], and what is wanted after it."""
    is_root = jnp.arange(wanted.shape[1]) == ROOT
    matches = matches & tree.valid | is_root[None]
    kept = jnp.all(matches[:, None, :] | ~mask, axis=-1) & matches  # [B, N]
    last = jnp.argmax(jnp.where(kept, depth, -1), axis=1)
    return _path_to(last, wanted, depth, mask, max_depth)


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
