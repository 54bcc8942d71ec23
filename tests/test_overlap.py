"""Draft and target at the same time: tokens per round, laws, caches.

Equality with plain decoding of arbitrary requests is in ``test_fuzz``, the contract of drafters in
``test_contract``, two groups of devices in ``test_device_groups``. The statistical tests here are
two-sided at 7e-6 (4.5 standard errors) or chi-square tests at 1e-5: 3 + 3 x 4 + 4 of them, together
a false alarm with probability 2e-4. Seeds are fixed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import decode, overlap
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.draft.pearl import AheadLM
from ctc_spec_jax.draft.small_lm import Drawn, proposal_law
from ctc_spec_jax.models.decoder import output_logits
from ctc_spec_jax.overlap import Chain, Overlapped
from ctc_spec_jax.types import NO_TOKEN, OUT_OF_BUDGET, STOPPED, Sampling, TargetOutput
from ctc_spec_jax.verify import TargetSample
from ctc_spec_jax.verify_sampled import Block, Rejection
from tests.helpers import make_request, plain_text, ragged_prompts, tiny_target
from tests.test_sampling import p_value

WORDS = 4
"""V of the made-up laws."""


@dataclasses.dataclass(frozen=True)
class TableTarget:
    """A target whose law is that of the token before: ``params`` holds logits [V, V]."""

    vocab_size: int = WORDS

    def prefill(self, params, tokens, lengths, num_slots, taps):
        return (), ()

    def forward_tree(self, params, cache, length, tokens, positions, mask, taps=()):
        return TargetOutput(params[tokens], (), ())

    def commit(self, cache, kv, path, length):
        return cache


@dataclasses.dataclass(frozen=True)
class TableAhead:
    """The same as a drafter that works ahead."""

    max_depth: int
    taps: tuple[int, ...] = ()

    run_round = staticmethod(overlap.run_round)

    @property
    def num_nodes(self):
        return self.max_depth + 1

    def init(self, params, context, taps):
        batch = context.length.shape[0]
        return Overlapped((), overlap.nothing_pending(batch, self.max_depth, WORDS))

    def ahead(self, params, cache, seen, request):
        known = overlap.in_a_row(seen.root, seen.pending)
        last = jnp.take_along_axis(known, seen.pending.count[:, None], axis=1)[:, 0]
        tokens, laws = [], []
        for index in range(self.max_depth):
            keys = jax.vmap(jax.random.fold_in, (0, None))(seen.keys, index)
            laws.append(params[last])
            last = jax.vmap(jax.random.categorical)(keys, laws[-1]).astype(jnp.int32)
            tokens.append(last)
        count = jnp.full(last.shape, self.max_depth, jnp.int32)
        return Chain(jnp.stack(tokens, 1), count, jnp.stack(laws, 1)), cache


MOST, ROWS, ROUNDS = 5, 2048, 50


def table_decode(rule):
    """A program, traced anew, of tables and requests of ``ROWS`` rows."""
    loop = Loop(TableTarget(), TableAhead(MOST), rule, MOST * ROUNDS)

    @jax.jit
    def program(params, draft_params, request):
        prompts, lengths = jnp.zeros((ROWS, 1), jnp.int32), jnp.ones((ROWS,), jnp.int32)
        state = decode.start(loop, params, draft_params, prompts, lengths, request)
        state = decode.advance(loop, params, draft_params, state, request, ROUNDS)
        return decode.output(loop, state)

    def run(params, draft_params, depth: int, budget: int = MOST * ROUNDS, seed: int = 0):
        """Drafts of ``depth`` tokens."""
        sampling, depths = Sampling(np.ones((ROWS,), np.float32)), np.full((ROWS,), depth, np.int32)
        request = make_request(ROWS, budget, seed=seed, sampling=sampling, draft_depth=depths)
        return jax.device_get(program(params, draft_params, request))

    return run


@functools.cache
def by_rejection():
    return table_decode(Rejection())


def laws_of_rate(rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits of two laws, whatever came before, of which drafts are accepted at ``rate``."""
    both = np.full(WORDS, 1 / WORDS)
    p = rate * both + (1 - rate) * np.asarray([0.7, 0.3, 0, 0])
    q = rate * both + (1 - rate) * np.asarray([0, 0, 0.4, 0.6])
    assert abs(np.minimum(p, q).sum() - rate) < 1e-12
    return np.tile(np.log(p, dtype=np.float32), (WORDS, 1)), np.tile(
        np.log(q, dtype=np.float32), (WORDS, 1)
    )


