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
      row: shape of a row.
      dtype: of the values.
      padding: the index that marks padding.

    Attributes:
      indices: int32 ``[depth, size]``.
      values: ``[depth, size, *row]``.
      num_staged: how many there are.
    """

    __slots__ = ("_padding", "depth", "indices", "num_staged", "size", "values")

    def __init__(self, size: int, row: tuple[int, ...], dtype: np.dtype, padding: int) -> None:
        self.size = size
        self._padding = padding
        self.depth = stage_depth(size, row, dtype)
        self.indices = aligned((self.depth, size), np.dtype(np.int32))
        self.values = aligned((self.depth, size, *row), dtype)
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


def stage_depth(size: int, row: tuple[int, ...], dtype: np.dtype) -> int:
    """How many gradients a stage holds."""
    return max(1, min(_DEEPEST, _STAGE // num_bytes(size, row, dtype)))


def num_bytes(size: int, row: tuple[int, ...], dtype: np.dtype) -> int:
    """What a gradient of ``size`` slices takes."""
    return size * (4 + dtype.itemsize * math.prod(row))


def padded_size(num_slices: int, limit: int | None = None) -> int:
    """Returns the size ``num_slices`` slices are padded to: a power of two, 32 at least.

    So a program is compiled for each of a few sizes only. Of ``limit``, no more than that.
    """
    size = _SMALLEST_SIZE if num_slices <= _SMALLEST_SIZE else 1 << (num_slices - 1).bit_length()
    return size if limit is None else min(size, limit)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns memory XLA need not copy to read it."""
    size = dtype.itemsize * math.prod(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
