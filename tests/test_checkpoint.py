"""Checkpoints: the newest and the best are kept, and a full disk leaves the last one good."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ctc_spec_jax.checkpoint import Checkpoints
from ctc_spec_jax.errors import InputError


def state_of(step: int, size: int = 8):
    noise = np.random.default_rng(step).standard_normal((size, 128))
    return {"w": jnp.asarray(noise, jnp.float32), "step": jnp.int32(step)}


def test_newest_and_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    assert checkpoints.latest() is None and checkpoints.best() is None
    scores = {1: 1.5, 2: 3.0, 3: None, 4: 2.0, 5: None, 6: None}
    for step, score in scores.items():
        metrics = {} if score is None else {"accepted_length": score}
        checkpoints.save(step, state_of(step), {"data": {"next_step": step}}, metrics)
        checkpoints.save(step, state_of(step), {"data": {"next_step": -1}}, {})  # no second time
    checkpoints.wait()
    assert checkpoints.latest() == 6 and checkpoints.best() == 2
    kept = sorted(int(path.name) for path in (tmp_path / "run").iterdir())
    assert kept == [2, 5, 6]
    checkpoints.close()

    again = Checkpoints(tmp_path / "run", keep=2)
    for step in kept:
        found, notes = again.restore(step, state_of(0))
        jax.tree.map(np.testing.assert_array_equal, found, state_of(step))
        assert notes == again.notes(step) == {"data": {"next_step": step}}
    again.close()


def test_runs_without_scores_have_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(step, state_of(step), {}, {})
    checkpoints.wait()
    assert checkpoints.latest() == 2 and checkpoints.best() is None
    checkpoints.close()


def test_full_disk_leaves_the_last_checkpoint_good(tmp_path, monkeypatch):
    """Files may not grow beyond 64 KiB: the second checkpoint, of 512 KiB, cannot be written.

    The process whose disk is full must not wait for others, which wait for its files.
    """
    waits = []

    def barrier(*, key, timeout_ms):
        waits.append(key)

    monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda: barrier)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state_of(1), {}, {})
    checkpoints.wait()
    begun = waits[: len(waits) // 2]
    assert begun and waits == begun * 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
        with pytest.raises(InputError) as error:
            checkpoints.save(2, state_of(2, 1024), {}, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert waits == begun * 3
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: expected room and rights to write ")
    assert message.endswith("step 1 is complete: make room and start the run again")
    assert "\n" not in message

    again = Checkpoints(tmp_path, keep=2)
    assert again.latest() == 1
    found, _ = again.restore(1, state_of(0))
    jax.tree.map(np.testing.assert_array_equal, found, state_of(1))
    again.save(2, state_of(2, 1024), {}, {})
    again.wait()
    assert again.latest() == 2
    again.close()
