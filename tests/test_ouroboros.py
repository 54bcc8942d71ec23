"""Ouroboros: lookahead drafts are greedy drafts, any pool keeps the text, what pools learn.

Equality with plain decoding over ragged rows and independence of rows are in ``test_contract`` too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import decode
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.draft import ngram
from ctc_spec_jax.draft.ngram import Pool, PoolConfig
from ctc_spec_jax.draft.ouroboros import Ouroboros, ouroboros_drafter
from ctc_spec_jax.draft.small_lm import SmallLM
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.decoder import output_logits
from ctc_spec_jax.tree import topology
from ctc_spec_jax.types import NO_TOKEN, Acceptance, DraftContext, Sampling, TargetOutput
from ctc_spec_jax.verify import Greedy
from tests.helpers import VOCAB, make_request, plain_text, ragged_prompts, tiny_target

CHAIN, TAILS, PHRASE, WIDTH, WAYS, BUCKETS = 5, 3, 3, 4, 6, 11
BATCH, BUDGET = 3, 24
LENGTHS = np.asarray([2, 5, 9], np.int32)


@functools.cache
def target():
    return tiny_target(num_layers=1)


def drafter_of(kind=Ouroboros, **changes):
    sizes = {"length": CHAIN, "tails": TAILS, "phrase": PHRASE, "width": WIDTH, "ways": WAYS}
    return kind(target()[0], **(sizes | {"buckets": BUCKETS} | changes))


@functools.cache
def prompts():
    tokens, lengths = ragged_prompts(4, LENGTHS)
    return np.pad(tokens, ((0, 0), (0, BUDGET + CHAIN + PHRASE + 2))), lengths


@functools.cache
def truth():
    """Plain answers [B, T], and prompts with long answers [B, S]."""
    (lm, params), (tokens, lengths) = target(), prompts()
    whole = plain_text(lm, params, tokens, lengths, BUDGET + CHAIN + PHRASE + 2)
    return whole[0][:, :BUDGET], whole[1]


def random_pool(seed: int) -> Pool:
    """Every place taken, by phrases of tokens that mean nothing."""
    draw = np.random.default_rng(seed)
    shape = (BATCH, BUCKETS, WAYS)
    keys = np.arange(BUCKETS)[None, :, None] + BUCKETS * draw.integers(0, 2, shape)
    ages = np.argsort(draw.random((BATCH, BUCKETS * WAYS)), axis=1).reshape(shape) + 1
    phrases = draw.integers(0, VOCAB, (*shape, PHRASE))
    clock = np.full((BATCH,), BUCKETS * WAYS)
    return Pool(*(x.astype(np.int32) for x in (np.minimum(keys, VOCAB - 1), phrases, ages, clock)))


def phrases_of(text, start, count: int):
    """Keys [B, count] from ``start`` [B] on in ``text`` [B, S], and the phrases after them."""
    place = start[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    after = place[..., None] + jnp.arange(1, PHRASE + 1, dtype=jnp.int32)[None, None]
    rows = jnp.arange(len(start), dtype=jnp.int32)[:, None]
    return text[rows, place], text[rows[..., None], after]


def oracle(text, length) -> Pool:
    """What is written after every token of the next chain, that after its last token newest."""
    keys, phrases = phrases_of(text, length + 1, CHAIN)
    config = PoolConfig(0, VOCAB, PHRASE, BUCKETS, WAYS)
    return ngram.insert_all(
        ngram.empty_pool(BATCH, config), keys, phrases, jnp.ones(keys.shape, bool)
    )


def biased(strength: float) -> Sampling:
    """Greedy rows with biases, so that the chain has to follow them; none at strength 0."""
    bias = np.random.default_rng(1).normal(size=(BATCH, VOCAB)).astype(np.float32)
    return Sampling(np.zeros((BATCH,), np.float32), bias=strength * bias)


@functools.partial(jax.jit, static_argnums=0)
def drafted(drafter, params, pool: Pool, window, sampling: Sampling):
    """The chain by lookahead, the chain of greedy passes, the state after one pass, and a tree."""
    tokens, lengths = prompts()
    context = DraftContext(
        (), jnp.asarray(tokens), lengths - 1, None, make_request(BATCH, BUDGET, sampling=sampling)
    )
    taps = (jnp.zeros((*tokens.shape, 1)),)
    state = drafter.init(params, context, taps)
    state |= {"pool": pool, "window": window}
    plain = SmallLM(drafter.lm, (1,) * CHAIN)
    greedy = plain.propose(params, plain.init(params, context, taps), context, None)
    whole = drafter.draft(params, state, context)
    begun = dataclasses.replace(
        whole,
        chain=jnp.pad(greedy.tokens[:, 1:2], ((0, 0), (0, CHAIN - 1))),
        count=jnp.ones_like(whole.count),
        window=window,
        pool=pool,
    )
    once = drafter.extend(params, state, context, begun)
    return whole, greedy.tokens[:, 1:], once, drafter.propose(params, state, context, None)


def windows(seed: int):
    draw = np.random.default_rng(seed)
    return draw.integers(0, VOCAB, (BATCH, PHRASE, WIDTH)).astype(np.int32)


@functools.cache
def draft_of(kind: str):
    _, params = target()
    pool = random_pool(1) if kind == "random" else oracle(jnp.asarray(truth()[1]), LENGTHS - 1)
    strength = 6.0 if kind == "random" else 0.0
    return jax.device_get(drafted(drafter_of(), params, pool, windows(2), biased(strength)))


@pytest.mark.parametrize("kind", ["random", "oracle"])
def test_chain_is_the_greedy_text_of_the_small_model(kind):
    whole, greedy, _, tree = draft_of(kind)
    assert whole.count.tolist() == [CHAIN] * BATCH
    assert whole.chain.tolist() == greedy.tolist()
    if kind == "oracle":
        assert all(truth()[0][row, :CHAIN].tolist() == greedy[row].tolist() for row in range(BATCH))
    assert tree.tokens[:, 1 : CHAIN + 1].tolist() == greedy.tolist()
    topology.check(dataclasses.replace(tree, memo=None), CHAIN + PHRASE, vocab_size=VOCAB)


def test_one_pass_adds_a_whole_phrase_or_one_token():
    """The phrase that is right to its end gives its tokens and one more; useless phrases none."""
    assert draft_of("oracle")[2].count.tolist() == [min(2 + PHRASE, CHAIN)] * BATCH
    counts = draft_of("random")[2].count
    assert counts.min() == 2


def test_window_and_its_phrases_are_those_of_the_model():
    """Column i follows the tokens 0..i of its first row; its guesses follow each other."""
    (lm, params), (tokens, lengths) = target(), prompts()
    window, (_, greedy, once, _) = windows(2), draft_of("oracle")
    texts, ends = np.zeros((BATCH * WIDTH, 24), np.int32), []
    for row in range(BATCH):
        for column in range(WIDTH):
            text = [*tokens[row, : lengths[row]], greedy[row, 0], *window[row, 0, : column + 1]]
            text += window[row, 1:, column].tolist()
            texts[len(ends), : len(text)] = text
            ends.append(len(text))
    ends = np.asarray(ends, np.int32)
    hidden = jax.jit(lambda *given: output_logits(params, lm.hidden(params, *given)[0]))
    logits = np.asarray(hidden(texts, ends))[np.arange(len(ends)), ends - 1]
    expected = logits.argmax(axis=1).reshape(BATCH, WIDTH)
    assert once.window[:, -1].tolist() == expected.tolist()
    assert once.window[:, :-1].tolist() == window[:, 1:].tolist()
    for row in range(BATCH):
        pool = jax.tree.map(lambda x, row=row: jnp.asarray(x[row]), once.pool)
        for column in range(WIDTH):
            key = window[row, 0, column]
            phrases, there = ngram.newest(pool, jnp.int32(key), WAYS)
            wanted = [*window[row, 1:, column], expected[row, column]]
            assert wanted in np.asarray(phrases)[np.asarray(there)].tolist()


OWN, GIVEN, ORACLE = range(3)


@dataclasses.dataclass(frozen=True)
class Rigged(Ouroboros):
    """The pool of every round is the drafter's own, a given one, or an oracle's, as
    ``draft_params["pools"]`` says; so that one program serves all tests."""

    def init(self, params, context, taps):
        return super().init(params["lm"], context, taps)

    def propose(self, params, state, context, keys):
        def choose(*pools):
            return jnp.select([params["pools"] == n for n in range(3)], pools)

        pools = (state["pool"], params["given"], oracle(params["text"], context.length))
        state = state | {"pool": jax.tree.map(choose, *pools)}
        return super().propose(params["lm"], state, context, keys)

    def commit(self, params, state, context, output, acceptance):
        return super().commit(params["lm"], state, context, output, acceptance)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(drafter, params, draft_params, tokens, lengths):
    loop, request = Loop(target()[0], drafter, Greedy(), BUDGET), make_request(BATCH, BUDGET)
    state = decode.start(loop, params, draft_params, tokens, lengths, request)
    state = decode.advance(loop, params, draft_params, state, request, BUDGET)
    return decode.output(loop, state), state


def decoded(small, pools: int, order=(0, 1, 2)):
    """Answers and last state of the prompts in an order."""
    rows, (tokens, lengths) = np.asarray(order), prompts()
    draft_params = {"lm": small, "given": random_pool(7), "pools": np.int32(pools)}
    draft_params["text"] = jnp.asarray(truth()[1][rows])
    given = (target()[1], draft_params, tokens[rows], lengths[rows])
    return jax.device_get(_decoded(drafter_of(Rigged), *given))


def test_useless_pools_keep_the_text():
    assert decoded(target()[1], GIVEN)[0].tokens.tolist() == truth()[0].tolist()


def test_oracle_pools_give_whole_tails():
    """Every round gives the chain, a whole tail and the target's own token; after such rounds the
    cache of the small model is that of the text."""
    lm, params = target()
    output, state = decoded(params, ORACLE)
    assert output.tokens.tolist() == truth()[0].tolist()
    most = CHAIN + PHRASE + 1  # g + N - 1, and one
    assert (output.stats.emitted[:, : BUDGET // most] == most).all()
    hidden = jax.jit(lambda *given: output_logits(params, lm.hidden(params, *given)[0]))
    fresh = np.asarray(hidden(state.tokens, state.length + 1))[np.arange(BATCH), state.length]
    np.testing.assert_allclose(state.drafter["text"]["logits"], fresh, rtol=1e-4, atol=1e-4)


def test_pools_are_not_shared_among_rows_or_requests():
    """Trap of the release's benchmarks: a warm pool. A request begins with none, what it learns
    depends on its own prompt, and the same request later is decoded in the same rounds."""
    order, (tokens, lengths) = (2, 0, 1), prompts()
    small = tiny_target(seed=3, num_layers=1)[1]
    first, state = decoded(small, OWN)
    again, after = decoded(small, OWN, order)
    assert first.tokens.tolist() == truth()[0].tolist()
    pools = [state.drafter["pool"], after.drafter["pool"]]
    for row, place in enumerate(order):
        assert first.stats.emitted[place].tolist() == again.stats.emitted[row].tolist()
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[place], b[row]), *pools)  # noqa: B023
    assert not np.array_equal(pools[0].phrases[0], pools[0].phrases[1])
    context = DraftContext((), jnp.asarray(tokens), lengths - 1, None, make_request(BATCH, BUDGET))
    begun = drafter_of().init(small, context, (jnp.zeros((*tokens.shape, 1)),))
    assert (np.asarray(begun["pool"].keys) == NO_TOKEN).all()


@functools.partial(jax.jit, static_argnums=0)
def learned(drafter, params, pool: Pool, logits, accepted):
    """The tree of a pool, and the pool after a round that kept ``accepted`` [B] tokens."""
    tokens, lengths = prompts()
    request = make_request(BATCH, BUDGET)
    context = DraftContext((), jnp.asarray(tokens), lengths - 1, None, request)
    state = drafter.init(params, context, (jnp.zeros((*tokens.shape, 1)),)) | {"pool": pool}
    tree = drafter.propose(params, state, context, None)
    path = jnp.broadcast_to(
        jnp.arange(drafter.max_depth + 1, dtype=jnp.int32)[None],
        (BATCH, drafter.max_depth + 1),
    )
    context = dataclasses.replace(context, tree=tree)
    acceptance = Acceptance(path, accepted, jnp.zeros((BATCH,), jnp.int32))
    state = drafter.commit(params, state, context, TargetOutput(logits, (), None), acceptance)
    return tree, state["pool"]


@pytest.mark.parametrize("accepted", [1, CHAIN + 1])
def test_tails_are_corrected_after_refusals_too(accepted):
    """Dead branch of the release: there, a refused draft teaches nothing about its tails. The
    phrases become the target's, in the order that they had; a finished row learns nothing."""
    (_, params), pool = target(), random_pool(3)
    drafter = drafter_of()
    logits = np.random.default_rng(5).normal(size=(BATCH, drafter.num_nodes, VOCAB))
    counts = np.asarray([accepted, accepted, 0], np.int32)
    tree, after = jax.device_get(learned(drafter, params, pool, logits.astype(np.float32), counts))
    best, taught = logits.argmax(axis=2), 0
    for row in range(BATCH):
        key, tails, corrected = tree.tokens[row, CHAIN], [], []
        for node in range(CHAIN + PHRASE, drafter.num_nodes, PHRASE):
            if not tree.valid[row, node]:
                continue
            nodes = [node]
            while nodes[0] != CHAIN:
                nodes.insert(0, int(tree.parents[row, nodes[0]]))
            tails.append(tree.tokens[row, nodes[1:]].tolist())
            corrected.append(best[row, nodes[:-1]].tolist())
        one = jax.tree.map(lambda x, row=row: jnp.asarray(x[row]), after)
        phrases, there = ngram.newest(one, jnp.int32(key), WAYS)
        found = np.asarray(phrases)[np.asarray(there)].tolist()
        if row == 2:
            assert found[: len(tails)] == tails
            continue
        distinct = [phrase for i, phrase in enumerate(corrected) if phrase not in corrected[:i]]
        assert found[: len(distinct)] == distinct
        assert not any(tail in found for tail in tails if tail not in corrected)
        taught += len(tails)
    assert taught >= 4


