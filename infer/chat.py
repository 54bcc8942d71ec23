"""Chat with a model: its chat template, several turns, one cache on the device.

    python -m infer.chat --target owner/model --drafter folder/of/a/drafter --temperature 0.7

Ends with the input; /reset begins anew. Drafted tokens are green on a terminal.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator

from ctc_spec_jax import demo
from ctc_spec_jax.cli import (
    add_method,
    add_options,
    add_precision,
    exit_on_bad_input,
    load_engine,
    option_fields,
    painted,
    use_compilation_cache,
    use_precision,
    with_drafts,
)
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.streaming import Conversation
from infer import advice

_RESET = "/reset"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", help="Hugging Face folder or hub id (default: the demo)")
    add_method(parser)
    parser.add_argument("--template", help="Jinja file with a chat template")
    parser.add_argument("--system", help="first message")
    parser.add_argument("--context", type=int, default=0, help="tokens of all turns together")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of one answer")
    parser.add_argument(
        "--tree-nodes",
        default=demo.TREE_NODES,
        help="a size, or auto: measure first which one pays here, if any",
    )
    add_precision(parser)
    parser.add_argument("--rounds", type=int, default=4, help="target passes between two pieces")
    add_options(parser)
    return parser.parse_args()


def _use_template(engine: Engine, path: str) -> None:
    try:
        engine.tokenizer.chat_template = pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--template: expected a readable file, found {path} ({error})") from error


def _messages() -> Iterator[str]:
    """Lines of the user; a prompt is shown on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def answer(engine: Engine, conversation: Conversation, message: str) -> None:
    """Print the answer to a message as it grows, and what it took on standard error."""
    count, piece = 0, None
    for piece in conversation.send(message):
        count += len(piece.tokens)
        print(painted(engine, piece), end="", flush=True)
    print(flush=True)
    if piece is not None and piece.rounds:
        print(
            f"[{piece.finish}: {count} tokens in {piece.rounds} target passes, "
            f"{count / piece.rounds:.2f} a pass]",
            file=sys.stderr,
        )


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.chat``."""
    arguments = _parse()
    use_compilation_cache()
    use_precision(arguments.dtype)
    target = arguments.target or str(demo.target_folder())
    sizes = advice.tree_sizes([arguments.tree_nodes])
    engine = load_engine(target, arguments)
    if sizes is not None:
        engine = with_drafts(engine, arguments, sizes[0])
    if arguments.template:
        _use_template(engine, arguments.template)
    fields = option_fields(arguments, engine)
    if sizes is None:
        prompts = advice.held_out(engine, fields)
        nodes = advice.choose_size(engine, arguments, prompts, 1)
        engine = engine.plain() if nodes == 1 else with_drafts(engine, arguments, nodes)

    def begin() -> Conversation:
        return Conversation(
            engine,
            context=arguments.context,
            system=arguments.system,
            rounds=arguments.rounds,
            seed=arguments.seed,
            **fields,
        )

    conversation = begin()
    for message in _messages():
        if message == _RESET:
            conversation = begin()
            continue
        try:
            answer(engine, conversation, message)
        except InputError as error:
            print(f"error: {error} ({_RESET} begins anew)", file=sys.stderr)


if __name__ == "__main__":
    main()
