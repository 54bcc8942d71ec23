"""Planted faults in the rules for sampled drafts: the enumeration must see each one.

Every fault is one that a paper warns of, that a release shipped or that a maintainer reported; its
docstring says where. Without a fault the same setting has no wrong outcome and the target's law.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import categorical, verify, verify_sampled
from ctc_spec_jax.tree import topology
from ctc_spec_jax.types import NO_PARENT, ROOT, DraftTree, Law
from ctc_spec_jax.verify import TargetSample
from ctc_spec_jax.verify_sampled import Block, Mixed, MultiCandidate, Rejection
from tests import enumeration
from tests.enumeration import Draft, Shape, World, enumerate_rule, random_table, tree_of

CHAIN = tree_of(1, 1)
MIXED = Shape((NO_PARENT, 0, 0, 1, 2), (0, 0, None, None, None))


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What is enumerated; see ``enumerate_rule``."""

    rule: object
    world: World
    reference: enumeration.Reference
    is_greedy: bool = False
    redraft: Callable[[World, Draft], Draft] | None = None

    def report(self) -> enumeration.Report:
        options = {} if self.redraft is None else {"redraft": self.redraft}
        enumeration.forget_programs()
        return enumerate_rule(
            self.rule, self.world, self.reference, is_greedy=self.is_greedy, **options
        )


def make_world(shape: Shape, vocab: int, *, replacement=False, zeros=0.0, q=None) -> World:
    p = random_table(4, vocab, shape.depth, zeros)
    return World(p, q or random_table(5, vocab, shape.depth), shape, replacement)


def setting(rule, shape, vocab, reference=enumeration.walk, **options) -> Setting:
    is_greedy = options.pop("is_greedy", False)
    return Setting(rule, make_world(shape, vocab, **options), reference, is_greedy)


REJECTION = setting(Rejection(), CHAIN, 3, replacement=True)
THREE = setting(MultiCandidate(), tree_of(3), 4)
TWO_REPLACED = setting(MultiCandidate(True), tree_of(2, 1), 3, replacement=True)
MIXED_NODES = setting(Mixed(), MIXED, 3)
BLOCK = setting(Block(), CHAIN, 3, enumeration.block, replacement=True)
WALK = setting(TargetSample(), tree_of(2, 2), 3, enumeration.sample, replacement=True)


def _after_failure(monkeypatch, change):
    """Plant a change of both laws after a refusal: change(place, token, (target, draft))."""
    original = verify_sampled._after_failure

    def after(place, token, replacement):
        return change(place, token, original(place, token, replacement))

    monkeypatch.setattr(verify_sampled, "_after_failure", after)


def residual_not_renormalised(monkeypatch, setting):
    """T7: p becomes (p-q)+ after a refusal, and stays below 1."""

    def change(place, token, laws):
        del token
        return jnp.maximum(place.target - place.draft, 0.0), laws[1]

    _after_failure(monkeypatch, change)
    return setting


def residual_dropped(monkeypatch, setting):
    """T7: after a refusal the target's law itself is drawn from."""
    _after_failure(monkeypatch, lambda place, token, laws: (place.target, laws[1]))
    return setting


def draft_law_not_renormalised(monkeypatch, setting):
    """Multi-candidate sampling (arXiv 2401.06706): the token leaves q, which then sums to less."""

    def change(place, token, laws):
        return laws[0], place.draft.at[token].set(0.0)

    _after_failure(monkeypatch, change)
    return setting


def draft_law_not_updated(monkeypatch, setting):
    """Multi-candidate sampling (arXiv 2401.06706): drawn without replacement, tested as with."""
    _after_failure(monkeypatch, lambda place, token, laws: (laws[0], place.draft))
    return setting


def draft_law_updated_in_vain(monkeypatch, setting):
    """The reverse: drawn with replacement, but refused tokens leave the law."""

    def change(place, token, laws):
        rest = place.draft.at[token].set(0.0)
        return laws[0], verify_sampled._normalised(rest, rest)

    _after_failure(monkeypatch, change)
    return setting


def candidates_sorted_by_id(monkeypatch, setting):
    """Multi-candidate sampling: siblings are tried by token id instead of in drawn order."""
    del monkeypatch

    def redraft(world, draft):
        assert set(world.shape.parents[1:]) == {ROOT}
        tokens = (0, *sorted(draft.tokens[1:]))
        return Draft(draft.prob, tokens, ((), *((token,) for token in tokens[1:])))

    return dataclasses.replace(setting, redraft=redraft)


def unsure_proposal_dropped(monkeypatch, setting):
    """Stopping principle (AdaEDL-like stops, arXiv 2410.18351, done wrong): a proposal is withheld
    because it, once drawn, has a small probability."""
    del monkeypatch

    def redraft(world, draft):
        prefixes = list(draft.prefixes)
        for node in range(1, len(prefixes)):
            parent = prefixes[world.shape.parents[node]]
            if parent is None or world.q[parent][draft.tokens[node]] < 0.3:
                prefixes[node] = None
        return Draft(draft.prob, draft.tokens, tuple(prefixes))

    return dataclasses.replace(setting, redraft=redraft)


