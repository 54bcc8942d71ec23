"""Several hosts, and machines that are taken away."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

import jax

from ctc_spec_jax.errors import InputError, of_computation

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

INTERVAL, SILENCE = 5.0, 60.0
"""Seconds between signs of life, and without one until a process counts as lost.

JAX kills all others, without a word of ours, 100 seconds after the last sign of a lost one.
"""

_KEY, _GONE, _FINISHED = "ctc_spec_jax/peers/", "gone: ", "finished"


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
    """Say in one sentence what to do when another process has gone, with exit status 1.

    A process that fails for a reason of its own says that, and the others that it has gone.
    """
    if jax.process_count() == 1:
        with _saved(folder):
            yield
        return
    watch = _Watch(folder)
    watch.start()
    try:
        with _saved(folder):
            yield
    except InputError as error:
        watch.end(f"error: {error}", status=2)
    except KeyboardInterrupt:
        watch.end("interrupted", status=130)
    except Exception as error:
        if not of_computation(error) or "RESOURCE_EXHAUSTED" in str(error):
            watch.end("".join(traceback.format_exception(error)))
        watch.lost((str(error).strip().splitlines() or [""])[0][:200])
    finally:
        watch.finish()


@contextlib.contextmanager
def _saved(folder: str) -> Iterator[None]:
    try:
        yield
    except Preempted as end:
        print(f"stopped: step {end.step} is saved in {folder}; start again to continue")
        raise


class _Watch(threading.Thread):
    """Tells the other processes that this one is alive, and ends it when one of them is not.

    Without it a process that waits for a lost one hangs until JAX kills it.
    """

    def __init__(self, folder: str):
        # Imported here because it takes as long as everything else that --help waits for.
        from orbax.checkpoint import multihost

        super().__init__(daemon=True)
        self._folder, self._client = folder, multihost.get_jax_distributed_client()
        self._finished, self._ending = threading.Event(), threading.Lock()

    def run(self) -> None:
        seen = {}
        try:
            while not self._finished.is_set():
                with self._ending:
                    self._tell(str(time.time_ns()))
                reason = gone(self._client.key_value_dir_get(_KEY), seen, time.monotonic())
                if reason:
                    self.lost(reason)
                self._finished.wait(INTERVAL)
        except jax.errors.JaxRuntimeError:
            self.lost("process 0 does not answer")

    def finish(self) -> None:
        """Stop watching; the others do not miss this process from here on."""
        self._finished.set()
        self.join()
        self._tell(_FINISHED)

    def lost(self, reason: str) -> NoReturn:
        """End because another process has gone."""
        self.end(
            f"error: process {jax.process_index()} lost another process of the run ({reason}); "
            "start all of them again: the run resumes from its newest checkpoint in "
            f"{self._folder}",
            reason=reason,
        )

    def end(self, message: str, status: int = 1, reason: str = "") -> NoReturn:
        """End this process: the usual way out waits for the others, who may be gone.

        The others give the same reason: that this process failed, where it is not another one.
        """
        self._ending.acquire()  # for good: one message, and no sign of life after it
        print(message, file=sys.stdout if status == 1 else sys.stderr, flush=True)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell(_GONE + (reason or f"process {jax.process_index()} failed"))
        if not jax.process_index():
            time.sleep(2 * INTERVAL)  # the others read that here, and die if they cannot
        os._exit(status)

    def _tell(self, news: str) -> None:
        self._client.key_value_set(f"{_KEY}{jax.process_index()}", news, allow_overwrite=True)


def gone(news: Iterable[tuple[str, str]], seen: dict[str, tuple[str, float]], now: float) -> str:
    """Why the run has lost a process: one failed or fell silent; empty while none did.

    Args:
      news: the newest word of every process, by a key that ends in its index.
      seen: every word and when it was new; brought up to date.
      now: seconds of a clock that does not jump.
    """
    for key, word in news:
        if seen.get(key, ("", 0.0))[0] != word:
            seen[key] = word, now
        who, silent = f"process {key.rpartition('/')[2]}", now - seen[key][1]
        if word.startswith(_GONE):
            return word.removeprefix(_GONE)
        if word != _FINISHED and silent > SILENCE:
            return f"{who} was silent for {silent:.0f} seconds"
    return ""
