"""The accumulators of many devices become one: inside `jax.shard_map` or `jax.pmap`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._accumulator.reduction import reduce_sums
from jaxaccum._accumulator.row_index import NOWHERE
from jaxaccum._accumulator.staleness import count_verdict
from jaxaccum._accumulator.state import AccumulatorState, Verdict
from jaxaccum._accumulator.take import as_required, is_enough, take_if
from jaxaccum._distributed.exchange import (
    AxisName,
    Exchange,
    Union,
    exchange_union,
    pack_tallies,
    unpack_tallies,
)
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.shapes import padding_index


def all_merge(
    state: AccumulatorState,
    axis_name: AxisName,
    *,
    max_rows: int | None = None,
    exchange: Exchange | None = None,
) -> tuple[AccumulatorState, jax.Array]:
    """Makes every device's accumulator the one a single device would have, seeing all gradients.

    Sums, row counts, ``num_accumulated``, verdict and staleness counts add up over the devices, the
    latest step is kept. All devices come to the same content, bit for bit, their rows in ascending
    slots. The verdict is alike on every device; unless it is ACCEPTED, each keeps its own state but
    for the count of the verdict:

    * OVERFLOW: the distinct rows of all devices exceed the capacity, or one device holds more than
      ``max_rows``. Nothing is lost; `grow` and merge again.
    * INVALID: a device still holds merged gradients, not taken since. Merging them again would
      count them once a device. `take` between two merges, or use `all_take`, which merges only
      what it takes.

    What all devices have in common after a merge is remembered, so that verdict counts stay right
    over any number of merges, as long as all are over the same axes.

    Args:
      state: this device's accumulator.
      axis_name: the mesh or `jax.pmap` axis to merge over, or a tuple of axes.
      max_rows: how many rows each device sends, at most its capacity, which is the default. Bytes
        and time follow it, so let it be what a step touches.
      exchange: ``"rows"`` sends rows, ``"dense"`` a gradient of the whole table and its counts. By
        default whichever moves fewer bytes; both come to the same but for the order of sums.

    Returns:
      The new state, and the `Verdict` as an int32 scalar.

    Raises:
      ValueError: called outside ``axis_name``, a bad ``max_rows`` or ``exchange``, or ``"dense"``
        for a table of unknown row count.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> @jax.pmap
      ... def start(row):
      ...     state = jaxaccum.init((100, 1), capacity=4)
      ...     grad = jaxaccum.IndexedSlices(row[None], jnp.ones((1, 1)), (100, 1))
      ...     return jaxaccum.apply(state, grad)[0]
      >>> states = start(jnp.arange(jax.local_device_count()) % 2)
      >>> merge = jax.pmap(lambda state: jaxaccum.all_merge(state, "data"), axis_name="data")
      >>> merged, verdict = merge(states)
      >>> merged.num_accumulated[0] == jax.local_device_count()
      Array(True, dtype=bool)

    Source: the all-reduce of data-parallel training, for row-sparse gradients.
    """
    union = exchange_union(state, axis_name, max_rows, exchange)
    merged = union.verdict == Verdict.ACCEPTED
    # Where the merge is refused, nothing is released and nothing written.
    ids = jnp.where(merged, union.rows.ids, NOWHERE)
    rows = union.rows._replace(slot=jnp.where(merged, union.rows.slot, NOWHERE))
    row_index, _ = state.row_index.drain(state.indices, jnp.where(merged, state.num_rows, 0))
    slot = jnp.where(ids == NOWHERE, NOWHERE, jnp.arange(ids.shape[0], dtype=jnp.int32))
    padding = padding_index(state.dense_shape)
    indices = jnp.where(merged, padding, state.indices)
    return dataclasses.replace(
        _count_all(state, union),
        indices=indices.at[slot].set(ids, mode="drop"),
        values=rows.write_sums(state.values, rows.values),
        counts=rows.write_sums(jnp.where(merged, 0, state.counts), rows.counts),
        num_rows=jnp.where(merged, rows.num_rows, state.num_rows),
        num_accumulated=jnp.where(merged, union.num_accumulated, state.num_accumulated),
        total_weight=jax.tree.map(
            lambda all_of_it, own: jnp.where(merged, all_of_it, own),
            union.total_weight,
            state.total_weight,
        ),
        num_shared=jnp.where(merged, union.num_accumulated, state.num_shared),
        global_step=jnp.where(merged, union.global_step, state.global_step),
        row_index=row_index.enter(ids),
    ), union.verdict


def all_take(
    state: AccumulatorState,
    axis_name: AxisName,
    num_required: ArrayLike = 1,
    *,
    max_rows: int | None = None,
    exchange: Exchange | None = None,
) -> tuple[AccumulatorState, IndexedSlices, jax.Array, jax.Array]:
    """Takes what all devices have accumulated together, if it is enough: `all_merge` and `take`.

    If ``num_required`` gradients are there, counted over all devices, and their rows fit, then all
    devices get the same gradient, bit for bit, and all states start afresh, with the verdict counts
    of all. Otherwise every device keeps its own state and goes on, and the gradient is all padding.
    Unlike a merge followed by a take, that is safe when gradients are too few or rows too many.

    `jax.shard_map` sees that gradient, ``ready`` and verdict are alike on every device, so that
    what is computed from them may leave it as ``PartitionSpec()``.

    Args:
      state: this device's accumulator.
      axis_name: as in `all_merge`.
      num_required: int scalar, at least 1 (a traced value below counts as 1).
      max_rows: as in `all_merge`.
      exchange: as in `all_merge`.

    Returns:
      The new state; the reduced gradient, at most ``capacity`` slices of distinct rows, ascending,
      padding last with values of zero; whether it was ready; and the `Verdict` of the merge.

    Raises:
      ValueError: as `all_merge` and `take`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> def step(row):
      ...     state = jaxaccum.init((100, 1), capacity=4)
      ...     grad = jaxaccum.IndexedSlices(row[None], jnp.ones((1, 1)), (100, 1))
      ...     state, _ = jaxaccum.apply(state, grad)
      ...     _, mean, ready, _ = jaxaccum.all_take(state, "data")
      ...     return mean.indices, ready
      >>> indices, ready = jax.pmap(step, axis_name="data")(jnp.array([7]))
      >>> ready, indices[0]
      (Array([ True], dtype=bool), Array([  7, 100, 100, 100], dtype=int32))

    Source: `all_merge` and `take`; of this package.
    """
    required = as_required(num_required)
    union = exchange_union(state, axis_name, max_rows, exchange)
    merged = union.verdict == Verdict.ACCEPTED
    ready = merged & is_enough(union.num_accumulated, required)
    grad = union_gradient(state, union, ready)
    emptied, _ = take_if(state, ready)
    emptied = dataclasses.replace(
        emptied,
        num_accumulated=jnp.where(ready, 0, state.num_accumulated),
        global_step=jnp.where(ready, saturating_add(union.global_step, 1), state.global_step),
    )
    # A merge that is not taken has not been.
    return _count_all(emptied, union, ready | ~merged), grad, ready, union.verdict


def union_gradient(state: AccumulatorState, union: Union, ready: jax.Array) -> IndexedSlices:
    """The reduced rows of all devices, all padding unless ``ready``."""
    rows = union.rows
    empty = jnp.zeros((rows.ids.shape[0], *state.values.shape[1:]), state.values.dtype)
    sums = rows.write_sums(empty, rows.values)
    counts = rows.write_sums(jnp.ones_like(rows.ids, rows.counts.dtype), rows.counts)
    total = union.num_accumulated if union.total_weight is None else union.total_weight
    means = reduce_sums(sums, counts, total, state.reduction)
    is_row = ready & (rows.ids != NOWHERE)
    return IndexedSlices(
        jnp.where(is_row, rows.ids, padding_index(state.dense_shape)),
        jnp.where(is_row.reshape(-1, *[1] * (means.ndim - 1)), means, 0).astype(state.dtype),
        state.dense_shape,
    )


def _count_all(
    state: AccumulatorState, union: Union, is_over: jax.Array | bool = True
) -> AccumulatorState:
    """Takes over the counts of all; or counts the verdict, which all devices have in common.

    Neither where it is not ``is_over``.
    """
    own, shared = pack_tallies(state)
    merged = union.verdict == Verdict.ACCEPTED
    new_own, new_shared = (
        jnp.where(merged, union.tallies, count_verdict(counts, union.verdict))
        for counts in (own, shared)
    )
    return unpack_tallies(
        state, jnp.where(is_over, new_own, own), jnp.where(is_over, new_shared, shared)
    )
