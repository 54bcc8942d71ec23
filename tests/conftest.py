"""Strict numerics for every test: no silent dtype or rank promotion, warnings are errors."""

import gc
import os

# Tests compile far more than they compute: unoptimised machine code is ready in little more than
# half the time. Passes of XLA itself, which the tests of copies and memory look at, still run.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Programs go with the file that compiled them.

    Each holds some memory maps, of which a process may have 65,530 on Linux: with the programs of
    all files, the next one ends in a segmentation fault.
    """
    yield
    jax.clear_caches()
    gc.collect()
