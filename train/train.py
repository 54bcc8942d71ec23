"""Train a target from text or a drafter against a frozen target.

    python -m train.train --config configs/demo_target.yaml [section.field=value ...]

Killed and started again with the same arguments it continues from its newest checkpoint; the
batches and random numbers of a step depend on the seed and the step alone, so the loss curve is
the one of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import platform
import sys
import time

import jax
import jax.numpy as jnp
import optax
import yaml
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from ctc_spec_jax.checkpoint import Checkpoints
from ctc_spec_jax.cli import exit_on_bad_input, use_compilation_cache
from ctc_spec_jax.errors import InputError
from train.config import Optim, TrainConfig, load_config, to_dict


def optimizer(config: Optim, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay; only matrices decay."""
    warmup = min(config.warmup, max(1, steps // 2))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.rate, warmup, max(steps, warmup + 1), config.rate * config.final
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def make_step(objective, update: optax.GradientTransformation, mesh: jax.sharding.Mesh):
    """The jitted training step: ``(state, frozen, batch, keys) -> (state, metrics)``.

    ``batch`` leaves are [microbatches, rows, ...] and ``keys`` [microbatches, rows]; the rows are
    split over the devices. Every device averages its gradients over its micro-batches, and they
    meet in one sum per step. ``state`` is donated.
    """

    def accumulate(params, frozen, batch, keys):
        def one(carry, inputs):
            gradient = jax.value_and_grad(objective.loss, has_aux=True)
            (_, metrics), grads = gradient(params, frozen, *inputs)
            return jax.tree.map(jnp.add, carry, grads), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, metrics = jax.lax.scan(one, zeros, (batch, keys))
        grads = jax.tree.map(lambda g: g / keys.shape[0], grads)
        metrics = jax.tree.map(jnp.mean, metrics)
        return jax.lax.pmean((grads, metrics), "data")

    split = P(None, "data")
    accumulate = jax.shard_map(
        accumulate,
        mesh=mesh,
        in_specs=(P(), P(), split, split),
        out_specs=P(),
        check_vma=False,  # the mean over devices is explicit, so none must be added to gradients
    )

    def train_step(state, frozen, batch, keys):
        grads, metrics = accumulate(state["params"], frozen, batch, keys)
        updates, optimizer_state = update.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics["gradient_norm"] = optax.global_norm(grads)
        return {"params": params, "optimizer": optimizer_state}, metrics

    return jax.jit(train_step, donate_argnums=0)


def train(config: TrainConfig, objective, quiet: bool = False) -> dict:
    """Run the experiment to its end, resuming if its folder holds a checkpoint.

    Returns:
      The record that is written beside the exported weights.
    """
    folder = pathlib.Path(config.run.folder)
    resolved = _claim(folder, config)
    update = optimizer(config.optim, config.run.steps)
    init_key, step_key = jax.random.split(jax.random.key(config.run.seed))
    params = objective.init(init_key)
    # Rows of a micro-batch are split over the devices; parameters are on each of them.
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P())
    state = jax.device_put({"params": params, "optimizer": update.init(params)}, everywhere)
    frozen = jax.device_put(objective.frozen, everywhere)
    del params, init_key

    checkpoints = Checkpoints(folder / "checkpoints", config.run.keep)
    start = checkpoints.latest() or 0
    if start:
        state = checkpoints.restore(start, state)
        print(f"resumed from step {start} in {folder}", flush=True)
    log = Log(folder / "metrics.jsonl", start)
    microbatches = config.batch.rows // config.batch.microbatch
    step_function = make_step(objective, update, mesh)

    began = time.monotonic()
    bar = tqdm(range(start, config.run.steps), initial=start, total=config.run.steps, disable=quiet)
    for step in bar:
        # One key per row, so that neither micro-batches nor devices change what a row draws.
        keys = jax.random.split(jax.random.fold_in(step_key, step), config.batch.rows)
        inputs = jax.tree.map(
            lambda x: x.reshape(microbatches, -1, *x.shape[1:]), (objective.batch(step), keys)
        )
        state, metrics = step_function(state, frozen, *jax.device_put(inputs, rows))
        done = step + 1
        if done % config.run.log_every == 0 or done == config.run.steps:
            log.write(done, metrics)
            bar.set_postfix({name: f"{float(value):.3f}" for name, value in metrics.items()})
        if done % config.run.eval_every == 0 or done == config.run.steps:
            log.write(done, objective.evaluate(state["params"]))
            tqdm.write(log.last_line)
        if done % config.run.checkpoint_every == 0 or done == config.run.steps:
            checkpoints.save(done, state)
    checkpoints.close()
    record = {
        "config": resolved,
        "command": "python -m train.train " + " ".join(sys.argv[1:]),
        "metrics": log.newest,
        "seconds_since_start_or_resume": round(time.monotonic() - began, 1),
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({platform.machine()})",
        "versions": versions(),
    }
    objective.export(state["params"], str(folder / "export"), record)
    return record


class Log:
    """``metrics.jsonl``: one line per log or evaluation; lines past a resumed step are dropped."""

    def __init__(self, path: pathlib.Path, start: int):
        self.path, self.newest, self.last_line = path, {}, ""
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))
        for line in kept:
            self.newest |= json.loads(line)

    def write(self, step: int, metrics) -> None:
        """Append a line; waits for the device."""
        line = {"step": step} | {name: float(value) for name, value in metrics.items()}
        self.newest |= line
        self.last_line = json.dumps(line)
        with self.path.open("a") as file:
            file.write(self.last_line + "\n")


def _claim(folder: pathlib.Path, config: TrainConfig) -> dict:
    """Write ``run.yaml``; refuse to resume a run whose fields that alter meaning differ."""
    resolved = to_dict(config)
    path = folder / "run.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = yaml.safe_load(path.read_text())
            for section in resolved.keys() - {"run", "evaluation"}:
                if before.get(section) != resolved[section]:
                    raise InputError(
                        f"run.folder: expected the configuration of {path}, found another "
                        f"{section!r} section; choose a new folder"
                    )
        path.write_text(yaml.safe_dump(resolved, sort_keys=False))
    except OSError as error:
        raise InputError(
            f"run.folder: expected a writable folder, found {folder} ({error.strerror})"
        ) from error
    return resolved


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def make_objective(config: TrainConfig):
    """The objective that ``config.objective`` names."""
    if config.objective == "target":
        from train.target import TargetObjective

        return TargetObjective(config)
    from train.drafter import DrafterObjective

    return DrafterObjective(config)


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m train.train``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="experiment file of configs/")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    arguments = parser.parse_args()
    use_compilation_cache()
    config = load_config(arguments.config, arguments.overrides)
    train(config, make_objective(config))


if __name__ == "__main__":
    main()
