"""Draft and target on devices of their own, working at the same time; see ``overlap``.

The host drives: a round is three programs, draft on one group, score and judge on the other, which
it launches without waiting for any of them. What travels is small: the drafter's tokens and, where
it states them, their laws; back the next root, the length and what is pending.

Shape letters: B batch, T prompt tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ctc_spec_jax import decode, sharding, xla
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.overlap import Chain, Overlapped, Seen, judge, look, nothing_pending, score
from ctc_spec_jax.types import (
    RUNNING,
    DecodeState,
    DraftContext,
    GenerateOutput,
    Params,
    Request,
    TargetOutput,
)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Devices of the target and devices of the drafter, each a mesh of ``sharding.make_mesh``."""

    target: Mesh
    draft: Mesh

    def __post_init__(self):
        """Refuse a device in both.

        Raises:
          InputError: there is one.
        """
        both = {*self.target.devices.flat} & {*self.draft.devices.flat}
        if both:
            names = ", ".join(sorted(map(str, both)))
            raise InputError(f"groups: expected devices of their own, found {names} in both")


def decode_on(
    groups: Groups,
    loop: Loop,
    params: Params,
    draft_params: Params,
    prompt_tokens,
    prompt_lengths,
    request: Request,
) -> GenerateOutput:
    """``decode.decode`` on two groups of devices; the same tokens.

    Whether rows are still running the host asks one round late, so that no device waits for it;
    the round too many changes nothing.

    Args:
      groups: of devices; the parameters must lie there, as ``sharding.parameters`` says.
      loop: its drafter is an ``AheadDrafter``.
      params: of the target.
      draft_params: of the drafter.
      prompt_tokens: int32 [B, T], right-padded.
      prompt_lengths: int32 [B], at least 1.
      request: what every row asks for.

    Raises:
      InputError: a drafter that cannot work ahead.
    """
    if not hasattr(loop.drafter, "ahead"):
        raise InputError("groups: expected a drafter that works ahead of the target, found another")
    ours, theirs = groups.target, groups.draft
    prompts = (prompt_tokens, prompt_lengths)
    asked, asked_there = (_put(mesh, request) for mesh in (ours, theirs))
    cache = _on(theirs, _begin_draft, loop, draft_params, *_put(theirs, prompts))
    state, seen, running = _on(ours, _begin, loop, params, *_put(ours, prompts), asked)
    while True:
        told = (cache, _put(theirs, seen), asked_there)
        drafts, cache = _on(theirs, _draft, loop, draft_params, *told, donated=2)
        scored = _on(ours, score, loop, params, state)
        was_running, drafts = running, _put(ours, drafts)
        state, seen, running = _on(ours, _judge, loop, state, asked, scored, drafts, donated=1)
        if not np.asarray(was_running):
            return _on(ours, decode.output, loop, state)


@dataclasses.dataclass(frozen=True)
class _Elsewhere:
    """A drafter whose cache lies on other devices."""

    drafter: Any
    vocab_size: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def init(self, params: Params, context: DraftContext, taps) -> Overlapped:
        """Nothing is pending."""
        del params, taps
        laws_of = self.vocab_size if self.drafter.states_law else 0
        batch = context.length.shape[0]
        return Overlapped((), nothing_pending(batch, self.drafter.max_depth, laws_of))


def _begin(loop: Loop, params: Params, tokens, lengths, request: Request):
    there = _Elsewhere(loop.drafter, loop.target.vocab_size)
    loop = dataclasses.replace(loop, drafter=there)
    state = decode.start(loop, params, (), tokens, lengths, request)
    return state, *_news(state, request)


def _begin_draft(loop: Loop, draft_params: Params, tokens, lengths):
    drafter: Any = loop.drafter
    return drafter.prefill(draft_params, tokens, lengths - 1, loop.num_slots(tokens.shape[1]))


def _draft(loop: Loop, draft_params: Params, cache, seen: Seen, request: Request):
    drafter: Any = loop.drafter
    return drafter.ahead(draft_params, cache, seen, request)


def _judge(loop: Loop, state: DecodeState, request: Request, scored: TargetOutput, drafts: Chain):
    state = judge(loop, state, request, scored, drafts)
    return state, *_news(state, request)


def _news(state: DecodeState, request: Request) -> tuple[Seen, jax.Array]:
    """What the next round of the drafter starts from, and whether rows are still running."""
    return look(state, request), jnp.any(state.finish == RUNNING)


def _put(mesh: Mesh, argument):
    """A request or arrays of rows on a mesh; does not wait."""
    return jax.device_put(argument, sharding.inputs(mesh, argument))


def _on(mesh: Mesh, function: Callable, loop: Loop, *arguments: Any, donated: int = 0) -> Any:
    """Launch a jitted function on a mesh, where its arguments lie; does not wait."""
    compiled = xla.jitted(function, *([donated] if donated else []))
    with jax.set_mesh(mesh):
        return compiled(loop, *arguments)
