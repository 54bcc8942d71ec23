"""Stop-string automata against a search in the bytes, and token bytes against decoding."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from ctc_spec_jax.errors import InputError
from ctc_spec_jax.stops import build, first_stop, token_bytes
from ctc_spec_jax.types import MATCHED, NO_STRINGS
from train.corpus import END_OF_TEXT, train_tokenizer

# Two letters, and characters of two and three bytes that begin or end alike.
LETTERS = "abéè日旦"
BYTES = sorted(set(LETTERS.encode()))
SPACE = "▁"

strings = st.text(LETTERS, min_size=1, max_size=5)
# Loose bytes split characters between tokens; b"" is what a special token spells.
piece = st.text(LETTERS, max_size=4).map(str.encode) | st.lists(
    st.sampled_from(BYTES), max_size=4
).map(bytes)


def run(stops, row: int, tokens) -> list[int]:
    """States of a row after each token."""
    states = [int(stops.start[row])]
    for token in tokens:
        states.append(int(stops.table[states[-1], token]))
    return states[1:]


def first_match(states) -> int | None:
    return states.index(MATCHED) if MATCHED in states else None


def search(row, pieces, tokens) -> int | None:
    """The oracle: the first token after which the bytes so far contain a stop string."""
    for i in range(len(tokens)):
        text = b"".join(pieces[token] for token in tokens[: i + 1])
        if any(one.encode() in text for one in row):
            return i
    return None


def check(rows, pieces, tokens) -> None:
    stops = build(rows, pieces)
    assert isinstance(stops.table, np.ndarray) and isinstance(stops.start, np.ndarray)
    assert stops.table.dtype == np.int32 and stops.start.dtype == np.int32
    count = stops.table.shape[0]
    assert stops.table.shape == (count, len(pieces)) and count % 16 == 0
    assert stops.start.shape == (len(rows),)
    assert np.all((stops.table >= 0) & (stops.table < count))
    assert np.all(stops.table[NO_STRINGS] == NO_STRINGS)
    assert np.all(stops.table[MATCHED] == MATCHED)
    for b, row in enumerate(rows):
        states = run(stops, b, tokens)
        assert first_match(states) == search(row, pieces, tokens)
        assert MATCHED not in states or set(states[states.index(MATCHED) :]) == {MATCHED}
        assert (stops.start[b] == NO_STRINGS) == (len(row) == 0)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_first_match_is_that_of_a_search_in_the_bytes(data):
    pieces = data.draw(st.lists(piece, min_size=1, max_size=8))
    rows = data.draw(st.lists(st.lists(strings, max_size=4), min_size=1, max_size=4))
    check(rows, pieces, data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=24)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_stop_string_is_found_however_the_text_is_split(data):
    """Random tokens seldom complete a string; here the text holds one, cut at random bytes."""
    row = data.draw(st.lists(strings, min_size=1, max_size=4))
    parts = data.draw(st.lists(st.sampled_from(row) | st.text(LETTERS, max_size=3), max_size=4))
    text = "".join([*parts, row[0]]).encode()
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    edges = [0, *sorted(cuts), len(text)]  # equal cuts make empty tokens
    pieces = [text[i:j] for i, j in itertools.pairwise(edges)]
    tokens = list(range(len(pieces)))
    assert search(row, pieces, tokens) is not None
    check([row, [], list(reversed(row))], pieces, tokens)


@settings(max_examples=200, deadline=None)
@given(st.lists(strings, max_size=5), st.text(LETTERS, max_size=16))
def test_first_stop_is_what_the_automaton_stops_at(row, text):
    ends = {}
    for one in row:
        places = [n for n in range(len(text) + 1) if text[:n].endswith(one)]
        ends[one] = min(places, default=None)
    found = [(end, -len(one), one) for one, end in ends.items() if end is not None]
    expected = min(found)[2] if found else None
    assert first_stop(text, row) == expected
    pieces = [letter.encode() for letter in LETTERS]
    place = first_match(run(build([row], pieces), 0, [LETTERS.index(one) for one in text]))
    assert place == (None if expected is None else ends[expected] - 1)


@pytest.mark.parametrize(
    ("row", "text", "found"),
    [
        (["cd", "bcd", "d"], "abcd", "bcd"),  # the longest of those that end together
        (["abcd", "bc"], "abcd", "bc"),  # the first to end, not to begin
        (["a", "xyz"], "xyzxyza", "xyz"),
        (["x"], "abc", None),
    ],
)
def test_first_stop_by_hand(row, text, found):
    assert first_stop(text, row) == found
    assert first_stop(text, row[::-1]) == found


@pytest.mark.parametrize(
    ("row", "pieces", "tokens", "place"),
    [
        (["ab"], [b"xaby"], [0], 0),  # inside a token, with more behind it
        (["ab"], [b"xa", b"by"], [1, 0, 1], 2),  # ends in the middle of a token
        (["aab"], [b"a", b"b"], [0, 0, 0, 1], 3),  # the third a still leaves two
        (["abac", "bax"], [b"a", b"b", b"x"], [0, 1, 0, 2], 3),  # from one string into another
        (["abcd", "bc"], [b"a", b"b", b"c"], [0, 1, 2], 2),  # one inside the other
        (["ab"], [b"a", b"b", b""], [0, 2, 2, 1], 3),  # empty tokens between
        (["日"], ["日".encode()[:1], "日".encode()[1:]], [0, 0, 1], 2),  # a split character
        (["é"], [b"\xc3", b"a", b"\xa9"], [0, 1, 2], None),  # its bytes with a letter between
        (["ab", "ab"], [b"a", b"b"], [0, 1], 1),
    ],
)
def test_by_hand(row, pieces, tokens, place):
    assert search(row, pieces, tokens) == place
    check([row], pieces, tokens)


def test_rows_of_one_set_share_states_and_shapes_repeat():
    pieces = [b"a", b"b", b""]
    stops = build([["ab", "ba"], [], ["ba", "ab", "ab"], ["a"]], pieces)
    assert stops.start[0] == stops.start[2] and len({*stops.start.tolist()}) == 3
    sizes = [build([["a" * n]], pieces).table.shape for n in (1, 14, 15, 30, 31)]
    assert sizes == [(16, 3), (16, 3), (32, 3), (32, 3), (48, 3)]
    padding = build([["ab"]], pieces).table[4:]
    np.testing.assert_array_equal(padding, np.tile(np.arange(4, 16)[:, None], (1, 3)))


def test_without_strings_or_bytes():
    stops = build([[], []], [b"a", b""])
    np.testing.assert_array_equal(stops.start, [NO_STRINGS, NO_STRINGS])
    check([[], ["a"]], [b"", b""], [0, 1, 0])
    assert first_stop("abc", []) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["a"], ["b", ""]], "stop_strings: expected non-empty strings, found ''"),
        ([["\ud800"]], r"stop_strings: expected strings of whole characters, found '\ud800'"),
    ],
)
def test_bad_strings_are_refused(rows, message):
    with pytest.raises(InputError) as error:
        build(rows, [b"a"])
    assert str(error.value) == message


@pytest.fixture(scope="module")
def byte_level():
    """As the demo has it, with characters of which no token is whole, and added tokens."""
    tokenizer = train_tokenizer(["def naïve(x):\n    return '日本' + x  # \t\x00\n"] * 3, 280)
    tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("日 é")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


def sentencepiece(*whole):
    """Decoder and vocabulary of Llama 2: spaces are U+2581, and there is a token for each byte."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [SPACE, "a", "b", SPACE + "a", "ab", SPACE * 2, "é", "日", "日a", "<0x0A", "<0x0A>a"]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *whole])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken("[INST] x")])
    return tokenizer


