"""The folder of a run: early stop, the pointer to the best, metrics that survive a kill."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from ctc_spec_jax.errors import InputError
from train import log as logs
from train import runs


def log_of(folder, start: int = 0) -> logs.Log:
    return logs.Log(epath.Path(folder), start)


@pytest.mark.parametrize(
    ("patience", "scores", "stopped_at"),
    [
        (0, [3, 1, 1, 1, 1], None),
        (2, [1, 2, 3, 4], None),
        (2, [1, 3, 2, 2, 4], 3),
        (2, [3, 3, 3], 2),  # no longer is no progress
        (1, [2, 1], 1),
        (3, [5, 1, 2, 3], 3),
    ],
)
def test_early_stop(tmp_path, patience, scores, stopped_at):
    stopping = runs.EarlyStop(patience, log_of(tmp_path))
    answers = [stopping({"accepted_length": float(score)}) for score in scores]
    assert answers.index(True) == stopped_at if stopped_at is not None else not any(answers)
    assert not stopping({"heldout_loss": 1.0}) or stopped_at is not None


def test_early_stop_remembers_scores_before_a_resume(tmp_path):
    log = log_of(tmp_path)
    log.write(10, {"accepted_length": 3.0})
    log.write(20, {"accepted_length": 2.0})
    again = runs.EarlyStop(2, log_of(tmp_path, 20))
    assert again({"accepted_length": 2.5})


def test_best_points_to_the_longest(tmp_path):
    log = log_of(tmp_path)
    runs.point_to_best(epath.Path(tmp_path), log)
    assert not (tmp_path / "best.json").exists()
    for step, score in ((10, 2.0), (20, 3.5), (30, 3.0)):
        log.write(step, {"accepted_length": score})
        runs.point_to_best(epath.Path(tmp_path), log)
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"step": 20, "accepted_length": 3.5}


def test_metrics_past_a_resumed_step_and_cut_lines_are_dropped(tmp_path):
    log = log_of(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": np.float32(step), "at": np.asarray([0.5, 0.25])})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    again = log_of(tmp_path, 2)
    again.write(3, {"loss": 7.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 7.0)]
    assert (lines[0]["at_1"], lines[0]["at_2"]) == (0.5, 0.25)
    assert again.newest["at_2"] == 0.25 and again.newest["loss"] == 7.0


def test_exports_of_buckets_are_written_here_and_copied(tmp_path, monkeypatch):
    """The copy itself is of paths that know both kinds; a folder stands for the bucket."""
    monkeypatch.setattr(runs, "is_remote", lambda path: True)
    bucket = tmp_path / "bucket" / "export"
    with runs.local_folder(str(bucket)) as local:
        (epath.Path(local) / "sub").mkdir(parents=True)
        (epath.Path(local) / "config.json").write_text("{}")
        (epath.Path(local) / "sub" / "weights").write_bytes(b"\x00\x01")
        assert not bucket.exists()
    assert (bucket / "config.json").read_text() == "{}"
    assert (bucket / "sub" / "weights").read_bytes() == b"\x00\x01"
    monkeypatch.undo()
    with runs.local_folder(str(bucket)) as local:
        assert local == str(bucket)


def test_metrics_of_buckets_are_rewritten_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "is_remote", lambda path: True)
    log = log_of(tmp_path)
    for step in (1, 2):
        log.write(step, {"loss": 0.5})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_other_documents_do_not_continue_a_run(tmp_path):
    from tests.test_train import TARGET
    from train.config import load_config

    (tmp_path / "target.yaml").write_text(TARGET)
    config = load_config(str(tmp_path / "target.yaml"), [f"run.folder={tmp_path / 'run'}"])
    checkpoints, start = runs.open_run(epath.Path(config.run.folder), config, "first")
    assert start == 0
    checkpoints.save(3, {"w": np.zeros(2, np.float32)}, {"fingerprint": "first"}, {})
    checkpoints.close()
    with pytest.raises(InputError, match=r"^data: expected the documents that .*first.*second"):
        runs.open_run(epath.Path(config.run.folder), config, "second")
    again, start = runs.open_run(epath.Path(config.run.folder), config, "first")
    again.close()
    assert start == 3
    # A mesh, micro-batches and the cache's place do not change what is learned.
    free = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, data=1),
        batch=dataclasses.replace(config.batch, microbatch=1),
        data=dataclasses.replace(config.data, cache="elsewhere"),
    )
    again, _ = runs.open_run(epath.Path(config.run.folder), free, "first")
    again.close()
