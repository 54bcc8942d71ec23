"""Training checkpoints with orbax: save, restore, resume."""

from __future__ import annotations

import pathlib

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """Numbered checkpoints of a pytree of arrays in one folder; the newest ``keep`` are kept.

    A checkpoint becomes visible under its number only when it is complete, so a run that is
    killed while it saves resumes from the one before.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(pathlib.Path(folder).absolute(), options=options)

    def save(self, step: int, state) -> None:
        """Start saving; returns before the files are written."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, like):
        """The state of ``step``, with the structure, types and shardings of ``like``."""
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def close(self) -> None:
        """Wait for saves in flight."""
        self._manager.wait_until_finished()
        self._manager.close()
