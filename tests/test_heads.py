"""Heads on the last hidden state: exact in the loop, best trees, the loss, no step out of place.

Shape letters: B rows, T tokens, A anchors, K heads, V vocabulary.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctc_spec_jax import folders, recipes, sharding
from ctc_spec_jax.chunked_head import chunked_token_log_probs
from ctc_spec_jax.decode import Loop, run_round, start
from ctc_spec_jax.draft.anchors import sample_anchors
from ctc_spec_jax.draft.heads import head_of, log_probs
from ctc_spec_jax.draft.heads_loss import DIVERGENCES, HeadsLoss
from ctc_spec_jax.draft.mlp_speculator import MLPSpeculatorConfig, MLPSpeculatorNetwork
from ctc_spec_jax.draft.training import Loss, Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.decoder import output_logits
from ctc_spec_jax.tree import best_paths, topology
from ctc_spec_jax.types import DraftContext, DraftTree
from ctc_spec_jax.verify import Greedy
from tests.helpers import VOCAB, make_request, plain_text, ragged_prompts, run, tiny_target

NEW, HEADS, NODES = 20, 3, 9

CASES = {
    "medusa": ("medusa", "product", Shape(layers=2, frames=HEADS)),
    "medusa-static": ("medusa", "static", Shape(preset="published", frames=HEADS)),
    "hydra": ("hydra", "beam", Shape(layers=2, frames=HEADS)),
    "hydra-own": ("hydra", "beam", Shape(preset="published", frames=HEADS)),
    "mlp_speculator": ("mlp_speculator", "beam", Shape(frames=HEADS, width=24)),
    "mlp_speculator-tied": ("mlp_speculator", "beam", Shape(preset="tied", frames=HEADS)),
}
DECODED = ["medusa-static", "hydra", "mlp_speculator"]
DYNAMIC = ["medusa", "hydra", "mlp_speculator", "mlp_speculator-tied"]


@pytest.fixture(scope="module")
def setting():
    lm, params = tiny_target(num_layers=1)
    prompts, lengths = ragged_prompts(7, (4, 9, 1, 6))
    return lm, params, prompts, lengths, *plain_text(lm, params, prompts, lengths, NEW)


def drafter_of(lm, name, nodes=NODES, depth=HEADS):
    method, tree, shape = CASES[name]
    recipe = recipes.find(method)
    return recipe.drafter(recipe.network(lm.config, shape), nodes, depth, tree)


def random_params(drafter, seed=3):
    """Parameters far from fresh ones, which draft the same token over and over."""
    params = drafter.init_params(jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    return {
        name: x + 0.3 * jax.random.normal(key, x.shape)
        for key, (name, x) in zip(keys, params.items(), strict=True)
    }


def rows_of(truth, lengths):
    """A training batch of prompts and answers, every token but the first a label."""
    index = np.arange(truth.shape[1])[None]
    real = index < (np.asarray(lengths) + NEW)[:, None]
    places = np.where(real, index, 0).astype(np.int32)
    batch = {"tokens": truth, "segments": real.astype(np.int32), "positions": places}
    return {name: jnp.asarray(x) for name, x in (batch | {"trained": real}).items()}


def fitted(loss, params, batch, rate, steps=40):
    """Parameters after some steps on the very text that will be decoded."""
    update = optax.adam(rate)

    def step(carry, key):
        draft_params, state = carry
        keys = jax.random.split(key, len(batch["tokens"]))
        grads = jax.grad(lambda p: loss.loss(p, params, batch, keys)[0])(draft_params)
        change, state = update.update(grads, state)
        return (optax.apply_updates(draft_params, change), state), None

    @jax.jit
    def run_steps(draft_params):
        carry = draft_params, update.init(draft_params)
        return jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), steps))[0][0]

    with jax.numpy_dtype_promotion("standard"):
        return run_steps(loss.drafter.init_params(jax.random.key(0)))


@pytest.fixture(scope="module")
def fits(setting):
    """Fitted parameters by name of a case, made once."""
    lm, params, _, lengths, _, truth = setting
    rows = rows_of(truth, lengths)
    weights = Loss(labels=HEADS, decay=1.0, chunk=64)

    def fit(name):
        return fitted(HeadsLoss(lm, drafter_of(lm, name), weights, 8), params, rows, 5e-2)

    return functools.cache(fit)


@pytest.mark.parametrize("name", DECODED)
def test_any_parameters_equal_plain_and_fitted_ones_are_faster(setting, fits, name):
    lm, params, prompts, lengths, plain, _ = setting
    drafter = drafter_of(lm, name)
    given = (prompts, lengths, NEW)
    result = run(lm, params, drafter, random_params(drafter), *given)
    np.testing.assert_array_equal(result.tokens, plain)
    good = fits(name)
    result = run(lm, params, drafter, good, *given)
    np.testing.assert_array_equal(result.tokens, plain)
    assert (np.asarray(result.stats.rounds) < 0.75 * NEW).all()


def context_of(params, truth, length):
    """What a drafter sees when ``length`` int32 [B] tokens are committed."""
    request = make_request(len(truth), 1)
    return DraftContext(params, jnp.asarray(truth), length, None, request)


EVERY = np.array(list(itertools.product(range(VOCAB), repeat=HEADS)), np.int32)
"""Every path of three tokens: the third is where a head reads a token of another path first."""


def enumerated(drafter, draft_params, params, feature, pending):
    """Log-probabilities [B, 17**3, 3] of every path and its beginnings, as training has them."""
    shape = len(feature), len(EVERY)
    index = jnp.broadcast_to(jnp.asarray(EVERY)[None], (*shape, HEADS))
    first = jnp.broadcast_to(pending[:, None, None], (*shape, 1))
    before = jnp.concatenate([first, index[..., :-1]], axis=-1)
    wide = jnp.broadcast_to(feature[:, None], (*shape, feature.shape[1]))
    outputs = drafter.outputs(draft_params, params, wide, before)
    head = drafter.output_head(draft_params, params)
    laws = [log_probs(outputs[:, :, k], head_of(head, k)) for k in range(HEADS)]
    each = [jnp.take_along_axis(laws[k], index[..., k : k + 1], axis=-1) for k in range(HEADS)]
    return jnp.cumsum(jnp.concatenate(each, axis=-1), axis=-1)


def paths_of(tree, row):
    """Token paths of the valid nodes below the root."""
    parents, tokens = np.asarray(tree.parents[row]), np.asarray(tree.tokens[row])
    found = []
    for node in np.flatnonzero(np.asarray(tree.valid[row]))[1:]:
        path = []
        while node > 0:
            path.insert(0, int(tokens[node]))
            node = parents[node]
        found.append(tuple(path))
    return found


@functools.cache
def passes_of(lm, name):
    """A drafter, and a program of its two passes: what decoding has, and what training has."""
    drafter = drafter_of(lm, name, nodes=24)

    @jax.jit
    def both(params, draft_params, batch, length, shift, fault):
        places = batch["tokens"], batch["segments"], batch["positions"]
        final, taps = lm.packed_hidden(params, *places, drafter.taps)
        before = jnp.maximum(length - 1, 0)[:, None, None]
        head_input = jnp.take_along_axis(final, before, axis=1)[:, 0]
        loss = HeadsLoss(lm, drafter, Loss(), 1)
        anchors = length[:, None] + shift
        feature = loss.features(params, taps, anchors, batch["positions"])[:, 0]
        pending = jnp.take_along_axis(batch["tokens"], length[:, None] + fault, axis=1)[:, 0]
        scores = enumerated(drafter, draft_params, params, feature, pending)
        context = context_of(params, batch["tokens"], length)
        state = drafter.init(draft_params, context, taps)
        tree = drafter.propose(draft_params, state, context, None)
        return tree, state, head_input, feature, scores

    return drafter, both


def check_passes(setting, name, shift=0, fault=0):
    """Trees in decoding are the most probable paths under what training computes.

    ``shift`` moves the place in training; ``fault`` gives head 1 the token that it predicts.
    """
    lm, params, _, _, _, truth = setting
    drafter, both = passes_of(lm, name)
    draft_params = random_params(drafter)
    if "own_heads" in draft_params:  # laws sharp enough for long paths
        draft_params["own_heads"] *= 3
    length = jnp.asarray([3, 8, 0, 5], jnp.int32)
    batch = rows_of(truth, np.full(4, truth.shape[1] - NEW))
    moved = np.int32(shift), np.int32(fault)
    tree, state, head_input, feature, scores = both(params, draft_params, batch, length, *moved)
    expected = jnp.where((length > 0)[:, None], head_input, 0)
    np.testing.assert_allclose(state, expected, rtol=1e-4, atol=1e-5)
    topology.check(tree, drafter.max_depth, vocab_size=VOCAB)
    assert tree.draft_logits is None
    np.testing.assert_allclose(state, feature, rtol=1e-4, atol=1e-5)
    branches = []
    for row, score in enumerate(np.asarray(scores)):
        of = {}
        for path, values in zip(EVERY.tolist(), score, strict=True):
            of |= {tuple(path[: k + 1]): value for k, value in enumerate(values)}
        best = sorted(of, key=lambda path, of=of: -of[path])[:23]
        assert sorted(paths_of(tree, row)) == sorted(best)
        branches += [len({path[:2] for path in best if len(path) == HEADS})]
    assert max(branches) > 1  # else no head would have read the tokens of several paths


@pytest.mark.parametrize("name", DYNAMIC)
def test_tree_is_the_most_probable_paths_under_the_training_pass(setting, name):
    check_passes(setting, name)


def test_a_step_out_of_place_is_found(setting):
    with pytest.raises(AssertionError, match="Not equal"):
        check_passes(setting, "hydra", shift=1)
    with pytest.raises(AssertionError, match="At index"):
        check_passes(setting, "hydra", fault=1)


@dataclasses.dataclass(frozen=True)
class Stale:
    """A planted fault: the hidden state of the pending token, whatever was accepted after it."""

    inner: Any

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def commit(self, params, state, context, output, acceptance):
        first = dataclasses.replace(acceptance, length=jnp.ones_like(acceptance.length))
        return self.inner.commit(params, state, context, output, first)


def test_state_after_a_round_is_that_of_a_prompt(setting, fits):
    """The hidden state that a round keeps is the one of the last accepted node."""
    lm, params, prompts, lengths, _, truth = setting
    drafter = drafter_of(lm, "mlp_speculator")
    every: tuple[Any, ...] = drafter, Stale(drafter)
    request = make_request(len(prompts), NEW)
    batch = rows_of(truth, np.full(4, truth.shape[1] - NEW))

    @jax.jit
    def both(params, draft_params):
        loops = [Loop(lm, d, Greedy(), NEW) for d in every]
        state = start(loops[0], params, draft_params, prompts, lengths, request)
        after = [run_round(loop, params, draft_params, state, request) for loop in loops]
        places = batch["tokens"], batch["segments"], batch["positions"]
        _, taps = lm.packed_hidden(params, *places, drafter.taps)
        context = context_of(params, truth, after[0].length)
        expected = drafter.init(draft_params, context, taps)
        return after[0].length, expected, *(state.drafter for state in after)

    length, expected, found, stale = both(params, fits("mlp_speculator"))
    assert (length > np.asarray(lengths)).any()  # a draft was accepted
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)
    with pytest.raises(AssertionError, match="Not equal"):
        np.testing.assert_allclose(stale, expected, rtol=2e-4, atol=1e-4)


def reference(lm, params, drafter, draft_params, batch, keys, weights, anchors):
    """The loss, one anchor and one head at a time, every document in a row of its own."""
    heads, width = min(weights.labels, HEADS), batch["tokens"].shape[1]
    sample = jax.jit(sample_anchors, static_argnums=(2, 3))
    found, labels, lengths = sample(keys, batch, anchors, heads)
    head = drafter.output_head(draft_params, params)

    @jax.jit
    def laws(text, place, known):
        final, taps, _ = lm.hidden(params, text[None], jnp.full((1,), width), drafter.taps)
        newest = drafter.feature(params, taps[0][:, place - 1][:, None])
        newest = jnp.where(place > 0, newest, 0)
        outputs = drafter.outputs(draft_params, params, newest, known[None, None])
        drafted = [log_probs(outputs[:, :, k], head_of(head, k))[0, 0] for k in range(heads)]
        return output_logits(params, final[0]), drafted

    batch, found, labels, lengths = jax.device_get((batch, found, labels, lengths))
    assert (np.take_along_axis(batch["positions"], found, axis=1) == 0).any()
    rows = [], [], []  # per anchor: cost, right, divergences
    for row, place in np.ndindex(found.shape):
        n, count = int(found[row, place]), int(lengths[row, place])
        if not count:
            continue
        begin = n - int(batch["positions"][row, n])
        text = np.roll(batch["tokens"][row], -begin)
        known = np.pad(text, (0, heads))[n - begin : n - begin + heads]
        target, drafted = laws(text, np.int32(n - begin), known)
        cost, right, apart = np.zeros(heads), np.zeros(heads), np.zeros((len(DIVERGENCES), heads))
        for k in range(count):
            label, q_log = text[n - begin + k + 1], np.asarray(drafted[k], np.float64)
            assert label == int(labels[row, place, k])
            cost[k], right[k] = -q_log[label], np.argmax(q_log) == label
            logits = np.asarray(target[n - begin + k], np.float64), q_log
            p, q = (np.exp(x / weights.temperature) for x in logits)
            p, q = p / p.sum(), q / q.sum()
            m = (p + q) / 2
            kl = [np.sum(a * np.log(a / b)) for a, b in ((p, q), (q, p), (p, m), (q, m))]
            apart[:, k] = kl[0], kl[1], (kl[2] + kl[3]) / 2, np.abs(p - q).sum() / 2
        for into, value in zip(rows, (cost, right, apart), strict=True):
            into.append(value)
    cost, right, apart = (np.mean(x, axis=0) for x in rows)
    decay = weights.decay ** np.arange(heads)
    decay = decay / decay.sum()
    metrics = dict(zip(DIVERGENCES, apart, strict=True))
    total = weights.cross_entropy * np.sum(decay * cost)
    total += sum(getattr(weights, name) * np.sum(decay * x) for name, x in metrics.items())
    prefix = np.mean(np.cumprod(rows[1], axis=1), axis=0)
    named = {"loss_at": cost, "accuracy_at": right, "prefix_at": prefix}
    return total, len(rows[0]), metrics | named


@pytest.mark.parametrize("name", ["medusa-static", "hydra"])
def test_loss_equals_a_slow_reference(setting, name):
    """Packed documents, gaps, short ends, a chunk that does not divide; the target made smooth."""
    lm, params, *_ = setting
    params = params | {"head": params["head"] * 0.1}
    drafter = drafter_of(lm, name)
    draft_params = random_params(drafter)
    tokens = jax.random.randint(jax.random.key(8), (2, 12), 0, VOCAB)
    segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(7)], [*range(9), 0, 0, 0]], jnp.int32)
    trained = (segments > 0) & (jnp.arange(12)[None] != 7)
    batch = dict(tokens=tokens, segments=segments, positions=positions, trained=trained)
    keys = jax.random.split(jax.random.key(2), 2)
    each = dict(zip(DIVERGENCES, (0.3, 0.2, 0.7, 0.4), strict=True))
    weights = Loss(labels=8, cross_entropy=0.6, temperature=1.7, decay=0.8, chunk=4, **each)
    loss = HeadsLoss(lm, drafter, weights, 9, remat=True)
    found, count, metrics = jax.jit(loss.loss)(draft_params, params, batch, keys)
    total, number, named = reference(
        lm, params, drafter, draft_params, batch, keys, weights, anchors=9
    )
    assert int(count) == number
    np.testing.assert_allclose(found, total, rtol=2e-4)
    assert metrics.keys() == named.keys()
    for metric, value in named.items():
        np.testing.assert_allclose(metrics[metric], value, rtol=5e-4, atol=1e-5, err_msg=metric)


@pytest.mark.parametrize("shape", [(7, 11), (3, 7, 11)])
def test_chunked_label_log_probs(shape):
    """Values and gradients are those of whole logits."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (5, 3, 7)), jax.random.normal(keys[1], shape)
    labels = jax.random.randint(keys[2], (5, 3), 0, 11)
    weight = jnp.arange(15.0).reshape(5, 3)

    def whole(hidden, head):
        logits = jnp.einsum("akd,dv->akv" if head.ndim == 2 else "akd,kdv->akv", hidden, head)
        law = jax.nn.log_softmax(logits)
        label = jnp.take_along_axis(law, labels[..., None], axis=-1)[..., 0]
        return jnp.sum(weight * label), jnp.argmax(logits, -1) == labels

    def chunked(hidden, head):
        label, best = chunked_token_log_probs(hidden, head, labels, 2)
        return jnp.sum(weight * label), best

    def graded(function):
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(hidden, head)

    results = graded(whole), graded(chunked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *results)


