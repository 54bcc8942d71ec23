"""One row in a tile of equal ones: what TPUs compute, on any device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax.models import layers
from tests.helpers import tiny_target

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.mark.parametrize("shape", [(1, 1, 6), (1, 6)])
def test_projection(shape):
    """A kernel of two axes, an output in another dtype, and a gradient."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal(shape), jnp.float32)
    kernel = jnp.asarray(draw.standard_normal((6, 2, 3)), jnp.float32)

    def product(x, y):
        return jnp.tensordot(x, y, 1)

    tile = layers.product_of_tile(product, len(shape) - 2, x, kernel)
    np.testing.assert_allclose(tile, product(x, kernel), **CLOSE)
    np.testing.assert_allclose(layers.project(x, kernel), product(x, kernel), **CLOSE)
    narrow = layers.project(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), jnp.float32)
    assert narrow.dtype == jnp.float32 and narrow.shape == (*shape[:-1], 2, 3)
    grad = jax.grad(lambda kernel: jnp.sum(layers.project(x, kernel)))(kernel)
    np.testing.assert_allclose(grad, jnp.broadcast_to(x.reshape(6, 1, 1), grad.shape), **CLOSE)


@pytest.mark.parametrize("length", [0, 5])
def test_a_step(length):
    """Logits, taps, keys and values of a row are those of the step without a tile."""
    lm, params = tiny_target()
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)
    cache, _ = lm.prefill(params, tokens, jnp.asarray([length], jnp.int32), 16)
    one = jnp.asarray([[7]], jnp.int32), jnp.asarray([[length]], jnp.int32)
    given = params, cache, jnp.asarray([length], jnp.int32), *one, jnp.ones((1, 1, 1), bool)
    plain = lm._forward_rows((0, 1), *given)
    tile = lm._forward_tile((0, 1), *given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), plain, tile)
