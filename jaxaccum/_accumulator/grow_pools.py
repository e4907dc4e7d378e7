"""Pooled rows move into larger pools, of more slots or of tables with more rows."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.pooled_rows import PooledRows
from jaxaccum._accumulator.row_index import NOWHERE, DirectMap


class _TableRows(NamedTuple):
    """The rows of one table by their own numbers, by slot; NOWHERE where a slot is free."""

    ids: jax.Array
    counts: jax.Array
    num_rows: jax.Array


def grow_pools(
    pools: tuple[PooledRows, ...], empty: tuple[PooledRows, ...]
) -> tuple[PooledRows, ...]:
    """Returns what ``pools`` hold in the pools ``empty``, every row in the same slot of its table.

    Raises:
      ValueError: a table of ``empty`` has fewer rows or slots.
    """
    tables = [table for pool in pools for table in _split(pool)]
    sizes = [size for pool in empty for size in zip(pool.lengths, pool.capacities, strict=True)]
    old = [size for pool in pools for size in zip(pool.lengths, pool.capacities, strict=True)]
    for t, (before, after) in enumerate(zip(old, sizes, strict=True)):
        if before[0] > after[0] or before[1] > after[1]:
            raise ValueError(
                f"rows and capacity of table {t} must be at least the present {before}, got {after}"
            )
    rest, grown = iter(tables), []
    for pool in empty:
        grown.append(_join(pool, [next(rest) for _ in pool.lengths]))
    return tuple(grown)


def _split(pool: PooledRows) -> list[_TableRows]:
    tables = []
    for t, num_rows in enumerate(jnp.moveaxis(pool.num_rows, -1, 0)):
        first = pool.first_slots[t]
        own = slice(first, first + pool.capacities[t])
        indices = pool.indices[..., own]
        ids = jnp.where(indices == NOWHERE, NOWHERE, indices - pool.first_rows[t])
        tables.append(_TableRows(ids, pool.counts[..., own], num_rows))
    return tables


def _join(pool: PooledRows, tables: list[_TableRows]) -> PooledRows:
    def widen(rows: jax.Array, capacity: int, fill: int) -> jax.Array:
        pads = [(0, 0)] * (rows.ndim - 1) + [(0, capacity - rows.shape[-1])]
        return jnp.pad(rows, pads, constant_values=np.array(fill, rows.dtype))

    parts = zip(tables, pool.capacities, pool.first_rows, strict=True)
    ids = [
        widen(jnp.where(t.ids == NOWHERE, NOWHERE, t.ids + row), k, NOWHERE) for t, k, row in parts
    ]
    counts = [widen(t.counts, k, 0) for t, k in zip(tables, pool.capacities, strict=True)]
    indices = jnp.concatenate(ids, axis=-1)
    index_rows = jnp.vectorize(_index_rows, signature="(r),(s)->(r)")
    slots = index_rows(
        jnp.broadcast_to(
            pool.row_index.slots, (*indices.shape[:-1], pool.row_index.slots.shape[-1])
        ),
        indices,
    )
    return dataclasses.replace(
        pool,
        indices=indices,
        counts=jnp.concatenate(counts, axis=-1),
        num_rows=jnp.stack([t.num_rows for t in tables], axis=-1),
        row_index=DirectMap(slots),
    )


def _index_rows(slots: jax.Array, indices: jax.Array) -> jax.Array:
    return slots.at[indices].set(jnp.arange(indices.shape[0], dtype=jnp.int32), mode="drop")
