"""Experiment files: what is refused, in which words, and what survives a round trip."""

import dataclasses
import pathlib

import pytest
import yaml

from ctc_spec_jax.errors import InputError
from train.config import TrainConfig, load_config, to_dict

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.yaml"))


def write(folder, content) -> str:
    path = folder / "experiment.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"objective": "target", "optimiser": {}}, "optimiser"),
        ({"objective": "target", "optim": {"momentum": 0.9}}, "optim.momentum"),
        ({"objective": "target", "run": {"folders": "x"}}, "run.folders"),
    ],
)
def test_unknown_keys_are_named_in_one_sentence(tmp_path, content, named):
    with pytest.raises(InputError, match=f"^config key {named}: expected one of ") as error:
        load_config(write(tmp_path, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "field", "value", "expected"),
    [
        ("run", "steps", 1.5, "int"),
        ("run", "steps", "many", "int"),
        ("run", "steps", True, "int"),
        ("run", "folder", 7, "str"),
        ("optim", "rate", "fast", "float"),
        ("optim", "rate", None, "float"),
        ("optim", "rate", False, "float"),
        ("data", "sources", "stdlib", "a list"),
        ("data", "sources", [1], "str"),
        ("drafter", "taps", ["one"], "int"),
    ],
)
def test_wrong_types_are_refused(tmp_path, section, field, value, expected):
    content = {"objective": "target", section: {field: value}}
    with pytest.raises(InputError, match=rf"^config key {section}\.{field}: expected {expected}"):
        load_config(write(tmp_path, content))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps", "expected section.field=value"),
        ("run.steps=[1,", "expected a YAML value in 'run.steps=\\[1,', found "),
        ("objective.kind=1", "expected a section at 'objective'"),
        ("speed.limit=1", "config key speed: expected one of "),
        ("optim=3", "config key optim: expected a section, found 3"),
        ("objective=both", "objective: expected 'target' or 'drafter', found 'both'"),
        ("run.log_every=0", "run.log_every: expected at least 1, found 0"),
        ("batch.microbatch=3", r"batch.microbatch: expected a divisor of batch.rows \(16\)"),
        ("batch.microbatch=0", "batch.microbatch: expected at least 1, found 0"),
        ("model.heads=7", r"model.heads: expected a divisor of model.width \(192\), found 7"),
        ("data.vocab_size=200", "data.vocab_size: expected at least 257"),
    ],
)
def test_bad_overrides_are_refused(tmp_path, override, message):
    with pytest.raises(InputError, match=message) as error:
        load_config(write(tmp_path, {"objective": "target"}), [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "3", "\x80"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "experiment.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"^config") as error:
        load_config(str(path))
    assert "\n" not in str(error.value)


def test_unreadable_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(InputError, match=r"^config: expected a readable file, found "):
            load_config(str(path))


def test_overrides_win_and_have_the_types_of_their_fields(tmp_path):
    path = write(tmp_path, {"objective": "target", "optim": {"rate": 0.5, "decay": 2}})
    config = load_config(
        path,
        [
            "optim.rate=1e-3",
            "optim.clip=2",
            "run.steps=7",
            "run.folder=runs/a=b",
            "data.sources=[json, numpy]",
            "drafter.taps=[0, 3]",
            "drafter.taps=[1]",
            "objective=drafter",
        ],
    )
    assert config.optim == dataclasses.replace(config.optim, rate=1e-3, clip=2.0, decay=2.0)
    assert type(config.optim.rate) is type(config.optim.clip) is type(config.optim.decay) is float
    assert (config.run.steps, config.run.folder) == (7, "runs/a=b")
    assert config.data.sources == ("json", "numpy")
    assert config.drafter.taps == (1,)
    assert config.objective == "drafter"


def test_round_trip(tmp_path):
    config = load_config(
        write(tmp_path, {"objective": "drafter", "target": "somewhere"}),
        ["optim.rate=3e-7", "drafter.taps=[0, 2]", "data.sources=[]", "loss.decay=1"],
    )
    text = yaml.safe_dump(to_dict(config))
    assert load_config(write(tmp_path, text)) == config
    assert set(to_dict(config)) == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_say_how_to_run_them(path):
    load_config(str(path))
    header = path.read_text().split("\nobjective")[0]
    assert f"python -m train.train --config configs/{path.name}" in header
