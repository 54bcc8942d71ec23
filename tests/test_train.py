"""Training: objectives learn, killed runs continue as if nothing had happened, exports decode."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from safetensors.numpy import load_file

from ctc_spec_jax import recipes
from ctc_spec_jax.checkpoint import Checkpoints
from ctc_spec_jax.decode import NoDraft
from ctc_spec_jax.errors import InputError
from tests.helpers import ragged_prompts, reference_greedy, run, tiny_target
from train import corpus, regenerate
from train import train as program
from train.config import TrainConfig, load_config
from train.drafter import DrafterObjective, sample_anchors

ROOT = pathlib.Path(__file__).parents[1]
STEPS, SAVED, KILLED = 30, 10, 25

TARGET = f"""
objective: target
run: {{steps: {STEPS}, log_every: 1, eval_every: 15, checkpoint_every: {SAVED}}}
optim: {{rate: 1e-2, warmup: 4}}
batch: {{rows: 4, microbatch: 2, length: 32}}
data: {{sources: [asyncio], max_bytes: 40000, heldout: 0.3, vocab_size: 300}}
model: {{width: 32, layers: 2, heads: 2, kv_heads: 1, mlp_width: 48}}
evaluation: {{rows: 4}}
"""

DRAFTER = """
objective: drafter
run: {steps: 20, log_every: 1, eval_every: 10, checkpoint_every: 10}
optim: {rate: 1e-2, warmup: 4}
batch: {rows: 4, microbatch: 2, anchors: 4}
data: {max_loop: 1.0, heldout: 0.25}
drafter: {frames: 5, taps: [0, 1], mlp_width: 24, tree_nodes: 6}
loss: {labels: 4, chunk: 8}
evaluation: {rows: 3, prompts: 2, prompt_length: 8, new_tokens: 12}
"""


@pytest.fixture(scope="module", autouse=True)
def optimizer_promotes():
    """optax mixes Python floats with integer counts; the losses are tested strictly below."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the experiment file and the caches that the programs use."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "target.yaml").write_text(TARGET)
    (folder / "drafter.yaml").write_text(DRAFTER)
    return folder


def target_config(workplace, folder, *overrides) -> TrainConfig:
    return load_config(str(workplace / "target.yaml"), [f"run.folder={folder}", *overrides])


@pytest.fixture(scope="module")
def objective(workplace):
    """The target's objective; its data and jitted evaluation do not depend on the run's folder."""
    return program.make_objective(target_config(workplace, "unused"))


@pytest.fixture(scope="module")
def whole(workplace, objective):
    """Folder of a run that nothing interrupts, and the record that it returned."""
    folder = workplace / "whole"
    return folder, program.train(target_config(workplace, folder), objective, quiet=True)


