"""What goes wrong between processes, beside what the accumulator itself raises."""

from __future__ import annotations

from collections.abc import Callable


class _TravelsError(Exception):
    """An error that is of its class after a journey too.

    A server has this file, and perhaps not `jaxaccum.ray`, where users find the class: pickled by
    that name there, it would arrive as a copy that no ``except`` knows.
    """

    def __reduce__(self) -> tuple[Callable[..., Exception], tuple[object, ...]]:
        return _rebuild, (type(self).__name__, *self.args)


class UnavailableError(_TravelsError, ConnectionError):
    """The server cannot be reached, or has not answered in time.

    A push that ends so may have been counted, or may yet be: repeat it with the same ``key``, which
    counts it once.

    Source: TensorFlow's ``tf.errors.UnavailableError``.
    """

    __module__ = "jaxaccum.ray"


class FailedError(UnavailableError):
    """The server says itself that it is gone for good: there is no use in asking again."""


class VersionMismatchError(_TravelsError, RuntimeError):
    """Worker and server run different versions of jaxaccum."""

    __module__ = "jaxaccum.ray"


class RolledBackError(RuntimeError):
    """A call was meant for a server that has gone back to a checkpoint since; it is repeated."""


def _rebuild(name: str, *args: object) -> Exception:
    error: Exception = globals()[name](*args)
    return error
