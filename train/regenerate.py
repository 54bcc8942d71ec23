"""Let the target answer prompts: its answers are what a drafter learns from.

    python -m train.regenerate --target owner/model --prompts chats.jsonl.gz --out answers.jsonl
    python -m train.regenerate --target owner/model --sources stdlib --out answers.jsonl

A drafter that is trained on its target's own answers (sequence-level distillation) sees the text
that it will have to draft. The program can be killed at any moment: the same command goes on.
One line per prompt: id, input_ids, loss_mask (1: answer), finish, rounds, accepted_length and, of a
chat, messages.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import pathlib
import sys
from typing import Any

import jax
import jinja2

from ctc_spec_jax import demo, options
from ctc_spec_jax.cli import (
    DTYPES,
    add_precision,
    exit_on_bad_input,
    load_engine,
    numbers,
    use_compilation_cache,
    use_precision,
)
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from infer.prompts import report
from train import corpus
from train.answering import answer_all, prepare
from train.dialogue import Totals, render
from train.ledger import Ledger
from train.prompts import Prompt, cut_prompts, file_digest, read_prompts, share_of


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--out", required=True, help="file to write or to go on with, .jsonl")
    parser.add_argument("--drafter", help="folder of a drafter: faster, the same law of answers")
    parser.add_argument("--tree-nodes", type=int, default=demo.TREE_NODES)
    add_precision(parser)
    parser.add_argument("--rows", type=int, default=64, help="prompts decoded at a time")
    parser.add_argument("--shard", help="I/N: answer share I = 0..N-1 of the prompts")
    group = parser.add_argument_group("prompts of files")
    group.add_argument("--prompts", nargs="+", help="JSONL files, may be gzipped")
    group.add_argument("--template", help="Jinja file with a chat template")
    group.add_argument("--first-turn", action="store_true", help="of every chat, no more")
    group = parser.add_argument_group("prompts cut from Python sources")
    group.add_argument("--sources", nargs="+", help="installed packages (default: stdlib)")
    group.add_argument(
        "--heldout", type=float, default=corpus.HELDOUT, help="share of files left out"
    )
    group.add_argument("--max-bytes", type=int, default=0, help="read at most that much text")
    group.add_argument("--count", type=int, default=4096, help="number of prompts")
    group.add_argument("--prompt-lengths", type=int, nargs=2, default=(16, 128))
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=256, help="of one answer")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--ignore-eos", action="store_true", help="go on past end-of-text tokens")
    group.add_argument("--seed", type=int, default=0, help="of prompts cut and answers drawn")
    arguments = parser.parse_args()
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    for name in ("rows", "count", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: expected at least 1, found {getattr(arguments, name)}")
    if arguments.prompts and arguments.sources:
        raise InputError("--prompts: expected it or --sources, found both")
    there = next(p for p in pathlib.Path(arguments.out).absolute().parents if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"--out: expected a writable folder, found {there}")
    if pathlib.Path(arguments.out).is_dir():
        raise InputError(f"--out: expected a file, found the folder {arguments.out}")
    options.per_row(1, fields_of(arguments))
    arguments.sources = arguments.sources or ["stdlib"]
    arguments.shard = shard_of(arguments.shard)


def fields_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of the answers, by their names in ``Options``."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "ignore_eos")
    return {name: getattr(arguments, name) for name in names}


def shard_of(text: str | None) -> tuple[int, int]:
    """Index and number of workers of ``I/N``, or else those of JAX's distributed runtime."""
    if text is None:
        # Asking for the number of processes would start the devices where nothing is distributed.
        several = jax.distributed.is_initialized()
        return (jax.process_index(), jax.process_count()) if several else (0, 1)
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard: expected I/N with 0 <= I < N, found {text!r}")
    return int(index), int(count)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the lines, by option; the number of rows does not."""
    cut = ("sources", "heldout", "max_bytes", "count", "prompt_lengths")
    given = {"prompts": [file_digest(path) for path in arguments.prompts or ()]} | {
        "template": file_digest(arguments.template) if arguments.template else None,
        "first_turn": arguments.first_turn,
    }
    drafter = arguments.drafter
    return {
        "target": f"{arguments.target} (weights {fingerprint(arguments.target)})",
        "drafter": f"{drafter} (weights {fingerprint(drafter)})" if drafter else None,
        "tree_nodes": arguments.tree_nodes if drafter else None,
        "dtype": numbers(arguments),
        "seed": arguments.seed,
        "shard": "/".join(map(str, arguments.shard)),
        **fields_of(arguments),
        **(given if arguments.prompts else {name: getattr(arguments, name) for name in cut}),
    }


def fingerprint(path_or_id: str) -> str:
    """A hash of size, beginning and end of the weights, so that a retrained model is noticed."""
    digest = hashlib.sha256()
    for path in sorted(convert.target_folder(path_or_id).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read() + str(size).encode())
    return digest.hexdigest()[:12]


def find_prompts(arguments: argparse.Namespace, engine: Engine) -> tuple[list[Prompt], list[str]]:
    """This worker's prompts, and one sentence per bad line."""
    tokenizer, problems = engine.tokenizer, []
    if arguments.prompts:
        prompts, problems = read_prompts(arguments.prompts, arguments.first_turn)
        if not tokenizer.chat_template and any(prompt.turns for prompt in prompts):
            raise InputError(
                "--template: expected a chat template, since the tokenizer of "
                f"{arguments.target} has none, found no file"
            )
    else:
        shortest, longest = arguments.prompt_lengths
        room = tokenizer.model_max_length - max(shortest, longest)
        if arguments.max_new_tokens > room:
            raise InputError(
                f"--max-new-tokens: expected 1..{room}, so that the longest prompt and its answer "
                f"fit the target's {tokenizer.model_max_length} positions, found "
                f"{arguments.max_new_tokens}"
            )
        texts, _ = corpus.corpus(tuple(arguments.sources), arguments.heldout, arguments.max_bytes)
        tokens = corpus.tokenize(tokenizer, texts)
        prompts = cut_prompts(tokens, arguments.count, shortest, longest, arguments.seed)
    return share_of(prompts, *arguments.shard), problems


