"""Training: objectives learn, killed runs continue as if nothing had happened, exports decode."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from ctc_spec_jax import folders
from ctc_spec_jax.checkpoint import Checkpoints, load_params
from ctc_spec_jax.decode import NoDraft
from ctc_spec_jax.draft.anchors import sample_anchors
from ctc_spec_jax.errors import InputError
from tests import XLA_FLAGS
from tests.helpers import run
from train import regenerate, runs
from train import step as steps
from train import train as program
from train.config import TrainConfig, load_config

ROOT = pathlib.Path(__file__).parents[1]
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR")
STEPS, SAVED, KILLED = 30, 10, 25
CLOCK = {"seconds", "tokens_per_second", "step_seconds"}

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
batch: {rows: 4, microbatch: 2, length: 28, anchors: 4}
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
    return make_objective(target_config(workplace, "unused"))


def train(config, objective) -> dict:
    return program.train(config, objective, objective.mesh, quiet=True)


@pytest.fixture(scope="module")
def whole(workplace, objective):
    """Folder of a run that nothing interrupts, and the record that it returned."""
    folder = workplace / "whole"
    return folder, train(target_config(workplace, folder), objective)


def curve(folder) -> list[dict[str, float]]:
    """The metrics of a run without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in CLOCK} for line in lines]


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
        "XLA_FLAGS": XLA_FLAGS,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": CACHE or str(workplace / "cache"),
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
        assert line.keys() - CLOCK == {"step"} | kind
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
    lm, params, tokenizer = folders.load_target(str(folder / "export"))
    assert lm == objective.lm
    assert tokenizer.get_vocab() == objective.tokenizer.get_vocab()
    state = initial_state(objective, target_config(workplace, folder))
    saved = Checkpoints(folder / "checkpoints", 2)
    jax.tree.map(np.testing.assert_array_equal, saved.restore(STEPS, state)[0]["params"], params)
    saved.close()


def initial_state(objective, config):
    return program.Run(config, objective, objective.mesh).state_shapes()


def make_objective(config):
    return program.make_objective(config, program.make_mesh(config))


class Interrupted(Exception):
    """Thrown into a run."""


def stop_at(objective, step: int):
    """The same objective, whose batch of one step raises."""
    stopped = object.__new__(type(objective))
    stopped.__dict__.update(objective.__dict__)

    def batches(start: int):
        for at, batch in enumerate(objective.batches(start), start):
            if at == step:
                raise Interrupted
            yield batch

    stopped.batches = batches
    return stopped


def test_interrupted_run_continues_as_if_nothing_had_happened(whole, workplace, objective, capsys):
    folder = workplace / "interrupted"
    config = target_config(workplace, folder)
    with pytest.raises(Interrupted):
        train(config, stop_at(objective, KILLED))
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
    record = train(free, objective)
    assert capsys.readouterr().out == f"resumed from step {2 * SAVED} in {folder}\n"
    assert_same_run(folder, whole[0])
    assert record["metrics"]["seconds"] > before
    # Started once more it only exports again.
    shutil.rmtree(folder / "export")
    train(config, stop_at(objective, -1))
    assert_same_run(folder, whole[0])


KILL = f"""
import os, signal
from train import target, train

batches = target.TargetObjective.batches

def deadly(self, start):
    for step, batch in enumerate(batches(self, start), start):
        if step == {KILLED}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

target.TargetObjective.batches = deadly
train.main()
"""


