"""Host memory as XLA likes it: aligned, and of few sizes.

XLA on a CPU reads an aligned array in place, long after the call that was given it. So what has
been handed to a dispatch is never written again.
"""

from __future__ import annotations

import math

import numpy as np

_ALIGNMENT = 64
_SMALLEST_SIZE = 32


def count_bytes(size: int, row_shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Returns how many bytes ``size`` slices take."""
    return size * (4 + dtype.itemsize * math.prod(row_shape))


def round_up(num_slices: int, limit: int | None = None) -> int:
    """Returns the size ``num_slices`` slices are padded to: a power of two, 32 at least.

    So a program is compiled for each of a few sizes only. Of ``limit``, no more than that.
    """
    size = _SMALLEST_SIZE if num_slices <= _SMALLEST_SIZE else 1 << (num_slices - 1).bit_length()
    return size if limit is None else min(size, limit)


def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns memory that XLA need not copy to read."""
    size = dtype.itemsize * math.prod(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def copy(array: np.ndarray) -> np.ndarray:
    """Returns a copy that is copied no further."""
    result = allocate(array.shape, array.dtype)
    result[...] = array
    return result


def pad(array: np.ndarray, size: int, fill: int | None, dtype: np.dtype) -> np.ndarray:
    """Returns a copy of ``size`` slices; those added hold ``fill``, or anything."""
    padded = allocate((size, *array.shape[1:]), dtype)
    padded[: array.shape[0]] = array
    if fill is not None:
        padded[array.shape[0] :] = fill
    return padded
