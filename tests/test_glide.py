"""GLIDE: what it may see of the target's cache; CaPE; sampled rows.

Passes and loss against a slow reference are in ``test_sequential``.

Shape letters: B rows, T tokens, A anchors, K tokens of a draft, V vocabulary, D width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import recipes
from ctc_spec_jax.draft.glide import CAPE, CHAIN
from ctc_spec_jax.draft.sequential import Confidence
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.types import DraftContext
from ctc_spec_jax.verify import TargetSample
from ctc_spec_jax.verify_sampled import Rejection
from tests import test_sampling as sampling
from tests.helpers import VOCAB, make_request, ragged_prompts, tiny_target
from tests.test_heads import paths_of, random_params

STEPS, BLOCK, TOKENS = 3, 4, 12
LENGTHS = np.asarray([5, 9, 0, 4], np.int32)


@pytest.fixture(scope="module")
def setting():
    """A target of two layers, parameters far from fresh ones, and rows of tokens."""
    lm, params = tiny_target()
    drafter = drafter_of(lm)
    return lm, params, random_params(drafter), jnp.asarray(ragged_prompts(3, [TOKENS] * 4)[0])


def drafter_of(lm, tree="", nodes=13, depth=STEPS, steps=STEPS):
    recipe = recipes.find("glide")
    return recipe.drafter(recipe.network(lm.config, Shape(frames=steps)), nodes, depth, tree)


@functools.cache
def drafts(lm):
    """A program: trees of every kind after a text, of which the cache is changed by ``noise``."""
    every = {tree: drafter_of(lm, tree) for tree in ("cape", "chain", "sampled")}
    every["one child"] = dataclasses.replace(every["cape"], children=CHAIN)
    every["wide"] = drafter_of(lm, "cape", nodes=40)

    @jax.jit
    def draft(params, draft_params, tokens, noise):
        _, taps, kv = lm.hidden(params, tokens, LENGTHS, every["cape"].taps)
        kv = tuple((k + noise[:, None, None], v + noise[:, None, :, None]) for k, v in kv)
        context = DraftContext(
            params, jnp.pad(tokens, ((0, 0), (0, 1))), jnp.asarray(LENGTHS), kv, make_request(4, 1)
        )
        state = every["cape"].init(draft_params, context, taps)
        keys = context.request.keys
        return {name: d.propose(draft_params, state, context, keys) for name, d in every.items()}

    return draft


def places(first, last):
    """Noise at the slots from ``first`` [B] on and before ``last`` [B]."""
    slots = np.arange(TOKENS + 2)[None]
    inside = (slots >= np.asarray(first)[:, None]) & (slots < np.asarray(last)[:, None])
    return jnp.asarray(3.0 * inside, jnp.float32)


def test_drafts_see_committed_tokens_alone(setting):
    """Of the target's cache, in decoding; the newest committed token is seen."""
    lm, params, draft_params, tokens = setting
    draft, end = drafts(lm), LENGTHS + 99
    plain, hidden, seen = (
        draft(params, draft_params, tokens, noise)
        for noise in (places(end, end), places(LENGTHS, end), places(LENGTHS - 1, LENGTHS))
    )
    jax.tree.map(np.testing.assert_array_equal, plain, hidden)
    change = np.abs(plain["sampled"].draft_logits - seen["sampled"].draft_logits).max((1, 2))
    assert (change > 1e-2).tolist() == (LENGTHS > 0).tolist()


@functools.cache
def trained(lm):
    """A program of the passes of training, anchors at every multiple of ``BLOCK``."""
    drafter = drafter_of(lm, steps=BLOCK)

    @jax.jit
    def outputs(params, draft_params, tokens, segments, positions, noise, anchors):
        _, taps, kv = lm.packed(params, tokens, segments, positions, drafter.taps)
        kv = tuple((k + noise[:, None, None], v + noise[:, None, :, None]) for k, v in kv)
        batch = {"tokens": tokens, "segments": segments, "positions": positions}
        ahead = anchors[..., None] + jnp.arange(BLOCK, dtype=jnp.int32)[None, None]
        known = jnp.take_along_axis(tokens[:, None], ahead, axis=2)
        return drafter.outputs(draft_params, params, batch, taps, kv, anchors, known)

    return outputs


