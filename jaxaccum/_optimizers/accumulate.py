"""``accumulate``: gradients of several micro-batches, tables by row, into one optax step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxaccum._accumulator.apply import apply_all, count_verdict
from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._accumulator.state import AccumulatorState, Reduction, Verdict, as_int32
from jaxaccum._accumulator.state import init as init_sums
from jaxaccum._accumulator.take import take_if
from jaxaccum._optimizers.lazy_rows import LazyUpdate, flatten_like, lazy_rows
from jaxaccum._optimizers.optax_import import import_optax
from jaxaccum._rows.indexed_slices import IndexedSlices, as_slices, check_indices
from jaxaccum._rows.on_mesh import match_rows
from jaxaccum._rows.opaque import UniqueRows, fit_updates
from jaxaccum._rows.public import public, pytree
from jaxaccum._rows.row_arithmetic import promote_dtypes, sum_dtype
from jaxaccum._rows.tables import select_tables
from jaxaccum._rows.tree import PyTree
from jaxaccum._rows.unique_rows import is_slices

if TYPE_CHECKING:
    import optax  # type: ignore[import-untyped]


@public
@pytree(
    data_fields=[
        "sums",
        "inner_state",
        "num_accumulated",
        "global_step",
        "verdict",
        "verdict_counts",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class MicroBatchState:
    """State of `accumulate`: one count and one step for all leaves.

    Attributes:
      sums: a tree like the params, with the rows of an `AccumulatorState` for each table (its
        counters are ``None``: those below are of all leaves) and the sum of the gradients, float32
        for narrower floats, for each other leaf.
      inner_state: of the wrapped transform.
      num_accumulated: int32 ``[]``, gradients accepted since the last step.
      global_step: int32 ``[]``, how often the wrapped transform has run.
      verdict: int32 ``[]``, the `Verdict` on the last gradient.
      verdict_counts: int32 ``[4]``, gradients by `Verdict` since ``init``.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> tx = jaxaccum.accumulate(optax.sgd(1.0), 2, tables=True, capacity=3)
      >>> state = tx.init(jnp.zeros((4, 1)))
      >>> state.sums.capacity, state.num_accumulated
      (3, Array(0, dtype=int32))
    """

    sums: PyTree
    inner_state: PyTree
    num_accumulated: jax.Array
    global_step: jax.Array
    verdict: jax.Array
    verdict_counts: jax.Array


def accumulate(
    tx: optax.GradientTransformation,
    num_required: int | Callable[[jax.Array], ArrayLike],
    *,
    tables: PyTree,
    capacity: PyTree,
    reduction: Reduction = "mean_per_gradient",
) -> optax.GradientTransformationExtraArgs:
    """Accumulates gradients, and runs ``tx`` once ``num_required`` of them have come.

    ``optax.MultiSteps`` for trees with tables: gradients of tables are accumulated by row, at the
    cost of the rows they touch; all others are summed as they are. Until enough have come, the
    updates are zero (no rows for tables) and the state of ``tx`` rests. The default reduction
    gives what ``optax.MultiSteps`` gives.

    A gradient is accepted or refused as a whole, whichever leaf is at fault. Refused it changes
    nothing but ``state.verdict`` and the counts: stale by ``local_step``, or with an index out of
    range, or with more new rows than a table has capacity left. The last two raise outside of
    ``jit``; inside, look at the verdict and apply the gradient again after the next step, or start
    with a larger capacity.

    Args:
      tx: what `lazy_rows` returned, or any transform that it takes.
      num_required: gradients per step, or a function of the global step that says how many.
      tables: which leaves are tables: a predicate ``(path, leaf) -> bool`` or a (prefix) tree of
        bools.
      capacity: how many distinct rows a table can touch in one step: a number for all tables, or a
        (prefix) tree of numbers.
      reduction: ``"mean_per_gradient"`` divides by the number of gradients, ``"mean_per_row"`` each
        row of
        a table by the number of gradients that touched it, ``"sum"`` by none.

    Returns:
      A transform whose state is an `MicroBatchState`. Its ``update`` takes ``local_step``, the step
      at which the gradient was computed, as an optional extra argument; all others go to ``tx``.

    Raises:
      ImportError: optax is not installed.
      ValueError: ``num_required`` is a number below 1. In ``init`` and ``update``: ``tables`` or
        ``capacity`` do not match the params, ``tx`` couples the rows of a table, or outside of
        ``jit`` a gradient does not fit.
      TypeError: in ``update``: the gradient of a table is no ``IndexedSlices``.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> tx = jaxaccum.accumulate(optax.sgd(1.0), 2, tables=True, capacity=3)
      >>> table = jnp.zeros((4, 1))
      >>> state = tx.init(table)
      >>> for row in (1, 2):
      ...     grad = jaxaccum.IndexedSlices(jnp.array([row]), jnp.ones((1, 1)), (4, 1))
      ...     updates, state = tx.update(grad, state, table)
      ...     table = jaxaccum.apply_updates(table, updates)
      >>> table.ravel(), state.global_step
      (Array([ 0. , -0.5, -0.5,  0. ], dtype=float32), Array(1, dtype=int32))
    """
    optax = import_optax("accumulate")
    if not callable(num_required) and int(num_required) < 1:
        raise ValueError(f"num_required must be positive, got {num_required}")
    if not isinstance(tx.update, LazyUpdate):
        tx = lazy_rows(tx)

    def init(params: PyTree) -> MicroBatchState:
        selected = select_tables(tables, params)
        tx.update.check(params, selected)
        new_sum = functools.partial(_new_sum, reduction=reduction)
        return MicroBatchState(
            sums=jax.tree.map(new_sum, params, selected, _capacities(capacity, params)),
            inner_state=tx.init(params),
            num_accumulated=jnp.int32(0),
            global_step=jnp.int32(0),
            verdict=jnp.int32(Verdict.ACCEPTED),
            verdict_counts=jnp.zeros(len(Verdict), jnp.int32),
        )

    def update(
        updates: PyTree,
        state: MicroBatchState,
        params: PyTree | None = None,
        *,
        local_step: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, MicroBatchState]:
        if params is not None:
            _check_params(state, params)
        state, dtypes = _add_gradient(state, updates, local_step)
        required = num_required(state.global_step) if callable(num_required) else num_required
        ready = state.num_accumulated >= jnp.maximum(as_int32(required, "num_required"), 1)
        step = functools.partial(_step, tx, dtypes, reduction, extra_args)
        steps, state = _step_or_rest(ready, step, state, params)
        return fit_updates(steps, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _capacities(capacity: PyTree, params: PyTree) -> PyTree:
    try:
        return jax.tree.map(
            lambda number, subtree: jax.tree.map(lambda _: number, subtree),
            capacity,
            params,
            is_leaf=lambda number: number is None,  # what a leaf that is no table may have
        )
    except ValueError as err:
        raise ValueError(f"capacity must match params or be a prefix of it: {err}") from None


def _new_sum(param: Any, is_table: bool, capacity: Any, *, reduction: Reduction) -> Any:
    dtype = sum_dtype(jnp.result_type(param))
    if is_table:
        state = init_sums(param.shape, dtype, capacity=capacity, reduction=reduction)
        values = match_rows(state.values, param)
        return _without_counters(dataclasses.replace(state, values=values))
    return jnp.zeros_like(param, dtype)


_COUNTERS = ("num_accumulated", "global_step", "verdict_counts", "num_shared", "shared_verdicts")


def _without_counters(total: AccumulatorState) -> AccumulatorState:
    counters: dict[str, Any] = dict.fromkeys(_COUNTERS)
    return dataclasses.replace(total, **counters)


def _with_counters(total: AccumulatorState, state: MicroBatchState) -> AccumulatorState:
    zero, none = jnp.int32(0), jnp.zeros_like(state.verdict_counts)
    own = (state.num_accumulated, state.global_step, state.verdict_counts, zero, none)
    counters: dict[str, Any] = dict(zip(_COUNTERS, own, strict=True))
    return dataclasses.replace(total, **counters)


def _is_accumulator(node: object) -> bool:
    return isinstance(node, AccumulatorState)


def _add_gradient(
    state: MicroBatchState, updates: PyTree, local_step: ArrayLike | None
) -> tuple[MicroBatchState, list[Any]]:
    """Adds one gradient to all sums or to none; also returns the dtype of each of its leaves."""
    treedef: Any
    paths, treedef = jax.tree_util.tree_flatten_with_path(state.sums, is_leaf=_is_accumulator)
    sums = [total for _, total in paths]
    try:
        grads = treedef.flatten_up_to(updates)
    except ValueError as err:
        raise ValueError(f"updates must be a tree like the params: {err}") from None
    grads = [
        _checked(grad, total, jax.tree_util.keystr(path))
        for grad, (path, total) in zip(grads, paths, strict=True)
    ]
    dtypes = [grad.values.dtype if is_slices(grad) else grad.dtype for grad in grads]
    grads = [_widened(grad, total) for grad, total in zip(grads, sums, strict=True)]
    sums, verdict = _add_to_sums(state, sums, grads, local_step)
    _raise_if_refused(verdict, state, grads)
    is_accepted = verdict == Verdict.ACCEPTED
    return dataclasses.replace(
        state,
        sums=jax.tree.unflatten(treedef, sums),
        num_accumulated=saturating_add(state.num_accumulated, is_accepted),
        verdict=verdict,
        verdict_counts=count_verdict(state.verdict_counts, verdict),
    ), dtypes


def _checked(grad: Any, total: Any, path: str) -> Any:
    name = f"updates{path}"
    if not _is_accumulator(total):
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


def _check_params(state: MicroBatchState, params: PyTree) -> None:
    """Raises if the sums are those of other tables than ``params``."""
    treedef: Any
    paths, treedef = jax.tree_util.tree_flatten_with_path(state.sums, is_leaf=_is_accumulator)
    for (path, total), param in zip(paths, flatten_like(treedef, params), strict=True):
        if _is_accumulator(total) and total.dense_shape != jnp.shape(param):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"params{name} has shape {jnp.shape(param)}, but state.sums{name} is of a table of "
                f"shape {total.dense_shape}: state must be what init returned for these params"
            )


def _widened(grad: Any, total: Any) -> Any:
    # A gradient may be narrower than its parameter, or wider if the parameter is 16 bits wide.
    if is_slices(grad):
        values = grad.values.astype(promote_dtypes(grad.values.dtype, total.dtype))
        return dataclasses.replace(grad, values=values)
    return grad.astype(promote_dtypes(grad.dtype, total.dtype))


def _add_to_sums(
    state: MicroBatchState, sums: list[Any], grads: list[Any], local_step: ArrayLike | None
) -> tuple[list[Any], jax.Array]:
    """Adds one gradient to all sums or to none."""
    is_stale = jnp.bool_(False)
    if local_step is not None:
        is_stale = jnp.asarray(as_int32(local_step, "local_step")) < state.global_step
    tables = [i for i, total in enumerate(sums) if _is_accumulator(total)]
    held = [_with_counters(sums[i], state) for i in tables]
    added, verdict = apply_all(held, [grads[i] for i in tables], is_stale)
    results = [
        total if i in tables else total + jnp.where(verdict == Verdict.ACCEPTED, grad, 0)
        for i, (total, grad) in enumerate(zip(sums, grads, strict=True))
    ]
    for i, total in zip(tables, added, strict=True):
        results[i] = _without_counters(total)
    return results, verdict


def _raise_if_refused(verdict: jax.Array, state: MicroBatchState, grads: list[Any]) -> None:
    if isinstance(verdict, jax.core.Tracer):
        return
    if verdict == Verdict.INVALID:
        paths = jax.tree_util.tree_leaves_with_path(state.sums, is_leaf=_is_accumulator)
        for grad, (path, total) in zip(grads, paths, strict=True):
            if is_slices(grad):  # the first leaf at fault raises
                check_indices(grad, total.dense_shape[0], f"updates{jax.tree_util.keystr(path)}")
    if verdict == Verdict.OVERFLOW:
        capacities = [
            total.capacity
            for total in jax.tree.leaves(state.sums, is_leaf=_is_accumulator)
            if _is_accumulator(total)
        ]
        raise ValueError(
            f"capacity {capacities} has no room for the new rows of updates after "
            f"{int(state.num_accumulated)} gradients; nothing was accumulated"
        )


def _step_or_rest(
    ready: jax.Array, step: Callable[..., Any], state: MicroBatchState, params: PyTree | None
) -> tuple[PyTree, MicroBatchState]:
    is_known = not isinstance(ready, jax.core.Tracer)
    if is_known and ready:
        return cast("tuple[PyTree, MicroBatchState]", step(state, params))
    # Jitted, it is traced once for the shapes and the branch together.
    step = jax.jit(step, inline=True)
    rest = functools.partial(_rest, jax.eval_shape(step, state, params)[0])
    if is_known:  # a conditional would be compiled every time
        return rest(state, params)
    result = jax.lax.cond(ready, step, rest, state, params)
    return cast("tuple[PyTree, MicroBatchState]", result)


def _step(
    tx: Any,
    dtypes: list[Any],
    reduction: Reduction,
    extra_args: dict[str, Any],
    state: MicroBatchState,
    params: PyTree | None,
) -> tuple[PyTree, MicroBatchState]:
    """Takes all sums and runs the inner transform on them."""
    sums, treedef = jax.tree.flatten(state.sums, is_leaf=_is_accumulator)
    grads = list(sums)
    for i, (total, dtype) in enumerate(zip(sums, dtypes, strict=True)):
        if _is_accumulator(total):
            total, taken = take_if(_with_counters(total, state), jnp.bool_(True))
            sums[i] = _without_counters(total)
            grads[i] = UniqueRows(dataclasses.replace(taken, values=taken.values.astype(dtype)))
        else:
            count = jnp.maximum(state.num_accumulated, 1).astype(total.dtype)
            mean = total if reduction == "sum" else total / count
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
        global_step=saturating_add(state.global_step, 1),
    )


def _cast_like(new: Any, old: Any) -> Any:
    return new if new.dtype == old.dtype else new.astype(old.dtype)  # keys cannot be cast


def _rest(
    shapes: PyTree, state: MicroBatchState, params: PyTree | None
) -> tuple[PyTree, MicroBatchState]:
    """Updates that change nothing, of the shapes of a step's."""
    del params

    def nothing(leaf: Any) -> Any:
        if not is_slices(leaf):
            return jnp.zeros_like(leaf)  # sharded alike, too
        indices = jnp.full(leaf.indices.shape, leaf.padding_index, jnp.int32)
        return IndexedSlices(indices, jnp.zeros_like(leaf.values), leaf.dense_shape)

    return jax.tree.map(nothing, shapes, is_leaf=is_slices), state
