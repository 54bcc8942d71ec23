"""A JSONL file that grows line by line, each line exactly once, however often its writer is killed.

``<file>.json`` beside it says how it was made. It is written before the first line, so a file with
lines can be checked against the options of the run that wants to go on with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ctc_spec_jax.errors import InputError


class Ledger:
    """An open file of lines with ids, locked against a second writer; a context manager.

    ``done`` holds the ids of the complete lines; a half-written last line is dropped.
    """

    def __init__(
        self,
        path: str,
        settings: Mapping[str, Any],
        record: Mapping[str, Any],
        seen: Callable[[Mapping[str, Any]], None],
    ):
        """Open a new file, or one of an earlier run with the same settings.

        Args:
          path: of the JSONL file.
          settings: what decides the lines, by option name; JSON values.
          record: what else ``<file>.json`` shall say.
          seen: called with every line that is there already, and with every line appended.

        Raises:
          InputError: a file that another run writes or that was made otherwise, or a full disk.
        """
        self.path, self.done, self._seen = pathlib.Path(path), set[str](), seen
        self._beside = pathlib.Path(f"{path}.json")
        self._document: dict[str, Any] = {"settings": dict(settings), **record}
        if _size(self.path):
            _compare(self._beside, self.path, json.loads(json.dumps(settings)))
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(
                f"--out: expected a writable file, found {path} ({error.strerror})"
            ) from error
        try:
            self._lock()
            if not _size(self.path):
                self._write_document()
            self._end = self._recover()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines, which are on the disk when this returns.

        Raises:
          InputError: a full disk, or another failure to write; only complete lines stay.
        """
        for line in lines:
            self._write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self.done.add(line["id"])
            self._seen(line)
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failure(error) from error

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Add the counts of a finished run to ``<file>.json``."""
        self._document["counts"] = dict(counts)
        self._write_document()

    def _lock(self) -> None:
        try:
            # The system releases it however the process ends.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"--out: expected a file that no other run writes, found {self.path}"
            ) from error

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise self._failure(error) from error
        self._end += len(line)

    def _failure(self, error: OSError) -> InputError:
        return InputError(
            f"--out: expected room for the next line, found {error.strerror} after "
            f"{len(self.done)} lines of {self.path}; the same command goes on from there"
        )

    def _write_document(self) -> None:
        part = self._beside.with_name(f".{self._beside.name}.part")
        try:
            part.write_text(json.dumps(self._document, indent=1) + "\n")
            os.replace(part, self._beside)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise InputError(
                f"--out: expected a writable {self._beside}, found {error.strerror}"
            ) from error

    def _recover(self) -> int:
        """Read the complete lines, cut off what follows them, and return where they end."""
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    self._seen(row)
                    name = row["id"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"--out: expected answers in line {number} of {self.path}, found {error!r}"
                    ) from error
                if name in self.done:
                    raise InputError(f"--out: expected one line per id, found two of {name!r}")
                self.done.add(name)
                end += len(line)
        os.ftruncate(self._file, end)
        return end


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _compare(beside: pathlib.Path, path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a file that was made with other settings."""
    try:
        written = json.loads(beside.read_text())["settings"]
        names = sorted(settings.keys() | written.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--out: expected no file or {beside} that says how it was made, found {path}"
        ) from error
    for name in names:
        if settings.get(name) != written.get(name):
            raise InputError(
                f"--{name.replace('_', '-')}: expected {written.get(name)!r} as in {beside}, so "
                f"that {path} can be continued, found {settings.get(name)!r}"
            )
