"""What drafters have in common that predict from one hidden state: head k, the k-th next token.

The hidden state is that of the newest committed token, the one before the pending token: the
residual stream after the last layer (the tap), normed by the target's own final norm, frozen, so
the input of the target's LM head. The target's LM head made the pending token from it; head 1
predicts the token after that. Where nothing is committed (a prompt of one token) it is zeros.

Heads run in sequence. Head k is given the token before the one it predicts: the pending token for
head 1, the drafted token at depth k-1 for head k. A method uses those tokens or ignores them.

Shape letters: B batch, X drafts in parallel (paths or anchors), K heads, V vocabulary, D width of
the target, E width of a head's output, W paths of a level.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import layers
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import fresh_params, output_head
from ctc_spec_jax.sharding import HIDDEN, constrain, gather_width
from ctc_spec_jax.tree import best_paths
from ctc_spec_jax.types import Acceptance, DraftContext, DraftTree, Params, TargetOutput


class HeadsNetwork(Protocol):
    """A Linen module of K heads; all arrays have the axes B, X before those named here.

    Its parameters are made in ``setup``; a call is ``start``.
    """

    def start(self, feature):
        """What head 1 reads of the hidden state [D]."""
        ...

    def step(self, head: int, carry, tokens, table):
        """Head number ``head``, from 0.

        Args:
          head: static.
          carry: of ``start``, or of the head before.
          tokens: int32 [], the token before the one that is predicted.
          table: the target's embedding [V, D].

        Returns:
          What the next head reads, and this head's output [E].
        """
        ...

    def output(self, target_params: Params):
        """LM head [E, V] of all heads, or one for each [K, E, V]."""
        ...


@dataclasses.dataclass(frozen=True)
class HeadsDrafter:
    """The ``Drafter`` but for its network: trees of the most probable paths under the heads.

    ``config`` has ``width``, ``vocab_size``, ``heads``, ``taps`` and ``norm_eps``. ``beam`` paths
    are kept per level at most; 0 keeps as many as the most probable tree needs. The tree is a
    function of the context, so it states no law: verify it with ``Greedy`` or ``TargetSample``.
    State: the hidden state of the newest committed token [B, D].
    """

    config: Any
    num_nodes: int
    max_depth: int
    beam: int = 0

    def __post_init__(self):
        most = min(self.config.heads, self.num_nodes - 1)
        if not 1 <= self.max_depth <= most:
            raise ValueError(f"max_depth: expected 1 to {most}, found {self.max_depth}")

    @property
    def taps(self) -> tuple[int, ...]:
        """The target layer whose output is read."""
        return self.config.taps

    @property
    def network(self) -> Any:
        """The Linen module that owns the parameters, a ``HeadsNetwork``."""
        raise NotImplementedError

    def init_params(self, key) -> Params:
        """Fresh float32 parameters. ``key`` is consumed."""
        c = self.config
        return fresh_params(self.network, key, jnp.zeros((1, 1, c.width)))

    def feature(self, target_params: Params, tap):
        """What the heads read of a tap [..., D]: the input of the target's LM head."""
        return layers.rms_norm(tap, target_params["norm"], self.config.norm_eps)

    def outputs(self, params: Params, target_params: Params, feature, tokens):
        """Outputs of the heads where the text is known, for training.

        Args:
          params: of the drafter.
          target_params: of the target.
          feature: [B, X, D], of the token before each pending one; see ``feature``.
          tokens: int32 [B, X, K], the pending token and the K-1 tokens after it.

        Returns:
          [B, X, K, E].
        """
        carry, found = self._apply(params, "start", feature), []
        for head in range(tokens.shape[-1]):
            given = (head, carry, tokens[..., head], target_params["embedding"])
            carry, output = self._apply(params, "step", *given)
            found.append(output)
        return jnp.stack(found, axis=2)

    def output_head(self, params: Params, target_params: Params):
        """LM head [E, V] of all heads, or one for each [K, E, V]."""
        return self._apply(params, "output", target_params)

    def init(self, params: Params, context: DraftContext, taps):
        """Hidden state of the prompt; see ``types.Drafter``."""
        del params
        last = jnp.maximum(context.length - 1, 0)[:, None, None]
        newest = jnp.take_along_axis(taps[0], last, axis=1)[:, 0]
        newest = self.feature(context.params, newest)
        return jnp.where((context.length > 0)[:, None], newest, 0)

    def propose(self, params: Params, state, context: DraftContext, keys) -> DraftTree:
        """One pass of a head per depth, for all paths of the level above; deterministic."""
        del keys
        levels = [jax.vmap(best_paths.root)(context.pending)]
        head = self.output_head(params, context.params)
        carry = self._apply(params, "start", state[:, None])
        for depth in range(self.max_depth):
            given = (depth, carry, levels[-1].token, context.params["embedding"])
            carry, output = self._apply(params, "step", *given)
            law = log_probs(output, head_of(head, depth))
            width = self.num_nodes - 1 - depth
            width = min(width, self.beam) if self.beam else width
            expand = jax.vmap(lambda level, law, width=width: best_paths.expand(level, law, width))
            levels.append(expand(levels[-1], law))
            parent = levels[-1].parent[..., None]
            carry = jax.tree.map(lambda x, at=parent: jnp.take_along_axis(x, at, axis=1), carry)
        return DraftTree(*jax.vmap(lambda x: best_paths.select(x, self.num_nodes))(levels))

    def commit(
        self,
        params: Params,
        state,
        context: DraftContext,
        output: TargetOutput,
        acceptance: Acceptance,
    ):
        """Hidden state of the last accepted node; see ``types.Drafter``."""
        del params, state
        last = jnp.maximum(acceptance.length - 1, 0)[:, None]
        node = jnp.take_along_axis(acceptance.path, last, axis=1)
        newest = jnp.take_along_axis(output.taps[0], node[..., None], axis=1)[:, 0]
        return self.feature(context.params, newest)

    def _apply(self, params: Params, method: str, *args) -> Any:
        return self.network.apply({"params": params}, *args, method=method)


