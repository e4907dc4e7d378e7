"""What an accumulator is, and which arguments make sense of one."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np
from jax.typing import DTypeLike

from jaxaccum._accumulator.state import Reduction, init
from jaxaccum._coordinator.arguments import as_text
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._coordinator.policy import TENSORFLOWS, Policy
from jaxaccum._rows.shapes import UNKNOWN_ROWS_PADDING, padding_index

Shape = tuple[int | None, ...]
_REDUCTIONS: dict[str, Reduction] = {
    "MEAN": "mean_per_row",
    "SUM": "sum",
    "MEAN_PER_GRADIENT": "mean_per_gradient",
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the gradients of one table are.

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

    _op: ClassVar[str] = "SparseConditionalAccumulator"

    @property
    def num_rows(self) -> int | None:
        """How many rows there are, ``None`` if unknown."""
        return self.shape[0] if self.shape else None

    @functools.cached_property
    def padding(self) -> int:
        """The index that marks padding."""
        return padding_index(self.shape)

    @functools.cached_property
    def row_shape(self) -> Shape:
        """Shape of a row, as far as it is known."""
        return self.shape[1:]

    @classmethod
    def of(
        cls,
        dtype: DTypeLike,
        shape: Sequence[int | None] | int | None,
        reduction_type: str | None,
        accumulator_dtype: DTypeLike | None,
    ) -> Self:
        """Makes sense of a constructor's arguments, or raises as TensorFlow's does."""
        if dtype is None:
            raise TypeError("Expected DataType for argument 'dtype' not None.")
        reduction = _REDUCTIONS.get("MEAN" if reduction_type is None else reduction_type)
        if reduction is None:
            allowed = ", ".join(f'"{name}"' for name in _REDUCTIONS)
            raise ValueError(
                f"Attr 'reduction_type' of '{cls._op}' Op passed string "
                f"{reduction_type!r} not in: {allowed}."
            )
        # TensorFlow's own dtypes are welcome.
        dtype = getattr(dtype, "as_numpy_dtype", dtype)
        state = init((1,), dtype, capacity=1, accumulator_dtype=accumulator_dtype)
        return cls(state.dtype, cls._as_shape(shape), reduction, state.values.dtype)

    @classmethod
    def _as_shape(cls, shape: Sequence[int | None] | int | None) -> Any:
        result = () if shape is None else _as_dims(shape)
        if result and result[0] is not None and result[0] > UNKNOWN_ROWS_PADDING:
            raise ValueError(f"shape must lie within 0 and 2**31 - 1, got {result}")
        return result

    def check_row(self, row_shape: Shape, held: Shape | None) -> None:
        """Raises unless rows of this shape may be added to those of shape ``held``, if any."""
        shape = self.shape
        if held is not None:
            shape = (None, *held)
            if len(row_shape) != len(held):
                raise InvalidArgumentError(
                    f"Shape mismatch: expected values rank {len(shape)}, got {1 + len(row_shape)}"
                )
        check_shape("values", shape, (None, *row_shape))

    def check_saved(self, values: np.ndarray, indices: np.ndarray, touches: np.ndarray) -> None:
        """Raises unless rows, their sums and counts may be loaded."""
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


class DenseSpec(Spec):
    """The same of a dense leaf; here ``shape`` is ``None`` where not even the rank is known."""

    _op = "ConditionalAccumulator"

    @classmethod
    def _as_shape(cls, shape: Sequence[int | None] | int | None) -> Any:
        return None if shape is None else _as_dims(shape)

    def check_row(self, row_shape: Shape, held: Shape | None) -> None:
        """Raises unless arrays of this shape may be added to one of shape ``held``, if any."""
        expected = self.shape if held is None else held
        if expected is None or row_shape == expected:
            return
        pairs = zip(expected, row_shape, strict=False)
        if len(expected) != len(row_shape) or any(d not in (None, got) for d, got in pairs):
            raise InvalidArgumentError(
                f"Shape mismatch: expected {as_text(expected)}, got {as_text(row_shape)}"
            )


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """What an accumulator is, and what all who share its name must agree on.

    Attributes:
      tables: of the tree.
      dense: its other leaves.
      names: of the tables and then of the dense leaves, each ending in what sets it off from what
        comes behind it; empty where there is only one leaf.
      policy: what is done with gradients that are late.
      structure: of the tree.
    """

    tables: tuple[Spec, ...]
    dense: tuple[DenseSpec, ...] = ()
    names: tuple[str, ...] = ("",)
    policy: Policy = TENSORFLOWS
    structure: Any = None

    @property
    def leaves(self) -> tuple[Spec, ...]:
        """Tables, then dense leaves."""
        return (*self.tables, *self.dense)

    @property
    def titles(self) -> tuple[str, ...]:
        """The names as they are told."""
        return tuple(name.rstrip("/") for name in self.names)

    def __str__(self) -> str:
        """Says what the leaves are."""
        leaves = zip(self.titles, self.leaves, strict=True)
        text = "; ".join(f"{title}: {leaf}" if title else f"{leaf}" for title, leaf in leaves)
        return text if self.policy == TENSORFLOWS else f"{text}; {self.policy}"


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


def as_dtype(values: Any, dtype: np.dtype) -> np.ndarray:
    """Returns saved values of ``dtype``, or raises."""
    values = np.asarray(values)
    if values.dtype.kind == "V":  # what npz files make of bfloat16
        values = values.view(dtype)
    if values.dtype != dtype:
        raise InvalidArgumentError(f"state must hold values of {dtype}, got {values.dtype}")
    return values


def _as_dims(shape: Sequence[int | None] | int) -> Shape:
    dims = [shape] if hasattr(shape, "__index__") else shape
    result = tuple(None if d is None else operator.index(d) for d in cast("list[Any]", dims))
    for d in result:
        if d is not None and d < 0:
            raise ValueError(
                f"Error converting shape to a TensorShape: Dimension {d} must be >= 0."
            )
    return result
