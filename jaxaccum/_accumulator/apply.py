"""``apply``: a gradient goes into its accumulator, or a verdict says why not."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._accumulator.row_index import NOWHERE, Bid, Claim, DirectMap, HashTable
from jaxaccum._accumulator.staleness import (
    StalenessWeight,
    count_gradient,
    find_staleness,
    find_weight,
    weigh,
)
from jaxaccum._accumulator.state import AccumulatorState, Verdict, as_int32
from jaxaccum._rows.indexed_slices import IndexedSlices, as_device_slices
from jaxaccum._rows.on_mesh import match_rows, unshard
from jaxaccum._rows.row_arithmetic import expand_to_rows


def apply(
    state: AccumulatorState,
    grad: IndexedSlices,
    local_step: ArrayLike | None = None,
    *,
    staleness_weight: StalenessWeight | None = None,
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
        one. A gradient from before ``state.global_step`` is stale if it is more steps old than the
        state's ``max_staleness``; one from a later step is not.
      staleness_weight: what a gradient weighs that is ``s`` steps old, a positive number for the
        int32 scalar ``s``; FedBuff's is ``lambda s: 1 / jnp.sqrt(1.0 + s)``. By default all weigh
        one. `init` must have been told: ``weighted=True``.

    Returns:
      The new state, and the `Verdict` as an int32 scalar.

    Raises:
      TypeError: ``grad`` is no `IndexedSlices`, or of another dtype than ``state``.
      ValueError: ``grad`` is of another shape than ``state``, or ids do not fit int32; or there is
        a weight, and the state is not made for it.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> state = jaxaccum.init((100, 2), capacity=8)
      >>> add = jax.jit(jaxaccum.apply, donate_argnums=0)
      >>> grad = jaxaccum.IndexedSlices(jnp.array([7, 3, 7]), jnp.ones((3, 2)), (100, 2))
      >>> state, verdict = add(state, grad)
      >>> verdict == jaxaccum.Verdict.ACCEPTED, state.num_rows
      (Array(True, dtype=bool), Array(2, dtype=int32))

    Source: TensorFlow's ``SparseAccumulatorApplyGradient``; unlike there, rows need not be sorted
    or unique, and negative indices are refused. Weights by staleness: Nguyen et al., "Federated
    Learning with Buffered Asynchronous Aggregation" (2022).
    """
    grad = as_device_slices(grad)
    check_matches(state, grad)
    step = None if local_step is None else as_int32(local_step, "local_step")
    weight = None
    if staleness_weight is not None:
        if not state.is_weighted:
            raise ValueError("staleness_weight must be None unless init was told weighted=True")
        # Outside of the jitted function, which would be traced anew for each lambda.
        staleness = find_staleness(state.global_step, step, state.max_staleness)
        weight = find_weight(staleness_weight, staleness, state.counts.dtype)
    return _apply(state, grad, step, weight)


@jax.jit
def _apply(
    state: AccumulatorState,
    grad: IndexedSlices,
    local_step: jax.Array | None,
    weight: jax.Array | None,
) -> tuple[AccumulatorState, jax.Array]:
    staleness = find_staleness(state.global_step, local_step, state.max_staleness)
    is_stale = staleness > state.max_staleness
    (state,), verdict, _ = apply_all([state], [grad], is_stale, weight=weight)
    return count_gradient(state, verdict, staleness, weight), verdict


class _Part(NamedTuple):
    """One table's part of a gradient, whose ids have bid for slots.

    Attributes:
      state: the table's accumulator, but for its index.
      row_index: the index with the bids in it.
      bid: what the ids bid.
      ids: int32 ``[n]``, rows of the table, NOWHERE for what is skipped.
      values: ``[n, *row]``, the slices.
    """

    state: AccumulatorState
    row_index: DirectMap | HashTable
    bid: Bid
    ids: jax.Array
    values: jax.Array

    @property
    def num_needed(self) -> jax.Array:
        """How many rows there are with its new ones."""
        return self.state.num_rows + self.bid.num_new

    @property
    def fits(self) -> jax.Array:
        """Whether its new rows can be held beside the others."""
        return self.bid.fits(self.state.num_rows, self.state.capacity)

    def add(self, is_accepted: jax.Array, touches: jax.Array) -> AccumulatorState:
        """Adds the slices, or takes the bids back."""
        state = self.state
        row_index, claim = self.row_index.settle(
            self.bid, state.num_rows, state.capacity, is_accepted
        )
        state = dataclasses.replace(state, row_index=row_index)
        return add_claimed(state, claim, self.ids, self.values, touches)