def blocks(count=4):
    """Anchors int32 [B, A], every multiple of ``BLOCK``."""
    return jnp.tile(BLOCK * jnp.arange(3, dtype=jnp.int32)[None], (count, 1))


def one_text(rows=4):
    return jnp.ones((rows, TOKENS), jnp.int32), jnp.tile(jnp.arange(TOKENS)[None], (rows, 1))


def test_training_hides_what_decoding_has_not(setting):
    """Keys of a query's own block, of later ones and of other documents change nothing."""
    lm, params, draft_params, tokens = setting
    tokens, outputs, anchors = tokens[:, :TOKENS], trained(lm), blocks()
    whole = outputs(params, draft_params, tokens, *one_text(), jnp.zeros((4, TOKENS)), anchors)
    for index, anchor in enumerate((0, 4, 8)):
        noise = places([anchor] * 4, [TOKENS] * 4)[:, :TOKENS]
        found = outputs(params, draft_params, tokens, *one_text(), noise, anchors)
        np.testing.assert_array_equal(found[:, : index + 1], whole[:, : index + 1])
        assert (np.abs(found - whole)[:, index + 1 :].max((0, 2, 3)) > 1e-3).all()
    # Two documents of eight and four tokens: the second one begins at the last anchor.
    segments = jnp.tile(jnp.asarray([[1] * 8 + [2] * 4]), (4, 1))
    positions = jnp.tile(jnp.asarray([[*range(8), *range(4)]]), (4, 1))
    noise = places([0] * 4, [8] * 4)[:, :TOKENS]
    packed = outputs(params, draft_params, tokens, segments, positions, noise, anchors)
    turned = jnp.roll(tokens, 4, axis=1)
    alone = outputs(params, draft_params, turned, *one_text(), 0 * noise, anchors)
    np.testing.assert_allclose(packed[:, 2], alone[:, 0], rtol=1e-4, atol=1e-4)


