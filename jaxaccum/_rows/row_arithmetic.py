"""Arithmetic on rows of tables: read, written, added, summed where they repeat.

Indices are int32 ``[n]``, values ``[n, *row]``; an index past the end is padding, and dropped.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxaccum._rows.cpu_workarounds import compute_with
from jaxaccum._rows.on_mesh import read_rows, write_rows


def expand_to_rows(numbers: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns ``numbers``, one a row, with axes of size 1 to stand beside ``rows``."""
    return jnp.expand_dims(numbers, tuple(range(1, rows.ndim)))


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


def add_to_table(table: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """Returns ``table`` with rows added, repeated ones too; in place where it is donated.

    Narrow floats are summed in float32, and rounded once to the table's dtype.
    """
    wide = sum_dtype(promote_dtypes(table.dtype, values.dtype))
    values = values.astype(wide)
    if wide == table.dtype:
        return add_rows(table, indices, values)
    indices, values = sum_repeated(indices, values, table.shape[0])
    rows = gather_rows(table, indices).astype(wide) + values
    return scatter_rows(table, indices, rows)


def sum_repeated(
    indices: jax.Array, values: jax.Array, padding: int
) -> tuple[jax.Array, jax.Array]:
    """Returns each of ``indices [n]`` once, ascending, then ``padding``; and the summed ``values``.

    Indices that already come ascending with the padding last, as ``take`` hands them out, are
    passed through after one comparison; others pay a sort.
    """
    if indices.shape[0] < 2:
        return indices, values
    left, right = indices[:-1], indices[1:]
    ascending = jnp.all((left < right) | (right == padding))

    def pass_through(indices: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return indices, values

    sort = functools.partial(_sort_and_sum, padding=padding)
    result: tuple[jax.Array, jax.Array] = jax.lax.cond(
        ascending, pass_through, sort, indices, values
    )
    return result


def _sort_and_sum(
    indices: jax.Array, values: jax.Array, *, padding: int
) -> tuple[jax.Array, jax.Array]:
    num = indices.shape[0]
    positions = jnp.arange(num, dtype=jnp.int32)
    indices, order = jax.lax.sort((indices, positions), num_keys=1, is_stable=True)
    first = jnp.concatenate([jnp.ones((1,), bool), indices[1:] != indices[:-1]])
    segment = jnp.cumsum(first.astype(jnp.int32)) - 1
    unique = jnp.full((num,), padding, indices.dtype).at[segment].set(indices)
    wide = values.astype(sum_dtype(values.dtype))
    if jnp.issubdtype(wide.dtype, jnp.integer):  # the order makes no difference
        sums = _add_where_they_lie(wide, order, segment)
    else:
        sums = jax.lax.platform_dependent(
            wide, order, segment, cpu=_add_where_they_lie, default=_add_in_order
        )
    return unique, sums.astype(values.dtype)


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
