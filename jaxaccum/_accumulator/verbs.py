"""The accumulator's verbs: pure functions from one state to the next."""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxaccum._accumulator.reduction import reduce_sums
from jaxaccum._accumulator.row_index import NOWHERE, Claim, HashTable
from jaxaccum._accumulator.state import AccumulatorState, Verdict, as_int32, init
from jaxaccum._rows.indexed_slices import IndexedSlices, as_device_slices, padding_index
from jaxaccum._rows.on_mesh import match_rows, unshard


def apply(
    state: AccumulatorState, grad: IndexedSlices, local_step: ArrayLike | None = None
) -> tuple[AccumulatorState, jax.Array]:
    """Adds a gradient to the accumulator, or says why not.

    All or nothing: with any verdict but ACCEPTED, only ``verdict_counts`` changes. STALE is decided
    first, then INVALID, then OVERFLOW. A row's count rises by one for each gradient that touches
    it, however often that gradient repeats it. Repeated rows add up in the order they come in.

    The cost follows the rows of ``grad``, neither the capacity nor the table, if the state is
    donated: ``jax.jit(jaxaccum.apply, donate_argnums=0)``, or ``apply`` inside a `jax.lax.scan`. A
    call that does not donate copies the state, and leaves the caller's as it was.

    Args:
      state: the accumulator.
      grad: ``n`` slices; their indices may be unsorted, repeated and padded.
      local_step: int scalar, the step at which the gradient was computed; ``None`` is the current
        one. A gradient from before ``state.global_step`` is stale, one from a later step is not.

    Returns:
      The new state, and the `Verdict` as an int32 scalar.

    Raises:
      TypeError: ``grad`` is no `IndexedSlices`, or of another dtype than ``state``.
      ValueError: ``grad`` is of another shape than ``state``, or ids do not fit int32.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> state = jaxaccum.init((100, 2), capacity=8)
      >>> add = jax.jit(jaxaccum.apply, donate_argnums=0)
      >>> grad = jaxaccum.IndexedSlices(jnp.array([7, 3, 7]), jnp.ones((3, 2)), (100, 2))
      >>> state, verdict = add(state, grad)
      >>> verdict == jaxaccum.Verdict.ACCEPTED, state.num_rows
      (Array(True, dtype=bool), Array(2, dtype=int32))

    Source: TensorFlow's ``SparseAccumulatorApplyGradient``; unlike there, rows need not be sorted
    or unique, and negative indices are refused.
    """
    grad = as_device_slices(grad)
    check_matches(state, grad)
    step = None if local_step is None else as_int32(local_step, "local_step")
    return _apply(state, grad, step)


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
    required = as_int32(num_required, "num_required")
    if isinstance(required, np.int32) and required < 1:
        raise ValueError(f"num_required must be positive, got {required}")
    return _take(state, required)


def set_step(state: AccumulatorState, new_step: ArrayLike) -> AccumulatorState:
    """Sets the global step; what is accumulated stays, and stays counted.

    Args:
      state: the accumulator.
      new_step: int scalar. A lower step than the current one is set all the same: gradients of
        older steps then become acceptable again.

    Returns:
      The new state.

    Raises:
      TypeError: ``new_step`` is no integer.
      ValueError: ``new_step`` is no scalar or does not fit int32.

    Example:
      >>> import jaxaccum
      >>> state = jaxaccum.set_step(jaxaccum.init((100, 1), capacity=3), 5)
      >>> state.global_step
      Array(5, dtype=int32)

    Source: TensorFlow's ``AccumulatorSetGlobalStep``.
    """
    return _set_step(state, as_int32(new_step, "new_step"))


def merge(state: AccumulatorState, other: AccumulatorState) -> tuple[AccumulatorState, jax.Array]:
    """Adds what ``other`` has accumulated, as if ``state`` had seen those gradients itself.

    Sums, row counts, ``num_accumulated`` and verdict counts add up; the later step is kept. If the
    rows do not fit, the verdict is OVERFLOW and nothing but its count in ``state`` changes.

    Args:
      state: the accumulator to add to.
      other: of the same shape, dtypes and reduction; its capacity may differ.

    Returns:
      The new state, and ACCEPTED or OVERFLOW as an int32 scalar.

    Raises:
      ValueError: ``other`` is of another shape, dtype or reduction.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> empty = jaxaccum.init((9, 1), capacity=4)
      >>> grad = jaxaccum.IndexedSlices(jnp.array([5]), jnp.ones((1, 1)), (9, 1))
      >>> one, _ = jaxaccum.apply(empty, grad)
      >>> both, verdict = jaxaccum.merge(one, one)
      >>> both.num_accumulated, both.values[0]
      (Array(2, dtype=int32), Array([2.], dtype=float32))
    """
    _check_mergeable(state, other)
    return _merge(state, other)


