"""Training data: pure batches, files held out by their path, and answers that loop."""

import hashlib

import numpy as np
import pytest

from ctc_spec_jax.errors import InputError
from train import data

FILES = 200


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """An importable package of small files, some of which are not training text."""
    root = tmp_path_factory.mktemp("packages")
    folder = root / "toycorpus"
    for number in range(FILES):
        path = folder / f"part{number % 7}" / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"value_{number} = {number} * {number}\n" * (1 + number % 3))
    for left_out in ("tests/here.py", "part0/test_file.py", "part1/site-packages/there.py"):
        (folder / left_out).parent.mkdir(parents=True, exist_ok=True)
        (folder / left_out).write_text("left_out = 1\n")
    (folder / "notes.txt").write_text("left_out = 2\n")
    (folder / "broken.py").write_bytes(b"\xff\xfe\xfd")
    (folder / "__init__.py").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        yield folder


def test_held_out_files_are_chosen_by_a_hash_of_their_path(package):
    train, held = data.corpus(("toycorpus",), 0.2)
    expected = []
    for path in package.rglob("file*.py"):
        name = "toycorpus/" + path.relative_to(package).as_posix()
        number = int(hashlib.sha1(name.encode()).hexdigest()[:8], 16)
        if number < 0.2 * 2**32:
            expected.append(path.read_text())
    assert sorted(text for text in held if text) == sorted(expected)
    assert len(expected) > FILES // 10
    assert not set(train) & set(held) - {""}
    assert len(train) + len(held) == FILES + 1  # and __init__.py
    assert not any("left_out" in text for text in train + held)


def test_growing_the_share_only_adds_files(package):
    small, large = (set(data.corpus(("toycorpus",), share)[1]) for share in (0.1, 0.3))
    assert small < large


def test_order_of_files_and_limit(package):
    train, _ = data.corpus(("toycorpus",), 0.2)
    assert train == data.corpus(("toycorpus",), 0.2)[0]
    names = [text.split(" ")[0] for text in train]
    assert names != sorted(names)
    limited, held = data.corpus(("toycorpus",), 0.2, 600)
    assert limited == train[: len(limited)]
    assert sum(map(len, limited[:-1])) < 600 <= sum(map(len, limited))
    assert 600 <= sum(map(len, held))


@pytest.mark.parametrize("source", ["no_such_package_at_all", "no.such.package", "zipfile2", ""])
def test_unknown_sources_are_refused(source):
    with pytest.raises(InputError, match=r"^data\.sources: expected an installed package, found "):
        data.corpus((source,), 0.1)


def test_tokenizer_has_the_size_and_gives_the_text_back(package):
    texts, _ = data.corpus(("toycorpus",), 0.2)
    tokenizer = data.train_tokenizer(texts, 270)
    assert len(tokenizer) == 270
    strange = "naïve = '日本' # \t\x00\n"
    tokens = data.tokenize(tokenizer, [texts[1], strange])
    end = tokenizer.eos_token_id
    places = np.flatnonzero(tokens == end)
    assert tokens.dtype == np.int32 and len(places) == 2 and places[-1] == len(tokens) - 1
    assert tokenizer.decode(tokens[: places[0]]) == texts[1]
    assert tokenizer.decode(tokens[places[0] + 1 : -1]) == strange
    assert data.tokenize(tokenizer, []).shape == (0,)


def windows(tokens: int = 1000, length: int = 7) -> data.Windows:
    return data.Windows(np.arange(tokens, dtype=np.int32), length)


def test_batches_are_a_function_of_seed_and_step():
    forward = [windows().batch(3, step, 4) for step in range(80)]
    backward = [windows().batch(3, step, 4) for step in reversed(range(80))][::-1]
    np.testing.assert_array_equal(forward, backward)
    assert not np.array_equal(windows().batch(4, 0, 4), forward[0])
    for batch in forward:
        np.testing.assert_array_equal(np.diff(batch), np.ones((4, 6)))


