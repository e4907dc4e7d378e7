"""State of `accumulate`: sums of all leaves, tables by row, under one count and one step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._accumulator.state import AccumulatorState, Reduction
from jaxaccum._accumulator.state import init as init_sums
from jaxaccum._optimizers.lazy_rows import flatten_like
from jaxaccum._rows.public import public
from jaxaccum._rows.tree import PyTree
from jaxaccum._rows.unique_rows import sum_dtype


@public
@functools.partial(
    jax.tree_util.register_dataclass,
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
      total_weight: float32 ``[]``, of the gradients accepted since the last step; ``None`` without
        ``staleness_weight``.
      staleness_counts: int32 ``[max_staleness + 2]``, gradients accepted by how many steps old they
        were, and last those refused as stale; ``None`` without ``max_staleness``.

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
    num_early: jax.Array
    peak_rows: jax.Array
    verdict: jax.Array
    verdict_counts: jax.Array
    total_weight: jax.Array | None = None
    staleness_counts: jax.Array | None = None


def is_accumulator(node: object) -> bool:
    return isinstance(node, AccumulatorState)


def capacities(capacity: PyTree, params: PyTree) -> PyTree:
    try:
        return jax.tree.map(
            lambda number, subtree: jax.tree.map(lambda _: number, subtree),
            capacity,
            params,
            is_leaf=lambda number: number is None,  # what a leaf that is no table may have
        )
    except ValueError as err:
        raise ValueError(f"capacity must match params or be a prefix of it: {err}") from None


def new_sum(
    param: Any, is_table: bool, capacity: Any, *, reduction: Reduction, is_weighted: bool
) -> Any:
    dtype = sum_dtype(jnp.result_type(param))
    if is_table:
        state = init_sums(param.shape, dtype, capacity=capacity, reduction=reduction)
        if is_weighted:
            state = dataclasses.replace(state, counts=jnp.zeros(state.capacity, jnp.float32))
        return without_counters(state)
    return jnp.zeros(jnp.shape(param), dtype)


_COUNTERS = ("num_accumulated", "global_step", "verdict_counts", "num_shared", "shared_verdicts")


def without_counters(total: AccumulatorState) -> AccumulatorState:
    counters: dict[str, Any] = dict.fromkeys(_COUNTERS)
    return dataclasses.replace(total, **counters)


def with_counters(
    total: AccumulatorState, state: MicroBatchState, count: jax.Array | None = None
) -> AccumulatorState:
    """Returns the sums of a table as an accumulator, which divides by ``count`` if it is given."""
    zero, none = jnp.int32(0), jnp.zeros_like(state.verdict_counts)
    count = state.num_accumulated if count is None else count
    own = (count, state.global_step, state.verdict_counts, zero, none)
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
