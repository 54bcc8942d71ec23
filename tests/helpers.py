"""Tiny models and drafters that the tests share.

Shape letters: B batch, N tree nodes, M max depth, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax import overlap
from ctc_spec_jax.decode import Loop, NoDraft, decode
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.types import NO_PARENT, NO_TOKEN, DraftTree, Request
from ctc_spec_jax.verify import Greedy

VOCAB = 17


def tiny_target(seed: int = 1, **changes) -> tuple[DecoderLM, Any]:
    """Two layers, width 32, rotary positions; weights large enough that greedy text varies."""
    shape = dict(num_heads=4, num_kv_heads=2, head_width=8, mlp_width=48)
    sizes = {"width": 32, "num_layers": 2, **shape, **changes}
    config = DecoderConfig(vocab_size=VOCAB, **sizes)
    lm = DecoderLM(config)
    params = lm.init(jax.random.key(seed))

    # Seed and scales were chosen so that the greedy text of every row keeps changing. In NumPy:
    # JAX would compile a program for every shape.
    def enlarge(path, x):
        if x.ndim < 2:
            return x
        scale = 50.0 if "embedding" in str(path) or "head" in str(path) else 16.0
        return jnp.asarray(np.asarray(x) * x.dtype.type(scale))

    return lm, jax.tree_util.tree_map_with_path(enlarge, params)


def ragged_prompts(seed: int, lengths) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts of the given lengths, right-padded with garbage, so that padding is tested."""
    lengths = np.asarray(lengths, np.int32)
    draw = np.random.default_rng(seed)
    return draw.integers(0, VOCAB, (len(lengths), lengths.max() + 2)).astype(np.int32), lengths


def make_request(batch: int, budget, stops=None, seed: int = 0, **fields) -> Request:
    """A request of a batch; without stops and greedy by default.

    ``budget`` is a number or one number per row; the rest are fields of ``Request``.
    """
    budget = np.broadcast_to(np.asarray(budget, np.int32), (batch,))
    stops = np.full((batch, 1), NO_TOKEN, np.int32) if stops is None else stops
    keys = fields.pop("keys", None)
    keys = jax.random.split(jax.random.key(seed), batch) if keys is None else keys
    return Request(budget, stops, keys, **fields)


def run(lm, params, drafter, draft_params, prompts, lengths, new_tokens, stops=None, budget=None):
    """Greedy decode of a batch with default stops and budgets."""
    loop = Loop(lm, drafter, Greedy(), new_tokens)
    request = make_request(len(prompts), new_tokens if budget is None else budget, stops)
    return jitted_decode(loop, params, draft_params, prompts, lengths, request)


jitted_decode = jax.jit(decode, static_argnums=0)


def plain_text(lm, params, prompts, lengths, new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Plain greedy answers [B, T], and prompts with answers [B, S], S past every answer."""
    plain = np.asarray(run(lm, params, NoDraft(), (), prompts, lengths, new_tokens).tokens)
    truth = np.zeros((len(prompts), prompts.shape[1] + new_tokens + 8), np.int32)
    for row, n in enumerate(lengths):
        truth[row, :n] = prompts[row, :n]
        truth[row, n : n + new_tokens] = plain[row]
    return plain, truth


def reference_greedy(lm, params, prompt, new_tokens: int) -> list[int]:
    """Slow and obvious: one full forward without a cache for every token."""
    from ctc_spec_jax.models.decoder import output_logits

    tokens = list(map(int, prompt))
    width = len(tokens) + new_tokens

    @jax.jit
    def next_token(padded, length):
        hidden, _, _ = lm.hidden(params, padded[None], length[None])
        return jnp.argmax(output_logits(params, hidden)[0, length - 1])

    for _ in range(new_tokens):
        padded = np.zeros(width, np.int32)
        padded[: len(tokens)] = tokens
        tokens.append(int(next_token(padded, np.int32(len(tokens)))))
    return tokens[len(prompt) :]


@dataclasses.dataclass(frozen=True)
class OracleTree:
    """Random trees around the true continuation, of a given quality.

    Every node's token is right with probability ``quality``, else random, with siblings that may
    repeat a token; some nodes are invalid. ``draft_params`` is the true text, int32 [B, S].
    """

    max_depth: int = 4
    num_nodes: int = 12
    quality: float = 0.7
    taps: tuple[int, ...] = ()

    def init(self, params, context, taps):
        del params, context, taps
        return ()

    def propose(self, params, state, context, keys):
        del state

        def row(key, truth, length, pending):
            keys = jax.random.split(key, 4)
            n = self.num_nodes
            choice = jax.random.uniform(keys[0], (n,))
            parents, depth = [jnp.int32(NO_PARENT)], [jnp.int32(0)]
            for i in range(1, n):
                parent = jnp.floor(choice[i] * i).astype(jnp.int32)
                deep = jnp.stack(depth)[parent] >= self.max_depth
                parent = jnp.where(deep, 0, parent)
                parents.append(parent)
                depth.append(jnp.stack(depth)[parent] + 1)
            parents, depth = jnp.stack(parents), jnp.stack(depth)
            right = truth[jnp.minimum(length + depth, truth.shape[0] - 1)]
            wrong = jax.random.randint(keys[1], (n,), 0, VOCAB)
            tokens = jnp.where(jax.random.uniform(keys[2], (n,)) < self.quality, right, wrong)
            tokens = tokens.at[0].set(pending).astype(jnp.int32)
            drop = jax.random.uniform(keys[3], (n,)) < 0.15
            valid = [jnp.array(True)]
            for i in range(1, n):
                valid.append(jnp.stack(valid)[parents[i]] & ~drop[i])
            return tokens, parents, jnp.stack(valid)

        return DraftTree(*jax.vmap(row)(keys, params, context.length, context.pending))

    def commit(self, params, state, context, output, acceptance):
        del params, context, output, acceptance
        return state


def printed_lines(module: str) -> list[dict]:
    """What a module of virtual devices prints in a process of its own, a JSON object per line."""
    inherited = {name: os.environ[name] for name in os.environ if name != "TPU_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=pathlib.Path(__file__).parents[1],
        env=inherited,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclasses.dataclass(frozen=True)
class OracleAhead:
    """Works ahead of the target's verdict with a given text, ``draft_params`` int32 [B, S]."""

    max_depth: int = 3
    taps: tuple[int, ...] = ()

    run_round = staticmethod(overlap.run_round)

    @property
    def num_nodes(self):
        return self.max_depth + 1

    def init(self, params, context, taps):
        batch = context.length.shape[0]
        return overlap.Overlapped((), overlap.nothing_pending(batch, self.max_depth, 0))

    def ahead(self, params, cache, seen, request):
        last = seen.length + seen.pending.count
        index = last[:, None] + 1 + jnp.arange(self.max_depth, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(params, jnp.minimum(index, params.shape[1] - 1), axis=1)
        return overlap.Chain(tokens, jnp.full_like(last, self.max_depth), None), cache


def write_model(folder: pathlib.Path, kv_heads: int, **sizes: int) -> str:
    """Path of a config.json of two layers with two query heads to a kv head; ``sizes`` by name."""
    heads = {"num_attention_heads": 2 * kv_heads, "num_key_value_heads": kv_heads}
    path = folder / "tiny.json"
    path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, **heads, **sizes}))
    return str(path)
