"""The exception that programs turn into a message and exit status 2, and what is not one."""

import re
import traceback

import jax

_FAILED = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "
)
_COMPUTING = ("jax", "ctc_spec_jax", "train")


class InputError(ValueError):
    """Bad input, told in one sentence: what, what was expected, what was found."""


def of_computation(error: BaseException | None) -> bool:
    """Whether a computation or a barrier of JAX failed, not the disk: this error or its cause.

    A collective whose peer has gone raises ``ValueError`` where it runs at once. The storage
    layers raise the same type with the same codes, so the place tells them apart.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        if isinstance(error, ValueError) and _FAILED.match(str(error)):
            place = ""
            for frame, _ in traceback.walk_tb(error.__traceback__):
                place = frame.f_globals["__name__"].split(".")[0]
            if place in _COMPUTING:
                return True
        error = error.__cause__
    return False
