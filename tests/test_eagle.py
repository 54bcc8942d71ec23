"""EAGLE: dynamic and static trees against a search through all paths; sampled rows.

Passes, loss and the cache after rounds are in ``test_sequential``.

Shape letters: B rows, M depth, N tree nodes, V vocabulary, D width.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import recipes
from ctc_spec_jax.draft.heads import log_probs
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.tree import topology
from ctc_spec_jax.tree.ctc_transform import default_template
from ctc_spec_jax.types import DraftContext
from ctc_spec_jax.verify import TargetSample
from ctc_spec_jax.verify_sampled import Rejection
from tests import test_sampling as sampling
from tests.helpers import VOCAB, make_request, ragged_prompts, tiny_target
from tests.test_heads import paths_of, random_params

DEPTH, NODES, TOKENS = 3, 24, 8
LENGTHS = np.asarray([3, 7, 0], np.int32)
EVERY = np.array(list(itertools.product(range(VOCAB), repeat=DEPTH)), np.int32)
"""Every path of three tokens."""


def drafter_of(lm, tree="", nodes=NODES, depth=DEPTH):
    recipe = recipes.find("eagle")
    return recipe.drafter(recipe.network(lm.config, Shape(frames=DEPTH)), nodes, depth, tree)


def enumerated(drafter, draft_params, params, tokens, taps, kv):
    """Log-probabilities [B, V^3, 3] of every path and its beginnings, by the pass of training."""
    shape = len(tokens), len(EVERY)
    index = jnp.broadcast_to(jnp.asarray(EVERY)[None], (*shape, DEPTH))
    anchors = jnp.broadcast_to(jnp.asarray(LENGTHS)[:, None], shape)
    pending = jnp.take_along_axis(tokens, anchors, axis=1)[..., None]
    known = jnp.concatenate([pending, index[..., :-1]], axis=-1)
    places = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32)[None], tokens.shape)
    batch = {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": places}
    outputs = drafter.outputs(draft_params, params, batch, taps, kv, anchors, known)
    laws = [log_probs(outputs[:, :, k], params["head"]) for k in range(DEPTH)]
    each = [jnp.take_along_axis(laws[k], index[..., k : k + 1], axis=-1) for k in range(DEPTH)]
    return jnp.cumsum(jnp.concatenate(each, axis=-1), axis=-1)


@pytest.fixture(scope="module")
def found():
    """Trees of every kind, and the log-probability of every path, by row."""
    lm, params = tiny_target(num_layers=1)
    params = params | {"head": 0.4 * params["head"]}  # laws less sharp
    exact = dataclasses.replace(drafter_of(lm), beam=0)
    every = {str(beam): dataclasses.replace(exact, beam=beam) for beam in (0, 1, 3)}
    every["static"] = drafter_of(lm, "static")
    draft_params = random_params(exact)
    tokens = ragged_prompts(5, [TOKENS - 2] * 3)[0]

    @jax.jit
    def program(params, draft_params, tokens):
        _, taps, kv = lm.hidden(params, tokens, LENGTHS, exact.taps)
        known = jnp.pad(tokens, ((0, 0), (0, DEPTH + 1)))
        context = DraftContext(params, known, jnp.asarray(LENGTHS), None, make_request(3, 1))
        state = exact.init(draft_params, context, taps)
        # No keys and no cache of the target: there is nothing to draw or to peek at.
        trees = {name: d.propose(draft_params, state, context, None) for name, d in every.items()}
        return trees, enumerated(exact, draft_params, params, tokens, taps, kv)

    trees, scores = jax.device_get(program(params, draft_params, tokens))
    rows = []
    for score in scores:
        of: dict[tuple[int, ...], float] = {}
        for path, values in zip(EVERY.tolist(), score, strict=True):
            of |= {tuple(path[: k + 1]): float(value) for k, value in enumerate(values)}
        rows.append(of)
    return trees, rows


def children(of, path):
    """Of a path, by falling log-probability."""
    return sorted(((*path, x) for x in range(VOCAB)), key=lambda child: -of[child])


def best(of, paths, count: int):
    return sorted(paths, key=lambda path: -of[path])[:count]


def searched(of, beam: int):
    """The tree of EAGLE-2 by hand: per depth continue the best, in the end keep the best of all."""
    level, candidates = [()], []
    for _ in range(DEPTH):
        new = [child for path in level for child in children(of, path)]
        candidates += new
        level = best(of, new, beam)
    return best(of, candidates, NODES - 1)


def test_dynamic_tree_is_the_most_probable_one(found):
    """A full search finds the N - 1 most probable of all paths."""
    trees, rows = found
    topology.check(trees["0"], DEPTH, vocab_size=VOCAB)
    assert trees["0"].draft_logits is None
    for row, of in enumerate(rows):
        expected = best(of, of, NODES - 1)
        assert sorted(paths_of(trees["0"], row)) == sorted(expected)
        assert {len(path) for path in expected} == {1, 2, 3}


def test_dynamic_tree_continues_the_best_paths(found):
    """A narrow search is that of the paper, and loses nodes that a full one finds."""
    trees, rows = found
    lost = 0
    for beam in (1, 3):
        for row, of in enumerate(rows):
            expected = searched(of, beam)
            assert sorted(paths_of(trees[str(beam)], row)) == sorted(expected)
            lost += set(expected) != set(best(of, of, NODES - 1))
    assert lost


def test_static_tree_is_that_of_its_ranks(found):
    """The node of ranks r_1, r_2 is the r_2-th best child of the r_1-th best one."""
    trees, rows = found
    template = default_template(NODES, DEPTH)
    assert trees["static"].valid.all()
    for row, of in enumerate(rows):
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, template.num_nodes):
            ranked = children(of, paths[template.parents[node]])
            paths.append(ranked[template.ranks[node]])
        assert paths_of(trees["static"], row) == paths[1:]


@pytest.mark.parametrize(("tree", "rule"), [("dynamic", TargetSample()), ("sampled", Rejection())])
def test_joint_law_of_sampled_rows(tree, rule):
    """Of three tokens, both kinds of rows: two chi-square tests of each at 1e-5 in two cases."""
    lm, _ = sampling.target()
    drafter = drafter_of(lm, tree, nodes=8, depth=2)
    draft_params = {key: 0.2 * x for key, x in random_params(drafter).items()}
    counts, drafted, offered = sampling.count(drafter, rule, draft_params, 4)
    assert drafted > 0 and (offered > 0).all() and (counts[2] > 0).sum() == 1
    assert min(sampling.p_values(counts)) > 1e-5


def test_layers_and_trees_by_default():
    target = DecoderConfig(
        9, 4, num_layers=10, num_heads=1, num_kv_heads=1, head_width=2, mlp_width=2
    )
    recipe = recipes.find("eagle")
    network = recipe.network(target, Shape(frames=8))
    assert network.taps == (2, 4, 9) and network.steps == 8
    assert recipe.network(target, Shape(taps=(9,))).taps == (9,)
    drafter = recipe.drafter(network, 16, 8, "")
    assert (drafter.num_nodes, drafter.max_depth, drafter.beam) == (16, 8, 10)
    assert recipe.drafter(network, 3, 8, "").max_depth == 2
    static = recipe.drafter(network, 16, 4, "static")
    with pytest.raises(ValueError, match="template: expected 17 nodes of depth"):
        dataclasses.replace(static, num_nodes=17)
    assert functools.reduce(max, static.template.depths) == static.max_depth
