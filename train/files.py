"""Lines of training files, one after the other, with a bar that shows how far they are read."""

from __future__ import annotations

import glob
import gzip
import pathlib
import zlib
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from ctc_spec_jax.errors import InputError


def expand(patterns: Sequence[str]) -> list[pathlib.Path]:
    """The files that paths and patterns name, those of a pattern in the order of their names.

    Raises:
      InputError: nothing named, or a pattern that matches nothing.
    """
    if not patterns:
        raise InputError("data.files: expected files or patterns, found none")
    paths: list[pathlib.Path] = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        paths += [pathlib.Path(name) for name in found]
        if not found:
            raise InputError(f"data.files: expected files that match {pattern!r}, found none")
    return paths


def lines(paths: Sequence[pathlib.Path]) -> Iterator[tuple[str, bytes, bool]]:
    """Where a line is (``file:number``), the line, and whether it is a plain text.

    A .txt file is one such line. Empty lines are left out.

    Raises:
      InputError: an unreadable file.
    """
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenise") as bar:
        for path in paths:
            done = bar.n
            try:
                with open(path, "rb") as raw:
                    for place, line, plain in _of_file(path, raw):
                        bar.update(done + raw.tell() - bar.n)
                        yield place, line, plain
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(
                    f"data.files: expected a readable file, found {path} ({error})"
                ) from error


def _of_file(path: pathlib.Path, raw) -> Iterator[tuple[str, bytes, bool]]:
    file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
    if path.suffixes[-1:] == [".txt"] or path.suffixes[-2:] == [".txt", ".gz"]:
        yield f"{path}:1", file.read(), True
        return
    # Iterating over the raw file itself would make its place unknown.
    for number, line in enumerate(iter(file.readline, b""), 1):
        if line.strip():
            yield f"{path}:{number}", line, False