def told_the_raw_law(monkeypatch, setting):
    """huggingface/transformers#47932: drawn from the top 2 of q, tested against all of q."""
    del monkeypatch
    raw, processed = setting.world.q, {}
    for prefix, law in raw.items():
        best = sorted(range(len(law)), key=lambda token: -law[token])[:2]
        processed[prefix] = enumeration.restricted(law, lambda token: token in best)  # noqa: B023
    return dataclasses.replace(
        setting, world=dataclasses.replace(setting.world, q=processed, told=raw)
    )


def one_number_for_two_positions(monkeypatch, setting):
    """PEARL's release (smart-lty/ParallelSpeculativeDecoding): neighbours share a uniform."""
    original = verify_sampled.walk_row

    def walk_row(uniform, *rest):
        return original(uniform.at[1].set(uniform[0]), *rest)

    monkeypatch.setattr(verify_sampled, "walk_row", walk_row)
    return setting


def block_draws_with_a_number_that_tested(monkeypatch, setting):
    """The same in block verification: the next token is drawn with the last test's number."""
    original = verify_sampled.block_row

    def block_row(uniform, *rest):
        return original(uniform.at[0].set(uniform[-1]), *rest)

    monkeypatch.setattr(verify_sampled, "block_row", block_row)
    return setting


def siblings_tested_alone(monkeypatch, setting):
    """GSD's release (arXiv 2407.16207): all nodes are tested alone, the longest path wins."""

    def walk(keys, tree: DraftTree, law: Law, max_depth, replacement):
        del replacement
        lines = topology.lineages(tree, max_depth)
        depth, mask = topology.shape_of(tree, lines)
        up = jnp.maximum(tree.parents, ROOT)
        p, q = jax.nn.softmax(law.logits), jax.nn.softmax(tree.draft_logits)

        def of_token(law):
            at_parent = jnp.take_along_axis(law, up[..., None], axis=1)
            return jnp.take_along_axis(at_parent, tree.tokens[..., None], axis=2)[..., 0]

        uniform = categorical.uniforms(keys, tree.tokens.shape[1], p.dtype)
        matches = uniform[..., 0] * of_token(q) < of_token(p)
        nodes = jnp.arange(up.shape[1], dtype=jnp.int32)[None, :, None]
        children = jnp.any(tree.parents[:, None, :] == nodes, axis=-1)
        left = jnp.where(children[..., None], jnp.maximum(p - q, 0.0), p)
        left = jnp.where(jnp.any(left > 0, axis=-1, keepdims=True), left, p)
        wanted = categorical.draw(left, jnp.broadcast_to(uniform[:, :1], (*up.shape, 2)))
        return verify._longest(matches, wanted, tree, depth, mask, max_depth)

    monkeypatch.setattr(verify_sampled, "_walk", walk)
    return setting


def copies_of_a_prefix_drawn_apart(monkeypatch, setting):
    """GSD's fault in the target's own draws, and once ours: siblings with one token get a draw
    each, and the longest path wins."""

    def call(self, keys, tree, depth, mask, laws, max_depth):
        del self
        uniform = categorical.uniforms(keys, tree.tokens.shape[1], jnp.float32)
        wanted = verify.target_tokens(uniform, laws.everywhere())
        return verify._follow(wanted, tree, depth, mask, max_depth)

    monkeypatch.setattr(TargetSample, "__call__", call)
    return setting


def fixed_children_left_in_the_law(monkeypatch, setting):
    """Greedy multi-draft (arXiv 2502.18779) needs q without the fixed children."""
    original = verify_sampled._enter

    def enter(row, node):
        *place, _ = original(row, node)
        return *place, jax.nn.softmax(row.draft_logits[node])

    monkeypatch.setattr(verify_sampled, "_enter", enter)
    return setting


def fixed_children_tested_as_drawn(monkeypatch, setting):
    """deepseek-ai/DeepSpec#31: children picked greedily, tested with the ratio p/q."""
    original = verify_sampled._walk

    def walk(keys, tree, law, max_depth, replacement):
        tree = dataclasses.replace(tree, sampled=None)
        return original(keys, tree, law, max_depth, replacement)

    monkeypatch.setattr(verify_sampled, "_walk", walk)
    return setting


def block_forgets_the_fixed_node(monkeypatch, setting):
    """The same in block verification."""
    monkeypatch.setattr(verify_sampled, "_with_points", lambda tree, draft_logits: draft_logits)
    return setting


def bonus_of_another_temperature(monkeypatch, setting):
    """vllm-project/tpu-inference: tests and the bonus token process the logits differently."""
    original = verify_sampled._enter

    def enter(row, node):
        node, tried, target, draft = original(row, node)
        is_leaf = ~jnp.any((row.parents == node) & row.valid)
        return node, tried, jnp.where(is_leaf, jax.nn.softmax(2 * row.logits[node]), target), draft

    monkeypatch.setattr(verify_sampled, "_enter", enter)
    return setting


