"""Traps that public releases fell into: each has a test here, or one elsewhere that is named here.

Where a trap is a wrong rule, its test plants the fault and sees it found.
"""

import ast
import pathlib

import jax
import numpy as np
import pytest

from ctc_spec_jax import decode, recipes
from ctc_spec_jax.draft.small_lm import SmallLM
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.types import NO_PARENT, RUNNING, DraftTree, Law
from ctc_spec_jax.verify_sampled import MultiCandidate
from tests.chats import letter_tokenizer
from tests.helpers import make_request, ragged_prompts, tiny_target

ELSEWHERE = {
    "CTC drafter: gather indices of an earlier round": (
        "test_ctc_transform.py::test_layout_of_an_earlier_round_is_told_apart"
    ),
    "CTC drafter: positions not renumbered after the collapse": (
        "test_ctc_transform.py::test_faults_are_told_apart"
    ),
    "PEARL: neighbours share a uniform": "test_overlap.py::test_numbers_of_the_release_are_found",
    "OSD: loss one position late": "test_online.py::test_a_loss_one_place_late_is_found",
    "OSD: bonus tokens are stored": "test_online.py::test_only_corrections_are_stored_as_wrong",
    "OSD: a Jensen-Shannon divergence that is none": (
        "test_distillation.py::test_planted_faults_are_found"
    ),
    "OSD: a metric that is not the acceptance rate": (
        "test_small_lm_loss.py::test_other_measures_are_not_the_acceptance"
    ),
    "SpecDiff: laws of the moment of revealing": (
        "test_diffusion.py::test_laws_of_revealing_are_not_exact"
    ),
    "GSD: siblings accepted independently, longest path": (
        "test_gsd.py::test_lossy_mode_of_the_release_is_found_and_is_not_ours"
    ),
    "GLIDE: unreachable sampling branch": (
        "test_glide.py::test_release_unreachable_sampling_branch"
    ),
    "Ouroboros: tails never refresh the pool after a refusal": (
        "test_ouroboros.py::test_tails_are_corrected_after_refusals_too"
    ),
    "Ouroboros: pools shared across prompts": (
        "test_ouroboros.py::test_pools_are_not_shared_among_rows_or_requests"
    ),
    "MCSD: residual of sum zero": "test_rule_mutants.py::test_residual_of_sum_zero",
    "benchmarks: method and baseline take turns on the same prompts and caps": (
        "test_benchmark.py::test_decoders_take_turns"
    ),
}
"""Trap -> the test that is about it."""


@pytest.mark.parametrize("trap", ELSEWHERE)
def test_the_trap_has_its_test(trap):
    file, _, name = ELSEWHERE[trap].partition("::")
    tree = ast.parse((pathlib.Path(__file__).parent / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


LM, PARAMS = tiny_target(num_layers=1)
PERFECT = SmallLM(LM, (1, 1, 1))
"""Drafts by the target itself: every draft is right."""


@pytest.fixture(scope="module")
def engine():
    return Engine(LM, PARAMS, letter_tokenizer(), PERFECT, PARAMS)


def test_rounds_are_counted_from_one():
    """CTC drafter: its tokens per round divide by the index of the last round, one too few."""
    tokens, lengths = ragged_prompts(0, (3, 7))
    request = make_request(2, 10)
    loop = decode.Loop(LM, PERFECT, recipes.verifier("greedy", PERFECT), 10)
    state = decode.start(loop, PARAMS, PARAMS, tokens, lengths, request)
    advance, passes = jax.jit(decode.advance, static_argnums=0), np.zeros(2, np.int32)
    while np.any(running := np.asarray(state.finish) == RUNNING):
        state = advance(loop, PARAMS, PARAMS, state, request, 1)
        passes += running
    assert state.stats.rounds.tolist() == passes.tolist() == [3, 3]  # 4 + 4 + 2 tokens


def test_tokens_past_a_stop_are_not_counted(engine):
    """PEARL: no check for stops, so that benchmarks count what follows them."""
    whole = engine.generate([[3, 5, 1]], max_new_tokens=12)[0]
    stop = whole.tokens[5]
    first = whole.tokens.index(stop)
    cut = engine.generate([[3, 5, 1]], max_new_tokens=12, stop_token_ids=[stop])[0]
    assert cut.tokens == whole.tokens[: first + 1]
    assert sum(cut.emitted) == len(cut.tokens) == first + 1
    assert cut.accepted_length == len(cut.tokens) / cut.rounds


def test_method_and_baseline_read_the_same_prompt(engine):
    """CTC drafter: the baseline's prompts end in a space that the method's lack."""
    texts = ["abc", "abc "]
    for text in texts:
        ours, theirs = (one.encode([text])[0] for one in (engine, engine.plain()))
        np.testing.assert_array_equal(ours, theirs)
    given = [np.asarray(engine.encode([text])[1])[0] for text in texts]
    assert given[0] != given[1], "expected a tokenizer that tells the two apart"


def test_rules_leave_what_they_are_given():
    """MCSD: probabilities are changed in place, so that a second look finds others."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(3, 4, 5)).astype(np.float32)
    parents = np.tile(np.asarray([[NO_PARENT, 0, 0, 1]], np.int32), (3, 1))
    tokens = draw.integers(0, 5, (3, 4)).astype(np.int32)
    tree = DraftTree(tokens, parents, np.ones((3, 4), bool), draw.normal(size=(3, 4, 5)))
    law = Law(logits, np.zeros((3,), bool))
    before = jax.tree.map(np.copy, (tree, law))
    depth = np.tile(np.asarray([[0, 1, 1, 2]], np.int32), (3, 1))
    keys = jax.random.split(jax.random.key(0), 3)
    mask = np.ones((3, 4, 4), bool)
    found = [MultiCandidate()(keys, tree, depth, mask, law, 2) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, (tree, law), before)
    jax.tree.map(np.testing.assert_array_equal, *found)