def judge(
    is_stale: jax.Array, is_invalid: jax.Array, is_skipped: jax.Array, fits: jax.Array
) -> jax.Array:
    """The `Verdict` on a gradient, of the first reason to refuse it if there are several."""
    refused = (Verdict.STALE, Verdict.INVALID, Verdict.SKIPPED, Verdict.OVERFLOW)
    return jnp.select(
        [is_stale, is_invalid, is_skipped, ~fits],
        [jnp.int32(verdict) for verdict in refused],
        jnp.int32(Verdict.ACCEPTED),
    )


def _on_mesh(grad: IndexedSlices, state: AccumulatorState) -> IndexedSlices:
    values = match_rows(unshard(grad.values), state.values)
    return dataclasses.replace(grad, indices=unshard(grad.indices), values=values)


@jax.jit
@jax.named_scope("jaxaccum.apply")
def apply_all(
    states: list[AccumulatorState],
    grads: list[IndexedSlices],
    is_stale: jax.Array,
    is_skipped: jax.Array | bool = False,
    weight: jax.Array | None = None,
) -> tuple[list[AccumulatorState], jax.Array, jax.Array]:
    """Adds a gradient to each of several accumulators, or none to any: one verdict on them all.

    With a ``weight``, for which counts must be floats, it is that multiple of the gradient, and a
    row's count rises by it instead of by one. Counters are the caller's to move. Also returns how
    many rows each accumulator must hold for the gradient, int32 ``[len(states)]``.
    """
    grads = [_on_mesh(grad, state) for state, grad in zip(states, grads, strict=True)]
    pairs = list(zip(states, grads, strict=True))
    rows = [table_rows(grad, state.dense_shape[0]) for state, grad in pairs]
    is_invalid = functools.reduce(
        operator.or_, (jnp.any(is_bad) for _, is_bad in rows), jnp.bool_(False)
    )
    is_refused = is_stale | is_invalid | is_skipped
    parts = [
        _bid(
            state,
            jnp.where(is_refused, NOWHERE, ids),
            weigh(grad.values, weight, state.values.dtype),
        )
        for (state, grad), (ids, _) in zip(pairs, rows, strict=True)
    ]
    fits = functools.reduce(operator.and_, (part.fits for part in parts), jnp.bool_(True))
    verdict = judge(is_stale, is_invalid, jnp.asarray(is_skipped), fits)
    num_needed = [part.num_needed for part in parts]
    is_accepted = verdict == Verdict.ACCEPTED
    touches = jnp.int32(1) if weight is None else weight
    return (
        [part.add(is_accepted, touches) for part in parts],
        verdict,
        jnp.stack(num_needed) if parts else jnp.zeros(0, jnp.int32),
    )


def _bid(state: AccumulatorState, ids: jax.Array, values: jax.Array) -> _Part:
    row_index, bid = state.row_index.bid(ids, state.capacity)
    return _Part(state, row_index, bid, ids, values)


def add_rows(
    state: AccumulatorState, ids: jax.Array, values: jax.Array, touches: jax.Array
) -> tuple[AccumulatorState, jax.Array]:
    """Adds ``values`` to the rows ``ids`` and ``touches`` to their counts, if all of them fit."""
    row_index, claim = state.row_index.claim(ids, state.num_rows, state.capacity)
    state = dataclasses.replace(state, row_index=row_index)
    return add_claimed(state, claim, ids, values, touches), claim.fits


def not_none(grad: IndexedSlices) -> IndexedSlices:
    """One slice of padding in place of none: nothing can be gathered from an empty array."""
    if grad.indices.shape[0]:
        return grad
    indices = jnp.full(1, grad.padding_index, grad.indices.dtype)
    values = jnp.zeros((1, *grad.values.shape[1:]), grad.values.dtype)
    return IndexedSlices(indices, values, grad.dense_shape)


def add_claimed(
    state: AccumulatorState,
    claim: Claim,
    ids: jax.Array,
    values: jax.Array,
    touches: jax.Array,
    *,
    is_whole: bool = True,
) -> AccumulatorState:
    """Adds to rows whose slots the state's index has already given in ``claim``.

    Of the slices of a claim some may be added, and the others later; then ``is_whole`` is false,
    and the new rows among the first are anywhere in the free slots.
    """
    dropped = state.capacity + jnp.arange(ids.shape[0], dtype=jnp.int32)
    new = jnp.where(claim.is_first & claim.fits, claim.slot, dropped)
    rest = jnp.where(claim.is_first, NOWHERE, claim.slot)
    num_new = jnp.where(claim.fits, claim.num_new, 0)
    enter = _enter_block if is_whole else _enter_rows
    indices = jax.lax.platform_dependent(
        state.indices, new, ids, state.num_rows, num_new, tpu=enter, default=_enter_rows
    )
    return dataclasses.replace(
        state,
        indices=indices,
        values=write_slices(
            state.values, new, rest, state.num_rows, num_new, values, is_whole=is_whole
        ),
        counts=count_touches(state.counts, claim.slot, touches),
        num_rows=state.num_rows + num_new,
    )


