"""Writes ``families.npz``: logits and layer outputs of tiny transformers models, all families.

Run in this folder: ``python make_families.py``. torch and transformers are needed here only; the
tests read the file. Weights are not stored: ``random_weights`` makes them from a name and a shape.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("families.npz")
LENGTHS = (24, 17, 9)
VOCAB = 97

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# Wavelengths of the four frequencies: 6, 20, 63 and 199 tokens. So with these factors the first is
# kept, two are interpolated and the last is divided.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# As published: old models in the spelling of transformers 4, new ones in that of 5.
FAMILIES = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "rope_parameters": _LLAMA3},
    "llama3_tied_v4": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_theta": 100.0,
        "rope_scaling": {k: v for k, v in _LLAMA3.items() if k != "rope_theta"},
    },
    "llama_linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    },
    "llama_bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "vicuna": {
        "model_type": "llama",
        "num_key_value_heads": None,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "mistral_window": {"model_type": "mistral", "sliding_window": 7, "rope_theta": 1000.0},
    "mistral_full": {"model_type": "mistral", "sliding_window": None, "num_hidden_layers": 3},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_mixed": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "qwen3_tied_window": {
        "model_type": "qwen3",
        "head_dim": 6,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
}


def hf_config(family):
    """``config.json`` of a family."""
    return {**_SIZES, **FAMILIES[family]}


def random_weights(family, shapes):
    """{name: float32 array}, the same on every machine and for every NumPy.

    NumPy promises to keep the raw bits of a bit generator, not its distributions.
    """
    weights = {}
    for name, shape in shapes.items():
        bits = np.random.PCG64(zlib.crc32(f"{family}/{name}".encode())).random_raw(math.prod(shape))
        uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
        if len(shape) == 2:
            # Unit rows in, unit rows out, so no branch drowns another; attention is peaked.
            scale = 1.0 if "embed" in name else 2.0 / math.sqrt(shape[1])
            value = scale * math.sqrt(3.0) * uniform
        else:
            value = (1.0 if "norm" in name else 0.0) + 0.5 * uniform
        weights[name] = value.reshape(shape).astype(np.float32)
    return weights


def tokens(family):
    """int32 [3, 24], right-padded with 0; rows are ``LENGTHS`` long and differ."""
    bits = np.random.PCG64(zlib.crc32(family.encode())).random_raw(len(LENGTHS) * max(LENGTHS))
    rows = (bits % np.uint64(VOCAB)).astype(np.int32).reshape(len(LENGTHS), -1)
    return np.where(np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None], rows, 0)


def torch_model(family):
    """(model, {parameter name: shape}): eager attention, float32, ``random_weights``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**hf_config(family))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    weights = random_weights(family, shapes)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(weights[name]))
    return model, shapes


def torch_outputs(model, rows):
    """Logits [sum(LENGTHS), V] and layer outputs [L, sum(LENGTHS), D], every row run alone.

    Layer outputs come from hooks: the last of ``hidden_states`` is after the final norm. The
    others are checked against ``hidden_states``.
    """
    import torch

    logits, taps, caught = [], [], []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: caught.append(out))
        for layer in model.model.layers
    ]
    for row, length in zip(rows, LENGTHS, strict=True):
        caught.clear()
        ids = torch.tensor(row[None, :length], dtype=torch.long)
        with torch.no_grad():
            out = model(ids, output_hidden_states=True, use_cache=False)
        for i, hidden in enumerate(caught[:-1]):
            assert torch.equal(hidden, out.hidden_states[i + 1])
        logits.append(out.logits[0].numpy())
        taps.append(torch.cat(caught).numpy())
    for hook in hooks:
        hook.remove()
    return np.concatenate(logits), np.concatenate(taps, axis=1)


if __name__ == "__main__":
    stored = {}
    for family in FAMILIES:
        model, shapes = torch_model(family)
        logits, taps = torch_outputs(model, tokens(family))
        stored[f"{family}/shapes"] = np.array(json.dumps(shapes))
        stored[f"{family}/saved_config"] = np.array(model.config.to_json_string())
        stored[f"{family}/logits"] = logits
        stored[f"{family}/taps"] = taps
        print(family, logits.std(), taps.std(), logits.shape, taps.shape)
    np.savez_compressed(GOLDEN, **stored)