def test_forgotten_phrases_are_gone():
    """Of one key alone, and only where it is wanted."""
    pool = ngram.empty_pool(1, PoolConfig(0, 7, 2, 3, 3))
    keys = np.asarray([[1, 4, 1]], np.int32)  # 1 and 4 share a bucket
    phrases = np.asarray([[[5, 6], [5, 6], [6, 5]]], np.int32)
    pool = ngram.insert_all(pool, keys, phrases, np.ones((1, 3), bool))
    one = jax.tree.map(lambda x: x[0], pool)

    def contents(pool, key):
        phrases, there = ngram.newest(pool, jnp.int32(key), 3)
        return np.asarray(phrases)[np.asarray(there)].tolist()

    kept = ngram.forget(one, jnp.int32(1), jnp.asarray([5, 6], jnp.int32), jnp.asarray(False))
    assert contents(kept, 1) == [[6, 5], [5, 6]]
    less = ngram.forget(one, jnp.int32(1), jnp.asarray([5, 6], jnp.int32), jnp.asarray(True))
    assert contents(less, 1) == [[6, 5]] and contents(less, 4) == [[5, 6]]


def test_sizes():
    config = target()[0].config
    for nodes in range(2, 40):
        for depth in range(1, nodes + 2):
            drafter = ouroboros_drafter(config, nodes, depth, "")
            assert 1 < drafter.num_nodes <= nodes and 1 <= drafter.max_depth <= depth
    assert ouroboros_drafter(config, 16, 15, "") == Ouroboros(target()[0], 6, 3, 3)
    with pytest.raises(InputError, match="tree: expected '', .* found 'beam'"):
        ouroboros_drafter(config, 9, 3, "beam")
