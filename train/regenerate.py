"""Let the target answer: cut prompts from its training files and write down what it continues.

    python -m train.regenerate --target FOLDER --out FILE.npz [--count 4096]

The drafter learns from these answers (sequence-level distillation), so it sees the text that it
will have to draft.
"""

from __future__ import annotations

import argparse
import os
import pathlib

import jax
import numpy as np
from tqdm import tqdm

from ctc_spec_jax import recipes
from ctc_spec_jax.cli import exit_on_bad_input, use_compilation_cache
from ctc_spec_jax.decode import Loop, NoDraft, decode
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.types import NO_TOKEN, Request
from ctc_spec_jax.verify import Greedy
from train import data


def cut_prompts(tokens, count: int, shortest: int, longest: int, seed: int):
    """Prompts int32 [count, longest], right-padded, with their lengths, from random places."""
    if not 1 <= shortest <= longest < len(tokens):
        raise InputError(
            f"--prompt-lengths: expected 1 <= shortest <= longest < {len(tokens)} (the text), "
            f"found {shortest} and {longest}"
        )
    draw = np.random.default_rng(seed)
    lengths = draw.integers(shortest, longest + 1, count).astype(np.int32)
    starts = draw.integers(0, len(tokens) - longest, count)
    prompts = tokens[starts[:, None] + np.arange(longest)[None]]
    return np.where(np.arange(longest)[None] < lengths[:, None], prompts, 0), lengths


def answer(lm, params, prompts, lengths, new_tokens: int, rows: int):
    """Greedy answers of all prompts, ``rows`` at a time: tokens [R, T] and lengths [R]."""
    loop = Loop(lm, NoDraft(), Greedy(), new_tokens)
    step = jax.jit(decode, static_argnums=0)
    whole = np.zeros((len(prompts), prompts.shape[1] + new_tokens), np.int32)
    ends = np.zeros((len(prompts),), np.int32)
    request = Request(
        max_new_tokens=np.full((rows,), new_tokens, np.int32),
        stops=np.full((rows, 1), NO_TOKEN, np.int32),
        keys=jax.random.split(jax.random.key(0), rows),
    )
    for first in tqdm(range(0, len(prompts), rows), unit=" batches"):
        part = np.arange(first, first + rows)
        result = step(loop, params, (), prompts[part], lengths[part], request)
        new, counts = np.asarray(result.tokens), np.asarray(result.lengths)
        for row, tokens, count in zip(part, new, counts, strict=True):
            whole[row, : lengths[row]] = prompts[row, : lengths[row]]
            ends[row] = lengths[row] + count
            whole[row, lengths[row] : ends[row]] = tokens[:count]
    return whole, ends


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m train.regenerate``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, help="folder of the target")
    parser.add_argument("--out", required=True, help="file to write, .npz")
    parser.add_argument("--sources", nargs="+", default=["stdlib"], help="packages with prompts")
    parser.add_argument(
        "--heldout", type=float, default=data.HELDOUT, help="share of files left out"
    )
    parser.add_argument("--max-bytes", type=int, default=0, help="read at most that much text")
    parser.add_argument("--count", type=int, default=4096, help="number of prompts")
    parser.add_argument("--rows", type=int, default=64, help="prompts decoded at a time")
    parser.add_argument("--prompt-lengths", type=int, nargs=2, default=(16, 128))
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.rows < 1 or arguments.count < 1 or arguments.count % arguments.rows:
        raise InputError(
            f"--count: expected a multiple of --rows ({arguments.rows}), found {arguments.count}"
        )
    out = pathlib.Path(arguments.out)
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise InputError(f"--out: expected a writable folder, found {out.parent}")
    use_compilation_cache()
    lm, params, tokenizer = recipes.load_target(arguments.target)
    room = tokenizer.model_max_length - max(arguments.prompt_lengths)
    if not 1 <= arguments.new_tokens <= room:
        raise InputError(
            f"--new-tokens: expected 1..{room}, so that the longest prompt and its answer fit the "
            f"target's {tokenizer.model_max_length} positions, found {arguments.new_tokens}"
        )
    texts, _ = data.corpus(tuple(arguments.sources), arguments.heldout, arguments.max_bytes)
    tokens = data.tokenize(tokenizer, texts)
    shortest, longest = arguments.prompt_lengths
    prompts, lengths = cut_prompts(tokens, arguments.count, shortest, longest, arguments.seed)
    whole, ends = answer(lm, params, prompts, lengths, arguments.new_tokens, arguments.rows)
    part = out.with_name(f".{out.name}.part.npz")
    np.savez(part, tokens=whole, prompt_lengths=lengths, lengths=ends)
    part.rename(out)
    loops = [data.loop_share(row[p:n]) for row, p, n in zip(whole, lengths, ends, strict=True)]
    print(
        f"{len(whole)} answers, {int((ends - lengths).sum())} tokens in {out}; "
        f"{np.mean(np.asarray(loops) > 0.4):.0%} loop"
    )


if __name__ == "__main__":
    main()
