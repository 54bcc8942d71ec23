"""One training step of a tiny pair on meshes of eight virtual devices, against one device.

Run by ``test_mesh_training.py`` in its own process, because the number of devices is fixed when
jax starts; prints one line of JSON per comparison, and one of a planted fault.
"""

import json
import os
import tempfile

from tests import XLA_FLAGS

os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")

from ctc_spec_jax import sharding
from ctc_spec_jax.checkpoint import Checkpoints, load_params, save_params
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from tests.helpers import VOCAB, tiny_target
from train import step as steps
from train.config import TrainConfig, _build
from train.drafter import DrafterObjective, loss_of
from train.target import TargetObjective

MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "tensor": (1, 2, 4)}
MESHES |= {"all": (2, 2, 2)}
ROWS, LENGTH = 16, 24


def mesh_of(name):
    sizes = MESHES[name]
    return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def config_of(objective):
    sections = {
        "objective": objective,
        "batch": {"rows": ROWS, "microbatch": 8, "length": LENGTH, "anchors": 3, "remat": True},
        "loss": {"labels": 3, "chunk": 2, "ctc": 0.3},
        "optim": {"average": 0.9},
    }
    return _build(TrainConfig, sections, "")


def objective_of(name, mesh):
    """An objective without its files: the parts that a step needs."""
    lm, params = tiny_target()
    made = object.__new__(TargetObjective if name == "target" else DrafterObjective)
    made.config, made.mesh, made.dtype = config_of(name), mesh, jnp.float32
    made.lm, made.frozen = DecoderLM(lm.config, True), None
    if name == "drafter":
        made.lm, made.frozen = lm, jax.device_put(params, sharding.parameters(mesh, params))
        made.drafter = CTCDrafter(ctc_config(lm.config, 1, 4, (0, 1), 32), PrefixTree(4, 3))
        made.drafter_loss = loss_of(made.config, mesh, lm, made.drafter)
    return made


def batch_of():
    """Rows that differ: one to three documents, of which only a part is trained, and padding."""
    draw = np.random.default_rng(0)
    batch = {"tokens": draw.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)}
    names = ("segments", "positions")
    batch |= {name: np.zeros((ROWS, LENGTH), np.int32) for name in names}
    batch["trained"] = np.zeros((ROWS, LENGTH), bool)
    for row in range(ROWS):
        begin = 0
        for number in range(1, 2 + row % 3):
            end = min(LENGTH, begin + 4 + row % 5 + number)
            batch["segments"][row, begin:end] = number
            batch["positions"][row, begin:end] = np.arange(end - begin)
            batch["trained"][row, begin + 1 + row % 2 : end] = True
            begin = end
    batch["trained"][3] = False  # nothing to learn from
    return batch | {"row": np.arange(ROWS, dtype=np.int32)}


def run_step(name, mesh, shared_keys=False):
    """State after one step of plain gradient descent, its metrics, and minus the gradients."""
    objective, update = objective_of(name, mesh), optax.sgd(1.0)
    if shared_keys:  # a fault: what a row draws depends on its place
        plain = objective.loss

        def loss(params, frozen, batch, keys):
            return plain(params, frozen, batch, keys[:1].repeat(len(keys)))

        objective.loss = loss
    step = steps.make_step(objective, update, mesh, 0.9)
    start = steps.init_state(objective.init(jax.random.key(1)), update, 0.9)
    before = jax.tree.map(np.array, start["params"])
    state = jax.device_put(start, sharding.parameters(mesh, start))
    batch = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), batch_of())
    batch = jax.device_put(batch, steps.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        state, metrics = step(state, objective.frozen, batch, jax.random.key(7))
    grads = jax.tree.map(lambda a, b: a - np.asarray(b), before, state["params"])
    return state, jax.tree.map(np.asarray, metrics), grads


def difference(one, other) -> float:
    """Largest difference of two trees, in parts of the largest entry of each array."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-3)) for a, b in pairs)


COMPARED = {"drafter": ("data", "tensor"), "target": ("all",)}


def compare():
    for name, meshes in COMPARED.items():
        _, metrics, grads = run_step(name, mesh_of("one"))
        for mesh in meshes:
            _, other_metrics, other = run_step(name, mesh_of(mesh))
            found = {"objective": name, "mesh": mesh, "gradients": difference(grads, other)}
            found["metrics"] = difference(metrics, other_metrics)
            found["gradient_norm"] = float(metrics["gradient_norm"])
            print(json.dumps(found), flush=True)
        if name == "drafter":
            wrong = run_step(name, mesh_of("one"), shared_keys=True)[2]
            print(json.dumps({"fault": difference(grads, wrong)}), flush=True)


def move():
    """A checkpoint of (8,1,1) on (2,2,2) and on one device: the same state, hence same logits."""
    state, _, _ = run_step("drafter", mesh_of("data"))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(f"{folder}/checkpoints", 2)
        checkpoints.save(1, state, {"data": {"next_step": 1}}, {})
        checkpoints.wait()
        save_params(f"{folder}/params", state["params"])
        for name in ("all", "one"):
            mesh = mesh_of(name)
            places = sharding.parameters(mesh, state)
            like = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                state,
                places,
            )
            found, notes = checkpoints.restore(1, like)
            alone = load_params(f"{folder}/params", like["params"])
            same = difference(jax.device_get(state), jax.device_get(found)) == 0
            same &= difference(jax.device_get(state["params"]), jax.device_get(alone)) == 0
            placed = jax.tree.map(lambda x, place: x.sharding == place, found, places)
            line = {"restored": name, "same": same, "placed": all(jax.tree.leaves(placed))}
            print(json.dumps(line | {"notes": notes}), flush=True)
        checkpoints.close()


if __name__ == "__main__":
    compare()
    move()