def test_killed_process_continues_as_if_nothing_had_happened(whole, workplace):
    """SIGKILL while the checkpoint of step 20 may still be in flight; that of step 15 is whole."""
    folder = workplace / "killed"
    arguments = ("--config", str(workplace / "target.yaml"), f"run.folder={folder}")
    killed = program_run(workplace, *arguments, source=KILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert curve(folder)[-1]["step"] == KILLED
    resumed = program_run(workplace, *arguments)
    assert resumed.returncode == 0, resumed.stderr
    start = resumed.stdout.splitlines()[0]
    assert start in [f"resumed from step {step} in {folder}" for step in (15, 2 * SAVED)]
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
        train(target_config(workplace, folder, override), objective)
    assert "\n" not in str(error.value)
    assert (folder / "run.yaml").read_text() == before


def test_run_without_a_checkpoint_may_be_changed(workplace, objective):
    folder = workplace / "changed"
    with pytest.raises(Interrupted):
        train(target_config(workplace, folder, "optim.rate=5"), stop_at(objective, 0))
    config = target_config(workplace, folder)
    with pytest.raises(Interrupted):
        train(config, stop_at(objective, 0))
    assert load_config(str(folder / "run.yaml")) == config


def test_run_survives_a_new_key_of_a_later_version(whole, workplace, tmp_path):
    tree = yaml.safe_load((whole[0] / "run.yaml").read_text())
    del tree["optim"]["clip"], tree["loss"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    runs._check_same_run(tmp_path / "run.yaml", target_config(workplace, tmp_path))


def test_folder_that_cannot_be_written_is_refused(tmp_path, workplace, objective):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"^run\.folder: expected a writable folder, found "):
            train(target_config(workplace, folder), objective)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.data=3", "mesh: expected sizes whose product is the number of devices, 1, found"),
        ("mesh.fsdp=-1", "mesh: expected sizes of at least 1 and one -1 at most, found data -1, "),
        ("dtype=float16", "dtype: expected 'float32' or 'bfloat16', found 'float16'"),
        ("optim.average=1.0", "optim.average: expected 0 to 1, found 1.0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    workplace, tmp_path, monkeypatch, capsys, override, message
):
    arguments = ["--config", str(workplace / "target.yaml"), f"run.folder={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, override])
    with pytest.raises(SystemExit) as exit_:
        program.main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
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


def test_gradients_do_not_depend_on_microbatches(objective):
    """Micro-batches, and all four rows at once without the training step."""
    local, params = next(objective.batches(0)), objective.init(jax.random.key(1))
    found = []
    for count in (1, 2):
        batch = jax.tree.map(lambda x, n=count: x.reshape(n, -1, *x.shape[1:]), local)
        accumulate = jax.jit(functools.partial(steps.accumulate, objective))
        found.append(accumulate(params, None, batch, jax.random.key(3)))
    with jax.numpy_dtype_promotion("strict"):
        exact = jax.jit(jax.value_and_grad(lambda p: objective.loss(p, None, local, None)[0]))
        loss, exact = exact(params)
    for grads, metrics in found:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, exact
        )
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)


