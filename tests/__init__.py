"""What every process of the tests shares; imported before jax starts."""

import os

# Tests compile far more than they compute: unoptimised machine code, and the older of the two
# emitters of fused loops, are ready in a third of the time. Passes of XLA itself, which the tests
# of copies and memory look at, still run. Of two equal options the last one wins, so that whoever
# runs the tests has the last word.
GIVEN_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
XLA_FLAGS += " " + GIVEN_XLA_FLAGS
