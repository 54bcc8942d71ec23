"""losses.py against brute force, torch and finite differences."""

import itertools
import runpy
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ctc_spec_jax import losses

GOLDEN = Path(__file__).parent / "golden" / "ctc_torch.npz"
VOCAB = 3
BLANK = VOCAB


def random_log_probs(num_frames, seed=0, lead=()):
    """Per-frame laws over VOCAB tokens and the blank, float64 [*lead, F, VOCAB+1]."""
    logits = np.random.default_rng(seed).normal(scale=1.5, size=(*lead, num_frames, VOCAB + 1))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def collapse(path):
    merged = [token for token, _ in itertools.groupby(path)]
    return tuple(token for token in merged if token != BLANK)


def enumerate_strings(log_probs):
    """{collapsed string: probability}, by visiting every alignment."""
    table = {}
    for path in itertools.product(range(VOCAB + 1), repeat=len(log_probs)):
        log_prob = sum(frame[token] for frame, token in zip(log_probs, path, strict=True))
        table[collapse(path)] = table.get(collapse(path), 0.0) + np.exp(log_prob)
    return table


def all_labels(max_length):
    """Every string of at most ``max_length`` tokens, right-padded with -1, and the lengths."""
    strings = [s for n in range(max_length + 1) for s in itertools.product(range(VOCAB), repeat=n)]
    labels = np.full((len(strings), max_length), -1, np.int32)
    for row, string in zip(labels, strings, strict=True):
        row[: len(string)] = string
    return strings, labels, np.array([len(s) for s in strings], np.int32)


def gather(log_probs, labels):
    """blank [A, F] and label [A, F, K] by NumPy indexing; one lattice [F, V+1] or one per row."""
    log_probs = np.broadcast_to(log_probs, (len(labels), *log_probs.shape[-2:]))
    label = np.stack([row[:, ids] for row, ids in zip(log_probs, labels, strict=True)])
    return jnp.asarray(log_probs[..., BLANK]), jnp.asarray(label)


@jax.jit
def both(blank, label, labels, lengths):
    return (
        losses.ctc_log_prob(blank, label, labels, lengths),
        losses.prefix_log_probs(blank, label, labels, lengths),
    )


@jax.jit
def both_of_logits(logits, labels, lengths):
    return both(*losses.gather_frame_log_probs(logits, labels), labels, lengths)


def log_or_impossible(p):
    return np.log(p) if p > 0 else losses.IMPOSSIBLE


def prefix_mass(table, prefix):
    return sum(p for string, p in table.items() if string[: len(prefix)] == prefix)


