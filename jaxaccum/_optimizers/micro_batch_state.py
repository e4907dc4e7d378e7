"""State of `accumulate`: sums of all leaves, tables by row, under one count and one step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef
from jax.typing import ArrayLike

from jaxaccum._accumulator.pooled_rows import PooledRows, RowSums, pool_tables
from jaxaccum._accumulator.staleness import StalenessWeight
from jaxaccum._accumulator.state import (
    Reduction,
    Verdict,
    as_capacity,
    as_int32,
    as_max_staleness,
    counts_by_name,
    new_histogram,
    verdict_name,
    weight_dtype,
)
from jaxaccum._distributed.exchange import AxisName
from jaxaccum._optimizers.lazy_rows import flatten_like
from jaxaccum._optimizers.suggest_capacity import add_margin
from jaxaccum._rows.on_mesh import match_rows
from jaxaccum._rows.public import one_line, public, pytree
from jaxaccum._rows.row_arithmetic import sum_dtype
from jaxaccum._rows.tables import select_tables
from jaxaccum._rows.tree import PyTree
from jaxaccum._rows.varying import vary_along

# What devices do not have in common.
_OWN = (
    "sums",
    "rows",
    "num_accumulated",
    "peak_rows",
    "early_rows",
    "verdict",
    "verdict_counts",
    "total_weight",
    "staleness_counts",
)


@public
@pytree(
    data_fields=[
        "sums",
        "rows",
        "inner_state",
        "num_accumulated",
        "global_step",
        "num_early",
        "peak_rows",
        "early_rows",
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
      sums: a tree like the params, float32 for narrower floats: for each table the sums of the rows
        held, ``values`` of ``[capacity, *row]``, for any other leaf the sum of its gradients.
      rows: which rows these are: those of all tables numbered through, with their slots and how
        often each was touched (in several parts where int32 cannot number them all).
      inner_state: of the wrapped transform.
      num_accumulated: int32 ``[]``, gradients accepted since the last step.
      global_step: int32 ``[]``, how often the wrapped transform has run.
      num_early: int32 ``[]``, steps taken before ``num_required`` gradients had come, because the
        next one did not fit beside those held.
      peak_rows: int32 ``[tables]``, the most distinct rows that each table has held or would have
        had to hold for the next gradient to fit, in the order of the leaves.
      early_rows: int32 ``[tables]``, how many it would have had to hold at most for no step to come
        early, going by the gradients that were there when one did.
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
      >>> state.sums.values.shape, state.num_accumulated
      ((3, 1), Array(0, dtype=int32))

    Source: ``optax.MultiStepsState``, with rows for tables.
    """

    sums: PyTree
    rows: tuple[PooledRows, ...]
    inner_state: PyTree
    num_accumulated: jax.Array
    global_step: jax.Array
    num_early: jax.Array
    peak_rows: jax.Array
    early_rows: jax.Array
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

    def needed_capacity(self) -> PyTree:
        """Says which ``capacity`` would have done, where steps came early; call it on the host.

        When one does, the rows that its ``k`` gradients and the next one touch are counted, and
        taken ``num_required / (k + 1)`` times: gradients drawn alike have ever fewer new rows, so
        that is not less than ``num_required`` of them touch on average. What is added is as in
        `suggest_capacity`. Where no step came early, it is the present capacity.

        Returns:
          A tree like the params, as ``capacity`` of `accumulate` may be: for each table a number,
          not less than the present one nor more than it has rows; for all else ``None``.
        """
        tables = [held for held in list_sums(self) if held.is_table]
        numbers = np.asarray(self.early_rows).reshape(-1, len(tables)).max(axis=0).tolist()
        needed = iter(
            max(held.capacity or 0, min(add_margin(count, 0.05), held.shape[0]))
            for held, count in zip(tables, numbers, strict=True)
        )
        capacities = [next(needed) if held.is_table else None for held in list_sums(self)]
        return jax.tree.unflatten(params_structure(self), capacities)


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
        for name, kind in (("on_overflow", OnOverflow), ("reduction", Reduction)):
            known, given = get_args(kind), getattr(self, name)
            if given not in known:
                raise ValueError(f"{name} must be one of {known}, got {given!r}")
        as_max_staleness(self.max_staleness)

    def required(self, state: MicroBatchState) -> jax.Array | np.int32:
        """How many gradients the next step takes."""
        count = self.num_required
        return as_int32(count(state.global_step) if callable(count) else count, "num_required")


