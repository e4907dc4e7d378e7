"""Row-sparse leaves made ready for arithmetic that is not linear: every row once, padding zero."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jaxaccum._rows.cpu_workarounds import compute_with
from jaxaccum._rows.indexed_slices import IndexedSlices, as_device_slices
from jaxaccum._rows.on_mesh import read_rows, unshard, write_rows


def is_slices(node: object) -> bool:
    """Whether ``node`` is an ``IndexedSlices``: an ``is_leaf`` for trees that mix them in."""
    return isinstance(node, IndexedSlices)


def expand_to_rows(numbers: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns ``numbers``, one a row, with axes of size 1 to stand beside ``rows``."""
    return jnp.expand_dims(numbers, tuple(range(1, rows.ndim)))


def fit_to_table(
    slices: IndexedSlices, table_shape: tuple[int | None, ...] | None, name: str
) -> IndexedSlices:
    """Returns ``slices`` with the shape of the table, and int32 indices that are rows or padding.

    An index that is neither raises here if it can be read, that is outside ``jit``. Inside, the
    slice becomes padding: ``checkify`` reports it, and `count_invalid` counts it. Values stay as
    they are, those of padding too.

    Raises:
      TypeError: ``slices`` does not hold integer indices.
      ValueError: the row shape or row count differs from the table's, or an index is invalid.
    """
    slices = as_slices(slices, name)
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
    rows = table_shape[0]
    check_indices(slices, rows, name)
    indices, values = unshard(slices.indices), unshard(slices.values)
    is_row = (indices >= 0) & (indices < rows)
    return IndexedSlices(jnp.where(is_row, indices, rows).astype(jnp.int32), values, table_shape)


def is_invalid(slices: IndexedSlices, rows: int) -> jax.Array:
    """Which slices are neither padding nor a row of a table of ``rows`` rows: bool ``[n]``."""
    is_row = (slices.indices >= 0) & (slices.indices < rows)
    return ~is_row & (slices.indices != slices.padding_index)


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
    if table.shape[0] == 0:
        return jnp.zeros((*indices.shape, *table.shape[1:]), table.dtype)
    rows = read_rows(lambda t, i: t.at[i].get(mode="fill", fill_value=0), table, indices)
    return compute_with(rows, indices)


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


@jax.custom_jvp
def _add_in_order(values: jax.Array, order: jax.Array, segment: jax.Array) -> jax.Array:
    """The same where the order of a scatter-add changes from run to run.

    After ``k`` rounds every slice holds the sum of up to ``2**k`` slices of its row, up to its own;
    rounds end with the longest row, and rows that are not repeated take none. `jax.lax.
    associative_scan` unrolls into five times the kernels, and as many times the seconds to compile.
    """
    num = segment.shape[0]
    position = jnp.arange(num, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones((1,), bool), segment[1:] != segment[:-1]])
    before = position - jax.lax.cummax(jnp.where(starts, position, 0))  # in the same row

    def join(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        stride, sums = carry
        earlier = sums.at[position - stride].get(mode="clip")
        repeated = expand_to_rows(before >= stride, values)
        return 2 * stride, jnp.where(repeated, earlier + sums, sums)

    longest = jnp.max(before)
    _, sums = jax.lax.while_loop(
        lambda carry: carry[0] <= longest, join, (jnp.int32(1), values[order])
    )
    is_last = jnp.concatenate([starts[1:], jnp.ones((1,), bool)])
    place = jnp.where(is_last, segment, num + position)
    return jnp.zeros_like(values).at[place].set(sums, mode="drop", unique_indices=True)


@_add_in_order.defjvp
def _add_in_order_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    # The sum is linear, and a loop of unknown length cannot be transposed.
    _, order, segment = primals
    return _add_in_order(*primals), _add_where_they_lie(tangents[0], order, segment)


def promote_dtypes(a: jnp.dtype, b: jnp.dtype) -> jnp.dtype:
    """Returns the dtype that holds both, whatever implicit promotion the user has allowed."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype to add up values of ``dtype`` in: float32 for narrower floats."""
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if is_narrow else dtype


def as_slices(slices: IndexedSlices, name: str) -> IndexedSlices:
    """Returns ``slices`` with array leaves, checked; ``name`` says in errors which leaf it is."""
    try:
        return as_device_slices(slices)
    except TypeError as err:
        raise TypeError(
            f"{name} has lost its row numbers ({err}): wrap every transform that sees the sparse "
            "leaf in lazy_rows"
        ) from err


def check_indices(slices: IndexedSlices, rows: int, name: str) -> None:
    """Raises ``ValueError`` outside ``jit``, and tells ``checkify`` inside, of invalid indices."""
    wrong = is_invalid(slices, rows)
    if isinstance(wrong, jax.core.Tracer):
        checkify.debug_check(~jnp.any(wrong), f"{name} has an index outside of its {rows} rows")
        return
    if np.any(wrong):
        ids = np.unique(np.asarray(slices.indices)[np.asarray(wrong)]).tolist()
        shown = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
        raise ValueError(
            f"{name} has indices outside of its table of {rows} rows: {shown}; rows are "
            f"0..{rows - 1} and {slices.padding_index} is padding"
        )