def test_impossible_and_broken_laws_make_valid_trees():
    """-inf, NaN, fewer paths than nodes, certain tokens: a well-formed tree, and what is left."""
    law = jnp.full((2, 5), -jnp.inf).at[0, 3].set(0.0).at[1, 1].set(jnp.nan).at[1, 4].set(-0.5)
    build = jax.jit(lambda laws: best_paths.most_probable(laws, jnp.int32(2), 8, 2))
    for laws in (law, jnp.full((2, 5), jnp.nan), jnp.zeros((2, 5))):
        found = build(laws)
        tree = DraftTree(*(x[None] for x in found))
        topology.check(tree, 2, vocab_size=5)
        if laws is law:
            assert paths_of(tree, 0) == [(3,), (3, 4)]
        assert int(tree.tokens[0, 0]) == 2


def test_half_of_the_last_state_is_the_hidden_state():
    """The published weights, norm and gelu replaced by a rescaling to their mean square, 1/2.

    Over 64 states of width 256 the share is within 0.05 of one half but for 1 seed in 1000.
    """
    config = MLPSpeculatorConfig(256, 50, heads=4, inner=256, taps=(0,), scale_input=1)
    network = MLPSpeculatorNetwork(config)

    @jax.jit
    def share():
        state = jax.random.normal(jax.random.key(0), (1, 64, 256)) * 3
        tokens = jax.random.randint(jax.random.key(1), (4, 1, 64), 0, 50)
        params = network.init(jax.random.key(2), state)
        state = part = jnp.asarray(network.apply(params, state, method="start"))
        for k in range(4):
            both = jnp.concatenate([state, part, 0 * part], axis=1)
            known = jnp.tile(tokens[k], (1, 3))
            mixed = jnp.asarray(network.apply(params, k, both, known, method="mix"))
            whole, only, rest = jnp.split(mixed, 3, axis=1)
            scale = jnp.sqrt(0.5 / jnp.mean(jnp.square(whole), axis=-1, keepdims=True))
            state, part = whole * scale, (only - rest) * scale
        return jnp.mean(jnp.square(part)) / jnp.mean(jnp.square(state))

    assert abs(float(share()) - 0.5) < 0.05