def curve(folder) -> list[dict[str, float]]:
    """The metrics of a run without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name != "seconds"} for line in lines]


def losses(folder) -> list[float]:
    return [line["loss"] for line in curve(folder) if "loss" in line]


def assert_same_run(folder, other):
    assert curve(folder) == curve(other)
    first, second = (load_file(f / "export" / "model.safetensors") for f in (folder, other))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def program_run(workplace, *arguments, source=None, **environment) -> subprocess.CompletedProcess:
    """Run ``python -m train.train`` (or a script that patches it) as its own process."""
    command = ["-c", source] if source else ["-m", "train.train"]
    # jax sets this one when it is imported and warns where it finds it.
    inherited = {name: os.environ[name] for name in os.environ if name != "TPU_LIBRARY_PATH"}
    strict = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(workplace / "cache"),
    }
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env=inherited | strict | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_target_learns(whole):
    """From the uniform law over 300 tokens towards the text, on held-out files too."""
    folder, record = whole
    values = losses(folder)
    assert abs(values[0] - np.log(300)) < 0.2
    assert np.mean(values[-5:]) < values[0] - 1.0
    held = [line["heldout_loss"] for line in curve(folder) if "heldout_loss" in line]
    assert held[-1] < values[0] - 1.0
    assert record["metrics"]["heldout_loss"] == held[-1]


def test_metrics_file_has_one_line_per_step_and_evaluation(whole):
    folder, _ = whole
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "heldout_loss" in line] == [15, 30]
    for line in lines:
        kind = (
            {"loss", "gradient_norm"}
            if "loss" in line
            else {
                "heldout_loss",
                "heldout_perplexity",
            }
        )
        assert line.keys() == {"step", "seconds"} | kind
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_record_says_how_the_target_was_made(whole, workplace):
    folder, record = whole
    assert json.loads((folder / "export" / "training.json").read_text()) == record
    assert record["config"] == yaml.safe_load((folder / "run.yaml").read_text())
    assert load_config(str(folder / "run.yaml")) == target_config(workplace, folder)
    assert record["command"].startswith("python -m train.train")
    assert record["data"]["train_bytes"] > 40000
    assert min(record["data"]["train_tokens"], record["data"]["heldout_tokens"]) > 1000
    assert {"step", "seconds", "loss", "gradient_norm", "heldout_loss"} <= record["metrics"].keys()
    assert record["metrics"]["step"] == STEPS
    assert record["hardware"].startswith("1 x cpu")
    assert record["versions"]["jax"] == jax.__version__
    assert {"python", "flax", "optax", "orbax-checkpoint"} <= record["versions"].keys()


def test_exported_target_is_the_newest_checkpoint(whole, workplace, objective):
    folder, _ = whole
    lm, params, tokenizer = recipes.load_target(str(folder / "export"))
    assert lm == objective.lm
    assert tokenizer.get_vocab() == objective.tokenizer.get_vocab()
    state = initial_state(objective, target_config(workplace, folder))
    saved = Checkpoints(folder / "checkpoints", 2)
    jax.tree.map(np.testing.assert_array_equal, saved.restore(STEPS, state)["params"], params)
    saved.close()


def initial_state(objective, config):
    params = objective.init(jax.random.key(0))
    return {
        "params": params,
        "optimizer": program.optimizer(config.optim, config.run.steps).init(params),
    }


class Interrupted(Exception):
    """Thrown into a run."""


def stop_at(objective, step: int):
    """The same objective, whose batch of one step raises."""
    stopped = object.__new__(type(objective))
    stopped.__dict__.update(objective.__dict__)
    batch = objective.batch

    def raising(at: int):
        if at == step:
            raise Interrupted
        return batch(at)

    stopped.batch = raising
    return stopped


def test_interrupted_run_continues_as_if_nothing_had_happened(whole, workplace, objective, capsys):
    folder = workplace / "interrupted"
    config = target_config(workplace, folder)
    with pytest.raises(Interrupted):
        program.train(config, stop_at(objective, KILLED), quiet=True)
    assert curve(folder)[-1]["step"] == KILLED and not (folder / "export").exists()
    before = json.loads((folder / "metrics.jsonl").read_text().splitlines()[2 * SAVED])["seconds"]
    # What a kill leaves behind: a line without its end, and half a checkpoint.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "lo')
    half = folder / "checkpoints" / f"{KILLED}.orbax-checkpoint-tmp"
    shutil.copytree(folder / "checkpoints" / str(2 * SAVED), half)
    for path in half.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    # The other fields of `run` and `evaluation` do not change what is computed.
    free = target_config(workplace, folder, "run.keep=3", "evaluation.prompts=3")
    record = program.train(free, objective, quiet=True)
    assert capsys.readouterr().out == f"resumed from step {2 * SAVED} in {folder}\n"
    assert_same_run(folder, whole[0])
    assert record["metrics"]["seconds"] > before
    # Started once more it only exports again.
    shutil.rmtree(folder / "export")
    program.train(config, stop_at(objective, -1), quiet=True)
    assert_same_run(folder, whole[0])


KILL = f"""
import os, signal
from train import target, train

batch = target.TargetObjective.batch

def deadly(self, step):
    if step == {KILLED}:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, step)