@pytest.mark.parametrize("num_frames", [1, 4, 6])
def test_every_string_against_brute_force(num_frames):
    log_probs = random_log_probs(num_frames, seed=num_frames)
    table = enumerate_strings(log_probs)
    strings, labels, lengths = all_labels(4)
    want = [log_or_impossible(table.get(s, 0.0)) for s in strings]
    want_prefix = np.full(labels.shape, losses.IMPOSSIBLE)
    for i, string in enumerate(strings):
        for k in range(1, len(string) + 1):
            want_prefix[i, k - 1] = log_or_impossible(prefix_mass(table, string[:k]))
    assert losses.IMPOSSIBLE in want and losses.IMPOSSIBLE in want_prefix[lengths == 4]
    for dtype, tolerance in [(np.float64, 1e-11), (np.float32, 1e-6)]:
        with jax.enable_x64(dtype == np.float64):
            blank, label = gather(log_probs.astype(dtype), labels)
            ctc, prefix = both(blank, label, jnp.asarray(labels), jnp.asarray(lengths))
        assert ctc.dtype == prefix.dtype == dtype
        np.testing.assert_allclose(ctc, want, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(prefix, want_prefix, rtol=tolerance, atol=tolerance)


def test_laws_of_probability():
    """Total mass 1; a prefix is the string itself or one token more; prefixes only shrink."""
    num_frames = 5
    strings, labels, lengths = all_labels(num_frames)
    with jax.enable_x64(True):
        blank, label = gather(random_log_probs(num_frames, seed=9), labels)
        whole, prefix = both(blank, label, jnp.asarray(labels), jnp.asarray(lengths))
    whole, prefix = np.exp(whole), np.exp(prefix)
    np.testing.assert_allclose(whole.sum(), 1.0, rtol=1e-12)
    of_string = {s: prefix[i, len(s) - 1] if s else 1.0 for i, s in enumerate(strings)}
    for i, string in enumerate(strings):
        if len(string) < num_frames:
            longer = sum(of_string[(*string, token)] for token in range(VOCAB))
            np.testing.assert_allclose(of_string[string], whole[i] + longer, rtol=1e-12)
    assert np.all(prefix[:, 1:] <= prefix[:, :-1])


def test_leading_axes_and_padding_do_not_matter():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, VOCAB, (2, 3, 4)).astype(np.int32)
    lengths = np.array([[4, 1, 0], [3, 2, 4]], np.int32)
    logits = rng.normal(size=(2, 3, 6, VOCAB + 1)).astype(np.float32)
    padded = np.where(np.arange(4) < lengths[..., None], labels, -100).astype(np.int32)
    ctc, prefix = both_of_logits(logits, labels, lengths)
    assert ctc.shape == (2, 3) and prefix.shape == (2, 3, 4)
    for got, want in zip(both_of_logits(logits, padded, lengths), (ctc, prefix), strict=True):
        np.testing.assert_array_equal(got, want)
    for i, j in np.ndindex(2, 3):
        n = lengths[i, j]
        assert np.all(prefix[i, j, n:] == losses.IMPOSSIBLE)
        if n:
            one, one_prefix = both_of_logits(logits[i, j], labels[i, j, :n], lengths[i, j])
            np.testing.assert_allclose(one, ctc[i, j], rtol=1e-6)
            np.testing.assert_allclose(one_prefix, prefix[i, j, :n], rtol=1e-6)


def assert_agrees_with_torch(logits, labels, lengths, want, want_grad):
    impossible = np.isinf(want)
    assert impossible.any() and not impossible.all()

    @jax.jit
    def nll_and_grad(logits):
        log_prob, vjp = jax.vjp(lambda x: both_of_logits(x, labels, lengths)[0], logits)
        return -log_prob, vjp(-jnp.ones_like(log_prob))[0]

    for dtype, tolerance in [(np.float64, 1e-10), (np.float32, 1e-5)]:
        with jax.enable_x64(dtype == np.float64):
            nll, grad = nll_and_grad(logits.astype(dtype))
        np.testing.assert_array_equal(np.asarray(nll) == dtype(-losses.IMPOSSIBLE), impossible)
        nll = np.where(impossible, np.inf, nll)
        np.testing.assert_allclose(nll, want, rtol=tolerance)
        np.testing.assert_allclose(grad, want_grad, atol=tolerance)
        assert not np.any(grad[impossible])


def test_ctc_equals_recorded_torch():
    golden = np.load(GOLDEN)
    args = (golden[name] for name in ("logits", "labels", "lengths", "nll", "grad"))
    assert_agrees_with_torch(*args)


def test_ctc_equals_live_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch", reason="torch is not installed")
    torch_ctc = runpy.run_path(str(GOLDEN.with_name("make_ctc_torch.py")))["torch_ctc"]
    rng = np.random.default_rng(4)
    logits = rng.normal(scale=3.0, size=(40, 9, 8))
    labels = rng.integers(0, 3, (40, 6)).astype(np.int32)
    lengths = rng.integers(0, 7, 40).astype(np.int32)
    labels[0], lengths[0] = 1, 6  # five repeats: needs 11 frames
    assert_agrees_with_torch(logits, labels, lengths, *torch_ctc(logits, labels, lengths))


def test_longest_drafts_stay_accurate_in_float32():
    rng = np.random.default_rng(5)
    logits = rng.normal(scale=4.0, size=(64, 24, VOCAB + 1))
    labels = rng.integers(0, VOCAB, (64, 16)).astype(np.int32)
    lengths = rng.integers(1, 17, 64).astype(np.int32)
    with jax.enable_x64(True):
        wide = both_of_logits(logits, labels, lengths)
    for got, want in zip(both_of_logits(np.float32(logits), labels, lengths), wide, strict=True):
        # Absolute near 0, where the log of a sum of rounded probabilities cannot be relative.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


