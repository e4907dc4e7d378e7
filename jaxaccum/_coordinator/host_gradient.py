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

from jaxaccum._coordinator.arguments import as_text
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._coordinator.host_memory import copy, count_bytes, pad, round_up
from jaxaccum._coordinator.placement import is_in_host_memory, outside_jit
from jaxaccum._coordinator.spec import DenseSpec, Shape, Spec, TreeSpec, check_shape
from jaxaccum._rows.shapes import UNKNOWN_ROWS_PADDING

_INT32 = np.dtype(np.int32)
_UINT64 = np.dtype(np.uint64)
_UNSIGNED: dict[np.dtype, np.dtype] = {
    np.dtype(np.int64): _UINT64,
    _UINT64: _UINT64,
    np.dtype(np.int32): np.dtype(np.uint32),
    np.dtype(np.uint32): np.dtype(np.uint32),
}


# A gradient of more bytes than this gains little from being staged: its copies and additions cost
# more than the dispatch that staging spares.
SMALL = 1 << 16

_Values = np.ndarray | jax.Array
_Sharding = jax.sharding.Sharding


class HostGradient(NamedTuple):
    """A gradient ready to be dispatched: of each table, and of each dense leaf.

    Attributes:
      indices: int ``[size]``, padding last; the caller's ``[num_slices]`` where ``is_small``.
      values: ``[size, *row]``, anything where indices are padding. Or the caller's.
      dense: of dense leaves, or the caller's.
      num_slices: how many slices of each table come before the padding.
      sizes: to which they are padded.
      row_shapes: shapes of a row of each table, and then of the dense leaves.
      is_small: whether it is to be copied to a stage, before the caller's call returns.
    """

    indices: list[np.ndarray]
    values: list[_Values]
    dense: list[_Values]
    num_slices: list[int]
    sizes: tuple[int, ...]
    row_shapes: list[tuple[int, ...]]
    is_small: bool

    @property
    def num_bytes(self) -> int:
        """What it takes, padded."""
        rows = zip(self.sizes, self.values, strict=True)
        of_tables = sum(count_bytes(size, each.shape[1:], each.dtype) for size, each in rows)
        return of_tables + sum(leaf.nbytes for leaf in self.dense)


def read_rows(
    spec: TreeSpec,
    sharding: _Sharding,
    indices: Any,
    values: Any,
    dense_shape: Any,
    padding: int | None = None,
) -> HostGradient:
    """Checks a gradient of a single table, and pads it: `check_rows` tells the arguments."""
    table = spec.tables[0]
    indices, values, size = check_rows(table, indices, values, dense_shape, padding)
    shape, is_small = values.shape, isinstance(values, np.ndarray)
    row_shape = shape[1:]
    if is_small:
        is_small = count_bytes(size, row_shape, table.dtype) <= SMALL
    read = HostGradient([indices], [values], [], [shape[0]], (size,), [row_shape], is_small)
    return read if is_small else _pad_all(read, spec, sharding)


def read_dense(spec: TreeSpec, sharding: _Sharding, gradient: Any) -> HostGradient:
    """Checks a gradient of a single dense leaf."""
    leaf = _as_values(gradient, spec.dense[0].dtype, "grad")
    return assemble(spec, sharding, [], [leaf])


def assemble(
    spec: TreeSpec,
    sharding: _Sharding,
    tables: list[tuple[np.ndarray, _Values, int]],
    dense: list[_Values],
    *,
    copies: bool = True,
) -> HostGradient:
    """Puts the checked leaves of one gradient together, padded unless they are small.

    Without ``copies`` nobody writes to NumPy arrays any more: they are used in place if they fit.
    """
    indices, values, num_slices, sizes = [], [], [], []
    row_shapes: list[tuple[int, ...]] = []
    num_bytes, is_small = 0, True
    for ids, rows, size in tables:
        shape = rows.shape
        row_shape = shape[1:]
        indices.append(ids)
        values.append(rows)
        num_slices.append(shape[0])
        sizes.append(size)
        row_shapes.append(row_shape)
        num_bytes += count_bytes(size, row_shape, rows.dtype)
        is_small = is_small and isinstance(rows, np.ndarray)
    for leaf in dense:
        row_shapes.append(leaf.shape)
        num_bytes += leaf.nbytes
        is_small = is_small and isinstance(leaf, np.ndarray)
    is_small = is_small and num_bytes <= SMALL
    read = HostGradient(indices, values, dense, num_slices, tuple(sizes), row_shapes, is_small)
    return read if is_small else _pad_all(read, spec, sharding, copies=copies)


