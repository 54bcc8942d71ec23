"""Target and drafter on virtual devices of their own decode as one device does."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from ctc_spec_jax import sharding
from ctc_spec_jax.decode import Loop, NoDraft
from ctc_spec_jax.device_groups import Groups, decode_on
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.verify import TargetSample
from tests.helpers import make_request, tiny_target

ROOT = pathlib.Path(__file__).parents[1]


def test_answers_are_those_of_one_device():
    """Tokens, rounds, acceptance and ends, bit for bit; they lie on the target's group."""
    inherited = {name: os.environ[name] for name in os.environ if name != "TPU_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.mesh_groups"],
        cwd=ROOT,
        env=inherited,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["sizes"] for line in lines] == [[1, 1], [2, 2], [1, 3]]
    for line in lines:
        assert line["same"] and line["on_target"], line
        assert line["lengths"] == [12, 7, 12, 1] and line["drafted"] > 5


def test_groups_that_share_a_device_and_drafters_that_wait():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(
        InputError, match="groups: expected devices of their own, found .*0 in both"
    ):
        Groups(mesh, mesh)
    groups = object.__new__(Groups)
    lm, params = tiny_target(num_layers=1)
    prompts, lengths = np.zeros((1, 2), np.int32), np.ones((1,), np.int32)
    loop = Loop(lm, NoDraft(), TargetSample(), 4)
    with pytest.raises(InputError, match="groups: expected a drafter that works ahead"):
        decode_on(groups, loop, params, (), prompts, lengths, make_request(1, 4))
