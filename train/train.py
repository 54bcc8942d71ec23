"""Train a target from text or a drafter against a frozen target.

    python -m train.train --config configs/demo_target.yaml [section.field=value ...]

Killed and started again with the same arguments it continues from its newest checkpoint; the
batches and random numbers of a step depend on the seed and the step alone, so the loss curve is
the one of an uninterrupted run.

The folder ``run.folder`` holds run.yaml (the resolved configuration), metrics.jsonl, checkpoints
and, at the end, export with the weights and training.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import time

import jax
import jax.numpy as jnp
import optax
import yaml
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

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


def make_step(objective, update: optax.GradientTransformation, rows: NamedSharding):
    """The jitted training step: ``(state, frozen, batch, keys) -> (state, metrics)``.

    ``batch`` leaves are [microbatches, rows, ...] and ``keys`` [microbatches, rows], both sharded
    as ``rows`` says. Every device averages its gradients over its micro-batches, and they meet in
    one sum per step. ``state`` is donated.
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

    accumulate = jax.shard_map(
        accumulate,
        mesh=rows.mesh,
        in_specs=(P(), P(), rows.spec, rows.spec),
        out_specs=P(),
        check_vma=False,  # the mean over devices is explicit, so none must be added to gradients
    )

    def train_step(state, frozen, batch, keys):
        grads, metrics = accumulate(state["params"], frozen, batch, keys)
        updates, optimizer_state = update.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return {"params": params, "optimizer": optimizer_state}, metrics

    return jax.jit(train_step, donate_argnums=0)


def train(config: TrainConfig, objective, quiet: bool = False) -> dict:
    """Run the experiment to its end, resuming if its folder holds a checkpoint.

    Args:
      config: the experiment.
      objective: of ``make_objective``; has ``init``, ``batch``, ``loss``, ``evaluate``, ``export``,
        ``frozen`` (parameters that are not trained, or None) and ``record`` (data sizes).
      quiet: no progress bar.

    Returns:
      The record that is written beside the exported weights. ``metrics.seconds`` counts all
      resumes of the run, with their compilation and evaluation.

    Raises:
      InputError: a folder that cannot be written or belongs to another experiment, or micro-batches
        that the devices cannot share.
    """
    rows, everywhere = shardings(config.batch.microbatch)
    folder = pathlib.Path(config.run.folder)
    checkpoints, start = _open(folder, config)
    update = optimizer(config.optim, config.run.steps)
    init_key, step_key = jax.random.split(jax.random.key(config.run.seed))
    params = objective.init(init_key)
    state = jax.device_put({"params": params, "optimizer": update.init(params)}, everywhere)
    frozen = jax.device_put(objective.frozen, everywhere)
    del params, init_key

    if start:
        state = checkpoints.restore(start, state)
        print(f"resumed from step {start} in {folder}", flush=True)
    log = Log(folder / "metrics.jsonl", start)
    microbatches = config.batch.rows // config.batch.microbatch
    step_function = make_step(objective, update, rows)

    # Leaving waits for the checkpoint in flight, also after an exception.
    with (
        contextlib.closing(checkpoints),
        tqdm(
            range(start, config.run.steps),
            initial=start,
            total=config.run.steps,
            disable=quiet,
        ) as bar,
    ):
        for step in bar:
            # One key per row: neither micro-batches nor devices change what a row draws.
            keys = jax.random.split(jax.random.fold_in(step_key, step), config.batch.rows)
            inputs = jax.tree.map(
                lambda x: x.reshape(microbatches, -1, *x.shape[1:]), (objective.batch(step), keys)
            )
            state, metrics = step_function(state, frozen, *jax.device_put(inputs, rows))
            done = step + 1
            last = done == config.run.steps
            if last or done % config.run.log_every == 0:
                log.write(done, metrics)
                shown = {name: f"{float(value):.3f}" for name, value in metrics.items()}
                bar.set_postfix(shown, refresh=False)
            if last or done % config.run.eval_every == 0:
                log.write(done, objective.evaluate(state["params"]))
                if not quiet:
                    tqdm.write(log.last_line)
            if last or done % config.run.checkpoint_every == 0:
                checkpoints.save(done, state)
    record = _record(config, objective, log)
    objective.export(state["params"], str(folder / "export"), record)
    return record


