"""``accumulate``: gradients of several micro-batches, tables by row, into one optax step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._accumulator.staleness import StalenessWeight
from jaxaccum._accumulator.state import Reduction
from jaxaccum._accumulator.take import is_enough
from jaxaccum._distributed.exchange import AxisName
from jaxaccum._optimizers.add_gradient import add_gradient, admission, check_gradient
from jaxaccum._optimizers.lazy_rows import LazyUpdate, lazy_rows
from jaxaccum._optimizers.micro_batch_state import (
    MicroBatchState,
    OnOverflow,
    Options,
    check_params,
    init_state,
)
from jaxaccum._optimizers.optax_import import import_optax
from jaxaccum._optimizers.take_step import no_updates, over_devices, take_step
from jaxaccum._optimizers.unique_leaf import fit_updates
from jaxaccum._rows.tree import PyTree
from jaxaccum._rows.varying import vary_like

if TYPE_CHECKING:
    import optax  # type: ignore[import-untyped]


def accumulate(
    tx: optax.GradientTransformation,
    num_required: int | Callable[[jax.Array], ArrayLike],
    *,
    tables: PyTree,
    capacity: PyTree,
    reduction: Reduction = "mean_per_gradient",
    on_overflow: OnOverflow = "step",
    skip: Callable[[PyTree, jax.Array, PyTree | None], Any] | None = None,
    max_staleness: int = 0,
    staleness_weight: StalenessWeight | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Accumulates gradients, and runs ``tx`` once ``num_required`` of them have come.

    ``optax.MultiSteps`` for trees with tables: gradients of tables are accumulated by row, at the
    cost of the rows they touch; all others are summed as they are. Until enough have come, the
    updates are zero (no rows for tables) and the state of ``tx`` rests. The default reduction
    gives what ``optax.MultiSteps`` gives.

    A gradient with more new rows than a table has capacity left has a step taken early: ``tx`` runs
    on the mean of what is held, and the gradient goes into the emptied sums. So nothing is lost and
    nothing stalls, whatever the capacity; ``state.num_early`` counts such steps, and
    ``state.peak_rows`` says which capacity would have spared them. No call takes two steps: where
    the gradient alone is as many as the next step requires, the next call takes it.

    A gradient is accepted or refused as a whole, whichever leaf is at fault. Refused it changes
    nothing but ``state.verdict`` and the counts: stale by ``local_step``, with an index out of
    range (which raises outside of ``jit``), or skipped because of its values.

    Args:
      tx: what `lazy_rows` returned, or any transform that it takes.
      num_required: gradients per step, or a function of the global step that says how many.
      tables: which leaves are tables: a predicate ``(path, leaf) -> bool`` or a (prefix) tree of
        bools.
      capacity: how many distinct rows a table can touch in one step: a number for all tables, or a
        (prefix) tree of numbers. To take steps early, at least as many as one gradient can touch:
        the lesser of its slices and the rows of the table.
      reduction: ``"mean_per_gradient"`` divides by the number of gradients, ``"mean_per_row"`` each
        row of a table by the number of gradients that touched it, ``"sum"`` by none.
      on_overflow: ``"step"`` takes a step early, as said; ``"refuse"`` refuses the gradient, with
        the verdict OVERFLOW or, outside of ``jit``, an error. Apply it again after the next step;
        inside of ``jit``, a loop that does not look at the verdict stalls for ever.

      skip: which gradients to leave out, as ``should_skip_update_fn`` of ``optax.MultiSteps``: a
        predicate ``(updates, global_step, params)`` that returns a bool, or a tuple that begins
        with one. ``optax.skip_not_finite`` is one. In ``updates`` a table is an array
        ``[n, *row]``, the values of its slices, which are zero where they are padding.

      max_staleness: how many steps old a gradient may be by its ``local_step``. If it is not 0,
        ``state.staleness_counts`` is a histogram.
      staleness_weight: what a gradient weighs that is ``s`` steps old, a positive number for the
        int32 scalar ``s``; FedBuff's is ``lambda s: 1 / jnp.sqrt(1.0 + s)``. Sums are then weighted
        sums, and means divide them by sums of weights. ``num_required`` goes on to count gradients.

      axis_name: inside `jax.shard_map` or `jax.pmap`, the axis (or a tuple of axes) over which each
        device accumulates micro-batches of its own. ``num_required`` then counts the gradients of
        all devices, ``capacity`` the rows of one; rows are exchanged when a step is taken, by all
        devices at once, also when it is early on one of them. All get the same updates. See
        `MicroBatchState.map_own` for how the state goes into and out of `jax.shard_map`.

    Returns:
      A transform whose state is a `MicroBatchState`. Its ``update`` takes ``local_step``, the step
      at which the gradient was computed, as an optional extra argument; all others go to ``tx``.

    Raises:
      ImportError: optax is not installed.
      ValueError: ``num_required`` is a number below 1, ``on_overflow`` is unknown or
        ``max_staleness`` is negative. In ``init`` and ``update``: ``tables`` or ``capacity`` do not
        match the params, ``tx`` couples the rows of a table, a single gradient might not fit into
        empty sums, or outside of ``jit`` one is refused.
      TypeError: in ``update``: the gradient of a table is no ``IndexedSlices``.

    Source: ``optax.MultiSteps``; weights by staleness, Nguyen et al., "Federated Learning with
    Buffered Asynchronous Aggregation" (2022).

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
    options = Options(
        num_required=num_required,
        tables=tables,
        capacity=capacity,
        reduction=reduction,
        on_overflow=on_overflow,
        skip=skip,
        max_staleness=max_staleness,
        staleness_weight=staleness_weight,
        axis_name=axis_name,
    )
    if not isinstance(tx.update, LazyUpdate):
        tx = lazy_rows(tx)

    def update(
        updates: PyTree,
        state: MicroBatchState,
        params: PyTree | None = None,
        *,
        local_step: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, MicroBatchState]:
        steps, state = _update(tx, options, updates, state, params, local_step, extra_args)
        return fit_updates(steps, updates), state

    return optax.GradientTransformationExtraArgs(functools.partial(init_state, tx, options), update)


def _update(
    tx: Any,
    options: Options,
    updates: PyTree,
    state: MicroBatchState,
    params: PyTree | None,
    local_step: ArrayLike | None,
    extra_args: dict[str, Any],
) -> tuple[PyTree, MicroBatchState]:
    if params is not None:
        check_params(state, params)
    grad = check_gradient(options, state, updates)
    admitted = admission(options, state, grad, params, local_step)
    step: Callable[..., Any] = functools.partial(
        take_step, tx, options, grad.dtypes, extra_args, params
    )

    def add(state: MicroBatchState, is_open: jax.Array | None) -> tuple[MicroBatchState, jax.Array]:
        return add_gradient(options, state, grad, admitted, is_open)

    def turn(carry: _Carry) -> _Carry:
        is_open = None if options.axis_name is None else carry.is_mine
        state, is_mine = add(carry.state, is_open)
        is_early, num_held = over_devices(is_mine, state.num_accumulated, options.axis_name)
        state = dataclasses.replace(state, num_early=saturating_add(state.num_early, is_early))
        ready = is_early | (is_enough(num_held, options.required(state)) & ~carry.is_retry)
        updates, state = _step_or_rest(ready, step, state, carry.updates)
        return _Carry(is_early, is_mine, is_early, updates, state)

    start = _Carry(jnp.bool_(True), jnp.bool_(True), jnp.bool_(False), None, state)
    if not any(_is_traced(leaf) for leaf in jax.tree.leaves((state, grad.leaves, admitted))):
        end = turn(start)
        end = turn(end) if end.is_open else end
        return no_updates(step, state) if end.updates is None else end.updates, end.state
    # Jitted, it is traced once for its shapes and its branch together.
    step = jax.jit(step, inline=True)
    start = start._replace(updates=no_updates(step, state))
    end = _take_turns(options, add, turn, start)
    return end.updates, end.state


class _Carry(NamedTuple):
    """What goes round in `accumulate`: once, and once more where the first round steps early.

    A loop holds the addition and the step once each. With the second addition written out behind
    the step instead, compiling takes 1.36 times as long, for the same time in a step.

    Attributes:
      is_open: bool ``[]``, whether the gradient of any device is still to be added.
      is_mine: bool ``[]``, whether that of this device is.
      is_retry: bool ``[]``, whether a step has been taken for it to fit.
      updates: of the step, or those that change nothing.
      state: of `accumulate`.
    """

    is_open: jax.Array
    is_mine: jax.Array
    is_retry: jax.Array
    updates: PyTree
    state: MicroBatchState


def _is_traced(leaf: object) -> bool:
    return isinstance(leaf, jax.core.Tracer)


def _take_turns(
    options: Options,
    add: Callable[..., tuple[MicroBatchState, jax.Array]],
    turn: Callable[[_Carry], _Carry],
    start: _Carry,
) -> _Carry:
    """Takes turns while the gradient is still to be added."""
    if options.on_overflow == "refuse" or options.axis_name is not None:
        end = turn(start)
        if options.on_overflow == "refuse":
            return end
        # Not in a loop: collectives in a conditional in a loop crash jax 0.10's compiler for CPUs.
        state = _choose(
            end.is_open, lambda state: add(state, end.is_mine)[0], lambda state: state, end.state
        )
        return end._replace(state=state)
    if jax.sharding.get_abstract_mesh().manual_axes:
        # What comes out of a second turn may vary along more axes than what comes out of the first.
        for _ in range(2):
            start = vary_like(start, jax.eval_shape(turn, start), along=start.is_open)
    return jax.lax.while_loop(
        lambda carry: carry.is_open,
        lambda carry: vary_like(turn(carry), carry, along=start.is_open),
        start,
    )


def _choose(
    which: jax.Array, yes: Callable[..., Any], no: Callable[..., Any], *operands: Any
) -> Any:
    """`jax.lax.cond` of branches whose results may vary along different mesh axes."""
    kinds = jax.eval_shape(yes, *operands), jax.eval_shape(no, *operands)

    def alike(branch: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *operands: vary_like(branch(*operands), *kinds, along=which)

    return jax.lax.cond(which, alike(yes), alike(no), *operands)


def _step_or_rest(
    ready: jax.Array, step: Callable[..., Any], state: MicroBatchState, nothing: PyTree
) -> tuple[PyTree, MicroBatchState]:
    if _is_traced(ready):
        result = _choose(ready, lambda s, _: step(s), lambda s, u: (u, s), state, nothing)
        return cast("tuple[PyTree, MicroBatchState]", result)
    # A conditional would be compiled every time.
    return step(state) if ready else (nothing, state)
