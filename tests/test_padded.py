"""Padding makes a target large and leaves what it computes as it is."""

import pathlib
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import folders, recipes
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.engine import Engine
from tests.test_benchmark import TEXT, VOCAB, save_language_model
from train import corpus

PADDED = pathlib.Path(__file__).parent.parent / "benchmarks" / "padded.py"
PROMPTS = ("def one(", "import numpy as np\n\n\nclass Two")


@pytest.fixture
def call(monkeypatch):
    """The program with these arguments, as from a shell."""

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["padded.py", *map(str, arguments)])
        runpy.run_path(str(PADDED), run_name="__main__")

    return run


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("padding") / "target"
    save_language_model(folder, 1, corpus.train_tokenizer([TEXT], VOCAB))
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    return folder


def drafter_of(engine: Engine, folder: pathlib.Path) -> str:
    """Folder of a CTC drafter with random weights for the target that is not padded."""
    recipe = recipes.find("ctc")
    drafter = recipe.drafter(recipe.network(engine.lm.config, Shape(frames=4)), 6, 3, "")
    shapes, draw = jax.eval_shape(drafter.init_params, jax.random.key(0)), np.random.default_rng(0)
    params = {k: draw.normal(size=x.shape).astype(np.float32) for k, x in shapes.items()}
    folders.save_drafter(folder, "ctc", drafter, params, "tiny", engine.tokenizer, {})
    return str(folder)


def logits(engine: Engine) -> np.ndarray:
    """Of two rows of unequal lengths, one tree node each beside a cache, float32 [2, V]."""
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) * 11 % VOCAB
    lengths = jnp.asarray([12, 7], jnp.int32)
    cache, _ = engine.lm.prefill(engine.params, tokens, lengths, 16)
    node = jnp.full((2, 1), 5, jnp.int32)
    mask = jnp.ones((2, 1, 1), bool)
    out = engine.lm.forward_tree(engine.params, cache, lengths, node, lengths[:, None], mask)
    return np.asarray(out.logits[:, 0])


def test_a_padded_target_is_the_same_function(call, target, tmp_path, capsys):
    """Logits up to the order of sums, the same answers and as many drafted tokens kept."""
    call(tmp_path / "wide", "--target", target, "--mlp-width", 1000)
    assert "wide: 0.1 million parameters" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]
    own, wide = (Engine.from_pretrained(str(x)) for x in (target, tmp_path / "wide"))
    assert (own.lm.config.mlp_width, wide.lm.config.mlp_width) == (48, 1000)
    assert wide.params["layer_0"]["gate_up"].shape == (32, 2, 1000)
    assert own.stop_ids == wide.stop_ids == (0, 7)
    expected, found = logits(own), logits(wide)
    assert np.ptp(expected) > 10
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.ptp(expected))
    folder = drafter_of(own, tmp_path / "drafter")
    answers = [x.with_drafter(folder, 6).generate(PROMPTS, max_new_tokens=16) for x in (own, wide)]
    for mine, other in zip(*answers, strict=True):
        assert len(set(mine.tokens)) > 3
        assert (mine.tokens, mine.emitted) == (other.tokens, other.emitted)


@pytest.mark.parametrize(
    "width, sentence",
    [
        ("47", "error: --mlp-width: expected at least the target's 48, found 47"),
        ("-1", "error: --mlp-width: expected at least the target's 48, found -1"),
        (str(10**12), "error: --mlp-width: expected MLPs that fit the "),
    ],
)
def test_bad_widths(call, target, tmp_path, capsys, width, sentence):
    with pytest.raises(SystemExit) as end:
        call(tmp_path / "wide", "--target", target, f"--mlp-width={width}")
    assert end.value.code == 2 and not [*tmp_path.iterdir()]
    assert capsys.readouterr().err.startswith(sentence)


def test_bad_places(call, target, tmp_path, capsys):
    """A folder that is there stays, and no part of a new one is left where none can be."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "wide"):
        with pytest.raises(SystemExit) as end:
            call(place, "--target", target, "--mlp-width", 64)
        assert end.value.code == 2 and "error: out: expected" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
