"""What a step of drafter training costs: the jitted pieces of its code, timed; its memory.

Target and optimiser are what the real step takes longer than the same step given the target's
hidden states, and than its gradients; the drafter's forward pass and the head are timed alone; the
backward pass is the rest of the gradients. So the parts add up to the step by construction, and
small ones carry the noise of large ones.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ctc_spec_jax import memory, sharding
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.types import Params
from infer.rounds import in_turns
from train import plan, step
from train.config import Optim
from train.log import peak_flops

PRODUCT = 2048
"""Size of the square matrices whose product stands for the peak of a device without data sheet."""

PARTS = ("target forward", "drafter forward", "drafter backward", "LM head, losses", "optimiser")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured: a loss, and the sizes and places of its batch [rows, length]."""

    objective: Any  # a ``training.DraftLoss`` in pieces: taps, draft and score
    mesh: Mesh
    rows: int
    length: int

    def with_loss(self, **changes) -> Setting:
        """The same with another number of anchors, or ``remat``."""
        return dataclasses.replace(self, objective=dataclasses.replace(self.objective, **changes))

    def step(self):
        """The optimiser and the jitted step of training."""
        update = step.optimizer(Optim(), 1000)
        return update, step.make_step(self.objective, update, self.mesh)

    def flops(self) -> float:
        """Operations of a step by its closed form."""
        o = self.objective
        shapes = o.lm.config, o.drafter.config
        return plan.step_flops(*shapes, self.rows, self.length, o.anchors)

    def batch(self) -> dict[str, np.ndarray]:
        """Full rows of random tokens, [1, rows, length], every one a label."""
        shape = (1, self.rows, self.length)
        draw = np.random.default_rng(0)
        return {
            "tokens": draw.integers(0, self.objective.lm.vocab_size, shape).astype(np.int32),
            "segments": np.ones(shape, np.int32),
            "positions": np.broadcast_to(np.arange(self.length, dtype=np.int32), shape),
            "trained": np.ones(shape, bool),
            "row": np.arange(self.rows, dtype=np.int32)[None],
        }

    def abstract(self, frozen: Params):
        """Shapes of the state, of the target's parameters and of a batch, where they lie."""
        init, (update, _) = self.objective.drafter.init_params, self.step()
        state = jax.eval_shape(lambda k: step.init_state(init(k), update, 0.0), jax.random.key(0))

        def placed(tree, places):
            return jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                tree,
                places,
            )

        batch, place = self.batch(), step.batch_sharding(self.mesh)
        return (
            placed(state, sharding.parameters(self.mesh, state)),
            placed(frozen, sharding.parameters(self.mesh, frozen)),
            placed(batch, jax.tree.map(lambda _: place, batch)),
        )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of temporaries of the compiled step on a device, and of logits of all its frames."""

    anchors: int
    kept: int
    remat: int
    logits: int


class Pieces:
    """The jitted step and the pieces of its code, each with arrays to run on.

    Args:
      setting: what is measured.
      frozen: shapes of the target's parameters; random numbers are drawn for them.
    """

    def __init__(self, setting: Setting, frozen: Params):
        self.setting, self.mesh, self.key = setting, setting.mesh, jax.random.key(1)
        state, frozen, _ = setting.abstract(frozen)
        needed = memory.tree_bytes(frozen) + 2 * memory.tree_bytes(state)
        memory.check(needed // self.mesh.size, setting.rows, "weights and training state")
        self.frozen = _random(setting.objective.lm.init, frozen)
        self.params = _random(setting.objective.drafter.init_params, state["params"])
        self.batch = jax.device_put(setting.batch(), step.batch_sharding(self.mesh))

    def timers(self) -> dict[str, Callable[[], float]]:
        """Functions that run a piece and give its seconds; all are compiled."""
        objective, frozen, params = self.setting.objective, self.frozen, self.params
        row = jax.tree.map(lambda x: x[0], self.batch)
        keys = jax.random.split(self.key, self.setting.rows)
        taps = jax.jit(objective.taps)
        with jax.set_mesh(self.mesh):
            hidden = taps(frozen, row)
        known = row | {"taps": hidden}
        batch = self.batch | {"taps": tuple(x[None] for x in hidden)}
        draft = jax.jit(objective.draft)
        with jax.set_mesh(self.mesh):
            drafted = draft(params, frozen, known, keys)

        @jax.jit
        def bare(frozen, tokens):
            lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
            return objective.lm.hidden(frozen, tokens, lengths)[0]

        @jax.jit
        def head(params, frozen, hidden, labels, lengths):
            def loss(hidden):
                return objective.score(params, frozen, hidden, labels, lengths)[0]

            return jax.value_and_grad(loss)(hidden)

        gradient = jax.jit(lambda *a: step.accumulate(objective, *a))
        steps = self._steps({"step": self.batch, "step, taps given": batch})
        return steps | {
            "gradient, taps given": self._timer(gradient, params, frozen, batch, self.key),
            "draft, taps given": self._timer(draft, params, frozen, known, keys),
            "head": self._timer(head, params, frozen, *drafted),
            "taps": self._timer(taps, frozen, row),
            "bare target": self._timer(bare, frozen, row["tokens"]),
        }

    def _timer(self, function, *arguments) -> Callable[[], float]:
        def run() -> float:
            with jax.set_mesh(self.mesh):
                began = time.perf_counter()
                jax.block_until_ready(function(*arguments))
                return time.perf_counter() - began

        run()  # compiles
        return run

    def _steps(self, batches) -> dict[str, Callable[[], float]]:
        """Timers of whole steps; they hand on one state, which a step is given for good."""
        update, function = self.setting.step()
        state = step.init_state(jax.tree.map(jnp.copy, self.params), update, 0.0)
        held = [jax.device_put(state, sharding.parameters(self.mesh, state))]

        def timer(batch):
            def advance(frozen):
                held[0], metrics = function(held[0], frozen, batch, self.key)
                return held[0], metrics

            return self._timer(advance, self.frozen)

        return {name: timer(batch) for name, batch in batches.items()}


def _random(init, shapes):
    """Random parameters of the given shapes, types and places."""
    places = jax.tree.map(lambda x: x.sharding, shapes)

    def make(key):
        return jax.tree.map(lambda x, like: x.astype(like.dtype), init(key), shapes)

    return jax.jit(make, out_shardings=places)(jax.random.key(0))


def product_rate(dtype, size: int) -> float:
    """FLOP/s that a product of two square matrices reaches on one device, at its best of three."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(product(x, x))
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def time_parts(setting: Setting, frozen: Params, repeats: int) -> dict[str, Any]:
    """Seconds of a step and of its parts, its arithmetic, and the target beside a bare one."""
    with tqdm(total=1, desc="compiling", leave=False) as bar:
        timers = Pieces(setting, frozen).timers()
        bar.update()
    rates: list[float] = []

    def rate() -> float:
        rates.append(product_rate(setting.objective.dtype, PRODUCT))
        return 0.0

    seconds = in_turns(timers | {"product": rate}, repeats)
    del seconds["product"]
    known = peak_flops()
    peak = known or statistics.median(rates)
    return figures(seconds, setting.flops(), peak * setting.mesh.size) | {
        "peak": "data sheet"
        if known
        else f"matrix product of {PRODUCT} x {PRODUCT} in the same run"
    }