def test_bytes_of_a_byte_level_tokenizer(byte_level):
    size = len(byte_level)
    pieces = token_bytes(byte_level, size + 9)
    assert len(pieces) == size + 9 and pieces[size:] == [b""] * 9
    assert token_bytes(byte_level, 40) == pieces[:40]
    empty = [byte_level.convert_ids_to_tokens(i) for i in range(size) if pieces[i] == b""]
    assert empty == [END_OF_TEXT, "<|im_end|>"]
    assert {bytes([byte]) for byte in range(256)} <= {*pieces}
    assert {b"<tool_call>", "日 é".encode(), b" ret", b"na\xc3", b"\xa5\xe6\x9c\xac"} <= {*pieces}
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(size + 9) for _ in range(draw.randrange(12))]
        text = b"".join(pieces[i] for i in ids).decode(errors="replace")
        assert byte_level.decode(ids, skip_special_tokens=True) == text
    for text in ("naïve = '日本'", "\t\x00 <tool_call>x日 é"):
        ids = byte_level.encode(text)
        assert b"".join(pieces[i] for i in ids).decode() == text


@pytest.mark.parametrize("strip", [True, False])
def test_bytes_of_a_sentencepiece_tokenizer(strip):
    """Llama 2 and Gemma, whose decoder leaves a leading space where it is."""
    tokenizer = sentencepiece(*[decoders.Strip(" ", 1, 0)] * strip)
    size = len(tokenizer)
    pieces = token_bytes(tokenizer, size + 3)
    assert pieces[:3] == [b""] * 3 and pieces[size:] == [b""] * 3
    assert pieces[3:259] == [bytes([byte]) for byte in range(256)]
    assert pieces[259:265] == [b" ", b"a", b"b", b" a", b"ab", b"  "]
    assert pieces[-6:-3] == [b"<0x0A", b"<0x0A>a", b"[INST] x"]
    draw = random.Random(0)
    # Bytes that are no characters are left out: the decoder replaces each of them, and Python's
    # replaces a sequence of them at once.
    spell = [[3 + byte for byte in letter.encode()] for letter in "\n é日😀<"]
    for _ in range(300):
        ids = []
        for _ in range(draw.randrange(12)):
            whole = draw.randrange(259, size + 3)
            ids += draw.choice([[whole], draw.choice(spell), [draw.randrange(3)]])
        text = b"".join(pieces[i] for i in ids).decode()
        if strip and text.startswith(" "):
            text = text[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_metaspace_decoder():
    """Converted SentencePiece models without byte tokens, for which <0x0A> is plain text."""
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    pieces = token_bytes(tokenizer, len(tokenizer))
    for ids in ([260, 262, 13, 259, 265, 267], [260, 264, 0, 260]):
        text = b"".join(pieces[i] for i in ids).decode()
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_stops_in_decoded_text(byte_level, kind):
    """The whole way: the automaton stops at the token with which the text contains a string."""
    tokenizer = byte_level if kind == "byte_level" else sentencepiece()
    size = len(tokenizer)
    pieces = token_bytes(tokenizer, size + 5)
    row = [" a", "日", "b\n", "ret"]
    stops = build([row, []], pieces)
    # A byte token that is no character spoils the bytes around it when Llama's decoder runs.
    loose = range(3, 259) if kind == "sentencepiece" else range(0)
    whole = [i for i in range(size) if i not in loose]
    spelled = [[pieces.index(bytes([byte])) for byte in text.encode()] for text in "日é\nb"]
    draw = random.Random(1)
    matches = 0
    for _ in range(200):
        parts = [draw.choice([*spelled, [draw.choice(whole)]]) for _ in range(6)]
        ids = [token for part in parts for token in part]
        texts = [tokenizer.decode(ids[: i + 1], skip_special_tokens=True) for i in range(len(ids))]
        found = [i for i, text in enumerate(texts) if first_stop(text, row)]
        place = first_match(run(stops, 0, ids))
        assert place == min(found, default=None)
        assert first_match(run(stops, 1, ids)) is None
        matches += place is not None
    assert 20 < matches < 180


class Reversed:
    """A decoder written in Python."""

    def decode_chain(self, tokens):
        return tokens[::-1]


@pytest.mark.parametrize(
    ("decoder", "found"),
    [
        (None, "none"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.Fuse(), "Fuse"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.CTC()]), "ByteLevel + CTC"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.ByteLevel()]), "Strip + ByteLevel"),
        (decoders.Decoder.custom(Reversed()), "one that cannot be read "),
    ],
)
def test_other_decoders_are_refused(decoder, found):
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.decoder = decoder
    expected = "tokenizer: expected a byte-level or SentencePiece decoder for stop strings, found "
    with pytest.raises(InputError) as error:
        token_bytes(tokenizer, 10)
    assert str(error.value).startswith(expected + found)


def test_a_slow_tokenizer_is_refused():
    message = "^tokenizer: expected a fast tokenizer for stop strings, found str$"
    with pytest.raises(InputError, match=message):
        token_bytes("gpt2", 10)


def test_nested_decoders(byte_level):
    """A decoder may hide in a sequence; a pattern that is no plain string cannot be followed."""
    from tokenizers import Regex

    before = token_bytes(byte_level, 300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    inner = decoders.Sequence([decoders.ByteLevel()])
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([inner, decoders.Strip(" ", 1, 0)])
    assert token_bytes(tokenizer, 300) == before
    regex = decoders.Sequence([decoders.Replace(Regex(" +"), " "), decoders.ByteFallback()])
    tokenizer.backend_tokenizer.decoder = regex
    with pytest.raises(InputError, match="found regex \\+ ByteFallback$"):
        token_bytes(tokenizer, 300)
