"""distillation.py against NumPy, its limits, its unchunked form, and drafters that learn by it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import distillation, losses
from ctc_spec_jax.distillation import DIVERGENCES, divergence
from ctc_spec_jax.types import DraftTree, Law
from ctc_spec_jax.verify_sampled import Rejection

VOCAB = 7
ALL = {name: 1.0 + 0.25 * i for i, name in enumerate(DIVERGENCES)}
OPTIONS = {"temperature": 0.6, "beta": 0.3, "k": 3}
SMOOTH = [name for name in DIVERGENCES if name not in ("total_variation", "hard_label")]


def random_logits(seed=0, lead=(3, 4), scale=1.5):
    """Of target and drafter, float64 [*lead, VOCAB] each."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(scale=scale, size=(*lead, VOCAB)) for _ in range(2))


def softmax(logits, temperature=1.0):
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return weights / weights.sum(-1, keepdims=True)


def kl(p, q):
    """Where q is 0 and p is not, the logarithm of q is LOG_ZERO."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(p) - np.where(q > 0, np.log(q), distillation.LOG_ZERO)
        return np.where(p > 0, p * ratio, 0.0).sum(-1)


def coarse(p, tokens):
    kept = np.take_along_axis(p, tokens, -1)
    return np.concatenate([kept, np.maximum(1 - kept.sum(-1, keepdims=True), 0)], -1)


def oracle(target, draft, temperature, beta, k):
    """{name: float64 [...]} by the formulas."""
    p, q = softmax(target, temperature), softmax(draft, temperature)
    mixture = beta * p + (1 - beta) * q
    top = np.argsort(-p, axis=-1, kind="stable")[..., :k]
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
        "total_variation": np.abs(p - q).sum(-1) / 2,
        "top_k": kl(coarse(p, top), coarse(q, top)),
        "hard_label": -np.log(np.take_along_axis(q, top[..., :1], -1)[..., 0]),
    }


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def every_divergence(target, draft, **options):
    return {name: divergence(name, target, draft, **options) for name in DIVERGENCES}


def check_loss(dtype=np.float64, tolerance=1e-11):
    """Loss and values equal the masked means of the oracle. Traced anew, to see planted faults."""
    target, draft = random_logits(1)
    mask = np.arange(12).reshape(3, 4) % 5 < np.array([[4], [1], [2]])
    target[~mask] *= 20  # would show in any mean that takes it in
    rounded = [x.astype(dtype).astype(np.float64) for x in (target, draft)]
    want = {name: term[mask].mean() for name, term in oracle(*rounded, **OPTIONS).items()}
    run = jax.jit(lambda *args: distillation.distillation_loss(ALL, *args, **OPTIONS))
    with jax.enable_x64(dtype == np.float64):
        loss, values = run(*(jnp.asarray(x, dtype) for x in (target, draft)), jnp.asarray(mask))
    assert loss.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert set(values) == set(DIVERGENCES) and 0 < mask.sum() < mask.size
    for name in DIVERGENCES:
        np.testing.assert_allclose(values[name], want[name], rtol=tolerance, err_msg=name)
    total = sum(ALL[name] * want[name] for name in DIVERGENCES)
    np.testing.assert_allclose(loss, total, rtol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-11), (np.float32, 1e-5), (jnp.bfloat16, 1e-5)]
)
def test_losses_equal_their_definitions(dtype, tolerance):
    check_loss(dtype, tolerance)


def _weighted_sum_of_kls(p, q, beta, k):
    """ "jsd" of the Online Speculative Decoding release."""
    del beta, k
    return 0.9 * distillation._kl(p, q.log) + 0.1 * distillation._kl(q, p.log)


def _untempered_target(target, draft, temperature):
    return distillation._law(target, 1.0), distillation._law(draft, temperature)


FAULTS = {
    "a weighted sum of KLs as jsd": lambda patch: patch.setitem(
        distillation._RULES, "jensen_shannon", _weighted_sum_of_kls
    ),
    "target not tempered": lambda patch: patch.setattr(distillation, "_laws", _untempered_target),
    "drafter not tempered": lambda patch: patch.setattr(
        distillation, "_laws", lambda t, d, temperature: _untempered_target(d, t, temperature)[::-1]
    ),
    "mean over all positions": lambda patch: patch.setattr(
        distillation, "masked_mean", lambda x, mask: jnp.mean(jnp.where(mask, x, 0.0))
    ),
    "mask ignored": lambda patch: patch.setattr(
        distillation, "masked_mean", lambda x, mask: jnp.mean(x)
    ),
    "target and drafter swapped": lambda patch: patch.setitem(
        distillation._RULES, "forward_kl", distillation._RULES["reverse_kl"]
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_loss()


def test_zero_for_equal_laws_alone(x64):
    """Logits that differ by a constant are one law: value 0, gradient 0."""
    target, other = (jnp.asarray(x) for x in random_logits(2))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(draft):
        values = every_divergence(target, draft, **OPTIONS)
        return sum(jnp.sum(values[name]) for name in SMOOTH), values

    grad, values = run(target + 3.0)
    np.testing.assert_allclose(grad, 0, atol=1e-14)
    for name in (*SMOOTH, "total_variation"):
        np.testing.assert_allclose(values[name], 0, atol=1e-14)
    assert all(np.all(value > 1e-3) for value in run(other)[1].values())

    def variation(draft):  # not jitted, so that equal logits are rounded to equal laws
        return jnp.sum(divergence("total_variation", target, draft))

    value, grad = jax.value_and_grad(variation)(target)
    assert value == 0
    np.testing.assert_allclose(grad, 0, atol=1e-15)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients(name, x64):
    """Finite differences in the drafter's logits; exactly zero in the target's."""
    target, draft = (jnp.asarray(x) for x in random_logits(3, lead=(2,)))

    def total(target, draft):
        return jnp.sum(divergence(name, target, draft, **OPTIONS))

    to_target, to_draft = jax.jit(jax.grad(total, (0, 1)))(target, draft)
    assert not np.any(to_target) and np.all(to_draft != 0)
    steps = 1e-5 * np.eye(draft.size).reshape(-1, *draft.shape)
    shifted = jnp.asarray(np.stack([np.asarray(draft) + steps, np.asarray(draft) - steps]))
    ahead, behind = jax.jit(jax.vmap(jax.vmap(functools.partial(total, target))))(shifted)
    np.testing.assert_allclose(to_draft.ravel(), (ahead - behind) / 2e-5, atol=1e-8)
    temperature = OPTIONS["temperature"]
    p, q = softmax(np.asarray(target), temperature), softmax(np.asarray(draft), temperature)
    if name == "forward_kl":
        np.testing.assert_allclose(to_draft, (q - p) / temperature, atol=1e-14)
    if name == "hard_label":
        one_hot = np.eye(VOCAB)[p.argmax(-1)]
        np.testing.assert_allclose(to_draft, (q - one_hot) / temperature, atol=1e-14)


def test_jensen_shannon_limits_bounds_and_symmetry(x64):
    target, draft = random_logits(4)
    want = oracle(target, draft, 1.0, 0.5, 1)

    @jax.jit
    def run(target, draft):
        return [divergence("jensen_shannon", target, draft, beta=b) for b in (1e-7, 0.5, 1 - 1e-7)]

    forward, middle, reverse = run(target, draft)
    np.testing.assert_allclose(forward / 1e-7, want["forward_kl"], rtol=1e-4)
    np.testing.assert_allclose(reverse / 1e-7, want["reverse_kl"], rtol=1e-4)
    np.testing.assert_allclose(middle, run(draft, target)[1], rtol=1e-12)
    far = run(30 * target, 30 * draft)[1]
    assert np.all(far <= math.log(2) + 1e-12) and np.max(far) > 0.69


def test_total_variation_gradient_is_bounded(x64):
    """Each entry by q(1-q), all of them together by 1/2, whatever the logits."""
    target, draft = random_logits(5, lead=(200,), scale=4.0)
    total = jax.grad(lambda d: jnp.sum(divergence("total_variation", jnp.asarray(target), d)))
    grad = np.abs(jax.jit(total)(draft))
    q = softmax(draft)
    assert np.all(grad <= q * (1 - q) + 1e-15) and np.all(grad.sum(-1) <= 0.5 + 1e-15)
    assert grad.sum(-1).max() > 0.3


def test_acceptance_rate_is_what_rejection_accepts():
    """1 minus the total variation, and the share of drafts that the verifier keeps.

    With 20,000 rows five standard errors are at most 0.018: a false alarm in 1.7 million.
    """
    rows = 20_000
    target, draft = (jnp.asarray(x, jnp.float32) for x in random_logits(6, lead=(2,)))

    @jax.jit
    def rates(target, draft):
        rate = functools.partial(distillation.acceptance_rate, target, draft, temperature=0.6)
        variation = divergence("total_variation", target, draft, temperature=0.6)
        return rate(jnp.asarray([True, False])), rate(jnp.zeros(2, bool)), 1 - variation[0]

    rate, of_none, want = (float(x) for x in rates(target, draft))
    np.testing.assert_allclose(rate, want, rtol=1e-6)
    assert of_none == 0

    @jax.jit
    def accepted(key):
        draw, verify = jax.random.split(key)
        law = [jnp.broadcast_to(x[:1, None] / 0.6, (rows, 2, VOCAB)) for x in (target, draft)]
        token = jax.random.categorical(draw, law[1][:, 0]).astype(jnp.int32)
        tree = DraftTree(
            tokens=jnp.stack([jnp.zeros_like(token), token], axis=1),
            parents=jnp.broadcast_to(jnp.asarray([[-1, 0]], jnp.int32), (rows, 2)),
            valid=jnp.ones((rows, 2), bool),
            draft_logits=law[1],
        )
        keys, greedy = jax.random.split(verify, rows), jnp.zeros(rows, bool)
        result = Rejection()(keys, tree, tree.parents, tree.valid, Law(law[0], greedy), 1)
        return jnp.mean(jnp.asarray(result.length == 2, jnp.float32))

    share = float(accepted(jax.random.key(0)))
    assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / rows)


def test_top_k_keeps_k_classes_apart(x64):
    target, draft = random_logits(7)

    @jax.jit
    def run(target, draft):
        top_k = functools.partial(divergence, "top_k", target, draft, temperature=0.6)
        exact = divergence("forward_kl", target, draft, temperature=0.6)
        stored = distillation.top_k_targets(target, 3, temperature=0.6)
        from_stored = distillation.top_k_divergence(*stored, draft, temperature=0.6)
        return exact, [top_k(k=k) for k in (1, 2, 3, VOCAB - 1, VOCAB, 50)], stored, from_stored

    exact, by_k, (tokens, log_probs), from_stored = run(target, draft)
    for value in by_k[3:]:  # V - 1 classes and the last token alone are all of V
        np.testing.assert_allclose(value, exact, rtol=1e-12)
    assert all(np.all(a <= b + 1e-14) for a, b in itertools.pairwise(by_k))
    assert np.all(by_k[0] < exact)
    np.testing.assert_allclose(from_stored, by_k[2], rtol=1e-14)
    np.testing.assert_array_equal(tokens, np.argsort(-target)[..., :3])
    in_order = np.sort(softmax(target, 0.6))[..., ::-1]
    np.testing.assert_allclose(np.exp(log_probs), in_order[..., :3], rtol=1e-12)


def test_hard_label_is_cross_entropy_with_the_arg_max():
    target, draft = (jnp.asarray(x, jnp.float32) for x in random_logits(8))
    mask = jnp.asarray(np.arange(12).reshape(3, 4) % 3 > 0)

    @jax.jit
    def both(target, draft):
        loss, _ = distillation.distillation_loss({"hard_label": 1.0}, target, draft, mask)
        return loss, losses.cross_entropy(draft, jnp.argmax(target, axis=-1), mask)

    np.testing.assert_allclose(*both(target, draft), rtol=1e-6)


def test_filtered_laws_leave_no_nan():
    """Tokens ruled out by the target, the drafter, both, all of a position (masked out)."""
    target, draft = (x.astype(np.float32) for x in random_logits(9, lead=(6,)))
    target[0, :4] = draft[1, 2:] = -np.inf
    target[2, 1:4] = draft[2, 1:4] = -np.inf
    target[3, 1:] = draft[3, :-1] = -np.inf  # point masses of different tokens
    target[4] = draft[4] = -np.inf
    mask = jnp.arange(6) != 4

    @jax.jit
    def run(target, draft):
        def loss(draft):
            return distillation.distillation_loss(ALL, target, draft, mask, **OPTIONS)[0]

        return every_divergence(target, draft, **OPTIONS), jax.grad(loss)(draft)

    values, grad = run(target, draft)
    real = np.asarray(mask)
    with np.errstate(divide="ignore"):
        want = oracle(*(np.float64(x[real]) for x in (target, draft)), **OPTIONS)
    want["hard_label"] = np.minimum(want["hard_label"], -distillation.LOG_ZERO)
    for name, value in values.items():
        assert np.all(np.isfinite(value)), name
        # The rest of a filtered law is 0 but for rounding, which counts where q has no rest.
        rows = [0, 1, 4] if name == "top_k" else slice(None)
        got = np.asarray(value)[real][rows]
        np.testing.assert_allclose(got, want[name][rows], rtol=2e-5, atol=1e-6, err_msg=name)
    assert np.all(np.isfinite(grad)) and not np.any(grad[4])
    assert not np.any(grad[np.isinf(draft)]) and np.all(grad[0] != 0)
    lowest = np.finfo(np.float32).min  # other libraries rule tokens out with it
    finite = run(*(np.where(np.isinf(x), lowest, x) for x in (target, draft)))
    jax.tree.map(np.testing.assert_array_equal, finite, (values, grad))


def test_vmap_equals_the_batch():
    target, draft = (jnp.asarray(x, jnp.float32) for x in random_logits(10))
    run = jax.jit(functools.partial(every_divergence, **OPTIONS))
    for got, want in zip(
        jax.jit(jax.vmap(run))(target, draft).values(), run(target, draft).values(), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def hidden_inputs(dtype, lead=(3, 5), vocab=11, widths=(6, 4)):
    rng = np.random.default_rng(11)
    arrays = {}
    for name, width in zip(("target", "draft"), widths, strict=True):
        arrays[f"{name}_hidden"] = jnp.asarray(rng.normal(size=(*lead, width)), dtype)
        arrays[f"{name}_head"] = jnp.asarray(rng.normal(size=(width, vocab)), dtype)
    return arrays, jnp.asarray(rng.random(lead) < 0.6)


def unchunked(target_hidden, target_head, draft_hidden, draft_head, mask, weights, **options):
    logits = target_hidden @ target_head, draft_hidden @ draft_head
    return distillation.distillation_loss(weights, *logits, mask, **options)


def chunked(chunk):
    return functools.partial(distillation.chunked_distillation, chunk=chunk)


def run_form(form, arrays, mask, frozen=(), weights=ALL):
    """Loss, values, and the gradients in all arrays but the frozen."""

    def loss(free):
        fixed = {name: arrays[name] for name in frozen}
        return form(**free, **fixed, mask=mask, weights=weights, **OPTIONS)

    free = {name: array for name, array in arrays.items() if name not in frozen}
    return jax.value_and_grad(loss, has_aux=True)(free)


@pytest.mark.parametrize(("chunk", "weights"), [(4, ALL), (64, {"reverse_kl": 1.0})])
def test_chunked_equals_unchunked(chunk, weights, x64):
    arrays, mask = hidden_inputs(jnp.float64)
    got, want = (
        jax.jit(functools.partial(run_form, form, weights=weights))(arrays, mask)
        for form in (chunked(chunk), unchunked)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    jax.tree.map(close, got, want)
    grads = got[1]
    assert not np.any(grads["target_hidden"]) and not np.any(grads["target_head"])
    assert np.all(grads["draft_head"] != 0) and not np.any(grads["draft_hidden"][~mask])


def test_chunked_bfloat16_accumulates_in_float32():
    """Same rounded inputs; 256 chunks of one position, whose head gradients add up in float32."""
    arrays, mask = hidden_inputs(jnp.bfloat16, lead=(256,), vocab=40)
    weights = {"forward_kl": 1.0, "total_variation": 1.0}
    (loss, _), grads = jax.jit(functools.partial(run_form, chunked(1), weights=weights))(
        arrays, mask
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    (want, _), want_grads = jax.jit(functools.partial(run_form, unchunked, weights=weights))(
        wide, mask
    )
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for name in ("draft_hidden", "draft_head"):
        assert grads[name].dtype == jnp.bfloat16
        error = np.asarray(grads[name], np.float32) - want_grads[name]
        assert np.linalg.norm(error) < 0.004 * np.linalg.norm(want_grads[name]), name


def test_chunked_memory_does_not_grow_with_positions():
    vocab, chunk = 4096, 4
    weights = {"reverse_kl": 1.0, "total_variation": 1.0}

    def temp_bytes(form, positions, frozen):
        arrays, mask = hidden_inputs(jnp.float32, (positions,), vocab)
        frozen = ("target_hidden", "target_head", *frozen)
        run = jax.jit(functools.partial(run_form, form, frozen=frozen, weights=weights))
        memory = run.lower(arrays, mask).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    row = vocab * 4
    few, many = (temp_bytes(chunked(chunk), n, ()) for n in (32, 256))
    assert many - few < (256 - 32) * row / 50
    assert many < 256 * row / 2 < temp_bytes(unchunked, 256, ("draft_head",)) / 4


def test_mixed_rows():
    keys = jax.random.split(jax.random.key(1), 2000)
    rows = np.arange(2000, dtype=np.int32)
    ones = np.ones(2000, np.float32)
    fixed = {"tokens": np.stack([rows, rows], axis=1), "lengths": rows, "weight": ones}
    sampled = jax.tree.map(lambda x: -x - 1, fixed)
    mix = jax.jit(distillation.mix_on_policy)
    for share in (0.0, 0.3, 1.0):
        mixed, own = jax.tree.map(np.asarray, mix(keys, fixed, sampled, share))
        # Five standard errors: a false alarm in 1.7 million.
        assert abs(np.mean(own) - share) <= 5 * math.sqrt(share * (1 - share) / 2000)
        for name, got in mixed.items():
            chosen = np.asarray(own).reshape(-1, *[1] * (got.ndim - 1))
            np.testing.assert_array_equal(got, np.where(chosen, sampled[name], fixed[name]))
    per_row = np.arange(2000) % 2
    own = mix(keys, fixed, sampled, jnp.asarray(per_row, jnp.float32))[1]
    np.testing.assert_array_equal(own, per_row)
    shuffled = mix(keys[::-1], fixed, sampled, 0.3)[1]
    np.testing.assert_array_equal(shuffled[::-1], mix(keys, fixed, sampled, 0.3)[1])

    def weight(x):
        mixed, _ = distillation.mix_on_policy(keys, fixed, sampled | {"weight": x}, 0.5)
        return jnp.sum(mixed["weight"])

    assert not np.any(jax.jit(jax.grad(weight))(ones))


def write(key, table, rows=64, tokens=16):
    """Text of a table of logits [V, V], one row per token before: int32 [rows, tokens]."""

    def step(token, key):
        following = jax.random.categorical(key, table[token]).astype(jnp.int32)
        return following, following

    return jax.lax.scan(step, jnp.zeros(rows, jnp.int32), jax.random.split(key, tokens))[1].T


def test_on_policy_training_raises_the_acceptance():
    """A table learns a table; acceptance on text of the drafter's own rises from stage to stage."""
    rng = np.random.default_rng(2)
    target = jnp.asarray(2.0 * rng.normal(size=(VOCAB, VOCAB)), jnp.float32)
    fixed = jnp.asarray(rng.integers(0, VOCAB, (64, 16)), jnp.int32)

    def loss(table, text):
        weights, mask = {"total_variation": 1.0}, jnp.ones(text.shape, bool)
        return distillation.distillation_loss(weights, target[text], table[text], mask)[0]

    @jax.jit
    def train(table, share, rate, key):
        def step(table, key):
            draw, choose = jax.random.split(key)
            own = write(draw, table)
            text, _ = distillation.mix_on_policy(jax.random.split(choose, 64), fixed, own, share)
            return table - rate * jax.grad(loss)(table, text), None

        table, _ = jax.lax.scan(step, table, jax.random.split(key, 16))
        text = write(jax.random.fold_in(key, 1), table)
        mask = jnp.ones(text.shape, bool)
        return table, distillation.acceptance_rate(target[text], table[text], mask)

    for share in (1.0, 0.5):
        table, acceptance = jnp.zeros((VOCAB, VOCAB)), []
        for stage, rate in enumerate((0.0, 4.0, 4.0, 2.0, 1.0)):
            table, accepted = train(table, share, rate, jax.random.key(4 + stage))
            acceptance.append(float(accepted))
        assert acceptance == sorted(acceptance), acceptance
        assert acceptance[0] < 0.6 and acceptance[-1] > 0.93, acceptance


def test_errors_name_the_argument():
    logits, mask = jnp.zeros((2, 3, 5)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="divergences: expected some of forward_kl.* found jsd"):
        divergence("jsd", logits, logits)
    with pytest.raises(ValueError, match="found none"):
        distillation.distillation_loss({}, logits, logits, mask)
    with pytest.raises(ValueError, match="temperature: expected a number above 0, found 0"):
        divergence("top_k", logits, logits, temperature=0)
    with pytest.raises(ValueError, match="beta: expected"):
        divergence("jensen_shannon", logits, logits, beta=1.0)
    with pytest.raises(ValueError, match="k: expected at least 1"):
        divergence("top_k", logits, logits, k=0)
    with pytest.raises(ValueError, match="logits: expected"):
        divergence("top_k", logits, logits[:1])
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\)"):
        distillation.acceptance_rate(logits, logits, mask[:1])
    with pytest.raises(ValueError, match="chunk: expected at least 1"):
        head = jnp.zeros((5, 4))
        distillation.chunked_distillation(logits, head, logits, head, mask, ALL, 0)