def init_state(tx: Any, options: Options, params: PyTree) -> MicroBatchState:
    """Returns the state before the first gradient; ``tx`` is what `lazy_rows` returned."""
    selected = select_tables(options.tables, params)
    tx.update.check(params, selected)
    leaves, treedef = jax.tree.flatten(params)
    tables = [i for i, chosen in enumerate(jax.tree.leaves(selected)) if chosen]
    numbers = _capacities(options.capacity, treedef)
    capacities = [as_capacity(numbers[i]) for i in tables]
    is_weighted = options.staleness_weight is not None
    sums: list[Any] = [jnp.zeros_like(p, sum_dtype(jnp.result_type(p))) for p in leaves]
    for i, capacity in zip(tables, capacities, strict=True):
        values = jnp.zeros((capacity, *leaves[i].shape[1:]), sums[i].dtype)
        sums[i] = RowSums(match_rows(values, leaves[i]))
    state = MicroBatchState(
        sums=jax.tree.unflatten(treedef, sums),
        rows=pool_tables(
            [leaves[i].shape[0] for i in tables],
            capacities,
            weight_dtype() if is_weighted else np.dtype(np.int32),
        ),
        inner_state=tx.init(params),
        num_accumulated=jnp.int32(0),
        global_step=jnp.int32(0),
        num_early=jnp.int32(0),
        peak_rows=jnp.zeros(len(tables), jnp.int32),
        early_rows=jnp.zeros(len(tables), jnp.int32),
        verdict=jnp.int32(Verdict.ACCEPTED),
        verdict_counts=jnp.zeros(len(Verdict), jnp.int32),
        total_weight=jnp.zeros((), weight_dtype()) if is_weighted else None,
        staleness_counts=new_histogram(options.max_staleness),
    )
    return state.map_own(functools.partial(vary_along, axis_name=options.axis_name))


def _capacities(capacity: PyTree, treedef: PyTreeDef) -> list[Any]:
    """The capacity of each leaf; any number, or ``None``, for what is no table."""
    try:
        spread = jax.tree.map(
            lambda number, subtree: jax.tree.map(lambda _: number, subtree),
            capacity,
            jax.tree.unflatten(treedef, range(treedef.num_leaves)),
            is_leaf=lambda number: number is None,
        )
        return treedef.flatten_up_to(spread)
    except ValueError as err:
        raise ValueError(f"capacity must match params or be a prefix of it: {err}") from None


class LeafSum(NamedTuple):
    """The sum of one leaf, and what is known of the leaf.

    Attributes:
      path: to it, as in ``params['bias']``.
      total: the sum; of a table, the sums of its rows.
      shape: of the leaf.
      capacity: how many rows can be held; ``None`` of what is no table.
    """

    path: str
    total: jax.Array
    shape: tuple[int, ...]
    capacity: int | None

    @property
    def is_table(self) -> bool:
        return self.capacity is not None


def list_sums(state: MicroBatchState) -> list[LeafSum]:
    """Returns the sum of each leaf."""
    lengths = (length for pool in state.rows for length in pool.lengths)
    capacities = (capacity for pool in state.rows for capacity in pool.capacities)
    leaves = []
    for path, total in jax.tree_util.tree_leaves_with_path(state.sums, is_leaf=_is_row_sums):
        name = jax.tree_util.keystr(path)
        if _is_row_sums(total):
            shape = next(lengths), *total.values.shape[1:]
            leaves.append(LeafSum(name, total.values, shape, next(capacities)))
        else:
            leaves.append(LeafSum(name, total, total.shape, None))
    return leaves


def with_sums(state: MicroBatchState, sums: list[jax.Array]) -> PyTree:
    """Returns ``state.sums`` with other numbers in it."""
    leaves, treedef = jax.tree.flatten(state.sums, is_leaf=_is_row_sums)
    pairs = zip(leaves, sums, strict=True)
    return jax.tree.unflatten(
        treedef, [RowSums(new) if _is_row_sums(old) else new for old, new in pairs]
    )


def params_structure(state: MicroBatchState) -> PyTreeDef:
    """Returns the structure of the params."""
    return jax.tree.structure(state.sums, is_leaf=_is_row_sums)


def _is_row_sums(node: object) -> bool:
    return isinstance(node, RowSums)


def check_params(state: MicroBatchState, params: PyTree) -> None:
    """Raises if the sums are those of other tables than ``params``."""
    leaves = flatten_like(params_structure(state), params)
    for leaf, param in zip(list_sums(state), leaves, strict=True):
        if leaf.is_table and leaf.shape != jnp.shape(param):
            raise ValueError(
                f"params{leaf.path} has shape {jnp.shape(param)}, but state.sums{leaf.path} is of "
                f"a table of shape {leaf.shape}: state must be what init returned for these params"
            )
