"""The cache after every round is that of a fresh prefill (T8), and no step copies it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax.decode import Loop, NoDraft, advance, extend, start
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config
from ctc_spec_jax.draft.gsd import GSD
from ctc_spec_jax.draft.ouroboros import Ouroboros
from ctc_spec_jax.draft.pearl import AheadLM
from ctc_spec_jax.draft.small_lm import Drawn, SmallLM
from ctc_spec_jax.models import kv_cache
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from ctc_spec_jax.verify import Greedy
from tests.helpers import OracleTree, make_request, ragged_prompts, tiny_target

NEW = 16


def _states(lm, params, drafter, draft_params, chunks):
    prompts, lengths = ragged_prompts(3, (6, 3, 8))
    loop = Loop(lm, drafter, Greedy(), NEW)
    request = make_request(3, NEW)
    begin = jax.jit(start, static_argnums=0)
    step = jax.jit(advance, static_argnums=0)
    state = begin(loop, params, draft_params, prompts, lengths, request)
    for rounds in chunks:
        yield loop, state
        state = step(loop, params, draft_params, state, request, np.int32(rounds))
    yield loop, state


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("quality", [0.3, 1.0])
def test_cache_audit(quality, window):
    """Committed keys and values equal those of a causal forward over the committed tokens.

    Catches a wrong gather, a wrong position (rotary phase) and an off-by-one commit.
    """
    lm, params = tiny_target(windows=(window, 0) if window else ())
    plain = list(_states(lm, params, NoDraft(), (), [NEW]))[-1][1]
    fresh = jax.jit(lambda tokens, length: lm.hidden(params, tokens, length)[2])
    drafter = OracleTree(quality=quality)
    seen = set()
    for _, state in _states(lm, params, drafter, plain.tokens, [1] * 6):
        length = np.asarray(state.length)
        seen |= set(length.tolist())
        for (keys, values), (new_keys, new_values) in zip(
            state.cache, fresh(state.tokens, state.length), strict=True
        ):
            for row, n in enumerate(length):
                for ours, true in (
                    (keys[row, ..., :n], new_keys[row, ..., :n]),
                    (values[row, :, :n], new_values[row, :, :n]),
                ):
                    np.testing.assert_allclose(ours, true, rtol=1e-4, atol=1e-4)
    assert len(seen) > 6


def test_drafter_cache_audit():
    """The drafter's context after rounds equals its context of a fresh prompt of that text."""
    lm, params = tiny_target()
    drafter = CTCDrafter(ctc_config(lm.config, frames=5, taps=(0, 1)), PrefixTree(6, 3, top_k=4))
    draft_params = drafter.init_params(jax.random.key(0))
    for loop, state in _states(lm, params, drafter, draft_params, [1] * 4):
        fresh = _fresh(loop, params, draft_params, state)
        _same_context(state, fresh)


def test_drafter_context_of_another_turn():
    """Of a text that shares the kept tokens and one more with the old one; not if that differs."""
    lm, params = tiny_target()
    drafter = CTCDrafter(ctc_config(lm.config, frames=5, taps=(0, 1)), PrefixTree(6, 3, top_k=4))
    draft_params = jax.tree.map(lambda x: x * 8, drafter.init_params(jax.random.key(0)))
    request, counts = make_request(3, NEW), jnp.full((3,), 3, jnp.int32)
    *_, (loop, state) = _states(lm, params, drafter, draft_params, [2])
    keep = jnp.asarray([2, 4, 3], jnp.int32)
    first = jnp.take_along_axis(state.tokens, keep[:, None], axis=1)
    after = jnp.asarray([[1, 2]] * 3, jnp.int32)

    def turn(first):
        new = jnp.concatenate([first, after], axis=1)
        longer = extend(loop, params, draft_params, state, keep, new, counts, request)
        return longer, _fresh(loop, params, draft_params, longer)

    _same_context(*turn(first))
    with pytest.raises(AssertionError, match="Not equal"):
        _same_context(*turn(first ^ 1))


