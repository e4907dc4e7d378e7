"""The gradients of one step on one shard: joined on the host, reduced on the device.

All are there when the step is taken, so they are summed at once, by one sort, as one long gradient
whose rows repeat; nothing has to be held in slots meanwhile. What divides the sums is what divides
those of an accumulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.reduction import reduce_sums
from jaxaccum._accumulator.state import Reduction
from jaxaccum._optimizers.unique_leaf import UniqueRows
from jaxaccum._ray.layout import LeafLayout, Part
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.row_arithmetic import expand_to_rows, sum_dtype, sum_repeated
from jaxaccum._rows.tree import Leaf

_SMALLEST_SIZE = 32


class JoinedRows(NamedTuple):
    """The slices of one table of all gradients of a step, in their order, padded.

    Attributes:
      ids: int32 ``[n]``, rows of the shard.
      values: ``[n, *row]``.
      weights: ``[n]``, that of the gradient a slice is of.
      touches: ``[n]``, the same where a gradient touches a row first, else zero.
    """

    ids: np.ndarray
    values: np.ndarray
    weights: np.ndarray
    touches: np.ndarray


def join_rows(
    slices: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[float], leaf: LeafLayout,
    shard: int, *, count_rows: bool,
) -> JoinedRows:  # fmt: skip
    """Puts the slices of several gradients one after the other."""
    num = sum(ids.size for ids, _ in slices)
    size = 1 << (max(num, _SMALLEST_SIZE) - 1).bit_length()
    start, stop = leaf.start_stop(shard)
    joined = JoinedRows(
        np.full(size, stop - start, np.int32),
        np.zeros((size, *leaf.shape[1:]), leaf.dtype),
        np.ones(size, np.float32),
        np.zeros(size, np.float32),
    )
    at = 0
    for (ids, values), weight in zip(slices, weights, strict=True):
        part = slice(at, at + ids.size)
        joined.ids[part], joined.values[part], joined.weights[part] = ids, values, weight
        if count_rows:
            joined.touches[at + np.unique(ids, return_index=True)[1]] = weight
        at += ids.size
    return joined


def join_dense(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Adds up arrays, weighted; narrow floats in float32."""
    wide = sum_dtype(arrays[0].dtype)
    total = np.zeros(arrays[0].shape, wide)
    for array, weight in zip(arrays, weights, strict=True):
        total += array.astype(wide) * np.asarray(weight, total.real.dtype)
    return total


def join_parts(
    parts: Sequence[Part], weights: Sequence[float], leaves: Sequence[LeafLayout],
    owned: Sequence[int], shard: int, reduction: Reduction,
) -> dict[int, Leaf]:  # fmt: skip
    """Joins the parts of a step, leaf by leaf; a leaf that nobody touched is of padding."""
    joined: dict[int, Leaf] = {}
    for i in owned:
        chosen = [(part[i], w) for part, w in zip(parts, weights, strict=True) if i in part]
        leaf, given = leaves[i], ([x for x, _ in chosen], [w for _, w in chosen])
        if leaf.is_table:
            count_rows = reduction == "mean_per_row"
            joined[i] = join_rows(*given, leaf, shard, count_rows=count_rows)
        else:
            joined[i] = join_dense(*given)
    return joined


def reduce_rows(
    joined: JoinedRows, rows: int, total: jax.Array, reduction: Reduction
) -> UniqueRows:
    """Returns each row touched once: its sum, divided as the reduction says."""
    ids, values, weights, touches = map(jnp.asarray, joined)
    dtype, wide = values.dtype, values.astype(sum_dtype(values.dtype))
    weights = expand_to_rows(weights.astype(wide.real.dtype), wide)
    unique, sums = sum_repeated(ids, wide * weights, rows)
    counts = jnp.ones_like(touches)
    if reduction == "mean_per_row":
        _, counts = sum_repeated(ids, touches, rows)
        counts = jnp.where(counts > 0, counts, jnp.ones_like(counts))
    means = reduce_sums(sums, counts, total, reduction).astype(dtype)
    return UniqueRows(IndexedSlices(unique, means, (rows, *means.shape[1:])))


def reduce_dense(
    joined: jax.Array, dtype: jnp.dtype, total: jax.Array, reduction: Reduction
) -> jax.Array:
    """Returns a dense leaf's sum, divided: every gradient touches all of it."""
    counts = jnp.broadcast_to(total, joined.shape[:1] or (1,))
    shaped = joined if joined.ndim else joined[None]
    return reduce_sums(shaped, counts, total, reduction).astype(dtype).reshape(joined.shape)
