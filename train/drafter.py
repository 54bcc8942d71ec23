"""Objective ``drafter``: a CTC drafter learns what its frozen target writes.

Many anchors per sequence; each is one draft: the target's next K tokens given all before it. The
target runs inside the same jitted step, so no hidden states are stored.

Shape letters: B rows, T tokens, A anchors, F frames, K labels, D width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ctc_spec_jax import losses, recipes, sharding
from ctc_spec_jax.checkpoint import save_params
from ctc_spec_jax.chunked_head import chunked_frame_log_probs
from ctc_spec_jax.cli import DTYPES
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.draft.ctc import CTCDrafter, CTCNetwork, ctc_config, published
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.decoder import output_head
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from ctc_spec_jax.verify import Greedy
from train import evaluate, plan, runs
from train.anchors import sample_anchors
from train.config import TrainConfig
from train.source import DocumentSource


class DrafterObjective:
    """Weighted CTC objectives over random anchors of the target's answers."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.mesh, self.dtype = config, mesh, DTYPES[config.dtype]
        self.lm, self.frozen, self.tokenizer = recipes.load_target(
            config.target, self.dtype, mesh=mesh
        )
        self.stops = recipes.stop_ids(config.target, self.tokenizer)
        self.source = DocumentSource(config, self.tokenizer, self.lm.vocab_size)
        self.fingerprint, self.record = self.source.fingerprint, self.source.record
        network = self._network_config()
        tree = PrefixTree(config.drafter.tree_nodes, min(config.loss.labels, network.frames))
        self.drafter = CTCDrafter(network, tree)
        self.network = CTCNetwork(network, config.batch.remat)
        self.initial = self._initial()
        self._heldout = jax.jit(lambda p, f, b, k: self.loss(p, f, b, k)[::2])

    def _network_config(self):
        shape, last = self.config.drafter, self.lm.config.num_layers - 1
        if any(not 0 <= tap <= last for tap in shape.taps):
            raise InputError(f"drafter.taps: expected layers 0..{last}, found {list(shape.taps)}")
        if shape.preset == "published":
            return published(self.lm.config)
        return ctc_config(self.lm.config, shape.layers, shape.frames, shape.taps, shape.mlp_width)

    def _initial(self):
        """Parameters of ``drafter.init_from``, or None."""
        folder = self.config.drafter.init_from
        if not folder:
            return None
        before, params = recipes.load_drafter(folder, self.lm, self.tokenizer, mesh=self.mesh)
        if before.config != self.drafter.config:
            raise InputError(
                f"drafter.init_from: expected a network of the shape in section drafter, "
                f"found another in {folder}"
            )
        return params

    @property
    def flops(self) -> float:
        """Floating-point operations of a step: the target forward, the drafter three times that."""
        batch = self.config.batch
        target = plan.forward_flops(self.lm.config, batch.rows, batch.length, head=False)
        drafter = plan.drafter_flops(self.drafter.config, batch.rows, batch.length, batch.anchors)
        return target + 3 * drafter

    def init(self, key):
        """Fresh float32 parameters. ``key`` is consumed."""
        return self.drafter.init_params(key)

    def batches(self, start: int):
        """This process's batches from step ``start`` on."""
        return self.source.batches(start)

    def loss(self, params, frozen, batch, keys):
        """Weighted objectives of one micro-batch; see ``step.Objective``.

        Metrics: the objectives, and ``prefix_at`` [K], the drafter's probability that its draft
        begins with the target's next k tokens.
        """
        weights = self.config.loss
        params = jax.tree.map(lambda x: x.astype(self.dtype), params)
        anchors, labels, label_lengths = sample_anchors(
            keys, batch, self.config.batch.anchors, weights.labels
        )
        places = batch["segments"], batch["positions"]
        _, taps = self.lm.packed_hidden(frozen, batch["tokens"], *places, self.drafter.taps)
        pending = frozen["embedding"][jnp.take_along_axis(batch["tokens"], anchors, axis=1)]
        hidden: Any = self.network.apply(
            {"params": params}, taps, pending, anchors, *places, method="anchor_hidden"
        )
        labels, label_lengths = labels.reshape(-1, weights.labels), label_lengths.reshape(-1)
        blank, label = chunked_frame_log_probs(
            hidden.reshape(-1, *hidden.shape[2:]),
            output_head(frozen),
            params["blank"],
            labels,
            weights.chunk * self.mesh.shape["data"] * self.mesh.shape["fsdp"],
            params["blank_bias"],
        )
        decay = weights.decay ** jnp.arange(weights.labels, dtype=jnp.float32)
        named = {name: getattr(weights, name) for name in losses.OBJECTIVES}
        loss, values = losses.draft_loss(
            blank, label, labels, label_lengths, named, decay / jnp.sum(decay)
        )
        return loss, jnp.sum(label_lengths > 0), values

    def evaluate(self, params) -> dict[str, float]:
        """Held-out objectives, and the accepted length of the real decoder with its interval.

        ``accepted_length`` counts tokens per target pass, bonus included, over held-out answers
        up to their stops and to where they begin to loop.
        """
        options = self.config.evaluation
        held = self.source.heldout_rows(options.rows, self.mesh)
        keys = jax.random.split(jax.random.key(0), len(held["tokens"]))
        with jax.set_mesh(self.mesh):
            loss, metrics = self._heldout(params, self.frozen, held, keys)
        found = {f"heldout_{name}": value for name, value in metrics.items()}
        return found | {"heldout_loss": loss} | self._accepted(params)

    def _accepted(self, params) -> dict[str, Any]:
        options = self.config.evaluation
        prompts = self.source.heldout_prompts(options.prompts, options.prompt_length)
        params = jax.tree.map(lambda x: x.astype(self.dtype), params)
        loop = Loop(self.lm, self.drafter, Greedy(), options.new_tokens)
        limit = self.config.data.max_loop
        drafts = evaluate.measure(loop, self.frozen, params, prompts, self.stops, self.mesh, limit)
        return evaluate.summary(drafts, prompts.categories)

    def export(self, params, folder: str, record: dict) -> None:
        """Write config.json, model.safetensors and training.json of the drafter, and ``params``.

        ``params`` is an orbax item that any mesh can read; see ``checkpoint.load_params``.
        """
        whole = sharding.host_copy(params)
        if jax.process_index() == 0:
            with runs.local_folder(folder) as local:
                recipes.save_drafter(
                    local,
                    self.drafter,
                    whole,
                    target=self.config.target,
                    tokenizer=self.tokenizer,
                    training=record,
                )
        save_params(f"{folder}/params", params)
