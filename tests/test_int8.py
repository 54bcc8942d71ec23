"""Targets whose matrices are in eight bits, against the same numbers widened beforehand."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import cli, demo, folders, recipes, sharding
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.models import convert, int8, layers
from ctc_spec_jax.models.decoder import DecoderLM, output_head, output_logits
from infer import made_up, precision, roofline, steps
from tests.helpers import VOCAB, plain_text, ragged_prompts, run, tiny_target

FAMILIES = [
    {},
    {"tied_embeddings": True},
    {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": True},
]


def widened(params):
    """Numbers that the eight bits stand for, as ordinary arrays."""

    def one(leaf):
        narrow = isinstance(leaf, int8.Int8)
        return leaf.values.astype(leaf.scale.dtype) * leaf.scale if narrow else leaf

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, int8.Int8))


@pytest.mark.parametrize("kind", [np.float32, jnp.bfloat16])
def test_rounding(kind):
    """To the nearest multiple, one step size per output, alike in numpy and JAX."""
    kernel = np.random.default_rng(0).normal(size=(12, 3, 5)).astype(kind)
    kernel[:, 1, 2] = 0
    kernel[:, 2] *= np.asarray(100, kind)
    both = [int8.rounded(given) for given in (kernel, jnp.asarray(kernel))]
    assert all(map(np.array_equal, *map(jax.tree.leaves, both)))
    for found in both:
        values, scale = np.asarray(found.values), np.asarray(found.scale)
        assert values.dtype == np.int8 and scale.dtype == np.float32
        assert found.ndim == 3 and found.size == kernel.size and scale.shape == (1, 3, 5)
        exact = kernel.astype(np.float64)
        assert (np.abs(values * scale.astype(np.float64) - exact) <= 0.5001 * scale).all()
        peaks = np.abs(values).max(axis=0)
        assert peaks[1, 2] == 0 and (np.delete(peaks.reshape(-1), 5 + 2) == 127).all()


@pytest.mark.parametrize("rows", [(1, 1), (2, 3)])
def test_products(rows):
    """The scale of every output, in the dtype that was asked for; one row alone too."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(*rows, 16)).astype(np.float32)
    kernel = int8.rounded(jnp.asarray(draw.normal(size=(16, 2, 3)) * [[1], [50]], jnp.float32))
    exact = np.tensordot(x.astype(np.float64), np.asarray(widened(kernel), np.float64), 1)
    found = layers.project(jnp.asarray(x), kernel)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    narrow = layers.project(jnp.asarray(x, jnp.bfloat16), kernel)
    wide = layers.project(jnp.asarray(x, jnp.bfloat16), kernel, jnp.float32)
    assert (narrow.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    assert jnp.array_equal(narrow, wide.astype(jnp.bfloat16))  # rounded once, after the scale
    head, some = int8.rounded(jnp.asarray(draw.normal(size=(16, 9)), jnp.float32)), np.array([7, 4])
    found = layers.project(jnp.asarray(x), int8.columns(head, some))
    exact = layers.project(jnp.asarray(x), head)[..., some]
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", FAMILIES)
def test_logits(changes):
    """Those of the rounded weights; the embedding that is looked up in is not rounded."""
    lm, params = tiny_target(**changes)
    narrow = int8.rounded_params(params)
    assert narrow["embedding"] is params["embedding"] and isinstance(narrow["head"], int8.Int8)
    tokens, lengths = ragged_prompts(3, (4, 9))

    @jax.jit
    def logits(params):
        return output_logits(params, lm.hidden(params, tokens, lengths)[0])

    found, exact = logits(narrow), logits(widened(narrow))
    assert float(jnp.abs(exact).max()) > 1
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-3)
    assert not np.allclose(found, logits(params), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["ctc", "ctc_labels", "eagle", "medusa", "glide", "small_lm"])
