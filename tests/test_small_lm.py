"""A small language model as drafter: its law, its stops, its folder.

Equality with plain decoding, its cache over rounds and the joint law of sampled drafts are in
``test_contract``.
"""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import decode, folders
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.draft.small_lm import Drawn, SmallLM
from ctc_spec_jax.draft.stop import AdaEDL, MaxProb, Never
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.decoder import output_logits
from ctc_spec_jax.types import NO_TOKEN, OUT_OF_BUDGET, STOPPED, DraftContext, Sampling
from ctc_spec_jax.verify_sampled import Rejection
from tests.chats import LETTERS, letter_tokenizer
from tests.helpers import VOCAB, make_request, ragged_prompts, tiny_target
from tests.reference import reference_scores

BATCH, CAPACITY = 3, 12
OPTIONS = (
    {"temperature": 6.0, "top_k": 5},
    {"temperature": 9.0, "top_p": 0.8, "min_p": 0.05, "bias": {2: 4.0}},
    {"temperature": 0.0, "bias": {3: -2.0}},
)


@functools.cache
def target():
    return tiny_target(num_layers=1)


def sampling() -> Sampling:
    """``OPTIONS`` as arrays, and penalties, which the draft's law leaves out."""

    def column(name, off, dtype=np.float32):
        return np.asarray([row.get(name, off) for row in OPTIONS], dtype)

    bias = np.zeros((BATCH, VOCAB), np.float32)
    for row, options in enumerate(OPTIONS):
        for token, value in options.get("bias", {}).items():
            bias[row, token] = value
    return Sampling(
        column("temperature", 0.0),
        column("top_k", 0, np.int32),
        column("top_p", 1.0),
        column("min_p", 0.0),
        bias=bias,
        repetition_penalty=np.full((BATCH,), 1.3, np.float32),
    )


def request(**fields):
    return make_request(BATCH, CAPACITY, **fields)


def prompts():
    return ragged_prompts(4, [2, 5, 7])


@functools.partial(jax.jit, static_argnums=0)
def first_draft(drafter, params, tokens, lengths, request):
    """The draft after a prompt; no target is needed for it."""
    known = jnp.pad(tokens, ((0, 0), (0, CAPACITY)))
    context = DraftContext((), known, lengths - 1, None, request)
    state = drafter.init(params, context, (jnp.zeros((*tokens.shape, 1)),))
    return drafter.propose(params, state, context, request.keys)


def test_stated_law_is_that_of_the_options():
    """At the root and at both inner nodes, of siblings too; leaves have none."""
    (lm, params), (tokens, lengths) = target(), prompts()
    asked = request(sampling=sampling())
    drafter = SmallLM(lm, (2, 1), Drawn(), Never())
    tree = first_draft(drafter, params, tokens, lengths, asked)
    prefixes = [(row, node) for row in range(BATCH) for node in (0, 1, 2)]
    texts = np.zeros((len(prefixes), 8), np.int32)
    ends = np.asarray([lengths[row] + (node > 0) for row, node in prefixes], np.int32)
    for text, (row, node) in zip(texts, prefixes, strict=True):
        text[: lengths[row]] = tokens[row, : lengths[row]]
        if node:
            text[lengths[row]] = tree.tokens[row, node]
    hidden = jax.jit(lambda *given: output_logits(params, lm.hidden(params, *given)[0]))
    raw = np.asarray(hidden(texts, ends))
    for index, (row, node) in enumerate(prefixes):
        expected = reference_scores(raw[index, ends[index] - 1], [], [], **OPTIONS[row])
        found = np.asarray(tree.draft_logits[row, node])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    best = np.argsort(-np.asarray(tree.draft_logits[2, 0]))[:2]
    assert tree.tokens[2, 1:3].tolist() == best.tolist()  # the greedy row


def test_stops_that_never_or_always_stop():
    """An endless patience is no rule at all, bit for bit; no patience leaves one token."""
    (lm, params), (tokens, lengths) = target(), prompts()
    asked = request(sampling=warm())
    trees = [
        first_draft(SmallLM(lm, (1, 1, 1), Drawn(), stop), params, tokens, lengths, asked)
        for stop in (Never(), AdaEDL(first_threshold=-jnp.inf), MaxProb(2.0))
    ]
    jax.tree.map(np.testing.assert_array_equal, trees[0], trees[1])
    assert trees[0].valid.all()
    assert trees[2].valid.tolist() == [[True, True, False, False]] * BATCH
    assert trees[2].tokens[:, :2].tolist() == trees[0].tokens[:, :2].tolist()


def warm() -> Sampling:
    return Sampling(np.asarray([5.0, 8.0, 0.0], np.float32))


RULE = AdaEDL(first_threshold=0.3, step=0.8)


@functools.partial(jax.jit, static_argnums=0)
def rounds(loop, params, draft_params, tokens, lengths, request):
    """The state before every round, and how many tokens were drafted in it."""
    state = decode.start(loop, params, draft_params, tokens, lengths, request)

    def one(state, _):
        after = decode.run_round(loop, params, draft_params, state, request)
        return after, (state, jnp.sum(after.stats.drafted - state.stats.drafted, axis=1))

    return jax.lax.scan(one, state, None, length=7)[1]


