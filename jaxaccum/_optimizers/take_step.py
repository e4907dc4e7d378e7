"""A step of `accumulate`: all sums are taken, and the inner transform runs on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._accumulator.counters import saturating_add, saturating_sum
from jaxaccum._accumulator.pooled_rows import PooledRows, take_pool
from jaxaccum._accumulator.reduction import reduce_sums
from jaxaccum._accumulator.state import AccumulatorState
from jaxaccum._distributed.all_merge import union_gradient
from jaxaccum._distributed.exchange import AxisName, all_gather, axis_size, exchange_union
from jaxaccum._optimizers.micro_batch_state import (
    MicroBatchState,
    Options,
    list_sums,
    params_structure,
    with_sums,
)
from jaxaccum._optimizers.unique_leaf import UniqueRows
from jaxaccum._rows.indexed_slices import IndexedSlices, is_slices
from jaxaccum._rows.tree import PyTree


def over_devices(
    is_early: jax.Array, num_accumulated: jax.Array, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array]:
    """Whether any device must step early, and how many gradients all of them hold."""
    if axis_name is None:
        return is_early, num_accumulated
    axis_size(axis_name)  # says which axes there are, if it is not one
    both = all_gather(jnp.stack([is_early.astype(jnp.int32), num_accumulated]), axis_name)
    return jnp.any(both[:, 0] > 0), saturating_sum(both[:, 1])


def take_step(
    tx: Any,
    options: Options,
    dtypes: list[Any],
    extra_args: dict[str, Any],
    params: PyTree | None,
    state: MicroBatchState,
) -> tuple[PyTree, MicroBatchState]:
    """Takes all sums and runs the inner transform on them."""
    total_count = _count_all(state, options.axis_name)
    held = list_sums(state)
    sums = [h.total for h in held]
    tables = [i for i, h in enumerate(held) if h.is_table]
    rows, slices = _take_tables(options, state, [sums[i] for i in tables], total_count)
    taken = dict(zip(tables, slices, strict=True))
    grads: list[Any] = list(sums)
    for i, (total, dtype) in enumerate(zip(sums, dtypes, strict=True)):
        if i in taken:
            values = taken[i].values.astype(dtype)
            grads[i] = UniqueRows(dataclasses.replace(taken[i], values=values))
        else:
            mean = _reduce_dense(options, total, total_count)
            sums[i], grads[i] = jnp.zeros_like(total), mean.astype(dtype)
    updates, inner_state = tx.update(
        jax.tree.unflatten(params_structure(state), grads), state.inner_state, params, **extra_args
    )
    updates = jax.tree.map(lambda u: u.slices if isinstance(u, UniqueRows) else u, updates)
    weight = state.total_weight
    return updates, dataclasses.replace(
        state,
        sums=with_sums(state, sums),
        rows=rows,
        inner_state=jax.tree.map(_cast_like, inner_state, state.inner_state),
        num_accumulated=jnp.zeros_like(state.num_accumulated),
        total_weight=None if weight is None else jnp.zeros_like(weight),
        global_step=saturating_add(state.global_step, 1),
    )


def _take_tables(
    options: Options, state: MicroBatchState, sums: list[jax.Array], total_count: jax.Array
) -> tuple[tuple[PooledRows, ...], list[IndexedSlices]]:
    """The pools emptied, and the reduced rows of each table."""
    emptied, taken, tables = list[PooledRows](), list[IndexedSlices](), iter(sums)
    for pool in state.rows:
        new, held = take_pool(pool)
        emptied.append(new)
        for t, (length, rows) in enumerate(zip(pool.lengths, held, strict=True)):
            total = next(tables)
            if options.axis_name is not None:
                own = _as_accumulator(options, state, pool, t, total)
                taken.append(_taken_by_all(own, options.axis_name))
                continue
            values = total.at[rows.slot].get(mode="fill", fill_value=0)
            values = reduce_sums(values, rows.counts, total_count, options.reduction)
            taken.append(IndexedSlices(rows.ids, values, (length, *values.shape[1:])))
    return tuple(emptied), taken


def _reduce_dense(options: Options, total: jax.Array, total_count: jax.Array) -> jax.Array:
    if options.axis_name is not None:
        total = jax.lax.psum(total, options.axis_name)  # type: ignore[no-untyped-call]
    count = jnp.where(total_count > 0, total_count, 1).astype(total.dtype)
    return total if options.reduction == "sum" else total / count


def _as_accumulator(
    options: Options, state: MicroBatchState, pool: PooledRows, t: int, sums: jax.Array
) -> AccumulatorState:
    """One table's sums as an accumulator, to be exchanged; it has no index, and no past."""
    none = jnp.zeros_like(state.verdict_counts)
    empty: Any = None
    indices, counts = pool.held_by(t)
    return AccumulatorState(
        indices=indices,
        values=sums,
        counts=counts,
        num_rows=pool.num_rows[t],
        num_accumulated=state.num_accumulated,
        global_step=state.global_step,
        verdict_counts=none,
        num_shared=jnp.int32(0),
        shared_verdicts=none,
        row_index=empty,
        total_weight=state.total_weight,
        staleness_counts=None,
        shared_staleness=None,
        dense_shape=(pool.lengths[t], *sums.shape[1:]),
        dtype=sums.dtype,
        reduction=options.reduction,
    )


def _count_all(state: MicroBatchState, axis_name: AxisName | None) -> jax.Array:
    """How many gradients there are, or what they weigh, over all devices."""
    if state.total_weight is None:
        return over_devices(jnp.bool_(False), state.num_accumulated, axis_name)[1]
    if axis_name is None:
        return state.total_weight
    return jnp.sum(all_gather(state.total_weight, axis_name))


def _taken_by_all(total: AccumulatorState, axis_name: AxisName) -> IndexedSlices:
    """What the accumulators of all devices come to; none of their rows is left out."""
    rows = total.dense_shape[0] or 0
    capacity = max(min(axis_size(axis_name) * total.capacity, rows), 1)
    union = exchange_union(total, axis_name, None, None, capacity)
    return union_gradient(total, union, jnp.bool_(True))


def _cast_like(new: Any, old: Any) -> Any:
    return new if new.dtype == old.dtype else new.astype(old.dtype)  # keys cannot be cast


def no_updates(step: Callable[..., Any], state: MicroBatchState) -> PyTree:
    """Updates that change nothing, of the shapes of a step's."""

    def nothing(leaf: Any) -> Any:
        if not is_slices(leaf):
            return jnp.zeros_like(leaf)  # sharded alike, too
        indices = jnp.full(leaf.indices.shape, leaf.padding_index, jnp.int32)
        return IndexedSlices(indices, jnp.zeros_like(leaf.values), leaf.dense_shape)

    return jax.tree.map(nothing, jax.eval_shape(step, state)[0], is_leaf=is_slices)
