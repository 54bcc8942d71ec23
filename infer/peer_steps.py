"""Steps of ``transformers`` on the same shapes: random weights, a filled cache, greedy tokens.

Needs torch; see ``peers``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from ctc_spec_jax.errors import InputError
from infer.peers import load_torch, on_gpu
from infer.rounds import ROUNDS

STATIC = "transformers-static"
"""With a cache of a fixed size and a compiled model."""

_WARM_UP = 3
"""Calls before the first that is timed: compilation, and capture of graphs."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A model of ``config.json`` and a batch in the middle of a decode.

    ``layers`` counts its first layers, 0 for all; ``dtype`` is a name such as ``bfloat16``.
    """

    path: str
    layers: int
    dtype: str
    batch: int
    context: int


def timers(shapes: Shapes) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Functions that give seconds a step, by name, and why others cannot run here."""
    step = _Step(shapes)
    found, left_out = {"transformers": step.timer(step.growing)}, {}
    if not on_gpu():
        return found, {STATIC: "needs a GPU that jax and torch both use"}
    compiled = step.torch.compile(step.model, mode="reduce-overhead")
    try:
        found[STATIC] = step.timer(step.fixed, compiled)
    except Exception as error:  # compilers fail in many ways, and the other figures stand
        left_out[STATIC] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return found, left_out


class _Step:
    """The model, and caches in its place that hold random keys and values."""

    def __init__(self, shapes: Shapes):
        self.torch, self.library = load_torch(), importlib.import_module("transformers")
        self.torch.set_num_threads(os.cpu_count() or 1)
        self.shapes, self.device = shapes, "cuda" if on_gpu() else "cpu"
        self.dtype = getattr(self.torch, shapes.dtype)
        path = pathlib.Path(shapes.path)
        fields = json.loads((path / "config.json" if path.is_dir() else path).read_text())
        if shapes.layers:
            fields["num_hidden_layers"] = shapes.layers
            fields.pop("layer_types", None)
        self.config = self.library.AutoConfig.for_model(**fields)
        try:
            with self.torch.device(self.device):
                made = self.library.AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        except RuntimeError as error:
            raise InputError(f"--peers: expected room for the model, found {error}") from error
        self.model = made.eval()
        # Newer versions gave the argument another name.
        known = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"

    def _keys(self) -> Any:
        heads = self.config.num_key_value_heads
        head = getattr(self.config, "head_dim", None)
        head = head or self.config.hidden_size // self.config.num_attention_heads
        size = (self.shapes.batch, heads, self.shapes.context, head)
        return self.torch.randn(size, dtype=self.dtype, device=self.device) * 0.02

    def _fill(self, cache: Any) -> Any:
        for layer in range(self.config.num_hidden_layers):
            cache.update(self._keys(), self._keys(), layer)
        return cache

    def growing(self) -> Callable[[], Any]:
        """A function that gives a cache which grows with every token, of ``context`` tokens."""
        cache = self._fill(self.library.DynamicCache(config=self.config))
        layers = [(layer.keys, layer.values) for layer in cache.layers]

        def renew() -> Any:
            for layer, (keys, values) in zip(cache.layers, layers, strict=True):
                layer.keys, layer.values = keys, values
            return cache

        return renew

    def fixed(self) -> Callable[[], Any]:
        """Likewise one of a fixed size, which a compiled program can write to."""
        size = self.shapes.context + ROUNDS + 1
        cache = self._fill(self.library.StaticCache(config=self.config, max_cache_len=size))

        def renew() -> Any:
            for layer in cache.layers:
                layer.cumulative_length.fill_(self.shapes.context)
            return cache

        return renew

    def timer(
        self, cache_of: Callable[[], Callable[[], Any]], model: Any = None
    ) -> Callable[[], float]:
        """A function that decodes ``ROUNDS`` tokens a row and gives seconds per token."""
        renew, model = cache_of(), model or self.model

        def wait() -> None:
            if self.device == "cuda":
                self.torch.cuda.synchronize()

        def run() -> float:
            cache = renew()
            token = self.torch.ones((self.shapes.batch, 1), dtype=self.torch.long)
            token = token.to(self.device)
            wait()
            began = time.perf_counter()
            with self.torch.inference_mode():
                for _ in range(ROUNDS):
                    logits = model(input_ids=token, **{self.cache_name: cache}).logits
                    # A copy: a captured graph writes its next result into the same memory.
                    token = logits[:, -1:].argmax(-1).clone()
            wait()
            return (time.perf_counter() - began) / ROUNDS

        for _ in range(_WARM_UP):
            run()
        return run
