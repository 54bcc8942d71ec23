"""What programs share: one-sentence errors with exit status 2, a compilation cache, options."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ctc_spec_jax import demo, recipes
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.streaming import Piece

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Values of --dtype."""

_NUMBERS = {
    "temperature": (float, "0 is greedy (default)"),
    "top-k": (int, "draw from the k most probable tokens"),
    "top-p": (float, "draw from the smallest set of tokens with that much mass"),
    "min-p": (float, "draw from tokens at least that probable beside the best one"),
    "repetition-penalty": (float, "above 1 discourages tokens that have occurred"),
    "presence-penalty": (float, "taken from the logits of tokens that were generated"),
    "frequency-penalty": (float, "likewise, for every time"),
    "min-new-tokens": (int, "hold stop tokens back until then"),
    "draft-depth": (int, "use drafted tokens down to this depth"),
}


def exit_on_bad_input(main: Callable[[], None]) -> Callable[[], None]:
    """Print an ``InputError`` as one line on standard error and exit with status 2.

    Ctrl-C ends the program with status 130.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


def use_compilation_cache() -> None:
    """Keep compiled programs on disk between runs, and say so in one line.

    The folder is ``JAX_COMPILATION_CACHE_DIR`` or lies under the user's cache, one per version of
    jaxlib and host: entries hold machine code of the host's processor.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        machine = f"{importlib.metadata.version('jaxlib')}-{platform.node()}"
        folder = str(pathlib.Path(base) / "ctc_spec_jax" / machine)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    print(f"compiled programs are kept in {folder}", file=sys.stderr)


def use_precision(dtype: str) -> None:
    """Exact products for ``--dtype float32``.

    Accelerators round their inputs by default, which can swap near ties.
    """
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")


def add_precision(parser: argparse.ArgumentParser, default: str = "float32") -> None:
    """Flags for the numbers of target and drafter; see ``load_engine``."""
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=default)
    parser.add_argument(
        "--int8",
        action="store_true",
        help="the target's matrices in eight bits: half the bytes of bfloat16, other answers",
    )


def numbers(arguments: argparse.Namespace) -> str:
    """What the flags of ``add_precision`` say, in words for settings that are compared."""
    return arguments.dtype + ", matrices in int8" * arguments.int8


def load_engine(target: str, arguments: argparse.Namespace) -> Engine:
    """A target in the numbers that the flags of ``add_precision`` say, without a drafter."""
    dtype = DTYPES[arguments.dtype]
    return Engine.from_pretrained(target, dtype=dtype, int8=arguments.int8)


_DEPTH = 8
"""Deepest node of drafts that no folder gives a depth."""


def add_method(parser: argparse.ArgumentParser) -> None:
    """Flags for the way to draft; see ``with_drafts``."""
    parser.add_argument("--drafter", help="folder of a drafter (default: the demo's, for the demo)")
    parser.add_argument(
        "--method",
        default="",
        help="how to draft: without --drafter one of the methods without parameters, with the "
        "folder of a language model one of those that draft with it",
    )
    parser.add_argument(
        "--tree",
        default="",
        help="how a method builds its trees, where it knows several ways, such as transform, the "
        "published static template",
    )
    parser.add_argument(
        "--verifier",
        default="",
        help="rule that keeps or refuses drafts: "
        + ", ".join(recipes.VERIFIERS)
        + " (default: the best that is exact for the drafts)",
    )


def with_drafts(engine: Engine, arguments: argparse.Namespace, nodes: int) -> Engine:
    """The engine with drafts of at most ``nodes`` nodes as the flags of ``add_method`` say.

    Without any of them the demo target drafts by its own drafter; others decode plainly.

    Raises:
      InputError: no such method, or one that needs another folder or tree.
    """
    drafting = _drafting(engine, arguments, nodes)
    return drafting.with_verifier(arguments.verifier) if arguments.verifier else drafting


def _drafting(engine: Engine, arguments: argparse.Namespace, nodes: int) -> Engine:
    folder, method, tree = arguments.drafter, arguments.method, arguments.tree
    if folder is None and method:
        return engine.with_method(method, nodes, _DEPTH, tree)
    if folder is None and arguments.target is None:
        folder = str(demo.drafter_folder())
    if folder is None:
        if tree:
            raise InputError(f"--tree: expected it beside --drafter or --method, found {tree!r}")
        return engine.plain()
    return engine.with_drafter(folder, nodes, DTYPES[arguments.dtype], tree, method)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags for the options of a decode; see ``options.Options``."""
    group = parser.add_argument_group("options of the answer")
    for name, (kind, text) in _NUMBERS.items():
        group.add_argument(f"--{name}", type=kind, help=text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help=r"stop string, repeatable; \n is a newline"
    )
    group.add_argument("--bad-words", nargs="+", metavar="WORD", help="words not to write")
    group.add_argument("--logit-bias", nargs="+", metavar="TOKEN=BIAS", help="ids with biases")
    group.add_argument("--ignore-eos", action="store_true", help="go on past end-of-text tokens")
    group.add_argument("--seed", type=int, default=0)


def option_fields(arguments: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """The options that were given, by their names in ``Options``, one value each.

    Raises:
      InputError: a bias that is no number.
    """
    names = [name.replace("-", "_") for name in _NUMBERS]
    fields = {name: getattr(arguments, name) for name in names}
    fields["max_new_tokens"] = arguments.max_new_tokens
    if arguments.stop is not None:
        texts = [text.replace("\\n", "\n").replace("\\t", "\t") for text in arguments.stop]
        fields["stop_strings"] = texts
    if arguments.bad_words:
        fields["bad_words_ids"] = engine.phrase_ids(arguments.bad_words)
    if arguments.logit_bias:
        fields["logit_bias"] = dict(map(_bias, arguments.logit_bias))
    if arguments.ignore_eos:
        fields["ignore_eos"] = True
    return {name: value for name, value in fields.items() if value is not None}


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise InputError(f"--logit-bias: expected TOKEN=BIAS, found {text!r}") from error


def painted(engine: Engine, piece: Piece) -> str:
    """The text of a piece, drafted tokens in green where standard output is a terminal."""
    if not sys.stdout.isatty():
        return piece.text
    parts, before = [], ""
    for index, drafted in enumerate(piece.from_draft, 1):
        text = engine.decode_text(piece.tokens[:index])
        new = text[len(before) :]
        parts.append(f"\033[32m{new}\033[0m" if drafted else new)
        before = text
    return "".join(parts)
