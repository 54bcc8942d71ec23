"""Lossless acceleration of LLM decoding in JAX: every round is one pass of the target.

    draft/  ------------>  verify.py  ------------>  accept.py
    a tree of cheap        which path the target     write tokens and cache rows,
    continuations          would have taken itself   apply stops and budgets
       ^                                                  |
       +---------------- decode.py: lax.while_loop -------+

``Engine`` loads a target and a drafter and decodes; ``decode.decode`` is the loop itself, pure
and jittable. The embedded demo pair is loaded by ``Engine.from_pretrained()``.
"""

from ctc_spec_jax.decode import Loop, NoDraft
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.generation import Generation
from ctc_spec_jax.options import Options
from ctc_spec_jax.streaming import Conversation, Piece
from ctc_spec_jax.types import (
    Acceptance,
    DraftTree,
    GenerateOutput,
    Request,
    Sampling,
    TargetOutput,
)
from ctc_spec_jax.verify import Greedy, TargetSample, Typical
from ctc_spec_jax.verify_sampled import Block, Mixed, MultiCandidate, Rejection

__all__ = [
    "Acceptance",
    "Block",
    "Conversation",
    "DraftTree",
    "Engine",
    "GenerateOutput",
    "Generation",
    "Greedy",
    "InputError",
    "Loop",
    "Mixed",
    "MultiCandidate",
    "NoDraft",
    "Options",
    "Piece",
    "Rejection",
    "Request",
    "Sampling",
    "TargetOutput",
    "TargetSample",
    "Typical",
]
