"""Drafters of one decoder layer: loss and passes against a slow reference, cache, trees, folders.

Shape letters: B rows, T tokens, A anchors, K tokens of a draft, V vocabulary, D width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import decode, folders, recipes, sharding
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.draft import sequential
from ctc_spec_jax.draft.anchors import sample_anchors
from ctc_spec_jax.draft.sequential_loss import SequentialLoss
from ctc_spec_jax.draft.training import Loss, Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.config import RopeScaling
from ctc_spec_jax.tree import best_paths
from ctc_spec_jax.types import DraftContext
from ctc_spec_jax.verify import Greedy
from tests.helpers import VOCAB, make_request, plain_text, ragged_prompts, run, tiny_target
from tests.test_heads import Tokenizer, fitted, random_params, rows_of

NEW, STEPS = 20, 3
METHODS = ("glide", "eagle")


@pytest.fixture(scope="module")
def setting():
    """A target of two layers, so that its last keys depend on more than one token."""
    lm, params = tiny_target()
    prompts, lengths = ragged_prompts(7, (4, 9, 1, 6))
    return lm, params, prompts, lengths, *plain_text(lm, params, prompts, lengths, NEW)


def drafter_of(lm, name, tree="", nodes=9, depth=STEPS) -> Any:
    recipe = recipes.find(name)
    return recipe.drafter(recipe.network(lm.config, Shape(frames=STEPS)), nodes, depth, tree)


def norm(x, scale):
    return x / np.sqrt(np.mean(np.square(x)) + 1e-6) * scale


def turned(x, place):
    """Heads [..., C] at a position, both halves rotated."""
    half = x.shape[-1] // 2
    angle = place / 10000.0 ** (np.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attended(query, keys, values):
    """Heads [K, G, C] over keys and values, lists of [K, C]."""
    scores = np.einsum("kgc,tkc->kgt", query, np.stack(keys)) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("kgt,tkc->kgc", weights, np.stack(values)).reshape(-1)


def reference(p, table, tokens, taps, kv, anchor: int, count: int):
    """Inputs of the LM head [count, D] of a draft at ``anchor``, one row after another, float64.

    ``kv``: keys and values of one target layer, [T, K, C] each, for the method that reads them.
    """
    p = {key: np.asarray(x, np.float64) for key, x in p.items()}
    group = p["qkv"].shape[2] - 2
    keys, values, found, hidden = [], [], [], np.zeros(table.shape[1])
    for place in range(anchor + count):
        x = np.asarray(table[tokens[place]], np.float64)
        if "context" in p:
            if place <= anchor:
                both = [norm(t[place - 1], s) for t, s in zip(taps, p["tap_norms"], strict=True)]
                hidden = np.concatenate(both) @ p["context"] * (place > 0)
            joined = [norm(x, p["start_norm"][0]), norm(hidden, p["start_norm"][1])]
            x = np.concatenate(joined) @ p["start"]
        fused = np.einsum("d,dkgc->kgc", norm(x, p["attention_norm"]), p["qkv"])
        keys.append(turned(fused[:, group], place))
        values.append(fused[:, group + 1])
        if place < anchor:
            continue
        x = x + attended(turned(fused[:, :group], place), keys, values) @ p["output"]
        if "cross_query" in p and anchor:
            query = np.einsum("d,dkgc->kgc", norm(x, p["cross_norm"]), p["cross_query"])
            x = x + attended(turned(query, place), *(a[:anchor] for a in kv)) @ p["cross_output"]
        gate, up = np.einsum("d,dhw->hw", norm(x, p["mlp_norm"]), p["gate_up"])
        hidden = x + (gate / (1 + np.exp(-gate)) * up) @ p["down"]
        found.append(norm(hidden, p["norm"]))
    return np.stack(found)


def heads_of(kv, layer: int, row: int):
    """Keys and values [T, K, C] of a row, from the layouts of the cache."""
    keys, values = (np.asarray(x[row], np.float64) for x in kv[layer])
    return keys.transpose(2, 0, 1), values.transpose(1, 0, 2)


def packed_batch():
    """Two documents in a row, one document and padding; a token that is no label."""
    tokens = jax.random.randint(jax.random.key(8), (2, 12), 0, VOCAB)
    segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(7)], [*range(9), 0, 0, 0]], jnp.int32)
    trained = (segments > 0) & (jnp.arange(12)[None] != 7)
    return dict(tokens=tokens, segments=segments, positions=positions, trained=trained)


def mean_cost(lm, params, drafter, draft_params, batch, keys, weights, anchors):
    """The loss, anchor by anchor, every document in a row of its own."""
    places, labels, lengths = jax.jit(sample_anchors, static_argnums=(2, 3))(
        keys, batch, anchors, STEPS
    )
    batch, places, lengths = jax.device_get((batch, places, lengths))
    assert (np.take_along_axis(batch["positions"], places, axis=1) == 0).any()
    alone = jax.jit(lambda *given: lm.hidden(params, *given, drafter.taps))
    head, table = (np.asarray(params[key], np.float64) for key in ("head", "embedding"))
    cost = []
    for row, index in np.ndindex(places.shape):
        n, count = int(places[row, index]), int(lengths[row, index])
        begin = n - int(batch["positions"][row, n])
        text = np.roll(batch["tokens"][row], -begin)
        final, taps, kv = jax.device_get(alone(text[None], np.full((1,), 12)))
        taps = [np.asarray(t[0], np.float64) for t in taps]
        given = taps, heads_of(kv, drafter.taps[-1], 0), n - begin, count
        outputs = reference(draft_params, table, text, *given) if count else np.zeros((0, 0))
        each = np.zeros(STEPS)
        for k, output in enumerate(outputs):
            logits = output @ head
            law = logits - np.log(np.sum(np.exp(logits)))
            label = text[n - begin + k + 1]
            assert label == labels[row, index, k]
            other = np.asarray(final[0, n - begin + k], np.float64) @ head
            p = np.exp(other) / np.sum(np.exp(other))
            each[k] = -weights.cross_entropy * law[label]
            each[k] += weights.forward_kl * np.sum(p * (np.log(p) - law))
        cost += [each] if count else []
    decay = weights.decay ** np.arange(STEPS)
    return np.sum(decay / decay.sum() * np.mean(cost, axis=0))


@pytest.mark.parametrize("name", METHODS)
def test_loss_equals_a_slow_reference(setting, name, monkeypatch):
    """Packed documents, gaps, short ends; anchors in more than one chunk."""
    monkeypatch.setattr(sequential, "ANCHORS_AT_A_TIME", 4)
    lm, params, *_ = setting
    params = params | {"head": params["head"] * 0.1}
    drafter = drafter_of(lm, name)
    draft_params, batch = random_params(drafter), packed_batch()
    keys = jax.random.split(jax.random.key(2), 2)
    weights = Loss(labels=8, cross_entropy=0.6, forward_kl=0.4, decay=0.8, chunk=4)
    loss = SequentialLoss(lm, drafter, weights, 9, remat=True)
    found, count, metrics = jax.jit(loss.loss)(draft_params, params, batch, keys)
    assert int(count) == 18 and metrics["loss_at"].shape == (STEPS,)
    expected = mean_cost(lm, params, drafter, draft_params, batch, keys, weights, 9)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def context_of(params, truth, length, cache=None, **fields):
    request = make_request(len(truth), 1, **fields)
    return DraftContext(params, jnp.asarray(truth), length, cache, request)


@functools.cache
def drafted(lm, name):
    """A drafter of greedy chains that state their law, and a program of a draft after a text."""
    drafter = drafter_of(lm, name, "sampled", 4)

    @jax.jit
    def draft(params, draft_params, truth, length):
        _, taps, kv = lm.hidden(params, truth[:, :-1], length, drafter.taps)
        context = context_of(params, truth, length, kv)
        state = drafter.init(draft_params, context, taps)
        tree = drafter.propose(draft_params, state, context, context.request.keys)
        return tree, taps, kv

    return drafter, draft


LENGTHS = jnp.asarray([3, 8, 0, 5], jnp.int32)


@pytest.mark.parametrize("name", METHODS)
def test_passes_of_decoding_are_those_of_training(setting, name):
    """The laws after every node of a drafted chain, against the reference."""
    lm, params, _, _, _, truth = setting
    drafter, draft = drafted(lm, name)
    draft_params = random_params(drafter)
    tree, taps, kv = jax.device_get(draft(params, draft_params, truth, LENGTHS))
    head, table = (np.asarray(params[key], np.float64) for key in ("head", "embedding"))
    for row, n in enumerate(LENGTHS.tolist()):
        text = np.concatenate([truth[row, :n], tree.tokens[row]])
        given = [t[row] for t in taps], heads_of(kv, drafter.taps[-1], row), n, STEPS
        laws = reference(draft_params, table, text, *given) @ head
        found = tree.draft_logits[row, :STEPS]
        np.testing.assert_allclose(found, laws, rtol=1e-3, atol=1e-3 * np.abs(laws).max())
        assert tree.tokens[row, 1:].tolist() == laws.argmax(-1).tolist()
    assert tree.valid.all() and drafter.states_law


@pytest.mark.parametrize("name", METHODS)
def test_training_raises_what_is_accepted(setting, name):
    """Any parameters give the text of plain decoding, trained ones in fewer rounds."""
    lm, params, prompts, lengths, plain, truth = setting
    drafter = drafter_of(lm, name)
    before = drafter.init_params(jax.random.key(0))
    loss = SequentialLoss(lm, drafter, Loss(labels=STEPS, decay=1.0, chunk=64), 8)
    after = fitted(loss, params, rows_of(truth, lengths), 2e-2)
    rounds = []
    for draft_params in (before, after):
        result = run(lm, params, drafter, draft_params, prompts, lengths, NEW)
        np.testing.assert_array_equal(result.tokens, plain)
        rounds.append(int(result.stats.rounds.sum()))
    assert rounds[1] < 0.6 * rounds[0], rounds


@dataclasses.dataclass(frozen=True)
class OffThePath:
    """A planted fault: the features of the first nodes of the tree, whichever were accepted."""

    inner: Any

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def commit(self, params, state, context, output, acceptance):
        path = jnp.broadcast_to(
            jnp.arange(acceptance.path.shape[1], dtype=jnp.int32)[None], acceptance.path.shape
        )
        return self.inner.commit(
            params, state, context, output, dataclasses.replace(acceptance, path=path)
        )


def test_state_after_rounds_and_a_new_turn_is_that_of_a_prompt(setting):
    """Of features too, which only the target has; also after a shorter text was extended."""
    lm, params, prompts, lengths, *_ = setting
    drafter = drafter_of(lm, "eagle")
    draft_params = random_params(drafter)
    request = make_request(len(prompts), NEW)
    keep, new = jnp.asarray([2, 5, 1, 3], jnp.int32), jnp.asarray([[1, 2, 3]] * 4, jnp.int32)

    def fresh(params, tokens, length):
        _, taps, _ = lm.hidden(params, tokens[:, :-1], length, drafter.taps)
        return drafter.init(draft_params, context_of(params, tokens, length), taps)

    def rounds(loop, params):
        state = decode.start(loop, params, draft_params, prompts, lengths, request)
        return decode.advance(loop, params, draft_params, state, request, 6)

    @jax.jit
    def program(params):
        every: tuple[Any, ...] = drafter, OffThePath(drafter)
        loop, wrong = (Loop(lm, d, Greedy(), NEW) for d in every)
        state = rounds(loop, params)
        counts = jnp.full((4,), 3, jnp.int32)
        longer = decode.extend(loop, params, draft_params, state, keep, new, counts, request)
        pairs = [(s.length, s.drafter, fresh(params, s.tokens, s.length)) for s in (state, longer)]
        return pairs, rounds(wrong, params).drafter

    pairs, wrong = jax.device_get(program(params))
    assert (pairs[0][0] > lengths + 5).any(), "no draft was accepted"
    for length, found, expected in pairs:
        same(length, found, expected)
    with pytest.raises(AssertionError, match="Not equal"):
        same(pairs[0][0], wrong, pairs[0][2])


def same(length, found, expected):
    """Equal in the slots in use."""
    slots = found["text"][0][0].shape[3]
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        axis = 2 if one.shape[3] == slots else 1
        for row, n in enumerate(length):
            pair = (np.moveaxis(x[row], axis, 0)[:n] for x in (one, other))
            np.testing.assert_allclose(*pair, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_and_places_of_matrices(setting, name):
    """Types hold in bfloat16, and every matrix is cut along both axes of a mesh."""
    lm, params, _, lengths, _, truth = setting
    drafter = drafter_of(lm, name)
    low = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    fresh = jax.eval_shape(lambda: drafter.init_params(jax.random.key(0)))
    loss = SequentialLoss(lm, drafter, Loss(forward_kl=1.0), 4, jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 4)
    value, _, _ = jax.eval_shape(loss.loss, fresh, low, rows_of(truth, lengths), keys)
    assert value.dtype == jnp.float32
    small = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), fresh)
    given = low, small, truth, LENGTHS
    tree = jax.eval_shape(drafted(lm, name)[1], *given)[0]
    assert tree.tokens.dtype == jnp.int32 and tree.draft_logits.dtype == jnp.float32
    mesh = jax.sharding.AbstractMesh((1, 2, 2), sharding.MESH_AXES)
    for key, x in fresh.items():
        cut = sharding.spec(mesh, sharding.parameter_axes(key, x.shape), x.shape)
        matrix = x.size > 4 * lm.config.width
        assert ({"fsdp", "tensor"} <= set(cut)) == matrix, (key, cut)


@pytest.mark.parametrize("name", METHODS)
def test_folders_arithmetic_and_positions(setting, name, tmp_path):
    """A folder gives back the drafter; products are sizes of matrices; angles are the target's."""
    lm = setting[0]
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    config = dataclasses.replace(lm.config, rope_scaling=scaling)
    lm = dataclasses.replace(lm, config=config)
    drafter = drafter_of(lm, name)
    assert drafter.config.rope_scaling == scaling
    linear = dataclasses.replace(config, rope_scaling=RopeScaling("linear", 2.0))
    network = recipes.find(name).network(linear, Shape())
    assert network.rope_scaling == RopeScaling("linear", 2.0, 0.0, 0.0, 0)
    assert recipes.find(name).network(setting[0].config, Shape()).rope_scaling == RopeScaling()
    params = random_params(drafter)
    folders.save_drafter(tmp_path / "d", name, drafter, params, "folder", Tokenizer(), {})
    found, back = folders.load_drafter(tmp_path / "d", lm, Tokenizer(), nodes=9)
    assert found == drafter and back.keys() == params.keys()
    sizes = {key: x.size for key, x in params.items() if x.ndim > 1 and "norm" not in key}
    c, heads = drafter.config, 32
    text = 7 * 2 * c.width * c.num_kv_heads * c.head_width + 7 * sizes.pop("context", 0)
    if "start" in sizes:
        text += 7 * sizes["start"]
    scores = heads * 7 * (2 if name == "glide" else 1)
    drafts = 5 * STEPS * (sum(sizes.values()) + scores)
    assert recipes.find(name).products(c, 7, 5) == (5 * STEPS * c.width * VOCAB, text + drafts)


