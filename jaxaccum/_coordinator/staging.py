"""Host memory for gradients: where small ones wait to be added by one dispatch, and aligned arrays.

XLA on a CPU reads an aligned array in place, long after the call that was given it. So what has
been handed to a dispatch is never written again: a stage is thrown away, and the next one new.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxaccum._rows.indexed_slices import padding_index

# A gradient of more bytes than this gains little: its copies and additions cost more than the
# dispatch that staging spares.
SMALL = 1 << 16
_STAGE = 1 << 18
_DEEPEST = 32
_ALIGNMENT = 64


class Stage:
    """Small gradients of one size, in order.

    Args:
      size: slices of each, the last ones padding.
      row: shape of a row.
      dtype: of the values.
      rows: the row count whose end marks padding.

    Attributes:
      indices: int32 ``[depth, size]``.
      values: ``[depth, size, *row]``.
      num_staged: how many there are.
    """

    __slots__ = ("_padding", "depth", "indices", "num_staged", "rows", "size", "values")

    def __init__(self, size: int, row: tuple[int, ...], dtype: np.dtype, rows: int | None) -> None:
        self.size = size
        self.rows = rows
        self._padding = padding_index((rows,))
        self.depth = stage_depth(size, row, dtype)
        self.indices = aligned((self.depth, size), np.dtype(np.int32))
        self.values = aligned((self.depth, size, *row), dtype)
        self.num_staged = 0

    def write(self, indices: Any, values: Any) -> None:
        """Copies a gradient to the next place; it counts when ``num_staged`` does."""
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


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns memory XLA need not copy to read it."""
    size = dtype.itemsize * math.prod(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
