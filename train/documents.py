"""Documents of training files: tokenised once, kept on disk, and read by place.

A file is JSONL (plain or .gz) with one document per line, or a .txt that is one document. A line is
one of

    {"messages": [{"role": "user", "content": "..."}, ...]}
    {"conversations": [{"from": "human", "value": "..."}, ...]}     (or with role and content)
    {"input_ids": [...], "loss_mask": [0, 1, ...]}                  (of train.regenerate)
    {"text": "..."}

with or without an ``id``. Other lines are skipped, counted and named.

Shape letters: N documents, T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from ctc_spec_jax.errors import InputError
from train.chat import Encoder, Labelled, chat_template
from train.config import Data
from train.files import expand
from train.reader import ARRAYS, Reader

_FORMAT = 1  # of the cache; raise it when the same files would give other documents


@dataclasses.dataclass(frozen=True)
class Documents:
    """Token ids of N documents, mapped from disk. The first token of one is never a label.

    ``counts`` is about all that was read: lines, skipped (broken lines by reason), broken (the
    first of them), unlabelled (left out), cut (longer than a row) and looping (cut there).
    """

    tokens: np.ndarray  # int32, of all documents
    trained: np.ndarray  # bool, is a label
    starts: np.ndarray  # int64 [N]
    lengths: np.ndarray  # int64 [N]
    hashes: np.ndarray  # uint64 [N], of the id or the content
    counts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, place: int) -> Labelled:
        """Token ids int32 [T] and labels bool [T] of one document."""
        part = slice(self.starts[place], self.starts[place] + self.lengths[place])
        return self.tokens[part], self.trained[part]

    def take(self, places) -> Documents:
        """The documents at ``places`` alone."""
        fields = {name: getattr(self, name)[places] for name in ("starts", "lengths", "hashes")}
        return dataclasses.replace(self, **fields)

    def split(self, share: float) -> tuple[Documents, Documents]:
        """Training and held-out documents, the same on every machine."""
        held = self.hashes.astype(np.float64) < share * 2.0**64
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))

    def record(self) -> dict[str, Any]:
        """Sizes of these documents, and the counts of what was read."""
        labels = sum(int(np.count_nonzero(self[place][1])) for place in range(len(self)))
        sizes = {"documents": len(self), "tokens": int(self.lengths.sum())}
        return sizes | {"trained_tokens": labels} | self.counts


def read_files(
    paths: Sequence[str], tokenizer, options: Data, length: int, vocab_size: int = 0
) -> Documents:
    """All documents of the files, of at most ``length`` tokens each.

    Texts are cut into pieces, chats and token ids at their end. What was tokenised is kept in
    ``options.cache`` under a hash of all that it depends on, so a second start maps it from disk.

    Args:
      paths: files or patterns.
      tokenizer: the target's, a fast one.
      options: section ``data`` of an experiment.
      length: T of a row.
      vocab_size: of the target; by default the tokenizer's.

    Raises:
      InputError: unreadable files, no chat template, or more than 1 % broken lines.
    """
    files = expand(paths)
    template = chat_template(tokenizer, options.template)
    encoder = Encoder(tokenizer, template, options.train_on)
    settings = [template, options.train_on, options.max_loop, length, vocab_size or len(tokenizer)]
    base = _cache_folder(options.cache)
    folder = base / _key(files, tokenizer, settings)
    if not folder.is_dir():
        reader = Reader(encoder, options.max_loop, length, vocab_size or len(tokenizer))
        _write(folder, files, reader)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    return Documents(**arrays, counts=json.loads((folder / "counts.json").read_text()))


def _key(files: Sequence[pathlib.Path], tokenizer, settings: list[Any]) -> str:
    parts = [_FORMAT, settings, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()]
    digest = hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode())
    for path in files:
        try:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "blake2b").digest()
        except OSError as error:
            raise InputError(
                f"data.files: expected a readable file, found {path} ({error.strerror})"
            ) from error
        # Suffixes say how a file is read, and messages name it.
        digest.update(str(path).encode() + b"\0" + content)
    return digest.hexdigest()[:32]


def _cache_folder(name: str) -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(name or pathlib.Path(base) / "ctc_spec_jax" / "documents")


def _write(folder: pathlib.Path, files: Sequence[pathlib.Path], reader: Reader) -> None:
    """Tokenise the files into ``folder``, which appears when it is complete."""
    base = folder.parent
    try:
        base.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(dir=base, prefix=f".{folder.name}-"))
    except OSError as error:
        raise InputError(
            f"data.cache: expected a writable folder, found {base} ({error.strerror})"
        ) from error
    try:
        reader.write(files, part)
        part.chmod(0o755)
        try:
            part.rename(folder)
        except OSError:
            # Another process was faster, and wrote the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