def greedy_rows_not_guarded(monkeypatch, setting):
    """vllm-project/tpu-inference#2860: greedy rows go through the test of sampled ones."""
    monkeypatch.setattr(
        verify_sampled, "_greedy", lambda law: jnp.zeros(law.logits.shape[:1], bool)
    )
    return setting


def draw_of_an_impossible_token(monkeypatch, setting):
    """A uniform of exactly 0 picks the first token, whatever its weight."""

    def invert(weights, uniform):
        ends = jnp.cumsum(weights, axis=-1)
        place = uniform * ends[..., -1]
        return jnp.argmax(ends >= place[..., None], axis=-1).astype(jnp.int32)

    monkeypatch.setattr(categorical, "_invert", invert)
    return setting


FAULTS = (
    (residual_not_renormalised, THREE),
    (residual_dropped, REJECTION),
    (residual_dropped, MIXED_NODES),
    (draft_law_not_renormalised, THREE),
    (draft_law_not_updated, THREE),
    (draft_law_updated_in_vain, TWO_REPLACED),
    (candidates_sorted_by_id, THREE),
    (unsure_proposal_dropped, REJECTION),
    (unsure_proposal_dropped, BLOCK),
    (told_the_raw_law, REJECTION),
    (told_the_raw_law, TWO_REPLACED),
    (one_number_for_two_positions, REJECTION),
    (one_number_for_two_positions, THREE),
    (block_draws_with_a_number_that_tested, BLOCK),
    (siblings_tested_alone, TWO_REPLACED),
    (copies_of_a_prefix_drawn_apart, WALK),
    (fixed_children_left_in_the_law, MIXED_NODES),
    (fixed_children_tested_as_drawn, MIXED_NODES),
    (
        block_forgets_the_fixed_node,
        setting(Block(), Shape(CHAIN.parents, (0, None, 0)), 3, enumeration.block),
    ),
    (bonus_of_another_temperature, REJECTION),
    (
        greedy_rows_not_guarded,
        setting(Rejection(), CHAIN, 3, enumeration.greedy, replacement=True, is_greedy=True),
    ),
    (draw_of_an_impossible_token, setting(MultiCandidate(), tree_of(2), 4, zeros=0.6)),
)


@pytest.fixture(autouse=True)
def _no_fault_outlives_its_test():
    yield
    enumeration.forget_programs()


@pytest.mark.parametrize(
    "setting", dict.fromkeys(s for _, s in FAULTS), ids=lambda setting: type(setting.rule).__name__
)
def test_without_a_fault(setting):
    report = setting.report()
    assert report.wrong == 0 and report.tv < 1e-12


@pytest.mark.parametrize(("plant", "setting"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_fault_is_seen(monkeypatch, plant, setting):
    report = plant(monkeypatch, setting).report()
    print(plant.__name__, type(setting.rule).__name__, report.wrong, report.points, report.tv)
    assert report.wrong > 0 or report.tv > 1e-6


def _laws_that_differ_by_rounding():
    """Pairs of float32 logits [R, 3]: p nowhere above q, token 0 impossible, p(1) just below q(1).

    A refusal of token 1 leaves nothing of p, which only rounding can do.
    """
    draw = np.random.default_rng(0)
    p = np.concatenate([np.full((20000, 1), -np.inf), draw.normal(size=(20000, 2))], axis=1)
    q = p + draw.normal(0, 3e-8, p.shape) * [0, 1, 1] + [0, 3e-8, 0]
    p, q = p.astype(np.float32), q.astype(np.float32)
    probs, draft_probs = np.asarray(jax.nn.softmax(p)), np.asarray(jax.nn.softmax(q))
    good = (probs <= draft_probs).all(axis=1) & (probs[:, 1] < draft_probs[:, 1])
    return p[good][:200], q[good][:200]


@pytest.mark.parametrize("planted", [False, True])
def test_residual_of_sum_zero(monkeypatch, planted):
    """Multi-candidate sampling's release (NJUNLP/MCSD) divides a zero residual by its sum: the law
    is NaN then, and what is drawn from it may be a token that the target rules out."""
    p, q = _laws_that_differ_by_rounding()
    assert len(p) == 200
    if planted:
        monkeypatch.setattr(verify_sampled, "_normalised", lambda w, otherwise: w / jnp.sum(w))
    rows = len(p)
    tree = DraftTree(
        np.tile(np.array([[2, 1]], np.int32), (rows, 1)),
        np.tile(np.array([[NO_PARENT, 0]], np.int32), (rows, 1)),
        np.ones((rows, 2), bool),
        np.stack([q, q], axis=1),
    )
    law = Law(np.stack([p, p], axis=1), np.zeros((rows,), bool))
    uniform = np.full((rows, 2), 1 - 2**-24, np.float32)
    enumeration.forget_programs()
    found = enumeration.run_rule(Rejection(), 1, uniform, tree, law)
    refused = np.asarray(found.length) == 1
    assert refused.sum() > 10  # the residual was asked for
    assert (np.asarray(found.next_token)[refused] == 0).any() == planted