@pytest.mark.parametrize(("rate", "depth"), [(0.3, 3), (0.7, 4), (0.9, 5)])
def test_tokens_per_round_are_those_of_the_closed_form(rate, depth):
    """1.09, 1.73 and 3.12; measured to half a percent or better."""
    emitted = by_rejection()(*laws_of_rate(rate), depth).stats.emitted[:, 15:ROUNDS]
    every_row = emitted.mean(axis=1)
    error = every_row.std() / ROWS**0.5
    full = rate**depth
    expected = (1 - full) / ((1 - rate) * (1 + rate - full))
    assert error < 0.005 * expected
    assert abs(every_row.mean() - expected) < 4.5 * error


DEPTH, NEW, CALLS = 3, 5, 8


@functools.cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return tuple(draw.normal(size=(WORDS, WORDS)).astype(np.float32) for _ in range(2))


def samples(run, params, draft_params):
    """Tokens [.., NEW] and which of them were drafted, of many decodes."""
    found = [run(params, draft_params, DEPTH, NEW, seed) for seed in range(CALLS)]
    tokens = np.concatenate([x.tokens[:, :NEW] for x in found])
    return tokens, np.concatenate([x.record.from_draft[:, :NEW] for x in found])


def pair_p_values(tokens, law) -> list[float]:
    """Of tokens i and i + 1, for every i; ``law`` [V, V] of a token after another."""
    place, values = law[0], []
    for left, right in zip(tokens.T, tokens.T[1:], strict=False):
        counts = np.zeros((len(law), len(law)))
        np.add.at(counts, (left, right), 1)
        values.append(p_value(counts, place[:, None] * law))
        place = place @ law
    return values


def softmax(logits):
    weights = np.exp(logits.astype(np.float64))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("rule", [Rejection(), Block(), TargetSample()])
def test_joint_law_of_consecutive_tokens(rule):
    params, draft_params = tables()
    run = by_rejection() if rule == Rejection() else table_decode(rule)
    tokens, drafted = samples(run, params, draft_params)
    assert 0.2 < drafted.mean() < 0.8
    assert min(pair_p_values(tokens, softmax(params))) > 1e-5


RATE = 0.6


def serial_p_values(drafted) -> list[float]:
    """Whether tokens i and i + 1 were accepted: independent at ``RATE``, at every place."""
    one = np.asarray([1 - RATE, RATE])
    values = []
    for left, right in zip(drafted.T, drafted.T[1:], strict=False):
        counts = np.zeros((2, 2))
        np.add.at(counts, (left.astype(int), right.astype(int)), 1)
        values.append(p_value(counts, one[:, None] * one))
    return values


def test_acceptances_are_independent():
    _, drafted = samples(by_rejection(), *laws_of_rate(RATE))
    assert min(serial_p_values(drafted)) > 1e-5


def test_numbers_of_the_release_are_found(monkeypatch):
    """PLANTED FAULT: the number that lets a row get going again tests the next token too."""
    original = overlap.round_keys

    def by_position(request, state):
        # The release seeds by the place of the tested token, after a switch by the place before.
        place = state.length + (state.drafter.pending.count == 0).astype(jnp.int32)
        return original(request, state)[0], jax.vmap(jax.random.fold_in)(request.keys, place)

    monkeypatch.setattr(overlap, "round_keys", by_position)
    params, draft_params = laws_of_rate(RATE)
    tokens, drafted = samples(table_decode(Rejection()), params, draft_params)
    assert min(serial_p_values(drafted)) < 1e-5
    assert min(pair_p_values(tokens, softmax(params))) < 1e-5


