"""The training step: one jitted program over a mesh, gradients accumulated on the device.

Shape letters: M micro-batches, R rows of a micro-batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ctc_spec_jax import sharding
from ctc_spec_jax.types import Params
from train.config import Optim

State = dict[str, Any]
"""``params``, ``optimizer`` and ``step``, and ``average`` where one is kept."""


class Objective(Protocol):
    """What a step minimises."""

    def loss(self, params: Params, frozen: Params, batch, keys) -> tuple[Array, Array, Any]:
        """Mean loss of a micro-batch, what it is a mean over, and metrics that are such means.

        ``batch`` leaves are [R, ...], ``keys`` [R] belong to its rows.
        """
        ...


def optimizer(config: Optim, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay; only matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def schedule(config: Optim, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, cosine decay."""
    warmup = min(config.warmup, max(1, steps // 2))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.rate, warmup, max(steps, warmup + 1), config.rate * config.final
    )


def init_state(params: Params, update: optax.GradientTransformation, average: float) -> State:
    """State before the first step; all of it float32 but for counters."""
    state = {"params": params, "optimizer": update.init(params), "step": jnp.int32(0)}
    return state | ({"average": jax.tree.map(jnp.copy, params)} if average else {})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of batches [M, R, ...]: the rows of every micro-batch over data and fsdp."""
    return NamedSharding(mesh, P(None, ("data", "fsdp")))


def make_step(
    objective: Objective, update: optax.GradientTransformation, mesh: Mesh, average: float = 0.0
):
    """The jitted step ``(state, frozen, batch, key) -> (state, metrics)``.

    ``batch`` leaves are [M, R, ...], placed by ``batch_sharding``; its ``row`` [M, R] numbers the
    rows of the whole batch, so that what a row draws depends on ``key``, the step and that number,
    not on micro-batches, devices or hosts. Losses and gradients are means over everything in the
    batch that counts, however it is cut up. ``state`` is donated; call it under
    ``jax.set_mesh(mesh)``.
    """

    def train_step(state: State, frozen: Params, batch, key):
        params, key = state["params"], jax.random.fold_in(key, state["step"])
        grads, metrics = accumulate(objective, params, frozen, batch, key)
        grads = jax.lax.with_sharding_constraint(grads, sharding.parameters(mesh, grads))
        updates, optimizer_state = update.update(grads, state["optimizer"], params)
        params = optax.apply_updates(params, updates)
        new = {"params": params, "optimizer": optimizer_state, "step": state["step"] + 1}
        if average:
            new["average"] = optax.incremental_update(params, state["average"], 1 - average)
        new = jax.lax.with_sharding_constraint(new, sharding.parameters(mesh, new))
        return new, metrics | {"gradient_norm": optax.tree.norm(grads)}

    return jax.jit(train_step, donate_argnums=0)


def accumulate(objective: Objective, params: Params, frozen: Params, batch, key):
    """Gradients and metrics of a batch [M, R, ...], one micro-batch in memory at a time."""

    def weighted(params, part):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, part["row"])
        loss, count, metrics = objective.loss(params, frozen, part, keys)
        count = jax.lax.stop_gradient(count.astype(jnp.float32))
        sums = jax.tree.map(lambda x: x * count, metrics | {"loss": loss})
        return loss * count, (count, sums)

    def one(total, part):
        (_, (count, sums)), grads = jax.value_and_grad(weighted, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, total, (grads, count, sums)), None

    first = jax.tree.map(lambda x: x[0], batch)
    like = jax.eval_shape(lambda p: jax.value_and_grad(weighted, has_aux=True)(params, p), first)
    (_, (count, sums)), grads = like
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, count, sums))
    (grads, count, sums), _ = jax.lax.scan(one, zeros, batch)
    count = jnp.maximum(count, 1.0)
    return jax.tree.map(lambda x: x / count, (grads, sums))
