"""Several documents in one row: each is computed as if it were alone."""

import jax
import numpy as np
import pytest

from ctc_spec_jax.draft.ctc import CTCDrafter, CTCNetwork, ctc_config
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from tests.helpers import VOCAB, tiny_target

LENGTHS = ((5, 9, 3), (12,), (1, 14))  # documents of three rows of 18 tokens
WIDTH = 18


def rows():
    tokens, segments, positions = np.zeros((3, len(LENGTHS), WIDTH), np.int32)
    tokens[:] = np.random.default_rng(0).integers(0, VOCAB, tokens.shape)
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for number, length in enumerate(lengths, 1):
            segments[row, begin : begin + length] = number
            positions[row, begin : begin + length] = np.arange(length)
            begin += length
    return tokens, segments, positions


def documents():
    """(row, first place, length) of every document."""
    for row, lengths in enumerate(LENGTHS):
        for begin, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
            yield row, int(begin), length


def alone(arrays):
    """Every document at the beginning of a row of its own, garbage or zeros behind it."""
    found = []
    for row, begin, _ in documents():
        found.append([np.roll(x[row], -begin, axis=0) for x in arrays])
    tokens, segments, positions = (np.stack(x) for x in zip(*found, strict=True))
    for index, (_, _, length) in enumerate(documents()):
        segments[index] = np.arange(WIDTH) < length
        positions[index] = np.where(np.arange(WIDTH) < length, np.arange(WIDTH), 0)
    return tokens, segments, positions


def hidden_of(lm):
    return jax.jit(lambda params, *x: lm.packed_hidden(params, *x, taps=(0, 1)))


@pytest.mark.parametrize("windows", [(), (0, 4)])
def test_documents_of_a_row_do_not_see_each_other(windows):
    lm, params = tiny_target(**({"windows": windows} if windows else {}))
    function = hidden_of(lm)
    hidden, taps = function(params, *rows())
    alone_hidden, alone_taps = function(params, *alone(rows()))
    for index, (row, begin, length) in enumerate(documents()):
        for found, expected in zip((hidden, *taps), (alone_hidden, *alone_taps), strict=True):
            np.testing.assert_allclose(
                found[row, begin : begin + length], expected[index, :length], rtol=2e-4, atol=2e-5
            )


@pytest.mark.parametrize("remat", [False, True])
def test_drafts_see_their_own_document_alone(remat):
    lm, params = tiny_target()
    drafter = CTCDrafter(ctc_config(lm.config, 2, 4, (0, 1), 32), PrefixTree(4, 3))
    # Larger than fresh ones, so that what a draft sees changes it by far more than rounding.
    draft_params = jax.tree.map(
        lambda x: x * 8 if x.ndim > 1 else x, drafter.init_params(jax.random.key(0))
    )
    network = CTCNetwork(drafter.config, remat)

    @jax.jit
    def drafted(tokens, segments, positions, seen, anchors):
        _, taps = lm.packed_hidden(params, tokens, segments, positions, taps=(0, 1))
        places = taps, params["embedding"][tokens], anchors, seen, positions
        return network.apply({"params": draft_params}, *places, method="anchor_hidden")

    anchors = np.asarray([[0, 4, 5, 11], [0, 3, 7, 10], [0, 1, 2, 14]], np.int32)
    own = np.zeros((sum(map(len, LENGTHS)), 4), np.int32)
    pairs = []  # (document, its anchor's place) of every anchor
    for index, (row, begin, length) in enumerate(documents()):
        for place, anchor in enumerate(anchors[row]):
            if begin <= anchor < begin + length:
                own[index, place] = anchor - begin
                pairs.append((row, index, place))
    assert len(pairs) == anchors.size
    tokens, segments, positions = rows()
    hidden = drafted(tokens, segments, positions, segments, anchors)
    apart = alone(rows())
    expected = drafted(*apart, apart[1], own)
    for row, index, place in pairs:
        np.testing.assert_allclose(hidden[row, place], expected[index, place], rtol=2e-4, atol=2e-5)
    # The planted fault: one segment for all, so that drafts see the document before theirs.
    wrong = drafted(tokens, segments, positions, np.ones_like(segments), anchors)
    assert np.abs(np.asarray(wrong - hidden)[0, 2:]).max() > 1e-2