ALL = {name: 1.0 for name in losses.OBJECTIVES}


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_gradients_against_finite_differences(name):
    labels = np.array([[0, 1, 2], [1, 1, 0], [2, 2, 2], [2, 1, 0], [0, 0, 0]], np.int32)
    lengths = np.array([3, 3, 3, 1, 0], np.int32)  # F = 4: row 2 is impossible
    with jax.enable_x64(True):
        lattice = gather(random_log_probs(4, seed=5, lead=(5,)), labels)

        @jax.jit
        def loss(blank, label):
            args = blank, label, jnp.asarray(labels), jnp.asarray(lengths)
            return losses.draft_loss(*args, weights={name: 1.0})[0]

        check_grads(loss, lattice, order=1, modes=["fwd", "rev"], atol=1e-7, rtol=1e-7)
        for grad in jax.grad(loss, (0, 1))(*lattice):
            assert np.any(grad[0]) and np.any(grad[1]) and np.any(grad[3])
            assert not np.any(grad[4])
            # Prefixes of one and two tokens of row 2 have alignments, all three have none.
            assert np.any(grad[2]) == (name != "ctc")


def test_objectives_equal_their_definitions():
    labels = np.array([[0, 1, 2], [1, 1, 1], [2, 0, 1], [0, 0, 0]], np.int32)
    lengths = np.array([3, 3, 2, 0], np.int32)  # row 1 needs 5 frames of 4, row 3 is not valid
    weights = np.array([0.5, 2.0, 3.0], np.float32)
    log_probs = random_log_probs(4, seed=6, lead=(4,))
    prefix = ctc = length = plain = 0.0
    for i in range(3):
        table = enumerate_strings(log_probs[i])
        string = tuple(int(t) for t in labels[i, : lengths[i]])
        ctc -= np.log(table.get(string, 1.0))
        for k in range(1, len(string) + 1):
            mass = prefix_mass(table, string[:k])
            length += mass
            prefix -= weights[k - 1] * np.log(mass or 1.0)
            plain -= np.log(mass or 1.0)

    @jax.jit
    def run(blank, label):
        args = blank, label, jnp.asarray(labels), jnp.asarray(lengths)
        mix = {"prefix": 1.0, "ctc": 0.25, "expected_length": jnp.float32(0.5)}
        loss, values = losses.draft_loss(*args, weights=mix, prefix_weights=jnp.asarray(weights))
        together = [values["prefix"], values["ctc"], values["expected_length"], loss]
        alone = [
            losses.prefix_loss(*args, weights=jnp.asarray(weights)),
            losses.ctc_loss(*args),
            losses.expected_accepted_length(*args),
            losses.prefix_loss(*args),
            losses.draft_loss(*args, weights={"prefix": 2.0})[0],
        ]
        return jnp.stack(together), jnp.stack(alone)

    together, alone = run(*gather(log_probs.astype(np.float32), labels))
    want = np.array([prefix, ctc, length, prefix + 0.25 * ctc - 0.5 * length]) / 3
    np.testing.assert_allclose(together, want, rtol=1e-5)
    np.testing.assert_allclose(alone, [*want[:3], plain / 3, 2 * plain / 3], rtol=1e-5)


def test_no_valid_anchor_gives_zero():
    labels, lengths = jnp.zeros((2, 2), jnp.int32), jnp.zeros(2, jnp.int32)
    blank, label = gather(random_log_probs(3, lead=(2,)), np.zeros((2, 2), np.int32))

    @jax.jit
    @jax.value_and_grad
    def run(blank):
        return losses.draft_loss(blank, label, labels, lengths, ALL)[0]

    loss, grad = run(blank)
    assert loss == 0 and not np.any(grad)