def load(arguments: argparse.Namespace) -> Engine:
    """Target, drafter and chat template."""
    engine = load_engine(arguments.target, arguments)
    if arguments.drafter:
        dtype = DTYPES[arguments.dtype]
        engine = engine.with_drafter(arguments.drafter, arguments.tree_nodes, dtype)
    if arguments.template:
        use_template(engine, arguments.template)
    return engine


def use_template(engine: Engine, path: str) -> None:
    """Let the tokenizer write chats with a template of a file."""
    try:
        engine.tokenizer.chat_template = pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--template: expected a readable file, found {path} ({error})") from error
    try:
        render(engine.tokenizer, [{"role": "user", "content": "x"}])
    except InputError as error:
        # Any other refusal concerns these messages, not the template.
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise InputError(
                f"--template: expected a Jinja template, found {path} ({error.__cause__})"
            ) from error


def record_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the file beside the answers says that does not decide them."""
    packages = ("jax", "jaxlib", "flax", "numpy", "transformers")
    return {
        "command": " ".join(["python -m train.regenerate", *sys.argv[1:]]),
        "prompts": arguments.prompts,
        "rows": arguments.rows,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m train.regenerate``."""
    arguments = _parse()
    use_compilation_cache()
    use_precision(arguments.dtype)
    engine = load(arguments)
    prompts, problems = find_prompts(arguments, engine)
    totals, fields = Totals(), fields_of(arguments)
    pathlib.Path(arguments.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    with Ledger(arguments.out, settings_of(arguments), record_of(arguments), totals.add) as ledger:
        left = [prompt for prompt in prompts if prompt.id not in ledger.done]
        dialogues, refused, too_long = prepare(engine, left, arguments.max_new_tokens)
        report(problems + refused)
        rows = min(arguments.rows, max(1, len(prompts)))
        shortened = answer_all(engine, dialogues, ledger, rows, arguments.seed, fields)
        counts = totals.counts() | {"too_long": too_long, "bad": len(problems + refused)}
        ledger.finish(counts | {"ended_early": shortened})
    print(
        f"{totals.answers} answers, {totals.tokens} tokens, {counts['loop_share']:.0%} loop, "
        f"mean accepted length {counts['accepted_length']:.2f}, {too_long} prompts too long: "
        f"{arguments.out}"
    )
    if problems or refused:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
