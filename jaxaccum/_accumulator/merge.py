"""``merge`` and ``grow``: two accumulators become one, or one of larger capacity."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._accumulator.apply import add_rows
from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._accumulator.row_index import NOWHERE, HashTable
from jaxaccum._accumulator.staleness import count_verdict
from jaxaccum._accumulator.state import AccumulatorState, Verdict, init


def merge(state: AccumulatorState, other: AccumulatorState) -> tuple[AccumulatorState, jax.Array]:
    """Adds what ``other`` has accumulated, as if ``state`` had seen those gradients itself.

    Sums, row counts, ``num_accumulated``, verdict and staleness counts add up; the later step is
    kept. If the rows do not fit, the verdict is OVERFLOW and nothing but its count in ``state``
    changes.

    Args:
      state: the accumulator to add to.
      other: of the same shape, dtypes, reduction and ``max_staleness``, weighted or not as
        ``state``; its capacity may differ.

    Returns:
      The new state, and ACCEPTED or OVERFLOW as an int32 scalar.

    Raises:
      ValueError: ``other`` is of another shape, dtype or reduction, or counts otherwise.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> empty = jaxaccum.init((9, 1), capacity=4)
      >>> grad = jaxaccum.IndexedSlices(jnp.array([5]), jnp.ones((1, 1)), (9, 1))
      >>> one, _ = jaxaccum.apply(empty, grad)
      >>> both, verdict = jaxaccum.merge(one, one)
      >>> both.num_accumulated, both.values[0]
      (Array(2, dtype=int32), Array([2.], dtype=float32))

    Source: of this package.
    """
    _check_mergeable(state, other)
    return _merge(state, other)


def grow(state: AccumulatorState, capacity: int) -> AccumulatorState:
    """Returns a copy of ``state`` that can hold more rows; call it outside ``jit``.

    Args:
      state: the accumulator.
      capacity: of the copy, at least the present one.

    Returns:
      The same state; its ``indices``, ``values`` and ``counts`` are ``[capacity, ...]``.

    Raises:
      ValueError: ``capacity`` is less than the present one.

    Example:
      >>> import jaxaccum
      >>> jaxaccum.grow(jaxaccum.init((100, 1), capacity=3), 6).capacity
      6

    Source: of this package.
    """
    capacity = operator.index(capacity)
    if capacity < state.capacity:
        raise ValueError(f"capacity must be at least the present {state.capacity}, got {capacity}")
    empty = init(
        state.dense_shape,
        state.dtype,
        capacity=capacity,
        reduction=state.reduction,
        accumulator_dtype=state.values.dtype,
        weighted=state.is_weighted,
    )
    return _grow(state, empty)


@jax.jit
@jax.named_scope("jaxaccum.merge")
def _merge(state: AccumulatorState, other: AccumulatorState) -> tuple[AccumulatorState, jax.Array]:
    slot = jnp.arange(other.capacity, dtype=jnp.int32)
    ids = jnp.where(slot < other.num_rows, other.indices, NOWHERE)
    merged, fits = add_rows(state, ids, other.values, other.counts)
    verdict = jnp.where(fits, jnp.int32(Verdict.ACCEPTED), jnp.int32(Verdict.OVERFLOW))
    refused = _counts(state) | {"verdict_counts": count_verdict(state.verdict_counts, verdict)}
    accepted = jax.tree.map(_add, _counts(state), _counts(other))
    accepted["global_step"] = jnp.maximum(state.global_step, other.global_step)
    chosen = jax.tree.map(lambda yes, no: jnp.where(fits, yes, no), accepted, refused)
    return dataclasses.replace(merged, **chosen), verdict


def _counts(state: AccumulatorState) -> dict[str, Any]:
    """What is counted, by name; ``None`` what is not."""
    return {
        "num_accumulated": state.num_accumulated,
        "total_weight": state.total_weight,
        "global_step": state.global_step,
        "verdict_counts": state.verdict_counts,
        "shared_verdicts": state.shared_verdicts,
        "num_shared": state.num_shared,
        "staleness_counts": state.staleness_counts,
        "shared_staleness": state.shared_staleness,
    }


def _add(count: jax.Array, more: jax.Array) -> jax.Array:
    is_weight = jnp.issubdtype(count.dtype, jnp.floating)
    return count + more if is_weight else saturating_add(count, more)


@jax.jit
def _grow(state: AccumulatorState, empty: AccumulatorState) -> AccumulatorState:
    def prefixed(old: jax.Array, new: jax.Array) -> jax.Array:
        return new.at[: old.shape[0]].set(old)

    row_index = state.row_index
    if isinstance(row_index, HashTable):
        # Slots are given in order of position: every row keeps its own.
        slot = jnp.arange(state.capacity, dtype=jnp.int32)
        ids = jnp.where(slot < state.num_rows, state.indices, NOWHERE)
        row_index, _ = empty.row_index.claim(ids, empty.num_rows, empty.capacity)
    return dataclasses.replace(
        state,
        indices=prefixed(state.indices, empty.indices),
        values=prefixed(state.values, empty.values),
        counts=prefixed(state.counts, empty.counts),
        row_index=row_index,
    )


def _check_mergeable(state: AccumulatorState, other: AccumulatorState) -> None:
    for name in ("dense_shape", "dtype", "reduction", "max_staleness", "is_weighted"):
        ours, theirs = getattr(state, name), getattr(other, name)
        if ours != theirs:
            raise ValueError(f"other must have {name} {ours}, got {theirs}")
    if state.values.dtype != other.values.dtype:
        raise ValueError(
            f"other must have accumulator_dtype {state.values.dtype}, got {other.values.dtype}"
        )