def figures(seconds: dict[str, float], flops: float, peak: float) -> dict[str, Any]:
    """What follows from the seconds of the pieces; ``peak`` in FLOP/s of all devices."""
    whole, given = seconds["step"], seconds["step, taps given"]
    gradient, draft, head = (
        seconds[name] for name in ("gradient, taps given", "draft, taps given", "head")
    )
    parts = (whole - given, draft, gradient - draft - head, head, given - gradient)
    bare = seconds["bare target"]
    return {
        "seconds": seconds,
        "parts": dict(zip(PARTS, parts, strict=True)),
        "target_in_bare_forwards": (whole - given) / bare,
        "taps_alone_in_bare_forwards": seconds["taps"] / bare,
        "step_flops": flops,
        "peak_flops": peak,
        "model_flop_utilisation": flops / whole / peak,
    }


def temporaries(setting: Setting, frozen: Params) -> int:
    """Bytes of temporaries of the compiled step on a device; nothing is run or allocated."""
    _, function = setting.step()
    with jax.set_mesh(setting.mesh):
        lowered = function.lower(*setting.abstract(frozen), jax.random.key(0))
        used = lowered.compile().memory_analysis()
    if used is None:
        raise InputError("--memory-anchors: expected a device that tells memory, found another")
    return used.temp_size_in_bytes


def memory_by_anchors(setting: Setting, frozen: Params, sizes) -> Iterator[Memory]:
    """Memory of the step for every number of anchors, with and without ``remat``."""
    for anchors in tqdm(sizes, unit=" sizes"):
        kept, remat = (
            temporaries(setting.with_loss(anchors=anchors, remat=remat), frozen)
            for remat in (False, True)
        )
        yield Memory(anchors, kept, remat, logits_bytes(setting, anchors))


def logits_bytes(setting: Setting, anchors: int) -> int:
    """Bytes of the float32 logits of all frames of a device's rows."""
    c = setting.objective.drafter.config
    return setting.rows // setting.objective.shards * anchors * c.frames * c.vocab_size * 4