target.TargetObjective.batch = deadly
train.main()
"""


def test_killed_process_continues_as_if_nothing_had_happened(whole, workplace):
    """SIGKILL while the checkpoint of step 20 may still be in flight; that of step 10 is whole."""
    folder = workplace / "killed"
    arguments = ("--config", str(workplace / "target.yaml"), f"run.folder={folder}")
    killed = program_run(workplace, *arguments, source=KILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert curve(folder)[-1]["step"] == KILLED
    resumed = program_run(workplace, *arguments)
    assert resumed.returncode == 0, resumed.stderr
    start = resumed.stdout.splitlines()[0]
    assert start in [f"resumed from step {step} in {folder}" for step in (SAVED, 2 * SAVED)]
    assert_same_run(folder, whole[0])
    # Nothing but the program's own lines and its progress bar.
    noise = [
        line
        for line in resumed.stderr.replace("\r", "\n").splitlines()
        if line.strip() and f"/{STEPS} [" not in line and "compiled programs are kept" not in line
    ]
    assert noise == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.rate=2e-2", "optim.rate 0.01"),
        ("batch.rows=8", "batch.rows 4"),
        ("data.sources=[json]", r"data.sources \['asyncio'\]"),
        ("model.layers=3", "model.layers 2"),
        ("run.seed=1", "run.seed 0"),
        ("target=other", "target ''"),
    ],
)
def test_another_experiment_does_not_continue_a_run(whole, workplace, objective, override, named):
    folder, _ = whole
    before = (folder / "run.yaml").read_text()
    with pytest.raises(InputError, match=f"^run.folder: expected {named} as in ") as error:
        program.train(target_config(workplace, folder, override), objective, quiet=True)
    assert "\n" not in str(error.value)
    assert (folder / "run.yaml").read_text() == before


def test_run_without_a_checkpoint_may_be_changed(workplace, objective):
    folder = workplace / "changed"
    with pytest.raises(Interrupted):
        program.train(
            target_config(workplace, folder, "optim.rate=5"), stop_at(objective, 0), quiet=True
        )
    config = target_config(workplace, folder)
    with pytest.raises(Interrupted):
        program.train(config, stop_at(objective, 0), quiet=True)
    assert load_config(str(folder / "run.yaml")) == config


def test_run_survives_a_new_key_of_a_later_version(whole, workplace, tmp_path):
    tree = yaml.safe_load((whole[0] / "run.yaml").read_text())
    del tree["optim"]["clip"], tree["loss"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    program._check_same_run(tmp_path / "run.yaml", target_config(workplace, tmp_path))


def test_folder_that_cannot_be_written_is_refused(tmp_path, workplace, objective):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"^run\.folder: expected a writable folder, found "):
            program.train(target_config(workplace, folder), objective, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_devices_must_share_a_microbatch(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    arguments = ["--config", str(workplace / "target.yaml"), f"run.folder={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as exit_:
        program.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        "error: batch.microbatch: expected a multiple of the number of devices (4), found 2\n"
    )
    assert not list(tmp_path.iterdir())


def test_help_loads_nothing_heavy():
    source = """
import sys
from train import train
try:
    train.main()
finally:
    print(sorted({"orbax", "transformers", "tokenizers", "torch"} & sys.modules.keys()))