def test_epochs_take_every_window_once_and_reshuffle():
    count = 1000 // 7 - 1
    steps = count // 4
    epochs = [
        np.concatenate([windows().batch(0, epoch * steps + step, 4)[:, 0] for step in range(steps)])
        for epoch in range(3)
    ]
    for starts in epochs:
        assert len(set(starts.tolist())) == steps * 4
        assert len(set((starts % 7).tolist())) == 1
    assert len({int(starts[0]) % 7 for starts in epochs}) > 1
    places = [starts // 7 for starts in epochs]
    assert not np.array_equal(places[0], places[1]) and not np.array_equal(places[1], places[2])


@pytest.mark.parametrize(("tokens", "found"), [(0, 0), (5, 0), (28, 3)])
def test_too_little_text_is_refused(tokens, found):
    with pytest.raises(InputError, match=f"at least 4 windows of 7 tokens, found {found}$"):
        windows(tokens).batch(0, 0, 4)


def test_loop_share():
    assert data.loop_share(np.arange(100)) == 0.0
    assert data.loop_share([1] * 8) == 0.0  # a single group
    # n tokens have n - 7 groups of 8, of which a text of period p has p different ones.
    for length, period in [(20, 1), (40, 3), (64, 16)]:
        groups = length - 7
        share = data.loop_share(np.arange(length) % period)
        assert share == pytest.approx(1 - min(period, groups) / groups)
    # 23 groups lie in the first half, 7 across the border, and 23 repeat 2 in the second.
    halves = np.concatenate([np.arange(30), 100 + np.arange(30) % 2])
    assert data.loop_share(halves) == pytest.approx(1 - (23 + 7 + 2) / 53)


@pytest.mark.parametrize("max_loop", [0.0, 0.2, 0.5, 1.0])
def test_before_loop_is_the_longest_beginning_that_does_not_loop(max_loop):
    draw = np.random.default_rng(1)
    for length in (0, 3, 7, 8, 9, 40, 60):
        # Repeating a short text and leaving it again raises and lowers the share.
        text = np.concatenate([draw.integers(0, 3, 12), np.arange(20), np.arange(20), np.ones(8)])
        tokens = text.astype(np.int32)[:length]
        fine = [n for n in range(length + 1) if slow_loop_share(tokens[:n]) <= max_loop]
        assert data.before_loop(tokens, max_loop) == max(fine)
        assert data.loop_share(tokens) == pytest.approx(slow_loop_share(tokens))


def slow_loop_share(tokens) -> float:
    groups = [tuple(tokens[i : i + 8].tolist()) for i in range(len(tokens) - 7)]
    return sum(group in groups[:i] for i, group in enumerate(groups)) / max(len(groups), 1)


@pytest.fixture
def answers(tmp_path):
    """Rows of unequal lengths: 0..38 are fine, 39 begins to loop, 40..49 are too short."""
    draw = np.random.default_rng(0)
    tokens = draw.permuted(np.tile(np.arange(60, dtype=np.int32), (50, 1)), axis=1)
    prompts = draw.integers(1, 9, 50).astype(np.int32)
    lengths = draw.integers(40, 61, 50).astype(np.int32)
    lengths[39] = prompts[39] + 50
    tokens[39, prompts[39] + 20 :] = 60
    for row in range(40, 45):
        tokens[row, prompts[row] :] = 60
    lengths[45:] = prompts[45:] + 15
    path = str(tmp_path / "answers.npz")
    np.savez(path, tokens=tokens, prompt_lengths=prompts, lengths=lengths)
    # 21 of its groups are new, so 13 repeats are a share of 0.38 and 14 are one of 0.4.
    lengths[39] = prompts[39] + 21 + 13 + 7
    return path, tokens, prompts, lengths


def rows_of(tokens, part: data.Answers) -> list[int]:
    """Which rows of ``tokens`` a part holds, padding left out."""
    by_row = {row.tobytes(): place for place, row in enumerate(tokens)}
    return [by_row[row[: tokens.shape[1]].tobytes()] for row in part.tokens]


def test_answers_are_cut_before_they_loop_and_short_ones_left_out(answers):
    path, tokens, prompts, lengths = answers
    train, held = data.load_answers((path,), 0.39, 0.25)
    places = rows_of(tokens, train), rows_of(tokens, held)
    assert sorted(places[0] + places[1]) == list(range(40))
    assert len(places[1]) == 10
    for part, index in zip((train, held), places, strict=True):
        np.testing.assert_array_equal(part.prompt_lengths, prompts[index])
        np.testing.assert_array_equal(part.lengths, lengths[index])
    everything = data.load_answers((path,), 1.0, 0.0)
    assert [len(part.tokens) for part in everything] == [44, 1]


def test_answers_of_several_files_are_held_out_alike(answers, tmp_path):
    path, tokens, _, _ = answers
    short = tmp_path / "short.npz"
    other = np.tile(np.arange(100, 130, dtype=np.int32), (40, 1))
    other[:, 0] = np.arange(40)
    ends = np.full((40,), 30, np.int32)
    np.savez(short, tokens=other, prompt_lengths=np.ones_like(ends), lengths=ends)
    parts = data.load_answers((path, str(short)), 0.39, 0.25)
    everything = np.concatenate([tokens, np.pad(other, ((0, 0), (0, 30)))])
    train, held = (rows_of(everything, part) for part in parts)
    assert sorted(train + held) == [*range(40), *range(50, 90)]
    assert len(held) == 20 and 4 <= sum(row < 40 for row in held) <= 16


def test_answer_batches_are_pure_and_reshuffle(answers):
    path, tokens, prompts, lengths = answers
    train, _ = data.load_answers((path,), 0.39, 0.25)
    again, _ = data.load_answers((path,), 0.39, 0.25)
    seen = []
    for step in range(14):
        batch = train.batch(1, step, 4)
        places = rows_of(tokens, data.Answers(**batch))
        np.testing.assert_array_equal(batch["prompt_lengths"], prompts[places])
        np.testing.assert_array_equal(batch["lengths"], lengths[places])
        seen.append(places)
    for step in (13, 2, 7):
        np.testing.assert_array_equal(again.batch(1, step, 4)["tokens"], tokens[seen[step]])
    first, second = np.ravel(seen[:7]), np.ravel(seen[7:])
    assert len(set(first)) == len(set(second)) == 28
    assert not np.array_equal(first, second)
    with pytest.raises(InputError, match=r"^data\.answers: expected at least 31 rows, found 30$"):
        train.batch(0, 0, 31)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 but no archive", b"text"])
def test_other_files_are_no_answers(tmp_path, content):
    path = tmp_path / "file.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"^data\.answers: expected a file of train.regenerate"):
        data.load_answers((str(path),), 0.4)


def test_answers_without_a_column_or_a_file_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"^data\.answers: expected files of train.regenerate"):
        data.load_answers((), 0.4)
    np.savez(tmp_path / "file.npz", tokens=np.zeros((2, 3), np.int32))
    with pytest.raises(InputError, match=r"^data\.answers: expected a file of train.regenerate"):
        data.load_answers((str(tmp_path / "file.npz"),), 0.4)
