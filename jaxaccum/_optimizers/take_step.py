"""A step of `accumulate`: all sums are taken, and the inner transform runs on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._accumulator.counters import saturating_add, saturating_sum
from jaxaccum._accumulator.state import AccumulatorState
from jaxaccum._accumulator.take import take_if
from jaxaccum._distributed.all_merge import union_gradient
from jaxaccum._distributed.exchange import AxisName, all_gather, axis_size, exchange_union
from jaxaccum._optimizers.micro_batch_state import (
    MicroBatchState,
    Options,
    is_accumulator,
    with_counters,
    without_counters,
)
from jaxaccum._optimizers.unique_leaf import UniqueRows
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.tree import PyTree
from jaxaccum._rows.unique_rows import is_slices


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
    axis_name, weight = options.axis_name, state.total_weight
    sums, treedef = jax.tree.flatten(state.sums, is_leaf=is_accumulator)
    grads = list(sums)
    total_count = _count_all(state, axis_name)
    for i, (total, dtype) in enumerate(zip(sums, dtypes, strict=True)):
        if is_accumulator(total):
            total = with_counters(total, state)
            emptied, taken = take_if(total, jnp.bool_(True))
            if axis_name is not None:
                taken = _taken_by_all(total, axis_name)
            sums[i] = without_counters(emptied)
            grads[i] = UniqueRows(dataclasses.replace(taken, values=taken.values.astype(dtype)))
        else:
            total = total if axis_name is None else jax.lax.psum(total, axis_name)  # type: ignore[no-untyped-call]
            count = jnp.where(total_count > 0, total_count, 1).astype(total.dtype)
            mean = total if options.reduction == "sum" else total / count
            sums[i], grads[i] = jnp.zeros_like(total), mean.astype(dtype)
    updates, inner_state = tx.update(
        jax.tree.unflatten(treedef, grads), state.inner_state, params, **extra_args
    )
    updates = jax.tree.map(lambda u: u.slices if isinstance(u, UniqueRows) else u, updates)
    return updates, dataclasses.replace(
        state,
        sums=jax.tree.unflatten(treedef, sums),
        inner_state=jax.tree.map(_cast_like, inner_state, state.inner_state),
        num_accumulated=jnp.zeros_like(state.num_accumulated),
        total_weight=None if weight is None else jnp.zeros_like(weight),
        global_step=saturating_add(state.global_step, 1),
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
