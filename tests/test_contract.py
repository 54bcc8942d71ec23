"""What every drafting method keeps: one suite over all rows of ``recipes.RECIPES``.

A method is built for a target of one layer by its own recipe, with fresh parameters. A new one
needs no line here, unless ``TINY`` has better parameters or ``MORE`` other trees for it.

The sampled cases decode 2,892 times each kind of sampled rows of ``test_sampling``; four chi-square
tests at 1e-5 in each of three cases raise a false alarm with probability 1.2e-4. Seeds are fixed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import checkpoint, decode, folders, recipes
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.draft.small_lm import Drawn, SmallLM
from ctc_spec_jax.draft.stop import AdaEDL, Never
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.models import convert, kv_cache
from ctc_spec_jax.tree import topology
from ctc_spec_jax.types import Acceptance, DraftContext, DraftTree, TargetOutput
from ctc_spec_jax.verify import Greedy
from ctc_spec_jax.verify_sampled import Block, MultiCandidate, Rejection
from tests import test_sampling as sampling
from tests.chats import letter_tokenizer
from tests.helpers import VOCAB, make_request, plain_text, ragged_prompts, tiny_target

NODES, DEPTH, BUDGET = 10, 3, 8
LENGTHS = (1, 4, 9)
SHAPE = Shape(layers=1, frames=4)


def with_noise(params, key):
    """Parameters and standard normal numbers, on the host: no program for every shape."""
    leaves, tree = jax.tree.flatten(params)

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(leaves))
        return [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]

    return jax.device_get((params, jax.tree.unflatten(tree, draw(key))))


def nearly_target(drafter, key):
    """The target's own parameters and noise, so that drafts are often right but not always."""
    return jax.tree.map(lambda x, n: jnp.asarray(x * (1 + 0.2 * n)), *with_noise(target()[1], key))


def fresh(drafter, key):
    """What training starts from, its matrices moved and enlarged: drafts depend on the text.

    Matrices that start at 0 would make all heads equal, and which of equally good paths stay in a
    tree would be a matter of rounding.
    """

    def moved(x, noise):
        return jnp.asarray(8 * (x + 0.02 * noise) if x.ndim > 1 else x)

    return jax.tree.map(moved, *with_noise(drafter.init_params(key), key))


TINY = dict.fromkeys(recipes.of_language_models(), nearly_target)
"""Parameters by method; ``fresh`` for all others."""

MORE = {"small_lm": ("greedy-adaptive",), "diffusion": ("conditional",)}
"""Further ways to build trees by method; every method is tested with its default."""

HISTORY = {("ngram_pool", ""), ("small_lm", "greedy-adaptive"), ("pearl", ""), ("ouroboros", "")}
"""Methods whose drafts depend on what was drafted before, not on the text alone."""

LEARNERS = {"ouroboros"}
"""Methods that learn while they draft, so that none of their drafts is that of a fresh start; what
theirs have to be is in their own tests."""

CASES = [(name, tree) for name in recipes.RECIPES for tree in ("", *MORE.get(name, ()))]


@functools.cache
def target():
    return tiny_target(num_layers=1)


@functools.cache
def made(name: str, tree: str):
    """Drafter and parameters."""
    recipe = recipes.find(name)
    drafter = recipe.drafter(recipe.network(target()[0].config, SHAPE), NODES, DEPTH, tree)
    return drafter, TINY.get(name, fresh)(drafter, jax.random.key(5))


@functools.cache
def prompts():
    """Prompts [B, T] with room for the answers, lengths [B], plain answers [B, BUDGET]."""
    tokens, lengths = ragged_prompts(0, LENGTHS)
    tokens = np.pad(tokens, ((0, 0), (0, BUDGET + 1)))
    return tokens, lengths, plain_text(*target(), tokens, lengths, BUDGET)[0]


def request(depths=DEPTH, batch: int = len(LENGTHS), budget: int = BUDGET):
    return make_request(batch, budget, draft_depth=np.full((batch,), depths, np.int32))


@dataclasses.dataclass(frozen=True)
class Given:
    """A drafter whose next draft is known; so that a program has its arithmetic once."""

    drafter: Any
    tree: DraftTree

    def __getattr__(self, name):
        return getattr(self.drafter, name)

    def propose(self, params, state, context, keys):
        return self.tree


@functools.partial(jax.jit, static_argnums=0)
def trace(loop, params, draft_params, tokens, lengths, request):
    """Answers, the draft of every round and the text before it, of ``BUDGET`` rounds."""
    begun = decode.start(loop, params, draft_params, tokens, lengths, request)

    def one(state, _):
        context = DraftContext(params, state.tokens, state.length, state.cache, request)
        keys, _ = decode.round_keys(request, state)
        tree = loop.drafter.propose(draft_params, state.drafter, context, keys)
        given = dataclasses.replace(loop, drafter=Given(loop.drafter, tree))
        after = decode.round_of(given)(given, params, draft_params, state, request)
        return after, (tree, state.tokens, state.length)

    state, rounds = jax.lax.scan(one, begun, None, length=BUDGET)
    return decode.output(loop, state), *rounds, begun


