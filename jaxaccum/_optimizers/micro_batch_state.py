"""State of `accumulate`: sums of all leaves, tables by row, under one count and one step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxaccum._accumulator.staleness import StalenessWeight
from jaxaccum._accumulator.state import (
    AccumulatorState,
    Reduction,
    Verdict,
    as_int32,
    as_max_staleness,
    counts_by_name,
    new_histogram,
    verdict_name,
    weight_dtype,
)
from jaxaccum._accumulator.state import init as init_sums
from jaxaccum._distributed.exchange import AxisName
from jaxaccum._optimizers.lazy_rows import flatten_like
from jaxaccum._rows.on_mesh import match_rows
from jaxaccum._rows.public import one_line, public, pytree
from jaxaccum._rows.row_arithmetic import sum_dtype
from jaxaccum._rows.tables import select_tables
from jaxaccum._rows.tree import PyTree
from jaxaccum._rows.varying import vary_along

# What devices do not have in common.
_OWN = (
    "sums",
    "num_accumulated",
    "peak_rows",
    "verdict",
    "verdict_counts",
    "total_weight",
    "staleness_counts",
)


@public
@pytree(
    data_fields=[
        "sums",
        "inner_state",
        "num_accumulated",
        "global_step",
        "num_early",
        "peak_rows",
        "verdict",
        "verdict_counts",
        "total_weight",
        "staleness_counts",
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
      num_early: int32 ``[]``, steps taken before ``num_required`` gradients had come, because the
        next one did not fit beside those held.
      peak_rows: int32 ``[tables]``, the most distinct rows that each table has held or would have
        had to hold for the next gradient to fit, in the order of the leaves.
      verdict: int32 ``[]``, the `Verdict` on the last gradient.
      verdict_counts: int32 ``[5]``, gradients by `Verdict` since ``init``.
      total_weight: float ``[]``, of the gradients accepted since the last step; ``None`` without
        ``staleness_weight``.
      staleness_counts: int32 ``[max_staleness + 2]``, gradients accepted by how many steps old they
        were, and last those refused as stale; ``None`` without ``max_staleness``.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> tx = jaxaccum.accumulate(optax.sgd(1.0), 2, tables=True, capacity=3)
      >>> state = tx.init(jnp.zeros((4, 1)))
      >>> state.sums.capacity, state.num_accumulated
      (3, Array(0, dtype=int32))

    Source: ``optax.MultiStepsState``, with rows for tables.
    """

    sums: PyTree
    inner_state: PyTree
    num_accumulated: jax.Array
    global_step: jax.Array
    num_early: jax.Array
    peak_rows: jax.Array
    verdict: jax.Array
    verdict_counts: jax.Array
    total_weight: jax.Array | None = None
    staleness_counts: jax.Array | None = None

    def __repr__(self) -> str:
        return one_line(self, verdict=verdict_name, verdict_counts=counts_by_name)

    def map_own(self, fun: Callable[[Any], Any]) -> MicroBatchState:
        """Applies ``fun`` to the leaves that each device has of its own, given an ``axis_name``.

        All but ``inner_state``, ``global_step`` and ``num_early``, which devices have in common.
        With it own leaves get and lose a leading axis of devices, and a spec of their own::

            state = tx.init(params).map_own(lambda leaf: jnp.stack([leaf] * num_devices))
            specs = jax.tree.map(lambda _: P(), state).map_own(lambda _: P("data"))
            # and inside of jax.shard_map
            state = state.map_own(lambda leaf: leaf[0])
        """
        own = {name: jax.tree.map(fun, getattr(self, name)) for name in _OWN}
        return dataclasses.replace(self, **own)


