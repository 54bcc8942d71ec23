"""Target against transformers: stored outputs always, live torch models where torch is there.

Every family goes through an ordinary folder and ``load_target``. The relative error is the largest
difference over the largest reference value.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctc_spec_jax.models.config import config_from_hf
from ctc_spec_jax.models.convert import load_target, save_target
from ctc_spec_jax.models.decoder import DecoderLM, output_logits
from ctc_spec_jax.types import NO_PARENT
from tests.golden import make_families as golden

TOLERANCE = 1e-5
STORED = np.load(golden.GOLDEN)
LENGTHS = np.array(golden.LENGTHS, np.int32)
SLOTS = max(golden.LENGTHS)
REAL = np.arange(SLOTS)[None] < LENGTHS[:, None]

families = pytest.mark.parametrize("family", golden.FAMILIES)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """``target(family)`` -> (lm, params, tokens [3, 24], folder), each family loaded once."""
    cache = {}

    def load(family):
        if family not in cache:
            folder = tmp_path_factory.mktemp(family)
            shapes = json.loads(str(STORED[f"{family}/shapes"]))
            (folder / "config.json").write_text(json.dumps(golden.hf_config(family)))
            save_file(golden.random_weights(family, shapes), folder / "model.safetensors")
            cache[family] = (*load_target(folder), golden.tokens(family), folder)
        return cache[family]

    return load


def assert_close(ours, reference):
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape and ours.dtype == np.float32
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    assert error < TOLERANCE, error


# One compilation per family and function: every test pads to the same shapes. Unoptimised code
# compiles in half the time; the arithmetic is the same.
_FAST = {"xla_backend_optimization_level": 0}
ROWS, NODES = 27, 9
_hidden = jax.jit(DecoderLM.hidden, static_argnums=(0, 4), compiler_options=_FAST)
_prefill = jax.jit(DecoderLM.prefill, static_argnums=(0, 4, 5), compiler_options=_FAST)
_forward_tree = jax.jit(DecoderLM.forward_tree, static_argnums=(0, 7), compiler_options=_FAST)


def forward(lm, params, tokens, lengths):
    """Logits [B, T, V] and taps [L, B, T, D] of the plain causal forward."""
    rows, size = tokens.shape
    tokens = np.pad(tokens, ((0, ROWS - rows), (0, SLOTS - size)))
    lengths = np.pad(lengths, (0, ROWS - rows), constant_values=1)
    hidden, tapped, _ = _hidden(lm, params, tokens, lengths, tuple(range(lm.config.num_layers)))
    return output_logits(params, hidden[:rows, :size]), np.stack(tapped)[:, :rows, :size]


@families
def test_plain_forward_and_taps_equal_transformers(target, family):
    lm, params, tokens, _ = target(family)
    logits, taps = forward(lm, params, tokens, LENGTHS)
    assert_close(np.asarray(logits)[REAL], STORED[f"{family}/logits"])
    assert_close(taps[:, REAL], STORED[f"{family}/taps"])


@families
def test_prefill_then_two_chains_equal_transformers(target, family):
    """Prefix, committed chain and remaining chain, of other lengths in every row."""
    lm, params, tokens, _ = target(family)
    start, kept = np.array([11, 3, 6], np.int32), np.array([7, 6, 2], np.int32)
    middle = start + kept
    taps = tuple(range(lm.config.num_layers))
    cache, before = _prefill(lm, params, tokens, start, SLOTS + NODES, taps)
    first = _chain(lm, params, cache, start, tokens, taps)
    path = np.broadcast_to(np.arange(NODES, dtype=np.int32)[None], (3, NODES))
    cache = lm.commit(cache, first.kv, jnp.asarray(path), jnp.asarray(start))
    second = _chain(lm, params, cache, middle, tokens, taps)

    logits = np.full((*tokens.shape, lm.config.vocab_size), np.nan, np.float32)
    states = np.full((len(taps), *tokens.shape, lm.config.width), np.nan, np.float32)
    for b in range(3):
        states[:, b, : start[b]] = np.stack(before)[:, b, : start[b]]
        for out, begin, end in ((first, start[b], middle[b]), (second, middle[b], LENGTHS[b])):
            logits[b, begin:end] = np.asarray(out.logits)[b, : end - begin]
            states[:, b, begin:end] = np.stack(out.taps)[:, b, : end - begin]
    scored = REAL & (np.arange(SLOTS)[None] >= start[:, None])
    assert_close(logits[scored], STORED[f"{family}/logits"][scored[REAL]])
    assert_close(states[:, REAL], STORED[f"{family}/taps"])


def _chain(lm, params, cache, length, tokens, taps):
    """The next ``NODES`` tokens of every row as a chain; rows that end earlier hold padding."""
    index = np.arange(NODES, dtype=np.int32)
    positions = length[:, None] + index[None]
    nodes = np.take_along_axis(tokens, np.minimum(positions, SLOTS - 1), axis=1)
    mask = np.broadcast_to((index[:, None] >= index[None])[None], (3, NODES, NODES))
    return _forward_tree(lm, params, cache, length, nodes, positions, mask, taps)


PARENTS = np.array(
    [
        [NO_PARENT, 0, 0, 1, 1, 2, 3, 6, 7],
        [NO_PARENT, 0, 1, 2, 3, 4, 5, 6, 7],
        [NO_PARENT, 0, 0, 0, 2, 2, 4, 4, 6],
    ]
)


def _paths(parents):
    """Root-to-node path of every node."""
    paths = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent != NO_PARENT else []), node])
    return paths


@families
def test_tree_equals_the_plain_forward_of_every_path(target, family):
    lm, params, tokens, _ = target(family)
    bits = np.random.PCG64(0).random_raw(PARENTS.size) % np.uint64(golden.VOCAB)
    nodes = bits.astype(np.int32).reshape(PARENTS.shape)
    length = np.array([13, 5, 9], np.int32)
    mask, positions = np.zeros((3, NODES, NODES), bool), np.zeros((3, NODES), np.int32)
    texts, sizes = np.zeros((ROWS, SLOTS), np.int32), np.zeros(ROWS, np.int32)
    for b in range(3):
        for node, path in enumerate(_paths(PARENTS[b])):
            mask[b, node, path] = True
            positions[b, node] = length[b] + len(path) - 1
            text = [*tokens[b, : length[b]], *nodes[b, path]]
            texts[b * NODES + node, : len(text)] = text
            sizes[b * NODES + node] = len(text)
    taps = tuple(range(lm.config.num_layers))
    cache, _ = _prefill(lm, params, tokens, length, SLOTS + NODES, taps)
    tree = _forward_tree(lm, params, cache, length, nodes, positions, mask, taps)
    plain, _ = forward(lm, params, texts, sizes)
    last = np.asarray(plain)[np.arange(ROWS), sizes - 1]
    assert_close(np.asarray(tree.logits).reshape(ROWS, -1), last)


@families
def test_config_as_transformers_saves_it_reads_the_same(family):
    saved = json.loads(str(STORED[f"{family}/saved_config"]))
    assert config_from_hf(saved) == config_from_hf(golden.hf_config(family))


@families
def test_live_transformers(target, family, tmp_path):
    """Both directions: a live model equals ours, and transformers reads what we save."""
    pytest.importorskip("torch", reason="torch is optional")
    import transformers

    lm, params, tokens, folder = target(family)
    model, shapes = golden.torch_model(family)
    assert shapes == {k: tuple(v) for k, v in json.loads(str(STORED[f"{family}/shapes"])).items()}
    live, taps = golden.torch_outputs(model, golden.tokens(family))
    ours, ours_taps = forward(lm, params, tokens, LENGTHS)
    assert_close(np.asarray(ours)[REAL], live)
    assert_close(ours_taps[:, REAL], taps)

    save_target(tmp_path / "saved", lm, params)
    saved, original = (
        load_file(tmp_path / "saved/model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert saved.keys() == original.keys()
    assert all(np.array_equal(saved[name], original[name]) for name in saved)
    reread = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", dtype="float32", local_files_only=True
    )
    again, _ = golden.torch_outputs(reread.eval(), golden.tokens(family))
    assert_close(again, live)
