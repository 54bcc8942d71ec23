"""Sampling inside the loop: the joint law of the first three tokens, for every rule.

Unlike the enumeration of single rules, this runs the whole program: cache, positions, processors at
tree nodes, keys per round, rows of different options in one batch. 8,676 decodes of each of two
kinds of sampled rows in every one of 8 cases, 138,816 in all. Each case and kind makes two
chi-square tests (tokens 1 and 2; tokens 2 and 3, which shared uniforms would tie together) at 1e-5:
all 32 together raise a false alarm with probability 3.2e-4. Seeds are fixed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax.decode import Loop, NoDraft, decode, row_keys
from ctc_spec_jax.models.decoder import output_logits
from ctc_spec_jax.tree import build
from ctc_spec_jax.types import NO_PARENT, DraftTree, Sampling
from ctc_spec_jax.verify import TargetSample
from ctc_spec_jax.verify_sampled import Block, Mixed, MultiCandidate, Rejection
from tests.helpers import VOCAB, OracleTree, make_request, tiny_target
from tests.reference import reference_scores

PROMPT = [3, 1, 4, 1, 5]
BATCH, CALLS = 1024, 18
# The third is greedy and has to be constant.
KINDS = (
    {"temperature": 6.0, "top_k": 9, "repetition_penalty": 1.3, "frequency_penalty": 2.0},
    {"temperature": 9.0, "top_p": 0.9, "min_p": 0.02, "bias": {2: 4.0}, "presence_penalty": 3.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
)
KIND_OF_ROW = np.resize([0, 1] * 8 + [2], BATCH)
"""Sampled rows in turns, and a greedy one now and then."""


@dataclasses.dataclass(frozen=True)
class TableDrafter:
    """Trees whose sampled children come from a law of the token before; ``draft_params`` [V, V].

    ``branching`` children per node and depth; of those, the first ``fixed`` are the law's best.
    """

    branching: tuple[int, ...]
    replacement: bool = False
    fixed: int = 0
    taps: tuple[int, ...] = ()

    @property
    def parents(self):
        parents, level = [NO_PARENT], [0]
        for width in self.branching:
            level_before, level = level, []
            for parent in level_before:
                for _ in range(width):
                    level.append(len(parents))
                    parents.append(parent)
        return parents

    @property
    def max_depth(self):
        return len(self.branching)

    @property
    def num_nodes(self):
        return len(self.parents)

    def init(self, params, context, taps):
        return ()

    def propose(self, params, state, context, keys):
        parents = self.parents

        def row(key, pending):
            tokens = [pending] + [jnp.int32(0)] * (len(parents) - 1)
            valid, sampled = [jnp.array(True)] * len(parents), [False] * len(parents)
            for node in range(len(parents)):
                children = [c for c, parent in enumerate(parents) if parent == node]
                if not children:
                    continue
                law = params[tokens[node]]
                best = jnp.argsort(-law)[: self.fixed].astype(jnp.int32)
                rest = law.at[best].set(-jnp.inf)
                count = len(children) - self.fixed
                own = jax.random.fold_in(key, node)
                drawn, real = build.sample_children(own, rest, count, self.replacement)
                for place, child in enumerate(children):
                    late = place - self.fixed
                    tokens[child] = best[place] if late < 0 else drawn[late]
                    valid[child] = valid[node] & (real[late] if late >= 0 else True)
                    sampled[child] = late >= 0
            tokens = jnp.stack(tokens)
            return tokens, jnp.stack(valid), params[tokens], jnp.asarray(sampled)

        tokens, valid, laws, sampled = jax.vmap(row)(keys, context.pending)
        tree = jnp.broadcast_to(jnp.asarray(parents, jnp.int32)[None], tokens.shape)
        return DraftTree(tokens, tree, valid, laws, sampled if self.fixed else None)

    def commit(self, params, state, context, output, acceptance):
        return state


CASES = {
    "plain": (NoDraft(), TargetSample()),
    "tree": (OracleTree(quality=0.6), TargetSample()),
    "chain": (TableDrafter((1, 1, 1)), Rejection()),
    "chain, jointly": (TableDrafter((1, 1, 1)), Block()),
    "siblings": (TableDrafter((3, 2)), MultiCandidate()),
    "siblings, replaced": (TableDrafter((3, 2), True), MultiCandidate(replacement=True)),
    "mixed": (TableDrafter((3, 2), fixed=1), Mixed()),
    "drawn tree, walked": (TableDrafter((3, 2)), TargetSample()),
}


@functools.cache
def target():
    """One layer, because these tests run far longer than they compile."""
    return tiny_target(num_layers=1)


@functools.cache
def raw_logits():
    """Raw logits after the prompt and every continuation of at most two tokens."""
    lm, params = target()
    pairs = [(a, b) for a in range(VOCAB) for b in range(VOCAB)]
    texts = [(), *((a,) for a in range(VOCAB)), *pairs]
    rows = np.zeros((len(texts), len(PROMPT) + 2), np.int32)
    lengths = np.zeros((len(texts),), np.int32)
    for i, text in enumerate(texts):
        whole = [*PROMPT, *text]
        rows[i, : len(whole)], lengths[i] = whole, len(whole)
    hidden = jax.jit(lambda *a: output_logits(params, lm.hidden(params, *a)[0]))(rows, lengths)
    logits = np.asarray(hidden)[np.arange(len(texts)), lengths - 1]
    return dict(zip(texts, logits, strict=True))


@functools.cache
def joint(kind: int) -> np.ndarray:
    """The law of three tokens [V, V, V] under the options of a kind of row."""

    def law(text):
        scores = reference_scores(raw_logits()[text], PROMPT, list(text), **KINDS[kind])
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    whole = np.zeros((VOCAB,) * 3)
    first = law(())
    for a in np.flatnonzero(first):
        second = law((a,))
        for b in np.flatnonzero(second):
            whole[a, b] = first[a] * second[b] * law((a, b))
    return whole


def p_value(counts, law) -> float:
    """Chi-square test; cells that expect fewer than 10 are one cell."""
    expected = counts.sum() * law
    small = expected < 10
    assert counts[law == 0].sum() == 0, "a token that the law rules out"
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    kept = expected > 0
    value = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    return float(jax.scipy.special.gammaincc((kept.sum() - 1) / 2, value / 2))


def count(drafter, rule, draft_params, calls: int = CALLS) -> tuple[np.ndarray, int, np.ndarray]:
    """How often which three tokens came [kinds, V, V, V], how many of them were drafted, and how
    many nodes of every depth were offered."""
    lm, params = target()
    kinds = KIND_OF_ROW

    def column(field, off, dtype=np.float32):
        values = [KINDS[kind].get(field, off) for kind in kinds]
        return np.asarray(values, dtype)

    bias = np.zeros((BATCH, VOCAB), np.float32)
    bias[kinds == 1, 2] = 4.0
    sampling = Sampling(
        temperature=column("temperature", 0.0),
        top_k=column("top_k", 0, np.int32),
        top_p=column("top_p", 1.0),
        min_p=column("min_p", 0.0),
        repetition_penalty=column("repetition_penalty", 1.0),
        presence_penalty=column("presence_penalty", 0.0),
        frequency_penalty=column("frequency_penalty", 0.0),
        bias=bias,
    )
    prompts = np.tile(np.asarray(PROMPT, np.int32)[None], (BATCH, 1))
    lengths = np.full((BATCH,), len(PROMPT), np.int32)
    program = jax.jit(functools.partial(decode, Loop(lm, drafter, rule, 3)))
    counts = np.zeros((len(KINDS), *(VOCAB,) * 3), np.int64)
    drafted, offered = 0, np.zeros((drafter.max_depth,), np.int64)
    for call in range(calls):
        keys = row_keys(jax.random.fold_in(jax.random.key(17), call), BATCH)
        request = make_request(BATCH, 3, sampling=sampling, keys=keys)
        result = program(params, draft_params, prompts, lengths, request)
        np.add.at(counts, (kinds, *np.asarray(result.tokens).T), 1)
        drafted += int(np.asarray(result.record.from_draft).sum())
        offered += np.asarray(result.stats.drafted).sum(0)
    return counts, drafted, offered


def p_values(counts) -> list[float]:
    """Of tokens 1 and 2 and of tokens 2 and 3, for both kinds of sampled rows."""
    laws = [(kind, axis, joint(kind)) for kind in (0, 1) for axis in (2, 0)]
    return [p_value(counts[kind].sum(axis), law.sum(axis)) for kind, axis, law in laws]


@pytest.mark.parametrize("name", CASES)
def test_joint_law(name):
    drafter, rule = CASES[name]
    draft_params = 1.5 * jax.random.normal(jax.random.key(3), (VOCAB, VOCAB))
    if isinstance(drafter, OracleTree):
        # A fixed guess, and another one for every row, is as good a text as any.
        draft_params = np.random.default_rng(0).integers(0, VOCAB, (BATCH, 16)).astype(np.int32)
    counts, drafted, _ = count(drafter, rule, draft_params)
    assert drafted > 0 or name == "plain"
    assert (counts[2] > 0).sum() == 1  # greedy rows are constant
    assert min(p_values(counts)) > 1e-5


@pytest.mark.parametrize("kind", [0, 1])
def test_the_test_can_fail(kind):
    """A shift of 3 % of the mass towards one pair of tokens is found at this number of draws."""
    law = joint(kind).sum(2)
    assert (law > 0).sum() > 20, "the law of the test should be spread out"
    draws = CALLS * int((KIND_OF_ROW == kind).sum())
    assert draws == 8676
    wrong = 0.97 * law
    wrong[np.unravel_index(np.argmax(law), law.shape)] += 0.03
    counts = np.random.default_rng(0).multinomial(draws, wrong.ravel()).reshape(law.shape)
    assert p_value(counts, law) < 1e-5
    fair = np.random.default_rng(0).multinomial(draws, law.ravel()).reshape(law.shape)
    assert p_value(fair, law) > 1e-5