def test_drafts_change_nothing(method):
    """Greedy text with drafts, which read the rounded LM head, is the rounded target's own."""
    lm, params = tiny_target(num_layers=1)
    narrow = int8.rounded_params(params)
    recipe = recipes.find(method)
    drafter = recipe.drafter(recipe.network(lm.config, Shape(layers=1, frames=4)), 6, 3, "")
    draft_params = drafter.init_params(jax.random.key(2))
    if recipe.language_model:
        draft_params = narrow  # right always, so that drafts are kept
    prompts, lengths = ragged_prompts(0, (1, 4, 9))
    expected, _ = plain_text(lm, narrow, prompts, lengths, 8)
    found = run(lm, narrow, drafter, draft_params, prompts, lengths, 8)
    assert np.array_equal(found.tokens, expected)
    assert len({tuple(row) for row in expected}) == 3
    if recipe.language_model:
        assert np.asarray(found.stats.emitted).max() > 1


@pytest.mark.parametrize("changes", FAMILIES[:2])
def test_loading(changes, tmp_path):
    """Tensor by tensor what rounding the loaded model gives, also where a mesh places it."""
    lm, params = tiny_target(**changes)
    convert.save_target(tmp_path / "model", lm, params)
    mesh = sharding.make_mesh()
    expected = int8.rounded_params(params)
    for put in (lambda path, x: jnp.asarray(x), lambda path, x: folders._place(path[-1], x, mesh)):
        _, loaded = convert.load_target(tmp_path / "model", put=int8.rounding(put))
        found = int8.own_head(loaded, put)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        assert all(x.dtype == y.dtype and jnp.array_equal(x, y) for x, y in leaves)
    _, shapes = folders.abstract_target(str(tmp_path / "model"), int8=True)
    like = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), shapes, expected)
    assert all(jax.tree.leaves(like))


def test_places():
    """Values are cut as the kernel is, scales along the same outputs."""
    mesh = sharding.make_mesh()
    _, params = tiny_target()
    places = sharding.parameters(mesh, int8.rounded_params(params))
    whole = sharding.parameters(mesh, params)
    for name in ("qkv", "gate_up", "output", "down"):
        found, expected = places["layer_0"][name], whole["layer_0"][name]
        assert found.values == expected and len(found.scale.spec) == len(expected.spec)


def test_the_demo_pair():
    """Loaded with the flag; drafts of the trained drafter are kept and change nothing."""
    flags = argparse.Namespace(dtype="float32", int8=True)
    plain = cli.load_engine(str(demo.target_folder()), flags)
    assert plain.params["layer_0"]["qkv"].values.dtype == jnp.int8
    assert cli.numbers(flags) == "float32, matrices in int8"
    engine = plain.with_drafter(str(demo.drafter_folder()), 4)
    prompts = ["def fibonacci(n):\n", "import os\n"]
    found, expected = (one.generate(prompts, [24, 16]) for one in (engine, plain))
    assert [a.tokens for a in found] == [a.tokens for a in expected]
    assert max(a.rounds for a in found) < 18


def test_bytes_and_random_weights():
    """A step reads a byte per weight; what is made up has the shapes of what is loaded."""
    path = "configs/models/qwen3_8b.json"
    lm, wide = folders.abstract_target(path, jnp.bfloat16, 1)
    _, narrow = folders.abstract_target(path, jnp.bfloat16, 1, int8=True)
    bound = [roofline.plain_bound(lm.config, p, 64, 1) for p in (wide, narrow)]
    assert bound[0].operations == bound[1].operations
    assert 0.499 < bound[1].bytes / bound[0].bytes < 0.502
    drafter, init = steps.drafter_of(lm, 4, 1, 3, 2)
    own = folders.abstract_params(init, jnp.bfloat16)
    head = wide["head"].size
    work = [roofline.drafter_work(drafter.config, own, p, 1, 64) for p in (wide, narrow)]
    scales = 4 * lm.config.vocab_size
    assert work[0].bytes - work[1].bytes == head - scales
    small = DecoderLM(dataclasses.replace(tiny_target()[0].config, num_layers=1))
    shapes = folders.abstract_params(small.init)
    made = made_up.random_arrays(jax.eval_shape(int8.rounded_params, shapes))
    values = made["layer_0"]["qkv"].values
    assert values.dtype == jnp.int8 and len(np.unique(values)) > 200
    assert (np.asarray(made["layer_0"]["qkv"].scale) > 0).all()


