"""Sums of a whole tree: tables by row and dense leaves as they are, under one total."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.apply import apply_all
from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._accumulator.reduction import reduce_sums
from jaxaccum._accumulator.staleness import count_gradient, weigh
from jaxaccum._accumulator.state import AccumulatorState, Reduction
from jaxaccum._accumulator.take import take_if
from jaxaccum._rows.indexed_slices import IndexedSlices

Arrays = tuple[jax.Array, ...]
# Indices, values and the number of real rows.
Rows = tuple[jax.Array, jax.Array, jax.Array]


class Sums(NamedTuple):
    """What is accumulated of a tree.

    Attributes:
      tables: one state a table.
      dense: one sum a dense leaf; anything while there is nothing in it.
      total: ``[]``, int32 how many gradients there are, or a float, what they weigh; ``None`` where
        there is no dense leaf to ask, for the states of tables count themselves.
    """

    tables: tuple[AccumulatorState, ...]
    dense: Arrays
    total: jax.Array | None


def add_to_sums(
    sums: Sums, indices: Arrays, values: Arrays, dense: Arrays, weight: jax.Array | None
) -> Sums:
    """Adds a gradient, whose indices have been looked at and whose rows fit, to all leaves.

    Args:
      sums: of what came before.
      indices: of each table, int32 ``[n]``.
      values: of each table, ``[n, *row]``.
      dense: of each dense leaf.
      weight: ``[]``, how many times it counts; or ``None``, once.
    """
    gradients = [
        IndexedSlices(ids, rows, state.dense_shape)
        for state, ids, rows in zip(sums.tables, indices, values, strict=True)
    ]
    tables, verdict, _ = apply_all(list(sums.tables), gradients, jnp.bool_(False), weight=weight)
    counted = tuple(count_gradient(state, verdict, jnp.int32(0), weight) for state in tables)
    if sums.total is None:
        return Sums(counted, (), None)
    is_first = sums.total == 0  # what is left of the step before is overwritten, not zeroed
    added = []
    for total, leaf in zip(sums.dense, dense, strict=True):
        leaf = weigh(leaf, weight, total.dtype).astype(total.dtype)
        added.append(jnp.where(is_first, leaf, total + leaf))
    total = saturating_add(sums.total, 1) if weight is None else sums.total + weight
    return Sums(counted, tuple(added), total)


def take_sums(
    sums: Sums, reduction: Reduction, sizes: tuple[int, ...], dtypes: tuple[np.dtype, ...]
) -> tuple[Sums, tuple[tuple[Rows, ...], Arrays]]:
    """Takes everything, of one gradient at least.

    Args:
      sums: is left empty.
      reduction: of dense leaves; tables have their own.
      sizes: how many rows to return of each table, no fewer than there are.
      dtypes: of the dense gradients.

    Returns:
      The new sums; and rows of the tables, ascending, padding last, and means of the dense leaves.
    """
    tables, taken = [], []
    for state, size in zip(sums.tables, sizes, strict=True):
        emptied, gradient = take_if(state, jnp.bool_(True))
        tables.append(emptied)
        # XLA reads and divides only the rows that are left: their number is bounded by ``size``.
        taken.append((gradient.indices[:size], gradient.values[:size], state.num_rows))
    total = sums.total
    if total is None:
        return Sums(tuple(tables), (), None), (tuple(taken), ())
    means = tuple(
        reduce_sums(leaf[None], total[None], total, reduction)[0].astype(dtype)
        for leaf, dtype in zip(sums.dense, dtypes, strict=True)
    )
    return Sums(tuple(tables), sums.dense, jnp.zeros_like(total)), (tuple(taken), means)
