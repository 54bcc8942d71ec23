"""The target's law at every node: transformers' stored scores, and a slow reference.

The laws here come out of the same steps as in a round: what is known, prefixes, processing.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import accept, logits
from ctc_spec_jax.tree import topology
from ctc_spec_jax.types import NO_TOKEN, DecodeState, DraftTree, Sampling
from tests.golden import make_processors as golden
from tests.helpers import make_request
from tests.reference import reference_scores
from tests.test_topology import DEPTH, random_parents, walk

# A row is a dict of arguments of ``reference_scores``, scores left out.
OFF = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_new_tokens": 0,
}
PHRASES, WIDTH = 16, 5


def sampling_of(rows, vocab: int, dense: bool, width: int = WIDTH) -> Sampling:
    """Arrays of a batch; not ``dense``: None where no row uses a field."""
    fields = {}
    for name, off in OFF.items():
        kind = np.int32 if isinstance(off, int) else np.float32
        fields[name] = np.asarray([row.get(name, off) for row in rows], kind)
        if not dense and (fields[name] == off).all():
            fields[name] = None
    bias = np.zeros((len(rows), vocab), np.float32)
    phrases = np.full((len(rows), PHRASES, width), NO_TOKEN, np.int32)
    phrase_bias = np.zeros((len(rows), PHRASES), np.float32)
    for number, row in enumerate(rows):
        for token, value in row.get("bias", {}).items():
            bias[number, token] = value
        for place, (ids, value) in enumerate(row.get("phrases", ())):
            phrases[number, place, width - len(ids) :] = ids
            phrase_bias[number, place] = value
    if dense or bias.any():
        fields["bias"] = bias
    if dense or phrase_bias.any():
        fields |= {"phrases": phrases, "phrase_bias": phrase_bias}
    return Sampling(**fields)


@functools.partial(jax.jit, static_argnums=0)
def _laws(max_depth, scores, request, tokens, prompt_length, generated, count, tree, some):
    vocab = scores.shape[-1]
    known = accept.known_prompt(request.sampling, tokens, prompt_length, vocab)
    state = DecodeState(
        **dict.fromkeys(field.name for field in dataclasses.fields(DecodeState))
        | {
            "tokens": tokens,
            "length": prompt_length + count - 1,
            "prompt_length": prompt_length,
            "known": accept.know(known, generated, count),
        }
    )
    lineage = topology.lineages(tree, max_depth)
    before = logits.prefixes(state, request, tree, lineage)
    nodes = logits.NodeLaws(scores, request, state.known, before)
    return nodes.everywhere() if some is None else nodes.at(some)


def laws(scores, rows, tree=None, max_depth: int = 0, *, dense=True, width=WIDTH, some=None):
    """Law of scores [B, N, V] at every node or at ``some`` int32 [B, K], as NumPy.

    Without a tree there are the roots alone.
    """
    prompts, texts = ([list(row[name]) for row in rows] for name in ("prompt", "generated"))
    stops = [[*row.get("stops", ()), NO_TOKEN] for row in rows]
    tokens = padded([a + b for a, b in zip(prompts, texts, strict=True)], 20)
    lengths, counts = (np.asarray([*map(len, ids)], np.int32) for ids in (prompts, texts))
    if tree is None:
        tree = topology.root_only(jnp.asarray(tokens[np.arange(len(rows)), lengths + counts - 1]))
    sampling = sampling_of(rows, scores.shape[-1], dense, width)
    request = make_request(len(rows), 9, padded(stops, 5, NO_TOKEN), sampling=sampling)
    return jax.tree.map(
        np.asarray,
        _laws(max_depth, scores, request, tokens, lengths, padded(texts, 12), counts, tree, some),
    )


def padded(lists, width: int, filler: int = 3) -> np.ndarray:
    """int32 [B, width]; the filler is a token, so that padding is tested."""
    return np.asarray([[*ids, *[filler] * (width - len(ids))] for ids in lists], np.int32)


def assert_scores(ours, expected):
    """The same tokens ruled out, and the same scores up to rounding."""
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(expected))
    kept = np.isfinite(expected)
    np.testing.assert_allclose(ours[kept], expected[kept], rtol=1e-5, atol=1e-5)


def bits(array) -> np.ndarray:
    return np.asarray(array).view(np.int32)


# Stored scores of transformers.

CASES = golden.load()


def row_of(case) -> dict:
    """Our options of a case. Greedy cases keep their filters, which must do nothing."""
    options = dict(case["options"])
    sampled = options.pop("do_sample")
    biases = options.pop("sequence_bias", [])
    words = [(ids, -math.inf) for ids in options.pop("bad_words_ids", [])]
    options["temperature"] = options.get("temperature", 1.0) if sampled else 0.0
    return {
        "prompt": case["prompt"],
        "generated": case["generated"],
        "stops": case["eos"],
        "bias": {ids[0]: value for ids, value in biases if len(ids) == 1},
        # Forbidden single tokens are phrases of one token here, so that both ways are tested.
        "phrases": [(ids, value) for ids, value in biases if len(ids) > 1] + words,
        **options,
    }


def scores_of(cases) -> np.ndarray:
    return np.stack([case["scores"] for case in cases])[:, None]


@functools.cache
def stored_laws():
    return laws(scores_of(CASES), [row_of(case) for case in CASES])


def test_order_of_transformers():
    """What the docstring of ``logits`` says of the order."""
    order = [case["order"] for case in CASES if len(case["order"]) == len(golden.PROCESSORS)]
    assert len(order) >= 8
    for names in order:
        assert names == [
            "SequenceBiasLogitsProcessor",
            "RepetitionPenaltyLogitsProcessor",
            "NoBadWordsLogitsProcessor",
            "MinNewTokensLengthLogitsProcessor",
            "TemperatureLogitsWarper",
            "TopKLogitsWarper",
            "TopPLogitsWarper",
            "MinPLogitsWarper",
        ]


def test_all_stored_cases_in_one_batch():
    law = stored_laws()
    for number, case in enumerate(CASES):
        assert_scores(law.logits[number, 0], case["expected"])
        assert law.greedy[number] != case["options"]["do_sample"]


def test_reference_equals_stored_cases():
    for case in CASES:
        found = reference_scores(case["scores"], **row_of(case))
        assert_scores(found.astype(np.float32), case["expected"])


def names_of(case) -> set[str]:
    return case["options"].keys() - {"do_sample"}


@pytest.mark.parametrize("name", [*golden.PROCESSORS, "not top_k", "not top_p"])
def test_none_is_the_off_value(name):
    """A batch with one processor, or all but one: the same bits as in the batch of all cases."""

    def belongs(case):
        used = case["options"].keys() - {"do_sample"}
        return name[4:] not in used if name.startswith("not ") else used == {name}

    some = [number for number, case in enumerate(CASES) if belongs(case)]
    assert some
    cases = [CASES[number] for number in some]
    law = laws(scores_of(cases), [row_of(case) for case in cases], dense=False)
    np.testing.assert_array_equal(bits(law.logits), bits(stored_laws().logits[some]))


def test_greedy_batch_has_no_warpers():
    greedy = [n for n, case in enumerate(CASES) if not case["options"]["do_sample"]]
    law = laws(
        scores_of([CASES[n] for n in greedy]), [row_of(CASES[n]) for n in greedy], dense=False
    )
    assert law.greedy is None
    np.testing.assert_array_equal(bits(law.logits), bits(stored_laws().logits[greedy]))


def test_live_transformers():
    pytest.importorskip("torch", reason="torch is optional")
    cases = golden.random_cases(seed=100)
    law = laws(scores_of(cases), [row_of(case) for case in cases])
    for number, case in enumerate(cases):
        assert_scores(law.logits[number, 0], case["expected"])


# Every node of random trees against the reference.

SHAPES = {  # V, N, M, W
    "tree": (23, 12, DEPTH, 4),
    "long phrases": (17, 9, DEPTH, 16),
    "chain": (40, 7, 6, 3),
    "root": (31, 1, 0, 1),
}
ROWS = 9


def random_tree(rng, batch: int, nodes: int, max_depth: int, roots) -> DraftTree:
    """A few tokens only, so that paths repeat them; some nodes are invalid."""
    if max_depth == nodes - 1:
        parents = np.tile(np.arange(-1, nodes - 1, dtype=np.int32), (batch, 1))
    else:
        pick = [random_parents(lambda n: int(rng.integers(n)), nodes) for _ in range(batch)]
        parents = np.stack(pick)
    tokens = rng.integers(0, 6, (batch, nodes)).astype(np.int32)
    tokens[:, 0] = roots
    valid = rng.random((batch, nodes)) < 0.8
    valid[:, 0] = True
    return DraftTree(jnp.asarray(tokens), jnp.asarray(parents), jnp.asarray(valid))


def path_tokens(tree: DraftTree, row: int, node: int) -> list[int]:
    """Tokens below the root down to the node."""
    line = walk(tree.parents[row], node)[:-1]
    return [int(tree.tokens[row, n]) for n in reversed(line)]


def random_phrases(rng, vocab: int, width: int, texts):
    """Phrases that continue one of ``texts``, some with one token changed."""
    phrases = []
    for _ in range(12):
        known = texts[int(rng.integers(len(texts)))]
        size = int(rng.integers(0, min(width - 1, len(known)) + 1))
        start = known[len(known) - size :]
        if start and rng.random() < 0.2:
            start[int(rng.integers(size))] = int(rng.integers(vocab))
        value = -math.inf if rng.random() < 0.2 else float(rng.uniform(-2, 2))
        phrases.append(((*start, int(rng.integers(vocab))), value))
    # One token more than there is before it: must not apply, however its rest fits.
    longest = [(5, *texts[0], 2)[-width:]] if len(texts[0]) + 2 <= width else []
    return phrases + [(ids, 1.0) for ids in longest]


def random_row(rng, vocab: int, number: int) -> dict:
    """All options on; two rows of three are sampled. Phrases are added later."""
    ids = rng.permutation(vocab)
    generated = rng.integers(0, 6, number % 5).tolist()
    return {
        "prompt": rng.integers(0, 9, 1 + number % 4).tolist(),
        "generated": generated,
        "stops": [int(ids[0]), int(ids[1]), int(ids[0])],
        "temperature": 0.0 if number % 3 == 0 else float(rng.choice([0.7, 1.0, 1.5])),
        "top_k": int(rng.integers(vocab // 2, vocab)),
        "top_p": float(rng.uniform(0.7, 0.99)),
        "min_p": float(rng.uniform(0.001, 0.1)),
        "repetition_penalty": float(rng.choice([0.7, 1.3])),
        "presence_penalty": float(rng.uniform(-0.5, 0.5)),
        "frequency_penalty": float(rng.uniform(-0.5, 0.5)),
        "bias": {int(token): float(rng.uniform(-2, 2)) for token in ids[2:6]} | {3: -math.inf},
        "min_new_tokens": len(generated) + int(rng.integers(0, 4)),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_law_at_every_node_equals_the_reference(shape, seed):
    vocab, nodes, max_depth, width = SHAPES[shape]
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, vocab, number) for number in range(ROWS)]
    roots = [(row["prompt"] + row["generated"])[-1] for row in rows]
    tree = random_tree(rng, len(rows), nodes, max_depth, roots)
    paths = [[path_tokens(tree, row, node) for node in range(nodes)] for row in range(len(rows))]
    for row, own in zip(rows, paths, strict=True):
        known = row["prompt"] + row["generated"]
        row["phrases"] = random_phrases(rng, vocab, width, [known + path for path in own])
    scores = (1.5 * rng.standard_normal((len(rows), nodes, vocab))).astype(np.float32)
    law = laws(scores, rows, tree, max_depth, width=width)
    np.testing.assert_array_equal(law.greedy, [row["temperature"] == 0 for row in rows])
    for number, row in enumerate(rows):
        for node, path in enumerate(paths[number]):
            there = {**row, "generated": row["generated"] + path}
            assert_scores(law.logits[number, node], reference_scores(scores[number, node], **there))
    if max_depth:
        assert any(len(path) > len({*path}) for own in paths for path in own)
        assert width < 3 or spanning(rows, paths)


def spanning(rows, paths) -> int:
    """How many phrases apply by tokens of the draft and committed ones together."""
    count = 0
    for row, own in zip(rows, paths, strict=True):
        for path in filter(None, own):
            known = row["prompt"] + row["generated"] + path
            for (*start, _), _ in row["phrases"]:
                count += len(start) > len(path) and known[-len(start) :] == start
    return count


def test_laws_at_some_nodes_are_those_of_everywhere():
    rng = np.random.default_rng(7)
    vocab, nodes, max_depth, width = SHAPES["tree"]
    rows = [random_row(rng, vocab, number) for number in range(ROWS)]
    roots = [(row["prompt"] + row["generated"])[-1] for row in rows]
    tree = random_tree(rng, ROWS, nodes, max_depth, roots)
    for number, row in enumerate(rows):
        known = row["prompt"] + row["generated"]
        texts = [known + path_tokens(tree, number, node) for node in range(nodes)]
        row["phrases"] = random_phrases(rng, vocab, width, texts)
    scores = rng.standard_normal((ROWS, nodes, vocab)).astype(np.float32)
    some = rng.integers(0, nodes, (ROWS, 5)).astype(np.int32)  # in any order, twice as well
    everywhere = laws(scores, rows, tree, max_depth, width=width)
    there = laws(scores, rows, tree, max_depth, width=width, some=some)
    expected = np.take_along_axis(everywhere.logits, some[..., None], axis=1)
    np.testing.assert_array_equal(bits(there.logits), bits(expected))
    np.testing.assert_array_equal(there.greedy, everywhere.greedy)


def test_frequency_counts_generated_tokens_alone():
    """The prompt has token 2 three times, the committed text once and the path twice."""
    tree = DraftTree(
        jnp.asarray([[2, 2, 4, 2]], jnp.int32),
        jnp.asarray([[-1, 0, 1, 2]], jnp.int32),
        jnp.ones((1, 4), bool),
    )
    row = {"prompt": [2, 2, 2, 5], "generated": [2]}
    options = {"frequency_penalty": 1.0, "presence_penalty": 0.25}
    law = laws(np.zeros((1, 4, 6), np.float32), [row | options], tree, 3, dense=False)
    np.testing.assert_array_equal(law.logits[0, :, 2], [-1.25, -2.25, -2.25, -3.25])
    np.testing.assert_array_equal(law.logits[0, :, 4], [0, 0, -1.25, -1.25])
    np.testing.assert_array_equal(law.logits[0, :, 5], np.zeros(4))


# Off-values, greedy rows, order.


def plain_row(**options) -> dict:
    return {"prompt": [1, 2], "generated": [2, 3], "stops": [4], **options}


def test_off_values_change_no_bit_beside_rows_that_use_everything():
    rng = np.random.default_rng(0)
    batch, vocab = ROWS, SHAPES["root"][0]
    scores = rng.standard_normal((batch, 1, vocab)).astype(np.float32)
    scores[:, :, 5:9] = [-np.inf, 1e30, -1e30, 1e-30]
    rows = [random_row(rng, vocab, number) | {"phrases": [((2,), 1.0)]} for number in range(batch)]
    rows[1], rows[5] = plain_row(temperature=1.0), plain_row()
    law = laws(scores, rows, width=SHAPES["root"][3])
    np.testing.assert_array_equal(bits(law.logits[[1, 5]]), bits(scores[[1, 5]]))
    assert not law.greedy[1] and law.greedy[5]
    alone = laws(scores[1:2], rows[1:2], dense=False)
    np.testing.assert_array_equal(bits(alone.logits), bits(scores[1:2]))


def test_temperature_comes_before_top_p():
    """T=2 flattens the law, so top-p 0.9 keeps four tokens; before temperature it keeps three.

    The fault is real: rejection_sampler.py of vllm-project/tpu-inference.
    """
    scores = np.asarray([[[3, 2, 1, 0, -1]]], np.float32)
    for temperature, kept in [(2.0, 4), (1.0, 3)]:
        law = laws(scores, [plain_row(temperature=temperature, top_p=0.9)], dense=False)
        expected = np.where(np.arange(5) < kept, scores[0, 0] / temperature, -np.inf)
        np.testing.assert_array_equal(law.logits[0, 0], expected)


def test_greedy_rows_keep_their_logits_in_a_mixed_batch():
    """No division by 0, no flipped sign, no filter (vllm-project/tpu-inference#2860)."""
    scores = np.random.default_rng(1).standard_normal((3, 2, 17)).astype(np.float32)
    filters = {"top_k": 3, "top_p": 0.5, "min_p": 0.3}
    rows = [plain_row(temperature=t, **filters) for t in (0.0, 0.5, -1.0)]
    tree = DraftTree(
        jnp.ones((3, 2), jnp.int32), jnp.asarray([[-1, 0]] * 3, jnp.int32), jnp.ones((3, 2), bool)
    )
    law = laws(scores, rows, tree, 1, dense=False)
    np.testing.assert_array_equal(law.greedy, [True, False, True])
    np.testing.assert_array_equal(bits(law.logits[[0, 2]]), bits(scores[[0, 2]]))
    assert np.isfinite(law.logits[1]).sum(axis=-1).max() <= 3


# Thresholds of the filters.


def sorted_support(scores, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """bool [V]: what the filters keep, by a descending sort; float64."""
    falling = -np.sort(-scores.astype(np.float64))
    falling = falling[falling >= falling[min(top_k or len(falling), len(falling)) - 1]]
    weights = np.exp(falling - falling[0])
    mass = np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum()
    above = mass[np.searchsorted(-falling, -falling, side="left")]  # strictly: ties start together
    falling = falling[(above < top_p) | (falling == falling[0])]
    falling = falling[np.exp(falling - falling[0]) >= min_p]
    return (scores >= falling[-1]) & np.isfinite(scores)


FILTERS = [
    *({"top_k": k} for k in (1, 2, 37, 63, 64, 65, 66, 500, 999, 1000, 1001, 10**9)),
    *({"top_p": p} for p in (0.0, 1e-45, 1e-30, 1e-4, 0.1, 0.5, 0.9, 0.999)),
    *({"top_p": float(np.float32(1) - np.float32(d))} for d in (1e-7, 2e-7, 1e-6)),
    *({"min_p": p} for p in (1e-30, 0.003, 0.1, 0.6, 1.0)),
    *({"top_k": k, "top_p": p} for k in (1, 40, 700) for p in (1e-4, 0.7, 0.99)),
    *({"top_k": k, "top_p": float(np.float32(1) - np.float32(6e-8))} for k in range(4, 60, 5)),
    *({"top_k": 100, "top_p": 0.95, "min_p": p} for p in (0.01, 0.3)),
]


@pytest.fixture(scope="module")
def filter_scores() -> np.ndarray:
    """float32 [5, 1000]: heavy ties, zeros of both signs, no ties, one big group, neighbours."""
    rng = np.random.default_rng(3)
    smooth = (2 * rng.standard_normal((5, 1000))).astype(np.float32)
    scores = smooth.copy()
    scores[0] = np.round(4 * smooth[0]) / 4
    scores[1] = np.where(np.abs(smooth[1]) < 1, 0.0 * smooth[1], np.minimum(smooth[1], 0.0))
    scores[3] = np.where(smooth[3] > -1, 1.5, smooth[3])
    scores[:3, rng.permutation(1000)[:300]] = -np.inf
    scores[4] = (bits(np.float32(1.5)) + rng.permutation(1000).astype(np.int32)).view(np.float32)
    scores[4, rng.permutation(1000)[:309]] = -np.inf  # top-p is no multiple of 1/691
    assert np.signbit(scores[1][scores[1] == 0]).any()
    return scores


def test_thresholds_equal_those_of_a_sort(filter_scores):
    """A level set between those of a slightly smaller and a slightly larger top-p."""
    kinds = len(filter_scores)
    chain = np.tile(np.arange(-1, kinds - 1, dtype=np.int32), (len(FILTERS), 1))
    tree = DraftTree(jnp.zeros_like(chain), jnp.asarray(chain), jnp.ones(chain.shape, bool))
    scores = np.tile(filter_scores[None], (len(FILTERS), 1, 1))
    rows = [plain_row(temperature=1.0, **options) for options in FILTERS]
    law = laws(scores, rows, tree, kinds - 1, dense=False)
    clear = 0
    for number, options in enumerate(FILTERS):
        for raw, found in zip(filter_scores, law.logits[number], strict=True):
            kept = np.isfinite(found)
            np.testing.assert_array_equal(found[kept], raw[kept])
            slack = 1e-6 if "top_p" in options else 0.0
            top_p = options.get("top_p", 1.0)
            least = sorted_support(raw, **{**options, "top_p": top_p - slack})
            most = sorted_support(raw, **{**options, "top_p": top_p + slack})
            assert kept.any() and not (least & ~kept).any() and not (kept & ~most).any(), options
            assert raw[kept].min() > max(raw[~kept], default=-math.inf), options
            clear += (least == most).all()
    assert clear >= sum(1 - 2e-6 > some.get("top_p", 0.5) for some in FILTERS) * kinds


def test_zeros_of_both_signs_tie():
    scores = np.asarray([[[-0.0, -1.0, 0.0, -2.0]]] * 3, np.float32)
    options = ({"top_k": 1}, {"top_p": 0.2}, {"min_p": 1.0})
    law = laws(scores, [plain_row(temperature=1.0, **some) for some in options], dense=False)
    np.testing.assert_array_equal(np.isfinite(law.logits[:, 0]), [[True, False, True, False]] * 3)


def test_dtypes():
    """Half precision is widened; double precision keeps what single precision would tie."""
    filters = {"top_k": jnp.ones(1, jnp.int32), "top_p": jnp.full(1, 0.9, jnp.float32)}
    sampling = Sampling(temperature=jnp.ones(1, jnp.float32), **filters)
    request = make_request(1, 9, sampling=sampling)
    nothing = accept.known_prompt(sampling, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), 3)
    before = logits.Prefixes(jnp.zeros((1, 1, 0), jnp.int32), None, jnp.zeros((1, 1), jnp.int32))
    process = jax.jit(logits.process_logits)
    half = jnp.asarray([[[1.0, 2.0, 2.0]]], jnp.bfloat16)
    law = process(half, request, nothing, before)
    assert law.logits.dtype == np.float32
    np.testing.assert_array_equal(law.logits, np.asarray([[[-np.inf, 2, 2]]], np.float32))
    with jax.enable_x64(True):
        double = np.asarray([[[1.0, 2.0, 2.0 + 1e-12]]])
        law = process(jnp.asarray(double), request, nothing, before)
        assert law.logits.dtype == np.float64
        expected = np.where([False, False, True], double, -np.inf)
        np.testing.assert_array_equal(law.logits, expected)
