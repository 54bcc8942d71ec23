"""Show what a drafter would learn from: samples with their labels marked, counts and warnings.

    python -m train.show --config configs/FILE.yaml [section.field=value ...] [--count 3]
    python -m train.show [section.field=value ...] --target FOLDER --files FILE ...

Labels are green on a terminal, else they stand in brackets.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence

import numpy as np

from ctc_spec_jax import folders
from ctc_spec_jax.cli import exit_on_bad_input
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from train.chat import Encoder, chat_template, has_generation_tags
from train.config import TrainConfig, load_config
from train.data import pack, read_files
from train.documents import Documents
from train.reader import spans

BRACKETS = "⟦", "⟧"
"""Around labels where there are no colours."""

_GREEN = "\033[32m", "\033[0m"
_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:start|end)_of_turn>")


def marked(tokenizer, ids, trained, colours: bool) -> str:
    """Text of a document, its runs of labels in green or in brackets."""
    begin, end = _GREEN if colours else BRACKETS
    parts, place = [], 0
    for first, last in spans(np.asarray(trained)):
        parts += [tokenizer.decode(ids[place:first]), begin, tokenizer.decode(ids[first:last]), end]
        place = last
    return "".join([*parts, tokenizer.decode(ids[place:])])


def problems(tokenizer, template: str | None, documents: Documents, train_on: str) -> list[str]:
    """One sentence for everything about the documents that is likely a mistake."""
    found = [*_of_documents(tokenizer, documents)]
    if template:
        found += _of_template(tokenizer, template, train_on)
        if train_on == "assistant":
            found += _headers(tokenizer, template, documents)
    return found


def _of_documents(tokenizer, documents: Documents) -> list[str]:
    found, counts = [], documents.counts
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    if counts["unlabelled"]:
        found.append(f"{counts['unlabelled']} documents have no labels and are left out")
    if counts["skipped"]:
        found += [f"broken line {line}" for line in counts["broken"]]
    if bos is not None and bos != tokenizer.eos_token_id:
        twice = sum(bool((documents[i][0][:2] == bos).sum() == 2) for i in range(len(documents)))
        if twice:
            found.append(f"{twice} documents begin with two {tokenizer.bos_token} (double BOS)")
    if unknown is not None and unknown not in (bos, tokenizer.eos_token_id):
        many = sum(bool(np.any(documents[i][0] == unknown)) for i in range(len(documents)))
        if many:
            found.append(f"{many} documents hold the unknown token {tokenizer.unk_token}")
    return found


def _of_template(tokenizer, template: str, train_on: str) -> list[str]:
    found = []
    for name in sorted(set(_SPECIAL.findall(template))):
        pieces = tokenizer.backend_tokenizer.encode(name, add_special_tokens=False).ids
        if len(pieces) != 1:
            found.append(f"{name} of the template is no token but {len(pieces)} pieces of text")
    if train_on == "assistant" and not has_generation_tags(template):
        if "add_generation_prompt" not in template:
            found.append(
                "the template has neither generation tags nor add_generation_prompt, "
                "so the assistant's header is a label"
            )
    return found


def _headers(tokenizer, template: str, documents: Documents) -> list[str]:
    """Whether labels include the header of a user's turn."""
    header = user_header(tokenizer, template)
    if not header:
        return []
    many = sum(_has_labelled(*documents[place], header) for place in range(len(documents)))
    text = tokenizer.decode(list(header))
    return [f"{many} documents have the user's header {text!r} among their labels"] if many else []


def user_header(tokenizer, template: str) -> tuple[int, ...]:
    """Tokens between an answer and the user's next words, or none where the template refuses."""
    encoder = Encoder(tokenizer, template, "all")
    user, answer = {"role": "user", "content": "qqq"}, {"role": "assistant", "content": "q"}
    rows = encoder.chats([[user, answer], [user, answer, user]])
    if any(isinstance(row, Exception) for row in rows):
        return ()
    text = encoder.render([user, answer, user]).removeprefix(encoder.render([user, answer]))
    header = text[: text.rfind("qqq")].rstrip(" ")
    return tuple(tokenizer.backend_tokenizer.encode(header, add_special_tokens=False).ids)


def _has_labelled(ids: np.ndarray, trained: np.ndarray, header: Sequence[int]) -> bool:
    if len(ids) < len(header):
        return False
    size = len(header)
    same = (np.lib.stride_tricks.sliding_window_view(ids, size) == np.asarray(header)).all(1)
    return bool((same & np.lib.stride_tricks.sliding_window_view(trained, size).all(1)).any())


def show(config: TrainConfig, count: int, colours: bool) -> None:
    """Print ``count`` documents of a configuration, its counts and what looks wrong.

    Raises:
      InputError: no target, or files that cannot be read.
    """
    tokenizer = folders.load_tokenizer(convert.target_folder(config.target))
    options, length = config.data, config.batch.length
    documents = read_files(options.files, tokenizer, options, length)
    train, heldout = documents.split(options.heldout)
    for place in np.linspace(0, len(documents) - 1, min(count, len(documents)), dtype=int):
        ids, trained = documents[place]
        head = f"document {place}: {len(ids)} tokens, {int(trained.sum())} labels"
        print(f"--- {head}\n{marked(tokenizer, ids, trained, colours)}")
    record = pack(train, length, options.pack).record()
    record = {name: value for name, value in record.items() if name != "broken"}
    print(f"--- counts\n{json.dumps(record | {'heldout_documents': len(heldout)}, indent=1)}")
    template = chat_template(tokenizer, options.template)
    for problem in problems(tokenizer, template, documents, options.train_on):
        print(f"warning: {problem}", file=sys.stderr)


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m train.show``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", help="experiment file of configs/")
    parser.add_argument("--target", help="Hugging Face folder or hub id, in place of the config's")
    parser.add_argument("--files", nargs="+", help="training files, in place of the config's")
    parser.add_argument("--count", type=int, default=3, help="documents that are printed")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    arguments = parser.parse_args()
    if not (arguments.config or (arguments.target and arguments.files)):
        raise InputError(
            "--config: expected an experiment file, or --target and --files, found none"
        )
    overrides = list(arguments.overrides)
    if arguments.target:
        overrides.append(f"target={json.dumps(arguments.target)}")
    if arguments.files:
        overrides.append(f"data.files={json.dumps(arguments.files)}")
    if not arguments.config:
        overrides.insert(0, "objective=drafter")
    show(
        load_config(arguments.config or os.devnull, overrides),
        arguments.count,
        sys.stdout.isatty(),
    )


if __name__ == "__main__":
    main()
