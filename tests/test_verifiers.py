"""Rules of verification by name: the engine's choice, and what it refuses."""

import dataclasses

import pytest

from ctc_spec_jax import recipes
from ctc_spec_jax.draft.small_lm import Drawn, SmallLM
from ctc_spec_jax.draft.stop import Never
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.verify import TargetSample
from ctc_spec_jax.verify_sampled import Block, MultiCandidate, Rejection
from tests.chats import letter_tokenizer
from tests.helpers import tiny_target

LM, PARAMS = tiny_target(num_layers=1)
CHAIN = SmallLM(LM, (1, 1), Drawn(), Never())
SIBLINGS = SmallLM(LM, (2, 1), Drawn(), Never())
FIXED = SmallLM(LM, (2, 1))


@pytest.mark.parametrize(
    ("drafter", "rule"), [(CHAIN, Block()), (SIBLINGS, MultiCandidate()), (FIXED, TargetSample())]
)
def test_the_default_suits_the_trees(drafter, rule):
    assert recipes.verifier("", drafter) == rule


def test_rules_that_do_not_suit_are_refused():
    assert recipes.verifier("rejection", CHAIN) == Rejection()
    with pytest.raises(InputError, match="expected drafts that are chains for block, found trees"):
        recipes.verifier("block", SIBLINGS)
    with pytest.raises(InputError, match="drawn from a stated law for rejection"):
        recipes.verifier("rejection", FIXED)
    with pytest.raises(InputError, match="expected one of target_sample, .*, found 'best'"):
        recipes.verifier("best", CHAIN)


def test_an_engine_uses_them():
    """Greedy rows of every rule give plain text; sampled rows of a seed differ by rule."""
    engine = Engine(LM, PARAMS, letter_tokenizer(), CHAIN, PARAMS)
    prompts, answers = [[3, 5, 1], [2]], {}
    for name in ("", "rejection", "block", "target_sample", "typical"):
        own = engine.with_verifier(name)
        both = own.generate(prompts, max_new_tokens=12, temperature=[0.0, 1.0], seed=3)
        answers[name] = [answer.tokens for answer in both]
    plain = engine.plain().generate(prompts[:1], max_new_tokens=12)[0].tokens
    assert all(found[0] == plain for found in answers.values())
    assert engine.plain().verifier == TargetSample()
    assert dataclasses.replace(engine, verifier=Block()).plain().verifier == TargetSample()