def test_infinite_logits_leave_no_nan():
    """-inf in unused, used and padded columns and in the blank; other rows keep their values."""
    labels = jnp.asarray([[0, 1]] * 4, jnp.int32)
    lengths = jnp.asarray([2, 2, 1, 2], jnp.int32)
    logits = np.random.default_rng(7).normal(size=(4, 3, VOCAB + 1)).astype(np.float32)
    logits[0, :, 2] = -np.inf  # not a label
    logits[1, :, 1] = -np.inf  # a label, in all frames: impossible
    logits[2, :, 1] = -np.inf  # padding
    logits[3, :2, BLANK] = -np.inf  # the blank, in some frames

    @jax.jit
    def run(logits):
        def total(logits):
            lattice = losses.gather_frame_log_probs(logits, labels)
            loss, _ = losses.draft_loss(*lattice, labels, lengths, weights=ALL)
            return loss, both(*lattice, labels, lengths)

        def ctc(logits):
            return jnp.sum(both_of_logits(logits, labels, lengths)[0])

        return *jax.value_and_grad(total, has_aux=True)(logits), jax.grad(ctc)(logits)

    (loss, log_probs), grad, ctc_grad = run(logits)
    (_, want_log_probs), want_grad, _ = run(np.maximum(logits, np.float32(-100)))
    assert all(np.all(np.isfinite(x)) for x in (loss, grad, ctc_grad))
    for got, want in zip(log_probs, want_log_probs, strict=True):
        np.testing.assert_allclose(got, np.where(want < -90, losses.IMPOSSIBLE, want))
    assert (np.asarray(log_probs[0]) == np.float32(losses.IMPOSSIBLE)).tolist() == [0, 1, 0, 0]
    np.testing.assert_allclose(grad[[0, 2, 3], :], want_grad[[0, 2, 3], :], atol=1e-6)
    assert not np.any(ctc_grad[1]) and np.any(ctc_grad[0])


def test_gather_takes_the_last_class_as_blank():
    logits = jnp.asarray(np.random.default_rng(8).normal(size=(2, 3, 5)), jnp.bfloat16)
    exact = np.asarray(logits, np.float64)
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    labels = jnp.asarray([[3, 0, -1], [1, 1, 99]], jnp.int32)
    blank, label = losses.gather_frame_log_probs(logits, labels)
    assert blank.dtype == label.dtype == jnp.float32 and np.all(np.isfinite(label))
    np.testing.assert_allclose(blank, exact[..., 4], rtol=1e-6)
    np.testing.assert_allclose(label[0, :, :2], exact[0][:, [3, 0]], rtol=1e-6)
    np.testing.assert_allclose(label[1, :, :2], exact[1][:, [1, 1]], rtol=1e-6)


def test_cross_entropy():
    rng = np.random.default_rng(12)
    logits = rng.normal(size=(2, 3, 5))
    logits[0, 0, 4] = -np.inf
    labels = np.array([[1, 4, -1], [0, 2, 99]], np.int32)
    mask = np.array([[True, True, False], [True, False, False]])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -(log_probs[0, 0, 1] + log_probs[0, 1, 4] + log_probs[1, 0, 0]) / 3
    args = jnp.asarray(labels), jnp.asarray(mask)
    run = jax.jit(jax.value_and_grad(losses.cross_entropy))
    loss, grad = run(jnp.asarray(logits, jnp.float32), *args)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    one_hot = np.eye(5)[np.minimum(labels, 4)]
    want_grad = np.where(mask[..., None], np.exp(log_probs) - one_hot, 0) / 3
    np.testing.assert_allclose(grad, want_grad, atol=1e-6)
    loss, grad = run(jnp.asarray(logits, jnp.bfloat16), args[0], jnp.zeros((2, 3), bool))
    assert loss.dtype == jnp.float32 and loss == 0 and not np.any(grad)


def test_errors_name_the_argument():
    blank, label, labels = jnp.zeros((2, 3)), jnp.zeros((2, 3, 4)), jnp.zeros((2, 4), jnp.int32)
    lengths = jnp.full(2, 4, jnp.int32)
    with pytest.raises(ValueError, match=r"blank \[\.\.\., F\]"):
        losses.ctc_log_prob(blank, label, labels[:, :3], lengths)
    with pytest.raises(ValueError, match="leading axes"):
        losses.gather_frame_log_probs(label, labels[:1])
    with pytest.raises(ValueError, match="prefx"):
        losses.draft_loss(blank, label, labels, lengths, {"prefx": 1.0})