def grow(state: AccumulatorState, capacity: int) -> AccumulatorState:
    """Returns a copy of ``state`` with room for more rows; call it outside ``jit``.

    Args:
      state: the accumulator.
      capacity: of the copy, at least the present one.

    Raises:
      ValueError: ``capacity`` is less than the present one.

    Example:
      >>> import jaxaccum
      >>> jaxaccum.grow(jaxaccum.init((100, 1), capacity=3), 6).capacity
      6
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
    )
    return _grow(state, empty)


def num_accumulated(state: AccumulatorState) -> jax.Array:
    """Returns how many gradients were accepted since the last `take`, an int32 scalar.

    Example:
      >>> import jaxaccum
      >>> jaxaccum.num_accumulated(jaxaccum.init((100, 1), capacity=3))
      Array(0, dtype=int32)

    Source: TensorFlow's ``AccumulatorNumAccumulated``.
    """
    return state.num_accumulated


@jax.jit
def _apply(
    state: AccumulatorState, grad: IndexedSlices, local_step: jax.Array | None
) -> tuple[AccumulatorState, jax.Array]:
    is_stale = jnp.bool_(False) if local_step is None else local_step < state.global_step
    (state,), verdict = apply_all([state], [grad], is_stale)
    return state, verdict


@jax.jit
def apply_all(
    states: list[AccumulatorState], grads: list[IndexedSlices], is_stale: jax.Array
) -> tuple[list[AccumulatorState], jax.Array]:
    """Adds a gradient to each of several accumulators, or none to any: one verdict on them all."""
    grads = [_on_mesh(grad, state) for state, grad in zip(states, grads, strict=True)]
    rows = [table_rows(grad, s.dense_shape[0]) for s, grad in zip(states, grads, strict=True)]
    is_invalid = functools.reduce(jnp.logical_or, (is_bad for _, is_bad in rows), jnp.bool_(False))
    all_ids = [jnp.where(is_stale | is_invalid, NOWHERE, ids) for ids, _ in rows]
    slices = [_not_none(ids, g.values) for ids, g in zip(all_ids, grads, strict=True)]
    asked = [s.row_index.bid(ids, s.capacity) for s, (ids, _) in zip(states, slices, strict=True)]
    have_room = (b.fits(s.num_rows, s.capacity) for s, (_, b) in zip(states, asked, strict=True))
    fits = functools.reduce(jnp.logical_and, have_room, jnp.bool_(True))
    verdict = jnp.select(
        [is_stale, is_invalid, ~fits],
        [jnp.int32(Verdict.STALE), jnp.int32(Verdict.INVALID), jnp.int32(Verdict.OVERFLOW)],
        jnp.int32(Verdict.ACCEPTED),
    )
    is_accepted = (verdict == Verdict.ACCEPTED).astype(jnp.int32)
    results = []
    for state, (index, bid), (ids, values) in zip(states, asked, slices, strict=True):
        row_index, claim = index.settle(bid, state.num_rows, state.capacity, fits)
        added = dataclasses.replace(
            state,
            row_index=row_index,
            num_accumulated=state.num_accumulated + is_accepted,
            verdict_counts=count_verdict(state.verdict_counts, verdict),
        )
        results.append(add_claimed(added, claim, ids, values, jnp.int32(1)))
    return results, verdict


def _on_mesh(grad: IndexedSlices, state: AccumulatorState) -> IndexedSlices:
    values = match_rows(unshard(grad.values), state.values)
    return dataclasses.replace(grad, indices=unshard(grad.indices), values=values)


@jax.jit
def _take(
    state: AccumulatorState, num_required: jax.Array
) -> tuple[AccumulatorState, IndexedSlices, jax.Array]:
    ready = state.num_accumulated >= jnp.maximum(num_required, 1)
    # Where nothing is ready, a take of no rows leaves the index as it is.
    row_index, order = state.row_index.drain(state.indices, jnp.where(ready, state.num_rows, 0))
    padding = padding_index(state.dense_shape)
    indices = state.indices.at[order].get(mode="fill", fill_value=padding)
    values = _reduced(state, order).astype(state.dtype)
    taken = dataclasses.replace(
        state,
        indices=jnp.where(ready, padding, state.indices),
        counts=jnp.where(ready, 0, state.counts),
        num_rows=jnp.where(ready, 0, state.num_rows),
        num_accumulated=jnp.where(ready, 0, state.num_accumulated),
        global_step=state.global_step + ready.astype(jnp.int32),
        num_shared=jnp.where(ready, 0, state.num_shared),
        row_index=row_index,
    )
    return taken, IndexedSlices(indices, values, state.dense_shape), ready


@jax.jit
def _set_step(state: AccumulatorState, new_step: jax.Array) -> AccumulatorState:
    return dataclasses.replace(state, global_step=jnp.asarray(new_step))


@jax.jit
def _merge(state: AccumulatorState, other: AccumulatorState) -> tuple[AccumulatorState, jax.Array]:
    slot = jnp.arange(other.capacity, dtype=jnp.int32)
    ids = jnp.where(slot < other.num_rows, other.indices, NOWHERE)
    merged, fits = _add_rows(state, ids, other.values, other.counts)
    verdict = jnp.where(fits, jnp.int32(Verdict.ACCEPTED), jnp.int32(Verdict.OVERFLOW))
    return dataclasses.replace(
        merged,
        num_accumulated=state.num_accumulated + jnp.where(fits, other.num_accumulated, 0),
        global_step=jnp.where(
            fits, jnp.maximum(state.global_step, other.global_step), state.global_step
        ),
        verdict_counts=jnp.where(
            fits,
            state.verdict_counts + other.verdict_counts,
            count_verdict(state.verdict_counts, verdict),
        ),
        num_shared=state.num_shared + jnp.where(fits, other.num_shared, 0),
        shared_verdicts=state.shared_verdicts + jnp.where(fits, other.shared_verdicts, 0),
    ), verdict


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


def _add_rows(
    state: AccumulatorState, ids: jax.Array, values: jax.Array, touches: jax.Array
) -> tuple[AccumulatorState, jax.Array]:
    """Adds ``values`` to the rows ``ids`` and ``touches`` to their counts, if all of them fit."""
    ids, values = _not_none(ids, values)
    row_index, claim = state.row_index.claim(ids, state.num_rows, state.capacity)
    state = dataclasses.replace(state, row_index=row_index)
    return add_claimed(state, claim, ids, values, touches), claim.fits


def _not_none(ids: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One slice of padding in place of none: nothing can be gathered from an empty array."""
    if ids.shape[0]:
        return ids, values
    return jnp.full(1, NOWHERE, jnp.int32), jnp.zeros((1, *values.shape[1:]), values.dtype)


