"""Rows matched by value between matrices of indices whose shape nobody knows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaccum._rows.prefix_sums import count_before
from jaxaccum._sparse_ops import keys


class _Box(NamedTuple):
    """The least box that holds a matrix of indices.

    ``low`` is its first corner, ``[1, d]``; ``reach`` how far off the last one is, unsigned.
    """

    low: jax.Array
    reach: jax.Array

    def contains(self, rows: jax.Array) -> jax.Array:
        return jnp.all(self.offsets(rows) <= self.reach, axis=1)

    def offsets(self, rows: jax.Array) -> jax.Array:
        # Unsigned differences are right even where the signed ones would overflow, and what lies
        # below the corner is beyond the reach.
        return rows.astype(self.reach.dtype) - self.low.astype(self.reach.dtype)

    def can_fold(self) -> jax.Array:
        """Whether a word holds the keys of all cells, and one more."""
        cells = jnp.prod(self.reach.astype(jnp.float32) + 1)
        # A margin for the rounding of the product; columns as words are never wrong.
        return cells < 0.99 * 2.0 ** (8 * self.reach.dtype.itemsize)

    def outside(self) -> jax.Array:
        """The key of all rows outside of the box, the largest."""
        return self._fold(self.reach)[0] + 1

    def fold(self, rows: jax.Array) -> jax.Array:
        """Returns the keys ``[n]`` of rows, which compare as they do."""
        return jnp.where(self.contains(rows), self._fold(self.offsets(rows)), self.outside())

    def _fold(self, offsets: jax.Array) -> jax.Array:
        key = offsets[:, 0]
        for column in range(1, offsets.shape[1]):
            key = key * (self.reach[:, column] + 1) + offsets[:, column]
        return key


def match_rows(table: jax.Array, *queries: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the position of each row of the ``queries`` in ``table``, by value.

    No shape is known here, so rows fold relative to the box that holds the table: into one word
    where the box has fewer than ``2**32`` cells, else each column is a word of its own. Sorted
    tables are searched as they are, others sorted first.

    Args:
      table: ``[k, d]``, in any order; of equal rows the first one counts.
      *queries: ``[n, d]`` each, in any order, of the same dtype.

    Returns:
      int32 ``[n]`` for each; ``k`` where the table has no such row.
    """
    num_rows, num_columns = table.shape
    if num_rows == 0 or num_columns == 0:
        # Nowhere, which is position k = 0, or the first of all equal rows.
        return tuple(jnp.zeros(q.shape[:1], jnp.int32) for q in queries)
    box = _find_box(table)
    folded = [(box.fold(rows),) for rows in (table, *queries)]
    return lax.switch(
        jnp.where(box.can_fold(), jnp.where(keys.ascends(folded[0]), 0, 1), 2),
        [
            lambda: _find_sorted(box.outside(), *folded),
            lambda: _find(box.outside(), *folded),
            lambda: _find(
                box.reach[0, 0], *(_split_columns(box.offsets(r)) for r in (table, *queries))
            ),
        ],
    )


class Matched(NamedTuple):
    """Where each query lies in the table; how many rows of the table were found, or are padding."""

    found: jax.Array
    num_used: jax.Array
    num_padding: jax.Array


