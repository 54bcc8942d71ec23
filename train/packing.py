"""Rows of T tokens, each with one document or with several.

Shape letters: R rows, T tokens, N documents.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

import numpy as np

from train.documents import Documents

_WINDOW = 8192  # documents that are packed together


@dataclasses.dataclass(frozen=True)
class Rows:
    """R rows of whole documents; row r holds those at ``members[starts[r]:starts[r + 1]]``."""

    documents: Documents
    members: np.ndarray  # int64 [N]
    starts: np.ndarray  # int64 [R + 1]
    length: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row, padded with zeros at its end.

        Returns:
          tokens int32 [T], segments int32 [T] (0 is padding, then 1, 2, ... in order), positions
          int32 [T] (within the document), trained bool [T].
        """
        tokens, segments, positions = np.zeros((3, self.length), np.int32)
        trained = np.zeros(self.length, bool)
        members = self.members[self.starts[index] : self.starts[index + 1]]
        begin = 0
        for number, place in enumerate(members, 1):
            ids, labels = self.documents[place]
            part = slice(begin, begin + len(ids))
            tokens[part], trained[part], segments[part] = ids, labels, number
            positions[part] = np.arange(len(ids))
            begin += len(ids)
        return {
            "tokens": tokens,
            "segments": segments,
            "positions": positions,
            "trained": trained,
        }

    def record(self) -> dict[str, Any]:
        """Counts of the documents, of rows, and the share of them that is not padding."""
        room = len(self) * self.length
        share = float(self.documents.lengths.sum() / room) if room else 0.0
        sizes = {"rows": len(self), "packing_efficiency": round(share, 4)}
        return self.documents.record() | sizes


def pack(documents: Documents, length: int, together: bool = True) -> Rows:
    """Rows of ``length`` tokens: of several documents if ``together``, else of one each.

    No document is split. Documents are taken in a fixed random order, which mixes their sources,
    and within windows of it the longest first, each to the fullest row with room for it.

    Args:
      documents: none longer than ``length``.
      length: T.
      together: whether documents share rows.
    """
    count = len(documents)
    assert not count or documents.lengths.max() <= length
    if not together:
        return Rows(documents, np.arange(count), np.arange(count + 1), length)
    order = np.random.default_rng(0).permutation(count)
    rows: list[list[int]] = []
    for first in range(0, count, _WINDOW):
        rows += _best_fit(order[first : first + _WINDOW], documents.lengths, length)
    sizes = np.cumsum([0] + [len(row) for row in rows])
    members = [place for row in rows for place in row]
    return Rows(documents, np.asarray(members, np.int64), sizes.astype(np.int64), length)


def _best_fit(places: np.ndarray, lengths: np.ndarray, length: int) -> list[list[int]]:
    """Best-fit decreasing: documents of every row."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, row), ascending
    for place in places[np.argsort(-lengths[places], kind="stable")]:
        size = int(lengths[place])
        best = bisect.bisect_left(rooms, (size, -1))
        if best == len(rooms):
            room, row = length, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(best)
        rows[row].append(int(place))
        bisect.insort(rooms, (room - size, row))
    return rows