def test_two_devices_follow_the_curve_of_one(whole, workplace):
    """The program itself, in a process with two virtual CPU devices."""
    folder = workplace / "two"
    arguments = ("--config", str(workplace / "target.yaml"), f"run.folder={folder}")
    result = program_run(
        workplace,
        *arguments,
        XLA_FLAGS=XLA_FLAGS + " --xla_force_host_platform_device_count=2",
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
    vocabulary = folders.load_tokenizer(export).get_vocab()
    assert make_objective(config).tokenizer.get_vocab() == vocabulary
    small = dataclasses.replace(config, data=dataclasses.replace(config.data, vocab_size=299))
    with pytest.raises(
        InputError, match=r"^data\.vocab_size: expected at least 300, the tokens of"
    ):
        make_objective(small)


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
        make_objective(target_config(workplace, "unused", override, *rows))


def ragged_rows() -> dict[str, np.ndarray]:
    """Rows of one or two documents, from no place for a draft to far more than are drawn."""
    lengths, first = [[40], [6], [5, 9], [30, 8], [25]], [[1], [5], [3, 2], [7, 7], [25]]
    batch = {"tokens": np.full((5, 40), -1, np.int32), "segments": np.zeros((5, 40), np.int32)}
    batch["trained"] = np.zeros((5, 40), bool)
    for row in range(5):
        begin = 0
        for number, (length, start) in enumerate(zip(lengths[row], first[row], strict=True), 1):
            part = slice(begin, begin + length)
            batch["tokens"][row, part] = 100 * row + np.arange(begin, begin + length)
            batch["segments"][row, part] = number
            batch["trained"][row, begin + start : begin + length] = True
            begin += length
    batch["trained"][3, 20:23] = False  # a user's turn between two answers
    return batch


def places_of(batch, row: int) -> list[int]:
    """Where a draft may begin: before a label of the same document."""
    segments, trained = batch["segments"][row], batch["trained"][row]
    return [t for t in range(39) if trained[t + 1] and segments[t] == segments[t + 1] > 0]


@pytest.mark.parametrize("seed", range(5))
def test_anchors_and_labels(seed):
    batch, num_anchors, num_labels = ragged_rows(), 6, 4
    keys = jax.random.split(jax.random.key(seed), 5)
    anchors, labels, counts = map(np.asarray, sample_anchors(keys, batch, num_anchors, num_labels))
    for row in range(5):
        places = places_of(batch, row)
        if not places:
            assert row == 4 and not counts[row].any()
            continue
        parts = len(places) * np.arange(num_anchors + 1) / num_anchors
        for place in range(num_anchors):
            anchor, count = anchors[row, place], counts[row, place]
            assert np.floor(parts[place]) <= places.index(anchor) <= parts[place + 1]
            truth = []
            for t in range(anchor + 1, min(anchor + 1 + num_labels, 40)):
                same = batch["segments"][row, t] == batch["segments"][row, anchor]
                if not (same and batch["trained"][row, t]):
                    break
                truth.append(batch["tokens"][row, t])
            assert count == len(truth) >= 1
            np.testing.assert_array_equal(labels[row, place, :count], truth)
    assert (counts[:4] < num_labels).any() and (counts == num_labels).any()
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
    target, answers = whole[0] / "export", workplace / "answers.jsonl"
    arguments = ["--target", str(target), "--out", str(answers), "--sources", "asyncio"]
    arguments += ["--heldout", "0.3", "--max-bytes", "10000", "--count", "16", "--rows", "8"]
    arguments += ["--prompt-lengths", "4", "8", "--max-new-tokens", "20"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["regenerate", *arguments])
        patch.setattr(regenerate, "use_compilation_cache", lambda: None)
        regenerate.main()
    folder = workplace / "drafter"
    config = load_config(
        str(workplace / "drafter.yaml"),
        [
            f"target={target}",
            f"data.files=[{answers}]",
            f"data.cache={workplace / 'documents'}",
            f"run.folder={folder}",
        ],
    )
    objective = make_objective(config)
    frozen = jax.tree.map(np.array, objective.frozen)
    record = train(config, objective)
    return folder, objective, frozen, record


def test_drafter_learns_and_its_target_does_not(pair, whole):
    folder, objective, frozen, record = pair
    values = losses(folder)
    assert np.mean(values[-5:]) < values[0] - 0.5
    jax.tree.map(np.testing.assert_array_equal, objective.frozen, frozen)
    names = jax.eval_shape(objective.drafter.init_params, jax.random.key(0)).keys()
    saved = load_file(folder / "export" / "model.safetensors")
    assert saved.keys() == names
    assert max(value.size for value in saved.values()) < frozen["embedding"].size
    state = initial_state(objective, objective.config)
    moments = jax.tree_util.tree_leaves_with_path(state["optimizer"])
    assert {path[-1].key for path, x in moments if x.ndim} <= names
    checkpoints = Checkpoints(folder / "checkpoints", 2)
    restored, notes = checkpoints.restore(record["exported_step"], state)
    assert notes["data"] == {"next_step": record["exported_step"]}
    best = json.loads((folder / "best.json").read_text())
    assert best["step"] == checkpoints.best() == record["exported_step"]
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, dict(restored["params"]), saved)
    alone = load_params(folder / "export" / "params", state["params"])
    jax.tree.map(np.testing.assert_array_equal, dict(alone), saved)
    assert {"heldout_loss", "accepted_length"} <= record["metrics"].keys()
    assert 1.0 <= record["metrics"]["accepted_length"] <= 5.0
    low, high = (record["metrics"][f"accepted_length_{end}"] for end in ("low", "high"))
    assert low <= record["metrics"]["accepted_length"] <= high
    assert record["data"]["documents"] + record["data"]["heldout_documents"] == 16
    assert record["data"]["trained_tokens"] == 20 * record["data"]["documents"]


def test_interrupted_drafter_run_continues_as_if_nothing_had_happened(pair, workplace):
    """Its anchors are drawn with keys, which must depend on the step and not on the start."""
    whole, objective, _, _ = pair
    folder = workplace / "interrupted_drafter"
    run_section = dataclasses.replace(objective.config.run, folder=str(folder))
    config = dataclasses.replace(objective.config, run=run_section)
    with pytest.raises(Interrupted):
        train(config, stop_at(objective, 15))
    train(config, objective)
    assert_same_run(folder, whole)


def test_drafter_folder_says_what_it_is(pair, whole, workplace):
    folder, objective, _, record = pair
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["model_type"] == "ctc"
    assert (config["blank_id"], config["frames"], config["tree_depth"]) == (300, 5, 4)
    assert config["target_layer_ids"] == [0, 1]
    assert config["target_layer_convention"].startswith("output: ")
    assert config["target"] == str(whole[0] / "export")
    assert config["tokenizer_sha256"] == folders.tokenizer_hash(objective.tokenizer)
    assert config["versions"].keys() == {"jax", "flax", "ctc-spec-jax"}
    assert config["command"] == record["command"]
    assert json.loads((folder / "export" / "training.json").read_text()) == record