OnOverflow = Literal["step", "refuse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `accumulate` was told; see there."""

    num_required: int | Callable[[jax.Array], ArrayLike]
    tables: PyTree
    capacity: PyTree
    reduction: Reduction
    on_overflow: OnOverflow
    skip: Callable[[PyTree, jax.Array, PyTree | None], Any] | None
    max_staleness: int
    staleness_weight: StalenessWeight | None
    axis_name: AxisName | None

    def __post_init__(self) -> None:
        if not callable(self.num_required) and int(self.num_required) < 1:
            raise ValueError(f"num_required must be positive, got {self.num_required}")
        if self.on_overflow not in get_args(OnOverflow):
            known = get_args(OnOverflow)
            raise ValueError(f"on_overflow must be one of {known}, got {self.on_overflow!r}")
        as_max_staleness(self.max_staleness)

    def required(self, state: MicroBatchState) -> jax.Array | np.int32:
        """How many gradients the next step takes."""
        count = self.num_required
        return as_int32(count(state.global_step) if callable(count) else count, "num_required")


def init_state(tx: Any, options: Options, params: PyTree) -> MicroBatchState:
    """Returns the state before the first gradient; ``tx`` is what `lazy_rows` returned."""
    selected = select_tables(options.tables, params)
    tx.update.check(params, selected)
    is_weighted = options.staleness_weight is not None
    sum_of = functools.partial(_new_sum, reduction=options.reduction, is_weighted=is_weighted)
    state = MicroBatchState(
        sums=jax.tree.map(sum_of, params, selected, _capacities(options.capacity, params)),
        inner_state=tx.init(params),
        num_accumulated=jnp.int32(0),
        global_step=jnp.int32(0),
        num_early=jnp.int32(0),
        peak_rows=jnp.zeros(sum(map(bool, jax.tree.leaves(selected))), jnp.int32),
        verdict=jnp.int32(Verdict.ACCEPTED),
        verdict_counts=jnp.zeros(len(Verdict), jnp.int32),
        total_weight=jnp.zeros((), weight_dtype()) if is_weighted else None,
        staleness_counts=new_histogram(options.max_staleness),
    )
    return state.map_own(functools.partial(vary_along, axis_name=options.axis_name))


def is_accumulator(node: object) -> bool:
    return isinstance(node, AccumulatorState)


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


def _new_sum(
    param: Any, is_table: bool, capacity: Any, *, reduction: Reduction, is_weighted: bool
) -> Any:
    dtype = sum_dtype(jnp.result_type(param))
    if is_table:
        state = init_sums(
            param.shape, dtype, capacity=capacity, reduction=reduction, weighted=is_weighted
        )
        values = match_rows(state.values, param)
        return without_counters(dataclasses.replace(state, values=values))
    return jnp.zeros_like(param, dtype)


_COUNTERS = (
    "num_accumulated",
    "global_step",
    "verdict_counts",
    "num_shared",
    "shared_verdicts",
    "total_weight",
)


def without_counters(total: AccumulatorState) -> AccumulatorState:
    counters: dict[str, Any] = dict.fromkeys(_COUNTERS)
    return dataclasses.replace(total, **counters)


def with_counters(total: AccumulatorState, state: MicroBatchState) -> AccumulatorState:
    """Returns the sums of a table as an accumulator, which divides by the counts of ``state``."""
    zero, none = jnp.int32(0), jnp.zeros_like(state.verdict_counts)
    weight = state.total_weight
    own = (state.num_accumulated, state.global_step, state.verdict_counts, zero, none, weight)
    counters: dict[str, Any] = dict(zip(_COUNTERS, own, strict=True))
    return dataclasses.replace(total, **counters)


def check_params(state: MicroBatchState, params: PyTree) -> None:
    """Raises if the sums are those of other tables than ``params``."""
    treedef: Any
    paths, treedef = jax.tree_util.tree_flatten_with_path(state.sums, is_leaf=is_accumulator)
    for (path, total), param in zip(paths, flatten_like(treedef, params), strict=True):
        if is_accumulator(total) and total.dense_shape != jnp.shape(param):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"params{name} has shape {jnp.shape(param)}, but state.sums{name} is of a table of "
                f"shape {total.dense_shape}: state must be what init returned for these params"
            )
