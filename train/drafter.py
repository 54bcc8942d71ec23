"""Objective ``drafter``: a drafter learns what its frozen target writes.

Many anchors per sequence; each is one draft: the target's next K tokens given all before it. The
target runs inside the same jitted step, so no hidden states are stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ctc_spec_jax import folders, recipes, sharding
from ctc_spec_jax.checkpoint import save_params
from ctc_spec_jax.cli import DTYPES
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.draft.training import DraftLoss
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.verify import Greedy
from ctc_spec_jax.verify_sampled import Rejection
from train import evaluate, plan, runs
from train.config import TrainConfig
from train.source import DocumentSource


def loss_of(config: TrainConfig, mesh: Mesh, lm: DecoderLM, drafter) -> DraftLoss:
    """The loss that a configuration describes."""
    recipe = recipes.find(config.drafter.method)
    if recipe.loss is None:
        raise InputError(
            f"drafter.method: expected one that is trained, found {config.drafter.method!r}"
        )
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch, dtype = config.batch, DTYPES[config.dtype]
    loss = recipe.loss(lm, drafter, config.loss, batch.anchors, dtype, batch.remat, shards)
    if config.loss.on_policy and not writes_text(loss):
        raise InputError(
            "loss.on_policy: expected 0 for a method that writes no text by itself, found "
            f"{config.loss.on_policy} for {config.drafter.method!r}"
        )
    return loss


def writes_text(loss: DraftLoss) -> bool:
    """Whether the drafter writes text of its own, so that it can learn from that."""
    return hasattr(loss, "own_text")


def drafter_of(config: TrainConfig, lm: DecoderLM):
    """The drafter that a configuration describes.

    Raises:
      InputError: an unknown method, or taps that the target does not have.
    """
    shape, last = config.drafter, lm.config.num_layers - 1
    if any(not 0 <= tap <= last for tap in shape.taps):
        raise InputError(f"drafter.taps: expected layers 0..{last}, found {list(shape.taps)}")
    recipe = recipes.find(shape.method)
    network = recipe.network(lm.config, shape)
    return recipe.drafter(network, shape.tree_nodes, config.loss.labels, "")


class DrafterObjective:
    """The loss of a method over random anchors of the target's answers."""

    stops: tuple[int, ...] = ()

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.mesh, self.dtype = config, mesh, DTYPES[config.dtype]
        self.lm, self.frozen, self.tokenizer = folders.load_target(
            config.target, self.dtype, mesh=mesh
        )
        self.stops = folders.stop_ids(config.target, self.tokenizer)
        self.source = DocumentSource(config, self.tokenizer, self.lm.vocab_size)
        self.fingerprint, self.record = self.source.fingerprint, self.source.record
        self.drafter = drafter_of(config, self.lm)
        self.initial = self._initial()
        self.drafter_loss = loss_of(config, mesh, self.lm, self.drafter)
        self._heldout = jax.jit(self._score, static_argnums=0)

    def _initial(self):
        """Parameters of ``drafter.init_from``, or None; a language model keeps its own shape."""
        folder = self.config.drafter.init_from
        if not folder:
            return None
        before, params = folders.load_drafter(folder, self.lm, self.tokenizer, mesh=self.mesh)
        recipe, options = recipes.find(self.config.drafter.method), self.config.drafter
        if recipe.language_model and type(before.config) is recipe.config:
            labels = self.config.loss.labels
            self.drafter = recipe.drafter(before.config, options.tree_nodes, labels, "")
        if before.config != self.drafter.config:
            raise InputError(
                f"drafter.init_from: expected a network of the shape in section drafter, "
                f"found another in {folder}"
            )
        return params

    @property
    def flops(self) -> float:
        """Floating-point operations of a step."""
        batch = self.config.batch
        shape = (self.lm.config, self.drafter.config)
        return plan.step_flops(*shape, batch.rows, batch.length, batch.anchors)

    def init(self, key):
        """Fresh float32 parameters. ``key`` is consumed."""
        return self.drafter.init_params(key)

    def batches(self, start: int):
        """This process's batches from step ``start`` on."""
        return self.source.batches(start)

    def loss(self, params, frozen, batch, keys):
        """See ``training.DraftLoss``."""
        return self.drafter_loss.loss(params, frozen, self._with_stops(batch), keys)

    def _with_stops(self, batch):
        return {**batch, "stops": jnp.asarray(self.stops, jnp.int32)}

    def _score(self, on_policy: float, params, frozen, batch, keys):
        """Loss and metrics of rows of which a share has answers of the drafter's own."""
        weights = dataclasses.replace(self.config.loss, on_policy=on_policy)
        loss: Any = self.drafter_loss
        loss = dataclasses.replace(loss, weights=weights)
        return loss.loss(params, frozen, self._with_stops(batch), keys)[::2]

    def evaluate(self, params) -> dict[str, float]:
        """Held-out objectives, and the accepted length of the real decoder with its interval.

        ``accepted_length`` counts tokens per target pass, bonus included, over held-out answers
        up to their stops and to where they begin to loop. Of drafts that are drawn from a law:
        ``acceptance``, the share of drafted tokens that the decoder keeps by rejection at
        ``loss.temperature``, its standard error ``acceptance_error``, and ``acceptance_overlap``,
        the mean of ``sum_v min(p, q)`` at the same places, if the loss measures it. Of drafters
        that write text: ``own_text_overlap``, that mean over held-out answers that the drafter has
        drawn.
        """
        options = self.config.evaluation
        held = self.source.heldout_rows(options.rows, self.mesh)
        keys = jax.random.split(jax.random.key(0), len(held["tokens"]))
        with jax.set_mesh(self.mesh):
            loss, metrics = self._heldout(0.0, params, self.frozen, held, keys)
            found = {f"heldout_{name}": value for name, value in metrics.items()}
            if writes_text(self.drafter_loss):
                own = self._heldout(1.0, params, self.frozen, held, keys)[1]
                found["own_text_overlap"] = own["overlap"]
        return found | {"heldout_loss": loss} | self._accepted(params) | self._acceptance(params)

    def _accepted(self, params) -> dict[str, Any]:
        options = self.config.evaluation
        prompts = self.source.heldout_prompts(options.prompts, options.prompt_length)
        params = jax.tree.map(lambda x: x.astype(self.dtype), params)
        loop = Loop(self.lm, self.drafter, Greedy(), options.new_tokens)
        limit = self.config.data.max_loop
        drafts = evaluate.measure(loop, self.frozen, params, prompts, self.stops, self.mesh, limit)
        return evaluate.summary(drafts, prompts.categories)

    def _acceptance(self, params) -> dict[str, Any]:
        options, weights, shape = self.config.evaluation, self.config.loss, self.config.drafter
        recipe = recipes.find(shape.method)
        if not recipe.drawn:
            return {}
        tree = (shape.tree_nodes, weights.labels, recipe.drawn)
        loop = Loop(
            self.lm, recipe.drafter(self.drafter.config, *tree), Rejection(), options.new_tokens
        )
        prompts = self.source.heldout_prompts(options.prompts, options.prompt_length)
        cast = jax.tree.map(lambda x: x.astype(self.dtype), params)
        given = (prompts, self.stops, self.mesh, weights.temperature)
        rows, found = evaluate.tries(loop, self.frozen, cast, *given)
        keys = jax.random.split(jax.random.key(0), len(rows["tokens"]))
        with jax.set_mesh(self.mesh):
            metrics = self._heldout(0.0, params, self.frozen, rows, keys)[1]
        if "overlap" in metrics:  # only a loss over all labels of a text has it
            found = found | {"acceptance_overlap": metrics["overlap"]}
        return found

    def export(self, params, folder: str, record: dict) -> None:
        """Write config.json, model.safetensors and training.json of the drafter, and ``params``.

        ``params`` is an orbax item that any mesh can read; see ``checkpoint.load_params``.
        """
        whole = sharding.host_copy(params)
        if jax.process_index() == 0:
            with runs.local_folder(folder) as local:
                folders.save_drafter(
                    local,
                    self.config.drafter.method,
                    self.drafter,
                    whole,
                    target=self.config.target,
                    tokenizer=self.tokenizer,
                    training=record,
                )
        save_params(f"{folder}/params", params)
