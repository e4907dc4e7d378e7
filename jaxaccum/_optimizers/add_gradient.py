"""One gradient of a micro-batch is checked, and goes into all sums or into none."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxaccum._accumulator.apply import apply_all
from jaxaccum._accumulator.staleness import count_gradient, find_staleness, find_weight, weigh
from jaxaccum._accumulator.state import Verdict, as_int32
from jaxaccum._optimizers.micro_batch_state import (
    MicroBatchState,
    Options,
    is_accumulator,
)
from jaxaccum._rows.indexed_slices import as_slices, check_indices
from jaxaccum._rows.row_arithmetic import promote_dtypes
from jaxaccum._rows.tree import PyTree
from jaxaccum._rows.unique_rows import is_slices, zero_padding


class Gradient(NamedTuple):
    """One gradient, checked against the sums that it goes into.

    Attributes:
      leaves: its leaves, as wide as the sums.
      dtypes: the dtype each leaf came in.
    """

    leaves: list[Any]
    dtypes: list[Any]


class Admission(NamedTuple):
    """What is known of a gradient before it is compared with the room there is.

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
    treedef: Any
    paths, treedef = jax.tree_util.tree_flatten_with_path(state.sums, is_leaf=is_accumulator)
    try:
        grads = treedef.flatten_up_to(updates)
    except ValueError as err:
        raise ValueError(f"updates must be a tree like the params: {err}") from None
    leaves, dtypes = [], []
    for grad, (path, total) in zip(grads, paths, strict=True):
        leaf = _checked(grad, total, jax.tree_util.keystr(path))
        if is_slices(leaf) and options.on_overflow == "step":
            _check_room(leaf, total, jax.tree_util.keystr(path))
        dtypes.append(leaf.values.dtype if is_slices(leaf) else leaf.dtype)
        leaves.append(_widened(leaf, total))
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
    sums, verdict, num_needed = _add_to_sums(state, grad.leaves, admitted)
    is_early = (verdict == Verdict.OVERFLOW) & (options.on_overflow == "step")
    _raise_if_refused(verdict, state, grad.leaves, options)
    # What is still to come, or has come before, counts as nothing.
    counted = jnp.where(is_early, -1, verdict)
    if is_open is not None:
        counted = jnp.where(is_open, counted, -1)
        verdict = jnp.where(is_open, verdict, state.verdict)
    state = dataclasses.replace(
        state, sums=sums, peak_rows=jnp.maximum(state.peak_rows, num_needed), verdict=verdict
    )
    return count_gradient(state, counted, admitted.staleness, admitted.weight), is_early


def _is_skipped(
    options: Options, state: MicroBatchState, grad: Gradient, params: PyTree | None
) -> jax.Array:
    """Asks ``skip`` about the gradient; tables are to it the values of their slices."""
    if options.skip is None:
        return jnp.bool_(False)
    values = [zero_padding(g).values if is_slices(g) else g for g in grad.leaves]
    treedef = jax.tree.structure(state.sums, is_leaf=is_accumulator)
    answer = options.skip(jax.tree.unflatten(treedef, values), state.global_step, params)
    # optax's predicates also return what they found.
    return jnp.asarray(answer[0] if isinstance(answer, tuple) else answer, bool)


def _checked(grad: Any, total: Any, path: str) -> Any:
    name = f"updates{path}"
    if not is_accumulator(total):
        if is_slices(grad):
            raise TypeError(f"{name} is an IndexedSlices, but tables does not select it")
        grad = jnp.asarray(grad)
        if grad.shape != total.shape:
            raise ValueError(f"{name} must have shape {total.shape}, got {grad.shape}")
        return grad
    if not is_slices(grad):
        raise TypeError(f"{name} is selected by tables and must be an IndexedSlices, got {grad!r}")
    grad = as_slices(grad, name)
    rows, shape = grad.num_rows, total.dense_shape
    if grad.values.shape[1:] != shape[1:] or rows not in (None, shape[0]):
        raise ValueError(
            f"{name} has shape {(rows, *grad.values.shape[1:])}, but state.sums{path} is of a "
            f"table of shape {shape}: state must be what init returned for these params"
        )
    return grad


def _check_room(grad: Any, total: Any, path: str) -> None:
    """Raises if a single gradient could touch more rows than there is room for."""
    rows, slices = total.dense_shape[0], grad.indices.shape[0]
    if total.capacity < min(slices, rows):
        raise ValueError(
            f"capacity {total.capacity} of params{path} must be at least {min(slices, rows)}: one "
            f"gradient has {slices} slices of {rows} rows, which must fit into emptied sums; or "
            "refuse what does not fit, by on_overflow='refuse'"
        )


def _widened(grad: Any, total: Any) -> Any:
    # A gradient may be narrower than its parameter, or wider if the parameter is 16 bits wide.
    if is_slices(grad):
        values = grad.values.astype(promote_dtypes(grad.values.dtype, total.dtype))
        return dataclasses.replace(grad, values=values)
    return grad.astype(promote_dtypes(grad.dtype, total.dtype))


def _add_to_sums(
    state: MicroBatchState, grads: list[Any], admitted: Admission
) -> tuple[PyTree, jax.Array, jax.Array]:
    """Adds one gradient to all sums or to none; tells how many rows each table needs for it."""
    sums, treedef = jax.tree.flatten(state.sums, is_leaf=is_accumulator)
    tables = [i for i, total in enumerate(sums) if is_accumulator(total)]
    added, verdict, num_needed = apply_all(
        [sums[i] for i in tables],
        [grads[i] for i in tables],
        admitted.is_stale,
        admitted.is_skipped,
        admitted.weight,
    )
    is_accepted = verdict == Verdict.ACCEPTED
    results = [
        total
        if i in tables
        else total + jnp.where(is_accepted, weigh(grad, admitted.weight, grad.dtype), 0)
        for i, (total, grad) in enumerate(zip(sums, grads, strict=True))
    ]
    for i, total in zip(tables, added, strict=True):
        results[i] = total
    return jax.tree.unflatten(treedef, results), verdict, num_needed


def _raise_if_refused(
    verdict: jax.Array, state: MicroBatchState, grads: list[Any], options: Options
) -> None:
    if isinstance(verdict, jax.core.Tracer):
        return
    if verdict == Verdict.INVALID:
        paths = jax.tree_util.tree_leaves_with_path(state.sums, is_leaf=is_accumulator)
        for grad, (path, total) in zip(grads, paths, strict=True):
            if is_slices(grad):  # the first leaf at fault raises
                check_indices(grad, total.dense_shape[0], f"updates{jax.tree_util.keystr(path)}")
    if verdict == Verdict.OVERFLOW and options.on_overflow == "refuse":
        capacities = [
            total.capacity
            for total in jax.tree.leaves(state.sums, is_leaf=is_accumulator)
            if is_accumulator(total)
        ]
        raise ValueError(
            f"capacity {capacities} has no room for the new rows of updates after "
            f"{int(state.num_accumulated)} gradients; nothing was accumulated"
        )
