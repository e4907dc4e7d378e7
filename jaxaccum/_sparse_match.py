"""Rows matched by value between matrices of indices whose shape nobody knows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaccum import _sparse_keys as keys
from jaxaccum._counting import count_before


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
    low, high = _box(table)
    word = np.dtype(f"uint{8 * table.dtype.itemsize}")

    def shifted(rows: jax.Array) -> jax.Array:
        # Unsigned differences are right even where the signed ones would overflow. What lies
        # outside the box may be any row of it: it is masked at the end.
        inside = (rows >= low) & (rows <= high)
        return jnp.where(inside, rows.astype(word) - low.astype(word), 0)

    spread = shifted(high)[0]
    cells = jnp.prod(spread.astype(jnp.float32) + 1)
    # A margin for the rounding of the product; beyond it two words are never wrong.
    fits = cells < 0.99 * 2.0 ** (8 * word.itemsize)
    fold = functools.partial(_fold_box, spread)
    all_rows = (table, *queries)
    # Each branch folds for itself: what is folded before is written to memory and read again.
    found = lax.cond(
        fits & keys.ascends(_columns(table)),
        lambda: _find_sorted(fold(spread[None])[0][0], *(fold(shifted(r)) for r in all_rows)),
        lambda: lax.cond(
            fits,
            lambda: _find(fold(spread[None])[0][0], *(fold(shifted(r)) for r in all_rows)),
            lambda: _find(spread[0], *(_columns(shifted(r)) for r in all_rows)),
        ),
    )
    inside = (jnp.all((q >= low) & (q <= high), axis=1) for q in queries)
    return tuple(jnp.where(ok, f, num_rows) for ok, f in zip(inside, found, strict=True))


def _box(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest of each column, ``[1, d]``: a pass, not two of ``min``."""
    most = np.iinfo(rows.dtype)
    low, high = lax.reduce(
        (rows, rows),
        (jnp.asarray(most.max, rows.dtype), jnp.asarray(most.min, rows.dtype)),
        lambda a, b: (lax.min(a[0], b[0]), lax.max(a[1], b[1])),
        (0,),
    )
    return low[None], high[None]


def match_in_line(table: jax.Array, queries: jax.Array) -> jax.Array:
    """Returns what ``match_rows`` does, at a glance where the rows come in the table's order.

    The guess: the n-th query inside the box that holds the table is its n-th row. Comparing tells;
    if all of them are and no row of the table repeats, no query can have another place.
    """
    num_rows, num_columns = table.shape
    if num_rows == 0 or num_columns == 0:
        return match_rows(table, queries)[0]
    low, high = _box(table)
    inside = jnp.all((queries >= low) & (queries <= high), axis=1)
    before = count_before(inside)
    guess = jnp.minimum(before[:-1], num_rows - 1)
    same = jnp.all(keys.take(table, guess) == queries, axis=1)
    rows = _columns(table)
    rises = keys.less(tuple(w[:-1] for w in rows), tuple(w[1:] for w in rows))
    is_right = jnp.all(same | ~inside) & jnp.all(rises)
    found: jax.Array = lax.cond(
        is_right,
        lambda: jnp.where(inside, guess, num_rows),
        lambda: match_rows(table, queries)[0],
    )
    return found


def _fold_box(spread: jax.Array, rows: jax.Array) -> keys.Words:
    key = rows[:, 0]
    for column in range(1, rows.shape[1]):
        key = key * (spread[column] + 1) + rows[:, column]
    return (key,)


def _columns(rows: jax.Array) -> keys.Words:
    return tuple(rows[:, column] for column in range(rows.shape[1]))


def _find(largest: jax.Array, table: keys.Words, *queries: keys.Words) -> tuple[jax.Array, ...]:
    """Returns the position of each query in ``table`` in any order, its length where absent."""
    (num_rows,) = table[0].shape
    ranked, source = lax.cond(
        keys.ascends(table),
        lambda: (table, jnp.arange(num_rows, dtype=jnp.int32)),
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
        jnp.where(keys.equal(keys.at(table, found), query), found, num_rows)
        for query, found in zip(queries, keys.lower_bounds(table, largest, *queries), strict=True)
    )


def _rank(table: keys.Words, largest: jax.Array) -> tuple[keys.Words, jax.Array]:
    """Returns ``table`` sorted, and for the first of equal rows where it came from."""
    ranked, rank = keys.sort_rows(table, largest)
    (num_rows,) = rank.shape
    source = jnp.full(num_rows, num_rows, jnp.int32)
    return ranked, source.at[rank].min(jnp.arange(num_rows, dtype=jnp.int32), mode="drop")