def log_probs(output, head):
    """Log-probabilities [B, X, V] float32 of a head's output [B, X, E] by its LM head [E, V]."""
    return jax.nn.log_softmax(layers.project(output, head, jnp.float32), axis=-1)


def head_of(heads, index: int):
    """LM head [E, V] of one head, of [E, V] for all of them or [K, E, V]."""
    return heads[index] if heads.ndim == 3 else heads


def residual_blocks(x, kernels, biases):
    """``x + silu(x W + b)``, once for each of W [L, D, D] and b [L, D]; x [B, X, D]."""
    for kernel, bias in zip(kernels, biases, strict=True):
        x = x + gather_width(jax.nn.silu(layers.linear(x, kernel, bias)))
    return constrain(x, HIDDEN)


def own_or_shared(own, target_params: Params):
    """A method's own LM heads [K, D, V], or the target's [D, V], frozen, where they are None."""
    return output_head(target_params) if own is None else own


def last_tap(target: DecoderConfig, shape: Shape, preset: str) -> tuple[int, ...]:
    """The layer that heads read: the one of the experiment, the last by default.

    Raises:
      InputError: several layers, or a preset other than ``preset``.
    """
    if shape.preset not in ("", preset):
        raise InputError(f"drafter.preset: expected {preset!r} or '', found {shape.preset!r}")
    if len(shape.taps) > 1:
        raise InputError(f"drafter.taps: expected one layer at most, found {list(shape.taps)}")
    return shape.taps or (target.num_layers - 1,)


def check_config(config: Any, **at_least: int) -> None:
    """Raise ValueError unless a configuration has one tap and numbers that are large enough."""
    if len(config.taps) != 1:
        raise ValueError(f"taps: expected one target layer, found {len(config.taps)}")
    for name, least in at_least.items():
        found = getattr(config, name)
        if found < least:
            raise ValueError(f"{name}: expected at least {least}, found {found}")
