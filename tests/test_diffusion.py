"""Masked diffusion drafts: their schedule, their loss, and that every law they state is exact.

Greedy equality and the cache over rounds are in ``test_contract``. The law of a drafter is a table
here: logits for every window of two positions, ``MASK`` included. What is decided at random in the
passes is enumerated, and so is the rule that verifies; the drafts of the real program are then
counted against the enumeration.

18,432 drafts in each of four cases and 1,928 decodes of each of two kinds of rows in each of two
cases make twelve chi-square tests at 1e-5: a false alarm has probability 1.2e-4. Seeds are fixed.

Shape letters: B rows, T passes (tokens in batches), A anchors, F positions, V vocabulary.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctc_spec_jax import recipes
from ctc_spec_jax.draft.denoising import (
    MASK,
    BestPaths,
    Conditional,
    LeftToRight,
    by_chance,
    copied,
    denoise,
    from_left,
)
from ctc_spec_jax.draft.diffusion_loss import (
    EPSILON,
    DiffusionLoss,
    antithetic_times,
    mask_chance,
    masked_windows,
)
from ctc_spec_jax.draft.training import Loss, Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.types import DraftContext, Sampling
from ctc_spec_jax.verify_sampled import Rejection
from tests import enumeration
from tests import test_sampling as sampling
from tests.helpers import VOCAB, make_request, plain_text, ragged_prompts, run, tiny_target
from tests.test_heads import rows_of

TWO = enumeration.tree_of(1, 1)
FRAMES, NEW = 4, 20


def table(vocab: int):
    """Logits [V+1, V+1, F, V] of the positions of a window of two by what each says, mask last."""
    return 1.5 * np.random.default_rng(vocab).standard_normal((vocab + 1, vocab + 1, 2, vocab))


def laws_of(logits):
    """One pass of a table. ``MASK`` is -1, the last row."""
    return lambda tokens: jnp.asarray(logits)[tokens[:, 0], tokens[:, 1]]


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# The passes, all of their chances enumerated.


def windows_before_the_last_pass(vocab: int, passes: int):
    """What a window may say then, with its probability, and the laws that it was revealed under.

    Yields (window [F], probability, logits [F, V] under which its tokens were revealed).
    """
    laws, steps = laws_of(table(vocab)), passes - 1
    each = list(itertools.product(*[range(vocab), range(2)] * 2 * steps))
    choices = np.asarray(each, np.int32).reshape(len(each), steps, 2, 2)
    drawn, shown = jnp.asarray(choices[..., 0]), jnp.asarray(choices[..., 1] > 0)
    start, prob = jnp.full((len(choices), 2), MASK, jnp.int32), np.ones(len(choices))
    given = laws, lambda i, logits: drawn[:, i], lambda i: shown[:, i], start
    tokens, seen = denoise(*given, vocab, 0)
    for step in range(steps):
        tokens, seen = denoise(*given, vocab, step + 1)
        law, chance = softmax(np.asarray(seen)), 1 / (passes - step)
        said = np.take_along_axis(law, choices[:, step, :, :1], axis=2)[..., 0]
        prob *= (said * np.where(choices[:, step, :, 1] > 0, chance, 1 - chance)).prod(1)
    return zip(np.asarray(tokens), prob, np.asarray(seen), strict=True)


@functools.cache
def summed_windows(vocab: int, passes: int):
    """Window -> its probability and, of windows of one token, the law that this was drawn from."""
    found = {}
    with jax.enable_x64(True):
        for window, prob, seen in windows_before_the_last_pass(vocab, passes):
            before = found.get(tuple(window.tolist()), (0.0, seen))
            found[tuple(window.tolist())] = before[0] + prob, seen
    assert sum(prob for prob, _ in found.values()) == pytest.approx(1, abs=1e-12)
    return found


def stated(vocab: int, window):
    """The law [F, V] of the last pass, by the function that drafts use."""
    tokens = np.asarray([window], np.int32)
    with jax.enable_x64(True):
        return softmax(np.asarray(copied(laws_of(table(vocab))(tokens), tokens))[0])


def prefix_table(first, second, vocab: int):
    """Laws by prefix: ``second`` maps the first token to the law of the next."""
    rest = itertools.product(range(vocab), repeat=2)
    whole = {(): tuple(first)} | {(a,): tuple(second(a)) for a in range(vocab)}
    return whole | {pair: (1 / vocab,) * vocab for pair in rest}


def report(vocab: int, q, told=None):
    p = enumeration.random_table(vocab, vocab, 2)
    world = enumeration.World(p, q, TWO, True, told=told)
    return enumeration.enumerate_rule(Rejection(), world, enumeration.walk), world


def total_variation(vocab: int, parts) -> float:
    """Between the target and what is emitted over (probability, q, told) of drafts."""
    whole = 0.0
    for prob, q, told in parts:
        found, world = report(vocab, q, told)
        assert found.wrong == 0
        whole = prob * found.joint + whole
    return 0.5 * np.abs(whole - enumeration._joint(world, False)).sum()


@pytest.mark.parametrize(("vocab", "passes"), [(2, 1), (3, 1), (2, 2), (3, 2), (2, 3)])
def test_stated_laws_of_the_last_pass_are_exact(vocab, passes):
    parts = []
    for window, (prob, _) in summed_windows(vocab, passes).items():
        law = stated(vocab, window)
        parts.append((prob, prefix_table(law[0], lambda a, law=law: law[1], vocab), None))
    assert len(parts) == (1 if passes == 1 else (vocab + 1) ** 2)
    assert total_variation(vocab, parts) < 1e-12


@pytest.mark.parametrize("vocab", [2, 3])
def test_laws_from_left_to_right_are_exact(vocab):
    with jax.enable_x64(True):
        tokens = jnp.full((vocab, 2), MASK, jnp.int32)
        say = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32)[:, None], (vocab, 2))
        given = laws_of(table(vocab)), lambda i, _: say, from_left(2, 2, 2), tokens
        law = softmax(np.asarray(denoise(*given, vocab, 2)[1]))
    q = prefix_table(law[0, 0], lambda a: law[a, 1], vocab)
    assert total_variation(vocab, [(1.0, q, None)]) < 1e-12


def test_laws_of_revealing_are_not_exact():
    """PLANTED FAULT: the laws that tokens were drawn from, whatever was known by then."""
    parts = []
    for window, (prob, seen) in summed_windows(2, 2).items():
        law, revealed = stated(2, window), np.asarray(window) != MASK
        told = np.where(revealed[:, None], softmax(seen), law)
        tables = [prefix_table(x[0], lambda a, x=x: x[1], 2) for x in (law, told)]
        parts.append((prob, *tables))
    assert 0.005 < total_variation(2, parts) < 0.2


# The drafts of the real program.


def context(rows: int, temperature: float = 1.0):
    request = make_request(rows, 1, sampling=Sampling(np.full((rows,), temperature, np.float32)))
    zeros = jnp.zeros((rows,), jnp.int32)
    return DraftContext((), zeros[:, None], zeros, None, request)


def drafts(tree, vocab: int, rows: int = 18432, positions: int = 2):
    laws = laws_of(table(vocab).astype(np.float32)[..., :positions, :])
    if positions == 1:
        one = laws
        laws = lambda tokens: one(jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=MASK))  # noqa: E731
    given = context(rows)
    return jax.jit(lambda keys: tree.draft(laws, (positions, vocab), given, keys))(
        given.request.keys
    )


def test_drafts_are_drawn_as_enumerated():
    """Windows before the last of two passes, and the tokens drawn then."""
    tree = drafts(Conditional(1, 2, 2), 3)
    tokens, laws = np.asarray(tree.tokens[:, 1:]), np.exp(np.asarray(tree.draft_logits[:, :2]))
    window = np.where((laws > 0).sum(2) == 1, tokens, MASK)
    law, counts = np.zeros((4, 4, 3, 3)), np.zeros((4, 4, 3, 3))
    np.add.at(counts, (*window.T, *tokens.T), 1)
    for (a, b), (prob, _) in summed_windows(3, 2).items():
        first, second = stated(3, (a, b))
        law[a, b] = prob * first[:, None] * second
        rows = (window == (a, b)).all(1)
        assert rows.any()
        found = softmax(np.asarray(tree.draft_logits)[rows][:, :2])
        np.testing.assert_allclose(
            found, np.stack([np.stack([first, second])] * rows.sum()), atol=1e-6
        )
    assert sampling.p_value(counts, law) > 1e-5


def test_left_to_right_drafts_state_their_laws():
    tree = drafts(LeftToRight(2), 3)
    tokens, logits = np.asarray(tree.tokens[:, 1:]), table(3)
    first = softmax(logits[MASK, MASK, 0])
    second = softmax(logits[:, MASK, 1])[:3]
    law = softmax(np.asarray(tree.draft_logits))
    np.testing.assert_allclose(law[:, 0], np.stack([first] * len(law)), atol=1e-6)
    np.testing.assert_allclose(law[:, 1], second[tokens[:, 0]], atol=1e-6)
    counts = np.zeros((3, 3))
    np.add.at(counts, tuple(tokens.T), 1)
    assert sampling.p_value(counts, first[:, None] * second) > 1e-5


@pytest.mark.parametrize("passes", [1, 2])
def test_best_paths_follow_their_passes(passes):
    """The second position is judged given the best first token, if there is a pass for it."""
    tree = drafts(BestPaths(5, 2, passes), 3, rows=1)
    first = softmax(table(3)[MASK, MASK, 0])
    second = softmax(table(3)[first.argmax() if passes == 2 else MASK, MASK, 1])
    scores = {str([a]): first[a] for a in range(3)}
    scores |= {str([a, b]): first[a] * second[b] for a in range(3) for b in range(3)}
    found, paths = {0: []}, np.asarray([tree.tokens[0], tree.parents[0]])
    for node in range(1, 5):
        found[node] = [*found[int(paths[1, node])], int(paths[0, node])]
    assert tree.draft_logits is None and tree.valid.all()
    best = sorted(scores, key=lambda path: scores[path])[-4:]
    assert {str(path) for path in found.values()} == {"[]", *best}


def test_siblings_share_the_marginals():
    """Two chains below one root: first tokens without replacement, second ones independent."""
    tree = drafts(Conditional(2, 2, 1), 3)
    first, second = softmax(table(3)[MASK, MASK])
    law = softmax(np.asarray(tree.draft_logits))
    expected = np.stack([first, second, second])
    np.testing.assert_allclose(law[:, :3], np.stack([expected] * len(law)), atol=1e-6)
    assert tree.parents[0].tolist() == [-1, 0, 0, 1, 2] and tree.valid.all()
    joint = first[:, None] * first[None] / (1 - first[:, None]) * (1 - np.eye(3))
    joint = joint[..., None, None] * second[:, None] * second
    counts = np.zeros((3,) * 4)
    np.add.at(counts, tuple(np.asarray(tree.tokens[:, 1:]).T), 1)
    assert sampling.p_value(counts, joint) > 1e-5


def test_one_pass_over_one_position_is_plain_speculative_decoding():
    """The token comes from the stated marginal q and is kept with probability sum min(p, q)."""
    tree = drafts(Conditional(1, 1, 1), 3, positions=1)
    marginal = softmax(table(3)[MASK, MASK, 0])
    law = softmax(np.asarray(tree.draft_logits[0, 0], np.float64))
    np.testing.assert_allclose(law, marginal, atol=1e-6)
    counts = np.bincount(np.asarray(tree.tokens[:, 1]), minlength=3)
    assert sampling.p_value(counts, marginal) > 1e-5
    p = enumeration.random_table(3, 3, 1)
    q = {prefix: tuple(law / law.sum()) for prefix in p}
    world = enumeration.World(p, q, enumeration.tree_of(1), True)
    found = enumeration.enumerate_rule(Rejection(), world, enumeration.walk)
    kept = np.minimum(p[()], q[()]).sum()
    assert found.tv < 1e-12 and found.length == pytest.approx(1 + kept, abs=1e-12)


def test_what_a_window_says_stays():
    """Revealed tokens are frozen and copied, and the mask is never drafted."""
    draw = np.random.default_rng(0)
    logits = jnp.asarray(draw.standard_normal((64, 5, 7)), jnp.float32)
    said = jnp.asarray(draw.integers(0, 7, (3, 64, 5)), jnp.int32)
    shown = jnp.asarray(draw.random((3, 64, 5)) < 0.4).at[2].set(True)
    start = jnp.full((64, 5), MASK, jnp.int32)
    given = lambda _: logits, lambda i, _: said[i], lambda i: shown[i], start, 7
    windows = [np.asarray(denoise(*given, passes)[0]) for passes in range(4)]
    assert (windows[0] == MASK).all() and (windows[3] != MASK).all()
    for before, after in itertools.pairwise(windows):
        known = before != MASK
        assert known.sum() < (after != MASK).sum()
        np.testing.assert_array_equal(after[known], before[known])
    law = softmax(np.asarray(copied(logits, jnp.asarray(windows[2]))))
    np.testing.assert_allclose(law.sum(-1), 1, rtol=1e-6)
    known = windows[2] != MASK
    np.testing.assert_array_equal(law[known], np.eye(7, dtype=np.float32)[windows[2][known]])
    np.testing.assert_array_equal(law[~known], softmax(np.asarray(logits))[~known])


def test_how_much_is_shown():
    """By chance (t - s)/t of what is masked; equal parts of the draft from the left if greedy."""
    rows, frames, depth, passes = 4000, 6, 5, 3
    greedy = jnp.arange(rows) < 10
    keys = jax.random.split(jax.random.key(2), rows)
    shows = jax.jit(by_chance(keys, frames, depth, passes, greedy))
    known = np.zeros((rows, frames), bool)
    for index in range(passes):
        known |= np.asarray(shows(jnp.int32(index)))
        share = (index + 1) / passes
        spread = np.sqrt(share * (1 - share) / (rows * frames))
        assert abs(known[10:].mean() - share) <= 5 * spread
        assert (known[:10] == (np.arange(frames) < depth * (index + 1) // passes)).all()


# Training.


def test_weight_of_the_schedule_is_one_over_t():
    with jax.enable_x64(True):
        times = jnp.linspace(EPSILON, 1, 200)

        def sigma(time):
            return -jnp.log1p(-mask_chance(time))

        weight = jax.vmap(jax.grad(sigma))(times) / jnp.expm1(sigma(times))
        np.testing.assert_allclose(weight * times, 1, atol=1e-12, rtol=0)
        for passes in (1, 2, 5):  # the bound of T steps: the same weight, if each counts 1/T
            times = jnp.arange(1, passes + 1) / passes
            step = mask_chance(times) - mask_chance(times - 1 / passes)
            weight = passes * step / mask_chance(times)
            np.testing.assert_allclose(weight * times, 1, atol=1e-12, rtol=0)


def test_windows_are_masked_at_their_times():
    """One time in each part; the share of masked positions; past the labels all is masked."""
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 9, (50, 40, 6)), jnp.int32)
    lengths = jnp.asarray(np.random.default_rng(1).integers(0, 7, (50, 40)), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 50)
    windows, times = (np.asarray(x) for x in jax.jit(masked_windows)(keys, labels, lengths))
    part = (np.sort(times, axis=1) - EPSILON) / (1 - EPSILON) * 40
    assert (np.floor(np.clip(part, 0, 39.999) + 1e-4) == np.arange(40)).all()
    assert abs(np.corrcoef(times.ravel(), np.tile(np.arange(40), 50))[0, 1]) < 0.1
    real = np.arange(6) < np.asarray(lengths)[..., None]
    assert (windows[~real] == MASK).all()
    assert (windows == np.asarray(labels))[real & (windows != MASK)].all()
    for low in np.arange(0, 1, 0.25):
        own = real & ((times >= low) & (times < low + 0.25))[..., None]
        chance = np.broadcast_to(mask_chance(times)[..., None], own.shape)[own]
        spread = np.sqrt((chance * (1 - chance)).sum())
        assert abs((windows[own] == MASK).sum() - chance.sum()) < 4 * spread
    _, times = masked_windows(keys, labels, lengths, 4)
    assert (np.sort(times, axis=1) == np.repeat([0.25, 0.5, 0.75, 1.0], 10)).all()
    once = np.asarray(antithetic_times(jax.random.key(3), 1))
    assert EPSILON <= once[0] <= 1


@dataclasses.dataclass(frozen=True)
class Setting:
    lm: object
    params: object
    drafter: object
    prompts: np.ndarray
    lengths: np.ndarray
    plain: np.ndarray
    truth: np.ndarray


@pytest.fixture(scope="module")
def setting():
    lm, params = tiny_target(num_layers=1)
    prompts, lengths = ragged_prompts(7, (4, 9, 1, 6))
    text = plain_text(lm, params, prompts, lengths, NEW)
    return Setting(lm, params, drafter_of(lm), prompts, lengths, *text)


def drafter_of(lm, tree: str = "", nodes: int = 9):
    recipe = recipes.find("diffusion")
    return recipe.drafter(recipe.network(lm.config, Shape(frames=FRAMES)), nodes, FRAMES, tree)


def loss_of(setting, decay: float = 0.5):
    weights = Loss(labels=FRAMES, decay=decay, chunk=3)
    return DiffusionLoss(setting.lm, setting.drafter, weights, 8)


def test_loss_is_the_sum_by_hand(setting):
    draw = np.random.default_rng(0)
    hidden = draw.standard_normal((5, FRAMES, 32)).astype(np.float32)
    labels = draw.integers(0, VOCAB, (5, FRAMES)).astype(np.int32)
    lengths = np.asarray([4, 1, 0, 2, 3], np.int32)
    masked, times = draw.random((5, FRAMES)) < 0.6, draw.random(5).astype(np.float32)
    given = hidden, masked, times, labels, lengths
    value, metrics = jax.jit(loss_of(setting).score_windows)(setting.params, *given)
    law = softmax(hidden.astype(np.float64) @ np.asarray(setting.params["head"], np.float64))
    nats, right = np.zeros(FRAMES), np.zeros(FRAMES)
    for row in range(5):
        for k in range(lengths[row]):
            if masked[row, k]:
                nats[k] -= np.log(law[row, k, labels[row, k]]) / times[row] / 4
                right[k] += (law[row, k].argmax() == labels[row, k]) / times[row] / 4
    np.testing.assert_allclose(metrics["loss_at"], nats, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy_at"], right, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(value, (nats * [8, 4, 2, 1]).sum() / 15, rtol=1e-5)


def test_training_and_decoding_see_the_same(setting):
    """Laws of windows that say something, after prompts, by the loss and by the drafter."""
    params, drafter = setting.params, setting.drafter
    draft_params = jax.tree.map(
        lambda x: x * 6 if x.ndim > 1 else x + 0.5, drafter.init_params(jax.random.key(0))
    )
    length = np.asarray([3, 8, 0, 5], np.int32)
    windows = np.random.default_rng(0).integers(0, VOCAB, (4, FRAMES)).astype(np.int32)
    windows = np.where(np.arange(FRAMES) % 2 == np.arange(4)[:, None] % 2, MASK, windows)
    other = windows.copy()
    other[0, FRAMES - 1] = (other[0, FRAMES - 1] + 1) % VOCAB
    batch = rows_of(setting.truth, setting.lengths)

    @jax.jit
    def both(draft_params, windows):
        loss = loss_of(setting)
        hidden = loss.hidden(
            draft_params, params, batch, jnp.asarray(length)[:, None], windows[:, None]
        )
        trained = drafter.network.log_probs(hidden[:, 0], params)
        taps = loss.taps(params, batch)
        tokens = jnp.pad(batch["tokens"], ((0, 0), (0, 1)))
        given = DraftContext(params, tokens, jnp.asarray(length), None, make_request(4, 1))
        state = drafter.init(draft_params, given, taps)
        seen = []

        @dataclasses.dataclass(frozen=True)
        class Watch:
            def draft(self, laws, shape, context, keys):
                seen.append(laws(windows))

        dataclasses.replace(drafter, tree=Watch()).propose(draft_params, state, given, None)
        return trained, seen[0]

    trained, decoded = both(draft_params, windows)
    np.testing.assert_allclose(trained, decoded, rtol=1e-4, atol=1e-4)
    changed, _ = both(draft_params, other)
    assert np.abs(changed[0, 0] - trained[0, 0]).max() > 1e-3  # position 1 sees the last one
    np.testing.assert_array_equal(changed[1:], trained[1:])


def test_gradients_are_finite_and_reach_every_parameter(setting):
    batch = rows_of(setting.truth, setting.lengths)
    batch["trained"] = batch["trained"].at[1].set(False)  # a row without labels
    loss, draft_params = loss_of(setting), setting.drafter.init_params(jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 4)
    value = jax.jit(jax.value_and_grad(lambda p: loss.loss(p, setting.params, batch, keys)[0]))
    value, grads = value(draft_params)
    assert np.isfinite(value) and value > 0
    for name, grad in grads.items():
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, name


def test_training_makes_drafts_longer(setting):
    """Trained on the very text that is decoded; the answers stay those of plain decoding."""
    batch, loss = rows_of(setting.truth, setting.lengths), loss_of(setting, decay=1.0)
    update = optax.adam(1e-2)

    def step(carry, key):
        draft_params, state = carry
        keys = jax.random.split(key, len(setting.truth))
        grads = jax.grad(lambda p: loss.loss(p, setting.params, batch, keys)[0])(draft_params)
        change, state = update.update(grads, state)
        return (optax.apply_updates(draft_params, change), state), None

    @jax.jit
    def fitted(draft_params):
        carry = draft_params, update.init(draft_params)
        return jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), 120))[0][0]

    fresh = setting.drafter.init_params(jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        fit = fitted(fresh)
    rounds = []
    for draft_params in (fresh, fit):
        given = setting.lm, setting.params, setting.drafter, draft_params
        result = run(*given, setting.prompts, setting.lengths, NEW)
        np.testing.assert_array_equal(result.tokens, setting.plain)
        rounds.append(np.asarray(result.stats.rounds))
    assert (rounds[1] < 0.75 * NEW).all() and rounds[1].sum() < 0.75 * rounds[0].sum()


@pytest.mark.parametrize("tree", ["conditional", "marginal"])
def test_joint_law_of_sampled_drafts(tree):
    drafter = drafter_of(sampling.target()[0], tree, 4)
    draft_params = drafter.init_params(jax.random.key(5))
    draft_params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, draft_params)
    counts, drafted, _ = sampling.count(drafter, Rejection(), draft_params, 4)
    assert drafter.states_law and drafted > 0 and (counts[2] > 0).sum() == 1
    assert min(sampling.p_values(counts)) > 1e-5


def test_names_and_shapes(setting):
    lm, network = setting.lm, setting.drafter.config
    assert setting.drafter.tree == BestPaths(9, FRAMES) and not setting.drafter.states_law
    expected = {
        "greedy-4": BestPaths(9, FRAMES, 4),
        "marginal": Conditional(1, FRAMES, 1),
        "siblings": Conditional(4, 2, 1),
        "conditional-3": Conditional(1, FRAMES, 3),
        "left_to_right": LeftToRight(FRAMES),
    }
    for name, tree in expected.items():
        assert drafter_of(lm, name).tree == tree
        assert tree.num_nodes <= 9
    wide = dataclasses.replace(network, passes=3)
    assert recipes.find("diffusion").drafter(wide, 9, FRAMES, "").tree.passes == 3
    published = recipes.find("diffusion").network(lm.config, Shape("published", frames=FRAMES))
    assert published == dataclasses.replace(network, passes=0)
    with pytest.raises(InputError, match="drafter.preset: expected 'published' or '', found 'x'"):
        recipes.find("diffusion").network(lm.config, Shape("x"))
    for name in ("prefix", "greedy-0", "marginal-2", "greedy-x"):
        with pytest.raises(InputError, match="^tree: expected greedy, .* found"):
            drafter_of(lm, name)
    with pytest.raises(InputError, match=r"^loss.labels: expected at least the 4 .* found 3$"):
        DiffusionLoss(lm, setting.drafter, Loss(labels=3), 8)
    shape = Shape(frames=FRAMES)
    plain = recipes.find("block").network(lm.config, shape)
    head, others = recipes.find("block").products(plain, 99, 5)
    found = recipes.of(network).products(network, 99, 5)
    assert found == (head, others + 5 * FRAMES * lm.config.width**2)
