"""What every program does: one-sentence errors with exit status 2, a compilation cache."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Callable

import jax

from ctc_spec_jax.errors import InputError


def exit_on_bad_input(main: Callable[[], None]) -> Callable[[], None]:
    """Print an ``InputError`` as one line on standard error and exit with status 2."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

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
