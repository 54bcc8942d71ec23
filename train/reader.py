"""Reads training files once and writes the arrays that ``train.documents`` maps.

Shape letters: N documents, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from ctc_spec_jax.errors import InputError
from train.chat import Encoder, Labelled
from train.files import lines
from train.lines import EMPTY, NOT_TEXT, OUTSIDE, BrokenLine, Chat, Text, Tokens, parse
from train.loops import before_loop

BROKEN_SHARE = 0.01
"""Share of lines above which broken ones stop a run."""

SHORTEST = 16
"""Fewest labels of an answer that was cut because it loops."""

ARRAYS = ("tokens", "trained", "starts", "lengths", "hashes")
"""Files of a folder, .npy; see ``train.documents.Documents``."""

_CHUNK = 256  # lines that are tokenised together, on all cores
_NAMED = 3  # broken lines that a message names
_KEPT = 20  # and that are kept for ``train.show``
_HEADER = 128  # bytes before the data of an .npy file with one axis

Line = tuple[str, bytes, bool]


class Reader:
    """Documents of at most ``length`` tokens; counts what it leaves out.

    Args:
      encoder: of chats and texts.
      max_loop: share of repeated groups at which answers in token ids are cut.
      length: T of a row.
      vocab_size: bound of token ids.
    """

    def __init__(self, encoder: Encoder, max_loop: float, length: int, vocab_size: int):
        self.encoder, self.max_loop = encoder, max_loop
        self.length, self.vocab_size = length, vocab_size
        self.counts = dict.fromkeys(("lines", "unlabelled", "cut", "looping"), 0)
        self.skipped: dict[str, int] = {}
        self.broken: list[str] = []
        self.lengths: list[int] = []
        self.hashes: list[int] = []

    def write(self, paths: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
        """All arrays of the files and ``counts.json``, into an empty folder.

        Raises:
          InputError: more than ``BROKEN_SHARE`` broken lines, or no document with a label.
        """
        with open(folder / "tokens.npy", "wb") as tokens, open(folder / "trained.npy", "wb") as own:
            # The data come first; what the header says of them is known at the end.
            tokens.write(bytes(_HEADER))
            own.write(bytes(_HEADER))
            for chunk in _chunks(lines(paths)):
                self._add(chunk, tokens, own)
            self._check()
            _write_header(tokens, np.int32, sum(self.lengths))
            _write_header(own, np.bool_, sum(self.lengths))
        lengths = np.asarray(self.lengths, np.int64)
        np.save(folder / "lengths.npy", lengths)
        np.save(folder / "starts.npy", np.cumsum(lengths) - lengths)
        np.save(folder / "hashes.npy", np.asarray(self.hashes, np.uint64))
        counts = self.counts | {"skipped": self.skipped, "broken": self.broken}
        (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")

    def _add(self, chunk: Sequence[Line], tokens: BinaryIO, own: BinaryIO) -> None:
        self.counts["lines"] += len(chunk)
        good: list[tuple[str, Any, bytes]] = []
        for place, line, plain in chunk:
            try:
                content, key = _plain(line) if plain else parse(line)
                good.append((place, content, key))
            except BrokenLine as error:
                self._skip(place, error)
        encoded = self._encode([content for _, content, _ in good])
        for (place, content, key), row in zip(good, encoded, strict=True):
            if isinstance(row, BrokenLine):
                self._skip(place, row)
                continue
            name = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
            for ids, trained in self._cut(row, isinstance(content, Text)):
                ids.tofile(tokens)
                trained.tofile(own)
                self.lengths.append(len(ids))
                self.hashes.append(name)

    def _encode(self, contents: Sequence[Any]) -> list[Labelled | BrokenLine]:
        chats = iter(self.encoder.chats([c.messages for c in contents if isinstance(c, Chat)]))
        texts = iter(self.encoder.texts([c.text for c in contents if isinstance(c, Text)]))
        return [
            next(chats)
            if isinstance(content, Chat)
            else next(texts)
            if isinstance(content, Text)
            else self._tokens(content)
            for content in contents
        ]

    def _tokens(self, content: Tokens) -> Labelled | BrokenLine:
        """Token ids up to where an answer begins to loop."""
        low, high = min(content.ids), max(content.ids)
        if low < 0 or high >= self.vocab_size:
            return BrokenLine(OUTSIDE, f"expected 0..{self.vocab_size - 1}, found {low}..{high}")
        ids, trained = np.asarray(content.ids, np.int32), np.asarray(content.mask, bool)
        for first, last in spans(trained) if self.max_loop < 1 else ():
            end = first + before_loop(ids[first:last], self.max_loop)
            if end < last:
                self.counts["looping"] += 1
                ids, trained = ids[:end], trained[:end]
                # So little is left of an answer that loops from its start that it teaches nothing.
                trained = trained if trained.sum() >= SHORTEST else np.zeros(end, bool)
                break
        return ids, trained

    def _cut(self, row: Labelled, text: bool) -> Iterator[Labelled]:
        """Documents of a line: all pieces of a text, the beginning of anything else."""
        ids, trained = row
        if len(ids) > self.length:
            self.counts["cut"] += 1
        stop = len(ids) if text else min(len(ids), self.length)
        for first in range(0, stop, self.length):
            part = slice(first, min(first + self.length, stop))
            labels = trained[part].copy()
            # Nothing comes before it that it could be told from.
            labels[:1] = False
            if labels.any():
                yield ids[part], labels
            else:
                self.counts["unlabelled"] += 1

    def _skip(self, place: str, error: BrokenLine) -> None:
        self.skipped[error.reason] = self.skipped.get(error.reason, 0) + 1
        if len(self.broken) < _KEPT:
            self.broken.append(f"{place}: {' '.join(str(error).split())[:200]}")

    def _check(self) -> None:
        total = sum(self.skipped.values())
        if total > BROKEN_SHARE * self.counts["lines"]:
            raise InputError(
                f"data.files: expected at most {BROKEN_SHARE:.0%} broken lines, found {total} of "
                f"{self.counts['lines']}: {'; '.join(self.broken[:_NAMED])}"
            )
        if not self.lengths:
            raise InputError(
                f"data.files: expected documents with labels, found none in "
                f"{self.counts['lines']} lines ({self.counts['unlabelled']} documents without "
                f"one, {self.counts['looping']} that loop, see data.max_loop)"
            )


def spans(trained: np.ndarray) -> list[tuple[int, int]]:
    """Beginnings and ends of the runs of labels."""
    edges = np.flatnonzero(np.diff(np.pad(trained.astype(np.int8), 1)))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


def _plain(line: bytes) -> tuple[Text, bytes]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BrokenLine(NOT_TEXT, error) from error
    if not text:
        raise BrokenLine(EMPTY, "text")
    return Text(text), line


def _chunks(found: Iterator[Line]) -> Iterator[list[Line]]:
    chunk: list[Line] = []
    for line in found:
        chunk.append(line)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    yield chunk


def _write_header(file: BinaryIO, dtype, total: int) -> None:
    file.seek(0)
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": description, "fortran_order": False, "shape": (total,)}
    np.lib.format.write_array_header_1_0(file, header)
    assert file.tell() == _HEADER
