"""Targets without weights and caches without prompts: random numbers in their places.

What a step costs does not depend on them. A cache of any length is filled as it is, where a prefill
would need memory that grows with the square of its length.

Shape letters: B batch, S cache slots, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax import decode as loop_of
from ctc_spec_jax import folders, memory, options, xla
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.engine import Engine, seed_keys
from ctc_spec_jax.types import DecodeState, Params, Request
from infer.rounds import ROUNDS

_SCALE = 0.02

_WARM_UP = 3
"""Calls before the first that is timed: one compiles, and on GPUs one more records the graph."""


class Silent:
    """The part of a tokenizer that token ids need."""

    pad_token_id, model_max_length = 0, 1 << 20


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape: tuple[int, ...], dtype):
    return jax.random.normal(key, shape, dtype) * jnp.asarray(_SCALE, dtype)


def random_arrays(shapes: Any, seed: int = 0) -> Any:
    """Arrays of these shapes and dtypes, made on the device; norms are ones.

    None of them exists in another dtype or on the host.
    """
    places, structure = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(seed), max(1, len(places)))
    made = [
        _random(key, jax.tree_util.keystr(path[-1:]), leaf)
        for key, (path, leaf) in zip(keys, places, strict=False)
    ]
    return jax.tree.unflatten(structure, made)


def _random(key, name: str, leaf):
    if "norm" in name:
        return jnp.ones(leaf.shape, leaf.dtype)
    if leaf.dtype == jnp.int8:
        return jax.random.bits(key, leaf.shape, jnp.uint8).view(jnp.int8)
    if name == ".scale":  # of a matrix in eight bits
        return jnp.full(leaf.shape, _SCALE / 64, leaf.dtype)
    return _normal(key, leaf.shape, leaf.dtype)


def random_engine(path: str, dtype, num_layers: int = 0, int8: bool = False) -> Engine:
    """A target of a ``config.json`` without weights, decoding plainly; see ``abstract_target``."""
    lm, shapes = folders.abstract_target(path, dtype, num_layers, int8)
    memory.check(memory.tree_bytes(shapes), 1, f"weights of {path}")
    return Engine(lm, random_arrays(shapes), Silent())


def random_params(init: Callable, dtype) -> Params:
    """Parameters of the shapes that ``init(key)`` would make, in ``dtype``."""
    return random_arrays(folders.abstract_params(init, dtype), seed=1)


@dataclasses.dataclass(frozen=True)
class Filled:
    """Shapes of a batch in the middle of a decode, and what its rounds are given.

    ``slots`` is S of every row, of which ``context`` are in use when the rounds begin.
    """

    engine: Engine
    loop: Loop
    batch: int
    context: int
    request: Request
    shapes: DecodeState

    @property
    def bytes(self) -> int:
        """Of the state, and of the largest intermediate arrays of a round."""
        config, nodes = self.engine.lm.config, self.loop.drafter.num_nodes
        rows = self.batch * nodes
        scores = rows * config.num_heads * (self.loop.slots + nodes)
        # As in memory.decode_bytes, with scores, their exponentials and those in the model's dtype.
        return memory.tree_bytes(self.shapes) + 4 * max(3 * scores, 3 * rows * config.vocab_size)


def slots_for(context: int, deepest: int) -> int:
    """S that holds ``context`` tokens and all rounds of a timed call, the deepest path in each."""
    return -(-(context + (ROUNDS + 1) * (deepest + 1) + 1) // 64) * 64


def filled(engine: Engine, batch: int, context: int, slots: int) -> Filled:
    """The decode of B rows whose caches hold ``context`` tokens each; allocates nothing."""
    depth = engine.drafter.max_depth
    new = ROUNDS * (depth + 1)
    rows = options.per_row(batch, {"ignore_eos": True, "max_new_tokens": new})
    request = engine.request(rows, seed_keys(0, batch))
    loop = engine.loop(new, slots=slots)
    tokens = jax.ShapeDtypeStruct((batch, context + 1), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    shapes = jax.eval_shape(
        lambda *a: loop_of.start(loop, *a),
        engine.params,
        engine.draft_params,
        tokens,
        lengths,
        request,
    )
    return Filled(engine, loop, batch, context, request, shapes)


@dataclasses.dataclass
class Cache:
    """The one cache that programs of a case hand on to each other; donated and given back."""

    arrays: Any


def filled_timer(case: Filled, cache: Cache) -> Callable[[], float]:
    """A function that runs ``ROUNDS`` rounds from the same length and gives seconds per round.

    The state is donated, as in a decode, so nothing is copied and a second cache is not needed.
    """
    loop, batch, context = case.loop, case.batch, case.context
    engine, drafter = case.engine, Cache(random_arrays(case.shapes.drafter, seed=2))
    width = loop.slots + 1
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(1, loop.target.vocab_size, (batch, width)), jnp.int32)
    lengths = jnp.full((batch,), context + 1, jnp.int32)
    begin = jax.jit(lambda t, n, r: loop_of.begin(loop, t, n, (), (), r))
    advance = xla.jitted(loop_of.advance, 3)
    params = (engine.params, engine.draft_params)

    def run() -> float:
        state = jax.block_until_ready(begin(tokens, lengths, case.request))
        state = dataclasses.replace(state, cache=cache.arrays, drafter=drafter.arrays)
        began = time.perf_counter()
        state = advance(loop, *params, state, case.request, np.int32(ROUNDS))
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        cache.arrays, drafter.arrays = state.cache, state.drafter
        run.rounds = state.stats.rounds
        return seconds / ROUNDS

    for _ in range(_WARM_UP):
        run()
    if set(run.rounds.tolist()) != {ROUNDS}:
        raise AssertionError(f"expected {ROUNDS} rounds of every row, found {run.rounds}")
    return run
