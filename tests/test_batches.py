"""Rows of documents, and batches that depend on the seed and the step alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_spec_jax.errors import InputError
from train import data

T = 12


def documents(lengths) -> data.Documents:
    """Documents of given lengths; every token and every pattern of labels says where it is from."""
    lengths = np.asarray(lengths, np.int64)
    total = int(lengths.sum())
    tokens = np.arange(1, total + 1, dtype=np.int32)
    trained = tokens % 3 == 0
    starts = np.cumsum(lengths) - lengths
    return data.Documents(tokens, trained, starts, lengths, np.zeros(len(lengths), np.uint64), {})


def contents(row: dict[str, np.ndarray]) -> list[list[int]]:
    """Documents of a row, with everything about it checked."""
    assert {name: part.dtype for name, part in row.items()} == {
        "tokens": np.int32,
        "segments": np.int32,
        "positions": np.int32,
        "trained": bool,
    }
    segments = row["segments"]
    used = int((segments > 0).sum())
    assert (segments[:used] > 0).all() and (segments[used:] == 0).all()
    for name in ("tokens", "positions", "trained"):
        assert not row[name][used:].any()
    np.testing.assert_array_equal(row["trained"][:used], row["tokens"][:used] % 3 == 0)
    found = []
    for number in range(1, segments.max() + 1):
        (places,) = np.nonzero(segments == number)
        np.testing.assert_array_equal(places, np.arange(places[0], places[-1] + 1))
        np.testing.assert_array_equal(row["positions"][places], np.arange(len(places)))
        found.append(row["tokens"][places].tolist())
    return found


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, T), max_size=40), st.booleans())
def test_every_document_is_once_and_whole_in_a_row(lengths, together):
    source = documents(lengths)
    rows = data.pack(source, T, together)
    packed = [contents(rows[number]) for number in range(len(rows))]
    found = sorted(document for row in packed for document in row)
    assert found == [source[place][0].tolist() for place in range(len(source))]
    sizes = sorted(sum(map(len, row)) for row in packed)
    if together:
        # Any two rows are more than one: what began a row had no room in those before it.
        assert all(a + b > T for a, b in itertools.pairwise(sizes))
    else:
        assert [len(row) for row in packed] == [1] * len(lengths)
    record = rows.record()
    assert record["rows"] == len(rows) and record["documents"] == len(lengths)
    if lengths:
        efficiency = sum(lengths) / (T * len(rows))
        assert record["packing_efficiency"] == pytest.approx(efficiency, abs=1e-4)


def test_packing_is_deterministic_and_mixes_the_order():
    lengths = np.random.default_rng(0).integers(1, T + 1, 300)
    first, second = (data.pack(documents(lengths), T) for _ in range(2))
    np.testing.assert_array_equal(first.members, second.members)
    alike = data.pack(documents(np.full(300, 3)), T)
    assert abs(np.corrcoef(alike.members, np.arange(300))[0, 1]) < 0.5


ROWS = data.pack(documents(np.full(23, T)), T, together=False)
"""Row n begins with token 12 n + 1."""


def numbers(batch: dict[str, np.ndarray]) -> list[int]:
    """Which rows a batch holds."""
    assert batch["tokens"].shape == batch["trained"].shape == (len(batch["row"]), T)
    assert batch["row"].dtype == batch["tokens"].dtype == np.int32
    assert batch["trained"].dtype == bool
    found = batch["tokens"][:, 0] // T
    for place, number in enumerate(found):
        np.testing.assert_array_equal(batch["tokens"][place], ROWS[number]["tokens"])
        np.testing.assert_array_equal(batch["trained"][place], ROWS[number]["trained"])
    return found.tolist()


def test_epochs_take_every_row_but_the_remainder_and_reshuffle():
    dataset = data.batch_dataset(ROWS, 4, seed=3)
    epochs = [[n for k in range(5) for n in numbers(dataset[5 * e + k])] for e in range(8)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    # The remainder is another one in every epoch, so that no row is left out for good.
    assert set().union(*epochs) == set(range(23))
    other = data.batch_dataset(ROWS, 4, seed=4)
    assert [n for k in range(5) for n in numbers(other[k])] not in epochs
    again = data.batch_dataset(ROWS, 4, seed=3)
    assert [n for k in range(5) for n in numbers(again[35 + k])] == epochs[7]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_rows_of_a_step(processes):
    whole = data.batch_dataset(ROWS, 4, seed=1)
    parts = [data.batch_dataset(ROWS, 4, 1, process, processes) for process in range(processes)]
    for step in (0, 1, 4, 5, 6, 23):
        batches = [part[step] for part in parts]
        rows = [number for batch in batches for number in numbers(batch)]
        assert rows == numbers(whole[step]) and len(set(rows)) == 4
        assert np.concatenate([batch["row"] for batch in batches]).tolist() == [0, 1, 2, 3]


def test_resuming_anywhere_and_on_other_processes_continues_the_sequence():
    steps = 12
    one = data.batches(ROWS, 4, 7)
    states, sequence = [], []
    for _ in range(steps):
        states.append(one.get_state())
        sequence.append(numbers(next(one)))
    assert states == [{"step": step} for step in range(steps)]
    one.set_state(states[2])
    assert numbers(next(one)) == sequence[2] and one.get_state() == {"step": 3}
    one.close()
    for start in (1, 5, 9):
        pair = [data.batches(ROWS, 4, 7, process, 2, start=start) for process in range(2)]
        for step in range(start, steps):
            assert numbers(next(pair[0])) + numbers(next(pair[1])) == sequence[step]
        for part in pair:
            part.close()


def test_rows_that_make_no_batch_are_refused():
    message = r"^data.files: expected at least batch.rows \(24\) rows of 12 tokens, found 23$"
    with pytest.raises(InputError, match=message):
        data.batches(ROWS, 24, 0)
    with pytest.raises(InputError, match=r"^batch.rows: expected a multiple of the number of pro"):
        data.batches(ROWS, 4, 0, 0, 3)
