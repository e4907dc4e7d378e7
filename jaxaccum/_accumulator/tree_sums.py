"""Sums of a whole tree: tables by row and dense leaves as they are, under one total."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.apply import apply_all
from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._accumulator.reduction import reduce_sums
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
      total: ``[]``, int32 how many gradients there are, or float32 what they weigh; ``None`` where
        nobody asks, for the states of tables count gradients themselves.
    """

    tables: tuple[AccumulatorState, ...]
    dense: Arrays
    total: jax.Array | None


def add_to_sums(
    sums: Sums, indices: Arrays, values: Arrays, dense: Arrays, weight: jax.Array | None
) -> Sums:
    """Adds a gradient, whose indices have been looked at and fit, to all leaves.

    Args:
      sums: of what came before.
      indices: of each table, int32 ``[n]``.
      values: of each table, ``[n, *row]``.
      dense: of each dense leaf.
      weight: float32 ``[]``, how many times it counts; or ``None``, once.
    """

    def weighted(gradient: jax.Array, total: jax.Array) -> jax.Array:
        gradient = gradient.astype(total.dtype)
        return gradient if weight is None else gradient * weight.astype(total.dtype)

    gradients = [
        IndexedSlices(ids, weighted(rows, state.values), state.dense_shape)
        for state, ids, rows in zip(sums.tables, indices, values, strict=True)
    ]
    tables, _, _ = apply_all(list(sums.tables), gradients, jnp.bool_(False), weight=weight)
    if sums.total is None:
        return Sums(tuple(tables), (), None)
    is_first = sums.total == 0  # what is left of the step before is overwritten, not zeroed
    added = tuple(
        jnp.where(is_first, weighted(leaf, total), total + weighted(leaf, total))
        for total, leaf in zip(sums.dense, dense, strict=True)
    )
    total = saturating_add(sums.total, 1) if weight is None else sums.total + weight
    return Sums(tuple(tables), added, total)


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
    total, tables, taken = sums.total, [], []
    for state, size in zip(sums.tables, sizes, strict=True):
        num_rows = state.num_rows
        if total is not None:  # which may be a sum of weights
            state = dataclasses.replace(state, num_accumulated=total)
        emptied, gradient = take_if(state, jnp.bool_(True))
        none = emptied.num_accumulated.astype(jnp.int32)
        tables.append(dataclasses.replace(emptied, num_accumulated=none))
        # XLA reads and divides only the rows that are left: their number is bounded by ``size``.
        taken.append((gradient.indices[:size], gradient.values[:size], num_rows))
    if total is None:
        return Sums(tuple(tables), (), None), (tuple(taken), ())
    means = tuple(
        reduce_sums(leaf[None], total[None], total, reduction)[0].astype(dtype)
        for leaf, dtype in zip(sums.dense, dtypes, strict=True)
    )
    return Sums(tuple(tables), sums.dense, jnp.zeros_like(total)), (tuple(taken), means)
