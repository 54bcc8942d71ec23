"""Trees larger than the vocabulary, or than what there is to draft, are cut, not refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import recipes
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.tree import topology
from ctc_spec_jax.tree.build import zipf_template
from ctc_spec_jax.tree.ctc_transform import default_template
from ctc_spec_jax.types import DraftContext, Sampling
from tests.helpers import make_request

WORDS, NODES, SLOTS = 3, 40, 9
LM = DecoderLM(
    DecoderConfig(
        vocab_size=WORDS,
        width=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_width=8,
        mlp_width=8,
    )
)
TREES = {
    "ctc": ("transform",),
    "diffusion": ("siblings",),
    "medusa": ("static",),
    "eagle": ("static",),
    "small_lm": ("siblings",),
}
"""Ways to build trees, beside the default one, that have several children of a node."""

CASES = [(name, tree) for name in recipes.RECIPES for tree in ("", *TREES.get(name, ()))]


@pytest.mark.parametrize(("name", "tree"), CASES)
def test_a_draft_of_many_nodes_over_few_words(name, tree):
    recipe = recipes.find(name)
    drafter = recipe.drafter(recipe.network(LM.config, Shape(layers=1, frames=2)), NODES, 2, tree)
    assert drafter.num_nodes <= NODES and drafter.max_depth <= 2
    lengths = jnp.asarray([1, 4], jnp.int32)

    def draft(key):
        params, own = LM.init(key), drafter.init_params(key)
        tokens = jnp.asarray(np.arange(2 * SLOTS + 2).reshape(2, -1) % WORDS, jnp.int32)
        cache, taps = LM.prefill(params, tokens[:, :4], lengths, SLOTS, drafter.taps)
        sampling = Sampling(temperature=np.ones((2,), np.float32))
        request = make_request(2, 4, sampling=sampling)
        context = DraftContext(params, tokens, lengths, cache, request)
        return drafter.propose(own, drafter.init(own, context, taps), context, request.keys)

    tree_shape = jax.eval_shape(draft, jax.random.key(0))
    assert tree_shape.tokens.shape == (2, drafter.num_nodes)
    if name == "ngram_pool":  # one that is run: its phrases are padded
        topology.check(jax.jit(draft)(jax.random.key(0)), drafter.max_depth)


def test_templates_have_no_more_nodes_than_paths():
    assert default_template(60, 1) == zipf_template(11, 1)
    assert default_template(64, 6, 3) == zipf_template(64, 6, 3)
    assert default_template(1000, 2, 3) == zipf_template(1 + 3 + 9, 2, 3)
