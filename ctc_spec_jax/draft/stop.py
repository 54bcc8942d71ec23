"""When a drafter that draws one token after another stops.

A rule looks at the law of the next token before that token is drawn, never at the draw: a proposal
that were dropped for its own sampled value would change the law of what is emitted.

Shape letters: B batch, L nodes of one depth, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ctc_spec_jax.types import pytree


class StopRule(Protocol):
    """A frozen dataclass; its state has one entry per row."""

    def init(self, batch: int) -> Any:
        """State before the first round."""
        ...

    def goes_on(self, state: Any, logits) -> jax.Array:
        """bool [B, L]: whether children are drawn, from the softmax of ``logits`` [B, L, V]."""
        ...

    def update(self, state: Any, accepted, drafted, depth: int) -> Any:
        """State after a round.

        Args:
          state: before it.
          accepted: int32 [B], drafted tokens that were kept.
          drafted: int32 [B], drafted tokens on the longest path; 0 leaves the row's state alone.
          depth: most tokens that can be drafted.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Never:
    """Always draft as deep as it goes."""

    def init(self, batch: int) -> Any:
        """No state."""
        del batch
        return ()

    def goes_on(self, state: Any, logits) -> jax.Array:
        """True everywhere."""
        del state
        return jnp.ones(logits.shape[:2], bool)

    def update(self, state: Any, accepted, drafted, depth: int) -> Any:
        """No state."""
        del accepted, drafted, depth
        return state


@dataclasses.dataclass(frozen=True)
class MaxProb(Never):
    """Stop where the likeliest next token is less likely than ``threshold``."""

    threshold: float = 0.4

    def goes_on(self, state: Any, logits) -> jax.Array:
        """See ``StopRule``."""
        del state
        return jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1) >= self.threshold


@pytree
class AdaEDLState:
    """What AdaEDL remembers of every row."""

    rate: jax.Array  # float32 [B], running acceptance rate
    threshold: jax.Array  # float32 [B], least bound that goes on


@dataclasses.dataclass(frozen=True)
class AdaEDL:
    """Stop where ``1 - sqrt(gamma H)`` falls below a threshold that follows the acceptance rate.

    H is the entropy, in nats, of the law that the next token is drawn from; a greedy row's is that
    of its law without temperature. With a of d drafted tokens accepted, ``rate <- rate_decay rate
    + (1 - rate_decay) a / d``; then the threshold moves towards ``threshold + step`` if the rate is
    below ``target``, else towards ``threshold - step`` unless the draft was as deep as can be and
    was accepted whole. (AdaEDL: Agrawal et al. 2024, arXiv 2410.18351; it leaves the first
    threshold open.)
    """

    gamma: float = 0.2
    target: float = 0.9
    first_threshold: float = 0.5
    rate_decay: float = 0.5
    threshold_decay: float = 0.9
    step: float = 0.01

    def init(self, batch: int) -> AdaEDLState:
        """A rate at its target and the first threshold."""
        return AdaEDLState(
            jnp.full((batch,), self.target, jnp.float32),
            jnp.full((batch,), self.first_threshold, jnp.float32),
        )

    def goes_on(self, state: AdaEDLState, logits) -> jax.Array:
        """See ``StopRule``."""
        # Rounding may take the entropy of a point mass below 0, which has no root.
        bound = 1 - jnp.sqrt(self.gamma * jnp.maximum(entropy(logits), 0.0))
        return bound >= state.threshold[:, None]

    def update(self, state: AdaEDLState, accepted, drafted, depth: int) -> AdaEDLState:
        """See ``StopRule``."""
        share = accepted.astype(jnp.float32) / jnp.maximum(drafted, 1).astype(jnp.float32)
        rate = self.rate_decay * state.rate + (1 - self.rate_decay) * share
        down = jnp.where(accepted == depth, 0.0, -self.step)
        goal = state.threshold + jnp.where(rate < self.target, self.step, down)
        keep = self.threshold_decay
        threshold = keep * state.threshold + (1 - keep) * goal
        return AdaEDLState(
            jnp.where(drafted > 0, rate, state.rate),
            jnp.where(drafted > 0, threshold, state.threshold),
        )


def entropy(logits) -> jax.Array:
    """Entropy in nats, float [...], of the softmax of ``logits`` [..., V]; -inf has no mass."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    terms = jnp.where(probs > 0, probs * log_probs, 0.0)  # 0 * -inf is NaN
    return -jnp.sum(terms, axis=-1)