def decoded(draft_params, budgets, stop: int = NO_TOKEN):
    (lm, params), (tokens, lengths) = target(), prompts()
    stops = np.asarray([[NO_TOKEN], [NO_TOKEN], [stop]], np.int32)
    asked = make_request(BATCH, budgets, stops, sampling=warm())
    loop = Loop(lm, SmallLM(lm, (1, 1, 1), Drawn(), RULE), Rejection(), CAPACITY)
    return jax.device_get(rounds(loop, params, draft_params, tokens, lengths, asked))


def test_the_target_as_its_own_drafter_is_always_right():
    """Drawn tokens of p = q are accepted, and so are the greedy row's."""
    states, _ = decoded(target()[1], [CAPACITY] * BATCH)
    last = jax.tree.map(lambda x: x[-1], states.stats)
    assert last.accepted.tolist() == last.drafted.tolist() and last.drafted[:, 1].min() > 0
    assert last.emitted.sum(1).tolist() == [CAPACITY] * BATCH


def test_threshold_follows_what_every_row_accepts():
    """Against the rule in NumPy; a row that found its stop token or its end keeps its state."""
    draft_params = tiny_target(seed=3, num_layers=1)[1]
    states, _ = decoded(draft_params, CAPACITY)
    stop = int(states.tokens[-1, 2, prompts()[1][2] + 1])  # the second of the greedy row
    states, drafted = decoded(draft_params, [CAPACITY, 5, CAPACITY], stop)
    assert states.finish[-1, 1:].tolist() == [OUT_OF_BUDGET, STOPPED]
    accepted = np.diff(states.length, axis=0) - 1
    rate, threshold = np.full(BATCH, 0.9), np.full(BATCH, 0.3)
    for index in range(6):
        for row in np.flatnonzero((accepted[index] >= 0) & (drafted[index] > 0)):
            rate[row] = 0.5 * rate[row] + 0.5 * accepted[index, row] / drafted[index, row]
            if rate[row] < 0.9:
                threshold[row] += 0.1 * 0.8
            elif accepted[index, row] < 3:
                threshold[row] -= 0.1 * 0.8
        stop = states.drafter["stop"]
        np.testing.assert_allclose(stop.rate[index + 1], rate, rtol=1e-5)
        np.testing.assert_allclose(stop.threshold[index + 1], threshold, rtol=1e-5)
    assert {1, 3} <= set(drafted.ravel().tolist()) and len(set(threshold)) > 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target folder; as a drafter folder it is the target itself."""
    folder = tmp_path_factory.mktemp("small") / "model"
    convert.save_target(folder, *target())
    letter_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_of_a_language_model_drafts(folder):
    engine = Engine(*target(), letter_tokenizer())
    drafting = engine.with_drafter(str(folder), 4)
    assert drafting.drafter == SmallLM(target()[0], (1, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, drafting.draft_params, engine.params)
    trees = {"siblings": (4, 1), "sampled": (1,) * 8, "greedy-adaptive": (1,) * 8}
    for tree, branching in trees.items():
        assert engine.with_drafter(str(folder), 9, tree=tree).drafter.branching == branching
    with pytest.raises(InputError, match="tree: expected one of greedy, .* found 'prefix'"):
        engine.with_drafter(str(folder), 9, tree="prefix")
    with pytest.raises(InputError, match="tree nodes: expected at least 2, found 1"):
        engine.with_drafter(str(folder), 1)


def test_pairs_that_do_not_fit(folder, tmp_path):
    lm, tokenizer = target()[0], letter_tokenizer()
    padded = tiny_target(num_layers=1)[0]
    padded = dataclasses.replace(
        padded, config=dataclasses.replace(padded.config, vocab_size=VOCAB + 3)
    )
    message = "drafter vocab_size: expected 20 as in the target, rows of padding counted, found 17"
    with pytest.raises(InputError, match=message):
        folders.load_drafter(folder, padded, tokenizer)
    other = shutil.copytree(folder, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    assert f'"{LETTERS[-1]}"' in text
    (other / "tokenizer.json").write_text(text.replace(f'"{LETTERS[-1]}"', '"Z"'))
    with pytest.raises(InputError, match="drafter tokenizer: expected .* found"):
        folders.load_drafter(other, lm, tokenizer)


def test_methods_without_parameters_by_name():
    engine = Engine(*target(), letter_tokenizer())
    drafter = engine.with_method("prompt_lookup", 7, 3).drafter
    assert (drafter.num_nodes, drafter.max_depth) == (7, 3)
    with pytest.raises(InputError, match="method: expected one without parameters, found"):
        engine.with_method("small_lm", 4, 3)
    with pytest.raises(InputError, match="method: expected one of .* found 'oracle'"):
        engine.with_method("oracle", 4, 3)
