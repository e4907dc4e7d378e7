"""Host memory for gradients: where small ones wait to be added by one dispatch, and aligned arrays.

XLA on a CPU reads an aligned array in place, long after the call that was given it. So what has
been handed to a dispatch is never written again: a stage is thrown away, and the next one new.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# A gradient of more bytes than this gains little: its copies and additions cost more than the
# dispatch that staging spares.
SMALL = 1 << 16
_STAGE = 1 << 18
_DEEPEST = 32
_ALIGNMENT = 64
_SMALLEST_SIZE = 32


class Stage:
    """Small gradients of one size, in order.

    Args:
      size: slices of each, the last ones padding.
      row_shape: shape of a row.
      dtype: of the values.
      padding: the index that marks padding.

    Attributes:
      indices: int32 ``[depth, size]``.
      values: ``[depth, size, *row]``.
      num_staged: how many there are.
    """

    __slots__ = ("_padding", "depth", "indices", "num_staged", "size", "values")

    def __init__(
        self, size: int, row_shape: tuple[int, ...], dtype: np.dtype, padding: int
    ) -> None:
        self.size = size
        self._padding = padding
        self.depth = choose_depth(size, row_shape, dtype)
        self.indices = allocate((self.depth, size), np.dtype(np.int32))
        self.values = allocate((self.depth, size, *row_shape), dtype)
        self.num_staged = 0

    def write(self, indices: Any, values: Any) -> None:
        """Copies a gradient in behind the others; it counts when ``num_staged`` does."""
        k, num_slices = self.num_staged, indices.shape[0]
        if num_slices == self.size:
            self.indices[k] = indices
            self.values[k] = values
        else:
            self.indices[k, :num_slices] = indices
            self.indices[k, num_slices:] = self._padding
            self.values[k, :num_slices] = values


def choose_depth(size: int, row_shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Returns how many gradients a stage holds."""
    return max(1, min(_DEEPEST, _STAGE // count_bytes(size, row_shape, dtype)))


def count_bytes(size: int, row_shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Returns how many bytes a gradient of ``size`` slices takes."""
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


def pad(array: np.ndarray, size: int, fill: int | None, dtype: np.dtype) -> np.ndarray:
    """Returns a copy of ``size`` slices, the only one made; those added hold ``fill`` or anything.

    XLA reads an aligned array in place, long after the call that was given it: so it must be a
    copy, and an aligned one is copied no further.
    """
    padded = allocate((size, *array.shape[1:]), dtype)
    padded[: array.shape[0]] = array
    if fill is not None:
        padded[array.shape[0] :] = fill
    return padded
