"""Train a target from text or a drafter against a frozen target.

    python -m train.train --config configs/demo_target.yaml [section.field=value ...]

One command for one CPU, one GPU, eight GPUs and a pod slice (``--multihost`` there, on every host).
Killed and started again with the same arguments it continues from its newest checkpoint, also on
another mesh or number of hosts; the batches and random numbers of a step depend on the seed and
the step alone, so the loss curve is the one of an uninterrupted run. On SIGTERM or Ctrl-C it
saves and ends with status 143 or 130.

The folder ``run.folder`` holds run.yaml (the resolved configuration), metrics.jsonl, checkpoints,
best.json and, at the end, export with the weights of the best checkpoint and training.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses

import jax
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from ctc_spec_jax import sharding
from ctc_spec_jax.cli import exit_on_bad_input, use_compilation_cache
from ctc_spec_jax.errors import InputError
from train import hosts, plan, runs
from train.config import TrainConfig, load_config
from train.log import Log, Rates
from train.step import batch_sharding, init_state, make_step, optimizer


class Run:
    """One experiment on a mesh: its state, its step, and what it writes.

    Args:
      config: the experiment.
      objective: of ``make_objective``: ``loss``, ``batches``, ``evaluate``, ``export``, ``init``,
        ``initial`` (parameters to start from, or None), ``frozen`` (parameters that are not
        trained, or None), ``flops`` of a step and ``record`` (data sizes).
      mesh: of ``make_mesh``.
    """

    def __init__(self, config: TrainConfig, objective, mesh: Mesh):
        self.config, self.objective, self.mesh = config, objective, mesh
        self.update = optimizer(config.optim, config.run.steps)
        self.step_function = make_step(objective, self.update, mesh, config.optim.average)
        self.key, self._init_key = jax.random.split(jax.random.key(config.run.seed))

    def _fresh(self, key, initial):
        params = self.objective.init(key) if initial is None else initial
        return init_state(params, self.update, self.config.optim.average)

    def state_shapes(self):
        """Shapes, types and places of the training state."""
        shapes = jax.eval_shape(self._fresh, self._init_key, None)
        places = sharding.parameters(self.mesh, shapes)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )

    def fresh_state(self):
        """The state before the first step, made where it belongs."""
        places = jax.tree.map(lambda x: x.sharding, self.state_shapes())
        with jax.set_mesh(self.mesh):
            make = jax.jit(self._fresh, out_shardings=places)
            return make(self._init_key, self.objective.initial)

    def place(self, local):
        """This process's rows of a batch as global arrays [M, R, ...]."""
        count = self.config.batch.rows // self.config.batch.microbatch
        place = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                place, x.reshape(count, -1, *x.shape[1:])
            ),
            local,
        )

    def step(self, state, batch):
        """One step; ``state`` is donated."""
        with jax.set_mesh(self.mesh):
            return self.step_function(state, self.objective.frozen, batch, self.key)

    def weights(self, state):
        """What is evaluated and exported: the parameters, or their moving average."""
        return state["average"] if "average" in state else state["params"]


def train(config: TrainConfig, objective, mesh: Mesh, quiet: bool = False) -> dict:
    """Run the experiment to its end, resuming if its folder holds a checkpoint.

    Returns:
      The record that is written beside the exported weights. ``metrics.seconds`` counts all
      resumes of the run, with their compilation and evaluation.

    Raises:
      InputError: a folder that cannot be written or belongs to another experiment.
    """
    folder = epath.Path(config.run.folder)
    checkpoints, start = runs.open_run(folder, config, objective.fingerprint)
    # Leaving waits for the checkpoint in flight, also after an exception.
    with (
        contextlib.closing(checkpoints),
        hosts.preemption(checkpoints) as preempted,
        hosts.peers(config.run.folder),
    ):
        run = Run(config, objective, mesh)
        if start:
            state, _ = checkpoints.restore(start, run.state_shapes())
            tqdm.write(f"resumed from step {start} in {folder}")
        else:
            state = run.fresh_state()
        log = Log(folder, start, config.run.tensorboard)
        with contextlib.closing(log):
            state = _steps(run, state, start, checkpoints, log, preempted, quiet)
        checkpoints.wait()
        best = checkpoints.best()
        if best is not None and best != checkpoints.latest():
            state, _ = checkpoints.restore(best, run.state_shapes())
        record = runs.record(config, objective, log, best)
        objective.export(run.weights(state), str(folder / "export"), record)
        if not quiet and jax.process_index() == 0:
            print(f"finished: step {record['exported_step']} is exported to {folder / 'export'}")
    return record


