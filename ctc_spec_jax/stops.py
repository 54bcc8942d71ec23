"""Stop strings as automata over token ids, made once per request on the host.

A stop string may begin and end inside a token and span several, and a character may be split
between tokens. So strings and tokens are taken as bytes: an automaton over bytes is built first,
then every state is led through the bytes of every token. UTF-8 is self-synchronising, hence a
string is found in the bytes exactly where it is found in the decoded text.

Shape letters: B batch, Q states, V vocabulary.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Sequence

import jax
import numpy as np

from ctc_spec_jax.errors import InputError
from ctc_spec_jax.types import MATCHED, NO_STRINGS, StopStrings

STATES_MULTIPLE = 16
"""Q is a multiple of it, so that a program compiled for one set of strings serves others."""

_SPELLINGS = ("ByteLevel", "ByteFallback", "Metaspace")
_FIRST_FREE = max(NO_STRINGS, MATCHED) + 1
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
# GPT-2 writes a printable byte as the Latin-1 character and numbers the others from 256 on.
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}


def build(rows: Sequence[Sequence[str]], pieces: Sequence[bytes]) -> StopStrings:
    """Automata that find the stop strings of every row in its generated tokens.

    There is one automaton per distinct set of strings. A state stands for the longest suffix of
    the bytes so far that begins a stop string; ``MATCHED`` is reached by the token inside which a
    string is completed, and never left. Tokens without bytes change nothing. The prompt is not
    looked at.

    Args:
      rows: the stop strings of each of B rows; a row without any starts in ``NO_STRINGS``.
      pieces: the bytes of each of V tokens, see ``token_bytes``.

    Returns:
      NumPy arrays: ``table`` int32 [Q, V] and ``start`` int32 [B]. Q is padded to a multiple of
      ``STATES_MULTIPLE`` with states that lead to themselves.

    Raises:
      InputError: a stop string is empty or no text that UTF-8 can express.

    References:
      Aho and Corasick, Efficient string matching: an aid to bibliographic search, 1975.
    """
    sets = [frozenset(_encode(text) for text in row) for row in rows]
    roots = {frozenset[bytes](): NO_STRINGS}
    automata = [_loops(0, _FIRST_FREE)]
    count = _FIRST_FREE
    for strings in sets:
        if strings not in roots:
            roots[strings] = count
            automata.append(_automaton(strings, count))
            count += len(automata[-1])
    automata.append(_loops(count, count + -count % STATES_MULTIPLE))
    table = _lead(np.concatenate(automata), pieces)
    start = np.asarray([roots[strings] for strings in sets], np.int32)
    return StopStrings(typing.cast(jax.Array, table), typing.cast(jax.Array, start))


def first_stop(text: str, strings: Sequence[str]) -> str | None:
    """The stop string that is completed first in a text, None if none is.

    Of strings that are completed by the same character it is the longest.
    """
    ends = [(text.find(one) + len(one), -len(one), one) for one in strings if one in text]
    return min(ends)[2] if ends else None


def token_bytes(tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes that each of V token ids adds to the decoded text, special tokens skipped.

    Special tokens and ids without a token add none. What a decoder does to the whole text is left
    out: that of Llama 2 drops a space at its beginning. Nor are the bytes always a character:
    decoding replaces those that never become one.

    Args:
      tokenizer: a fast Hugging Face tokenizer, either byte-level (GPT-2, Llama 3, Qwen) or with
        the vocabulary of SentencePiece (Llama 2, Mistral, Gemma).
      vocab_size: V, which may be larger than the tokenizer's vocabulary.

    Raises:
      InputError: the tokenizer is of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found = type(tokenizer).__name__
        raise InputError(f"tokenizer: expected a fast tokenizer for stop strings, found {found}")
    steps = _decoder_steps(backend)
    # Decoding skips what the backend has marked; `all_special_ids` may name more than that.
    added = backend.get_added_tokens_decoder()
    special = {index for index, token in added.items() if token.special}
    tokens = [None if i in special else backend.id_to_token(i) for i in range(vocab_size)]
    return [b"" if token is None else _decode(token, steps) for token in tokens]


def _encode(text: str) -> bytes:
    if not text:
        raise InputError(f"stop_strings: expected non-empty strings, found {text!r}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        expected = "stop_strings: expected strings of whole characters"
        raise InputError(f"{expected}, found {text!r}") from error


def _loops(first: int, end: int) -> np.ndarray:
    """States that every byte leads to themselves, int32 [end - first, 256]."""
    return np.tile(np.arange(first, end, dtype=np.int32)[:, None], (1, 256))


def _automaton(strings: frozenset[bytes], first: int) -> np.ndarray:
    """States after each byte, int32 [states, 256]; the automaton's own are counted from ``first``.

    Row 0 is the state before any byte.
    """
    # A string that contains another one is never completed first. Without such strings no state
    # but MATCHED has a complete string behind it, so none has to be inherited along the failures.
    ends = {one for one in strings if not any(other in one for other in strings - {one})}
    states = sorted({one[:n] for one in ends for n in range(len(one))}, key=len)
    index = {state: first + place for place, state in enumerate(states)}
    index |= dict.fromkeys(ends, MATCHED)
    table = np.full((len(states), 256), first, np.int32)
    failure = np.zeros(len(states), np.int32)  # row of the longest proper suffix that is a state
    for place, state in enumerate(states):
        if len(state) > 1:
            parent = index[state[:-1]] - first
            failure[place] = table[failure[parent], state[-1]] - first
        table[place] = table[failure[place]]
        for byte in range(256):
            table[place, byte] = index.get(state + bytes([byte]), table[place, byte])
    return table


def _lead(by_byte: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """States after each token, int32 [Q, V], from those after each byte, int32 [Q, 256]."""
    lengths = np.asarray([len(piece) for piece in pieces], np.int64)
    # Longest first: the tokens that have a j-th byte are then a slice, and no padding is needed,
    # which a single token of a thousand spaces would make large.
    order = np.argsort(-lengths, kind="stable")
    text = np.frombuffer(b"".join(pieces), np.uint8)
    begin = (np.cumsum(lengths) - lengths)[order]
    states = np.tile(np.arange(len(by_byte), dtype=np.int32)[:, None], (1, len(pieces)))
    for j in range(int(lengths.max(initial=0))):
        longer = int(np.count_nonzero(lengths > j))
        states[:, :longer] = by_byte[states[:, :longer], text[begin[:longer] + j]]
    table = np.empty_like(states)
    table[:, order] = states
    return table


def _decoder_steps(backend) -> list[dict]:
    """What the decoder does to each token, in order."""
    from tokenizers import Tokenizer, models

    # Only a whole tokenizer shows its parts; an empty one spares us the text of the vocabulary.
    shell = Tokenizer(models.BPE())
    expected = "tokenizer: expected a byte-level or SentencePiece decoder for stop strings"
    try:
        shell.decoder = backend.decoder
        decoder = json.loads(shell.to_str())["decoder"]
    except Exception as error:  # a decoder written in Python raises the bare Exception
        raise InputError(f"{expected}, found one that cannot be read ({error})") from error
    steps = _flatten(decoder) if decoder else []
    kinds = [step["type"] for step in steps]
    # What follows the step that joins the tokens sees the whole text and is no token's business.
    joins = (place for place, kind in enumerate(kinds) if kind in ("ByteLevel", "Fuse"))
    own = next(joins, len(kinds)) + 1
    known = {*kinds[:own]} <= {"Fuse", "Replace", *_SPELLINGS} and {*kinds[own:]} <= {
        "Fuse",
        "Strip",
    }
    literal = all("String" in step["pattern"] for step in steps if step["type"] == "Replace")
    if not (known and literal and {*kinds[:own]} & {*_SPELLINGS}):
        raise InputError(f"{expected}, found {' + '.join(kinds) or 'none'}")
    return steps[:own]


def _flatten(decoder: dict) -> list[dict]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flatten(part)]


def _decode(token: str, steps: list[dict]) -> bytes:
    """The bytes of one token of the vocabulary."""
    for step in steps:
        match step["type"]:
            case "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
            case "Metaspace":
                token = token.replace(step["replacement"], " ")
            case "ByteFallback" if _BYTE_TOKEN.fullmatch(token):
                return bytes([int(token[3:5], 16)])
            # A token with any other character is an added one in plain text.
            case "ByteLevel" if all(letter in _BYTE_OF for letter in token):
                return bytes(_BYTE_OF[letter] for letter in token)
    return token.encode()
