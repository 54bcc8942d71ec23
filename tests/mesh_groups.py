"""Decodes with target and drafter on devices of their own, against one device.

Run by ``test_device_groups.py`` in its own process, because the number of devices is fixed when
jax starts; prints one line of JSON per check.
"""

import json
import os

from tests import XLA_FLAGS

os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} --xla_force_host_platform_device_count=4"

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")

from ctc_spec_jax import decode, sharding
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.device_groups import Groups, decode_on
from ctc_spec_jax.draft.pearl import AheadLM
from ctc_spec_jax.draft.small_lm import Drawn
from ctc_spec_jax.types import Sampling
from ctc_spec_jax.verify import TargetSample
from ctc_spec_jax.verify_sampled import Rejection
from tests.helpers import make_request, ragged_prompts, tiny_target

CAPACITY = 12
BUDGETS = [CAPACITY, 7, CAPACITY, 1]
TEMPERATURES = np.asarray([0.0, 5.0, 8.0, 0.0], np.float32)


def placed(mesh, params):
    return jax.device_put(params, sharding.parameters(mesh, params))


def drawn():
    """A smaller drafter whose drafts are drawn, beside rows that are greedy."""
    shape = dict(num_layers=1, width=16, num_heads=2, num_kv_heads=2, mlp_width=16)
    lm, params = tiny_target(2, **shape)
    return AheadLM(lm, 3, Drawn()), params, Rejection()


def compare(drafter, draft_params, rule, sizes: list[tuple[int, int]]) -> None:
    """Groups of the target (``tensor``) and of the drafter (``data``) of so many devices."""
    lm, params = tiny_target(num_layers=1)
    loop = Loop(lm, drafter, rule, CAPACITY)
    given = (
        *ragged_prompts(4, (1, 2, 5, 9)),
        make_request(4, BUDGETS, sampling=Sampling(TEMPERATURES)),
    )
    run = jax.jit(decode.decode, static_argnums=0)
    expected = jax.device_get(run(loop, params, draft_params, *given))
    for ours, theirs in sizes:
        first, second = jax.devices()[:ours], jax.devices()[ours : ours + theirs]
        target = sharding.make_mesh(tensor=ours, devices=first)
        groups = Groups(target, sharding.make_mesh(data=theirs, devices=second))
        weights = placed(groups.target, params), placed(groups.draft, draft_params)
        found = decode_on(groups, loop, *weights, *given)
        print(json.dumps(facts((ours, theirs), found, expected)), flush=True)


def facts(sizes, found, expected) -> dict:
    where = {device.id for device in found.tokens.devices()}
    found = jax.device_get(found)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), found, expected)
    return dict(
        sizes=sizes,
        same=all(jax.tree.leaves(same)),
        lengths=found.lengths.tolist(),
        drafted=int(found.record.from_draft.sum()),
        on_target=where == set(range(sizes[0])),
    )


if __name__ == "__main__":
    compare(*drawn(), [(1, 1), (2, 2)])
    target = tiny_target(num_layers=1)
    compare(AheadLM(target[0], 3), target[1], TargetSample(), [(1, 3)])
