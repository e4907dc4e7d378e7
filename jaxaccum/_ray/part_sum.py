"""The gradients of one step on one shard: joined on the host, summed on the device.

All are there when the step is taken, so they are summed at once, as one long gradient whose rows
repeat; nothing has to be held in slots meanwhile. Which slices are of one row NumPy finds, by a
sort that takes a tenth of XLA's on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.reduction import reduce_sums
from jaxaccum._accumulator.state import Reduction
from jaxaccum._coordinator.host_memory import allocate, round_up
from jaxaccum._optimizers.unique_leaf import UniqueRows
from jaxaccum._ray.layout import LeafLayout, Part
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.row_arithmetic import expand_to_rows, sum_dtype
from jaxaccum._rows.tree import Leaf


class JoinedRows(NamedTuple):
    """The slices of one table of all gradients of a step, in their order, padded.

    Attributes:
      rows: int32 ``[n]``, those touched, ascending, then the padding index.
      values: ``[n, *row]``, the slices, then anything.
      segment: int32 ``[n]``, where the row of each slice stands in ``rows``, then ``n``.
      weights: float32 ``[n]``, that of the gradient a slice is of; ``None``: all are 1.
      divisors: float32 ``[n]``, of the sum of each row; ``None``: none is divided.
    """

    rows: np.ndarray
    values: np.ndarray
    segment: np.ndarray
    weights: np.ndarray | None
    divisors: np.ndarray | None


def join_rows(
    slices: Sequence[tuple[np.ndarray, np.ndarray]],
    weights: Sequence[float],
    num_rows: int,
    leaf: LeafLayout,
    room: np.ndarray | None = None,
) -> JoinedRows:
    """Puts the slices of several gradients one after the other, to be summed.

    The values lie in ``room``, if there is enough of it.
    """
    sizes = [ids.size for ids, _ in slices]
    num, size = sum(sizes), round_up(sum(sizes))
    ids = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in slices)])
    unique, inverse = np.unique(ids, return_inverse=True)
    rows, segment = (np.full(size, fill, np.int32) for fill in (num_rows, size))
    rows[: unique.size], segment[:num] = unique, inverse
    if room is None or len(room) < size:
        room = allocate((size, *leaf.shape[1:]), leaf.dtype)
    values = room[:size]
    if num:
        np.concatenate([of for _, of in slices], out=values[:num])
    of_slice = None
    if any(weight != 1 for weight in weights):
        of_slice = np.ones(size, np.float32)
        of_slice[:num] = np.repeat(weights, sizes)
    return JoinedRows(rows, values, segment, of_slice, None)


def count_touches(
    slices: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[float], joined: JoinedRows
) -> np.ndarray:
    """How much the gradients weigh that touch each row, however often each of them does."""
    counts, start = np.zeros(joined.rows.size, np.float32), 0
    for (ids, _), weight in zip(slices, weights, strict=True):
        counts[np.unique(joined.segment[start : start + ids.size])] += weight
        start += ids.size
    return np.where(counts > 0, counts, np.float32(1))


def sum_dense(arrays: Sequence[np.ndarray], weights: Sequence[float], divisor: float) -> np.ndarray:
    """Adds up arrays, weighted, narrow floats in float32, and divides by ``divisor``."""
    wide = sum_dtype(arrays[0].dtype)
    total = np.zeros(arrays[0].shape, wide)
    for array, weight in zip(arrays, weights, strict=True):
        total += array.astype(wide) * np.asarray(weight, total.real.dtype)
    return (total / np.asarray(divisor, total.real.dtype)).astype(arrays[0].dtype)


def join_parts(
    parts: Sequence[Part], weights: Sequence[float], leaves: Sequence[LeafLayout],
    owned: Sequence[int], shard: int, reduction: Reduction, room: dict[int, np.ndarray],
) -> dict[int, Leaf]:  # fmt: skip
    """Joins the parts of a step, leaf by leaf; dense leaves come out as they will be used.

    ``room`` is what was joined before, by leaf, and no longer needed: the system takes longer to
    hand out fresh memory than it takes to write to it.
    """
    joined: dict[int, Leaf] = {}
    total = sum(weights)
    for i in owned:
        of = [(part[i], weight) for part, weight in zip(parts, weights, strict=True) if i in part]
        given, theirs = [leaf for leaf, _ in of], [weight for _, weight in of]
        if not leaves[i].is_table:
            joined[i] = sum_dense(given, theirs, 1 if reduction == "sum" else total)
            continue
        start, stop = leaves[i].start_stop(shard)
        rows = join_rows(given, theirs, stop - start, leaves[i], room.get(i))
        room[i] = max(rows.values, room.get(i, rows.values), key=len)
        if reduction == "mean_per_row":
            rows = rows._replace(divisors=count_touches(given, theirs, rows))
        elif reduction == "mean_per_gradient":
            rows = rows._replace(divisors=np.full(rows.rows.size, total, np.float32))
        joined[i] = rows
    return joined


def sum_rows(joined: JoinedRows, num_rows: int) -> UniqueRows:
    """Returns each row touched once: its sum, divided."""
    rows, values, segment = map(jnp.asarray, joined[:3])
    wide = values.astype(sum_dtype(values.dtype))
    if joined.weights is not None:
        wide *= expand_to_rows(jnp.asarray(joined.weights).astype(wide.real.dtype), wide)
    sums = jnp.zeros_like(wide).at[segment].add(wide, mode="drop")
    if joined.divisors is not None:
        divisors = jnp.asarray(joined.divisors)
        sums = reduce_sums(sums, divisors, divisors, "mean_per_row")
    means = sums.astype(values.dtype)
    return UniqueRows(IndexedSlices(rows, means, (num_rows, *means.shape[1:])))
