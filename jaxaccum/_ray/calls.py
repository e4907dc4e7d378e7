"""Calls of actors: bounded in time, their errors those of the library."""

from __future__ import annotations

import functools
import importlib
import time
import types

from jaxaccum._ray.errors import UnavailableError, VersionMismatchError
from jaxaccum._rows.tree import Leaf

# What a worker on another machine can find by its name: one namespace, whatever its job.
NAMESPACE = "jaxaccum"


@functools.cache
def import_ray() -> types.ModuleType:
    """Returns Ray, or says which extra brings it."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ImportError("jaxaccum.ray needs Ray: pip install 'jaxaccum[ray]'") from None


def version() -> str:
    """Returns the version of this package that this process runs."""
    found: str = importlib.import_module("jaxaccum").__version__  # installed or not
    return found


def check_version(worker: str) -> None:
    """Raises in the server, and so in the worker, unless both run the same version."""
    if worker != version():
        raise VersionMismatchError(
            f"the worker runs jaxaccum {worker}, the server {version()}: install the same"
        )


class Deadline:
    """A moment until which one may wait; ``None`` seconds have no end."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Returns the seconds that are left, zero at the least."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)


def wait_for(call: Leaf, deadline: Deadline, who: str) -> Leaf:
    """Returns what a call of an actor returned, or raises what it raised.

    Raises:
      UnavailableError: there is no answer within the time, or nobody to give one.
    """
    exceptions = import_ray().exceptions
    try:
        return import_ray().get(call, timeout=deadline.left())
    except exceptions.GetTimeoutError:
        message = f"{who} has not answered within {deadline.seconds} s"
    except exceptions.RayError as error:
        cause = cause_of(error)
        if not isinstance(cause, exceptions.RayError):
            # Ray's own class of it shows the server's traceback, which is kept as the cause.
            raise cause from error
        message = f"{who} cannot be reached: {first_line(cause)}"
    raise UnavailableError(message)


def cause_of(error: BaseException) -> BaseException:
    """Returns what an actor raised, out of what Ray has wrapped it in."""
    # What an argument's task raised comes wrapped twice.
    while isinstance(error, import_ray().exceptions.RayTaskError):
        error = error.cause
    return error


def first_line(error: BaseException) -> str:
    """Returns what an error says first: Ray's go on for a page."""
    return (str(error).splitlines() or [type(error).__name__])[0]
