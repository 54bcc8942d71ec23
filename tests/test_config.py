"""models/config.py: what transformers means by a config.json, and the way back."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_spec_jax.models.config import (
    FAMILIES,
    DecoderConfig,
    RopeScaling,
    config_from_hf,
    config_to_hf,
)

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(family="llama", **keys):
    return config_from_hf({**BASE, "model_type": family, **keys})


def test_sizes_and_biases_of_the_families():
    assert read() == DecoderConfig(97, 32, 3, 4, 2, 8, 48)
    assert read("qwen2") == DecoderConfig(97, 32, 3, 4, 2, 8, 48, qkv_bias=True)
    qwen3 = DecoderConfig(97, 32, 3, 4, 2, 16, 48, qk_norm=True)
    assert read("qwen3", head_dim=16) == qwen3
    both = dataclasses.replace(qwen3, qkv_bias=True, output_bias=True)
    assert read("qwen3", head_dim=16, attention_bias=True) == both
    biased = DecoderConfig(97, 32, 3, 4, 2, 8, 48, qkv_bias=True, output_bias=True, mlp_bias=True)
    assert read(attention_bias=True, mlp_bias=True) == biased
    assert read("mistral", sliding_window=None, attention_bias=True) == read()


def test_keys_left_out_have_the_defaults_of_transformers():
    short = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    short |= {"num_attention_heads": 32, "hidden_size": 64}
    kv_heads = {f: config_from_hf({**short, "model_type": f}).num_kv_heads for f in FAMILIES}
    assert kv_heads == {"llama": 32, "mistral": 8, "qwen2": 32, "qwen3": 32}
    assert read("qwen3").head_width == 128
    assert read("mistral").windows == (4096,) * 3
    assert read("qwen2", use_sliding_window=True, num_hidden_layers=30).windows[27:] == (
        0,
        4096,
        4096,
    )
    assert read(rms_norm_eps=1e-5).norm_eps == 1e-5 and read().norm_eps == 1e-6
    assert read(num_key_value_heads=None).num_kv_heads == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_equal_those_of_the_installed_transformers(family):
    from transformers import AutoConfig

    filled = AutoConfig.for_model(family).to_dict()
    sizes = {key: filled[key] for key in BASE if key != "num_key_value_heads"}
    assert config_from_hf({**sizes, "model_type": family}) == config_from_hf(filled)


def test_both_spellings_of_the_rope():
    assert read(rope_theta=5e5).rope_theta == read(rope_parameters={"rope_theta": 5e5}).rope_theta
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    old, new = (
        read(rope_theta=5e5, rope_scaling=LLAMA3),
        read(rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    )
    assert old == new and new.rope_scaling == scaling and new.rope_theta == 5e5
    for linear in ({"type": "linear", "factor": 4}, {"rope_type": "linear", "factor": 4.0}):
        assert read(rope_scaling=linear).rope_scaling == RopeScaling("linear", 4.0)
    assert read(rope_scaling=None, rope_parameters=None).rope_scaling == RopeScaling()
    length = {key: value for key, value in LLAMA3.items() if "position" not in key}
    without = read(rope_scaling=length, max_position_embeddings=64)
    assert without.rope_scaling == scaling


def test_windows():
    assert read("llama", sliding_window=7).windows == ()
    assert read("mistral", sliding_window=7).windows == (7, 7, 7)
    assert read("mistral", sliding_window=None).windows == ()
    for family in ("qwen2", "qwen3"):
        keys = {"sliding_window": 7, "max_window_layers": 1}
        assert read(family, **keys).windows == ()
        assert read(family, use_sliding_window=True, **keys).windows == (0, 7, 7)
        assert (
            read(family, use_sliding_window=True, sliding_window=7, max_window_layers=3).windows
            == ()
        )
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        mixed = read(family, use_sliding_window=True, layer_types=types, **keys)
        assert mixed.windows == (7, 0, 7) and [mixed.window(i) for i in range(3)] == [7, 0, 7]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type: expected one of .* found 'gpt2'"),
        ({"model_type": None}, "model_type: expected one of .* found None"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"vocab_size": None}, "vocab_size: expected .* found none"),
        ({"hidden_size": "32"}, "hidden_size: expected .* found '32'"),
        ({"intermediate_size": 0}, "intermediate_size: expected .* found 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected .* found True"),
        ({"num_key_value_heads": 3}, "num_attention_heads: expected a multiple .* found 4"),
        ({"hidden_size": 34}, "hidden_size: expected a multiple .* found 34"),
        ({"head_dim": 7}, "head_dim: expected an even number, found 7"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps: expected a positive number, found 'x'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected none .*"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_type: expected .* found 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "factor: expected a positive number, found none"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "low_freq_factor: .* found 4.0"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected one flat object .* found 'linear'"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters: expected one flat .*"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, found 0.5"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: expected .* found 0"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked"] * 3},
            "layer_types: expected 3 of .* found 'chunked'",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types: expected 3 of .* found 1 entries",
        ),
    ],
)
def test_one_sentence_per_mistake(keys, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        config_from_hf({**BASE, "model_type": "llama", **keys})


scalings = st.sampled_from(
    [RopeScaling(), RopeScaling("linear", 4.0), RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)]
)


@st.composite
def representable(draw):
    """Configurations that some family has."""
    kind = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    layers, window = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    bias = kind in ("llama", "qwen3") and draw(st.booleans())
    windows = tuple(draw(st.lists(st.sampled_from([0, window]), min_size=layers, max_size=layers)))
    windows = {"llama": (), "mistral": (window,) * layers}.get(kind, windows)
    return DecoderConfig(
        vocab_size=draw(st.integers(1, 99)),
        width=32,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=draw(st.sampled_from([1, 2, 4])),
        head_width=draw(st.sampled_from([6, 8])),
        mlp_width=48,
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_theta=draw(st.sampled_from([1e4, 5e5])),
        rope_scaling=draw(scalings),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=kind == "llama" and draw(st.booleans()),
        qk_norm=kind == "qwen3",
        windows=windows if any(windows) else (),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(representable())
def test_way_back(config):
    hf = config_to_hf(config, {"eos_token_id": 5, "vocab_size": 1, "sliding_window": 3})
    assert config_from_hf(hf) == config
    assert hf["eos_token_id"] == 5 and hf["bos_token_id"] is None
    old = {key: value for key, value in hf.items() if key != "rope_parameters"}
    new = {key: value for key, value in hf.items() if key not in ("rope_scaling", "rope_theta")}
    assert config_from_hf(old) == config_from_hf(new) == config


def test_way_back_prefers_the_family_it_came_from():
    full = read("mistral", sliding_window=None)
    assert config_to_hf(full)["model_type"] == "llama"
    assert config_to_hf(full, {"model_type": "mistral"})["model_type"] == "mistral"


@pytest.mark.parametrize(
    "change",
    [{"output_bias": True}, {"windows": (0, 5, 5)}, {"windows": (4, 5, 4), "qkv_bias": True}],
)
def test_no_way_back_for_an_architecture_of_no_family(change):
    with pytest.raises(ValueError, match=r"^config: expected an architecture of llama, .* found"):
        config_to_hf(dataclasses.replace(read(), **change))