def test_laws_that_agree_and_laws_that_do_not_meet():
    """All drafts are accepted, M tokens in a round after the first; or none, one in a round."""
    params, _ = tables()
    same = by_rejection()(params, params, DEPTH, NEW)
    assert same.stats.emitted[:, :NEW].tolist() == [[1, DEPTH, NEW - 1 - DEPTH, 0, 0]] * ROWS
    assert same.record.from_draft[:, :NEW].all()
    apart = np.asarray([[0, 0, -np.inf, -np.inf], [-np.inf, -np.inf, 0, 0]], np.float32)
    none = by_rejection()(*(np.tile(law, (WORDS, 1)) for law in apart), DEPTH, NEW)
    assert none.stats.emitted[:, :NEW].tolist() == [[1] * NEW] * ROWS
    assert not none.record.from_draft.any()


CAPACITY = 14
LENGTHS = (1, 2, 3, 9)
"""Of prompts: three are no longer than a draft."""


@functools.cache
def target():
    return tiny_target(num_layers=1)


@functools.cache
def prompts():
    tokens, lengths = ragged_prompts(4, LENGTHS)
    return tokens, lengths, plain_text(*target(), tokens, lengths, CAPACITY)[0]


def drafter_params(quality: str):
    params = target()[1]
    if quality == "perfect":
        return params
    if quality == "never":
        return {**params, "head": -params["head"]}  # the least likely token
    noise, draw = {"often": 0.2, "seldom": 0.8}[quality], np.random.default_rng(3)

    def noisy(x):
        factor = 1 + noise * draw.normal(size=x.shape)
        return jnp.asarray((np.asarray(x) * factor).astype(np.float32))

    return jax.tree.map(noisy, params)


LOOP = Loop(target()[0], AheadLM(target()[0], DEPTH, Drawn()), Rejection(), CAPACITY)
begin = jax.jit(decode.start, static_argnums=0)
advance = jax.jit(decode.advance, static_argnums=0)
output = jax.jit(decode.output, static_argnums=0)
GREEDY = (0.0,) * 4


def ask(temperatures=GREEDY, depths=(99,) * 4, budgets=CAPACITY, stop: int = NO_TOKEN):
    fields = dict(
        sampling=Sampling(np.asarray(temperatures, np.float32)),
        draft_depth=np.asarray(depths, np.int32),
        stops=np.full((4, 1), stop, np.int32),
    )
    return make_request(4, budgets, **fields)


def states_of(draft_params, request, rounds: int = 1):
    """The state before every call, and the last one, of ``rounds`` rounds a call."""
    tokens, lengths, _ = prompts()
    weights = target()[1], draft_params
    states = [begin(LOOP, *weights, tokens, lengths, request)]
    while np.any(np.asarray(states[-1].finish) == 0):
        states.append(advance(LOOP, *weights, states[-1], request, np.int32(rounds)))
    return jax.device_get(states)


def answers(draft_params, request):
    return jax.device_get(output(LOOP, states_of(draft_params, request, CAPACITY)[-1]))


@pytest.mark.parametrize("quality", ["perfect", "often", "seldom", "never"])
def test_greedy_output_is_that_of_plain_decoding(quality):
    found = answers(drafter_params(quality), ask())
    assert found.tokens.tolist() == prompts()[2].tolist()
    rate = found.record.from_draft.mean()
    if quality == "perfect":
        assert found.record.from_draft.all()
        counts = [1, *[DEPTH] * 4, 1]
        assert found.stats.emitted[:, :6].tolist() == [counts] * 4
        assert found.stats.drafted.tolist() == found.stats.accepted.tolist() == [[6, 4, 4]] * 4
    elif quality == "never":
        assert rate == 0 and found.stats.rounds.tolist() == [CAPACITY] * 4
    else:
        assert (rate > 0.3) == (quality == "often") and 0.05 < rate < 0.9