def _record(config: TrainConfig, objective, log: Log) -> dict:
    """How a result was made: what ``training.json`` says."""
    device = jax.devices()[0].device_kind
    return {
        "config": to_dict(config),
        "command": "python -m train.train " + shlex.join(sys.argv[1:]),
        "data": objective.record,
        "metrics": log.newest,
        "hardware": f"{jax.device_count()} x {device} ({platform.machine()}, "
        f"{os.cpu_count()} cores)",
        "versions": versions(),
    }


class Log:
    """``metrics.jsonl``: one line per log or evaluation; lines past a resumed step are dropped.

    ``newest`` holds the last value of every metric, ``seconds`` the time of the run so far.
    """

    def __init__(self, path: pathlib.Path, start: int):
        self.path, self.newest, self.last_line = path, {}, ""
        kept = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break  # a kill cut it off
            if line["step"] <= start:
                kept.append(text + "\n")
                self.newest |= line
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(kept))
        part.replace(path)
        self._began = time.monotonic() - self.newest.get("seconds", 0.0)

    def write(self, step: int, metrics) -> None:
        """Append a line; waits for the device."""
        line = {"step": step} | {name: float(value) for name, value in metrics.items()}
        line["seconds"] = round(time.monotonic() - self._began, 1)
        self.newest |= line
        self.last_line = json.dumps(line)
        with self.path.open("a") as file:
            file.write(self.last_line + "\n")


def shardings(microbatch: int) -> tuple[NamedSharding, NamedSharding]:
    """Placement of a batch, its rows split over the devices, and of parameters, on each of them.

    Raises:
      InputError: the devices cannot share ``microbatch`` rows evenly.
    """
    devices = jax.device_count()
    if microbatch % devices:
        raise InputError(
            f"batch.microbatch: expected a multiple of the number of devices ({devices}), "
            f"found {microbatch}"
        )
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P())


def _open(folder: pathlib.Path, config: TrainConfig):
    """The checkpoints of a run and its newest step, or 0; writes ``run.yaml``."""
    # Imported here because it takes as long as everything else that --help waits for.
    from ctc_spec_jax.checkpoint import Checkpoints

    path = folder / "run.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(folder / "checkpoints", config.run.keep)
        start = checkpoints.latest() or 0
        if start:
            _check_same_run(path, config)
        path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    except OSError as error:
        raise InputError(
            f"run.folder: expected a writable folder, found {folder} ({error.strerror})"
        ) from error
    return checkpoints, start


def _check_same_run(path: pathlib.Path, config: TrainConfig) -> None:
    """Refuse to continue a run whose curve would be another one from its start."""
    # Read with the defaults of today, so that a run survives a new key.
    before, now = (_meaning(c) for c in (load_config(str(path)), config))
    for name, value in now.items():
        if before[name] != value:
            raise InputError(
                f"run.folder: expected {name} {before[name]!r} as in {path}, which has "
                f"checkpoints, found {value!r}; choose another folder"
            )


def _meaning(config: TrainConfig) -> dict:
    """Every field that decides what a run computes, by its dotted name."""
    tree = to_dict(config)
    tree["run"] = {"seed": config.run.seed}
    del tree["evaluation"]
    sections = {name: part for name, part in tree.items() if isinstance(part, dict)}
    fields = {f"{s}.{name}": value for s, part in sections.items() for name, value in part.items()}
    return fields | {name: tree[name] for name in tree.keys() - sections.keys()}


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="experiment file of configs/")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    shardings(config.batch.microbatch)  # fails before the text is read
    use_compilation_cache()
    train(config, make_objective(config))


if __name__ == "__main__":
    main()
