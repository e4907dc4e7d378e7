"""``take``: what was accumulated comes out as one gradient, and the state starts afresh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._accumulator.reduction import reduce_sums
from jaxaccum._accumulator.state import AccumulatorState, as_int32
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.shapes import padding_index


def take(
    state: AccumulatorState, num_required: ArrayLike = 1
) -> tuple[AccumulatorState, IndexedSlices, jax.Array]:
    """Takes everything accumulated, if it comes from at least ``num_required`` gradients.

    If so the state starts afresh and its ``global_step`` rises by one. Otherwise the state stays as
    it is and the gradient is all padding.

    Args:
      state: the accumulator.
      num_required: int scalar, at least 1 (a traced value below counts as 1).

    Returns:
      The new state; the reduced gradient, ``capacity`` slices of distinct rows, ascending, padding
      last with values of zero; and whether it was ready, a bool scalar.

    Raises:
      ValueError: ``num_required`` is a number below 1.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> state = jaxaccum.init((100, 1), capacity=3)
      >>> grad = jaxaccum.IndexedSlices(jnp.array([7, 3]), jnp.array([[1.], [2.]]), (100, 1))
      >>> state, _ = jaxaccum.apply(state, grad)
      >>> state, mean, ready = jaxaccum.take(state)
      >>> ready, mean.indices, state.global_step
      (Array(True, dtype=bool), Array([  3,   7, 100], dtype=int32), Array(1, dtype=int32))

    Source: TensorFlow's ``SparseAccumulatorTakeGradient``, without the blocking.
    """
    return _take(state, as_required(num_required))


def as_required(num_required: ArrayLike) -> jax.Array | np.int32:
    """A number of gradients to wait for, int32; traced it may be below 1, which counts as 1.

    Raises:
      TypeError: it is no integer.
      ValueError: it is a number below 1, no scalar, or does not fit int32.
    """
    required = as_int32(num_required, "num_required")
    if isinstance(required, np.int32) and required < 1:
        raise ValueError(f"num_required must be positive, got {required}")
    return required


def is_enough(num_accumulated: jax.Array, num_required: ArrayLike) -> jax.Array:
    """Whether as many gradients are there as are waited for, one at least."""
    return num_accumulated >= jnp.maximum(num_required, 1)


@jax.jit
def _take(
    state: AccumulatorState, num_required: jax.Array
) -> tuple[AccumulatorState, IndexedSlices, jax.Array]:
    ready = is_enough(state.num_accumulated, num_required)
    return *take_if(state, ready), ready


@jax.named_scope("jaxaccum.take")
def take_if(state: AccumulatorState, ready: jax.Array) -> tuple[AccumulatorState, IndexedSlices]:
    """Takes everything where ``ready``, a bool scalar; else the gradient is all padding.

    Whoever calls this has looked at what is accumulated: nothing is taken from an empty state
    unless ``ready`` says so.
    """
    # Where nothing is ready, a take of no rows leaves the index as it is.
    row_index, order = state.row_index.drain(state.indices, jnp.where(ready, state.num_rows, 0))
    padding = padding_index(state.dense_shape)
    indices = state.indices.at[order].get(mode="fill", fill_value=padding)
    values = _reduce(state, order).astype(state.dtype)
    taken = dataclasses.replace(
        state,
        indices=jnp.where(ready, padding, state.indices),
        counts=jnp.where(ready, 0, state.counts),
        num_rows=jnp.where(ready, 0, state.num_rows),
        num_accumulated=jnp.where(ready, 0, state.num_accumulated),
        global_step=saturating_add(state.global_step, ready),
        num_shared=jnp.where(ready, 0, state.num_shared),
        row_index=row_index,
    )
    if state.total_weight is not None:
        nothing = jnp.zeros_like(state.total_weight)
        weight = jnp.where(ready, nothing, state.total_weight)
        taken = dataclasses.replace(taken, total_weight=weight)
    return taken, IndexedSlices(indices, values, state.dense_shape)


def _reduce(state: AccumulatorState, order: jax.Array) -> jax.Array:
    """The sums of slots ``order``, divided as the reduction says; zero for NOWHERE."""
    sums = state.values.at[order].get(mode="fill", fill_value=0)
    counts = state.counts.at[order].get(mode="fill", fill_value=1)
    total = state.num_accumulated if state.total_weight is None else state.total_weight
    return reduce_sums(sums, counts, total, state.reduction)
