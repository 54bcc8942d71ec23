"""Strict numerics for every test: no silent dtype or rank promotion, warnings are errors."""

import gc
import os

from tests import GIVEN_XLA_FLAGS, XLA_FLAGS

os.environ["XLA_FLAGS"] = XLA_FLAGS

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# The options are read once, when devices are looked for. Programs that tests start in processes
# of their own compile as they do for users, unless their results are compared with those of here.
jax.devices()
os.environ["XLA_FLAGS"] = GIVEN_XLA_FLAGS


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Programs go with the file that compiled them.

    Each holds some memory maps, of which a process may have 65,530 on Linux: with the programs of
    all files, the next one ends in a segmentation fault.
    """
    yield
    jax.clear_caches()
    gc.collect()
