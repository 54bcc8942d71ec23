"""Python sources that every machine with the project has, as training text of a target.

A batch is a pure function of (seed, step), so a resumed run sees the same batches.
Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import pathlib
import sysconfig
from collections.abc import Iterator

import numpy as np

from ctc_spec_jax.errors import InputError

HELDOUT = 0.02
"""Share of files that are held out."""

END_OF_TEXT = "<|endoftext|>"
"""Separates files; the target's only special token."""

_NONE = np.zeros((0,), np.int32)
_LEFT_OUT = ("test", "tests", "testing", "idlelib", "site-packages", "__pycache__", "lib2to3")


def source_files(sources: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Relative path and text of every Python file of the named packages, without their tests."""
    for source in sources:
        root = _root(source)
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if any(part in _LEFT_OUT or part.startswith("test_") for part in relative.parts):
                continue
            try:
                yield f"{source}/{relative.as_posix()}", path.read_text("utf-8")
            except (UnicodeDecodeError, OSError):
                continue


def _root(source: str) -> pathlib.Path:
    if source == "stdlib":
        return pathlib.Path(sysconfig.get_paths()["stdlib"])
    try:
        spec = importlib.util.find_spec(source)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"data.sources: expected an installed package, found {source!r}")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def is_heldout(relative_path: str, share: float) -> bool:
    """Whether a file is held out: a hash of its path, so every machine agrees."""
    digest = hashlib.sha1(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def corpus(sources: tuple[str, ...], heldout: float, max_bytes: int = 0):
    """Texts of the training files and of the held-out files, two lists.

    ``max_bytes`` > 0 keeps that much of each, in an order given by a hash of the path.
    """
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for path, text in source_files(sources):
        order = hashlib.sha1(b"order" + path.encode()).hexdigest()
        parts[is_heldout(path, heldout)].append((order, text))
    return tuple(_limit([text for _, text in sorted(part)], max_bytes) for part in parts)


def _limit(texts: list[str], max_bytes: int) -> list[str]:
    if not max_bytes:
        return texts
    total = np.cumsum([len(text.encode()) for text in texts])
    return texts[: int(np.searchsorted(total, max_bytes)) + 1]


def train_tokenizer(texts: list[str], vocab_size: int):
    """Byte-level BPE of ``vocab_size`` tokens, as a fast Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenize(tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one int32 array, each followed by the end-of-text token."""
    rows = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    end = [tokenizer.eos_token_id]
    return np.concatenate([np.asarray(row.ids + end, np.int32) for row in rows] or [_NONE])


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of T tokens cut from one long array; every epoch has its own offset and order."""

    tokens: np.ndarray
    length: int

    def batch(self, seed: int, step: int, rows: int) -> np.ndarray:
        """int32 [B, T], a pure function of the arguments."""
        # One window less than fits, which leaves room for the epoch's offset.
        count = max(0, len(self.tokens) // self.length - 1)
        if count < rows:
            raise InputError(
                f"data: expected at least {rows} windows of {self.length} tokens, found {count}"
            )
        epoch, place = divmod(step, count // rows)
        order = np.random.default_rng((seed, epoch))
        offset = int(order.integers(self.length))
        starts = order.permutation(count)[place * rows : (place + 1) * rows] * self.length + offset
        return self.tokens[starts[:, None] + np.arange(self.length)[None]]