def add_claimed(
    state: AccumulatorState,
    claim: Claim,
    ids: jax.Array,
    values: jax.Array,
    touches: jax.Array,
) -> AccumulatorState:
    """Adds to rows whose slots the state's index has already given in ``claim``."""
    dropped = state.capacity + jnp.arange(ids.shape[0], dtype=jnp.int32)
    new = jnp.where(claim.is_first & claim.fits, claim.slot, dropped)
    # The first slice of a new row overwrites what the slot was left with, which spares zeroing the
    # values at every take; the others add. Dropped slices cost next to nothing.
    values = values.astype(state.values.dtype)
    sums = state.values.at[new].set(values, mode="drop", unique_indices=True)
    sums = sums.at[jnp.where(claim.is_first, NOWHERE, claim.slot)].add(values, mode="drop")
    # Repetitions all write the same count: a gradient counts once for each row it touches.
    counts = state.counts.at[claim.slot].get(mode="fill", fill_value=0) + touches
    return dataclasses.replace(
        state,
        indices=state.indices.at[new].set(ids, mode="drop", unique_indices=True),
        values=sums,
        counts=state.counts.at[claim.slot].set(counts, mode="drop"),
        num_rows=state.num_rows + jnp.where(claim.fits, claim.num_new, 0),
    )


def _reduced(state: AccumulatorState, order: jax.Array) -> jax.Array:
    """The sums of slots ``order``, divided as the reduction says; zero for NOWHERE."""
    sums = state.values.at[order].get(mode="fill", fill_value=0)
    counts = state.counts.at[order].get(mode="fill", fill_value=1)
    return reduce_sums(sums, counts, state.num_accumulated, state.reduction)


def table_rows(grad: IndexedSlices, rows: int | None) -> tuple[jax.Array, jax.Array]:
    """Row of each slice, NOWHERE for padding, and whether any index is out of range."""
    padding = grad.padding_index
    limit = padding if rows is None else min(rows, padding)
    is_padding = grad.indices == padding
    in_range = (grad.indices >= 0) & (grad.indices < limit)
    ids = jnp.where(in_range, grad.indices, NOWHERE).astype(jnp.int32)
    return ids, jnp.any(~(in_range | is_padding))


def count_verdict(verdict_counts: jax.Array, verdict: ArrayLike) -> jax.Array:
    """``verdict_counts`` with one more of ``verdict``."""
    return verdict_counts + (jnp.arange(len(Verdict), dtype=jnp.int32) == verdict).astype(jnp.int32)


def check_matches(state: AccumulatorState, grad: IndexedSlices) -> None:
    if grad.values.dtype != state.dtype:
        raise TypeError(f"grad.values must be {state.dtype} as the state, got {grad.values.dtype}")
    if grad.values.shape[1:] != state.dense_shape[1:]:
        raise ValueError(
            f"grad.values must have rows of shape {state.dense_shape[1:]}, "
            f"got {grad.values.shape[1:]}"
        )
    if None not in (grad.num_rows, state.dense_shape[0]) and grad.num_rows != state.dense_shape[0]:
        raise ValueError(
            f"grad.dense_shape must have {state.dense_shape[0]} rows, got {grad.num_rows}"
        )


def _check_mergeable(state: AccumulatorState, other: AccumulatorState) -> None:
    for name in ("dense_shape", "dtype", "reduction"):
        ours, theirs = getattr(state, name), getattr(other, name)
        if ours != theirs:
            raise ValueError(f"other must have {name} {ours}, got {theirs}")
    if state.values.dtype != other.values.dtype:
        raise ValueError(
            f"other must have accumulator_dtype {state.values.dtype}, got {other.values.dtype}"
        )
