"""Where the time of a round goes: draft, tree, verify, accept, in separately jitted parts.

Every part runs many times within one program, each time waiting for the one before, so that the
cost of starting a program is left out. The whole round is also timed with its own tree handed to
it for nothing: what is then missing is the drafter's. Medians of turns; see ``rounds.in_turns``.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax import decode, xla
from ctc_spec_jax import logits as processing
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.engine import Engine, Prompts
from ctc_spec_jax.tree import topology
from ctc_spec_jax.types import (
    NO_PARENT,
    DecodeState,
    DraftContext,
    Drafter,
    DraftTree,
    Params,
    Request,
)
from infer import roofline
from infer.rounds import PROMPT, ROUNDS, in_turns, round_state, round_timer

_MOMENTS = 4
"""States of a decode from which proposals are timed."""


@dataclasses.dataclass(frozen=True)
class _GivenTree:
    """The drafter that costs nothing: the same tree, its parameters, in every round."""

    max_depth: int
    num_nodes: int
    taps: tuple[int, ...]

    def init(self, params: Params, context: DraftContext, taps) -> Any:
        """No state."""
        return ()

    def propose(self, params: Params, state: Any, context: DraftContext, keys) -> DraftTree:
        """See ``types.Drafter``; waits for the round before so that nothing is hoisted."""
        return _moved(params, jnp.minimum(context.length, 0)[:, None])

    def commit(self, params: Params, state: Any, context, output, acceptance) -> Any:
        """No state."""
        return state


def _moved(tree: DraftTree, zero) -> DraftTree:
    """The tree; XLA cannot know that the number added to it is 0."""
    return dataclasses.replace(tree, tokens=tree.tokens + zero, parents=tree.parents + zero)


def _zero_of(*arrays) -> Any:
    """0, once these arrays are there: their numbers are above -5, which XLA cannot know."""
    return sum(jnp.minimum(jnp.min(x.astype(jnp.int32)) + 5, 0) for x in arrays)


def _propose(loop, params, draft_params, state: DecodeState, request: Request, zero=0, index=0):
    keys = jax.vmap(jax.random.fold_in, (0, None))(request.keys, index)
    context = DraftContext(params, state.tokens, state.length + zero, state.cache, request)
    tree = loop.drafter.propose(draft_params, state.drafter, context, keys)
    return tree if _states_law(loop.drafter) else dataclasses.replace(tree, draft_logits=None)


def _states_law(drafter: Drafter) -> bool:
    """Whether the rule needs the law; where it does not, the program of a round leaves it out."""
    return getattr(drafter, "states_law", False)


def _proposals(loop, params, draft_params, state: DecodeState, request: Request):
    def step(index, carry):
        zero, held = carry
        held = jax.tree.map(lambda x: _written(x, zero), held)
        drafter, tokens = held
        now = dataclasses.replace(state, drafter=drafter, tokens=tokens)
        tree = _propose(loop, params, draft_params, now, request, zero, index)
        return _zero_of(tree.tokens, tree.parents, tree.valid), held

    start = jnp.int32(0), (state.drafter, state.tokens)
    return jax.lax.fori_loop(0, ROUNDS, step, start)[0]


def _written(x, zero):
    """``x`` with 0 added to one number: what reads it cannot move out of a loop."""
    if not jnp.issubdtype(x.dtype, jnp.number) or not x.size:
        return x
    start = (0,) * x.ndim
    first = jax.lax.dynamic_slice(x, start, (1,) * x.ndim)
    return jax.lax.dynamic_update_slice(x, first + zero.astype(x.dtype), start)


def _moments(loop, params, draft_params, state: DecodeState, request: Request):
    """States of a decode, the first of which is ``state``, a few rounds apart."""
    found, advance = [state], xla.jitted(decode.advance)
    for _ in range(_MOMENTS - 1):
        rounds = np.int32(ROUNDS // _MOMENTS)
        found.append(advance(loop, params, draft_params, found[-1], request, rounds))
    return found


def _shapes(loop, params, tree: DraftTree, state: DecodeState, request: Request):
    def step(index, zero):
        _, _, depth, mask = _shape(loop, _moved(tree, zero))
        return _zero_of(depth, mask)

    return jax.lax.fori_loop(0, ROUNDS, step, jnp.int32(0))


def _shape(loop, tree: DraftTree):
    lineage = topology.lineages(tree, loop.drafter.max_depth)
    return tree, lineage, *topology.shape_of(tree, lineage)


def _verifications(loop, params, tree: DraftTree, state: DecodeState, request: Request):
    target, drafter = loop.target, loop.drafter

    def step(index, zero):
        mine, lineage, depth, mask = _shape(loop, _moved(tree, zero))
        length = state.length
        result = target.forward_tree(
            params, state.cache, length, mine.tokens, length[:, None] + depth, mask, drafter.taps
        )
        before = processing.prefixes(state, request, mine, lineage)
        laws = processing.NodeLaws(result.logits, request, state.known, before)
        keys = jax.vmap(jax.random.fold_in, (0, None))(request.keys, index)
        kept = loop.verifier(keys, mine, depth, mask, laws, drafter.max_depth)
        return _zero_of(kept.path, kept.length, kept.next_token)

    return jax.lax.fori_loop(0, ROUNDS, step, jnp.int32(0))


def _timer(function: Callable, *arguments: Any) -> Callable[[], float]:
    compiled = xla.jitted(function)

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return (time.perf_counter() - began) / ROUNDS

    run()  # compiles
    return run


def _chain(loop: Loop, state: DecodeState) -> DraftTree:
    shape = (len(state.length), loop.drafter.max_depth + 1)
    zeros = jnp.zeros(shape, jnp.int32)
    parents = zeros + jnp.arange(shape[1], dtype=jnp.int32)[None] + NO_PARENT
    law = None
    if _states_law(loop.drafter):
        law = jnp.zeros((*shape, loop.target.vocab_size), jnp.float32)
    return DraftTree(zeros, parents, jnp.ones(shape, bool), law)


def time_split(
    engine: Engine, batch: int, fields: dict[str, Any], repeats: int, prompts: Prompts | None = None
) -> dict[str, float]:
    """Seconds of the parts of a round.

    ``draft``: the drafter's proposal, its tree included, the mean of some places of an answer;
    ``tree``: ancestors, depths and mask; ``verify``: target pass, law and rule; ``accept``: tokens,
    cache rows, stops; ``update``: the drafter's own state; ``round``: all of it in one program,
    timed by itself; ``plain_step``: a round without a draft. ``accept`` and ``update`` are
    differences, 0 where noise is larger.

    Where a drafter has a round of its own, which drafts while the target works, ``draft`` is what
    that round takes longer than one of a given chain as long as its drafts, and ``update`` is 0.

    Args:
      engine: target and drafter.
      batch: B.
      fields: of ``Options``.
      repeats: turns of every program.
      prompts: B of them. What a drafter does may depend on how easy the text is to guess; after
        made-up ones, those of None, many give up at once.

    Raises:
      InputError: the target has too few positions for the rounds that are timed.
    """
    loop, params, state, request = round_state(engine, batch, fields, prompts)
    drafter, inputs = engine.drafter, (loop, *params, state, request)
    own_round = hasattr(drafter, "run_round")
    tree = _chain(loop, state) if own_round else xla.jitted(_propose)(*inputs)
    given = dataclasses.replace(
        engine,
        drafter=_GivenTree(drafter.max_depth, tree.tokens.shape[1], drafter.taps),
        draft_params=tree,
    )
    timers = {
        "plain_step": round_timer(engine.plain(), batch, fields, prompts),
        "round": round_timer(engine, batch, fields, prompts),
        "given": round_timer(given, batch, fields, prompts),
        "tree": _timer(_shapes, loop, params[0], tree, state, request),
        "verify": _timer(_verifications, loop, params[0], tree, state, request),
    }
    if not own_round:
        places = _moments(*inputs)
        turns = [_timer(_proposals, loop, *params, place, request) for place in places]
        timers["draft"] = lambda: statistics.fmean(turn() for turn in turns)
    seconds = in_turns(timers, repeats)
    free, verify = seconds.pop("given"), seconds["verify"]
    more = max(0.0, seconds["round"] - free)
    draft = seconds.get("draft", more)
    return seconds | {
        "draft": draft,
        "verify": max(0.0, verify - seconds["tree"]),
        "accept": max(0.0, free - verify),
        "update": max(0.0, more - draft),
    }


def works(
    engine: Engine, batch: int, prompts: Prompts | None = None
) -> dict[str, dict[str, float]]:
    """Bytes and operations of the target passes in ``verify`` and ``plain_step``, by arithmetic.

    Arguments as in ``time_split``.
    """
    width = xla.bucket(PROMPT) if prompts is None else engine.encode(prompts)[0].shape[1]
    found = {
        "plain_step": _target_work(engine.plain(), batch, width),
        "verify": _target_work(engine, batch, width),
    }
    return {name: dataclasses.asdict(work) for name, work in found.items()}


def _target_work(engine: Engine, batch: int, width: int) -> roofline.Work:
    depth = engine.drafter.max_depth + 1
    nodes = depth if hasattr(engine.drafter, "run_round") else engine.drafter.num_nodes
    slots = engine.loop(xla.bucket(ROUNDS * depth)).num_slots(width)
    return roofline.target_work(engine.lm.config, engine.params, batch, nodes, slots)


def drafter_cost(split: dict[str, float]) -> float:
    """Time of the drafter in plain steps."""
    return (split["draft"] + split["update"]) / split["plain_step"]