def run(name: str, tree: str, tokens, lengths, request):
    drafter, draft_params = made(name, tree)
    loop = Loop(target()[0], drafter, Greedy(), BUDGET)
    return jax.device_get(trace(loop, target()[1], draft_params, tokens, lengths, request))


@functools.cache
def first_run(name: str, tree: str):
    """The drafts and texts of every round, and the answers."""
    tokens, lengths, _ = prompts()
    return run(name, tree, tokens, lengths, request())[:-1]


def start_of(name: str):
    """State before the first round."""
    tokens, lengths, _ = prompts()
    return jax.tree.map(jnp.asarray, run(name, "", tokens, lengths, request())[-1])


def drafts(trees: DraftTree, which) -> set[tuple[int, ...]]:
    """The drafted paths of one tree; equally good nodes may come in any order."""
    tokens, parents, valid = (np.asarray(a)[which] for a in dataclasses.astuple(trees)[:3])
    paths = {0: ()}
    for node in np.flatnonzero(valid)[1:]:
        paths[node] = (*paths[parents[node]], int(tokens[node]))
    return set(paths.values())


def rows_of(texts):
    """Prompts as in ``prompts``, of lists of tokens."""
    tokens = np.zeros_like(prompts()[0][: len(texts)])
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, np.asarray([len(text) for text in texts], np.int32)


@pytest.mark.parametrize(("name", "tree"), CASES)
def test_greedy_output_is_that_of_plain_decoding(name, tree):
    output, trees, _, _ = first_run(name, tree)
    assert output.tokens.tolist() == prompts()[2].tolist()
    assert np.asarray(trees.valid).sum() > BUDGET * len(LENGTHS), "nothing was ever drafted"


@pytest.mark.parametrize(("name", "tree"), CASES)
def test_trees_keep_their_contract(name, tree):
    drafter, _ = made(name, tree)
    _, trees, tokens, lengths = first_run(name, tree)
    assert 1 < drafter.num_nodes <= NODES and 1 <= drafter.max_depth <= DEPTH
    for index in range(BUDGET):
        one = jax.tree.map(lambda x, index=index: x[index], trees)
        assert one.tokens.shape == (len(LENGTHS), drafter.num_nodes)
        topology.check(one, drafter.max_depth, vocab_size=VOCAB)
        pending = np.take_along_axis(tokens[index], lengths[index][:, None], axis=1)[:, 0]
        assert one.tokens[:, 0].tolist() == pending.tolist()


@pytest.mark.parametrize(("name", "tree"), CASES)
def test_rows_are_independent_and_a_second_call_compiles_nothing(name, tree):
    before, trees, _, _ = first_run(name, tree)
    tokens, _, _ = prompts()
    compiled = trace._cache_size()
    other = np.random.default_rng(1).integers(0, VOCAB, tokens.shape).astype(np.int32)
    other[2] = tokens[2]
    asked = dataclasses.replace(request(), max_new_tokens=np.asarray([2, 0, BUDGET], np.int32))
    after, trees_after, *_ = run(name, tree, other, np.asarray([7, 2, 9], np.int32), asked)
    assert trace._cache_size() == compiled
    assert after.tokens[2].tolist() == before.tokens[2].tolist()
    for index in range(int(before.stats.rounds[2])):
        assert drafts(trees, (index, 2)) == drafts(trees_after, (index, 2))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_without_jit(name):
    """Tracing decides nothing: a small draft made operation by operation is that of a program."""
    large, draft_params = made(name, "")
    drafter = recipes.find(name).drafter(large.config, DEPTH + 1, DEPTH, "")
    state = start_of(name)
    context = DraftContext(target()[1], state.tokens, state.length, state.cache, request())
    given = draft_params, state.drafter, context, context.request.keys
    with jax.disable_jit():
        tree = drafter.propose(*given)
    expected = jax.jit(drafter.propose)(*given)
    for row in range(len(LENGTHS)):
        assert drafts(tree, row) == drafts(expected, row)


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name not in LEARNERS])
def test_a_longer_prompt_continues_a_shorter_one(name):
    """A start from part of a prompt and a commit of the rest are a start from all of it."""
    drafter, draft_params = made(name, "")
    tokens, lengths, _ = prompts()
    rows, whole = np.asarray([1, 2]), lengths[[1, 2]]
    tree = resumed(drafter, draft_params, tokens[rows], whole - 1 - np.asarray([2, 3]), whole)
    for row in (0, 1):
        assert drafts(tree, row) == drafts(first_run(name, "")[1], (0, rows[row]))


