"""A training step on eight virtual devices equals that of one; checkpoints move between meshes."""

import pathlib

import pytest

from tests.helpers import printed_lines

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    """What ``tests.mesh_training`` prints in a process of its own."""
    return printed_lines("tests.mesh_training")


def test_gradients_and_metrics_equal_those_of_one_device(lines):
    """To float32 rounding: sums over devices are added up in another order."""
    compared = [line for line in lines if "mesh" in line]
    assert {line["mesh"] for line in compared} == {"data", "tensor", "all"}
    for line in compared:
        assert line["gradients"] < 2e-5 and line["metrics"] < 5e-6, line
        assert line["gradient_norm"] > 0.1


def test_state_is_restored_on_other_meshes(lines):
    restored = [line for line in lines if "restored" in line]
    assert [line["restored"] for line in restored] == ["all", "one"]
    for line in restored:
        assert line["same"] and line["placed"], line
        assert line["notes"] == {"data": {"next_step": 1}}


def test_keys_that_depend_on_the_place_are_found(lines):
    """The planted fault: all rows of a micro-batch draw with the first one's key."""
    (found,) = [line["fault"] for line in lines if "fault" in line]
    assert found > 1e-3
