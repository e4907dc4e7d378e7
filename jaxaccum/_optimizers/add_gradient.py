"""One gradient of a micro-batch is checked, and goes into all sums or into none."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxaccum._accumulator.pooled_rows import PooledRows, add_to_pools
from jaxaccum._accumulator.staleness import count_gradient, find_staleness, find_weight, weigh
from jaxaccum._accumulator.state import Verdict, as_int32
from jaxaccum._distributed.exchange import axis_size
from jaxaccum._optimizers.micro_batch_state import (
    LeafSum,
    MicroBatchState,
    Options,
    list_sums,
    params_structure,
    with_sums,
)
from jaxaccum._rows.indexed_slices import as_slices, check_indices, is_slices
from jaxaccum._rows.row_arithmetic import promote_dtypes
from jaxaccum._rows.tree import PyTree
from jaxaccum._rows.unique_rows import zero_padding


class Gradient(NamedTuple):
    """One gradient, checked against the sums that it goes into.

    Attributes:
      leaves: its leaves, as wide as the sums.
      dtypes: the dtype each leaf came in.
    """

    leaves: list[Any]
    dtypes: list[Any]


class Admission(NamedTuple):
    """What is known of a gradient before it is compared with the capacity.

    Attributes:
      is_stale: bool ``[]``.
      is_skipped: bool ``[]``.
      staleness: int32 ``[]``, how many steps ago it was computed, one more than the bound if stale.
      weight: float ``[]``, or ``None`` where gradients count in full.
    """

    is_stale: jax.Array
    is_skipped: jax.Array
    staleness: jax.Array
    weight: jax.Array | None


def admission(
    options: Options,
    state: MicroBatchState,
    grad: Gradient,
    params: PyTree | None,
    local_step: ArrayLike | None,
) -> Admission:
    """Finds out how old a gradient is, what it weighs, and whether its values are wanted."""
    most = options.max_staleness
    made = None if local_step is None else as_int32(local_step, "local_step")
    staleness = find_staleness(state.global_step, made, most)
    weight = None
    if state.total_weight is not None:
        weight = find_weight(options.staleness_weight, staleness, state.total_weight.dtype)
    is_skipped = _is_skipped(options, state, grad, params)
    return Admission(staleness > most, is_skipped, staleness, weight)


def check_gradient(options: Options, state: MicroBatchState, updates: PyTree) -> Gradient:
    """Returns the leaves of ``updates``; raises if they do not fit the sums, whatever they hold."""
    try:
        grads = params_structure(state).flatten_up_to(updates)
    except ValueError as err:
        raise ValueError(f"updates must be a tree like the params: {err}") from None
    leaves, dtypes = [], []
    for grad, held in zip(grads, list_sums(state), strict=True):
        leaf = _checked(grad, held)
        if held.is_table and options.on_overflow == "step":
            _check_capacity(leaf, held)
        dtypes.append(leaf.values.dtype if is_slices(leaf) else leaf.dtype)
        leaves.append(_widened(leaf, held.total))
    return Gradient(leaves, dtypes)


def add_gradient(
    options: Options,
    state: MicroBatchState,
    grad: Gradient,
    admitted: Admission,
    is_open: jax.Array | None,
) -> tuple[MicroBatchState, jax.Array]:
    """Adds one gradient to all sums or to none; not at all where ``is_open`` says that it is added.

    Returns:
      The new state; and whether a step must be taken first for the gradient to fit. Then it is not
      in the sums yet, and has no verdict.
    """
    if is_open is not None:
        admitted = admitted._replace(is_skipped=admitted.is_skipped | ~is_open)
    sums, rows, verdict, num_needed = _add_to_sums(state, grad.leaves, admitted)
    is_early = (verdict == Verdict.OVERFLOW) & (options.on_overflow == "step")
    _raise_if_refused(verdict, state, grad.leaves, options)
    # What is still to come, or has come before, counts as nothing.
    counted = jnp.where(is_early, -1, verdict)
    if is_open is not None:
        counted = jnp.where(is_open, counted, -1)
        verdict = jnp.where(is_open, verdict, state.verdict)
    state = dataclasses.replace(
        state,
        sums=sums,
        rows=rows,
        peak_rows=jnp.maximum(state.peak_rows, num_needed),
        early_rows=jnp.where(
            is_early,
            jnp.maximum(state.early_rows, _extrapolate(options, state, num_needed)),
            state.early_rows,
        ),
        verdict=verdict,
    )
    return count_gradient(state, counted, admitted.staleness, admitted.weight), is_early


def _extrapolate(options: Options, state: MicroBatchState, num_needed: jax.Array) -> jax.Array:
    """How many rows as many gradients as a step requires may touch, if those here touch so many."""
    devices = 1 if options.axis_name is None else axis_size(options.axis_name)
    required = jnp.asarray(options.required(state), jnp.float32) / devices
    there = (state.num_accumulated + 1).astype(jnp.float32)
    rows = jnp.ceil(num_needed.astype(jnp.float32) * jnp.maximum(required / there, 1.0))
    return jnp.minimum(rows, 2.0**30).astype(jnp.int32)


def _is_skipped(
    options: Options, state: MicroBatchState, grad: Gradient, params: PyTree | None
) -> jax.Array:
    """Asks ``skip`` about the gradient; tables are to it the values of their slices."""
    if options.skip is None:
        return jnp.bool_(False)
    values = [zero_padding(g).values if is_slices(g) else g for g in grad.leaves]
    updates = jax.tree.unflatten(params_structure(state), values)
    answer = options.skip(updates, state.global_step, params)
    # optax's predicates also return what they found.
    return jnp.asarray(answer[0] if isinstance(answer, tuple) else answer, bool)


def _checked(grad: Any, held: LeafSum) -> Any:
    name = f"updates{held.path}"
    if not held.is_table:
        if is_slices(grad):
            raise TypeError(f"{name} is an IndexedSlices, but tables does not select it")
        grad = jnp.asarray(grad)
        if grad.shape != held.shape:
            raise ValueError(f"{name} must have shape {held.shape}, got {grad.shape}")
        return grad
    if not is_slices(grad):
        raise TypeError(f"{name} is selected by tables and must be an IndexedSlices, got {grad!r}")
    grad = as_slices(grad, name)
    if grad.values.shape[1:] != held.shape[1:] or grad.num_rows not in (None, held.shape[0]):
        raise ValueError(
            f"{name} has shape {(grad.num_rows, *grad.values.shape[1:])}, but "
            f"state.sums{held.path} is of a table of shape {held.shape}: state must be what init "
            "returned for these params"
        )
    return grad


def _check_capacity(grad: Any, held: LeafSum) -> None:
    """Raises if a single gradient could touch more rows than can be held."""
    rows, slices = held.shape[0], grad.indices.shape[0]
    if (held.capacity or 0) < min(slices, rows):
        raise ValueError(
            f"capacity {held.capacity} of params{held.path} must be at least {min(slices, rows)}: "
            f"one gradient has {slices} slices of {rows} rows, which must fit into emptied sums; "
            "or refuse what does not fit, by on_overflow='refuse'"
        )


def _widened(grad: Any, total: Any) -> Any:
    # A gradient may be narrower than its parameter, or wider if the parameter is 16 bits wide.
    if is_slices(grad):
        values = grad.values.astype(promote_dtypes(grad.values.dtype, total.dtype))
        return dataclasses.replace(grad, values=values)
    return grad.astype(promote_dtypes(grad.dtype, total.dtype))


def _add_to_sums(
    state: MicroBatchState, grads: list[Any], admitted: Admission
) -> tuple[PyTree, tuple[PooledRows, ...], jax.Array, jax.Array]:
    """Adds one gradient to all sums or to none; tells how many rows each table needs for it."""
    held = list_sums(state)
    sums, tables = [h.total for h in held], [i for i, h in enumerate(held) if h.is_table]
    rows, added, verdict, num_needed = add_to_pools(
        state.rows,
        [sums[i] for i in tables],
        [grads[i] for i in tables],
        admitted.is_stale,
        admitted.is_skipped,
        admitted.weight,
    )
    is_accepted = verdict == Verdict.ACCEPTED
    for i, total in zip(tables, added, strict=True):
        sums[i] = total
    for i in set(range(len(sums))) - set(tables):
        more = weigh(grads[i], admitted.weight, grads[i].dtype)
        sums[i] = sums[i] + jnp.where(is_accepted, more, 0)
    return with_sums(state, sums), rows, verdict, num_needed


def _raise_if_refused(
    verdict: jax.Array, state: MicroBatchState, grads: list[Any], options: Options
) -> None:
    if isinstance(verdict, jax.core.Tracer):
        return
    tables = [
        (grad, held) for grad, held in zip(grads, list_sums(state), strict=True) if held.is_table
    ]
    if verdict == Verdict.INVALID:
        for grad, held in tables:  # the first leaf at fault raises
            check_indices(grad, held.shape[0], f"updates{held.path}")
    if verdict == Verdict.OVERFLOW and options.on_overflow == "refuse":
        capacities = [held.capacity for _, held in tables]
        raise ValueError(
            f"capacity {capacities} has no room for the new rows of updates after "
            f"{int(state.num_accumulated)} gradients; nothing was accumulated"
        )