@functools.partial(jax.jit, static_argnums=0)
def resumed(drafter, draft_params, tokens, kept, lengths):
    """The draft after ``kept`` committed tokens and a commit up to the last of ``lengths``."""
    lm, params = target()
    kept = kept.astype(jnp.int32)
    _, taps, kv = lm.hidden(params, tokens, lengths, drafter.taps)
    known = jnp.pad(tokens, ((0, 0), (0, DEPTH + 2)))
    cache = kv_cache.fill(kv, known.shape[1] - 1)
    context = DraftContext(params, known, kept, cache, request(batch=tokens.shape[0]))
    state = drafter.init(draft_params, context, taps)
    path = jnp.broadcast_to(jnp.arange(DEPTH + 1, dtype=jnp.int32)[None], (len(kept), DEPTH + 1))
    new = tuple(jnp.take_along_axis(x, (kept[:, None] + path)[..., None], axis=1) for x in taps)
    output = TargetOutput(jnp.zeros((*path.shape, VOCAB)), new, None)
    accepted = Acceptance(path, lengths - 1 - kept, jnp.zeros_like(lengths))
    state = drafter.commit(draft_params, state, context, output, accepted)
    context = dataclasses.replace(context, length=lengths - 1)
    return drafter.propose(draft_params, state, context, context.request.keys)


@pytest.mark.parametrize(("name", "tree"), CASES)
def test_a_round_that_accepts_nothing_is_a_plain_step(name, tree):
    """Its draft is that of a fresh start from the text with the target's token."""
    tokens, lengths, plain = prompts()
    output, trees, texts, ends, _ = run(name, tree, tokens, lengths, request(depths=0))
    assert output.tokens.tolist() == plain.tolist()
    assert output.stats.rounds.tolist() == [BUDGET] * len(LENGTHS)
    if name in LEARNERS:
        return
    again = rows_of([text[: end + 1] for text, end in zip(texts[3], ends[3], strict=True)])
    _, fresh_trees, *_ = run(name, tree, *again, request())
    for row in range(len(LENGTHS)):
        assert drafts(trees, (3, row)) == drafts(fresh_trees, (0, row))


@pytest.mark.parametrize(("name", "tree"), [case for case in CASES if case not in HISTORY])
def test_drafts_depend_on_the_text_alone(name, tree):
    """What a drafter carries on over accepted tokens is what it makes of the same text afresh."""
    _, trees, texts, ends = first_run(name, tree)
    for index in (1, 2):
        again = rows_of([text[: n + 1] for text, n in zip(texts[index], ends[index], strict=True)])
        _, fresh_trees, *_ = run(name, tree, *again, request())
        for row in range(len(LENGTHS)):
            assert drafts(trees, (index, row)) == drafts(fresh_trees, (0, row))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_parameters_return_from_disk(name, tmp_path):
    drafter, params = made(name, "")
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(drafter.init_params, jax.random.key(0))
    )
    if params:
        checkpoint.save_params(tmp_path / "orbax", params)
        equal(checkpoint.load_params(tmp_path / "orbax", params), params)
    lm, tokenizer = target()[0], letter_tokenizer()
    recipe = recipes.find(name)
    if recipe.language_model:
        convert.save_target(tmp_path / "drafter", drafter.lm, params)
        tokenizer.save_pretrained(tmp_path / "drafter")
    else:
        folders.save_drafter(tmp_path / "drafter", name, drafter, params, "tiny", tokenizer, {})
    loaded, found = folders.load_drafter(tmp_path / "drafter", lm, tokenizer, NODES, method=name)
    if recipe.language_model:  # such a folder gives no depth: drafts are as deep as nodes allow
        drafter = recipe.drafter(recipe.network(lm.config, SHAPE), NODES, NODES - 1, "")
    assert loaded == drafter
    equal(found, params)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@dataclasses.dataclass(frozen=True)
class Peeking(Drawn):
    """PLANTED FAULT: drops a token for its own probability, after it was drawn."""

    def __call__(self, keys, law, nodes, count):
        tokens, real = super().__call__(keys, law, nodes, count)
        probs = jnp.take_along_axis(jax.nn.softmax(law.logits, axis=-1), tokens, axis=2)
        return tokens, real & (probs >= 0.12)


@functools.cache
def small():
    """A drafter that is not the target, with laws as wide as the target's."""
    shape = dict(num_heads=2, num_kv_heads=1, head_width=8, mlp_width=16)
    return tiny_target(seed=2, num_layers=1, width=16, **shape)


STOP = AdaEDL(first_threshold=0.32, step=0.5)
"""At these temperatures; steps so large that the threshold moves within three tokens."""

CALLS = 6


def chain(draw, stop):
    return SmallLM(small()[0], (1, 1, 1), draw, stop)


SAMPLED = {
    "rejection, adaptive": (chain(Drawn(), STOP), Rejection()),
    "block, adaptive": (chain(Drawn(), STOP), Block()),
    "siblings": (SmallLM(small()[0], (2, 1), Drawn(), Never()), MultiCandidate()),
    "PLANTED": (chain(Peeking(), Never()), Rejection()),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_joint_law_of_sampled_drafts(name):
    counts, drafted, offered = sampling.count(*SAMPLED[name], small()[1], CALLS)
    assert drafted > 0 and (counts[2] > 0).sum() == 1
    if "adaptive" in name:
        assert offered[0] > offered[1] > offered[2] > 0, "expected drafts of all lengths"
    p_values = sampling.p_values(counts)
    assert min(p_values) < 1e-5 if name == "PLANTED" else min(p_values) > 1e-5, p_values
