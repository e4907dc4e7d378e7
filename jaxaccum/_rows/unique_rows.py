"""Gradients in which every row stands once, and padding is zero."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxaccum._rows.indexed_slices import IndexedSlices, as_device_slices
from jaxaccum._rows.row_arithmetic import expand_to_rows, sum_repeated


def zero_padding(slices: IndexedSlices) -> IndexedSlices:
    """Returns ``slices`` with values of zero where the index is padding."""
    is_padding = expand_to_rows(slices.indices == slices.padding_index, slices.values)
    values = jnp.where(is_padding, jnp.zeros((), slices.values.dtype), slices.values)
    return dataclasses.replace(slices, values=values)


def sum_duplicates(grad: IndexedSlices) -> IndexedSlices:
    """Sums the slices of each row into one, in an order that is the same in every run.

    Gradients need not be unique anywhere in this library. This is for reproducible training on
    GPUs, where a scatter-add takes repeated rows in an order of its own: accumulate or apply what
    comes out of here, and the same inputs give the same bits. It also keeps many repetitions of
    one row from contending for it. The cost is a sort of the indices, and off the CPU a scan.

    Args:
      grad: ``n`` slices; their indices may be unsorted, repeated and padded.

    Returns:
      ``n`` slices: each row once, ascending, then padding with values of zero. Indices out of range
      stay, for whoever uses the gradient to refuse. 16-bit floats are summed in float32.

    Raises:
      TypeError: ``grad`` does not hold integer indices.
      ValueError: ranks or lengths do not fit together, or ids do not fit int32.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> grad = jaxaccum.IndexedSlices(jnp.array([7, 3, 7]), jnp.array([[1.], [2.], [3.]]), (9, 1))
      >>> unique = jaxaccum.sum_duplicates(grad)
      >>> unique.indices, unique.values.ravel()
      (Array([3, 7, 9], dtype=int32), Array([2., 4., 0.], dtype=float32))

    Source: ``jax.experimental.sparse.bcoo_sum_duplicates``, for rows.
    """
    grad = as_device_slices(grad)
    # Wide indices stay wide: an id that does not fit int32 must not become one that does.
    return unique_rows(zero_padding(grad))


def unique_rows(slices: IndexedSlices) -> IndexedSlices:
    """Returns ``slices``, fitted to a table, with repeated rows summed: each row at most once."""
    indices, values = sum_repeated(slices.indices, slices.values, slices.padding_index)
    return IndexedSlices(indices, values, slices.dense_shape)
