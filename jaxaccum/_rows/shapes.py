"""Shapes of gradients and the index that pads them; ids that int32 can hold."""

from __future__ import annotations

import operator
from typing import cast

import numpy as np

# No row has this index: the padding of gradients whose row count is unknown.
UNKNOWN_ROWS_PADDING = 2**31 - 1


def canonical_shape(dense_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Returns ``dense_shape`` as a tuple of ints whose first entry may be ``None``."""
    try:
        rows, *row = dense_shape
        shape = (
            None if rows is None else operator.index(rows),
            *(operator.index(d) for d in cast("list[int]", row)),
        )
    except (TypeError, ValueError):
        raise ValueError(
            f"dense_shape must be (rows, *row) of ints, rows None if unknown, got {dense_shape!r}"
        ) from None
    if any(d is not None and not 0 <= d <= UNKNOWN_ROWS_PADDING for d in shape):
        raise ValueError(f"dense_shape must lie within 0 and 2**31 - 1, got {dense_shape!r}")
    return shape


def padding_index(dense_shape: tuple[int | None, ...] | None) -> int:
    """Returns the index that marks padding in a gradient of ``dense_shape``."""
    rows = dense_shape[0] if dense_shape else None
    return UNKNOWN_ROWS_PADDING if rows is None else rows


def check_host_indices(indices: object) -> None:
    """Raises ``ValueError`` if NumPy ``indices`` hold an entry that int32 cannot."""
    if isinstance(indices, np.ndarray) and indices.dtype.kind in "iu" and indices.size:
        low, high = indices.min(), indices.max()
        if low < -(2**31) or high >= 2**31:
            raise ValueError(
                f"indices must fit int32, got entries from {low} to {high}; map 64-bit ids "
                "to table rows (or hash them to 31 bits) before they reach jaxaccum"
            )