def match_in_line(table: jax.Array, queries: jax.Array) -> Matched:
    """Returns what ``match_rows`` does, at a glance where the rows come in the table's order.

    The guess: the n-th query inside the box that holds the table is its n-th row. Comparing tells;
    if all of them are and no row of the table repeats, no query can have another position.

    The table may end in padding, as ``count_padding`` tells; no query has its position there.
    """
    num_rows, num_columns = table.shape
    if num_rows == 0 or num_columns == 0:
        # Without columns the first row stands for all: the others can only be padding.
        num_used = jnp.int32(min(num_rows, len(queries), 1))
        return Matched(match_rows(table, queries)[0], num_used, num_rows - num_used)
    inside = _find_box(table).contains(queries)
    before = count_before(inside)
    guess, num_inside = jnp.where(inside, before[:-1], num_rows), before[-1]
    guessed = keys.take(table, jnp.minimum(guess, num_rows - 1))
    same = jnp.all(guessed == queries, axis=1)
    rows = _split_columns(table)
    rises = keys.is_less(tuple(w[:-1] for w in rows), tuple(w[1:] for w in rows))
    # A table that ends in padding repeats it, or has a row that no query is: never right.
    is_right = jnp.all(same | ~inside) & jnp.all(rises) & (num_inside == num_rows)

    def by_value(_: _Guess) -> _Guess:
        (found,) = match_rows(table, queries)
        num_padding = count_padding(table, queries)
        falls_on_padding = (num_padding > 0) & jnp.all(queries == table[-1:], axis=1)
        found = jnp.where(falls_on_padding, num_rows, found)
        is_found = jnp.zeros(num_rows, bool).at[found].set(True, mode="drop")
        num_used = jnp.sum(is_found, dtype=jnp.int32)
        return Matched(found, num_used, num_padding), is_right | True

    # A cond would copy a guess that is right; a loop of no rounds lets it through.
    first = Matched(guess, num_inside, num_inside & 0), is_right
    return lax.while_loop(lambda carry: ~carry[1], by_value, first)[0]


_Guess = tuple[Matched, jax.Array]


def count_padding(table: jax.Array, queries: jax.Array) -> jax.Array:
    """Returns how many rows of ``table``, the output of a slice, can be nothing but padding.

    Padding is the last row and its equals, beyond all others in every column. Where the shape of
    the slice is not known, a real row may look the same; but a slice has no more entries of a row
    than its input, so what the output repeats more often than the ``queries`` do is padding.
    """
    last = table[-1:]
    is_last = jnp.all(table == last, axis=1)
    is_beyond = jnp.all(is_last[:, None] | (table < last))
    num_out, num_in = (
        jnp.sum(same, dtype=jnp.int32) for same in (is_last, jnp.all(queries == last, axis=1))
    )
    return jnp.where(is_beyond & (num_out > num_in), num_out, 0)


def _find_box(rows: jax.Array) -> _Box:
    """The box that holds ``rows``: one pass over them, not two of ``min``."""
    most = np.iinfo(rows.dtype)
    low, high = lax.reduce(
        (rows, rows),
        (jnp.asarray(most.max, rows.dtype), jnp.asarray(most.min, rows.dtype)),
        lambda a, b: (lax.min(a[0], b[0]), lax.max(a[1], b[1])),
        (0,),
    )
    word = np.dtype(f"uint{8 * rows.dtype.itemsize}")
    return _Box(low[None], high[None].astype(word) - low[None].astype(word))


def _split_columns(rows: jax.Array) -> keys.Words:
    return tuple(rows[:, column] for column in range(rows.shape[1]))


def _find(largest: jax.Array, table: keys.Words, *queries: keys.Words) -> tuple[jax.Array, ...]:
    """Returns the position of each query in ``table`` in any order, its length where absent."""
    (num_rows,) = table[0].shape
    ranked, source = lax.cond(
        keys.ascends(table),
        lambda: (table, keys.number_rows(table)),
        lambda: _rank(table, largest),
    )
    source = jnp.append(source, jnp.int32(num_rows))
    return tuple(keys.take(source, found) for found in _find_sorted(largest, ranked, *queries))


def _find_sorted(
    largest: jax.Array, table: keys.Words, *queries: keys.Words
) -> tuple[jax.Array, ...]:
    (num_rows,) = table[0].shape
    # A query past the end is compared with the last row, which it exceeds.
    return tuple(
        jnp.where(keys.is_equal(keys.take_rows(table, found), query), found, num_rows)
        for query, found in zip(
            queries, keys.find_lower_bounds(table, largest, *queries), strict=True
        )
    )


def _rank(table: keys.Words, largest: jax.Array) -> tuple[keys.Words, jax.Array]:
    """Returns ``table`` sorted, and for the first of equal rows where it came from."""
    ranked, rank = keys.sort_rows(table, largest)
    (num_rows,) = rank.shape
    source = jnp.full(num_rows, num_rows, jnp.int32)
    return ranked, source.at[rank].min(jnp.arange(num_rows, dtype=jnp.int32), mode="drop")