def _steps(run: Run, state, start: int, checkpoints, log: Log, preempted, quiet):
    options, objective = run.config.run, run.objective
    batches = objective.batches(start)
    rates = Rates(run.config.batch.rows * run.config.batch.length, objective.flops)
    stopping = runs.EarlyStop(options.patience, log)
    if run.config.evaluation.before and not start and not log.lines:
        log.write(0, objective.evaluate(run.weights(state)))
    silent = quiet or jax.process_index() > 0
    bar = tqdm(initial=start, total=options.steps, disable=silent)
    for step in range(start, options.steps):
        state, metrics = run.step(state, run.place(next(batches)))
        rates.step()
        done = step + 1
        taken_away = preempted(done)
        last = done == options.steps or bool(taken_away)
        if last or done % options.log_every == 0 or done == start + 1:
            jax.block_until_ready(metrics)
            # The first step of a process compiles: its time is no rate.
            speed = rates.read() if done > start + 1 else rates.restart() or {}
            log.write(done, metrics | speed)
            bar.set_postfix(runs.shown(log.newest), refresh=False)
        scores = {}
        if (last and not taken_away) or done % options.eval_every == 0:
            scores = objective.evaluate(run.weights(state))
            log.write(done, scores)
            last = stopping(scores) or last
            bar.set_postfix(runs.shown(log.newest), refresh=False)
            if not silent:
                tqdm.write(runs.sentence(done, scores))
        if last or scores or done % options.checkpoint_every == 0:
            notes = {"data": {"next_step": done}, "fingerprint": objective.fingerprint}
            checkpoints.save(done, state, notes, scores)
            if runs.SCORE in scores:
                runs.point_to_best(epath.Path(options.folder), log)
            rates.restart()
        if taken_away:
            checkpoints.wait()
            raise hosts.Preempted(done, taken_away)
        bar.update()
        if last:
            break
    bar.close()
    return state


def dry_run(config: TrainConfig, objective, mesh: Mesh) -> str:
    """What a run would do, without a step of it: see ``plan.describe``."""
    run = Run(config, objective, mesh)
    shapes = run.state_shapes()
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        run.place(next(objective.batches(0))),
    )
    with jax.set_mesh(mesh):
        lowered = run.step_function.lower(shapes, objective.frozen, batch, run.key)
        compiled = lowered.compile()
    return plan.describe(config, objective, shapes, objective.frozen, mesh, compiled)


def make_objective(config: TrainConfig, mesh: Mesh):
    """The objective that ``config.objective`` names."""
    if config.objective == "target":
        from train.target import TargetObjective

        return TargetObjective(config, mesh)
    from train.drafter import DrafterObjective

    return DrafterObjective(config, mesh)


def make_mesh(config: TrainConfig) -> Mesh:
    """The mesh of a configuration, which has to share its micro-batches evenly.

    Raises:
      InputError: it cannot, or the devices do not make such a mesh.
    """
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch.microbatch % parts:
        raise InputError(
            f"batch.microbatch: expected a multiple of mesh.data x mesh.fsdp ({parts}), "
            f"found {config.batch.microbatch}"
        )
    return mesh


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m train.train``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="experiment file of configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")
    parser.add_argument(
        "--multihost", action="store_true", help="one process of several; the same on every host"
    )
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.multihost:
        hosts.join()
    mesh = make_mesh(config)  # fails before the text is read
    if not arguments.dry_run:
        runs.check_writable(epath.Path(config.run.folder))
    use_compilation_cache()
    objective = make_objective(config, mesh)
    if arguments.dry_run:
        print(dry_run(config, objective, mesh))
        return
    train(config, objective, mesh)


if __name__ == "__main__":
    main()
