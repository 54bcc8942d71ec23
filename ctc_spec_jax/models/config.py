"""Architecture of a decoder, read from an ordinary Hugging Face ``config.json``."""

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
    (``rope_parameters``).

    Raises:
      ValueError: unknown ``model_type``, activation or rope type, or a missing key.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, found {family!r}")
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act: expected 'silu', found {activation!r}")
    missing = [key for key in _REQUIRED if key not in hf]
    if missing:
        raise ValueError(f"config.json: expected key {missing[0]!r}, found none")
    heads = hf["num_attention_heads"]
    theta, scaling = _rope(hf)
    llama_bias = family in ("llama", "qwen3") and bool(hf.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_width=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_width=hf["intermediate_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or llama_bias,
        output_bias=llama_bias,
        mlp_bias=family == "llama" and bool(hf.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        windows=_windows(hf, family),
    )


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling]:
    rope = hf.get("rope_parameters")
    if rope is None:
        rope = {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type: expected default, linear or llama3, found {kind!r}")
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    if kind == "default":
        return theta, RopeScaling()
    known = RopeScaling()
    return theta, RopeScaling(
        kind=kind,
        factor=float(rope["factor"]),
        low_freq_factor=float(rope.get("low_freq_factor", known.low_freq_factor)),
        high_freq_factor=float(rope.get("high_freq_factor", known.high_freq_factor)),
        original_max_position=int(
            rope.get("original_max_position_embeddings", known.original_max_position)
        ),
    )


def _windows(hf: dict[str, Any], family: str) -> tuple[int, ...]:
    window = hf.get("sliding_window") or 0
    layers = hf["num_hidden_layers"]
    if family == "mistral" and window:
        return (window,) * layers
    if family in ("qwen2", "qwen3") and window and hf.get("use_sliding_window", False):
        types = hf.get("layer_types")
        if types is None:
            first = hf.get("max_window_layers", layers)
            types = ["sliding_attention" if i >= first else "full" for i in range(layers)]
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    return ()
