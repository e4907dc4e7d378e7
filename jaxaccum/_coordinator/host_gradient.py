"""Gradients as callers hand them over, checked and padded to one of a few sizes.

Here run the checks that need no lock, in TensorFlow's order and with its messages. What lies in
host memory is looked at and copied by NumPy, which compiles nothing; values that lie on an
accelerator stay there, indices are fetched to be looked at.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._coordinator.arguments import brackets
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._coordinator.placement import in_host_memory
from jaxaccum._coordinator.spec import Spec
from jaxaccum._coordinator.staging import SMALL, aligned, num_bytes, padded_size
from jaxaccum._rows.shapes import UNKNOWN_ROWS_PADDING

_INT32 = np.dtype(np.int32)
_UINT64 = np.dtype(np.uint64)
_UNSIGNED: dict[np.dtype, np.dtype] = {
    np.dtype(np.int64): _UINT64,
    _UINT64: _UINT64,
    np.dtype(np.int32): np.dtype(np.uint32),
    np.dtype(np.uint32): np.dtype(np.uint32),
}


class HostGradient(NamedTuple):
    """A gradient ready to be dispatched.

    Attributes:
      indices: int ``[size]``, padding last; the caller's ``[num_slices]`` where ``is_small``.
      values: ``[size, *row]``; whatever was there where indices are padding. Or the caller's.
      num_slices: how many slices come before the padding.
      size: to which they are padded.
      row: shape of one row.
      is_small: whether it is to be copied to a stage, before the caller's call returns.
    """

    indices: np.ndarray
    values: np.ndarray | jax.Array
    num_slices: int
    size: int
    row: tuple[int, ...]
    is_small: bool


class GradientReader:
    """Reads gradients for an accumulator.

    Args:
      spec: of the accumulator.
      sharding: where gradients are wanted, one copy on each device of the accumulator.
    """

    def __init__(self, spec: Spec, sharding: jax.sharding.Sharding) -> None:
        self._dtype = spec.dtype
        self._shape = spec.shape
        self._padding = spec.padding
        self._sharding = sharding

    def read(
        self, indices: Any, values: Any, dense_shape: Any, padding: int | None = None
    ) -> HostGradient:
        """Checks a gradient against what is fixed for good, and pads it.

        Args:
          indices: vector of whole numbers.
          values: one slice an index.
          dense_shape: what the gradient claims to be of, or ``None``.
          padding: the index that marks padding in this gradient, ``None`` if none does.

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
        indices = self._check_range(np.asarray(indices), padding)
        size, row = padded_size(num_slices), shape[1:]
        if not isinstance(values, np.ndarray) and num_slices != size and in_host_memory(values):
            values = np.asarray(values)
        is_small = isinstance(values, np.ndarray) and num_bytes(size, row, self._dtype) <= SMALL
        if not is_small:
            indices = _pad(indices, size, self._padding, _INT32)
            values = self._place(values, size)
        return HostGradient(indices, values, num_slices, size, row, is_small)

    def _as_values(self, values: Any) -> np.ndarray | jax.Array:
        if type(values) is np.ndarray or isinstance(values, jax.Array):
            host = values
        elif isinstance(values, (list, tuple, bool, int, float, complex)):
            return _converted(values, self._dtype)
        else:
            host = _unmasked(values, "grad_values")
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

    def _check_range(self, indices: np.ndarray, padding: int | None) -> np.ndarray:
        """Returns indices in range, padding being the accumulator's."""
        unsigned = _UNSIGNED.get(indices.dtype)
        if unsigned is None:
            indices = _whole(indices)
            unsigned = _UINT64
        limit = self._padding
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

    def _place(self, values: np.ndarray | jax.Array, size: int) -> np.ndarray | jax.Array:
        """Returns values no caller can change, of ``size`` slices, in the right place."""
        if isinstance(values, np.ndarray):
            return _pad(values, size, None, self._dtype)
        if values.devices() != self._sharding.device_set:
            values = jax.device_put(values, self._sharding)
        return values if values.shape[0] == size else _pad_on_device(values, size)


def _as_indices(indices: Any) -> np.ndarray | jax.Array:
    if type(indices) is np.ndarray or isinstance(indices, jax.Array):
        return indices
    return _unmasked(indices, "grad_indices")


def _unmasked(given: Any, name: str) -> np.ndarray:
    if isinstance(given, np.ma.MaskedArray):
        raise InvalidArgumentError(
            f"{name} must not be a masked array: fill it (numpy.ma.filled) or leave slices out"
        )
    return np.asarray(given)


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


def _pad(array: np.ndarray, size: int, fill: int | None, dtype: np.dtype) -> np.ndarray:
    # XLA reads an aligned argument in place, long after the call: so it must be a copy, and an
    # aligned one is the only copy made.
    padded = aligned((size, *array.shape[1:]), dtype)
    padded[: array.shape[0]] = array
    if fill is not None:
        padded[array.shape[0] :] = fill
    return padded


@functools.partial(jax.jit, static_argnums=1)
def _pad_on_device(array: jax.Array, size: int) -> jax.Array:
    return jnp.pad(array, [(0, size - array.shape[0])] + [(0, 0)] * (array.ndim - 1))
