"""Target and drafter on virtual devices of their own decode as one device does."""

import pathlib

import jax
import numpy as np
import pytest

from ctc_spec_jax import sharding
from ctc_spec_jax.decode import Loop, NoDraft
from ctc_spec_jax.device_groups import Groups, decode_on
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.verify import TargetSample
from tests.helpers import make_request, printed_lines, tiny_target

ROOT = pathlib.Path(__file__).parents[1]


def test_answers_are_those_of_one_device():
    """Tokens, rounds, acceptance and ends, bit for bit; they lie on the target's group."""
    lines = printed_lines("tests.mesh_groups")
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
