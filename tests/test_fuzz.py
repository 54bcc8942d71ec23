"""A short run of the fuzzer, and planted faults that it must find.

Every fault is found by the first batches of the smaller tree, in a program traced anew.
"""

import dataclasses

import jax.numpy as jnp
import pytest

from ctc_spec_jax import accept, logits
from ctc_spec_jax.types import NO_TOKEN, STOPPED, STOPPED_BY_STRING
from tests import fuzz


@pytest.fixture(scope="module")
def guesser():
    """A program without faults that makes the text for the oracles."""
    return fuzz.Fuzzer(1).guesser


def test_every_request_decodes_like_the_reference(guesser):
    summary = fuzz.run(480, 1, guesser=guesser)
    assert not summary.failures, "\n".join([*summary.failures, summary.line()])
    # Otherwise the run would not be about what it is meant for.
    assert summary.requests == 480 and set(summary.finish) == set(fuzz.REASONS)
    assert summary.drafted > summary.tokens / 5
    assert summary.near_ties + summary.near_thresholds < 5


def test_the_command(monkeypatch, capsys):
    """As in the README: named methods, a line of figures, and the status of no difference."""
    monkeypatch.setattr("sys.argv", ["fuzz", "--requests", "8", "--methods", "prompt_lookup"])
    with pytest.raises(SystemExit) as ended:
        fuzz.main()
    assert ended.value.code == 0 and "differences 0" in capsys.readouterr().out


def test_a_method_decodes_like_the_reference(guesser):
    """Any row of ``recipes.RECIPES`` can stand in the place of the oracles."""
    loop, params = fuzz.of_method("ngram_pool")
    summary = fuzz.run(64, 2, loops=(loop,), guesser=guesser, drafters={loop: params})
    assert not summary.failures, "\n".join([*summary.failures, summary.line()])
    assert summary.requests == 64 and summary.drafted > summary.tokens / 20


def _cut(monkeypatch, change):
    """Plant a change of the result of ``accept.cut``; it gets the arguments and the result."""
    original = accept.cut

    def cut(tokens, acceptance, state, request):
        out = original(tokens, acceptance, state, request)
        return change(tokens, acceptance, state, request, out)

    monkeypatch.setattr(accept, "cut", cut)


def leak_past_a_stop(monkeypatch):
    """The token behind a stop is kept where the round has one."""

    def change(tokens, before, state, request, out):
        acceptance, finish, strings = out
        stopped = (finish == STOPPED) | (finish == STOPPED_BY_STRING)
        leaks = stopped & (acceptance.length > 0) & (acceptance.length < before.length)
        length = acceptance.length + leaks.astype(jnp.int32)
        return dataclasses.replace(acceptance, length=length), finish, strings

    _cut(monkeypatch, change)


def stop_string_state_lags(monkeypatch):
    """The last token of a round is not shown to the stop-string automata."""

    def change(tokens, before, state, request, out):
        acceptance, finish, strings = out
        states = accept._string_states(tokens, state, request)
        place = jnp.maximum(acceptance.length - 2, 0)[:, None]
        lagging = jnp.take_along_axis(states, place, axis=1)[:, 0]
        strings = jnp.where(acceptance.length > 1, lagging, state.stop_state)
        return acceptance, finish, strings

    _cut(monkeypatch, change)


def penalties_ignore_ancestors(monkeypatch):
    """Only committed tokens and the root are penalised."""
    original = logits._penalise

    def penalise(scores, sampling, known, before):
        line = jnp.full_like(before.line, NO_TOKEN)
        return original(scores, sampling, known, dataclasses.replace(before, line=line))

    monkeypatch.setattr(logits, "_penalise", penalise)


def stops_allowed_one_early(monkeypatch):
    """``min_new_tokens`` is off by one."""
    original = logits.process_logits

    def process(scores, request, known, before):
        before = dataclasses.replace(before, num_new=before.num_new + 1)
        return original(scores, request, known, before)

    monkeypatch.setattr(logits, "process_logits", process)


FAULTS = {
    leak_past_a_stop: "length, finish",
    stop_string_state_lags: "length, finish",
    penalties_ignore_ancestors: "expected",
    stops_allowed_one_early: "is ruled out",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_fault_is_found(monkeypatch, guesser, plant):
    plant(monkeypatch)
    summary = fuzz.run(128, 1, loops=(fuzz.SHALLOW,), guesser=guesser)
    assert any(FAULTS[plant] in failure for failure in summary.failures), summary.line()
