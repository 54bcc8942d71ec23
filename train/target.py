"""Objective ``target``: a small causal language model learns the next token of Python sources."""

from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp

from ctc_spec_jax import losses, recipes
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM, output_logits
from train import corpus
from train.config import TrainConfig


class TargetObjective:
    """Next-token cross-entropy over windows of the corpus; exports an ordinary HF folder."""

    frozen = None

    def __init__(self, config: TrainConfig):
        self.config = config
        texts, heldout = corpus.corpus(
            config.data.sources, config.data.heldout, config.data.max_bytes
        )
        self.tokenizer = _tokenizer(config, texts)
        train, held = (corpus.tokenize(self.tokenizer, part) for part in (texts, heldout))
        self.windows = corpus.Windows(train, config.batch.length)
        self.heldout = corpus.Windows(held, config.batch.length)
        # Too little text fails here and not at the first evaluation.
        self.batch(0)
        self.heldout.batch(0, 0, config.batch.microbatch)
        self.record = {
            "train_bytes": sum(len(text.encode()) for text in texts),
            "train_tokens": len(train),
            "heldout_tokens": len(held),
        }
        self.lm = DecoderLM(_shape(config))
        self._heldout_loss = jax.jit(self._mean_loss)

    def init(self, key):
        """Fresh parameters. ``key`` is consumed."""
        return self.lm.init(key)

    def batch(self, step: int):
        """int32 [B, T] windows of one step."""
        return self.windows.batch(self.config.run.seed, step, self.config.batch.rows)

    def loss(self, params, frozen, tokens, keys):
        """Mean next-token loss in nats of one micro-batch, and its metrics."""
        del frozen, keys
        loss = self._mean_loss(params, tokens)
        return loss, {"loss": loss}

    def evaluate(self, params) -> dict[str, float]:
        """Held-out loss in nats per token, and the perplexity."""
        rows = self.config.batch.microbatch
        steps = max(1, self.config.evaluation.rows // rows)
        total = sum(
            float(self._heldout_loss(params, self.heldout.batch(0, step, rows)))
            for step in range(steps)
        )
        return {"heldout_loss": total / steps, "heldout_perplexity": math.exp(total / steps)}

    def export(self, params, folder: str, record: dict) -> None:
        """Write config.json, model.safetensors, the tokenizer and ``training.json``."""
        end = self.tokenizer.eos_token_id
        convert.save_target(
            folder,
            self.lm,
            params,
            {
                "eos_token_id": end,
                "pad_token_id": end,
                "bos_token_id": None,
                "max_position_embeddings": self.config.batch.length,
            },
        )
        self.tokenizer.save_pretrained(folder)
        text = json.dumps(record, indent=1) + "\n"
        (pathlib.Path(folder) / "training.json").write_text(text)

    def _mean_loss(self, params, tokens):
        lengths = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        hidden, _, _ = self.lm.hidden(params, tokens, lengths)
        logits = output_logits(params, hidden[:, :-1])
        return losses.cross_entropy(logits, tokens[:, 1:], jnp.ones_like(tokens[:, 1:], bool))


def _tokenizer(config: TrainConfig, texts: list[str]):
    if not config.data.tokenizer:
        return corpus.train_tokenizer(texts, config.data.vocab_size)
    tokenizer = recipes.load_tokenizer(config.data.tokenizer)
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