def write_slices(
    sums: jax.Array,
    new: jax.Array,
    rest: jax.Array,
    num_rows: jax.Array,
    num_new: jax.Array,
    slices: jax.Array,
    *,
    is_whole: bool = True,
) -> jax.Array:
    """Writes slices over the slots ``new``, and adds them to those of ``rest``; drops the others.

    If ``is_whole``, the new slots are ``num_new`` side by side, after the ``num_rows`` in use.
    """
    write = _write_block if is_whole else _write_rows
    result: jax.Array = jax.lax.platform_dependent(
        sums, new, rest, num_rows, num_new, slices.astype(sums.dtype),
        tpu=write, default=_write_rows,
    )  # fmt: skip
    return result


def count_touches(counts: jax.Array, slot: jax.Array, touches: jax.Array) -> jax.Array:
    """Adds ``touches`` to the counts of slots, once for each that is there, however often."""
    # Repetitions all write the same count: a gradient counts once for each row it touches.
    touched = counts.at[slot].get(mode="fill", fill_value=0)
    is_float = jnp.issubdtype(counts.dtype, jnp.floating)
    touched = (
        touched + touches.astype(counts.dtype) if is_float else saturating_add(touched, touches)
    )
    return counts.at[slot].set(touched, mode="drop")


def _enter_rows(
    indices: jax.Array, new: jax.Array, ids: jax.Array, num_rows: jax.Array, num_new: jax.Array
) -> jax.Array:
    """Writes ids into the slots ``new``."""
    del num_rows, num_new
    return indices.at[new].set(ids, mode="drop", unique_indices=True)


def _enter_block(
    indices: jax.Array, new: jax.Array, ids: jax.Array, num_rows: jax.Array, num_new: jax.Array
) -> jax.Array:
    """The same by a sort: the new slots lie side by side, and a TPU scatters entry by entry."""
    num = min(ids.shape[0], indices.shape[0])
    _, new_ids = jax.lax.sort((new, ids), num_keys=1)
    start, is_new = _find_block(indices.shape[0], num, num_rows, num_new)
    shifted = jnp.concatenate([jnp.zeros(num, jnp.int32), new_ids[:num]])
    new_ids = jax.lax.dynamic_slice_in_dim(shifted, num - (num_rows - start), num)
    old_ids = jax.lax.dynamic_slice_in_dim(indices, start, num)
    block = jnp.where(is_new, new_ids, old_ids)
    return jax.lax.dynamic_update_slice_in_dim(indices, block, start, 0)


def _write_rows(
    sums: jax.Array,
    new: jax.Array,
    rest: jax.Array,
    num_rows: jax.Array,
    num_new: jax.Array,
    slices: jax.Array,
) -> jax.Array:
    # The first slice of a new row overwrites what the slot was left with, which spares zeroing the
    # sums at every take; the others add. Dropped slices cost next to nothing.
    del num_rows, num_new
    sums = sums.at[new].set(slices, mode="drop", unique_indices=True)
    return sums.at[rest].add(slices, mode="drop")


def _write_block(
    sums: jax.Array,
    new: jax.Array,
    rest: jax.Array,
    num_rows: jax.Array,
    num_new: jax.Array,
    slices: jax.Array,
) -> jax.Array:
    """The same with one scatter in place of two: new sums begin as a block of zeros.

    A TPU scatters row after row, dropped ones too.
    """
    capacity = sums.shape[0]
    num = min(slices.shape[0], capacity)
    start, is_new = _find_block(capacity, num, num_rows, num_new)
    old = jax.lax.dynamic_slice_in_dim(sums, start, num)
    # Negative zero is the neutral element, also of a lone -0.
    block = jnp.where(expand_to_rows(is_new, old), -jnp.zeros_like(old), old)
    sums = jax.lax.dynamic_update_slice_in_dim(sums, block, start, 0)
    return sums.at[jnp.where(new < capacity, new, rest)].add(slices, mode="drop")


def _find_block(
    capacity: int, num: int, num_rows: jax.Array, num_new: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Where the block of ``num`` slots begins that new rows go to, and which of them those are."""
    # Where fewer than ``num`` slots are free, the block begins among those in use.
    start = jnp.minimum(num_rows, capacity - num)
    slot = start + jnp.arange(num, dtype=jnp.int32)
    return start, (slot >= num_rows) & (slot < num_rows + num_new)


def table_rows(grad: IndexedSlices, rows: int | None) -> tuple[jax.Array, jax.Array]:
    """Row of each slice, NOWHERE for padding; and which indices are out of range."""
    padding = grad.padding_index
    limit = padding if rows is None else min(rows, padding)
    is_padding = grad.indices == padding
    in_range = (grad.indices >= 0) & (grad.indices < limit)
    ids = jnp.where(in_range, grad.indices, NOWHERE).astype(jnp.int32)
    return ids, ~(in_range | is_padding)


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
