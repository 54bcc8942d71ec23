"""Architecture of a decoder, read from and written as an ordinary Hugging Face ``config.json``."""

from __future__ import annotations

import dataclasses
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Supported values of ``model_type``."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Change of the rotary frequencies for long contexts.

    ``kind`` is ``default``, ``linear`` (divide by ``factor``) or ``llama3`` (Llama 3.1: divide
    low frequencies by ``factor``, keep high ones, interpolate between).
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Static description of a decoder of the Llama family; hashable by value.

    ``windows[i]`` is the sliding window of layer i in tokens, the query included; 0 means full
    attention. ``qkv_bias`` and ``output_bias`` are the biases of the attention projections.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads "
                f"({self.num_kv_heads}), found {self.num_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"head_dim: expected an even number, found {self.head_width}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows: expected {self.num_layers} entries, found {len(self.windows)}"
            )

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    def window(self, layer: int) -> int:
        """Sliding window of a layer in tokens; 0 means full attention."""
        return self.windows[layer] if self.windows else 0


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Decoder configuration of a Hugging Face ``config.json``.

    Reads the spellings of transformers 4 (``rope_theta``, ``rope_scaling``) and 5
    (``rope_parameters``); a key that the file leaves out has the default of its family there.

    Raises:
      ValueError: unknown ``model_type``, activation, rope or layer type, a missing key, a value
        of the wrong type, or a feature that would change the arithmetic (quantisation, rotary
        embedding of a part of the head).
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, found {family!r}")
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act: expected 'silu', found {activation!r}")
    if hf.get("quantization_config"):
        raise ValueError("quantization_config: expected none (floating-point weights), found one")
    hf = {**_DEFAULTS[family], **hf}
    heads, width = _size(hf, "num_attention_heads"), _size(hf, "hidden_size")
    if hf.get("head_dim") is None and width % heads:
        raise ValueError(
            f"hidden_size: expected a multiple of num_attention_heads ({heads}), found {width}"
        )
    theta, scaling = _rope(hf)
    llama_bias = family in ("llama", "qwen3") and bool(hf.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=_size(hf, "vocab_size"),
        width=width,
        num_layers=_size(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(hf, "num_key_value_heads", heads),
        head_width=_size(hf, "head_dim", width // heads),
        mlp_width=_size(hf, "intermediate_size"),
        norm_eps=_number(hf, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or llama_bias,
        output_bias=llama_bias,
        mlp_bias=family == "llama" and bool(hf.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        windows=_windows(hf, family),
    )


_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "head_dim": 128,
    },
}


def config_to_hf(config: DecoderConfig, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The ``config.json`` that ``config_from_hf`` reads as ``config``.

    The rotary embedding is written in the spellings of transformers 4 and 5. Keys of ``extra``
    (token ids, ``max_position_embeddings``) are kept unless they describe the architecture; its
    ``model_type`` is preferred where it fits.

    Raises:
      ValueError: no family of ``FAMILIES`` has this architecture.
    """
    extra = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **(extra or {})}
    families = sorted(FAMILIES, key=lambda family: family != extra.get("model_type"))
    for family in families:
        hf = {**extra, **_hf_keys(config, family)}
        try:
            same = config_from_hf(hf) == config
        except ValueError:
            continue
        if same:
            return hf
    raise ValueError(
        f"config: expected an architecture of {', '.join(FAMILIES)}, found none that fits {config}"
    )


def _hf_keys(config: DecoderConfig, family: str) -> dict[str, Any]:
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind != "default":
        rope["factor"] = scaling.factor
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_max_position
    sliding = [window > 0 for window in config.windows] or [False] * config.num_layers
    hf = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling.kind == "default" else rope,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "tie_word_embeddings": config.tied_embeddings,
    }
    if family in ("llama", "qwen3"):
        hf["attention_bias"] = config.qkv_bias
    if family == "llama":
        hf["mlp_bias"] = config.mlp_bias
    else:
        hf["sliding_window"] = max(config.windows, default=0) or None
    if family in ("qwen2", "qwen3"):
        hf["use_sliding_window"] = any(sliding)
        # transformers 4 before layer_types: the layers from this one on slide.
        hf["max_window_layers"] = [*sliding, True].index(True)
        hf["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]
    return hf


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _size(hf: dict[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    value = default if hf.get(key) is None else hf[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        found = "none" if value is None else repr(value)
        raise ValueError(f"{key}: expected a whole number of at least {least}, found {found}")
    return value


def _number(hf: dict[str, Any], key: str, default: float | None = None) -> float:
    value = default if hf.get(key) is None else hf[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        found = "none" if value is None else repr(value)
        raise ValueError(f"{key}: expected a positive number, found {found}")
    return float(value)


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling]:
    # transformers 5 lets the old spelling win where a file has both.
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{key}: expected one flat object for all layers, found {rope!r}")
    rope = {
        "rope_theta": hf.get("rope_theta"),
        "partial_rotary_factor": hf.get("partial_rotary_factor"),
        "original_max_position_embeddings": hf.get("max_position_embeddings"),
        **rope,
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type: expected default, linear or llama3, found {kind!r}")
    if _number(rope, "partial_rotary_factor", 1.0) != 1:
        found = rope["partial_rotary_factor"]
        raise ValueError(f"partial_rotary_factor: expected 1, found {found!r}")
    theta = _number(rope, "rope_theta", 10000.0)
    if kind == "default":
        return theta, RopeScaling()
    factor = _number(rope, "factor")
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=factor)
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if low >= high:
        raise ValueError(f"low_freq_factor: expected less than high_freq_factor, found {low}")
    original = _size(rope, "original_max_position_embeddings")
    return theta, RopeScaling(kind, factor, low, high, original)


def _windows(hf: dict[str, Any], family: str) -> tuple[int, ...]:
    layers = hf["num_hidden_layers"]
    slides = family == "mistral" or (family != "llama" and bool(hf.get("use_sliding_window")))
    if not slides or hf.get("sliding_window") is None:
        return ()
    window = _size(hf, "sliding_window")
    if family == "mistral":
        return (window,) * layers
    types = hf.get("layer_types")
    if types is None:
        first = _size(hf, "max_window_layers", least=0)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        found = repr(min(unknown)) if unknown else f"{len(types)} entries"
        raise ValueError(
            f"layer_types: expected {layers} of sliding_attention or full_attention, found {found}"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in types)
    return windows if any(windows) else ()
