"""Gradients as callers hand them over, checked and padded to one of a few sizes.

Here run the checks that need no lock, in TensorFlow's order and with its messages. What lies in
host memory is looked at and copied by NumPy, which compiles nothing; what lies on an accelerator
stays there.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._coordinator.staging import SMALL, aligned, num_bytes
from jaxaccum._rows.indexed_slices import UNKNOWN_ROWS_PADDING, padding_index

SMALLEST_SIZE = 32
_INT32 = np.dtype(np.int32)
_UNSIGNED = {
    np.dtype(np.int64): np.uint64,
    np.dtype(np.uint64): np.uint64,
    np.dtype(np.int32): np.uint32,
    np.dtype(np.uint32): np.uint32,
}


class HostGradient(NamedTuple):
    """A gradient ready to be dispatched.

    Attributes:
      indices: int ``[size]``, padding last; the caller's ``[num_slices]`` where ``is_small``.
      values: ``[size, *row]``; whatever was there where indices are padding. Or the caller's.
      num_slices: how many slices come before the padding.
      size: to which they are padded.
      row: shape of one row.
      rows: the row count whose end marks padding in ``indices``.
      is_checked: whether the index values were looked at.
      is_small: whether it is to be copied to a stage, before the caller's call returns.
    """

    indices: np.ndarray | jax.Array
    values: np.ndarray | jax.Array
    num_slices: int
    size: int
    row: tuple[int, ...]
    rows: int | None
    is_checked: bool
    is_small: bool


class GradientReader:
    """Reads gradients for an accumulator of one dtype, shape and place.

    Args:
      dtype: of the values.
      shape: of the accumulator; ``()`` claims nothing, ``None`` entries are open.
      place: where gradients are wanted, one copy on each device of the accumulator.
    """

    def __init__(
        self, dtype: np.dtype, shape: tuple[int | None, ...], place: jax.sharding.Sharding
    ) -> None:
        self._dtype = dtype
        self._shape = shape
        self._place = place
        self._rows = shape[0] if shape else None
        self._limit = padding_index(shape or None)

    def read(
        self,
        indices: Any,
        values: Any,
        dense_shape: Any,
        *,
        padding: int | None = None,
        validate: bool = True,
    ) -> HostGradient:
        """Checks a gradient against what is fixed for good, and pads it.

        Args:
          indices: vector of whole numbers.
          values: one slice an index.
          dense_shape: what the gradient claims to be of, or ``None``.
          padding: the index that marks padding in this gradient, ``None`` if none does.
          validate: whether to fetch indices from an accelerator to look at them.

        Raises:
          InvalidArgumentError: with TensorFlow's message.
        """
        indices, values = _as_indices(indices), self._as_values(values)
        shape = values.shape
        if indices.ndim != 1:
            raise InvalidArgumentError(
                f"Input indices should be vector but received shape: {brackets(indices.shape)}"
            )
        if not shape:
            raise InvalidArgumentError("Values cannot be 0-dimensional.")
        num_slices = indices.shape[0]
        if shape[0] != num_slices:
            raise InvalidArgumentError(
                f"Expected {num_slices} non-empty input values, got {shape[0]}"
            )
        if dense_shape is not None and self._shape and dense_shape is not self._shape:
            self._check_dense_shape(dense_shape)
        is_checked = validate or type(indices) is np.ndarray or in_host_memory(indices)
        if is_checked:
            indices, rows = self._checked(np.asarray(indices), padding), self._rows
        else:
            rows = None if padding in (None, UNKNOWN_ROWS_PADDING) else padding
        size, row = padded_size(num_slices), shape[1:]
        if isinstance(values, jax.Array) and num_slices != size and in_host_memory(values):
            values = np.asarray(values)
        is_small = (
            is_checked and type(values) is np.ndarray and num_bytes(size, row, self._dtype) <= SMALL
        )
        if not is_small:
            indices = self._padded(indices, size, padding_index((rows,)), _INT32)
            values = self._padded(values, size, None, self._dtype)
        return HostGradient(indices, values, num_slices, size, row, rows, is_checked, is_small)

    def _as_values(self, values: Any) -> np.ndarray | jax.Array:
        if type(values) is np.ndarray or isinstance(values, jax.Array):
            host = values
        elif isinstance(values, (list, tuple, bool, int, float, complex)):
            return _converted(values, self._dtype)
        else:
            host = np.asarray(values)
        if host.dtype != self._dtype:
            raise InvalidArgumentError(
                f"grad_values must be {self._dtype} as the accumulator, got {host.dtype}"
            )
        return host

    def _check_dense_shape(self, dense_shape: Any) -> None:
        given = _entries(dense_shape)
        if len(given) < len(self._shape):
            raise InvalidArgumentError(
                f"Shape mismatch: expected shape rank at least {len(self._shape)}, got {len(given)}"
            )
        for i, (expected, dim) in enumerate(zip(self._shape, given, strict=False)):
            if expected is not None and dim is not None and expected != dim:
                raise InvalidArgumentError(
                    f"Shape mismatch: expected shape dim {i} to be {expected}, got {dim}"
                )

    def _checked(self, indices: np.ndarray, padding: int | None) -> np.ndarray:
        """Returns indices in range, padding being the accumulator's."""
        unsigned = _UNSIGNED.get(indices.dtype)
        if unsigned is None:
            indices = _whole(indices)
            unsigned = np.uint64
        limit = self._limit
        end = limit if padding is None else min(limit, padding)
        if not indices.size:
            return indices
        # Negative numbers are large unsigned ones: one pass finds both kinds of outliers.
        bits = indices.view(unsigned)
        if np.maximum.reduce(bits) < end:
            return indices
        is_bad = bits >= end
        if padding is not None:
            is_padding = bits == padding
            is_bad &= ~is_padding
            if not is_bad.any():
                return np.where(is_padding, limit, indices)
        i = int(np.argmax(is_bad))
        raise InvalidArgumentError(_outlier(i, int(indices[i]), end))

    def _padded(
        self, array: np.ndarray | jax.Array, size: int, fill: int | None, dtype: np.dtype
    ) -> np.ndarray | jax.Array:
        """Returns an array no caller can change, of ``size`` slices, in the right place."""
        num_slices = array.shape[0]
        if isinstance(array, jax.Array):
            array = _placed(array, self._place)
            return array if num_slices == size else _pad(array, size, fill)
        # XLA reads an aligned argument in place, long after the call: so it must be a copy, and an
        # aligned one is the only copy made.
        padded = aligned((size, *array.shape[1:]), dtype)
        padded[:num_slices] = array
        if fill is not None:
            padded[num_slices:] = fill
        return padded


