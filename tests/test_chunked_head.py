"""chunked_head.py against its own unchunked form, and the memory it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import losses
from ctc_spec_jax.chunked_head import chunked_frame_log_probs


def head_inputs(dtype, num_anchors=5, num_frames=4, width=6, vocab=7, num_labels=3):
    rng = np.random.default_rng(10)
    arrays = {
        "hidden": jnp.asarray(rng.normal(size=(num_anchors, num_frames, width)), dtype),
        "head": jnp.asarray(rng.normal(size=(width, vocab)), dtype),
        "blank_row": jnp.asarray(rng.normal(size=width), dtype),
        "blank_bias": jnp.asarray(0.7, dtype),
    }
    return arrays, jnp.asarray(rng.integers(0, vocab, (num_anchors, num_labels)), jnp.int32)


def unchunked(labels, hidden, head, blank_row, blank_bias):
    blank = hidden @ blank_row + blank_bias
    logits = jnp.concatenate([hidden @ head, blank[..., None]], axis=-1)
    return losses.gather_frame_log_probs(logits, labels)


def chunked(chunk):
    return functools.partial(chunked_frame_log_probs, chunk=chunk)


def run_head(form, labels, arrays, frozen=()):
    """The lattice, and the gradient of a random combination of it in all arrays but the frozen."""

    def loss(free):
        lattice = form(labels=labels, **free, **{name: arrays[name] for name in frozen})
        rng = np.random.default_rng(11)
        weighted = [jnp.sum(x * jnp.asarray(rng.normal(size=x.shape), x.dtype)) for x in lattice]
        return weighted[0] + weighted[1], lattice

    free = {name: array for name, array in arrays.items() if name not in frozen}
    grads, lattice = jax.grad(loss, has_aux=True)(free)
    return lattice, grads


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_chunked_equals_unchunked(chunk):
    with jax.enable_x64(True):
        arrays, labels = head_inputs(jnp.float64)
        run = jax.jit(run_head, static_argnums=0)
        got, want = run(chunked(chunk), labels, arrays), run(unchunked, labels, arrays)
        primal = jax.jit(chunked(chunk))(labels=labels, **arrays)  # without its derivative rule
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
    jax.tree.map(close, (*got, primal), (*want, want[0]))


def test_chunked_bfloat16_accumulates_in_float32():
    """Same rounded inputs, products in float32: the values agree to float32 accuracy."""
    arrays, labels = head_inputs(jnp.bfloat16, width=64, vocab=300)
    run = jax.jit(run_head, static_argnums=0)
    lattice, grads = run(chunked(2), labels, arrays)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    want_lattice, want_grads = run(unchunked, labels, wide)
    for got, want in zip(lattice, want_lattice, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for name, want in want_grads.items():
        assert grads[name].dtype == jnp.bfloat16
        error = np.asarray(grads[name], np.float32) - want
        assert np.linalg.norm(error) < 0.01 * np.linalg.norm(want), name


def test_chunked_never_holds_all_logits():
    arrays, labels = head_inputs(jnp.float32, num_anchors=64, num_frames=6, vocab=4096)
    full = 64 * 6 * 4096 * 4

    def temp_bytes(form):
        run = jax.jit(functools.partial(run_head, form, frozen=("head",)))
        memory = run.lower(labels, arrays).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temp_bytes(chunked(4)) < full / 4
    assert temp_bytes(unchunked) > full


def test_frozen_head_costs_nothing():
    """A product of size [D, V] appears only if the head's gradient is asked for."""
    arrays, labels = head_inputs(jnp.float32)

    def program(frozen):
        run = functools.partial(run_head, chunked(2), frozen=frozen)
        return str(jax.make_jaxpr(run)(labels, arrays))

    assert ":f32[6,7] = dot_general" in program(())
    assert ":f32[6,7] = dot_general" not in program(("head",))


def test_errors_name_the_argument():
    hidden, labels = jnp.zeros((2, 3, 4)), jnp.zeros((2, 4), jnp.int32)
    head, blank_row = jnp.zeros((4, 9)), jnp.zeros(4)
    with pytest.raises(ValueError, match="chunk must be"):
        chunked_frame_log_probs(hidden, head, blank_row, labels, 0)
    with pytest.raises(ValueError, match=r"hidden \[A, F, D\]"):
        chunked_frame_log_probs(hidden, head, blank_row, labels[:1], 2)
