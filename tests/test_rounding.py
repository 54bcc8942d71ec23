"""XLA may make an array anew for every reader, rounded differently: no rule may trip over that.

It does so where a reader is fused with what makes its input, say a product and a sum in one
rounding. Which programs that happens in depends on the device and the version; here it happens
everywhere, in an interpreter.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from ctc_spec_jax import categorical, verify
from ctc_spec_jax.verify_sampled import block_row

CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
KEPT = ("exp", "reduce_max", "reduce_min", "reduce_or", "reduce_and", "argmax")
"""Made once: dear, and read by many."""
ROUNDED = ("add", "sub", "mul", "div", "exp", "dot_general", "reduce_sum", "cumsum")


def made_anew(function: Callable, seed: int, *arguments, platform: int = 0):
    """What ``function`` may return where every reader makes its inputs anew, but for those kept.

    Results of arithmetic are off by one in the last place or not, at random, each time that they
    are made. ``platform``: the branch that is taken where platforms have their own.
    """
    draw = np.random.default_rng(seed)

    def rounded(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        off = draw.integers(-1, 2, x.shape).astype(x.dtype)
        return jnp.where(jnp.isfinite(x), x * (1 + off * jnp.finfo(x.dtype).eps), x)

    def run(jaxpr: Any, consts, inputs) -> list[Callable]:
        constants = [lambda x=x: x for x in consts]
        readers: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        readers.update(zip(jaxpr.invars, inputs, strict=True))

        def read(var):
            return (lambda: var.val) if isinstance(var, core.Literal) else readers[var]

        for eqn in jaxpr.eqns:
            name, given = eqn.primitive.name, [read(var) for var in eqn.invars]
            if name == "cond" and "branches_platforms" in eqn.params:
                inner, given = eqn.params["branches"][platform], given[1:]
            else:
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if name in CALLS or name == "cond":
                found = run(inner.jaxpr, inner.consts, given)
            else:
                found = [made(eqn, given, place) for place in range(len(eqn.outvars))]
            readers.update(zip(eqn.outvars, found, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def made(eqn, given, place):
        def make() -> jax.Array:
            out = eqn.primitive.bind(*(x() for x in given), **eqn.params)
            out = out[place] if eqn.primitive.multiple_results else out
            return rounded(out) if eqn.primitive.name in ROUNDED else out

        if eqn.primitive.name not in KEPT and eqn.outvars[place].aval.size > 1:
            return make
        kept = make()
        return lambda: kept

    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    found = run(closed.jaxpr, closed.consts, [lambda x=x: x for x in arguments])
    return jax.tree.unflatten(jax.tree.structure(shape), [make() for make in found])


def processed(logits):
    return logits * jnp.float32(1.3) - jnp.float32(0.7)


def equal_to_the_maximum(logits):
    """The planted fault: a token that equals a maximum found before."""
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    peak = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(peak, index[None], logits.shape[-1] - 1), axis=-1)


def lost_by(argmax: Callable, size: int, platform: int = 0) -> float:
    """How far below the maximum a token is that ``argmax`` may return, over 24 rows."""
    logits = np.random.default_rng(size).normal(0, 3, (24, size)).astype(np.float32)
    logits[:12, -1] = logits[:12].min() - 9
    found = made_anew(lambda x: argmax(processed(x)), 0, logits, platform=platform)
    assert found.dtype == np.int32 and found.min() >= 0 and found.max() < size
    values = np.take_along_axis(processed(logits), np.asarray(found)[:, None], axis=1)[:, 0]
    return float((processed(logits).max(axis=1) - values).max())


@pytest.mark.parametrize("size", [2, 64, 75, 300])
@pytest.mark.parametrize("platform", [0, 1])
def test_an_arg_max_is_a_maximum_to_the_rounding(size, platform):
    """On CPU, in blocks, and elsewhere."""
    assert lost_by(verify.first_argmax, size, platform) < 1e-5


def test_a_token_that_equals_the_maximum_may_not_be_found():
    assert lost_by(equal_to_the_maximum, 300) > 1


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 1000])
def test_the_first_of_equal_ones(size):
    """As ``jnp.argmax`` has it; where all is minus infinity, that is the first token."""
    logits = np.random.default_rng(size).integers(0, 9, (2, 3, size)).astype(np.float32)
    logits[0, 0], logits[1, 1, -1] = -np.inf, 9
    found = jax.jit(verify.first_argmax)(logits)
    np.testing.assert_array_equal(found, logits.argmax(axis=-1))
    assert found[1, 1] == size - 1
    some = jax.vmap(verify.first_argmax)(jnp.full((2, size), jnp.nan))
    assert ((some >= 0) & (some < size)).all()


@pytest.mark.parametrize("size", [5, 300])
def test_a_draw_has_weight(size):
    """At the largest number below 1, where one place decides whether a sum lies past it."""
    weights = np.zeros((64, size), np.float32)
    weights[:, size // 2 : size // 2 + 2] = np.random.default_rng(0).random((64, 2)) + 0.1
    uniform = np.full((64, 2), 1 - 2**-24, np.float32)
    found = np.asarray(made_anew(categorical.draw, 0, weights, uniform))
    assert (np.take_along_axis(weights, found[:, None], axis=1) > 0).all()


def test_a_residual_of_nothing_but_rounding():
    """Two laws that are one but for the rounding, and a chain that is refused halfway."""
    laws = np.full((3, 5), -np.inf, np.float32)
    laws[:, 2:] = np.random.default_rng(1).normal(0, 1, (3, 3))
    tokens, valid = np.array([2, 3, 4], np.int32), np.ones(3, bool)
    uniform = np.full((3, 2), 1 - 2**-24, np.float32)
    lengths = []
    for seed in range(48):
        found = made_anew(block_row, seed, uniform, tokens, valid, laws, laws, np.array(False))
        assert found.next_token >= 2
        lengths.append(int(found.length))
    assert min(lengths) < 3
