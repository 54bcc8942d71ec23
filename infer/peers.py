"""``transformers`` ``generate`` beside this library: same weights, device, prompts, stops and caps.

Needs torch, which this library itself does not: ``pip install -e '.[peers]'``.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ctc_spec_jax.engine import Engine, Generation
from ctc_spec_jax.errors import InputError

_LOOKUP_TOKENS = 10
"""Tokens that prompt lookup proposes: the value that its documentation recommends."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A way to decode with ``transformers``; ``options`` are those of its ``generate``."""

    name: str
    options: Mapping[str, Any]
    one_row: bool = False  # it takes one prompt at a time
    assistant: str | None = None  # folder of a language model that drafts


class Lengths:
    """A stopping criterion that never stops: it notes the length of the text after every round."""

    def __init__(self, torch: Any):
        self.torch = torch
        self.seen: list[int] = []

    def __call__(self, tokens, scores, **options: Any):
        """See ``transformers.StoppingCriteria``: bool [B]."""
        self.seen.append(tokens.shape[1])
        return self.torch.zeros(tokens.shape[0], dtype=self.torch.bool, device=tokens.device)


class Transformers:
    """``transformers`` ``generate`` behind the method of ``Engine``.

    Prompts are encoded and answers are cut by ``engine``, so that both get the same token ids, and
    a token past a stop is counted by neither. On a GPU it uses that GPU, elsewhere all cores.
    """

    def __init__(self, engine: Engine, folder: str, peer: Peer, dtype: str = "float32"):
        self.torch, self.library = load_torch(), importlib.import_module("transformers")
        self.torch.set_num_threads(os.cpu_count() or 1)
        self.library.utils.logging.disable_progress_bar()
        self.engine, self.peer, self.dtype = engine, peer, getattr(self.torch, dtype)
        self.device = "cuda" if on_gpu() else "cpu"
        self.model = self._load(folder)
        self.options = dict(peer.options)
        if peer.assistant:
            self.options["assistant_model"] = self._load(peer.assistant)

    def _load(self, folder: str) -> Any:
        loaded = self.library.AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype)
        model = loaded.eval().to(self.device)
        # ``generate`` fills what a call leaves open from here; the folder may ask for sampling.
        model.generation_config = self.library.GenerationConfig(
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self.engine.stop_ids) or None,
            pad_token_id=self.engine.tokenizer.pad_token_id or 0,
        )
        return model

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 128,
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> list[Generation]:
        """See ``Engine.generate``; a batch is drawn with the seed of its first row.

        The one option is ``temperature``.
        """
        temperature = options.pop("temperature", 0.0)
        if options:
            raise InputError(f"options: expected temperature alone, found {', '.join(options)}")
        tokens, lengths = self.engine.encode(prompts, max_new_tokens)
        width = int(lengths.max())
        rows = np.full((len(tokens), width), self.engine.tokenizer.pad_token_id or 0, np.int64)
        mask = np.zeros_like(rows)
        for index, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
            rows[index, width - length :] = row[:length]
            mask[index, width - length :] = 1
        self.torch.manual_seed(seed if isinstance(seed, int) else seed[0])
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        noted = Lengths(self.torch)
        criteria = self.library.StoppingCriteriaList([noted])
        inputs = {"input_ids": rows, "attention_mask": mask}
        inputs = {name: self.torch.tensor(x, device=self.device) for name, x in inputs.items()}
        began = time.perf_counter()
        with self.torch.inference_mode():
            whole = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                stopping_criteria=criteria,
                **(drawn if temperature else {}),
                **self.options,
            )
            whole = whole.cpu()  # waits for the device
        seconds = time.perf_counter() - began
        emitted = np.diff([width, *noted.seen]).tolist()
        return [self._answer(row[width:].tolist(), emitted, seconds) for row in whole]

    def _answer(self, new: list[int], emitted: list[int], seconds: float) -> Generation:
        stops = self.engine.stop_ids
        end = next((i for i, token in enumerate(new) if token in stops), None)
        new = new if end is None else new[: end + 1]
        kept, left = [], len(new)
        for count in emitted:
            if left > 0:
                kept.append(min(count, left))
                left -= count
        finish = "length" if end is None else "stop"
        text = self.engine.decode_text(new)
        drafted = [index < count - 1 for count in kept for index in range(count)]
        return Generation(text, new, finish, len(kept), kept, seconds, drafted)

    def logits(self, tokens) -> np.ndarray:
        """float32 [V] after the text ``tokens`` [T]."""
        row = self.torch.tensor(np.asarray(tokens)[None], device=self.device)
        with self.torch.inference_mode():
            return self.model(row).logits[0, -1].float().cpu().numpy()


def on_gpu() -> bool:
    """Whether both libraries have a GPU."""
    return jax.default_backend() == "gpu" and load_torch().cuda.is_available()


def load_torch() -> Any:
    """The module torch.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise InputError(
            "--peers: expected torch to be installed (pip install -e '.[peers]'), found none"
        ) from error


def versions() -> dict[str, str]:
    """Versions of what decodes here."""
    return {name: importlib.import_module(name).__version__ for name in ("torch", "transformers")}


def peers(assistant: str | None) -> tuple[list[Peer], dict[str, str]]:
    """The ways of ``transformers`` that can run here, the plain one first, and why others cannot.

    Args:
      assistant: folder of a language model that can draft, or None.
    """
    found, left_out = [Peer("transformers", {})], {}
    if on_gpu():
        # generate compiles the model by itself where the cache is static and the device a GPU.
        found.append(Peer("transformers-static", {"cache_implementation": "static"}))
    else:
        left_out["transformers-static"] = "needs a GPU that jax and torch both use"
    if assistant:
        found.append(Peer("transformers-assisted", {}, one_row=True, assistant=assistant))
    else:
        left_out["transformers-assisted"] = "needs the folder of a language model (--drafters)"
    lookup = {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}
    found.append(Peer("transformers-lookup", lookup, one_row=True))
    return found, left_out
