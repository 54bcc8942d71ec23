"""Planted faults: each one must change the output, or the exactness tests prove nothing.

The first three are defects of the public CTC drafter release; copies that are not merged, the
fourth, cost nodes and not tokens, so their test is in ``test_ctc_transform``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import accept, decode, verify
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.models import kv_cache
from ctc_spec_jax.tree import topology
from ctc_spec_jax.tree.ctc_transform import TransformTree, default_template
from ctc_spec_jax.types import Law
from tests.helpers import make_request, plain_text, ragged_prompts, tiny_target
from tests.test_ctc import OracleLattice

NEW = 24
TREE = TransformTree(default_template(24, 4))


@pytest.fixture(scope="module")
def setting():
    """Target, prompts, plain text and the truth that the lattices spell."""
    lm, params = tiny_target()
    prompts, lengths = ragged_prompts(7, (4, 9, 2, 6))
    return lm, params, prompts, lengths, *plain_text(lm, params, prompts, lengths, NEW)


def _decode(setting):
    """A decode traced anew, so that a fault planted before it is seen."""
    lm, params, prompts, lengths, _, truth = setting
    loop = Loop(lm, OracleLattice(TREE, 6.0), verify.Greedy(), NEW)
    fresh = jax.jit(functools.partial(decode.decode, loop))
    return fresh(params, truth, prompts, lengths, make_request(4, NEW))


def _template(name: str, batch: int):
    row = jnp.asarray(getattr(TREE.template, name), jnp.int32)
    return jnp.broadcast_to(row[None], (batch, len(row)))


def _stale_gather(monkeypatch):
    """Defect 1: the logits of a node are read at the repeat or blank removed below it."""
    original = verify.Greedy.__call__

    def call(self, keys, tree, depth, mask, law, max_depth):
        batch, nodes = tree.tokens.shape
        raw = _template("parents", batch)
        index = jnp.arange(nodes, dtype=jnp.int32)
        removed_child = (raw[:, None, :] == index[None, :, None]) & ~tree.valid[:, None, :]
        stale = jnp.argmax(removed_child, axis=-1)
        stale = jnp.where(jnp.any(removed_child, axis=-1), stale, index[None])
        law = Law(jnp.take_along_axis(law.logits, stale[..., None], axis=1))
        return original(self, keys, tree, depth, mask, law, max_depth)

    monkeypatch.setattr(verify.Greedy, "__call__", call)


def _forward_with(monkeypatch, change):
    """Plant a change of the target's (length, positions, mask)."""
    original = decode.run_round

    class Target:
        def __init__(self, target):
            self.target = target
            self.vocab_size = target.vocab_size

        def forward_tree(self, params, cache, length, tokens, positions, mask, taps):
            positions, mask = change(length, positions, mask)
            return self.target.forward_tree(params, cache, length, tokens, positions, mask, taps)

        def commit(self, *args):
            return self.target.commit(*args)

    def run_round(loop, params, draft_params, state, request):
        loop = Loop(Target(loop.target), loop.drafter, loop.verifier, loop.capacity)
        return original(loop, params, draft_params, state, request)

    monkeypatch.setattr(decode, "run_round", run_round)


def _positions_not_renumbered(monkeypatch):
    """Defect 2: a node keeps the position that it had before the collapse."""

    def change(length, positions, mask):
        return length[:, None] + _template("depths", len(positions)), mask

    _forward_with(monkeypatch, change)


def _removed_nodes_not_masked(monkeypatch):
    """Defect 3: nodes attend to the blanks and repeats that the collapse removed."""

    def change(length, positions, mask):
        raw = _template("parents", len(positions))
        everything = jnp.ones(raw.shape, bool)
        depth = TREE.max_depth
        before = jax.vmap(lambda p, v: topology.ancestor_mask(p, v, depth))(raw, everything)
        return positions, mask | before

    _forward_with(monkeypatch, change)


def _commit_one_late(monkeypatch):
    original = kv_cache.commit
    monkeypatch.setattr(
        kv_cache, "commit", lambda cache, kv, path, n: original(cache, kv, path, n + 1)
    )


def _commit_unpermuted(monkeypatch):
    """Accepted rows are taken in node order instead of along the path."""
    original = kv_cache.commit

    def commit(cache, kv, path, length):
        order = jnp.arange(path.shape[1], dtype=jnp.int32)
        return original(cache, kv, jnp.broadcast_to(order[None], path.shape), length)

    monkeypatch.setattr(kv_cache, "commit", commit)


def _bonus_from_the_root(monkeypatch):
    """The target's own token is read at the root instead of at the last accepted node."""
    original = verify._path_to

    def path_to(last, wanted, depth, mask, max_depth):
        right = original(last, wanted, depth, mask, max_depth)
        return type(right)(right.path, right.length, wanted[:, 0])

    monkeypatch.setattr(verify, "_path_to", path_to)


def _one_token_too_many(monkeypatch):
    original = accept.cut

    def cut(tokens, acceptance, state, request):
        acceptance, finish, strings = original(tokens, acceptance, state, request)
        full = acceptance.length < tokens.shape[1]
        grown = jnp.where(full & (acceptance.length > 0), acceptance.length + 1, acceptance.length)
        return type(acceptance)(acceptance.path, grown, acceptance.next_token), finish, strings

    monkeypatch.setattr(accept, "cut", cut)


FAULTS = (
    _stale_gather,
    _positions_not_renumbered,
    _removed_nodes_not_masked,
    _commit_one_late,
    _commit_unpermuted,
    _bonus_from_the_root,
    _one_token_too_many,
)


def test_without_a_fault(setting):
    np.testing.assert_array_equal(_decode(setting).tokens, setting[4])


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__.strip("_"))
def test_fault_is_seen(setting, monkeypatch, plant):
    plant(monkeypatch)
    assert (np.asarray(_decode(setting).tokens) != setting[4]).any()
