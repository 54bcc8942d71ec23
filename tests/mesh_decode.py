"""Decodes of a tiny pair on meshes of eight virtual devices, against one device.

Run by ``test_sharding.py`` in its own process, because the number of devices is fixed when jax
starts; prints one line of JSON per check.
"""

import dataclasses
import json
import os

from tests import XLA_FLAGS

os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")

from ctc_spec_jax import aot, decode, hlo, memory, options, sharding
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config
from ctc_spec_jax.engine import Engine, seed_keys
from ctc_spec_jax.models import kv_cache
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from ctc_spec_jax.types import RUNNING

VOCAB, BATCH = 64, 8
BUDGETS = [24, 7, 24, 1, 16, 24, 20, 24]


class Words:
    """The part of a tokenizer that token ids need."""

    pad_token_id, model_max_length = 0, 1 << 20

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


def engine_of(kv_heads: int) -> Engine:
    """Greedy texts that vary, and a drafter that learned nothing but is right at times."""
    shape = dict(num_heads=2 * kv_heads, num_kv_heads=kv_heads, head_width=8, mlp_width=48)
    lm = DecoderLM(DecoderConfig(vocab_size=VOCAB, width=32, num_layers=1, **shape))

    def enlarge(path, x):
        if x.ndim < 2:
            return x
        return x * (50.0 if "embedding" in str(path) or "head" in str(path) else 16.0)

    params = jax.tree_util.tree_map_with_path(enlarge, lm.init(jax.random.key(1)))
    drafter = CTCDrafter(ctc_config(lm.config, 1, 3, taps=(0,)), PrefixTree(4, 2, top_k=3))
    draft_params = drafter.init_params(jax.random.key(2))
    return Engine(lm, params, Words(), drafter, draft_params)


def on(mesh, engine: Engine) -> Engine:
    params, draft_params = (
        jax.device_put(tree, sharding.parameters(mesh, tree))
        for tree in (engine.params, engine.draft_params)
    )
    return dataclasses.replace(engine, params=params, draft_params=draft_params, mesh=mesh)


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, VOCAB, n).tolist() for n in (3, 9, 1, 5, 20, 2, 7, 12)]


def facts(answers) -> list:
    return [(a.tokens, a.rounds, a.emitted, a.finish, a.from_draft) for a in answers]


def report(**fields) -> None:
    print(json.dumps(fields), flush=True)


def compare(sizes: list[tuple[int, int, int]]) -> None:
    """Greedy answers of rows that differ in prompt and budget; the last mesh runs in chunks."""
    engine = engine_of(2)
    expected = facts(engine.generate(prompts(), BUDGETS))
    distinct = len({tuple(tokens) for tokens, *_ in expected})
    drafted = sum(sum(facts[-1]) for facts in expected)
    for size in sizes[:-1]:
        found = facts(on(sharding.make_mesh(*size), engine).generate(prompts(), BUDGETS))
        report(mesh=size, same=found == expected, distinct=distinct, drafted=drafted)
    tokens, placed = in_chunks(on(sharding.make_mesh(*sizes[-1]), engine))
    same = tokens == [tokens for tokens, *_ in expected]
    report(mesh=sizes[-1], same=same, distinct=distinct, drafted=drafted, placed=placed)


def in_chunks(engine: Engine) -> tuple[list[list[int]], bool]:
    """Answers of a state that is donated from call to call, and whether its caches lie right."""
    loop = engine.loop(max(BUDGETS))
    rows = options.per_row(BATCH, {"max_new_tokens": BUDGETS})
    request = engine.request(rows, seed_keys(0, BATCH))
    state = engine.run(decode.start, loop, *engine.encode(prompts()), request)
    while np.any(np.asarray(state.finish) == RUNNING):
        state = engine.run(decode.advance, loop, state, request, np.int32(5), donated=True)
    caches = (state.cache, state.drafter)
    places = sharding.inputs(engine.mesh, state)
    placed = jax.tree.map(
        lambda x, p: x.sharding.is_equivalent_to(p, x.ndim), caches, (places.cache, places.drafter)
    )
    found = jax.device_get(decode.output(loop, state))
    answers = zip(found.tokens, found.lengths, strict=True)
    return [row[:n].tolist() for row, n in answers], all(jax.tree.leaves(placed))


def traffic(fault: str = "") -> None:
    """What travels in a round on a mesh without ``fsdp``: activations, no caches, no weights."""
    engine = on(sharding.make_mesh(2, 1, 4), engine_of(4))
    loop = engine.loop(400)
    rows = options.per_row(BATCH, {"max_new_tokens": 24})
    request = engine.request(rows, seed_keys(0, BATCH))
    weights = engine.params, engine.draft_params
    state = jax.eval_shape(
        lambda *a: decode.start(loop, *a), *weights, *engine.encode(prompts()), request
    )
    places = sharding.inputs(engine.mesh, state)
    state = aot.abstract(state, places)
    caches = [x for x in jax.tree.leaves((state.cache, state.drafter)) if x.ndim == 4]
    jitted = jax.jit(decode.advance, static_argnums=0, donate_argnums=3)
    with jax.set_mesh(engine.mesh):
        compiled = jitted.lower(loop, *weights, state, request, jnp.int32(4)).compile()
    text = compiled.as_text()
    turn, rest = hlo.summary(text, aot.part_shapes(state))
    verified = hlo.collectives(i for i in hlo.parse(text) if "/verify/" in i.line)
    found = [part.collectives.get("all-gather", hlo.Traffic(0, 0)) for part in (turn, rest)]
    report(
        fault=fault,
        copies=turn.copies,
        gathered=max(t.bytes for t in found),
        winners=verified["all-gather"].bytes,
        reduced=turn.collectives["all-reduce"].count,
        cache=min(x.size * 4 for x in caches),
        aliased=compiled.memory_analysis().alias_size_in_bytes,
        state=memory.tree_bytes(state, places),
    )


def load() -> None:
    """The demo pair goes from its files to its places."""
    mesh = sharding.make_mesh(1, 2, 4)
    engine, plain = Engine.from_pretrained(mesh=mesh), Engine.from_pretrained()
    trees = [(e.params, e.draft_params) for e in (engine, plain)]
    places = sharding.parameters(mesh, trees[0])
    placed = jax.tree.map(lambda x, p: x.sharding == p, trees[0], places)
    same = jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), *trees)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(trees[0]))
    report(
        placed=all(jax.tree.leaves(placed)),
        same=all(jax.tree.leaves(same)),
        share=held / memory.tree_bytes(trees[0]),
    )


if __name__ == "__main__":
    compare([(8, 1, 1), (2, 2, 2), (1, 2, 4)])
    traffic()
    jax.clear_caches()
    kv_cache.current_mesh = lambda: None  # rows are written one by one, wherever they lie
    traffic("the partitioner writes the cache")
    load()
