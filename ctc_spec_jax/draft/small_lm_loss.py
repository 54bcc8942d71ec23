"""What a small language model learns as a drafter: the target's law at every place of an answer.

DistillSpec (Zhou et al. 2024, arXiv 2310.08461, section 4): divergences of the drafter's law from
the target's, by default over the answers of the data; with probability ``weights.on_policy`` a
row's answers are drawn from the drafter as it is now, each as long as the one it replaces. The
authors released no code. Differences from the paper: the mean is over the labels of all rows, not
within an answer first; the drafter's text is drawn anew in every step, at ``weights.temperature``.

Shape letters: B rows, T tokens, V vocabulary, D width, X stop tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax.chunked_head import chunked_token_log_probs
from ctc_spec_jax.distillation import chunked_distillation, mix_on_policy
from ctc_spec_jax.draft.small_lm import SmallLM
from ctc_spec_jax.draft.training import DIVERGENCES, Loss
from ctc_spec_jax.losses import masked_mean
from ctc_spec_jax.models import kv_cache
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM, output_head, output_logits
from ctc_spec_jax.types import Params


def label_places(batch, name: str = "trained"):
    """bool [B, T], places whose next token is a label: one of ``batch[name]``, same document.

    The law of a token is that at the place before it.
    """
    segments = batch["segments"]
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.pad(batch[name][:, 1:] & follows, ((0, 0), (0, 1)))


@dataclasses.dataclass(frozen=True)
class SmallLMLoss:
    """Cross-entropy and divergences of the next token; a ``training.DraftLoss``.

    Every label counts, or those that replaced a refused draft where the batch says which: there
    are no ``anchors`` to draw. ``weights.chunk`` counts places whose logits exist at a time.
    """

    lm: DecoderLM
    drafter: SmallLM
    weights: Loss
    anchors: int
    dtype: Any = jnp.float32
    remat: bool = False
    shards: int = 1

    def loss(self, params: Params, frozen: Params, batch, keys):
        """See ``training.DraftLoss``.

        Metrics are means over the labels: the objectives in use, and ``overlap``, the mean of
        ``sum_v min(p, q)``, over all labels of the answers.
        """
        params = jax.tree.map(lambda x: x.astype(self.dtype), params)
        if self.weights.on_policy:
            draw, choose = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
            own = self.own_text(params, batch, draw)
            given = {name: batch[name] for name in own}
            batch = {**batch, **mix_on_policy(choose, given, own, self.weights.on_policy)[0]}
        places = batch["segments"], batch["positions"]
        model = DecoderLM(self.drafter.config, self.remat)
        hidden = model.packed_hidden(params, batch["tokens"], *places)[0]
        target = self.lm.packed_hidden(frozen, batch["tokens"], *places)[0]
        mask = label_places(batch, "refused" if "refused" in batch else "trained")
        loss, metrics = self._divergences(target, frozen, hidden, params, mask)
        if self.weights.cross_entropy:
            metrics["cross_entropy"] = self._cross_entropy(hidden, params, batch["tokens"], mask)
            loss += self.weights.cross_entropy * metrics["cross_entropy"]
        if "refused" in batch:
            constant = jax.lax.stop_gradient((hidden, params))
            everywhere = self._divergences(target, frozen, *constant, label_places(batch))[1]
            metrics["overlap"] = everywhere["overlap"]
        return loss, jnp.sum(mask), metrics

    def own_text(self, params: Params, batch, keys) -> dict[str, jax.Array]:
        """The rows with answers that the drafter draws, token by token, in place of those given.

        Tokens that are not ``trained`` stay. What comes after a drawn stop token (``stops``
        int32 [X] of the batch) in an answer is no label. No gradient flows.

        Args:
          params: of the drafter.
          batch: as for ``loss``.
          keys: typed keys [B], consumed.

        Returns:
          ``tokens`` int32 [B, T] and ``trained`` bool [B, T].
        """
        params = jax.lax.stop_gradient(params)
        tokens, trained, places = batch["tokens"], batch["trained"], batch["positions"]
        rows, width = tokens.shape
        stops = batch.get("stops", jnp.zeros((0,), jnp.int32))
        model: Any = DecoderLM(self.drafter.config).module
        alone, first = jnp.ones((rows, 1, 1), bool), jnp.zeros((rows, 1), jnp.int32)

        def step(carry, column):
            cache, logits, ended = carry
            index, token, label, place = column
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            drawn = jax.vmap(jax.random.categorical)(own, logits / self.weights.temperature)
            token = jnp.where(label & (place > 0), drawn.astype(jnp.int32), token)
            kept = label & ~ended
            ended = label & (ended | jnp.any(token[:, None] == stops[None], axis=1))
            # A document begins at slot 0 again and so hides the one before it.
            inputs = (token[:, None], place[:, None], alone, cache, place, ())
            hidden, _, kv = model.apply({"params": params}, *inputs)
            cache = kv_cache.commit(cache, kv, first, place)
            return (cache, output_logits(params, hidden[:, 0]), ended), (token, kept)

        logits = jnp.zeros((rows, self.drafter.config.vocab_size), jnp.float32)
        begin = (self._empty_cache(params, tokens), logits, jnp.zeros((rows,), bool))
        columns = (jnp.arange(width, dtype=jnp.int32), tokens.T, trained.T, places.T)
        _, (tokens, trained) = jax.lax.scan(step, begin, columns)
        return {"tokens": tokens.T, "trained": trained.T}

    def _empty_cache(self, params: Params, tokens):
        model, lengths = DecoderLM(self.drafter.config), tokens[:, 0]
        shapes = jax.eval_shape(lambda *given: model.hidden(*given)[2], params, tokens, lengths)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def _divergences(self, target, frozen: Params, hidden, params: Params, mask):
        """Weighted sum and means of the divergences in use, and the overlap."""
        used = {name: getattr(self.weights, name) for name in DIVERGENCES}
        used = {name: weight for name, weight in used.items() if weight}
        heads = output_head(frozen), output_head(params)
        loss, found = chunked_distillation(
            target,
            heads[0],
            hidden,
            heads[1],
            mask,
            {"total_variation": 0.0, **used},
            self.weights.chunk * self.shards,
            temperature=self.weights.temperature,
            beta=self.weights.beta,
        )
        metrics = {name: found[name] for name in used}
        return loss, metrics | {"overlap": 1 - found["total_variation"]}

    def _cross_entropy(self, hidden, params: Params, tokens, mask):
        labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))).reshape(-1, 1)
        flat, chunk = hidden.reshape(-1, 1, hidden.shape[-1]), self.weights.chunk * self.shards
        log_prob, _ = chunked_token_log_probs(flat, output_head(params), labels, chunk)
        return masked_mean(-log_prob[:, 0], mask.reshape(-1))


def small_lm_products(config: DecoderConfig, length: int, anchors: int) -> tuple[int, int]:
    """Multiply-adds of a row's forward pass: of a frozen LM head, none, and of all else.

    A token sees half of the row on average. Drawing the drafter's own text is not counted.
    """
    del anchors
    c = config
    heads, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
    layer = c.width * (heads + 2 * kv) + heads * c.width + 3 * c.width * c.mlp_width
    return 0, length * (c.num_layers * (layer + heads * length) + c.width * c.vocab_size)
