"""Strict numerics for every test: no silent dtype or rank promotion, warnings are errors."""

import os

# Tests compile far more than they compute: unoptimised machine code is ready in little more than
# half the time. Passes of XLA itself, which the tests of copies and memory look at, still run.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
