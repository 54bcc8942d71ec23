"""Decoding on eight virtual devices is decoding on one; where arrays lie and what travels."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from ctc_spec_jax import sharding
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.tree import build
from ctc_spec_jax.types import StopStrings
from tests.helpers import make_request, printed_lines

ROOT = pathlib.Path(__file__).parents[1]
MESH = AbstractMesh((2, 3, 4), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    """What ``tests.mesh_decode`` prints in a process of its own."""
    return printed_lines("tests.mesh_decode")


def test_greedy_answers_equal_those_of_one_device(lines):
    """Tokens, rounds and acceptance; ``tensor`` divides the two kv heads on two meshes of three."""
    compared = [line for line in lines if "mesh" in line]
    assert [line["mesh"] for line in compared] == [[8, 1, 1], [2, 2, 2], [1, 2, 4]]
    for line in compared:
        assert line["same"], line
        assert line["distinct"] == 8 and line["drafted"] > 0
    assert compared[-1]["placed"]


def test_a_round_moves_activations_only(lines):
    """Caches stay in place, and no sum over chips is there that the layers do not need.

    Embeddings of nodes and of the tokens after accepted ones, two per layer of drafter and target,
    two per softmax, the drafter's candidates, and the loop's condition: 11. Of the arg-max each
    chip's winner travels, an index and a number of 4 bytes for 4 rows of 4 nodes from 4 chips. The
    planted fault, a cache that is written without telling the partitioner how, makes two more.
    """
    clean, fault = [line for line in lines if "fault" in line]
    assert not clean["copies"]
    assert clean["reduced"] == 11 < fault["reduced"]
    assert clean["winners"] == (4 + 4) * 4 * 4 * 4
    assert clean["gathered"] < clean["cache"] / 10
    assert clean["aliased"] > 0.9 * clean["state"]


def test_parameters_go_from_the_file_to_their_places(lines):
    """Bit for bit; a chip of 8 holds no more than its slices and what is too small to slice."""
    (line,) = [line for line in lines if "share" in line]
    assert line["placed"] and line["same"] and line["share"] < 0.2


def test_axes_that_divide():
    """Greedy from the left: an axis that does not divide is left out, not the whole dimension."""
    assert sharding.spec(MESH, ("batch", None), (12, 5)) == P(("data", "fsdp"), None)
    assert sharding.spec(MESH, ("batch", None), (9, 5)) == P("fsdp", None)
    assert sharding.spec(MESH, sharding.CACHE, (2, 6, 8, 8)) == P("data", None, None, None)
    assert sharding.spec(MESH, ("vocab", "embed"), (8, 9)) == P("tensor", "fsdp")


@pytest.mark.parametrize(
    ("sizes", "pattern"),
    [
        ((0, 1, 1), "sizes of at least 1 .* found data 0"),
        ((-1, -1, 1), "one -1 at most"),
        ((7, 3, 1), "sizes whose product is the number of devices, 1, found data 7, fsdp 3"),
        ((-1, 2, 1), "sizes whose product is the number of devices, 1"),
    ],
)
def test_bad_meshes(sizes, pattern):
    with pytest.raises(InputError, match=f"mesh: expected .*{pattern}"):
        sharding.make_mesh(*sizes, devices=jax.devices()[:1])


def test_a_request_is_spread_by_rows_but_for_its_table():
    strings = StopStrings(np.zeros((4, 17), np.int32), np.zeros((4,), np.int32))
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    places = sharding.inputs(mesh, make_request(4, 8, stop_strings=strings))
    assert places.stop_strings.table.spec == P()
    assert len(places.stop_strings.start.spec) == 1 and len(places.stops.spec) == 2


@pytest.mark.parametrize("parts", [2, 8])
def test_top_tokens_of_parts(parts):
    """Values are those of ``lax.top_k`` and every index holds its value."""
    scores = np.random.default_rng(0).integers(0, 50, (5, 8 * 96)).astype(np.float32)
    values, index = build._top_k_of_parts(jnp.asarray(scores), 9, parts)
    np.testing.assert_array_equal(values, jax.lax.top_k(scores, 9)[0])
    np.testing.assert_array_equal(np.take_along_axis(scores, np.asarray(index), 1), values)
    assert all(len(set(row)) == 9 for row in np.asarray(index).tolist())