def _pad_all(
    read: HostGradient, spec: TreeSpec, sharding: _Sharding, *, copies: bool = True
) -> HostGradient:
    """Returns a gradient of padded sizes, in memory of its own wherever NumPy could change it."""

    def own(array: np.ndarray, size: int, fill: int | None, dtype: np.dtype) -> np.ndarray:
        if not copies and array.shape[0] == size and array.dtype == dtype:
            return array
        return pad(array, size, fill, dtype)

    return read._replace(
        indices=[
            own(ids, size, table.padding, _INT32)
            for ids, size, table in zip(read.indices, read.sizes, spec.tables, strict=True)
        ],
        values=[
            own(rows, size, None, rows.dtype)
            if isinstance(rows, np.ndarray)
            else _transfer(rows, size, sharding)
            for rows, size in zip(read.values, read.sizes, strict=True)
        ],
        dense=[
            (copy(leaf) if copies else leaf)
            if isinstance(leaf, np.ndarray)
            else _transfer(leaf, None, sharding)
            for leaf in read.dense
        ],
        is_small=False,
    )


def make_own(read: HostGradient) -> HostGradient:
    """Returns a gradient that nobody can change or donate any more."""
    if read.is_small:
        indices, values, dense = (
            [copy(np.asarray(each)) for each in arrays]
            for arrays in (read.indices, read.values, read.dense)
        )
        return read._replace(indices=indices, values=[*values], dense=[*dense])
    arrays = [*read.values, *read.dense]  # NumPy's have been copied before
    copies = iter(_copy_on_device([each for each in arrays if isinstance(each, jax.Array)]))
    own = [next(copies) if isinstance(each, jax.Array) else each for each in arrays]
    num_tables = len(read.values)
    return read._replace(values=own[:num_tables], dense=own[num_tables:])


def check_rows(
    spec: Spec, indices: Any, values: Any, dense_shape: Any, padding: int | None = None
) -> tuple[np.ndarray, _Values, int]:
    """Checks a gradient of a table against what is fixed for good.

    Args:
      spec: of the table.
      indices: vector of whole numbers.
      values: one slice an index.
      dense_shape: what the gradient claims to be of, or ``None``.
      padding: the index that marks padding in this gradient, ``None`` if none does.

    Returns:
      Indices and values, in host memory where it spares a transfer; and the size to pad them to.

    Raises:
      InvalidArgumentError: with TensorFlow's message.
    """
    if type(indices) is not np.ndarray:
        indices = _as_array(indices, "grad_indices")
    if type(values) is not np.ndarray or values.dtype != spec.dtype:
        values = _as_values(values, spec.dtype)
    shape = values.shape
    if indices.ndim != 1:
        raise InvalidArgumentError(
            f"Input indices should be vector but received shape: {as_text(indices.shape)}"
        )
    if not shape:
        raise InvalidArgumentError("Values cannot be 0-dimensional.")
    num_slices = indices.shape[0]
    if shape[0] != num_slices:
        raise InvalidArgumentError(f"Expected {num_slices} non-empty input values, got {shape[0]}")
    if dense_shape is not None and spec.shape and dense_shape is not spec.shape:
        check_shape("shape", spec.shape, _as_shape(dense_shape))
    indices = _check_range(np.asarray(indices), padding, spec.padding)
    size = round_up(num_slices)
    if not isinstance(values, np.ndarray) and num_slices != size and is_in_host_memory(values):
        values = np.asarray(values)
    return indices, values, size


def check_dense(spec: DenseSpec, leaf: Any) -> _Values:
    """Checks a gradient of a dense leaf, of known shape, against what is fixed for good."""
    leaf = _as_values(leaf, spec.dtype, "grad")
    if leaf.shape != spec.shape:
        spec.check_row(leaf.shape, None)
    return leaf


