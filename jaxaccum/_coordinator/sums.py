"""The sums of a tree: made, saved and loaded, leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.merge import merge
from jaxaccum._accumulator.state import AccumulatorState, init, weight_dtype
from jaxaccum._accumulator.tree_sums import Sums
from jaxaccum._coordinator.host_memory import pad, round_up
from jaxaccum._coordinator.placement import Placement
from jaxaccum._coordinator.spec import Shape, Spec, TreeSpec, as_dtype

SMALLEST_CAPACITY = 1024


def make_empty(
    spec: TreeSpec, row_shapes: Sequence[Shape], capacities: Sequence[int], placement: Placement
) -> Sums:
    """Returns sums of nothing, of rows and dense leaves of these shapes."""
    is_weighted, num_tables = spec.policy.staleness_weight is not None, len(spec.tables)
    tables = []
    for leaf, row, capacity in zip(spec.tables, row_shapes, capacities, strict=False):
        state = init(
            (leaf.num_rows, *row),
            leaf.dtype,
            capacity=limit(leaf, capacity),
            reduction=leaf.reduction,
            accumulator_dtype=leaf.sum_dtype,
            weighted=is_weighted,
        )
        tables.append(placement.place(state))
    dense = [
        placement.place_dense(jnp.zeros(shape, leaf.sum_dtype))
        for leaf, shape in zip(spec.dense, row_shapes[num_tables:], strict=True)
    ]
    total = None
    if spec.dense:
        total = placement.place_dense(jnp.zeros((), weight_dtype() if is_weighted else jnp.int32))
    return Sums(tuple(tables), tuple(dense), total)


def limit(spec: Spec, capacity: int) -> int:
    """Returns a capacity, but no more than there are rows."""
    rows = spec.num_rows
    return capacity if rows is None else max(min(capacity, rows), 1)


def save_sums(spec: TreeSpec, sums: Sums | None) -> dict[str, np.ndarray]:
    """Returns ``sums``, or none, as arrays of their own."""
    saved: dict[str, np.ndarray] = {}
    num_tables = len(spec.tables)
    for i, (name, leaf) in enumerate(zip(spec.names, spec.tables, strict=False)):
        arrays = {
            "indices": np.zeros(0, np.int32),
            "counts": np.zeros(0, np.int32),
            "values": np.zeros((0, *(d or 0 for d in leaf.row_shape)), leaf.sum_dtype),
        }
        if sums is not None:
            state = sums.tables[i]
            num_rows = int(state.num_rows)
            # Copied, for the next apply overwrites the buffers.
            arrays = {k: np.array(np.asarray(getattr(state, k))[:num_rows]) for k in arrays}
        saved |= {name + field: array for field, array in arrays.items()}
    for i, (name, leaf) in enumerate(zip(spec.names[num_tables:], spec.dense, strict=True)):
        shape = tuple(d or 0 for d in leaf.shape or ())
        total = np.zeros(shape, leaf.sum_dtype) if sums is None else np.array(sums.dense[i])
        saved[name + "values"] = total
    if spec.policy.staleness_weight is not None:
        weight: Any = 0
        if sums is not None:
            weight = sums.tables[0].total_weight if sums.tables else sums.total
        saved["total_weight"] = np.array(weight, weight_dtype())
    return saved


def load_sums(
    spec: TreeSpec,
    saved: Mapping[str, Any],
    num_held: int,
    capacities: Sequence[int],
    placement: Placement,
) -> tuple[Sums | None, list[int]]:
    """Returns what `save_sums` was given, and how many rows there are of each table.

    Raises:
      InvalidArgumentError: it does not fit.
    """
    num_tables = len(spec.tables)
    names = zip(spec.names, spec.leaves, strict=True)
    values = [as_dtype(saved[f"{name}values"], leaf.sum_dtype) for name, leaf in names]
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for name, leaf, each in zip(spec.names, spec.tables, values, strict=False):
        rows.append((np.asarray(saved[name + "indices"]), np.asarray(saved[name + "counts"])))
        leaf.check_saved(each, *rows[-1])
    for leaf, each in zip(spec.dense, values[num_tables:], strict=True):
        if num_held:
            leaf.check_row(each.shape, None)
    if not num_held:
        return None, [0] * num_tables
    shapes = [each.shape[1:] for each in values[:num_tables]]
    shapes += [each.shape for each in values[num_tables:]]
    needed = [
        max(capacity, round_up(ids.size), SMALLEST_CAPACITY)
        for capacity, (ids, _) in zip(capacities, rows, strict=True)
    ]
    empty = make_empty(spec, shapes, needed, placement)
    counts: dict[str, Any] = {"num_accumulated": np.int32(min(num_held, 2**31 - 1))}
    if spec.policy.staleness_weight is not None:
        counts["total_weight"] = np.asarray(saved["total_weight"], weight_dtype())
    tables = tuple(
        placement.place(_with_rows(leaf, state, ids, each, touches, counts))
        for leaf, state, (ids, touches), each in zip(
            spec.tables, empty.tables, rows, values, strict=False
        )
    )
    dense = tuple(placement.place_dense(jnp.array(each)) for each in values[num_tables:])
    total = empty.total
    if total is not None:
        *_, count = counts.values()
        total = placement.place_dense(jnp.asarray(count))
    return Sums(tables, dense, total), [ids.size for ids, _ in rows]


def _with_rows(
    spec: Spec,
    empty: AccumulatorState,
    indices: np.ndarray,
    values: np.ndarray,
    touches: np.ndarray,
    counts: dict[str, Any],
) -> AccumulatorState:
    size, int32 = empty.capacity, np.dtype(np.int32)
    arrays: dict[str, Any] = {
        "indices": pad(indices, size, spec.padding, int32),
        "values": pad(values, size, 0, spec.sum_dtype),
        "counts": pad(touches, size, 0, empty.counts.dtype),
        "num_rows": np.int32(indices.size),
    }
    return merge(empty, dataclasses.replace(empty, **arrays, **counts))[0]
