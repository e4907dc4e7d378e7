"""Row-sparse leaves made ready for arithmetic that is not linear: every row once, padding zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jaxaccum._reduction import quotient
from jaxaccum._slices import IndexedSlices, as_device_slices


def is_slices(node: object) -> bool:
    """Whether ``node`` is an ``IndexedSlices``: an ``is_leaf`` for trees that mix them in."""
    return isinstance(node, IndexedSlices)


def fit_to_table(
    slices: IndexedSlices, table_shape: tuple[int | None, ...] | None, name: str
) -> IndexedSlices:
    """Returns ``slices`` with the shape of the table, int32 indices and zeros where they pad.

    An index that is neither a row nor padding raises here if it can be read, that is outside
    ``jit``; inside, ``checkify`` reports it and the slice is treated as padding.

    Raises:
      TypeError: ``slices`` does not hold integer indices.
      ValueError: the row shape or row count differs from the table's, or an index is invalid.
    """
    slices = as_device_slices(slices)
    if table_shape is None or table_shape[0] is None:
        raise ValueError(
            f"params must be given where the row count is unknown, got {name} of shape "
            f"{table_shape}"
        )
    if slices.values.shape[1:] != table_shape[1:]:
        raise ValueError(
            f"{name} has rows of shape {slices.values.shape[1:]}, its table {table_shape[1:]}"
        )
    if slices.num_rows not in (None, table_shape[0]):
        raise ValueError(f"{name} has {slices.num_rows} rows, its table {table_shape[0]}")
    _check_indices(slices, name)
    mask = slices.row_mask & (slices.indices < table_shape[0])
    indices = jnp.where(mask, slices.indices, table_shape[0]).astype(jnp.int32)
    wide_mask = jnp.expand_dims(mask, tuple(range(1, slices.values.ndim)))
    values = jnp.where(wide_mask, slices.values, jnp.zeros((), slices.values.dtype))
    return IndexedSlices(indices, values, table_shape)


def unique_rows(slices: IndexedSlices) -> IndexedSlices:
    """Returns ``slices``, fitted to a table, with repeated rows summed: each row at most once.

    Rows that already come ascending with the padding last, as ``take`` hands them out, are passed
    through after one comparison; others pay a sort of the indices.
    """
    if slices.indices.shape[0] < 2:
        return slices
    left, right = slices.indices[:-1], slices.indices[1:]
    ascending = jnp.all((left < right) | (right == slices.padding_index))
    return jax.lax.cond(ascending, lambda s: s, _sum_duplicates, slices)


def gather_rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns the rows of ``table`` at ``indices``, zeros for padding."""
    rows = table.at[indices].get(mode="fill", fill_value=0)
    if indices.shape[0] == 0 or not jnp.issubdtype(table.dtype, jnp.floating):
        return rows
    # Rows that XLA's CPU backend has merely to move take it three times as long as rows it computes
    # with: those it loads in wide registers. So they are divided by a one it cannot see through;
    # a division is not put off to whoever reads the result. No number changes but subnormals, which
    # all arithmetic there takes for zero.
    one = jnp.where(indices[0] < 0, 2, 1).astype(rows.dtype)
    return quotient(rows, jnp.broadcast_to(one, rows.shape))


def scatter_rows(table: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns ``table`` with ``rows`` at ``indices``, which are unique; padding is dropped."""
    return table.at[indices].set(rows.astype(table.dtype), mode="drop", unique_indices=True)


def _sum_duplicates(slices: IndexedSlices) -> IndexedSlices:
    num, padding = slices.indices.shape[0], slices.padding_index
    positions = jnp.arange(num, dtype=jnp.int32)
    indices, order = jax.lax.sort((slices.indices, positions), num_keys=1)
    first = jnp.concatenate([jnp.ones((1,), bool), indices[1:] != indices[:-1]])
    segment = jnp.cumsum(first.astype(jnp.int32)) - 1
    unique = jnp.full((num,), padding, jnp.int32).at[segment].set(indices)
    # The values are added where they lie: sorting them first would move every row twice.
    segment_of = jnp.zeros((num,), jnp.int32).at[order].set(segment, unique_indices=True)
    wide = sum_dtype(slices.values.dtype)
    zeros = jnp.zeros(slices.values.shape, wide)
    values = zeros.at[segment_of].add(slices.values.astype(wide))
    return IndexedSlices(unique, values.astype(slices.values.dtype), slices.dense_shape)


def promote_dtypes(a: jnp.dtype, b: jnp.dtype) -> jnp.dtype:
    """Returns the dtype that holds both, whatever implicit promotion the user has allowed."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype to add up values of ``dtype`` in: float32 for narrower floats."""
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if is_narrow else dtype


def _check_indices(slices: IndexedSlices, name: str) -> None:
    padding = slices.padding_index
    if isinstance(slices.indices, jax.core.Tracer):
        is_valid = jnp.all((slices.indices >= 0) & (slices.indices <= padding))
        checkify.debug_check(is_valid, f"{name} has an index outside 0..{padding}")
        return
    indices = np.asarray(slices.indices)
    if indices.size and (indices.min() < 0 or indices.max() > padding):
        raise ValueError(
            f"{name} has indices from {indices.min()} to {indices.max()}, its table {padding} "
            f"rows; rows are 0..{padding - 1} and {padding} is padding"
        )