def _as_array(given: Any, name: str) -> np.ndarray | jax.Array:
    if isinstance(given, jax.Array):
        return given
    if isinstance(given, np.ma.MaskedArray):
        raise InvalidArgumentError(
            f"{name} must not be a masked array: fill it (numpy.ma.filled) or leave slices out"
        )
    return np.asarray(given)


def _as_values(values: Any, dtype: np.dtype, name: str = "grad_values") -> _Values:
    if type(values) is not np.ndarray:
        if isinstance(values, (list, tuple, bool, int, float, complex)):
            return _convert(values, dtype, name)
        values = _as_array(values, name)
    if values.dtype != dtype:
        raise InvalidArgumentError(f"{name} must be {dtype} as the accumulator, got {values.dtype}")
    return values


def _check_range(indices: np.ndarray, padding: int | None, limit: int) -> np.ndarray:
    """Returns indices below ``limit``, padding being ``limit`` itself; or raises."""
    unsigned = _UNSIGNED.get(indices.dtype)
    if unsigned is None:
        indices, unsigned = _as_int64(indices), _UINT64
    if not indices.size:
        return indices
    end = limit if padding is None else min(limit, padding)
    # Negative numbers are large unsigned ones: one pass finds both kinds of outliers. Of a few
    # indices argmax finds the largest in a third of the time that max takes.
    bits = indices.view(unsigned)
    if bits.item(bits.argmax()) < end:
        return indices
    is_bad = bits >= end
    if padding is not None:
        is_padding = bits == padding
        is_bad &= ~is_padding
        if not is_bad.any():
            return np.where(is_padding, limit, indices)
    i = int(np.argmax(is_bad))
    index = int(indices[i])
    if index < 0:
        raise InvalidArgumentError(
            f"Shape mismatch: index of slice {i} is negative; index is {index}"
        )
    if end == UNKNOWN_ROWS_PADDING:
        raise InvalidArgumentError(
            f"grad_indices must be below 2**31 - 1, got {index} at position {i}; map 64-bit ids to "
            "table rows (or hash them to 31 bits) before they reach jaxaccum"
        )
    raise InvalidArgumentError(
        f"Shape mismatch: index of slice {i} exceeded limits of shape; "
        f"index is {index} exceeded {end}"
    )


def _as_int64(indices: np.ndarray) -> np.ndarray:
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


def _convert(values: Any, dtype: np.dtype, name: str) -> np.ndarray:
    """Python numbers as an array of ``dtype``, where that does not change their kind."""
    host = np.asarray(values)
    if host.size and _find_kind(host.dtype) > _find_kind(dtype):
        raise InvalidArgumentError(f"{name} must be {dtype} as the accumulator, got {host.dtype}")
    if host.size and _find_kind(dtype) == 1:
        info = cast(Any, jnp).iinfo(dtype)  # NumPy knows no int4
        if not info.min <= host.min() <= host.max() <= info.max:
            raise InvalidArgumentError(f"{name} must fit {dtype}, got {values!r}")
    return host.astype(dtype)


def _find_kind(dtype: np.dtype) -> int:
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next((i for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)), len(kinds))


def _as_shape(dense_shape: Any) -> Shape:
    """The dimensions a gradient claims; ``None`` claims nothing of its dimension."""
    if isinstance(dense_shape, (list, tuple)):
        return tuple(None if d is None else operator.index(d) for d in dense_shape)
    return tuple(np.asarray(dense_shape).astype(np.int64).ravel().tolist())


@outside_jit
def _transfer(values: jax.Array, size: int | None, sharding: _Sharding) -> jax.Array:
    """Returns ``size`` slices, or all there are, on the devices of ``sharding``."""
    if values.devices() != sharding.device_set:
        values = jax.device_put(values, sharding)
    return values if size in (None, values.shape[0]) else _pad_on_device(values, size)


@outside_jit
@jax.jit
def _copy_on_device(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(each) for each in arrays]


@functools.partial(jax.jit, static_argnums=1)
def _pad_on_device(array: jax.Array, size: int) -> jax.Array:
    return jnp.pad(array, [(0, size - array.shape[0])] + [(0, 0)] * (array.ndim - 1))