def test_exported_drafter_decodes_what_its_target_writes(pair):
    folder, objective, _, _ = pair
    lm, params = objective.lm, objective.frozen
    drafter, draft_params = folders.load_drafter(
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
    started = make_objective(dataclasses.replace(objective.config, drafter=drafter))
    saved = load_file(folder / "export" / "model.safetensors")
    run = program.Run(started.config, started, started.mesh)
    jax.tree.map(np.testing.assert_array_equal, dict(run.fresh_state()["params"]), saved)
    wider = dataclasses.replace(drafter, mlp_width=40)
    with pytest.raises(InputError, match=r"^drafter\.init_from: expected a network of the shape"):
        make_objective(dataclasses.replace(objective.config, drafter=wider))
    beyond = dataclasses.replace(objective.config.drafter, taps=(0, 2))
    with pytest.raises(
        InputError, match=r"^drafter\.taps: expected layers 0\.\.1, found \[0, 2\]$"
    ):
        make_objective(dataclasses.replace(objective.config, drafter=beyond))


def test_preempted_run_saves_and_continues_as_if_nothing_had_happened(
    whole, workplace, objective, capsys
):
    """SIGTERM during step 17: saved there, status 143; the rest is the curve of one run."""
    folder = workplace / "preempted"
    config = target_config(workplace, folder)
    told = object.__new__(type(objective))
    told.__dict__.update(objective.__dict__)

    def batches(start: int):
        for step, batch in enumerate(objective.batches(start), start):
            if step == 16:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    told.batches = batches
    with pytest.raises(SystemExit) as exit_:
        train(config, told)
    assert exit_.value.code == 143
    assert curve(folder)[-1]["step"] == 17 and not (folder / "export").exists()
    train(config, objective)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"stopped: step 17 is saved in {folder}; start again to continue",
        f"resumed from step 17 in {folder}",
    ]
    assert_same_run(folder, whole[0])


def test_dry_run_starts_nothing(workplace, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    arguments = ["--config", str(workplace / "target.yaml"), f"run.folder={folder}", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.setattr(program, "use_compilation_cache", lambda: None)
    program.main()
    text = capsys.readouterr().out
    # V*D embedding, a norm, and per layer qkv D*K*(G+2)*C, output, gate and up, down, two norms.
    layer = 32 * 1 * 4 * 16 + 32 * 32 + 2 * 32 * 48 + 48 * 32 + 2 * 32
    assert f"trained parameters: {300 * 32 + 32 + 2 * layer:,}" in text
    assert "  layer_1/qkv " in text and "(32, 1, 4, 16)" in text
    assert "mesh: data 1, fsdp 1, tensor 1" in text
    assert "compiled step, a device: arguments " in text
    assert "vocab_size: 300" in text and f"{4 * 32} tokens" in text
    assert not folder.exists()


def test_average_and_tensorboard(workplace, objective):
    """The moving average is the recursion it says, and is what is exported."""
    folder = workplace / "average"
    config = target_config(
        workplace,
        folder,
        "optim.average=0.8",
        "run.steps=4",
        "run.checkpoint_every=1",
        "run.keep=4",
        "run.tensorboard=true",
    )
    train(config, objective)
    checkpoints = Checkpoints(folder / "checkpoints", 4)
    shapes = initial_state(objective, config)
    states = [checkpoints.restore(step, shapes)[0] for step in (1, 2, 3, 4)]
    checkpoints.close()
    expected = states[0]["average"]
    for state in states[1:]:
        expected = jax.tree.map(
            lambda a, p: 0.8 * np.asarray(a) + 0.2 * np.asarray(p), expected, state["params"]
        )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, states[-1]["average"], expected)
    _, params, _ = folders.load_target(str(folder / "export"))
    jax.tree.map(np.testing.assert_array_equal, states[-1]["average"], params)
    apart = jax.tree.map(lambda a, p: np.abs(np.asarray(a - p)).max(), params, states[-1]["params"])
    assert max(jax.tree.leaves(apart)) > 1e-3
    (events,) = (folder / "tensorboard").iterdir()
    assert events.stat().st_size > 500
