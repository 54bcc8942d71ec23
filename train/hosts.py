"""Several hosts, and machines that are taken away."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax

from ctc_spec_jax.errors import InputError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Preempted(SystemExit):
    """The machine is being taken away; everything is saved. Exit status 143."""

    def __init__(self, step: int):
        super().__init__(143)
        self.step = step


def join() -> None:
    """Join the other processes of the run; call before anything else uses a device.

    On TPU pods and clusters that JAX knows nothing needs to be said; elsewhere
    ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID`` say who is who.

    Raises:
      InputError: no cluster was found, or the processes did not find each other.
    """
    given = [os.environ.get(name) for name in _VARIABLES]
    try:
        if any(given):
            address, count, index = given
            if not (address and count and index):
                raise ValueError(f"{_VARIABLES} {given}")
            jax.distributed.initialize(address, int(count), int(index))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--multihost: expected a TPU pod, a cluster that JAX knows, or {', '.join(_VARIABLES)}"
            f", found {str(error).strip().splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def preemption(checkpoints) -> Iterator[Callable[[int], bool]]:
    """A function that says after a step whether the run has to save and end now.

    Of several processes all say yes at the same step, whichever got the signal.
    """
    if jax.distributed.is_initialized():
        yield checkpoints.preempted
        return
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def peers(folder: str) -> Iterator[None]:
    """Say in one sentence what to do when another process has gone, with exit status 1."""
    try:
        yield
    except Preempted as end:
        print(f"preempted: step {end.step} is saved in {folder}; start again to continue")
        raise
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().splitlines()[0][:200]
        print(
            f"error: process {jax.process_index()} lost another process of the run ({reason}); "
            f"start all of them again: the run resumes from its newest checkpoint in {folder}",
            flush=True,
        )
        # The usual way out waits for the others, who are gone.
        os._exit(1)