def padded_size(num_slices: int) -> int:
    """Returns the size to which ``num_slices`` slices are padded: a power of two, 32 at least."""
    return max(SMALLEST_SIZE, 1 << (num_slices - 1).bit_length()) if num_slices else SMALLEST_SIZE


def in_host_memory(array: jax.Array) -> bool:
    """Whether NumPy can look at ``array`` without a transfer."""
    return next(iter(array.devices())).platform == "cpu"


def brackets(shape: Iterable[int]) -> str:
    """Returns ``shape`` as TensorFlow prints it."""
    return f"[{','.join(map(str, shape))}]"


def as_step(value: Any, name: str) -> int:
    """Returns a scalar as a Python integer, cut off as TensorFlow casts it."""
    if type(value) is int:
        return value
    if value is None:
        raise ValueError(f"None values not supported: {name}")
    host = np.asarray(value)
    if host.ndim != 0:
        raise InvalidArgumentError(
            f"Argument {name} must be scalar, but had bad shape {brackets(host.shape)}"
        )
    if host.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be a number, got {value!r}")
    return int(host)


def _as_indices(indices: Any) -> np.ndarray | jax.Array:
    if type(indices) is np.ndarray or isinstance(indices, jax.Array):
        return indices
    return np.asarray(indices)


def _whole(indices: np.ndarray) -> np.ndarray:
    """Indices of an unusual dtype as int64; TensorFlow would cut fractions off."""
    if indices.dtype.kind not in "biuf":
        raise InvalidArgumentError(f"grad_indices must be integers, got {indices.dtype}")
    if indices.dtype.kind == "f" and indices.size:
        is_bad = ~(np.isfinite(indices) & (np.trunc(indices) == indices))
        is_bad |= np.abs(np.where(is_bad, 0, indices)) >= 2.0**63
        if is_bad.any():
            i = np.argmax(is_bad)
            raise InvalidArgumentError(
                f"grad_indices must be whole numbers, got {indices.flat[i]} at position {i}"
            )
    return indices.astype(np.int64)


def _outlier(i: int, index: int, end: int) -> str:
    if index < 0:
        return f"Shape mismatch: index of slice {i} is negative; index is {index}"
    if end == UNKNOWN_ROWS_PADDING:
        return (
            f"grad_indices must be below 2**31 - 1, got {index} at position {i}; map 64-bit ids to "
            "table rows (or hash them to 31 bits) before they reach jaxaccum"
        )
    return (
        f"Shape mismatch: index of slice {i} exceeded limits of shape; "
        f"index is {index} exceeded {end}"
    )


def _converted(values: Any, dtype: np.dtype) -> np.ndarray:
    """Python numbers as an array of ``dtype``, where that does not change their kind."""
    host = np.asarray(values)
    if host.size and _kind(host.dtype) > _kind(dtype):
        raise InvalidArgumentError(
            f"grad_values must be {dtype} as the accumulator, got {host.dtype}"
        )
    if host.size and _kind(dtype) == 1:
        info = cast(Any, jnp).iinfo(dtype)  # NumPy knows no int4
        if not info.min <= host.min() <= host.max() <= info.max:
            raise InvalidArgumentError(f"grad_values must fit {dtype}, got {values!r}")
    return host.astype(dtype)


def _kind(dtype: np.dtype) -> int:
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next((i for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)), len(kinds))


def _entries(dense_shape: Any) -> list[int | None]:
    """The dimensions a gradient claims; ``None`` claims nothing of its dimension."""
    if isinstance(dense_shape, (list, tuple)):
        return [None if d is None else operator.index(d) for d in dense_shape]
    return cast("list[int | None]", np.asarray(dense_shape).astype(np.int64).ravel().tolist())


def _placed(array: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
    if array.devices() == place.device_set:
        return array
    return jax.device_put(array, place)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pad(array: jax.Array, size: int, fill: int | None) -> jax.Array:
    widths = [(0, size - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, widths, constant_values=jnp.asarray(fill or 0, array.dtype))
