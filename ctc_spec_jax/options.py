"""What a caller may ask of a decode, checked once, and the arrays that the program gets.

Names and off-values are those of ``transformers`` ``generate``; the presence and the frequency
penalty are those of the OpenAI API.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ctc_spec_jax import stops
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.types import NO_TOKEN, Request, Sampling


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of one row. None turns an option off, and so does the value in brackets.

    A stop string ends a row even before ``min_new_tokens``, which holds stop tokens back.

    Raises:
      InputError: a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float | None = None  # (0: greedy)
    top_k: int | None = None  # (0, -1)
    top_p: float | None = None  # (1)
    min_p: float | None = None  # (0)
    repetition_penalty: float | None = None  # (1)
    presence_penalty: float | None = None  # (0)
    frequency_penalty: float | None = None  # (0)
    logit_bias: Mapping[int | tuple[int, ...], float] | None = None  # token or phrase -> bias
    bad_words_ids: Sequence[Sequence[int]] | None = None  # phrases that must not be completed
    min_new_tokens: int | None = None  # (0)
    stop_token_ids: Sequence[int] | None = None  # beside the target's own
    stop_strings: Sequence[str] | None = None
    ignore_eos: bool = False  # the target's own stop tokens do not stop
    draft_depth: int | None = None  # deepest drafted token that is used; 0: no draft

    def __post_init__(self):
        for name, (kind, fits, expected) in _NUMBERS.items():
            _check_number(name, getattr(self, name), kind, fits, expected)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        if not isinstance(self.ignore_eos or False, bool | np.bool_):
            raise InputError(f"ignore_eos: expected True or False, found {self.ignore_eos!r}")
        for name, expected in _LISTS.items():
            value = getattr(self, name)
            inner = value if name == "bad_words_ids" and _is_list(value) else ()
            if value is not None and not all(map(_is_list, (value, *inner))):
                raise InputError(f"{name}: expected {expected}, found {value!r}")
        for text in self.stop_strings or ():
            if not isinstance(text, str) or not text:
                raise InputError(f"stop_strings: expected non-empty strings, found {text!r}")
        _check_bias(self.logit_bias)
        for phrase, _ in self.phrases():
            if not phrase:
                raise InputError(
                    "logit_bias, bad_words_ids: expected at least one token id, found none"
                )

    def phrases(self) -> list[tuple[tuple[int, ...], float]]:
        """Token sequences and the bias of their last token; minus infinity for bad words."""
        biased = [
            (tuple(key) if isinstance(key, Sequence) else (key,), float(value))
            for key, value in (self.logit_bias or {}).items()
        ]
        return biased + [(tuple(ids), -math.inf) for ids in self.bad_words_ids or ()]


_LARGEST = 1e9
"""Beyond it, as beyond the limits of ``_is_scale``, a processed logit could leave float32: the law
would be made of infinities, which have no softmax."""

_LISTS = {
    "bad_words_ids": "a list of lists of token ids",
    "stop_token_ids": "a list of token ids",
    "stop_strings": "a string or a list of strings",
}

_Check = tuple[type, Callable[[Any], bool], str]
_NUMBERS: dict[str, _Check] = {
    "max_new_tokens": (int, lambda x: x >= 1, "at least 1"),
    "temperature": (float, lambda x: x == 0 or _is_scale(x), "0 (greedy) or 1e-6 to 1e6"),
    "top_k": (int, lambda x: x >= -1, "a whole number, 0 or -1 for off"),
    "top_p": (float, lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "min_p": (float, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (float, lambda x: _is_scale(x), "a number from 1e-6 to 1e6"),
    "presence_penalty": (float, lambda x: abs(x) <= _LARGEST, "a number from -1e9 to 1e9"),
    "frequency_penalty": (float, lambda x: abs(x) <= _LARGEST, "a number from -1e9 to 1e9"),
    "min_new_tokens": (int, lambda x: x >= 0, "at least 0"),
    "draft_depth": (int, lambda x: x >= 0, "at least 0"),
}


def _check_number(name: str, value: Any, kind: type, fits: Callable[[Any], bool], expected: str):
    if value is None and name != "max_new_tokens":
        return
    whole = numbers.Integral if kind is int else numbers.Real
    right = isinstance(value, whole) and not isinstance(value, bool | np.bool_)
    if not right or not _is_finite(value) or not fits(value):
        raise InputError(f"{name}: expected {expected}, found {value!r}")


def _is_finite(value: Any) -> bool:
    return math.isfinite(value)


def _is_scale(value: Any) -> bool:
    return 1e-6 <= value <= 1e6


def _is_list(value: Any) -> bool:
    """Not a generator: the rows of a batch may share it."""
    return isinstance(value, Collection) and not isinstance(value, str | Mapping)


def _check_bias(bias: Any) -> None:
    if bias is not None and not isinstance(bias, Mapping):
        raise InputError(f"logit_bias: expected a mapping from tokens to numbers, found {bias!r}")
    for value in (bias or {}).values():
        # Minus infinity forbids a token; NaN is not at most anything.
        if not isinstance(value, numbers.Real) or not value <= _LARGEST:
            raise InputError(f"logit_bias: expected numbers of at most 1e9, found {value!r}")


def per_row(batch: int, fields: Mapping[str, Any]) -> list[Options]:
    """Options of every row; a field holds one value for all rows or a sequence of one per row.

    Raises:
      InputError: an unknown name, a value out of range, or a sequence of another length.
    """
    known = {field.name for field in dataclasses.fields(Options)}
    for name in fields:
        if name not in known:
            raise InputError(f"option {name}: expected one of {', '.join(sorted(known))}, found it")
    columns = {name: _column(name, value, batch) for name, value in fields.items()}
    return [
        Options(**{name: column[row] for name, column in columns.items()}) for row in range(batch)
    ]


_DEPTH = {"stop_token_ids": 1, "stop_strings": 1, "bad_words_ids": 2}
"""How deep the lists of one row are nested; an option that is not here is a single value."""


def _column(name: str, value: Any, batch: int) -> list[Any]:
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value.item()
    depth = 0
    level = value
    while isinstance(level, Sequence | np.ndarray) and not isinstance(level, str):
        depth += 1
        # A row may leave out what another one has.
        level = next((item for item in level if item is not None and not _empty(item)), None)
    nothing = depth == 1 and all(item is None or _empty(item) for item in value)
    # Nothing for every row is not one list of nothing.
    if depth <= _DEPTH.get(name, 0) and not (nothing and len(value) == batch):
        return [value] * batch
    if len(value) != batch:
        raise InputError(
            f"{name}: expected one value for each of the {batch} prompts, found {len(value)}"
        )
    return [item.item() if isinstance(item, np.generic) else item for item in value]


def _empty(item: Any) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str) and not len(item)


def build_request(
    rows: Sequence[Options],
    keys,
    stop_ids: Sequence[int],
    vocab_size: int,
    pieces: Callable[[], Sequence[bytes]],
) -> Request:
    """The arrays of a batch; an option that no row uses becomes None.

    Args:
      rows: options of every row.
      keys: typed PRNG keys [B].
      stop_ids: the target's own stop tokens.
      vocab_size: V.
      pieces: gives the bytes of every token; called where there are stop strings.

    Raises:
      InputError: token ids that the target does not have, or no token that may come.
    """
    ends = [
        (() if row.ignore_eos else tuple(stop_ids)) + tuple(row.stop_token_ids or ())
        for row in rows
    ]
    for name, ids in [("stop_token_ids", ids) for ids in ends] + [
        ("logit_bias, bad_words_ids", phrase) for row in rows for phrase, _ in row.phrases()
    ]:
        _check_ids(name, ids, vocab_size)
    for row, stops_of_row in zip(rows, ends, strict=True):
        _check_some_left(row, stops_of_row, vocab_size)
    strings = [tuple(row.stop_strings or ()) for row in rows]
    depths = [row.draft_depth for row in rows]
    return Request(
        max_new_tokens=_clipped([row.max_new_tokens for row in rows]),
        stops=_pad(ends, NO_TOKEN),
        keys=keys,
        sampling=_sampling(rows, vocab_size),
        stop_strings=stops.build(strings, pieces()) if any(strings) else None,
        draft_depth=None
        if all(depth is None for depth in depths)
        else _clipped([_NO_LIMIT if depth is None else depth for depth in depths]),
    )


def _sampling(rows: Sequence[Options], vocab_size: int) -> Sampling:
    def column(name: str, off: float, dtype: Any = np.float32):
        values = [getattr(row, name) for row in rows]
        values = [off if value is None else value for value in values]
        values = _clipped(values) if dtype == np.int32 else np.asarray(values, dtype)
        return None if (values == off).all() else values

    temperature = column("temperature", 0.0)
    # Filters leave the arg-max alone, so a batch of greedy rows does without them.
    drawn = (
        {}
        if temperature is None
        else {
            "top_k": column("top_k", 0, np.int32),
            "top_p": column("top_p", 1.0),
            "min_p": column("min_p", 0.0),
        }
    )
    return Sampling(
        temperature=temperature,
        **drawn,
        repetition_penalty=column("repetition_penalty", 1.0),
        presence_penalty=column("presence_penalty", 0.0),
        frequency_penalty=column("frequency_penalty", 0.0),
        **_biases(rows, vocab_size),
        min_new_tokens=column("min_new_tokens", 0, np.int32),
    )


def _biases(rows: Sequence[Options], vocab_size: int) -> dict[str, Any]:
    single = [[(p[0], value) for p, value in row.phrases() if len(p) == 1] for row in rows]
    longer = [[(p, value) for p, value in row.phrases() if len(p) > 1] for row in rows]
    bias = phrases = phrase_bias = None
    if any(single):
        bias = np.zeros((len(rows), vocab_size), np.float32)
        for row, pairs in enumerate(single):
            for token, value in pairs:
                bias[row, token] += value
    if any(longer):
        # Sizes are rounded up, so that another list of words seldom needs another program.
        count = _round_up(max(len(pairs) for pairs in longer))
        width = _round_up(max(len(p) for pairs in longer for p, _ in pairs))
        phrases = np.full((len(rows), count, width), NO_TOKEN, np.int32)
        phrase_bias = np.zeros((len(rows), count), np.float32)
        for row, pairs in enumerate(longer):
            for place, (phrase, value) in enumerate(pairs):
                phrases[row, place, width - len(phrase) :] = phrase
                phrase_bias[row, place] = value
    return {"bias": bias, "phrases": phrases, "phrase_bias": phrase_bias}


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if not isinstance(token, numbers.Integral) or not 0 <= token < vocab_size:
            raise InputError(
                f"{name}: expected token ids below the target's vocabulary of {vocab_size}, "
                f"found {token!r}"
            )


def _check_some_left(row: Options, ends: Sequence[int], vocab_size: int) -> None:
    """Phrases may still rule out every token at some place; the decode then emits token 0."""
    ruled_out = {p[0] for p, value in row.phrases() if len(p) == 1 and value == -math.inf}
    if row.min_new_tokens:
        ruled_out.update(ends)
    if len(ruled_out) == vocab_size:
        raise InputError(
            "logit_bias, bad_words_ids, min_new_tokens: expected a token that may come first, "
            f"found all {vocab_size} ruled out"
        )


_NO_LIMIT = np.iinfo(np.int32).max


def _clipped(values: Sequence[float]) -> np.ndarray:
    return np.asarray([min(value, _NO_LIMIT) for value in values], np.int32)


def _pad(rows: Sequence[Sequence[int]], filler: int) -> np.ndarray:
    width = _round_up(max(1, *map(len, rows)) if rows else 1)
    padded = np.full((len(rows), width), filler, np.int32)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = ids
    return padded


def _round_up(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
