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

import dataclasses
import zipfile
from collections.abc import Mapping

import numpy as np

from ctc_spec_jax.errors import InputError
from train.corpus import HELDOUT
from train.documents import Documents, read_files
from train.loops import before_loop, loop_share
from train.packing import Rows, pack

__all__ = [
    "Answers",
    "Batches",
    "Documents",
    "Rows",
    "batch_dataset",
    "batches",
    "before_loop",
    "load_answers",
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


@dataclasses.dataclass(frozen=True)
class Answers:
    """Prompts with the target's own continuation (file of ``train.regenerate``)."""

    tokens: np.ndarray  # int32 [R, T], right-padded
    prompt_lengths: np.ndarray  # int32 [R]
    lengths: np.ndarray  # int32 [R], prompt and answer

    def batch(self, seed: int, step: int, rows: int) -> dict[str, np.ndarray]:
        """Rows of one step, a pure function of the arguments."""
        count = len(self.tokens)
        if count < rows:
            raise InputError(f"data.answers: expected at least {rows} rows, found {count}")
        epoch, place = divmod(step, count // rows)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        return self.take(order[place * rows : (place + 1) * rows])

    def take(self, index) -> dict[str, np.ndarray]:
        """The rows at ``index``, as a batch."""
        return {
            "tokens": self.tokens[index],
            "prompt_lengths": self.prompt_lengths[index],
            "lengths": self.lengths[index],
        }


def load_answers(
    paths: tuple[str, ...], max_loop: float, heldout: float = HELDOUT
) -> tuple[Answers, Answers]:
    """Training and held-out answers of files of ``train.regenerate``.

    Every answer is cut where it begins to loop (see ``before_loop``); those of which less than 16
    tokens remain are left out.

    Raises:
      InputError: no such file, or not one of ``train.regenerate``.
    """
    if not paths:
        raise InputError("data.answers: expected files of train.regenerate, found none")
    parts = [_read_answers(path) for path in paths]
    width = max(part[0].shape[1] for part in parts)
    tokens = np.concatenate(
        [np.pad(part[0], ((0, 0), (0, width - part[0].shape[1]))) for part in parts]
    )
    prompts, lengths = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    fresh = [
        before_loop(row[p:n], max_loop) for row, p, n in zip(tokens, prompts, lengths, strict=True)
    ]
    lengths = prompts + np.asarray(fresh, np.int32)
    # Files follow each other, so a fixed order would hold out answers of the first one alone.
    keep = np.random.default_rng(0).permutation(np.flatnonzero(lengths - prompts >= 16))
    split = max(1, int(len(keep) * heldout))
    parts = (keep[split:], keep[:split])
    train, held = (Answers(tokens[i], prompts[i], lengths[i]) for i in parts)
    return train, held


def _read_answers(path: str) -> list[np.ndarray]:
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            return [file[name] for name in ("tokens", "prompt_lengths", "lengths")]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"data.answers: expected a file of train.regenerate, found {path} ({error})"
        ) from error
