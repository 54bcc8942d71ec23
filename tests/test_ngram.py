"""Text as drafter, against slow references with Python lists and dicts."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax.draft import ngram
from ctc_spec_jax.draft.ngram import LookupConfig, PhrasePool, PoolConfig, PromptLookup
from ctc_spec_jax.tree import topology
from ctc_spec_jax.tree.build import merge_phrases
from ctc_spec_jax.types import Acceptance, DraftContext, DraftTree, TargetOutput
from tests.helpers import make_request

SIZE = 24


def paths(tokens, parents, valid) -> list[tuple[int, ...]]:
    """Tokens from the root to every valid node, in the order of the slots."""
    found = {0: ()}
    for node in np.flatnonzero(valid):
        if node:
            found[node] = (*found[int(parents[node])], int(tokens[node]))
    return list(found.values())


def test_phrases_merge_into_a_trie():
    draw = np.random.default_rng(0)
    merge = jax.jit(merge_phrases)
    merged = 0
    for _ in range(200):
        phrases = draw.integers(0, 2, (4, 3)).astype(np.int32)
        lengths = draw.integers(0, 4, (4,)).astype(np.int32)
        tokens, parents, valid = (np.asarray(x) for x in merge(phrases, lengths))
        root = np.zeros((1, 1), np.int32)
        tree = DraftTree(
            jnp.asarray(np.concatenate([root, tokens[None]], 1)),
            jnp.asarray(np.concatenate([root - 1, parents[None]], 1)),
            jnp.asarray(np.concatenate([root == 0, valid[None]], 1)),
        )
        topology.check(tree, 3)
        found = paths(tree.tokens[0], tree.parents[0], tree.valid[0])
        wanted = {tuple(p[:d]) for p, n in zip(phrases, lengths, strict=True) for d in range(n + 1)}
        assert len(found) == len(set(found)) and set(found) == wanted
        merged += len(wanted) - 1 < lengths.sum()
    assert merged > 100


def slow_lookup(text: list[int], longest: int, branches: int, depth: int) -> set[tuple[int, ...]]:
    last = len(text) - 1
    found = []
    for end in range(last):
        match = 0
        while match < longest and match <= end and text[end - match] == text[last - match]:
            match += 1
        if match:
            found.append((match, end))
    drafted = {()}
    for _, end in sorted(found, reverse=True)[:branches]:
        whole = list(text)
        while len(whole) < len(text) + depth:  # the text repeats from the match on
            whole.append(whole[len(whole) - (last - end)])
        phrase = whole[end + 1 : end + 1 + depth]
        drafted |= {tuple(phrase[:d]) for d in range(depth + 1)}
    return drafted


def context_of(texts, garbage: int = 1) -> DraftContext:
    """What lies behind a row's text is garbage."""
    tokens = np.full((len(texts), SIZE), garbage, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    length = jnp.asarray([len(text) - 1 for text in texts], jnp.int32)
    return DraftContext((), jnp.asarray(tokens), length, None, make_request(len(texts), 4))


def test_lookup():
    drafter = PromptLookup(LookupConfig(8, 4, longest=3), branches=3, max_depth=5)
    propose = jax.jit(lambda context: drafter.propose({}, (), context, None))
    draw, sizes = np.random.default_rng(1), set()
    for _ in range(25):
        texts = [draw.integers(0, 4, draw.integers(1, 18)).tolist() for _ in range(4)]
        tree = propose(context_of(texts))
        topology.check(tree, 5)
        for row, text in enumerate(texts):
            found = paths(tree.tokens[row], tree.parents[row], tree.valid[row])
            assert set(found) == slow_lookup(text, 3, 3, 5)
            sizes.add(len(found))
    assert {1, 6} <= sizes and max(sizes) > 10


class SlowPool:
    """Token -> its newest phrases, newest last; a token's bucket holds ``ways`` phrases."""

    def __init__(self, ways: int, buckets: int):
        self.ways, self.buckets = ways, collections.defaultdict(collections.OrderedDict)
        self.count = buckets

    def insert(self, key, phrase):
        bucket = self.buckets[key % self.count]
        bucket.pop((key, tuple(phrase)), None)
        bucket[key, tuple(phrase)] = True
        if len(bucket) > self.ways:
            bucket.popitem(last=False)

    def newest(self, key):
        bucket = self.buckets[key % self.count]
        return [phrase for owner, phrase in reversed(bucket) if owner == key]


CONFIG = PoolConfig(8, 7, phrase=2, buckets=3, ways=3)


def contents(pool, row: int, key: int):
    one = jax.tree.map(lambda x: x[row], pool)
    phrases, there = ngram.newest(one, jnp.int32(key), CONFIG.ways)
    return [tuple(p) for p, real in zip(phrases.tolist(), there.tolist(), strict=True) if real]


def check_same(pool, slow: list[SlowPool]):
    for row, other in enumerate(slow):
        for key in range(7):
            assert contents(pool, row, key) == other.newest(key)


def test_pool_drops_its_oldest_phrases():
    draw = np.random.default_rng(2)
    pool, slow = ngram.empty_pool(2, CONFIG), [SlowPool(3, 3), SlowPool(3, 3)]
    insert = jax.jit(ngram.insert_all)
    for _ in range(6):
        keys = draw.integers(0, 7, (2, 10)).astype(np.int32)
        phrases = draw.integers(0, 2, (2, 10, 2)).astype(np.int32)
        wanted = draw.random((2, 10)) < 0.8
        pool = insert(pool, keys, phrases, wanted)
        for row, other in enumerate(slow):
            for key, phrase, real in zip(keys[row], phrases[row], wanted[row], strict=True):
                if real:
                    other.insert(int(key), phrase.tolist())
        check_same(pool, slow)


@functools.cache
def pool_drafter():
    return PhrasePool(CONFIG, branches=2, max_depth=5)


def test_pool_of_a_prompt_and_drafts_from_it():
    """Each of the newest phrases goes on with the newest one after its last token."""
    texts = [[1, 2, 3, 1, 2, 4, 1], [5], [6, 6, 6, 6, 6]]
    drafter, context = pool_drafter(), context_of(texts)
    state = drafter.init({}, context, ())
    slow = [SlowPool(3, 3) for _ in texts]
    for other, text in zip(slow, texts, strict=True):
        for start in range(len(text) - 2):
            other.insert(text[start], text[start + 1 : start + 3])
    check_same(state, slow)
    tree = drafter.propose({}, state, context, None)
    topology.check(tree, 5)
    drafted = [
        set(paths(*(x[row] for x in (tree.tokens, tree.parents, tree.valid)))) for row in range(3)
    ]
    # After 1 came 2 4, then 2 3; after 4 came nothing that long; after 3 came 1 2, after 2: 4 1.
    assert drafted[0] == {(), (2,), (2, 4), (2, 3), (2, 3, 1), (2, 3, 1, 2), (2, 3, 1, 2, 4)}
    assert drafted[1] == {()}
    assert drafted[2] == {(6,) * n for n in range(6)}


def test_refused_text_feeds_the_pool():
    """From a refused token on: what the target wrote after it, where the draft held all but the
    last of it; and the new text. A finished row learns nothing."""
    drafter = pool_drafter()
    text = [0, 1]
    before = context_of([text, text])
    # Root 1 with children 2 and 3; 2 -> 4 -> 5, 3 -> 6.
    tokens = jnp.asarray([[1, 2, 3, 4, 6, 5]] * 2, jnp.int32)
    parents = jnp.asarray([[-1, 0, 0, 1, 2, 3]] * 2, jnp.int32)
    tree = DraftTree(tokens, parents, jnp.ones((2, 6), bool))
    best = [3, 4, 0, 5, 1, 0]  # after 1, 2, 3, 4, 6, 5
    logits = jnp.tile(jax.nn.one_hot(jnp.asarray(best), 7)[None], (2, 1, 1))
    after = context_of([[*text, 3, 0], [*text, 3, 0]])
    context = DraftContext((), after.tokens, before.length, None, before.request, tree)
    path = jnp.zeros((2, 6), jnp.int32).at[:, 1].set(2)
    accepted = Acceptance(path, jnp.asarray([2, 0], jnp.int32), jnp.zeros(2, jnp.int32))
    state = drafter.init({}, before, ())
    state = drafter.commit({}, state, context, TargetOutput(logits, (), None), accepted)
    # 2: 4 5 (4 was drafted after 2), 4: 5 0 (5 was); 3, 6 and 5 have no child that is best.
    slow = SlowPool(3, 3)
    for key, phrase in [(2, [4, 5]), (4, [5, 0]), (0, [1, 3]), (1, [3, 0])]:
        slow.insert(key, phrase)
    check_same(state, [slow, SlowPool(3, 3)])


@pytest.mark.parametrize("drafter", [pool_drafter(), PromptLookup(LookupConfig(8, 7), 2, 5)])
def test_no_parameters(drafter):
    assert drafter.init_params(jax.random.key(0)) == {} and drafter.num_nodes == 11
