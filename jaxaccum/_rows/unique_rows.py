"""Row-sparse leaves made ready for arithmetic that is not linear: every row once, padding zero."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jaxaccum._rows.indexed_slices import IndexedSlices, as_device_slices
from jaxaccum._rows.on_mesh import read_rows, unshard, write_rows
from jaxaccum._rows.quotient import quotient


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
    slices = dataclasses.replace(
        slices, indices=unshard(slices.indices), values=unshard(slices.values)
    )
    mask = slices.row_mask & (slices.indices < table_shape[0])
    indices = jnp.where(mask, slices.indices, table_shape[0]).astype(jnp.int32)
    wide_mask = jnp.expand_dims(mask, tuple(range(1, slices.values.ndim)))
    values = jnp.where(wide_mask, slices.values, jnp.zeros((), slices.values.dtype))
    return IndexedSlices(indices, values, table_shape)


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
    is_padding = grad.indices == grad.padding_index
    wide = jnp.expand_dims(is_padding, tuple(range(1, grad.values.ndim)))
    values = jnp.where(wide, jnp.zeros((), grad.values.dtype), grad.values)
    # Wide indices stay wide: an id that does not fit int32 must not become one that does.
    return unique_rows(IndexedSlices(grad.indices, values, grad.dense_shape))


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
    rows = read_rows(lambda t, i: t.at[i].get(mode="fill", fill_value=0), table, indices)
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

    def write(table: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
        return table.at[indices].set(rows, mode="drop", unique_indices=True)

    return write_rows(write, table, indices, rows.astype(table.dtype))


def add_rows(table: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns ``table`` with ``rows`` added at ``indices``; padding is dropped."""
    return write_rows(lambda t, i, r: t.at[i].add(r, mode="drop"), table, indices, rows)


def _sum_duplicates(slices: IndexedSlices) -> IndexedSlices:
    num, padding = slices.indices.shape[0], slices.padding_index
    positions = jnp.arange(num, dtype=jnp.int32)
    indices, order = jax.lax.sort((slices.indices, positions), num_keys=1, is_stable=True)
    first = jnp.concatenate([jnp.ones((1,), bool), indices[1:] != indices[:-1]])
    segment = jnp.cumsum(first.astype(jnp.int32)) - 1
    unique = jnp.full((num,), padding, indices.dtype).at[segment].set(indices)
    values = slices.values.astype(sum_dtype(slices.values.dtype))
    if jnp.issubdtype(values.dtype, jnp.integer):  # the order makes no difference
        sums = _add_where_they_lie(values, order, segment)
    else:
        sums = jax.lax.platform_dependent(
            values, order, segment, cpu=_add_where_they_lie, default=_add_in_order
        )
    return IndexedSlices(unique, sums.astype(slices.values.dtype), slices.dense_shape)


def _add_where_they_lie(values: jax.Array, order: jax.Array, segment: jax.Array) -> jax.Array:
    """Sums of ``values[order]`` by ascending ``segment``; a CPU adds them as they come."""
    # Sorting the values first would move every row twice.
    segment_of = jnp.zeros(order.shape, jnp.int32).at[order].set(segment, unique_indices=True)
    return jnp.zeros_like(values).at[segment_of].add(values)


def _add_in_order(values: jax.Array, order: jax.Array, segment: jax.Array) -> jax.Array:
    """The same where the order of a scatter-add changes from run to run: by a segmented scan."""

    def join(
        left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        wide = jnp.expand_dims(left[0] == right[0], tuple(range(1, values.ndim)))
        return right[0], jnp.where(wide, left[1], jnp.zeros_like(left[1])) + right[1]

    _, sums = jax.lax.associative_scan(join, (segment, values[order]))
    num = segment.shape[0]
    is_last = jnp.concatenate([segment[1:] != segment[:-1], jnp.ones((1,), bool)])
    place = jnp.where(is_last, segment, num + jnp.arange(num, dtype=jnp.int32))
    return jnp.zeros_like(values).at[place].set(sums, mode="drop", unique_indices=True)


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
