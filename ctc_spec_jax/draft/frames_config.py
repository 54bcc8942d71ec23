"""Static description of a network over frames; see ``draft.frames``."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from ctc_spec_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class FramesConfig:
    """Static description of a network over frames; hashable by value.

    ``taps`` are target layers; a tap is the residual stream after that layer. ``causal`` frames
    attend to the frames before them alone, others to all frames of the draft. With ``follows`` a
    position of the context also tells which token came after it.
    """

    width: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    frames: int
    taps: tuple[int, ...]
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    causal: bool = False
    follows: bool = False

    def __post_init__(self):
        if not self.taps:
            raise ValueError("taps: expected at least one target layer, found none")
        if self.frames < 1 or self.num_layers < 1:
            raise ValueError(
                f"frames and num_layers: expected at least 1, found {self.frames} and "
                f"{self.num_layers}"
            )


Config = TypeVar("Config", bound=FramesConfig)


def frames_config(
    kind: type[Config],
    target: DecoderConfig,
    num_layers: int = 1,
    frames: int = 12,
    taps: tuple[int, ...] = (),
    mlp_width: int = 0,
    follows: bool = True,
) -> Config:
    """A network for ``target``: its width and heads; taps spread over its layers by default."""
    last = target.num_layers - 1
    return kind(
        width=target.width,
        vocab_size=target.vocab_size,
        num_layers=num_layers,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_width=target.head_width,
        mlp_width=mlp_width or target.mlp_width,
        frames=frames,
        taps=taps or tuple(sorted({last // 4, last // 2, last})),
        norm_eps=target.norm_eps,
        rope_theta=target.rope_theta,
        follows=follows,
    )