def _fresh(loop, params, draft_params, state):
    """State after the prefill of the text of ``state``."""
    prompt, length = state.tokens[:, : int(state.length.max()) + 1], state.length + 1
    begin = jax.jit(start, static_argnums=0)
    return begin(loop, params, draft_params, prompt, length, make_request(3, NEW))


def _same_context(state, fresh):
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(state.drafter["newest"], fresh.drafter["newest"], **close)
    ours, true = (jax.tree.leaves(s.drafter["kv"]) for s in (state, fresh))
    for a, b in zip(ours, true, strict=True):
        axis = 1 if a.shape[2] > a.shape[3] else 2
        for row, n in enumerate(np.asarray(state.length)):
            rows = (np.take(x[row], range(n), axis) for x in (a, b))
            np.testing.assert_allclose(*rows, **close)


@pytest.mark.parametrize("method", ["plain", "ctc", "small_lm", "pearl", "gsd", "ouroboros"])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_step_copies_a_cache(batch, method):
    """The compiled loop holds no copy of the shape of a cache, and the donated state is reused."""
    lm, params = tiny_target()
    drafter, draft_params = NoDraft(), ()
    if method == "ctc":
        drafter = CTCDrafter(
            ctc_config(lm.config, frames=5, taps=(0, 1)), PrefixTree(6, 3, top_k=4)
        )
        draft_params = drafter.init_params(jax.random.key(0))
    small = tiny_target(num_layers=1)[0]
    of_language_models = {
        "small_lm": SmallLM(small, (1, 1, 1)),
        "pearl": AheadLM(small, 3, Drawn()),
        "gsd": GSD(small, 6, 3, 3),
        "ouroboros": Ouroboros(small, 2, 1, 2, width=2, ways=2),
    }
    if method in of_language_models:
        drafter = of_language_models[method]
        draft_params = drafter.init_params(jax.random.key(0))
    prompts, lengths = ragged_prompts(3, (6, 3, 8)[:batch])
    # Caches far larger than everything else, so that one copy of them would show in the memory.
    loop = Loop(lm, drafter, Greedy(), 600)
    request = make_request(batch, NEW)
    state = jax.eval_shape(lambda: start(loop, params, draft_params, prompts, lengths, request))
    step = jax.jit(advance, static_argnums=0, donate_argnums=3)
    compiled = step.lower(loop, params, draft_params, state, request, np.int32(4)).compile()
    caches = jax.tree.leaves(state.cache) + jax.tree.leaves(state.drafter)
    caches = [leaf for leaf in caches if leaf.ndim == 4 and leaf.dtype == np.float32]
    text = compiled.as_text()
    for shape in {leaf.shape for leaf in caches}:
        dims = ",".join(map(str, shape))
        assert f"f32[{dims}]" in text
        assert not re.findall(rf"= f32\[{dims}\]\{{[^}}]*\}} copy\(", text)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in caches)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size


@pytest.mark.parametrize(("platform", "ordered"), [("cuda", True), ("tpu", False), ("cpu", False)])
def test_several_rows_on_gpus(platform, ordered):
    """One write for all rows, and caches that stay in order; the same slots either way."""
    draw = np.random.default_rng(5)
    slots = jnp.asarray(draw.normal(size=(3, 2, 4, 12)), jnp.float32)
    rows = jnp.asarray(draw.normal(size=(3, 2, 4, 2)), jnp.float32)
    length = jnp.asarray([0, 7, 10], jnp.int32)
    expected = np.asarray(slots).copy()
    for b, first in enumerate(length):
        expected[b, :, :, first : first + 2] = rows[b]
    for write in (kv_cache._one_by_one, kv_cache._at_once, kv_cache._in_order):
        found = jax.jit(write, static_argnums=0)(3, slots, rows, length)
        assert np.array_equal(found, expected), write
    path = jnp.zeros((3, 2), jnp.int32)
    given = ((slots, jnp.swapaxes(slots, 2, 3)),), ((rows, jnp.swapaxes(rows, 2, 3)),), path, length
    text = jax.jit(kv_cache.commit).trace(*given).lower(lowering_platforms=(platform,)).as_text()
    assert ("LayoutConstraint" in text) == ordered == ("scatter" in text)
