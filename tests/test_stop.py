"""Early stops: entropies in closed form, and a trace of AdaEDL's threshold worked out by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax.draft.stop import AdaEDL, AdaEDLState, MaxProb, Never, entropy


def uniform(count: int, vocab: int = 60):
    """Logits [1, 1, V] of a uniform law over ``count`` tokens."""
    return jnp.where(jnp.arange(vocab) < count, 2.5, -jnp.inf)[None, None]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 50])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_bound_of_a_uniform_law(count, threshold):
    rule = AdaEDL(first_threshold=threshold)
    np.testing.assert_allclose(entropy(uniform(count))[0, 0], math.log(count), rtol=1e-5, atol=1e-6)
    goes_on = 1 - math.sqrt(0.2 * math.log(count)) >= threshold
    assert goes_on == (math.log(count) <= (1 - threshold) ** 2 / 0.2)
    assert rule.goes_on(rule.init(1), uniform(count)).tolist() == [[goes_on]]


def test_bounds_of_rows_and_nodes():
    """Every row has its own threshold; a bound below 0 stops whatever the threshold above it."""
    state = AdaEDLState(jnp.zeros(3), jnp.asarray([0.9, 0.4, -jnp.inf]))
    wide = jnp.zeros((1, 1, 1000))  # entropy 6.9 nats, bound -0.18
    narrow = jnp.pad(uniform(2), ((0, 0), (0, 0), (0, 940)), constant_values=-jnp.inf)
    laws = jnp.tile(jnp.concatenate([narrow, wide], axis=1), (3, 1, 1))
    expected = [[False, False], [True, False], [True, True]]
    assert AdaEDL().goes_on(state, laws).tolist() == expected
    assert Never().goes_on((), laws).all()


def test_trace_of_the_threshold():
    """Depth 4, target 0.85: (accepted, drafted) -> rate, threshold."""
    rule = AdaEDL(target=0.85)
    state = rule.init(2)
    steps = [
        ((4, 4), 0.925, 0.5),
        ((1, 4), 0.5875, 0.501),
        ((4, 4), 0.79375, 0.502),
        ((3, 3), 0.896875, 0.501),
    ]
    for (accepted, drafted), rate, threshold in steps:
        # The second row drafts nothing and keeps its state.
        state = rule.update(state, jnp.asarray([accepted, 0]), jnp.asarray([drafted, 0]), 4)
        np.testing.assert_allclose(state.rate, [rate, 0.85], rtol=1e-6)
        np.testing.assert_allclose(state.threshold, [threshold, 0.5], rtol=1e-6)


def test_largest_probability():
    assert MaxProb(0.3).goes_on((), uniform(3)).tolist() == [[True]]
    assert MaxProb(0.3).goes_on((), uniform(4)).tolist() == [[False]]
