"""Training data: answers of train.regenerate."""

import numpy as np
import pytest

from ctc_spec_jax.errors import InputError
from train import data


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
