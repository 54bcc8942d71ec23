"""What narrower numbers do to a target: its law beside that in float32, on the same text.

    python -m infer.precision
    python -m infer.precision --target owner/model --text FILE --json FILE

The target is loaded once in float32 with exact products, then in bfloat16, and in either with its
matrices in eight bits (``--int8`` of the other programs). At every token of a text the laws of the
next one are compared: perplexity of the text, share of tokens whose most probable successor stays
the same, mean divergence KL(float32 || narrower) in nats. Without --text, Python files are read
that the demo target never saw.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ctc_spec_jax import demo
from ctc_spec_jax.cli import DTYPES, exit_on_bad_input, use_compilation_cache, use_precision
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.decoder import DecoderLM, output_logits
from ctc_spec_jax.models.int8 import rounded_params
from ctc_spec_jax.types import Params
from infer.generate import check_counts, check_json, write_document
from infer.profile import hardware
from train import corpus


@dataclasses.dataclass(frozen=True)
class Found:
    """A target in some numbers beside the same in float32; KL in nats."""

    numbers: str
    gigabytes: float
    perplexity: float
    best_kept: float
    divergence: float


def windows(tokenizer, path: str | None, count: int, length: int) -> np.ndarray:
    """``count`` pieces of ``length`` tokens of a text, int32, spread over it.

    Raises:
      InputError: no such file, or a text without a whole piece.
    """
    if path is None:
        _, texts = corpus.corpus(("stdlib",), corpus.HELDOUT)
        tokens = corpus.tokenize(tokenizer, texts)
    else:
        try:
            text = pathlib.Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--text: expected a readable file, found {path} ({error})") from error
        tokens = np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32)
    pieces = tokens[: len(tokens) // length * length].reshape(-1, length)
    if not len(pieces):
        raise InputError(f"--text: expected at least {length} tokens, found {len(tokens)}")
    return pieces[np.linspace(0, len(pieces) - 1, min(count, len(pieces))).astype(int)]


def variants(params: Params) -> Iterator[tuple[str, Params]]:
    """A target's float32 parameters and the same in narrower numbers, with what they are called."""
    for name, dtype in DTYPES.items():
        one = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        yield name, one
        yield f"{name}, matrices in int8", rounded_params(one)


@jax.jit
def sums(log_probs, reference, tokens):
    """Sums over positions of one row: log-probability, equal arg-max, KL from ``reference``.

    ``log_probs`` and ``reference`` [T, V], tokens int32 [T]; the last position has no successor.
    """
    log_probs, reference = log_probs[:-1], reference[:-1]
    said = jnp.take_along_axis(log_probs, tokens[1:, None], axis=1)
    kept = jnp.argmax(log_probs, axis=1) == jnp.argmax(reference, axis=1)
    apart = jnp.sum(jnp.exp(reference) * (reference - log_probs), axis=1)
    return jnp.stack([jnp.sum(said), jnp.sum(kept, dtype=said.dtype), jnp.sum(apart)])


def compare(lm: DecoderLM, params: Params, rows: np.ndarray) -> list[Found]:
    """The target of float32 ``params`` in all numbers, on tokens int32 [rows, T]."""

    @jax.jit
    def law(params, row):
        hidden, *_ = lm.hidden(params, row[None], jnp.full((1,), row.shape[0], jnp.int32))
        return jax.nn.log_softmax(output_logits(params, hidden)[0], axis=-1)

    found = []
    # The float32 law is made again for each: kept, it would take more memory than the weights.
    for name, narrow in tqdm(variants(params), total=2 * len(DTYPES), leave=False):
        parts = [np.asarray(sums(law(narrow, row), law(params, row), row)) for row in rows]
        means = np.stack(parts).sum(axis=0) / (rows.size - len(rows))
        said, kept, apart = means.tolist()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(narrow)) / 1e9
        found.append(Found(name, size, float(np.exp(-said)), kept, apart))
    return found


def table(found: Sequence[Found]) -> str:
    """The figures as aligned text."""
    lines = [f"{'numbers':<28}{'GB':>9}{'perplexity':>12}{'best kept':>12}{'KL, nats':>12}"]
    for one in found:
        figures = f"{one.gigabytes:>9.4f}{one.perplexity:>12.4f}{one.best_kept:>12.2%}"
        lines.append(f"{one.numbers:<28}{figures}{one.divergence:>12.6f}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--target", help="Hugging Face folder or hub id (default: the demo)")
    options.add_argument("--text", help="file of text (default: Python files, for the demo)")
    options.add_argument("--count", type=int, default=64, help="pieces of the text")
    options.add_argument("--length", type=int, default=256, help="tokens of a piece")
    options.add_argument("--json", help="file to write the figures to")
    return options


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.precision``."""
    given = parser().parse_args()
    check_counts(given, ("count",))
    if given.length < 2:
        raise InputError(f"--length: expected at least 2, found {given.length}")
    check_json(given.json)
    use_compilation_cache()
    use_precision("float32")
    engine = Engine.from_pretrained(given.target or str(demo.target_folder()))
    if given.length > engine.tokenizer.model_max_length:
        limit = engine.tokenizer.model_max_length
        raise InputError(f"--length: expected at most {limit} positions, found {given.length}")
    rows = windows(engine.tokenizer, given.text, given.count, given.length)
    found = compare(engine.lm, engine.params, rows)
    print(f"{rows.size} tokens in {len(rows)} pieces")
    print(table(found))
    if given.json:
        settings: dict[str, Any] = {"target": given.target or "demo", "tokens": rows.size}
        results = [dataclasses.asdict(one) for one in found]
        write_document(given.json, {**hardware(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