def test_a_beam_of_one_is_the_greedy_chain(setting):
    lm, params, _, _, _, truth = setting
    drafter = dataclasses.replace(drafter_of(lm, "hydra"), beam=1)
    draft_params = random_params(drafter)
    state = jax.random.normal(jax.random.key(5), (4, lm.config.width))

    @jax.jit
    def both(params, draft_params, state):
        context = context_of(params, truth, jnp.asarray([3, 8, 0, 5], jnp.int32))
        tree = drafter.propose(draft_params, state, context, None)
        outputs = drafter.outputs(
            draft_params, params, state[:, None], tree.tokens[:, None, :HEADS]
        )
        return tree, jnp.argmax(log_probs(outputs[:, 0], params["head"]), axis=-1)

    tree, chain = both(params, draft_params, state)
    np.testing.assert_array_equal(tree.tokens[:, 1 : HEADS + 1], chain)
    assert tree.valid[:, : HEADS + 1].all() and not tree.valid[:, HEADS + 1 :].any()
    np.testing.assert_array_equal(tree.parents[:, 1 : HEADS + 1], [[0, 1, 2]] * 4)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_and_places_of_matrices(setting, name):
    """Types hold in bfloat16, and every matrix is cut along both axes of a mesh."""
    lm, params, _, lengths, _, truth = setting
    drafter = drafter_of(lm, name)
    low = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    fresh = jax.eval_shape(lambda: drafter.init_params(jax.random.key(0)))
    loss = HeadsLoss(lm, drafter, Loss(forward_kl=1.0), 4, jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 4)
    value, _, _ = jax.eval_shape(loss.loss, fresh, low, rows_of(truth, lengths), keys)
    assert value.dtype == jnp.float32
    small = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), fresh)
    state = jax.ShapeDtypeStruct((4, lm.config.width), jnp.bfloat16)
    length = jnp.zeros((4,), jnp.int32)
    tree = jax.eval_shape(
        lambda p, t, s: drafter.propose(p, s, context_of(t, truth, length), None), small, low, state
    )
    assert tree.tokens.shape == (4, NODES) and tree.tokens.dtype == jnp.int32
    mesh = jax.sharding.AbstractMesh((1, 2, 2), sharding.MESH_AXES)
    for key, x in fresh.items():
        # An odd vocabulary divides into nothing.
        shape = tuple(64 if size == VOCAB else size for size in x.shape)
        cut = sharding.spec(mesh, sharding.parameter_axes(key, shape), shape)
        matrix = x.size > 4 * lm.config.width
        assert ({"fsdp", "tensor"} <= set(cut)) == matrix, (key, cut)


