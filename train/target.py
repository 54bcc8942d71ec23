"""Objective ``target``: a small causal language model learns the next token of Python sources."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ctc_spec_jax import folders, losses, sharding
from ctc_spec_jax.checkpoint import save_params
from ctc_spec_jax.cli import DTYPES
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM, output_logits
from train import corpus, plan, runs
from train.config import TrainConfig


class TargetObjective:
    """Next-token cross-entropy over windows of the corpus; exports an ordinary HF folder."""

    frozen, initial = None, None

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.mesh, self.dtype = config, mesh, DTYPES[config.dtype]
        texts, heldout = corpus.corpus(
            config.data.sources, config.data.heldout, config.data.max_bytes
        )
        self.tokenizer = _tokenizer(config, texts)
        train, held = (corpus.tokenize(self.tokenizer, part) for part in (texts, heldout))
        self.windows = corpus.Windows(train, config.batch.length)
        self.heldout = corpus.Windows(held, config.batch.length)
        # Too little text fails here and not at the first evaluation.
        self.windows.batch(config.run.seed, 0, config.batch.rows)
        self.heldout.batch(0, 0, config.batch.microbatch)
        self.fingerprint = hashlib.sha256(train.tobytes()).hexdigest()[:16]
        self.record = {
            "train_bytes": sum(len(text.encode()) for text in texts),
            "train_tokens": len(train),
            "heldout_tokens": len(held),
        }
        self.lm = DecoderLM(_shape(config), config.batch.remat)
        self._heldout_loss = jax.jit(self._mean_loss)

    @property
    def flops(self) -> float:
        """Floating-point operations of a step: three times those of the forward pass."""
        batch = self.config.batch
        return 3 * plan.forward_flops(self.lm.config, batch.rows, batch.length, head=True)

    def init(self, key):
        """Fresh parameters. ``key`` is consumed."""
        return self.lm.init(key)

    def batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of every step from ``start`` on: windows int32 [r, T]."""
        rows, each = self.config.batch.rows, self.config.batch.rows // jax.process_count()
        mine = slice(jax.process_index() * each, (jax.process_index() + 1) * each)
        for step in itertools.count(start):
            tokens = self.windows.batch(self.config.run.seed, step, rows)
            yield {"tokens": tokens[mine], "row": np.arange(rows, dtype=np.int32)[mine]}

    def loss(self, params, frozen, batch, keys):
        """Mean next-token loss in nats of one micro-batch; see ``step.Objective``."""
        del frozen, keys
        params = jax.tree.map(lambda x: x.astype(self.dtype), params)
        loss = self._mean_loss(params, batch["tokens"])
        return loss, jnp.asarray(batch["tokens"].size), {}

    def evaluate(self, params) -> dict[str, float]:
        """Held-out loss in nats per token, and the perplexity."""
        rows = self.config.batch.microbatch
        steps = max(1, self.config.evaluation.rows // rows)
        total = 0.0
        for step in range(steps):
            tokens = self.heldout.batch(0, step, rows)
            tokens = jax.device_put(tokens, sharding.rows(self.mesh, tokens))
            with jax.set_mesh(self.mesh):
                total += float(self._heldout_loss(params, tokens))
        return {"heldout_loss": total / steps, "heldout_perplexity": math.exp(total / steps)}

    def export(self, params, folder: str, record: dict) -> None:
        """Write config.json, model.safetensors, the tokenizer, ``training.json`` and ``params``.

        ``params`` is an orbax item that any mesh can read; see ``checkpoint.load_params``.
        """
        whole = sharding.host_copy(params)
        if jax.process_index() == 0:
            end = self.tokenizer.eos_token_id
            extra = {
                "eos_token_id": end,
                "pad_token_id": end,
                "bos_token_id": None,
                "max_position_embeddings": self.config.batch.length,
            }
            text = json.dumps(record, indent=1) + "\n"
            with runs.local_folder(folder) as local:
                convert.save_target(local, self.lm, whole, extra)
                self.tokenizer.save_pretrained(local)
                (pathlib.Path(local) / "training.json").write_text(text)
        save_params(f"{folder}/params", params)

    def _mean_loss(self, params, tokens):
        lengths = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        hidden, _, _ = self.lm.hidden(params, tokens, lengths)
        logits = output_logits(params, hidden[:, :-1])
        return losses.cross_entropy(logits, tokens[:, 1:], jnp.ones_like(tokens[:, 1:], bool))


def _tokenizer(config: TrainConfig, texts: list[str]):
    if not config.data.tokenizer:
        return corpus.train_tokenizer(texts, config.data.vocab_size)
    tokenizer = folders.load_tokenizer(config.data.tokenizer)
    if len(tokenizer) > config.data.vocab_size:
        raise InputError(
            f"data.vocab_size: expected at least {len(tokenizer)}, the tokens of "
            f"{config.data.tokenizer}, found {config.data.vocab_size}"
        )
    return tokenizer


def _shape(config: TrainConfig) -> DecoderConfig:
    model = config.model
    try:
        return DecoderConfig(
            vocab_size=config.data.vocab_size,
            width=model.width,
            num_layers=model.layers,
            num_heads=model.heads,
            num_kv_heads=model.kv_heads,
            head_width=model.width // model.heads,
            mlp_width=model.mlp_width,
            rope_theta=model.rope_theta,
            tied_embeddings=True,
        )
    except ValueError as error:
        raise InputError(f"model: {error}") from error