def test_depths_budgets_and_stops():
    """A row of depth d drafts as a drafter of that depth; ends may lie inside a round."""
    plain = prompts()[2]
    params, depths = drafter_params("perfect"), np.asarray([0, 1, 2, 99])
    found = answers(params, ask(depths=depths))
    assert found.tokens.tolist() == plain.tolist()
    assert found.stats.emitted[:, 1].tolist() == [1, 1, 2, 3]
    assert found.record.from_draft[:, 0].tolist() == [False, True, True, True]
    for row, depth in enumerate(depths):
        assert not found.stats.drafted[row, depth:].any()
    budgets = np.asarray([1, 2, 3, 6])
    found = answers(params, ask(budgets=budgets))
    assert found.finish.tolist() == [OUT_OF_BUDGET] * 4
    assert found.lengths.tolist() == budgets.tolist()
    stop = int(plain[3, 5])  # of the row's third round, the second token
    found = answers(params, ask(stop=stop))
    for row in range(4):
        ends = np.flatnonzero(plain[row] == stop)
        length = ends[0] + 1 if len(ends) else CAPACITY
        assert found.tokens[row, :length].tolist() == plain[row, :length].tolist()
        assert found.lengths[row] == length
        assert found.finish[row] == (STOPPED if len(ends) else OUT_OF_BUDGET)
        assert found.stats.emitted[row].sum() == length == found.record.from_draft[row].sum()


WARM = (4.0, 0.0, 9.0, 6.0)


def test_how_rounds_are_shared_out_changes_nothing():
    """Bit for bit, of rows that draw and one that is greedy."""
    params, request = drafter_params("seldom"), ask(WARM)
    whole, pieces = states_of(params, request, CAPACITY), states_of(params, request, 1)
    jax.tree.map(
        np.testing.assert_array_equal, whole[-1].drafter.pending, pieces[-1].drafter.pending
    )
    for state in (whole[-1], pieces[-1]):
        assert state.stats.rounds.max() == len(pieces) - 1
    first, second = (output(LOOP, s[-1]) for s in (whole, pieces))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first.tokens[1].tolist() == prompts()[2][1].tolist()


def test_pending_drafts_come_from_the_laws_of_the_whole_text():
    """What the model's cache gives is what a pass over the text without a cache gives."""
    params, request = drafter_params("often"), ask(WARM)
    states = states_of(params, request)
    texts, wanted = [], []
    for state in states:
        for row in range(4):
            pending = jax.tree.map(lambda x, row=row: x[row], state.drafter.pending)
            text = [*state.tokens[row, : state.length[row] + 1], *pending.tokens[: pending.count]]
            texts.append(text)
            wanted += [
                (
                    len(texts) - 1,
                    len(text) - pending.count + i,
                    row,
                    pending.tokens[i],
                    pending.laws[i],
                )
                for i in range(pending.count)
            ]
    width = max(map(len, texts))
    padded = np.asarray([text + [0] * (width - len(text)) for text in texts], np.int32)
    lengths = np.asarray([len(text) for text in texts], np.int32)
    lm = target()[0]

    @jax.jit
    def laws(tokens, lengths, asked):
        hidden, _, _ = lm.hidden(params, tokens, lengths)
        return proposal_law(output_logits(params, hidden), asked).logits

    rows = np.resize(np.asarray(WARM, np.float32), len(texts))
    asked = make_request(len(texts), CAPACITY, sampling=Sampling(rows))
    found = np.asarray(laws(padded, lengths, asked))
    assert len(wanted) > 20 and len({row for _, _, row, *_ in wanted}) == 4
    for text, place, row, token, law in wanted:
        np.testing.assert_allclose(law, found[text, place - 1], rtol=1e-3, atol=1e-3)
        if WARM[row] == 0:
            assert token == found[text, place - 1].argmax()