def test_precision(tmp_path, monkeypatch, capsys):
    """KL and kept tokens by hand; the float32 target beside itself shows no difference."""
    draw = np.random.default_rng(2)
    laws = [np.asarray(jax.nn.log_softmax(draw.normal(size=(5, VOCAB)), axis=1)) for _ in range(2)]
    tokens = draw.integers(0, VOCAB, 5)
    said, kept, apart = precision.sums(
        *(jnp.asarray(x, jnp.float32) for x in laws), jnp.asarray(tokens, jnp.int32)
    )
    assert said == pytest.approx(sum(laws[0][i, tokens[i + 1]] for i in range(4)), rel=1e-5)
    assert float(kept) == sum(laws[0][i].argmax() == laws[1][i].argmax() for i in range(4))
    by_hand = sum(np.exp(laws[1][i]) @ (laws[1][i] - laws[0][i]) for i in range(4))
    assert apart == pytest.approx(by_hand, rel=1e-5)
    lm, params = tiny_target()
    rows = draw.integers(0, VOCAB, (2, 12)).astype(np.int32)
    found = {one.numbers: one for one in precision.compare(lm, params, rows)}
    assert len(found) == 4 and found["float32"].divergence == 0
    assert found["float32"].best_kept == 1 and found["float32"].perplexity > 1
    assert found["float32, matrices in int8"].divergence > 1e-6
    text = tmp_path / "text"
    text.write_text("def f():\n    return 1\n" * 40)
    out = tmp_path / "found.json"
    flags = ["--text", str(text), "--count", "2", "--length", "16", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["infer.precision", *flags])
    precision.main()
    assert "bfloat16, matrices in int8" in capsys.readouterr().out and out.exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--length", "1"], "--length: expected at least 2, found 1"),
        (["--length", "100000"], "--length: expected at most"),
        (["--text", "/nothing"], "--text: expected a readable file, found /nothing"),
        (["--count", "0"], "--count: expected at least 1, found 0"),
    ],
)
def test_bad_input(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["infer.precision", *flags])
    with pytest.raises(SystemExit) as ended:
        precision.main()
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_peers_are_not_rounded(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["infer.steps", "--int8", "--peers"])
    with pytest.raises(SystemExit) as ended:
        steps.main()
    assert ended.value.code == 2 and "--int8: expected no --peers" in capsys.readouterr().err


def test_a_head_of_its_own():
    """A tied target's LM head is rounded, in which no token is looked up."""
    lm, params = tiny_target(tied_embeddings=True)
    head = output_head(int8.rounded_params(params))
    assert head.values.shape == (lm.config.width, VOCAB)
    assert isinstance(output_head(params), jax.Array)


@pytest.mark.parametrize(("platform", "held"), [("cuda", True), ("rocm", True), ("tpu", False)])
def test_widening_stays_in_the_loop(platform, held):
    """XLA moves what a loop does not change ahead of it, on GPUs whatever it weighs."""
    kernel = int8.rounded(jnp.ones((8, 8), jnp.float32))

    def steps_of(kernel, x, count):
        return jax.lax.fori_loop(0, count, lambda _, x: layers.project(x, kernel), x)

    traced = jax.jit(steps_of).trace(kernel, jnp.ones((2, 8)), jnp.int32(3))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    _, _, body = text.partition("while")
    assert ("optimization_barrier" in body) == held and "xi8>" in body


def test_a_barrier_keeps_the_widening_in_the_loop(monkeypatch):
    """The means that GPUs are given, seen to work by XLA's compiler of CPUs."""
    kernel = int8.rounded(jnp.ones((64, 64), jnp.float32))

    def inside() -> bool:
        def steps_of(kernel, x, count):
            return jax.lax.fori_loop(0, count, lambda _, x: layers.project(x, kernel), x)

        given = kernel, jnp.ones((2, 64)), jnp.int32(3)
        text = jax.jit(steps_of).lower(*given).compile().as_text()
        _, _, entry = text.partition("\nENTRY")
        return "convert" not in entry

    found = [inside()]

    def as_on_gpus(*given, cuda, **_):
        return cuda(*given)

    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_gpus)
    assert [*found, inside()] == [False, True]
