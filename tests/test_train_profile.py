"""The benchmark of drafter training: its arithmetic, its memory, its program."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from ctc_spec_jax import folders, sharding
from ctc_spec_jax.draft.ctc import ctc_config
from ctc_spec_jax.draft.ctc_loss import CTCLoss
from ctc_spec_jax.draft.training import Loss
from ctc_spec_jax.models.config import DecoderConfig
from train import cost, plan, profile

SHAPE = {
    "model_type": "llama",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(autouse=True)
def loose_types():
    """Optax does arithmetic across types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def setting(folder, *options, **changes):
    """A setting of one row of 32 tokens, and the shapes of the target's parameters."""
    path = folder / "config.json"
    path.write_text(json.dumps(SHAPE | changes))
    sizes = ("--rows", "1", "--length", "32", "--frames", "4", "--labels", "3", "--chunk", "4")
    sizes += ("--dtype", "float32", *map(str, options))
    given = profile.parser().parse_args(["--model", str(path), *sizes])
    lm, frozen = folders.abstract_target(given.model, jnp.float32)
    return profile.setting_of(given, lm, sharding.make_mesh(devices=jax.devices()[:1])), frozen


def test_arithmetic_by_hand():
    """Every product of a step, counted from its matrices."""
    target = DecoderConfig(50, 8, 3, num_heads=2, num_kv_heads=1, head_width=4, mlp_width=16)
    drafter = ctc_config(target, num_layers=1, frames=3, taps=(0, 1))
    rows, length, anchors, layers = 2, 10, 5, 2  # the third layer is above the last tap
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    forward = layers * length * (layer + 2 * 8 * length / 2)
    context = length * (2 + 2) * 8 * 8  # two taps; a feature and the token after it
    keys_values = length * 2 * 8 * 4
    starts = anchors * 2 * 8 * 8
    frames = anchors * 3 * (layer + 2 * 8 * (length / 2 + 3))
    head = anchors * 3 * 8 * 50
    others = context + keys_values + starts + frames
    assert plan.drafter_flops(drafter, rows, length, anchors) == 2 * rows * (head + others)
    found = plan.step_flops(target, drafter, rows, length, anchors)
    assert found == 2 * rows * (forward + 2 * head + 3 * others)


def test_arithmetic_agrees_with_the_compiler(tmp_path):
    """XLA's count of the compiled gradients is the closed form within 1.5 %.

    XLA also counts masked scores, which are added here, and what is done entry by entry.
    """
    wide = {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 3000}
    rows, length, anchors, frames = 1, 64, 8, 4
    found, frozen = setting(tmp_path, "--anchors", anchors, "--length", length, **wide)
    found = found.with_loss(weights=Loss(labels=1, chunk=anchors))  # no loop has a second turn
    state, frozen, batch = found.abstract(frozen)
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    gradient = jax.jit(jax.grad(lambda *a: found.objective.loss(*a)[0]))
    analysis = gradient.lower(state["params"], frozen, row, keys).compile().cost_analysis()
    halves = 2 * length * 256 * length  # of the target's two layers
    context = 3 * anchors * frames * 256 * length
    others = 3 * anchors * frames * 256 * 2 * (anchors - 1) * frames
    expected = found.flops() + 2 * rows * (halves + context + others)
    assert analysis is not None
    assert 1 <= analysis["flops"] / expected < 1.015


def test_memory_does_not_grow_with_anchors_times_vocabulary(tmp_path):
    """Four times the anchors add less than a tenth of the logits of their frames."""
    found, frozen = setting(tmp_path, "--length", 24, vocab_size=24000)
    few, many = (cost.temporaries(found.with_loss(anchors=a), frozen) for a in (16, 64))
    assert many - few < cost.logits_bytes(found, 64 - 16) / 10
    assert cost.logits_bytes(found, 64 - 16) == 48 * 4 * 24000 * 4


def test_parts_add_up_to_the_step():
    names = ("step", "step, taps given", "gradient, taps given", "draft, taps given", "head")
    seconds = dict(zip(names, (10.0, 6.0, 5.5, 1.0, 2.0), strict=True))
    found = cost.figures(seconds | {"taps": 4.4, "bare target": 4.0}, 1e12, 4e11)
    assert list(found["parts"].values()) == [4.0, 1.0, 2.5, 2.0, 0.5]
    assert found["target_in_bare_forwards"] == 1.0
    assert found["taps_alone_in_bare_forwards"] == pytest.approx(1.1)
    assert found["model_flop_utilisation"] == pytest.approx(0.25)


def test_program_end_to_end(tmp_path, monkeypatch, capsys):
    """Every part in the table and in the file; the parts are those of the step."""
    path, out = tmp_path / "config.json", tmp_path / "cost.json"
    path.write_text(json.dumps(SHAPE))
    monkeypatch.setattr(cost, "PRODUCT", 64)
    # Programs of another loss are compiled in half the time.
    monkeypatch.setattr(CTCLoss, "score", lambda *a: (jnp.mean(jnp.square(a[3])), {}))
    call(
        monkeypatch,
        *("--model", path, "--rows", 2, "--length", 16, "--anchors", 2, "--frames", 3),
        *("--labels", 2, "--memory-anchors", "--repeats", 1, "--mesh", "data=1"),
        *("--dtype", "float32", "--layers", 1, "--json", out),
    )
    found = json.loads(out.read_text())
    whole = found["time"]["seconds"]["step"]
    assert whole > 0 and sum(found["time"]["parts"].values()) == pytest.approx(whole)
    assert all(seconds > 0 for seconds in found["time"]["seconds"].values())
    assert found["settings"]["layers"] == 1 and "jax" in found["versions"]
    printed = capsys.readouterr().out
    assert "matrix product of 64 x 64" in printed and profile.table(found) in printed


def test_memory_in_table_and_picture(tmp_path):
    rows = [cost.Memory(8, 2**20, 2**19, 2**21), cost.Memory(16, 2**21, 2**20, 2**22)]
    document = {"time": None, "memory": [dataclasses.asdict(row) for row in rows]}
    lines = profile.table(document).splitlines()
    assert lines[1].split() == ["8", "1.0", "0.5", "2.0"]
    assert lines[2].split() == ["16", "2.0", "1.0", "4.0"]
    profile.plot(document, str(tmp_path / "cost.png"))
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--anchors", 0), "--anchors: expected at least 1, found 0"),
        (("--memory-anchors", 4, 0), "--memory-anchors: expected at least 1"),
        (("--labels", 9, "--frames", 8), "--labels: expected at most --frames, found 9"),
        (("--mesh", "rows=2"), "mesh: expected data=1"),
        (("--layers", 3), "layers: expected 0 to 2, found 3"),
        (("--json", "/nowhere/cost.json"), "--json: expected a file in a writable folder"),
        (("--plot", "x.png", "--memory-anchors"), "--plot: expected --memory-anchors, found none"),
        (("--model", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, options, message):
    """One line on standard error and exit status 2, before anything is compiled."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE))
    with pytest.raises(SystemExit) as exit_info:
        call(monkeypatch, "--model", path, *options)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.profile", *map(str, arguments)])
    profile.main()
