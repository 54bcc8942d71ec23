"""Objective ``drafter``: a CTC drafter learns what its frozen target writes.

Many anchors per sequence; each is one draft: the target's next K tokens given all before it. The
target runs inside the same jitted step, so no hidden states are stored.

Shape letters: B rows, T tokens, A anchors, F frames, K labels, D width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctc_spec_jax import losses, recipes
from ctc_spec_jax.decode import Loop, decode
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config, published
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.decoder import output_head
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from ctc_spec_jax.types import NO_TOKEN, Request
from ctc_spec_jax.verify import Greedy
from train import data
from train.config import TrainConfig


class DrafterObjective:
    """Weighted CTC objectives over random anchors of the target's answers."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.lm, self.frozen, self.tokenizer = recipes.load_target(config.target)
        self.answers, self.heldout = data.load_answers(
            config.data.answers, config.data.max_loop, config.data.heldout
        )
        shape, last = config.drafter, self.lm.config.num_layers - 1
        if any(not 0 <= tap <= last for tap in shape.taps):
            raise InputError(f"drafter.taps: expected layers 0..{last}, found {list(shape.taps)}")
        if shape.preset == "published":
            network = published(self.lm.config)
        else:
            network = ctc_config(
                self.lm.config, shape.layers, shape.frames, shape.taps, shape.mlp_width
            )
        self.batch(0)  # too few answers fail here
        tree = PrefixTree(shape.tree_nodes, min(config.loss.labels, network.frames))
        self.drafter = CTCDrafter(network, tree)
        self.record = {
            "answers": len(self.answers.tokens),
            "answer_tokens": int((self.answers.lengths - self.answers.prompt_lengths).sum()),
        }
        self._heldout_metrics = jax.jit(lambda p, f, b, k: self.loss(p, f, b, k)[1])
        self._decode = jax.jit(functools.partial(decode, self._loop()))

    def init(self, key):
        """Fresh float32 parameters, or those of ``drafter.init_from``. ``key`` is consumed."""
        folder = self.config.drafter.init_from
        if not folder:
            return self.drafter.init_params(key)
        before, params = recipes.load_drafter(folder, self.lm, self.tokenizer)
        if before.config != self.drafter.config:
            raise InputError(
                f"drafter.init_from: expected a network of the shape in section drafter, "
                f"found another in {folder}"
            )
        return params

    def batch(self, step: int):
        """Rows of one step: tokens int32 [B, T], prompt_lengths and lengths int32 [B]."""
        return self.answers.batch(self.config.run.seed, step, self.config.batch.rows)

    def loss(self, params, frozen, batch, keys):
        """Weighted objectives of one micro-batch. ``keys`` [B] draw the anchors."""
        weights = self.config.loss
        tokens = batch["tokens"]
        anchors, labels, label_lengths = sample_anchors(
            keys, batch, self.config.batch.anchors, weights.labels
        )
        _, taps, _ = self.lm.hidden(frozen, tokens, batch["lengths"], self.drafter.taps)
        pending = frozen["embedding"][jnp.take_along_axis(tokens, anchors, axis=1)]
        hidden: Any = self.drafter.network.apply(
            {"params": params}, taps, pending, anchors, method="anchor_hidden"
        )
        blank, label = losses.chunked_frame_log_probs(
            hidden.reshape(-1, *hidden.shape[2:]),
            output_head(frozen),
            params["blank"],
            labels.reshape(-1, weights.labels),
            weights.chunk,
            params["blank_bias"],
        )
        decay = weights.decay ** jnp.arange(weights.labels, dtype=jnp.float32)
        loss, values = losses.draft_loss(
            blank,
            label,
            labels.reshape(-1, weights.labels),
            label_lengths.reshape(-1),
            {
                "prefix": weights.prefix,
                "ctc": weights.ctc,
                "expected_length": weights.expected_length,
            },
            decay / jnp.sum(decay),
        )
        return loss, {"loss": loss} | values

    def evaluate(self, params) -> dict[str, float]:
        """Held-out objectives, and the accepted length of the real decoder.

        ``accepted_length`` counts tokens per target pass, bonus included, over held-out answers
        that do not loop.
        """
        options = self.config.evaluation
        rows = np.arange(min(options.rows, len(self.heldout.tokens)))
        keys = jax.random.split(jax.random.key(0), len(rows))
        metrics = self._heldout_metrics(params, self.frozen, self.heldout.take(rows), keys)
        result = {f"heldout_{name}": float(value) for name, value in metrics.items()}
        return result | self._decode_heldout(params)

    def export(self, params, folder: str, record: dict) -> None:
        """Write config.json and model.safetensors of the drafter, and ``training.json``."""
        recipes.save_drafter(
            folder,
            self.drafter,
            params,
            target=self.config.target,
            tokenizer=self.tokenizer,
            training=record,
        )

    def _loop(self) -> Loop:
        return Loop(self.lm, self.drafter, Greedy(), self.config.evaluation.new_tokens)

    def _decode_heldout(self, params) -> dict[str, float]:
        options = self.config.evaluation
        held = self.heldout.take(np.arange(min(options.prompts, len(self.heldout.tokens))))
        lengths = np.minimum(held["prompt_lengths"], options.prompt_length)
        prompts = held["tokens"][:, : options.prompt_length]
        batch = len(prompts)
        request = Request(
            max_new_tokens=np.full((batch,), options.new_tokens, np.int32),
            stops=np.full((batch, 1), NO_TOKEN, np.int32),
            keys=jax.random.split(jax.random.key(0), batch),
        )
        result = self._decode(self.frozen, params, prompts, lengths, request)
        tokens, counts = np.asarray(result.tokens), np.asarray(result.lengths)
        fine = [
            data.loop_share(row[:n]) <= self.config.data.max_loop
            for row, n in zip(tokens, counts, strict=True)
        ]
        rounds = np.asarray(result.stats.rounds)
        if not any(fine):
            fine = [True] * batch
        return {"accepted_length": float(counts[fine].sum() / rounds[fine].sum())}


def sample_anchors(keys, batch, num_anchors: int, num_labels: int):
    """Draw one anchor from each of A equal parts of every answer.

    An anchor is the position of a pending token: the prompt's last token or an answer token that
    has a successor. ``keys`` [B] are consumed.

    Returns:
      anchors int32 [B, A], labels int32 [B, A, K] (the tokens after the anchor), and the number
      of labels inside the answer, int32 [B, A].
    """
    tokens, first = batch["tokens"], batch["prompt_lengths"] - 1
    room = batch["lengths"] - 1 - first  # anchors to choose from
    part = jnp.arange(num_anchors, dtype=jnp.float32)[None]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (num_anchors,)))(keys)
    place = (part + uniform) / num_anchors
    offset = jnp.floor(place * room[:, None].astype(jnp.float32)).astype(jnp.int32)
    anchors = first[:, None] + jnp.minimum(offset, room[:, None] - 1)
    ahead = anchors[..., None] + 1 + jnp.arange(num_labels, dtype=jnp.int32)[None, None]
    labels = jnp.take_along_axis(tokens[:, None], jnp.minimum(ahead, tokens.shape[1] - 1), axis=2)
    count = jnp.minimum(batch["lengths"][:, None] - 1 - anchors, num_labels)
    return anchors, labels, jnp.maximum(count, 0)
