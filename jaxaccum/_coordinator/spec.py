"""What an accumulator is, and which arguments make sense of one."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jax.typing import DTypeLike

from jaxaccum._accumulator.state import Reduction, init
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._rows.shapes import UNKNOWN_ROWS_PADDING, padding_index

Shape = tuple[int | None, ...]
_REDUCTIONS: dict[str, Reduction] = {
    "MEAN": "mean_per_row",
    "SUM": "sum",
    "MEAN_PER_GRADIENT": "mean_per_gradient",
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What an accumulator is, and what all who share its name must agree on.

    Attributes:
      dtype: of the gradients.
      shape: of the gradients; ``()`` claims nothing, ``None`` entries are open. The one form an
        unknown shape has on the host.
      reduction: what a take makes of the sums.
      sum_dtype: of the sums.
    """

    dtype: np.dtype
    shape: Shape
    reduction: Reduction
    sum_dtype: np.dtype

    @property
    def num_rows(self) -> int | None:
        """How many rows there are, ``None`` if unknown."""
        return self.shape[0] if self.shape else None

    @functools.cached_property
    def padding(self) -> int:
        """The index that marks padding."""
        return padding_index(self.shape)

    @classmethod
    def of(
        cls,
        dtype: DTypeLike,
        shape: Sequence[int | None] | int | None,
        reduction_type: str | None,
        accumulator_dtype: DTypeLike | None,
    ) -> Spec:
        """Makes sense of a constructor's arguments, or raises as TensorFlow's does."""
        if dtype is None:
            raise TypeError("Expected DataType for argument 'dtype' not None.")
        reduction = _REDUCTIONS.get("MEAN" if reduction_type is None else reduction_type)
        if reduction is None:
            allowed = ", ".join(f'"{name}"' for name in _REDUCTIONS)
            raise ValueError(
                "Attr 'reduction_type' of 'SparseConditionalAccumulator' Op passed string "
                f"{reduction_type!r} not in: {allowed}."
            )
        # TensorFlow's own dtypes are welcome.
        dtype = getattr(dtype, "as_numpy_dtype", dtype)
        state = init((1,), dtype, capacity=1, accumulator_dtype=accumulator_dtype)
        return cls(state.dtype, _as_shape(shape), reduction, state.values.dtype)

    def check_saved(self, indices: np.ndarray, values: np.ndarray, touches: np.ndarray) -> None:
        """Raises unless rows, their sums and counts may be loaded."""
        if values.dtype != self.sum_dtype:
            raise InvalidArgumentError(
                f"state must hold values of {self.sum_dtype}, got {values.dtype}"
            )
        num_rows, end = indices.size, self.padding
        if not indices.shape == touches.shape == values.shape[:1] == (num_rows,):
            raise InvalidArgumentError(
                "state must hold as many indices, values and counts, got shapes "
                f"{indices.shape}, {values.shape} and {touches.shape}"
            )
        check_shape("values", self.shape, (None, *values.shape[1:]))
        if num_rows and not (0 <= indices.min() <= indices.max() < end):
            raise InvalidArgumentError(f"state must hold indices from 0 to below {end}")

    def __str__(self) -> str:
        """Says it in the words of the constructor."""
        name = next(name for name, value in _REDUCTIONS.items() if value == self.reduction)
        return f"{self.dtype}, shape {self.shape}, {name}, sums of {self.sum_dtype}"


def check_shape(name: str, expected: Shape, given: Shape) -> None:
    """Raises unless ``given`` begins as ``expected`` does, with TensorFlow's message."""
    if len(given) < len(expected):
        raise InvalidArgumentError(
            f"Shape mismatch: expected {name} rank at least {len(expected)}, got {len(given)}"
        )
    for i, (dim, got) in enumerate(zip(expected, given, strict=False)):
        if dim is not None and got is not None and dim != got:
            raise InvalidArgumentError(
                f"Shape mismatch: expected {name} dim {i} to be {dim}, got {got}"
            )


def _as_shape(shape: Sequence[int | None] | int | None) -> Shape:
    if shape is None:
        return ()
    dims = [shape] if hasattr(shape, "__index__") else shape
    result = tuple(None if d is None else operator.index(d) for d in cast("list[Any]", dims))
    for d in result:
        if d is not None and d < 0:
            raise ValueError(
                f"Error converting shape to a TensorShape: Dimension {d} must be >= 0."
            )
    if result and result[0] is not None and result[0] > UNKNOWN_ROWS_PADDING:
        raise ValueError(f"shape must lie within 0 and 2**31 - 1, got {result}")
    return result