"""
    result = program_run(ROOT, "--help", source=source)
    assert result.returncode == 0, result.stderr
    assert "--config" in result.stdout and result.stdout.endswith("[]\n")


def gradients(objective, microbatches: int):
    """Minus the update of one step of plain gradient descent with rate 1, and the metrics."""
    rows = program.shardings(4 // microbatches)[0]
    tokens, keys = objective.batch(0), jax.random.split(jax.random.key(3), 4)
    shape = (microbatches, 4 // microbatches)
    step = program.make_step(objective, optax.sgd(1.0), rows)
    params = objective.init(jax.random.key(1))
    state = {"params": jax.tree.map(jnp.copy, params), "optimizer": optax.sgd(1.0).init(params)}
    state, metrics = step(state, objective.frozen, tokens.reshape(*shape, -1), keys.reshape(shape))
    return jax.tree.map(jnp.subtract, params, state["params"]), metrics


def strict_gradient(objective, params, batch, keys):
    """Loss and gradients of one micro-batch without silent promotions."""
    with jax.numpy_dtype_promotion("strict"):
        loss = jax.jit(lambda p, f: objective.loss(p, f, batch, keys)[0])
        return jax.value_and_grad(loss)(params, objective.frozen)


def test_gradients_do_not_depend_on_microbatches(objective):
    (one, metrics), (two, metrics_two) = gradients(objective, 1), gradients(objective, 2)
    # All four rows at once, without the training step.
    params = objective.init(jax.random.key(1))
    loss, exact = strict_gradient(objective, params, objective.batch(0), None)
    for grads in (one, two):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, exact
        )
    for found in (metrics, metrics_two):
        np.testing.assert_allclose(found["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(found["gradient_norm"], optax.tree.norm(exact), rtol=1e-5)


def test_two_devices_follow_the_curve_of_one(whole, workplace):
    """The program itself, in a process with two virtual CPU devices."""
    folder = workplace / "two"
    arguments = ("--config", str(workplace / "target.yaml"), f"run.folder={folder}")
    result = program_run(
        workplace,
        *arguments,
        XLA_FLAGS=os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((folder / "export" / "training.json").read_text())
    assert record["hardware"].startswith("2 x cpu")
    # Rounding differences grow from step to step, so the curve's beginning is compared.
    for line, expected in zip(curve(folder)[:10], curve(whole[0])[:10], strict=True):
        assert line.keys() == expected.keys()
        np.testing.assert_allclose(
            [line[name] for name in expected], list(expected.values()), rtol=1e-4
        )


def test_target_takes_an_existing_tokenizer(whole, workplace):
    export = whole[0] / "export"
    config = target_config(workplace, "unused", f"data.tokenizer={export}")
    vocabulary = recipes.load_tokenizer(export).get_vocab()
    assert program.make_objective(config).tokenizer.get_vocab() == vocabulary
    small = dataclasses.replace(config, data=dataclasses.replace(config.data, vocab_size=299))
    with pytest.raises(
        InputError, match=r"^data\.vocab_size: expected at least 300, the tokens of"
    ):
        program.make_objective(small)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=[json]", "data: expected at least 4000 windows of 32 tokens, found "),
        ("data.heldout=0", "data: expected at least 2 windows of 32 tokens, found 0"),
        ("model.kv_heads=3", "model: num_attention_heads: expected a multiple"),
    ],
)
def test_target_that_cannot_be_trained_is_refused(workplace, override, message):
    rows = ("batch.rows=4000",) if "sources" in override else ()
    with pytest.raises(InputError, match=f"^{message}"):
        program.make_objective(target_config(workplace, "unused", override, *rows))


def ragged_answers() -> dict[str, np.ndarray]:
    """Rows of unequal prompts and answers, from one anchor to far more than are drawn."""
    prompts = np.asarray([1, 5, 3, 7, 2], np.int32)
    lengths = np.asarray([40, 6, 9, 40, 25], np.int32)
    tokens = 100 * np.arange(5, dtype=np.int32)[:, None] + np.arange(40, dtype=np.int32)[None]
    tokens = np.where(np.arange(40)[None] < lengths[:, None], tokens, -1)
    return {"tokens": tokens, "prompt_lengths": prompts, "lengths": lengths}


@pytest.mark.parametrize("seed", range(5))
def test_anchors_and_labels(seed):
    batch, num_anchors, num_labels = ragged_answers(), 6, 4
    keys = jax.random.split(jax.random.key(seed), 5)
    anchors, labels, counts = map(np.asarray, sample_anchors(keys, batch, num_anchors, num_labels))
    for row in range(5):
        first, end = batch["prompt_lengths"][row] - 1, batch["lengths"][row]
        parts = first + (end - 1 - first) * np.arange(num_anchors + 1) / num_anchors
        for place in range(num_anchors):
            anchor, count = anchors[row, place], counts[row, place]
            assert first <= anchor <= end - 2
            assert np.floor(parts[place]) <= anchor <= parts[place + 1]
            truth = batch["tokens"][row, anchor + 1 : min(anchor + 1 + num_labels, end)]
            assert count == len(truth) >= 1
            np.testing.assert_array_equal(labels[row, place, :count], truth)
    assert (counts < num_labels).any() and (counts == num_labels).any()
    # Rows of equal shape draw different anchors, each from its own key alone.
    same = {name: np.repeat(value[:1], 5, axis=0) for name, value in batch.items()}
    drawn = np.asarray(sample_anchors(keys, same, num_anchors, num_labels)[0])
    assert len({tuple(row) for row in drawn}) == 5
    np.testing.assert_array_equal(drawn[0], anchors[0])
    reverse = np.asarray(sample_anchors(keys[::-1], same, num_anchors, num_labels)[0])
    np.testing.assert_array_equal(reverse, drawn[::-1])


@pytest.fixture(scope="module")
def pair(whole, workplace):
    """Answers of the tiny target, a drafter trained on them, and what training was given."""
    target, answers = whole[0] / "export", workplace / "answers.npz"
    arguments = ["--target", str(target), "--out", str(answers), "--sources", "asyncio"]
    arguments += ["--heldout", "0.3", "--max-bytes", "10000", "--count", "16", "--rows", "8"]
    arguments += ["--prompt-lengths", "4", "8", "--new-tokens", "20"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["regenerate", *arguments])
        patch.setattr(regenerate, "use_compilation_cache", lambda: None)
        regenerate.main()
    folder = workplace / "drafter"
    config = load_config(
        str(workplace / "drafter.yaml"),
        [f"target={target}", f"data.answers=[{answers}]", f"run.folder={folder}"],
    )
    objective = DrafterObjective(config)
    frozen = jax.tree.map(np.array, objective.frozen)
    record = program.train(config, objective, quiet=True)
    return folder, objective, frozen, record


def test_answers_are_what_the_target_writes():
    """Two batches of prompts of unequal lengths against one full forward per token."""
    lm, params = tiny_target()
    prompts, lengths = ragged_prompts(1, (5, 9, 1, 7))
    tokens, ends = regenerate.answer(lm, params, prompts, lengths, 24, 2)
    np.testing.assert_array_equal(ends, lengths + 24)
    for row, (prompt, start, end) in enumerate(zip(prompts, lengths, ends, strict=True)):
        text = reference_greedy(lm, params, prompt[:start], 24)
        assert len(set(text)) >= 4
        expected = [*prompt[:start], *text]
        np.testing.assert_array_equal(tokens[row, :end], expected)
        assert (tokens[row, end:] == 0).all()


def test_prompts_are_cut_from_the_training_text(pair, workplace):
    _, objective, _, _ = pair
    with np.load(workplace / "answers.npz") as file:
        tokens, prompts, lengths = (file[n] for n in ("tokens", "prompt_lengths", "lengths"))
    assert tokens.shape == (16, 28) and set(lengths - prompts) == {20}
    assert prompts.min() >= 4 and prompts.max() <= 8 and len(set(prompts.tolist())) > 1
    texts, _ = corpus.corpus(("asyncio",), 0.3, 10000)
    text = ",".join(map(str, corpus.tokenize(objective.tokenizer, texts)))
    for row, prompt in zip(tokens, prompts, strict=True):
        assert ",".join(map(str, row[:prompt])) in text


def test_drafter_learns_and_its_target_does_not(pair, whole):
    folder, objective, frozen, record = pair
    values = losses(folder)
    assert np.mean(values[-5:]) < values[0] - 0.5
    jax.tree.map(np.testing.assert_array_equal, objective.frozen, frozen)
    names = jax.eval_shape(objective.drafter.init_params, jax.random.key(0)).keys()
    saved = load_file(folder / "export" / "model.safetensors")
    assert saved.keys() == names
    assert max(value.size for value in saved.values()) < frozen["embedding"].size
    config = objective.config
    state = {"params": objective.init(jax.random.key(0))}
    state["optimizer"] = program.optimizer(config.optim, config.run.steps).init(state["params"])
    moments = jax.tree_util.tree_leaves_with_path(state["optimizer"])
    assert {path[-1].key for path, x in moments if x.ndim} <= names
    checkpoints = Checkpoints(folder / "checkpoints", 2)
    restored = checkpoints.restore(20, state)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, dict(restored["params"]), saved)
    assert {"heldout_loss", "accepted_length"} <= record["metrics"].keys()
    assert 1.0 <= record["metrics"]["accepted_length"] <= 5.0
    assert record["data"] == {"answers": 12, "answer_tokens": 240}


def test_interrupted_drafter_run_continues_as_if_nothing_had_happened(pair, workplace):
    """Its anchors are drawn with keys, which must depend on the step and not on the start."""
    whole, objective, _, _ = pair
    folder = workplace / "interrupted_drafter"
    run_section = dataclasses.replace(objective.config.run, folder=str(folder))
    config = dataclasses.replace(objective.config, run=run_section)
    with pytest.raises(Interrupted):
        program.train(config, stop_at(objective, 15), quiet=True)
    program.train(config, objective, quiet=True)
    assert_same_run(folder, whole)


def test_drafter_folder_says_what_it_is(pair, whole, workplace):
    folder, objective, _, record = pair
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["model_type"] == "ctc"
    assert (config["blank_id"], config["frames"], config["tree_depth"]) == (300, 5, 4)
    assert config["target_layer_ids"] == [0, 1]
    assert config["target_layer_convention"].startswith("output: ")
    assert config["target"] == str(whole[0] / "export")
    assert config["tokenizer_sha256"] == recipes.tokenizer_hash(objective.tokenizer)
    assert config["versions"].keys() == {"jax", "flax", "ctc-spec-jax"}
    assert config["command"] == record["command"]
    assert json.loads((folder / "export" / "training.json").read_text()) == record


def test_exported_drafter_decodes_what_its_target_writes(pair):
    folder, objective, _, _ = pair
    lm, params = objective.lm, objective.frozen
    drafter, draft_params = recipes.load_drafter(
        folder / "export", lm, objective.tokenizer, nodes=6
    )
    assert drafter == objective.drafter
    lengths = np.asarray([8, 3, 1, 6], np.int32)
    prompts = np.random.default_rng(0).integers(0, 300, (4, 10)).astype(np.int32)
    plain = run(lm, params, NoDraft(), (), prompts, lengths, 20)
    drafted = run(lm, params, drafter, draft_params, prompts, lengths, 20)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    assert (np.asarray(drafted.stats.rounds) <= np.asarray(plain.stats.rounds)).all()
    assert np.asarray(drafted.stats.rounds).sum() < np.asarray(plain.stats.rounds).sum()


def test_drafter_starts_from_another(pair, workplace):
    folder, objective, _, _ = pair
    drafter = dataclasses.replace(objective.config.drafter, init_from=str(folder / "export"))
    started = DrafterObjective(dataclasses.replace(objective.config, drafter=drafter))
    saved = load_file(folder / "export" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, dict(started.init(jax.random.key(9))), saved)
    wider = dataclasses.replace(drafter, mlp_width=40)
    other = DrafterObjective(dataclasses.replace(objective.config, drafter=wider))
    with pytest.raises(InputError, match=r"^drafter\.init_from: expected a network of the shape"):
        other.init(jax.random.key(9))
    beyond = dataclasses.replace(objective.config.drafter, taps=(0, 2))
    with pytest.raises(
        InputError, match=r"^drafter\.taps: expected layers 0\.\.1, found \[0, 2\]$"
    ):
        DrafterObjective(dataclasses.replace(objective.config, drafter=beyond))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--count": "9", "--rows": "8"}, "--count: expected a multiple of --rows (8), found 9"),
        ({"--count": "0"}, "--count: expected a multiple of --rows (64), found 0"),
        ({"--out": "{tmp}/none/answers.npz"}, "--out: expected a writable folder, found "),
        ({"--target": "{tmp}/none"}, "target: expected an existing folder or a hub id"),
        ({"--new-tokens": "25"}, "--new-tokens: expected 1..24, so that the longest prompt and "),
        ({"--new-tokens": "0"}, "--new-tokens: expected 1..24, so that the longest prompt and "),
        ({"--prompt-lengths": "9 8"}, "--prompt-lengths: expected 1 <= shortest <= longest < "),
    ],
)
def test_regenerate_refuses_bad_arguments(whole, tmp_path, monkeypatch, capsys, changes, message):
    arguments = {"--target": str(whole[0] / "export"), "--out": "{tmp}/answers.npz"}
    arguments |= {"--sources": "asyncio", "--max-bytes": "1000", "--new-tokens": "4"}
    arguments |= {"--prompt-lengths": "4 8"} | changes
    words = [w.format(tmp=tmp_path) for item in arguments.items() for w in " ".join(item).split()]
    monkeypatch.setattr(sys, "argv", ["regenerate", *words])
    monkeypatch.setattr(regenerate, "use_compilation_cache", lambda: None)
    with pytest.raises(SystemExit) as exit_:
        regenerate.main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
