"""What a run will need, told before it starts: parameters, arithmetic and memory of a step."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from ctc_spec_jax import memory, recipes, sharding
from ctc_spec_jax.models.config import DecoderConfig
from train.config import TrainConfig, to_dict


def forward_flops(config: DecoderConfig, rows: int, length: int, head: bool) -> float:
    """Floating-point operations of a causal forward pass of ``rows`` of ``length`` tokens.

    Two for every multiply-add; products only. The full square of scores is counted as half, since
    a causal mask leaves half of it.
    """
    c = config
    qkv = c.width * (c.num_heads + 2 * c.num_kv_heads) * c.head_width
    layer = qkv + c.num_heads * c.head_width * c.width + 3 * c.width * c.mlp_width
    scores = c.num_heads * c.head_width * length  # both products, half of the square
    per_token = c.num_layers * (layer + scores) + (c.width * c.vocab_size if head else 0)
    return 2.0 * rows * length * per_token


def drafter_flops(config, rows: int, length: int, anchors: int) -> float:
    """Operations of the forward pass of ``rows`` x ``anchors`` drafts, the LM head included.

    ``config`` describes the network of a method; see ``recipes.Recipe.products``.
    """
    return 2.0 * rows * sum(recipes.of(config).products(config, length, anchors))


def step_flops(target: DecoderConfig, drafter, rows: int, length: int, anchors: int) -> float:
    """Operations of a step of drafter training: what the result needs, nothing computed twice.

    The target's layers up to the last tap once, or all of it where the drafter has no taps and
    learns its law. The drafter's products three times, forward and for both gradients, but the
    frozen LM head twice.
    """
    taps = getattr(drafter, "taps", None)
    layers = target.num_layers if taps is None else max(taps, default=-1) + 1
    target = dataclasses.replace(target, num_layers=layers, windows=target.windows[:layers])
    head, others = recipes.of(drafter).products(drafter, length, anchors)
    forward = forward_flops(target, rows, length, head=taps is None)
    return forward + 2.0 * rows * (2 * head + 3 * others)


def shapes_table(tree, mesh: Mesh) -> str:
    """Name, shape, type and placement of every parameter, as aligned text."""
    places = jax.tree.leaves(sharding.parameters(mesh, tree))
    lines = []
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), place in zip(leaves, places, strict=True):
        name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
        lines.append(f"  {name:34}{leaf.shape!s:24}{leaf.dtype.name:10}{place.spec}")
    return "\n".join(lines)


def bytes_per_device(tree, mesh: Mesh) -> int:
    """Bytes of a tree of parameters (or of a training state) on each device of a mesh."""

    def one(leaf, place):
        return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    places = sharding.parameters(mesh, tree)
    return sum(jax.tree.leaves(jax.tree.map(one, tree, places)))


def count(tree) -> int:
    """Number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def describe(config: TrainConfig, objective, state, frozen, mesh: Mesh, compiled) -> str:
    """The plan of a run as text: configuration, parameters, memory, the compiled step.

    Args:
      config: the experiment.
      objective: has ``flops``, operations of a step.
      state: training state, arrays or shapes.
      frozen: parameters of the target, or None.
      mesh: where they lie.
      compiled: the compiled step, for its memory.
    """
    gib = 2.0**30
    parts = [yaml.safe_dump(to_dict(config), sort_keys=False)]
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    parts.append(f"mesh: {axes}; {mesh.devices.size} x {mesh.devices.flat[0].device_kind}")
    parts.append(f"trained parameters: {count(state['params']):,}")
    parts.append(shapes_table(state["params"], mesh))
    if frozen is not None:
        parts.append(
            f"frozen parameters: {count(frozen):,}, "
            f"{memory.tree_bytes(frozen) / gib:.2f} GiB, "
            f"{bytes_per_device(frozen, mesh) / gib:.2f} GiB a device"
        )
    parts.append(
        f"training state: {memory.tree_bytes(state) / gib:.3f} GiB, "
        f"{bytes_per_device(state, mesh) / gib:.3f} GiB a device"
    )
    used = compiled.memory_analysis()
    if used is not None:
        parts.append(
            f"compiled step, a device: arguments {used.argument_size_in_bytes / gib:.3f} GiB, "
            f"temporaries {used.temp_size_in_bytes / gib:.3f} GiB"
        )
    tokens = config.batch.rows * config.batch.length
    parts.append(f"a step: {tokens:,} tokens, {objective.flops / 1e12:.4g} TFLOP")
    return "\n".join(parts)
