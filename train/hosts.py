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
    """The run was told to end, and everything is saved. Exit status 143, or 130 after Ctrl-C."""

    def __init__(self, step: int, status: int = 143):
        super().__init__(status)
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
def preemption(checkpoints) -> Iterator[Callable[[int], int]]:
    """A function that gives, after a step, the status to save and end with, or 0 to go on.

    SIGTERM and Ctrl-C tell a run to end; the second Ctrl-C ends it at once. Of several processes
    all end at the same step, whichever was told.
    """
    if jax.distributed.is_initialized():
        yield lambda step: 143 if checkpoints.preempted(step) else 0
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: 0
        return
    told = [0]

    def tell(number, frame):
        told[0] = 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: told[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def peers(folder: str) -> Iterator[None]:
    """Say in one sentence what to do when another process has gone, with exit status 1."""
    try:
        yield
    except Preempted as end:
        print(f"stopped: step {end.step} is saved in {folder}; start again to continue")
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