def test_blocks_have_the_mask_of_the_paper(setting):
    """With an anchor per block, key j is seen of row i where floor(j / b) < floor(i / b)."""
    lm, params, draft_params, tokens = setting
    tokens, outputs = tokens[:1, :TOKENS], trained(lm)
    everywhere = jnp.tile(tokens, (TOKENS + 1, 1))
    # One key changes per row of the batch, none in the last row.
    noise = jnp.asarray(3.0 * np.eye(TOKENS + 1, TOKENS), jnp.float32)
    given = everywhere, *one_text(TOKENS + 1), noise, blocks(TOKENS + 1)
    found = np.asarray(outputs(params, draft_params, *given)).reshape(TOKENS + 1, TOKENS, -1)
    changed = np.abs(found[:-1] - found[-1]).max(-1) > 1e-6  # [key, row]
    index = np.arange(TOKENS)
    assert (changed.T == (index[None] // BLOCK < index[:, None] // BLOCK)).all()


def test_without_cross_attention_it_is_a_plain_layer(setting):
    """A matrix of zeros after the cross-attention: a decoder of one layer on the same tokens."""
    lm, params, draft_params, tokens = setting
    tokens = tokens[:, :TOKENS]
    without = draft_params | {"cross_output": 0 * draft_params["cross_output"]}
    plain = DecoderLM(dataclasses.replace(lm.config, num_layers=1))
    names = ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down")
    own = {name: params[name] for name in ("embedding", "head")}
    own |= {"norm": draft_params["norm"], "layer_0": {key: draft_params[key] for key in names}}
    expected = jax.jit(plain.hidden)(own, tokens, jnp.full((4,), TOKENS))[0]
    given = tokens, *one_text(), jnp.zeros((4, TOKENS)), blocks()
    for chosen, equal in ((without, True), (draft_params, False)):
        found = np.asarray(trained(lm)(params, chosen, *given)).reshape(4, TOKENS, -1)
        assert np.allclose(found, expected, rtol=1e-3, atol=1e-3) == equal


def test_cape_with_one_child_is_the_chain(setting):
    lm, params, draft_params, tokens = setting
    found = drafts(lm)(params, draft_params, tokens, jnp.zeros((4, TOKENS + 2)))
    chain, one = found["chain"], found["one child"]
    assert chain.valid.all() and not one.valid[:, STEPS + 1 :].any()
    for name in ("tokens", "parents", "valid"):
        both = getattr(chain, name), getattr(one, name)[:, : STEPS + 1]
        np.testing.assert_array_equal(*both)
    np.testing.assert_array_equal(chain.parents, [[-1, 0, 1, 2]] * 4)
    np.testing.assert_array_equal(chain.tokens, found["sampled"].tokens)


def cape_by_hand(laws):
    """Path -> log-probability of all that the release would send of laws [M, V], and the counts."""
    scores, chain, total, counts = {}, (), 0.0, set()
    for law in laws:
        best = np.argsort(-law)
        first = np.exp(law[best[0]])
        count = int(np.select([first < x for x in (0.3, 0.6, 0.8)], [8, 6, 4], 2))
        scores |= {(*chain, int(x)): total + law[x] for x in best[:count]}
        chain, total = (*chain, int(best[0])), total + law[best[0]]
        counts.add(count)
    return scores, counts


def test_cape_is_the_chain_and_its_siblings(setting):
    """By the published counts where there is room; else the most probable nodes."""
    lm, params, draft_params, tokens = setting
    met, dropped = set(), 0
    for scale in (0.3, 0.5, 1.0):  # laws of different sharpness
        scaled = params | {"head": scale * params["head"]}
        found = drafts(lm)(scaled, draft_params, tokens, jnp.zeros((4, TOKENS + 2)))
        logits = np.asarray(found["sampled"].draft_logits, np.float64)[:, :STEPS]
        laws = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
        for row, law in enumerate(laws):
            scores, counts = cape_by_hand(law)
            assert sorted(paths_of(found["wide"], row)) == sorted(scores)
            kept = sorted(scores, key=lambda path, scores=scores: -scores[path])[:12]
            assert sorted(paths_of(found["cape"], row)) == sorted(kept)
            met, dropped = met | counts, dropped + len(scores) - len(kept)
    assert met == {8, 6, 4, 2} and dropped


def test_counts_by_confidence():
    """The table of the release, by tenths; a rule that does not fit is told."""
    tenths = [8, 8, 8, 6, 6, 6, 4, 4, 2, 2]
    best = np.linspace(0.01, 0.99, 50)
    laws = np.log(np.stack([best, 1 - best], -1))
    laws = np.concatenate([laws, np.full((50, 1), -np.inf)], -1).astype(np.float32)
    laws[:, 1:] = laws[:, 2:1:-1]  # only the largest one counts
    assert CAPE(jnp.asarray(laws)).tolist() == [tenths[int(x * 10 + 1e-6)] for x in best]
    assert CHAIN(jnp.asarray(laws)).tolist() == [1] * 50
    for bounds, counts in (((0.5, 0.3), (3, 2, 1)), ((0.5,), (3,)), ((0.5,), (3, 0))):
        with pytest.raises(ValueError, match="children: expected rising bounds"):
            Confidence(bounds, counts)


@pytest.mark.parametrize(("tree", "rule"), [("cape", TargetSample()), ("sampled", Rejection())])
def test_release_unreachable_sampling_branch(tree, rule):
    """The release cannot sample; here the joint law of three tokens is the target's.

    Two kinds of rows and two chi-square tests at 1e-5 in each of two cases: a false alarm with
    probability 8e-5. The seed is fixed.
    """
    lm, _ = sampling.target()
    drafter = drafter_of(lm, tree, nodes=8, depth=2)
    draft_params = {key: 0.2 * x for key, x in random_params(drafter).items()}
    counts, drafted, offered = sampling.count(drafter, rule, draft_params, 4)
    assert drafted > 0 and (offered > 0).all() and (counts[2] > 0).sum() == 1
    assert min(sampling.p_values(counts)) > 1e-5


def test_several_layers_are_told():
    lm, _ = tiny_target()
    with pytest.raises(ValueError, match="drafter.taps: expected one layer at most"):
        recipes.find("glide").network(lm.config, Shape(taps=(0, 1)))
    assert recipes.find("glide").network(lm.config, Shape(taps=(0,))).taps == (0,)
    network = recipes.find("glide").network(lm.config, Shape())
    assert network.taps == (1,) and VOCAB == network.vocab_size
    with pytest.raises(ValueError, match="taps: expected one target layer, found 2"):
        dataclasses.replace(network, taps=(0, 1))
