"""One of several processes of train.train; process 1 is killed inside a save.

    python -m tests.lost_host MOMENT STEP ARGUMENTS

``save``: while it starts the save of STEP, which all do together. ``write``: while the files of
STEP, its last one, are written and all wait for them.
"""

import os
import signal
import sys
import threading

import orbax.checkpoint as ocp

from ctc_spec_jax import checkpoint
from ctc_spec_jax.checkpoint import Checkpoints
from train import hosts, train

hosts.INTERVAL = 0.5


def die(*arguments, **fields) -> None:
    """As if the machine had lost its power."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_save(at: int) -> None:
    """Die in the middle of what all do together, before any file is written."""
    save, sync = Checkpoints.save, ocp.multihost.sync_global_processes

    def saved(self, step, *rest):
        def synced(name, **fields):
            if step == at and name == "add_to_awaitable_signals_contract":
                die()
            sync(name, **fields)

        ocp.multihost.sync_global_processes = synced
        save(self, step, *rest)

    Checkpoints.save = saved


def die_in_write(at: int) -> None:
    """Die with files that never get complete."""
    barrier = checkpoint._barrier

    def never(*, key, timeout_ms):
        if key.endswith(f".{at}"):
            threading.Event().wait()
        barrier(key=key, timeout_ms=timeout_ms)

    checkpoint._barrier, Checkpoints.wait = never, die


def be_quick() -> None:
    """Miss the other process soon, but not before it is sure to die."""
    wait = Checkpoints.wait

    def waited(self):
        hosts.SILENCE = 3.0
        wait(self)

    Checkpoints.wait = waited


if __name__ == "__main__":
    moment, step = sys.argv[1], int(sys.argv[2])
    del sys.argv[1:3]
    if os.environ["JAX_PROCESS_ID"] == "1":
        {"save": die_in_save, "write": die_in_write}[moment](step)
    else:
        be_quick()
    train.main()