def test_children_by_count():
    """Bounds on the children of each path, against a search through all of them."""
    law = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (3, 6)))
    level = best_paths.Level(jnp.asarray([0.0, -0.5, -1.0]), *jnp.zeros((2, 3), jnp.int32))
    counts = jnp.asarray([1, 3, 2], jnp.int32)
    found = jax.jit(best_paths.expand, static_argnums=2)(level, law, 9, counts)
    of = {}
    for path, count in enumerate([1, 3, 2]):
        for token in np.argsort(-np.asarray(law[path]))[:count].tolist():
            of[path, token] = float(level.score[path] + law[path, token])
    real = np.asarray(found.score) > -np.inf
    pairs = zip(np.asarray(found.parent)[real], np.asarray(found.token)[real], strict=True)
    assert [(int(a), int(b)) for a, b in pairs] == sorted(of, key=lambda pair: -of[pair])


@pytest.mark.parametrize("name", METHODS)
def test_bad_shapes_are_told(setting, name):
    lm, recipe = setting[0], recipes.find(name)
    for shape in (Shape(layers=2), Shape(preset="large"), Shape(width=8)):
        with pytest.raises(InputError, match="drafter: expected no preset, width 0"):
            recipe.network(lm.config, shape)
    with pytest.raises(InputError, match="tree: expected one of .*sampled, found 'beam'"):
        drafter_of(lm, name, "beam")
    drafter = drafter_of(lm, name)
    with pytest.raises(ValueError, match="max_depth: expected 1 to 8, found 9"):
        dataclasses.replace(drafter, max_depth=9)
    with pytest.raises(ValueError, match="num_nodes: expected 4 of a sampled chain, found 9"):
        dataclasses.replace(drafter, sampled=True)
    with pytest.raises(ValueError, match="steps: expected at least 1, found 0"):
        dataclasses.replace(drafter.config, steps=0)
    with pytest.raises(ValueError, match="taps: expected at least one target layer"):
        dataclasses.replace(drafter.config, taps=())