class Tokenizer:
    """As much of a tokenizer as a drafter folder asks for."""

    def get_vocab(self):
        return {str(i): i for i in range(VOCAB)}


@pytest.mark.parametrize("name", CASES)
def test_folders_and_arithmetic(setting, name, tmp_path):
    """A folder gives back the drafter and its parameters; products are the sizes of matrices."""
    lm = setting[0]
    drafter = drafter_of(lm, name)
    method, tree, _ = CASES[name]
    params = random_params(drafter)
    record = ("folder", Tokenizer(), {"command": "test"})
    folders.save_drafter(tmp_path / "d", method, drafter, params, *record)
    found, back = folders.load_drafter(tmp_path / "d", lm, Tokenizer(), nodes=NODES, tree=tree)
    assert found == drafter and back.keys() == params.keys()
    for key, value in params.items():
        np.testing.assert_array_equal(back[key], value)
    config, kinds = drafter.config, ("blocks", "mix", "states", "state", "heads")
    sizes = {key: x.size for key, x in params.items() if key.split("_")[-1] in kinds}
    if getattr(config, "tied", 0):
        sizes = {
            key: size * (HEADS - 1 if key == "states" else HEADS) for key, size in sizes.items()
        }
        sizes["first_state"] //= HEADS
    shared = 0 if "own_heads" in params else HEADS * config.width * VOCAB
    products = recipes.of(config).products(config, 99, 5)
    assert products == (5 * shared, 5 * sum(sizes.values()))


def test_bad_shapes_are_told(setting):
    lm = setting[0]
    deep = dataclasses.replace(lm.config, num_layers=5)
    assert recipes.find("hydra").network(deep, Shape()).taps == (4,)
    for shape in (Shape(preset="large"), Shape(taps=(0, 1))):
        with pytest.raises(InputError, match="expected"):
            recipes.find("hydra").network(lm.config, shape)
    with pytest.raises(InputError, match="tree: expected one of product, static, found 'beam'"):
        drafter = drafter_of(lm, "medusa")
        recipes.find("medusa").drafter(drafter.config, 9, 3, "beam")
    with pytest.raises(ValueError, match="max_depth: expected 1 to 3"):
        dataclasses.replace(drafter_of(lm, "medusa"), max_depth=4)
