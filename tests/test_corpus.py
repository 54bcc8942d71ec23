"""Python sources as text: pure batches, and files held out by their path."""

import hashlib

import numpy as np
import pytest

from ctc_spec_jax.errors import InputError
from train import corpus

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
    train, held = corpus.corpus(("toycorpus",), 0.2)
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
    small, large = (set(corpus.corpus(("toycorpus",), share)[1]) for share in (0.1, 0.3))
    assert small < large


def test_order_of_files_and_limit(package):
    train, _ = corpus.corpus(("toycorpus",), 0.2)
    assert train == corpus.corpus(("toycorpus",), 0.2)[0]
    names = [text.split(" ")[0] for text in train]
    assert names != sorted(names)
    limited, held = corpus.corpus(("toycorpus",), 0.2, 600)
    assert limited == train[: len(limited)]
    assert sum(map(len, limited[:-1])) < 600 <= sum(map(len, limited))
    assert 600 <= sum(map(len, held))


@pytest.mark.parametrize("source", ["no_such_package_at_all", "no.such.package", "zipfile2", ""])
def test_unknown_sources_are_refused(source):
    with pytest.raises(InputError, match=r"^data\.sources: expected an installed package, found "):
        corpus.corpus((source,), 0.1)


def test_tokenizer_has_the_size_and_gives_the_text_back(package):
    texts, _ = corpus.corpus(("toycorpus",), 0.2)
    tokenizer = corpus.train_tokenizer(texts, 270)
    assert len(tokenizer) == 270
    strange = "naïve = '日本' # \t\x00\n"
    tokens = corpus.tokenize(tokenizer, [texts[1], strange])
    end = tokenizer.eos_token_id
    places = np.flatnonzero(tokens == end)
    assert tokens.dtype == np.int32 and len(places) == 2 and places[-1] == len(tokens) - 1
    assert tokenizer.decode(tokens[: places[0]]) == texts[1]
    assert tokenizer.decode(tokens[places[0] + 1 : -1]) == strange
    assert corpus.tokenize(tokenizer, []).shape == (0,)


def windows(tokens: int = 1000, length: int = 7) -> corpus.Windows:
    return corpus.Windows(np.arange(tokens, dtype=np.int32), length)


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
