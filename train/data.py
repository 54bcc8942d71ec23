"""Training data: Documents of files, their packed rows, and batches of every step.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import zipfile

import numpy as np

from ctc_spec_jax.errors import InputError
from train.corpus import HELDOUT
from train.loops import before_loop, loop_share

__all__ = ["Answers", "before_loop", "load_answers", "loop_share"]


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
