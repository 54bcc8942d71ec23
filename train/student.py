"""A drafter that learns from the answers that it has just helped to write.

Online Speculative Decoding (Liu et al. 2024, arXiv 2310.07177, ICML 2024). Its weights change
between requests only, and every verification rule is told the law that the drafts of its own round
were drawn from, so the answers stay those of the target, greedy or sampled. Differences from the
release: see ``replay``; the target's law is computed in the step of the update, from the stored
tokens, and not kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ctc_spec_jax import sharding
from ctc_spec_jax.draft.training import DraftLoss
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.generation import Generation
from ctc_spec_jax.types import Params
from train import replay, step


@dataclasses.dataclass
class Tally:
    """Counts of a window of requests."""

    requests: int = 0
    tokens: int = 0
    rounds: int = 0
    kept: int = 0
    tried: int = 0

    def add(self, answer: Generation) -> None:
        """Count one answer."""
        self.requests += 1
        self.tokens += len(answer.tokens)
        self.rounds += answer.rounds
        self.kept += sum(answer.from_draft)
        self.tried += sum(answer.from_draft) + sum(answer.refused)

    def numbers(self) -> dict[str, float]:
        """``accepted_length``: tokens per target pass, bonus included; ``acceptance``: the share of
        places where a draft was tried at which it was kept."""
        return {
            "accepted_length": self.tokens / max(1, self.rounds),
            "acceptance": self.kept / max(1, self.tried),
        }


class School:
    """The jitted parts that all students of one engine share.

    Args:
      engine: with a drafter of float32 parameters; they are where every student begins.
      loss: of the drafter's method.
      update: the optimiser.
      every: requests from update to update.
      rows: of the ring of answers, at least ``every``.
      length: of a row, the longest prompt with its answer.
      everywhere: learn from all tokens of the answers, else from failed drafts alone.
      seed: of what a loss draws.
    """

    def __init__(
        self,
        engine: Engine,
        loss: DraftLoss,
        update: optax.GradientTransformation,
        every: int,
        rows: int,
        length: int,
        everywhere: bool = False,
        seed: int = 0,
    ):
        self.engine, self.update, self.every, self.length = engine, update, every, length
        one = {"data": 1, "fsdp": 1, "tensor": 1}
        self.mesh = engine.mesh or sharding.make_mesh(**one, devices=jax.devices()[:1])
        self.key, self.rows = jax.random.key(seed), rows
        self.step = step.make_step(loss, update, self.mesh)
        self.store = jax.jit(replay.store)
        self.batch = jax.jit(functools.partial(replay.batch_of, everywhere=everywhere))
        dtype = engine.params["embedding"].dtype
        self.cast = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(dtype), params))

    def fresh_state(self) -> dict[str, Any]:
        """What a student knows and remembers before its first request."""
        # Copies, because a step gives the arrays of its state away.
        params = jax.tree.map(jnp.copy, self.engine.draft_params)
        state = step.init_state(params, self.update, 0.0)
        state |= {"replay": replay.empty(self.rows, self.length)}
        return jax.device_put(state, sharding.parameters(self.mesh, state))


class Student:
    """One drafter in service.

    ``state`` holds its parameters, optimiser, number of updates and ring of answers; ``served`` how
    many requests it has had. Together they are all there is to save.
    """

    def __init__(self, school: School, state: dict[str, Any] | None = None, served: int = 0):
        self.school, self.served = school, served
        self.state = school.fresh_state() if state is None else state
        self._params = school.cast(self.state["params"])

    @property
    def params(self) -> Params:
        """Of the drafter, float32."""
        return self.state["params"]

    def serve(self, prompt: Sequence[int], **fields: Any) -> tuple[Generation, dict[str, Any]]:
        """Answer a prompt, remember the answer, and learn where it is time to.

        Args:
          prompt: token ids.
          **fields: of ``Engine.generate``.

        Returns:
          The answer, and metrics of the update, if there was one; see ``learn``.
        """
        school = self.school
        engine = dataclasses.replace(school.engine, draft_params=self._params)
        answer = engine.generate([prompt], **fields)[0]
        row = replay.row_of(prompt, answer, school.length)
        self.state["replay"] = school.store(self.state["replay"], row)
        self.served += 1
        return answer, {} if self.served % school.every else self.learn()

    def learn(self) -> dict[str, Any]:
        """One update on the stored answers; the next request sees its weights.

        Returns:
          ``loss``, ``gradient_norm`` and the metrics of the method's loss.
        """
        school, kept = self.school, self.state["replay"]
        trained = {name: x for name, x in self.state.items() if name != "replay"}
        with jax.set_mesh(school.mesh):
            batch = jax.device_put(school.batch(kept), step.batch_sharding(school.mesh))
            trained, metrics = school.step(trained, school.engine.params, batch, school.key)
        self.state = trained | {"replay": kept}
        self._params = school.cast(trained["params"])
        return metrics
