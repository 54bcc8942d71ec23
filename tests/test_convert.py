"""models/convert.py: bit-exact round trips, memory, and one sentence per mistake.

That the numbers mean what transformers means is proved in test_parity.py.
"""

import json
import os
import shutil
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.config import DecoderConfig, RopeScaling
from ctc_spec_jax.models.convert import load_target, save_target, target_folder
from ctc_spec_jax.models.decoder import DecoderLM

CONFIGS = {
    "llama": DecoderConfig(
        13, 8, 2, 4, 2, 2, 6, qkv_bias=True, output_bias=True, mlp_bias=True, norm_eps=1e-5
    ),
    "mistral": DecoderConfig(13, 8, 2, 4, 2, 4, 6, windows=(5, 5)),
    "qwen2": DecoderConfig(13, 8, 3, 4, 1, 2, 6, qkv_bias=True, windows=(0, 5, 0)),
    "qwen3": DecoderConfig(13, 8, 2, 2, 2, 6, 6, qk_norm=True, tied_embeddings=True),
    "llama3": DecoderConfig(
        13, 8, 1, 4, 2, 2, 6, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    ),
}


def random_params(lm, dtype, seed=0):
    """Leaves whose values all differ, so that any wrong place shows."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), dtype), shapes)


def assert_same(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saved(tmp_path):
    """(folder, lm, params) of a small untied Llama with every kind of bias."""
    lm = DecoderLM(CONFIGS["llama"])
    params = random_params(lm, jnp.float32)
    save_target(tmp_path / "model", lm, params)
    return tmp_path / "model", lm, params


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip_bit_for_bit_without_torch(family, dtype, tmp_path, monkeypatch):
    for name in ("torch", "transformers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would raise
    lm = DecoderLM(CONFIGS[family])
    params = random_params(lm, dtype)
    save_target(tmp_path / "a/b", lm, params)
    loaded, again = load_target(tmp_path / "a/b", dtype)
    assert loaded == lm
    assert_same(again, params)
    assert os.listdir(tmp_path / "a") == ["b"]
    with safe_open(tmp_path / "a/b/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    hf = json.loads((tmp_path / "a/b/config.json").read_text())
    assert hf["model_type"] == ("llama" if family == "llama3" else family)
    assert hf["dtype"] == hf["torch_dtype"] == jnp.dtype(dtype).name


def test_names_and_layout_of_the_files(saved):
    """Query head h = k * G + g; kernels are (out, in) in the file."""
    folder, lm, params = saved
    tensors, layer = load_file(folder / "model.safetensors"), params["layer_1"]
    assert len(tensors) == 2 * 16 + 3
    stem, group = "model.layers.1.", lm.config.group
    query = tensors[stem + "self_attn.q_proj.weight"].reshape(4, 2, 8)
    bias = tensors[stem + "self_attn.q_proj.bias"].reshape(4, 2)
    for k in range(2):
        for g in range(group):
            assert np.array_equal(query[k * group + g], layer["qkv"][:, k, g].T)
            assert np.array_equal(bias[k * group + g], layer["qkv_bias"][k, g])
    value = tensors[stem + "self_attn.v_proj.weight"].reshape(2, 2, 8)
    assert np.array_equal(value[1], layer["qkv"][:, 1, group + 1].T)
    assert np.array_equal(tensors[stem + "mlp.up_proj.weight"], layer["gate_up"][:, 1].T)
    assert np.array_equal(tensors[stem + "mlp.gate_proj.bias"], layer["gate_up_bias"][0])
    assert np.array_equal(tensors["lm_head.weight"], params["head"].T)


def test_every_tensor_is_cast_as_it_is_read(saved):
    folder, _, params = saved
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert_same(load_target(folder, jnp.bfloat16)[1], narrow)
    tensors = load_file(folder / "model.safetensors")
    halves = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    assert_same(load_target(folder)[1], jax.tree.map(lambda x: x.astype(jnp.float32), narrow))


def shard(folder, count=3):
    """Deal the tensors out to ``count`` shards, so that every layer is spread over all."""
    tensors = load_file(folder / "model.safetensors")
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: files[i % count] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: v for n, v in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return files


def test_shards(saved):
    folder, lm, params = saved
    shard(folder)
    loaded, again = load_target(str(folder))
    assert loaded == lm
    assert_same(again, params)


@pytest.mark.parametrize("shards", [1, 3])
def test_memory_stays_below_the_model_and_its_largest_tensors(tmp_path, shards):
    """All of it is NumPy here (``put`` keeps the leaf), so tracemalloc sees every byte."""
    lm = DecoderLM(DecoderConfig(512, 128, 6, 4, 2, 32, 352))
    params = random_params(lm, jnp.float32)
    save_target(tmp_path / "model", lm, params)
    if shards > 1:
        shard(tmp_path / "model", shards)
    leaves = sorted((x.nbytes for x in jax.tree.leaves(params)), reverse=True)
    load_target(tmp_path / "model")  # traces the module once, outside the measurement
    tracemalloc.start()
    try:
        order = []
        _, again = load_target(
            tmp_path / "model", put=lambda path, leaf: order.append("/".join(path)) or leaf
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert_same(again, params)
    assert "layer_5/gate_up" in order and "embedding" in order and len(order) == len(leaves)
    total = sum(leaves)
    assert total > 4e6 and leaves[0] + leaves[1] < total / 6
    assert total < peak < total + leaves[0] + leaves[1]


def test_saving_replaces_two_files_and_keeps_the_others(saved):
    folder, lm, _ = saved
    (folder / "tokenizer.json").write_text("{}")
    params = random_params(lm, jnp.float32, seed=1)
    extra = {"eos_token_id": [3, 4], "max_position_embeddings": 64, "vocab_size": 99}
    save_target(folder, lm, params, extra)
    assert_same(load_target(folder)[1], params)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    hf = json.loads((folder / "config.json").read_text())
    assert (hf["eos_token_id"], hf["max_position_embeddings"], hf["vocab_size"]) == ([3, 4], 64, 13)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch, existing):
    lm = DecoderLM(CONFIGS["llama"])
    params = random_params(lm, jnp.float32)
    if existing:
        save_target(tmp_path / "model", lm, params)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def broken(path, params, config):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_write_safetensors", broken)
    with pytest.raises(KeyboardInterrupt):
        save_target(tmp_path / "model", lm, random_params(lm, jnp.float32, seed=1))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert os.listdir(tmp_path) == (["model"] if existing else [])


def edit_config(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def edit_tensors(folder, drop=(), **more):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if name not in drop}
    save_file({**kept, **more}, folder / "model.safetensors")


def truncate(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def lose_a_shard(folder):
    (folder / shard(folder)[1]).unlink()


def torch_weights_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def bad_index(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


Q = "model.layers.1.self_attn.q_proj.weight"
MISTAKES = {
    "no folder": (shutil.rmtree, "target: expected an existing folder or a hub id .*model'"),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        ".*config.json: expected a file, .* none",
    ),
    "not json": (lambda f: (f / "config.json").write_text("{"), ".*config.json: expected JSON, .*"),
    "a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ".*config.json: expected a JSON object, found list",
    ),
    "family": (
        lambda f: edit_config(f, model_type="gpt2"),
        ".*config.json: model_type: expected one of .* found 'gpt2'",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        ".*: expected model.safetensors or model.safetensors.index.json, found neither",
    ),
    "torch weights": (torch_weights_only, ".*: expected model.* found only pytorch_model.bin"),
    "lost shard": (lose_a_shard, ".*index.json: expected shard model-00002-of-00003.* found none"),
    "bad index": (lambda f: bad_index(f, "{}"), ".*index.json: expected an object .* found None"),
    "index not json": (lambda f: bad_index(f, "x"), ".*index.json: expected JSON, found .*"),
    "truncated": (lambda f: truncate(f, -100), ".*safetensors: expected whole safetensors, .*"),
    "empty": (lambda f: truncate(f, 0), ".*safetensors: expected whole safetensors, .*"),
    "missing": (lambda f: edit_tensors(f, drop=[Q]), f".*: expected tensor {Q}, found none"),
    "vocabulary": (
        lambda f: edit_config(f, vocab_size=16),
        r".*: expected \S+embed_tokens.weight of shape \(16, 8\) .* found \(13, 8\)",
    ),
    "width": (
        lambda f: edit_config(f, hidden_size=16),
        r".*: expected \S+ of shape \(13, 16\) by config.json, found \(13, 8\)",
    ),
    "transposed": (
        lambda f: edit_tensors(f, **{Q: np.zeros((4, 16), np.float32)}),
        rf".*: expected {Q} of shape \(8, 8\) .* found \(4, 16\)",
    ),
    "integers": (
        lambda f: edit_tensors(f, **{Q: np.zeros((8, 8), np.int8)}),
        f".*: expected {Q} in floats, found I8",
    ),
    "unknown": (
        lambda f: edit_tensors(f, **{"model.layers.2.x": np.zeros(1, np.float32)}),
        r".*: expected only .* found model.layers.2.x \(1 unknown\)",
    ),
    "unused layer": (
        lambda f: edit_config(f, num_hidden_layers=1),
        r".*: expected only tensors .* found model.layers.1.\S+ \(16 unknown\)",
    ),
    "unused biases": (
        lambda f: edit_config(f, mlp_bias=False),
        r".*: expected only tensors .* found \S+down_proj.bias \(6 unknown\)",
    ),
    "other head": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        ".*: expected lm_head.weight equal to the embedding .*, found other values",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_sentence_per_mistake(saved, name):
    folder, _, _ = saved
    break_it, sentence = MISTAKES[name]
    break_it(folder)
    with pytest.raises(InputError, match=f"^{sentence}$") as caught:
        load_target(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_tensors_that_do_not_matter_are_ignored(tmp_path):
    """Rotary buffers of old files, and a tied head that is stored all the same."""
    lm = DecoderLM(CONFIGS["qwen3"])
    params = random_params(lm, jnp.float32)
    save_target(tmp_path, lm, params)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    edit_tensors(tmp_path, **buffer, **{"lm_head.weight": np.asarray(params["embedding"])})
    assert_same(load_target(tmp_path)[1], params)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (
            lambda params: params.pop("head"),
            "params: expected the parameters of lm, found other .*",
        ),
        (lambda params: params.update(norm=jnp.ones(9)), "params: expected the parameters of lm.*"),
    ],
)
def test_saving_parameters_of_another_model(tmp_path, break_it, sentence):
    lm = DecoderLM(CONFIGS["llama"])
    params = random_params(lm, jnp.float32)
    break_it(params)
    with pytest.raises(InputError, match=f"^{sentence}$"):
        save_target(tmp_path / "model", lm, params)
    assert not os.listdir(tmp_path)


def test_saving_where_no_folder_can_be(tmp_path):
    lm = DecoderLM(CONFIGS["llama"])
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file/model"):
        with pytest.raises(InputError, match="expected a writable folder, found"):
            save_target(folder, lm, random_params(lm, jnp.float32))
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_saving_an_architecture_of_no_family(tmp_path):
    lm = DecoderLM(DecoderConfig(13, 8, 2, 4, 2, 2, 6, windows=(0, 3)))
    with pytest.raises(InputError, match=r"^config: expected an architecture of llama"):
        save_target(tmp_path / "model", lm, random_params(lm, jnp.float32))


def test_hub_download_is_narrow_and_returns_the_snapshot(tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    seen = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **k: seen.update(k, repo=repo) or tmp_path,
    )
    assert target_folder("owner/some-model", "v1") == tmp_path
    assert seen["repo"] == "owner/some-model" and seen["revision"] == "v1"

    def taken(name):
        return any(fnmatch.fnmatch(name, p) for p in seen["allow_patterns"]) and not any(
            fnmatch.fnmatch(name, p) for p in seen["ignore_patterns"]
        )

    wanted = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"]
    wanted += [
        "model.safetensors.index.json",
        "tokenizer.model",
        "merges.txt",
        "generation_config.json",
    ]
    assert all(map(taken, [*wanted, "chat_template.jinja", "tokenizer.json"]))
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"]
    assert not any(map(taken, [*others, "model.gguf", "flax_model.msgpack", "tf_model.h5"]))


def _http_error(name):
    """One of the hub's own exceptions, made without a server."""
    from huggingface_hub import errors

    kind = getattr(errors, name)
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("GatedRepoError", "target: .* 'a/b' and a gated model .*HF_TOKEN.*"),
        ("RepositoryNotFoundError", "target: .* 'a/b' and no such model .*HF_TOKEN.*"),
        ("RevisionNotFoundError", "revision: expected a branch, tag or commit of a/b, found 'v9'"),
        ("LocalEntryNotFoundError", "target: .* 'a/b' and neither a cached copy nor .*"),
        ("OfflineModeIsEnabled", "target: .* 'a/b' and neither a cached copy nor .*"),
    ],
)
def test_hub_errors_are_one_sentence(monkeypatch, error, sentence):
    import huggingface_hub

    def refuse(*_, **__):
        raise _http_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=f"^{sentence}$") as caught:
        load_target("a/b", revision="v9")
    assert "\n" not in str(caught.value)


def test_offline_without_a_cached_copy(tmp_path, monkeypatch):
    """The real client, told to stay offline, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"^target: .*'nobody/nothing' and neither a cached copy"):
        load_target("nobody/nothing")


@pytest.mark.parametrize(
    "name", ["model", "/no/such/folder", "a/b/c", "./a/b", "../a", "", "a b/c"]
)
def test_what_cannot_be_a_hub_id_never_reaches_the_network(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"^target: expected an existing folder or a hub id"):
        load_target(name + "-missing" if name == "model" else name)
