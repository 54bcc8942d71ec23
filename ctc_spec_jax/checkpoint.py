"""Training checkpoints with orbax: save, restore on any mesh, keep the newest and the best."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ctc_spec_jax.errors import InputError, of_computation


class Checkpoints:
    """Numbered checkpoints in one folder (local or ``gs://``): the newest ``keep``, and the one
    with the largest ``score`` among its metrics.

    A checkpoint holds arrays (parameters, optimiser, step), notes (JSON: data position, what the
    run is) and metrics. It becomes visible under its number only when it is complete, so a run
    that is killed while it saves, or that finds the disk full, resumes from the one before.
    """

    def __init__(self, folder: str | os.PathLike, keep: int, score: str = "accepted_length"):
        self._score = score
        self.folder = epath.Path(folder)
        if "://" not in str(folder):
            self.folder = epath.Path(pathlib.Path(folder).absolute())
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[score],
                    reverse=False,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            create=True,
            preservation_policy=policy,
            best_fn=lambda metrics: metrics[score],
            best_mode="max",
            async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state, notes: dict[str, Any], metrics: dict[str, float]) -> None:
        """Start saving; returns when the arrays are copied, before the files are written.

        Raises:
          InputError: this or the save before could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)
        )
        name = self._score
        # Orbax warns where a metric is missing; this one ranks below all others.
        score = {name: float(metrics.get(name, -math.inf))}
        with self._told(f"the checkpoint of step {step} or the one before it"):
            if step in self._manager.all_steps():
                return
            self._manager.save(step, args=items, metrics=score, force=True)

    def wait(self) -> None:
        """Until everything is written; raises as ``save``."""
        with self._told("a checkpoint"):
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step with the largest score, or None where none was scored."""
        step = self._manager.best_step()
        metrics: Any = None if step is None else self._manager.metrics(step)
        return step if metrics and metrics[self._score] > -math.inf else None

    def preempted(self, step: int) -> bool:
        """Whether the machines are about to be taken away; the same answer on every host."""
        return self._manager.reached_preemption(step)

    def restore(self, step: int, like) -> tuple[Any, dict[str, Any]]:
        """State and notes of ``step``; the state in the structure, types and places of ``like``."""
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), notes=ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=args)
        return found["state"], found["notes"]

    def notes(self, step: int) -> dict[str, Any]:
        """The notes of ``step`` alone."""
        args = ocp.args.Composite(notes=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["notes"]

    def close(self) -> None:
        """Wait for saves in flight and let the folder go."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _told(self, which: str) -> Iterator[None]:
        """Turn a failed write into one sentence that says what is still good."""
        try:
            yield
        except Exception as error:  # the storage layers below raise types of their own
            if of_computation(error):
                raise
            latest = self.latest()
            good = "none is complete yet" if latest is None else f"step {latest} is complete"
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{self.folder}: expected room and rights to write {which}, found "
                f"{first_line[:200]}; {good}: make room and start the run again"
            ) from error


def save_params(folder: str | pathlib.Path, params) -> None:
    """Write parameters alone, as an orbax item that any mesh can read."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(_absolute(folder), params, force=True)
        checkpointer.wait_until_finished()


def load_params(folder: str | pathlib.Path, like):
    """Parameters of ``save_params`` in the types and places of ``like`` (arrays or shapes)."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(_absolute(folder), like)


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Wait for the other processes, but not after a failure: they wait for this one's files."""
    if sys.exc_info()[1] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _absolute(folder):
    text = str(folder)
    return epath.Path(text if "://" in text else pathlib.Path(text).absolute())
