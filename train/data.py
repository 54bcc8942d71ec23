"""Training data of drafters: documents of files, rows of them, and the batch of every step.

    documents = read_files(config.data.files, tokenizer, config.data, config.batch.length)
    train, heldout = documents.split(config.data.heldout)
    rows = pack(train, config.batch.length, config.data.pack)
    for batch in batches(rows, config.batch.rows, config.run.seed, start=step):
        ...

A batch is a function of the rows, the seed and the step, so a resumed run sees the same batches,
and so does one on another number of processes.

Shape letters: B rows of all processes, r rows of this one, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ctc_spec_jax.errors import InputError
from train.documents import Documents, read_files
from train.loops import before_loop, loop_share
from train.packing import Rows, pack

__all__ = [
    "Batches",
    "Documents",
    "Rows",
    "batch_dataset",
    "batches",
    "before_loop",
    "loop_share",
    "pack",
    "read_files",
]


def batch_dataset(rows: Rows, batch_rows: int, seed: int, process: int = 0, processes: int = 1):
    """A ``grain.MapDataset`` without end whose item k is this process's part of step k.

    The rows of a step and their order do not depend on the number of processes; process p has rows
    p*r .. (p+1)*r - 1 of them. Within an epoch no row comes twice, and all but the remainder, fewer
    than ``batch_rows``, come once; every epoch has its own order.

    Args:
      rows: of ``pack``.
      batch_rows: B.
      seed: of the order.
      process: number of this process.
      processes: how many there are, a divisor of ``batch_rows``.

    Returns:
      Items are tokens, segments and positions int32 [r, T], trained bool [r, T] as of ``Rows``, and
      row int32 [r], the number within the step.

    Raises:
      InputError: fewer rows than a batch, or rows that the processes cannot share evenly.
    """
    # Imported here because most programs that import this file need no batches.
    import grain

    if len(rows) < batch_rows:
        raise InputError(
            f"data.files: expected at least batch.rows ({batch_rows}) rows of {rows.length} "
            f"tokens, found {len(rows)}"
        )
    if batch_rows % processes:
        raise InputError(
            f"batch.rows: expected a multiple of the number of processes ({processes}), "
            f"found {batch_rows}"
        )
    share = batch_rows // processes
    number = np.arange(process * share, (process + 1) * share, dtype=np.int32)
    whole = len(rows) // batch_rows * batch_rows
    order = grain.MapDataset.source(rows).seed(seed % 2**32).shuffle()[:whole]
    return order.batch(share)[process::processes].repeat().map(lambda item: item | {"row": number})


class Batches:
    """Iterator over the batches of ``batch_dataset`` from a step on, read ahead by threads."""

    def __init__(self, dataset, start: int = 0, ahead: int = 4):
        import grain

        options = grain.ReadOptions(num_threads=min(2, ahead), prefetch_buffer_size=ahead)
        self._iterator = dataset.to_iter_dataset(options).__iter__()
        self.set_state({"step": start})

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, int]:
        """The step of the next batch, all that a checkpoint needs."""
        return {"step": int(self._iterator.get_state()["next_index"])}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continue with the batch of that step."""
        self._iterator.set_state({"next_index": int(state["step"])})

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()


def batches(
    rows: Rows, batch_rows: int, seed: int, process: int = 0, processes: int = 1, start: int = 0
) -> Batches:
    """Batches of steps ``start``, ``start`` + 1, ...; see ``batch_dataset``."""
    return Batches(batch_dataset(rows, batch_rows, seed, process, processes), start)
