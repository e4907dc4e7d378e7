"""Scalars as callers hand them over, refused with TensorFlow's messages."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxaccum._coordinator.errors import InvalidArgumentError


def as_text(shape: Iterable[int | None]) -> str:
    """Returns ``shape`` as TensorFlow prints it."""
    return f"[{','.join('?' if d is None else str(d) for d in shape)}]"


def as_step(value: Any, name: str) -> int:
    """Returns a scalar as a Python integer, cut off as TensorFlow casts it."""
    if type(value) is int:
        return value
    host = _scalar(value, name)
    if host.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be a number, got {value!r}")
    return int(host)


def as_required(num_required: Any) -> int:
    """Returns how many gradients to wait for."""
    if type(num_required) is not int:
        num_required = operator.index(_scalar(num_required, "num_required").item())
    if num_required < 1:
        raise InvalidArgumentError(
            f"Argument num_required must be positive, but was {num_required}"
        )
    if num_required >= 2**31:
        raise InvalidArgumentError(f"Argument num_required must fit int32, but was {num_required}")
    return num_required


def as_timeout(timeout: float | None) -> float | None:
    """Returns how many seconds to wait, ``None`` for ever."""
    if timeout is None:
        return None
    seconds = float(timeout)
    if seconds != seconds:
        raise ValueError("timeout must be a number of seconds, got NaN")
    return min(max(seconds, 0.0), threading.TIMEOUT_MAX)


def _scalar(value: Any, name: str) -> np.ndarray:
    if value is None:
        raise ValueError(f"None values not supported: {name}")
    host = np.asarray(value)
    if host.ndim != 0:
        raise InvalidArgumentError(
            f"Argument {name} must be scalar, but had bad shape {as_text(host.shape)}"
        )
    return host
