"""Sums of several tables whose rows stand under one index.

What XLA takes to compile a program follows the number of its operations, and those on row numbers
are most of an `apply` and a `take`. So the rows of all tables are numbered through, as if the
tables stood one below the other, and so are their slots:

    table 0, 100 rows:  0 ..  99     capacity 10:  slots  0 ..  9
    table 1,  50 rows:  100 .. 149   capacity 20:  slots 10 .. 29

One bid, one settlement, one order serve all of them. Only the sums stay apart, ``[capacity, *row]``
a table, for to join the values of gradients would be to copy them.

What is done for each table should be the same program for each, to the last constant: XLA's CPU
backend compiles a loop over entries once, however often it stands in a program, if nothing in it
differs. It takes 13 ms for one that is new, 1 ms for one that is known (jax 0.10.2). So a table's
share is looked up by the table's number, which is an array, and not cut out at a place that XLA
knows. Scatters jax 0.10 compiles anew wherever they stand, 14 ms each (0.12 once, then 2 ms each);
hence few of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.apply import count_touches, judge, not_none, write_slices
from jaxaccum._accumulator.row_index import NOWHERE, Bid, DirectMap
from jaxaccum._accumulator.staleness import weigh
from jaxaccum._accumulator.state import Verdict
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.on_mesh import match_rows, unshard
from jaxaccum._rows.public import pytree


@pytree(
    data_fields=["indices", "counts", "num_rows", "row_index", "numbers"],
    meta_fields=["lengths", "capacities"],
)
@dataclasses.dataclass(frozen=True)
class PooledRows:
    """Which rows of ``t`` tables are held, by slot.

    Attributes:
      indices: int32 ``[slots]``, the row, numbered through, that each slot holds; NOWHERE if none.
      counts: int32 ``[slots]``, how many gradients touched it; or floats, what these weigh.
      num_rows: int32 ``[t]``, how many rows of each table are held.
      row_index: the slot of each row.
      numbers: int32 ``[]`` for each table, from 0 on.
      lengths: how many rows each table has. Static.
      capacities: how many of them can be held. Static.
    """

    indices: jax.Array
    counts: jax.Array
    num_rows: jax.Array
    row_index: DirectMap
    numbers: tuple[jax.Array, ...]
    lengths: tuple[int, ...]
    capacities: tuple[int, ...]

    @property
    def first_rows(self) -> tuple[int, ...]:
        """The number of each table's first row."""
        return _starts(self.lengths)

    @property
    def first_slots(self) -> tuple[int, ...]:
        """The number of each table's first slot."""
        return _starts(self.capacities)

    def split(self, joined: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
        """Cuts ``joined [n]`` up into the shares of tables, which are so long."""
        if len(sizes) > 1 and len(set(sizes)) == 1:
            (size,) = set(sizes)
            return [
                jax.lax.dynamic_slice(joined, (t * size,), (size,), allow_negative_indices=False)
                for t in self.numbers
            ]
        starts = zip(_starts(sizes), sizes, strict=True)
        return [joined[start : start + size] for start, size in starts]

    def held_by(self, table: int) -> tuple[jax.Array, jax.Array]:
        """The row in each slot of a table, by its own number, and the counts."""
        first = self.first_slots[table]
        own = slice(first, first + self.capacities[table])
        indices = self.indices[own]
        is_free = indices == NOWHERE
        ids = jnp.where(is_free, self.lengths[table], indices - self.first_rows[table])
        return ids, self.counts[own]


@pytree(data_fields=["values"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RowSums:
    """The sums of one table's rows, by slot, ``[capacity, *row]``; what is in free slots is old."""

    values: jax.Array


class HeldRows(NamedTuple):
    """The rows of one table, ascending by row, ``k`` the capacity.

    Attributes:
      ids: int32 ``[k]``, its own numbers; as many as it has rows where there are no more.
      slot: int32 ``[k]``, where they lie in its sums, or past their end.
      counts: ``[k]``, as in `PooledRows`.
    """

    ids: jax.Array
    slot: jax.Array
    counts: jax.Array


# One less than the number that is no row.
_MOST_ROWS = NOWHERE - 1


def pool_tables(
    lengths: list[int], capacities: list[int], counts_dtype: np.dtype
) -> tuple[PooledRows, ...]:
    """Returns the empty pools of tables: one, unless their rows are more than int32 can number."""
    pools = list[list[int]]()
    for table, length in enumerate(lengths):
        if not pools or sum(lengths[t] for t in pools[-1]) + length > _MOST_ROWS:
            pools.append([])
        pools[-1].append(table)
    return tuple(
        _make_empty([lengths[t] for t in pool], [capacities[t] for t in pool], counts_dtype)
        for pool in pools
    )


def _make_empty(lengths: list[int], capacities: list[int], counts_dtype: np.dtype) -> PooledRows:
    slots = sum(capacities)
    return PooledRows(
        indices=jnp.full(slots, NOWHERE, jnp.int32),
        counts=jnp.zeros(slots, counts_dtype),
        num_rows=jnp.zeros(len(lengths), jnp.int32),
        row_index=DirectMap.empty(sum(lengths)),
        numbers=tuple(jnp.int32(t) for t in range(len(lengths))),
        lengths=tuple(lengths),
        capacities=tuple(capacities),
    )


class _Part(NamedTuple):
    """What a gradient brings to the tables of one pool, its ids having bid for slots.

    Attributes:
      pool: the rows, but for their index.
      row_index: the index with the bids in it.
      bid: what the ids, those of all tables in turn, bid.
      ids: int32 ``[n]``, numbered through, NOWHERE for what is skipped.
      sizes: how many of them belong to each table.
      num_new: int32 ``[t]``, how many rows of each table are new.
    """

    pool: PooledRows
    row_index: DirectMap
    bid: Bid
    ids: jax.Array
    sizes: tuple[int, ...]
    num_new: jax.Array

    @property
    def num_needed(self) -> jax.Array:
        """How many rows each table has with its new ones."""
        return self.pool.num_rows + self.num_new

    @property
    def fits(self) -> jax.Array:
        """Whether each table can hold its new rows beside the others."""
        return jnp.all(self.num_needed <= jnp.array(self.pool.capacities, jnp.int32))

    def add(
        self,
        sums: list[jax.Array],
        slices: list[jax.Array],
        is_accepted: jax.Array,
        touches: jax.Array,
    ) -> tuple[PooledRows, list[jax.Array]]:
        """Adds the slices to the sums, or takes the bids back."""
        pool, slots = self.pool, sum(self.pool.capacities)
        # Ranks count on from table to table; slots, in each from its first free one.
        num_new = jnp.where(is_accepted, self.num_new, 0)
        before = jnp.cumsum(self.num_new) - self.num_new
        free = jnp.array(pool.first_slots, jnp.int32) + pool.num_rows - before
        row_index, claim = self.row_index.settle(
            self.bid, _spread(free, self.sizes), slots, is_accepted
        )
        dropped = slots + jnp.arange(self.ids.shape[0], dtype=jnp.int32)
        new = jnp.where(claim.is_first & is_accepted, claim.slot, dropped)
        rest = jnp.where(claim.is_first, NOWHERE, claim.slot)
        base = _spread(pool.first_slots, self.sizes)
        new_of, rest_of = (pool.split(slot - base, self.sizes) for slot in (new, rest))
        sums = [
            write_slices(total, new_of[t], rest_of[t], pool.num_rows[t], num_new[t], slices[t])
            for t, total in enumerate(sums)
        ]
        return dataclasses.replace(
            pool,
            indices=pool.indices.at[new].set(self.ids, mode="drop", unique_indices=True),
            counts=count_touches(pool.counts, claim.slot, touches),
            num_rows=pool.num_rows + num_new,
            row_index=row_index,
        ), sums


@jax.jit
def add_to_pools(
    pools: tuple[PooledRows, ...],
    sums: list[jax.Array],
    grads: list[IndexedSlices],
    is_stale: jax.Array,
    is_skipped: jax.Array,
    weight: jax.Array | None,
) -> tuple[tuple[PooledRows, ...], list[jax.Array], jax.Array, jax.Array]:
    """Adds a gradient to the sums of all tables, or to none: one verdict on them all.

    Args:
      pools: the rows of the tables, in their order.
      sums: of each table.
      grads: of each table.
      is_stale: bool ``[]``, whether it is refused for its age.
      is_skipped: bool ``[]``, whether it is refused for its values.
      weight: ``[]``, the multiple of the gradient that is added, and that a row's count rises by;
        by default one.

    Returns:
      The new pools and sums; the verdict; and how many rows each table must hold for it, int32.
    """
    grads = [not_none(grad) for grad in grads]
    slices = [
        weigh(match_rows(unshard(grad.values), total), weight, total.dtype)
        for grad, total in zip(grads, sums, strict=True)
    ]
    tables = iter(grads)
    of_pool = [[next(tables) for _ in pool.lengths] for pool in pools]
    numbered = [_number(pool, own) for pool, own in zip(pools, of_pool, strict=True)]
    is_invalid = functools.reduce(operator.or_, (bad for _, bad in numbered), jnp.bool_(False))
    is_refused = is_stale | is_invalid | is_skipped
    parts = [
        _bid(pool, jnp.where(is_refused, NOWHERE, ids), tuple(g.indices.shape[0] for g in own))
        for pool, (ids, _), own in zip(pools, numbered, of_pool, strict=True)
    ]
    fits = functools.reduce(operator.and_, (part.fits for part in parts), jnp.bool_(True))
    verdict = judge(is_stale, is_invalid, is_skipped, fits)
    touches = jnp.int32(1) if weight is None else weight
    new_pools, new_sums = [], list[jax.Array]()
    for part in parts:
        own = slice(len(new_sums), len(new_sums) + len(part.sizes))
        pool, added = part.add(sums[own], slices[own], verdict == Verdict.ACCEPTED, touches)
        new_pools.append(pool)
        new_sums += added
    none = jnp.zeros(0, jnp.int32)
    num_needed = jnp.concatenate([none, *(part.num_needed for part in parts)])
    return tuple(new_pools), new_sums, verdict, num_needed


def _number(pool: PooledRows, grads: list[IndexedSlices]) -> tuple[jax.Array, jax.Array]:
    """The rows of all slices, numbered through, NOWHERE for padding; and whether one is no row."""
    indices = jnp.concatenate([unshard(_as_int32(grad.indices)) for grad in grads])
    sizes = tuple(grad.indices.shape[0] for grad in grads)
    padding = [grad.padding_index for grad in grads]
    limits = [min(pair) for pair in zip(padding, pool.lengths, strict=True)]
    in_range = (indices >= 0) & (indices < _spread(limits, sizes))
    is_padding = indices == _spread(padding, sizes)
    ids = jnp.where(in_range, indices + _spread(pool.first_rows, sizes), NOWHERE)
    return ids, jnp.any(~(in_range | is_padding))


def _as_int32(indices: jax.Array) -> jax.Array:
    """The same as int32, what does not fit as -1."""
    if indices.dtype == jnp.int32:
        return indices
    fits = (indices >= 0) & (indices <= NOWHERE)
    return jnp.where(fits, indices, jnp.zeros_like(indices)).astype(jnp.int32) - ~fits


def _bid(pool: PooledRows, ids: jax.Array, sizes: tuple[int, ...]) -> _Part:
    row_index, bid = pool.row_index.bid(ids, sum(pool.capacities))
    return _Part(pool, row_index, bid, ids, sizes, _count(bid.is_first, sizes))


def _count(mask: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """How many of bool ``[n]`` are true in the share of each table, int32 ``[t]``."""
    if len(set(sizes)) == 1:
        return jnp.sum(mask.reshape(len(sizes), -1), axis=1, dtype=jnp.int32)
    parts = zip(_starts(sizes), sizes, strict=True)
    return jnp.stack([jnp.sum(mask[at : at + n], dtype=jnp.int32) for at, n in parts])


def take_pool(pool: PooledRows) -> tuple[PooledRows, list[HeldRows]]:
    """Takes all rows of all tables."""
    capacities, slots = pool.capacities, sum(pool.capacities)
    row_index, order = pool.row_index.drain(pool.indices, jnp.int32(slots))
    if len(capacities) > 1:
        # Ascending, the rows of a table follow those of the tables before it, without a gap.
        first = jnp.cumsum(pool.num_rows) - pool.num_rows
        place = jnp.arange(slots, dtype=jnp.int32) - _spread(pool.first_slots, capacities)
        order = order.at[place + _spread(first, capacities)].get(mode="fill", fill_value=NOWHERE)
        order = jnp.where(place < _spread(pool.num_rows, capacities), order, NOWHERE)
    ids = pool.indices.at[order].get(mode="fill", fill_value=NOWHERE)
    ids -= _spread(pool.first_rows, capacities)
    ids = jnp.where(order == NOWHERE, _spread(pool.lengths, capacities), ids)
    counts = pool.counts.at[order].get(mode="fill", fill_value=1)
    slot = jnp.where(order == NOWHERE, order, order - _spread(pool.first_slots, capacities))
    held = list(
        map(
            HeldRows,
            pool.split(ids, capacities),
            pool.split(slot, capacities),
            pool.split(counts, capacities),
        )
    )
    return dataclasses.replace(
        pool,
        indices=jnp.full_like(pool.indices, NOWHERE),
        counts=jnp.zeros_like(pool.counts),
        num_rows=jnp.zeros_like(pool.num_rows),
        row_index=row_index,
    ), held


def _starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.accumulate((0, *sizes[:-1])))


def _spread(numbers: jax.Array | Sequence[int], sizes: tuple[int, ...]) -> jax.Array:
    """Repeats each of int32 ``numbers [t]`` as often as its table's size says."""
    numbers = jnp.asarray(numbers, jnp.int32)
    if len(set(sizes)) == 1:
        return jnp.broadcast_to(numbers[:, None], (len(sizes), sizes[0])).reshape(-1)
    return jnp.concatenate([jnp.broadcast_to(numbers[t], (n,)) for t, n in enumerate(sizes)])
