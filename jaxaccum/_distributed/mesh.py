"""Puts accumulators and tables on a mesh: one for each device, or in shards."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._accumulator.pooled_rows import PooledRows, RowSums
from jaxaccum._accumulator.state import AccumulatorState, Reduction, init
from jaxaccum._distributed.exchange import AxisName, as_names
from jaxaccum._rows.shapes import canonical_shape
from jaxaccum._rows.tables import KeyPath, Tables, select_tables
from jaxaccum._rows.tree import PyTree

Result = TypeVar("Result")


def replicate(state: AccumulatorState, mesh: Mesh, axis_name: AxisName) -> AccumulatorState:
    """Makes a copy of an empty accumulator for each device along a mesh axis.

    The leaves have a leading axis of devices, and are sharded along it: pass them to
    `jax.shard_map` with ``PartitionSpec(axis_name)``, and a function that `drop_device_axis` made.

    Args:
      state: an accumulator that holds no gradients. Its verdict counts count once on all devices.
      mesh: of any number of axes; along the others the copies are replicated.
      axis_name: one axis of ``mesh``, or a tuple of them.

    Returns:
      The copies, as one `AccumulatorState`.

    Raises:
      ValueError: ``mesh`` has no such axis; ``state`` holds gradients, which would be counted once
        a device; or processes pass states of different capacity, shape, dtype or reduction, which
        every process is told before anything is exchanged.

    Example:
      >>> import jax, jaxaccum
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> states = jaxaccum.replicate(jaxaccum.init((100, 2), capacity=8), mesh, "data")
      >>> states.values.shape[1:]
      (8, 2)

    Source: ``flax.jax_utils.replicate``, for a mesh.
    """
    num_devices = _count_devices(mesh, axis_name)
    _check_alike(
        f"state of capacity {state.capacity}, dense_shape {state.dense_shape}, dtype "
        f"{state.dtype}, accumulator_dtype {state.values.dtype}, reduction {state.reduction}, "
        f"max_staleness {state.max_staleness}, weighted {state.is_weighted}"
    )
    if state.num_accumulated != 0:
        raise ValueError(
            f"state must hold no gradients to be copied, got num_accumulated "
            f"{state.num_accumulated}"
        )
    sharding = NamedSharding(mesh, _make_spec(axis_name))
    state = dataclasses.replace(
        state, shared_verdicts=state.verdict_counts, shared_staleness=state.staleness_counts
    )

    def copy(leaf: jax.Array) -> jax.Array:
        host = np.asarray(leaf)[None]
        shape = (num_devices, *leaf.shape)
        return jax.make_array_from_callback(shape, sharding, lambda _: host)

    return jax.tree.map(copy, state)


def shard_init(
    dense_shape: tuple[int, ...],
    mesh: Mesh,
    axis_name: AxisName,
    *,
    dtype: DTypeLike = np.float32,
    capacity: int,
    reduction: Reduction = "mean_per_row",
    accumulator_dtype: DTypeLike | None = None,
    global_step: int = 0,
) -> AccumulatorState:
    """Makes an accumulator for each shard of a row-sharded table.

    Args:
      dense_shape: shape of the whole table, ``(rows, *row)``.
      mesh: as in `replicate`.
      axis_name: the axis, or axes, of ``mesh`` the table is sharded over.
      dtype: as in `init`, like all that follow.
      capacity: how many distinct rows one shard can hold.
      reduction: what `take` makes of the sums.
      accumulator_dtype: of the sums.
      global_step: the step gradients must be computed at, or later.

    Returns:
      An `AccumulatorState` of ``(rows / n, *row)`` with a leading axis of devices, as from
      `replicate`. `all_apply` adds to it, `take` takes from it.

    Raises:
      TypeError: as `init`.
      ValueError: as `init`; the row count is unknown or does not divide among the devices; ``mesh``
        has no such axis; or processes pass different arguments.

    Example:
      >>> import jax, jaxaccum
      >>> mesh = jax.make_mesh((jax.device_count(),), ("rows",))
      >>> shape = (jax.device_count() * 100, 2)
      >>> jaxaccum.shard_init(shape, mesh, "rows", capacity=8).dense_shape
      (100, 2)

    Source: of this package.
    """
    rows, *row = canonical_shape(dense_shape)
    if rows is None:
        raise ValueError(f"dense_shape must have a known row count, got {dense_shape}")
    shard = _divide_rows(rows, mesh, axis_name, "dense_shape")
    state = init(
        (shard, *row),
        dtype,
        capacity=capacity,
        reduction=reduction,
        accumulator_dtype=accumulator_dtype,
        global_step=global_step,
    )
    return replicate(state, mesh, axis_name)


def shard_rows(
    tree: PyTree, mesh: Mesh, axis_name: AxisName, *, tables: Tables, params: PyTree = None
) -> PyTree:
    """Puts a tree on a mesh: tables, and what goes by their rows, in shards; all else replicated.

    Args:
      tree: of arrays: the params, the state of their optimizer, or both and more. In a run of many
        processes each passes the same, whole arrays.
      mesh: of any number of axes.
      axis_name: one axis of ``mesh``, or a tuple of them.
      tables: as in `shard_specs`.
      params: as in `shard_specs`.

    Returns:
      The tree of arrays on ``mesh``.

    Raises:
      TypeError: as `shard_specs`.
      ValueError: as `shard_specs`; the rows of a table do not divide among the devices; ``mesh``
        has no such axis; or processes pass arrays of different shapes, which every process is told
        before anything is exchanged.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> mesh = jax.make_mesh((jax.device_count(),), ("rows",))
      >>> table = jnp.zeros((jax.device_count() * 4, 2))
      >>> table = jaxaccum.shard_rows(table, mesh, "rows", tables=True)
      >>> table.addressable_shards[0].data.shape
      (4, 2)

    Source: ``jax.device_put`` with a ``jax.sharding.NamedSharding`` for each leaf.
    """
    specs = shard_specs(tree, axis_name, tables=tables, params=params)
    _count_devices(mesh, axis_name)
    shapes = [f"{jnp.result_type(leaf)}{list(np.shape(leaf))}" for leaf in jax.tree.leaves(tree)]
    _check_alike(f"tree of {', '.join(shapes)}")

    def put(path: KeyPath, leaf: ArrayLike, spec: PartitionSpec) -> jax.Array:
        if len(spec):
            name = f"tree{jax.tree_util.keystr(path)}"
            _divide_rows(np.shape(leaf)[0], mesh, axis_name, name)
        sharding = NamedSharding(mesh, spec)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree_util.tree_map_with_path(put, tree, specs)


def shard_specs(
    tree: PyTree, axis_name: AxisName, *, tables: Tables, params: PyTree = None
) -> PyTree:
    """The ``PartitionSpec`` of each array as `shard_rows` shards it, for `jax.shard_map`.

    What an optimizer keeps for a table has the table's key path at the end of its own, as in
    ``state[0].mu["table"]``, for it keeps trees like the params; and if it is kept by row, it has
    as many rows. Such leaves go with their table, everything else is replicated. Accumulators that
    `replicate` and `shard_init` made go by their axis of devices, all others, such as those in a
    `MicroBatchState`, are replicated.

    Args:
      tree: of arrays, or of their shapes: the params, or any tree that holds them, or trees like
        them, such as the state of an optimizer.
      axis_name: the axis, or axes, to shard over.
      tables: which leaves of the params are tables: a predicate ``(path, leaf) -> bool`` or a
        (prefix) tree of bools, as in `value_and_sparse_grad`; ``False`` for none.
      params: what ``tables`` selects from, where that is not ``tree`` itself.

    Returns:
      A tree of ``PartitionSpec(axis_name)`` for arrays in shards, else ``PartitionSpec()``.

    Raises:
      TypeError: ``tables`` returns or holds something else than bools, or selects integers.
      ValueError: ``tables`` does not match the params, or selects a scalar.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> params = {"table": jnp.zeros((8, 2)), "rates": jnp.zeros(8)}
      >>> tables = {"table": True, "rates": False}
      >>> jaxaccum.shard_specs(params, "rows", tables=tables)
      {'rates': P(), 'table': P('rows',)}
      >>> state = optax.trace(0.9).init(params)
      >>> jaxaccum.shard_specs(state, "rows", tables=tables, params=params).trace
      {'rates': P(), 'table': P('rows',)}

    Source: the ``in_specs`` of ``jax.shard_map``.
    """
    owners = _find_owners(tree if params is None else params, tables)

    def spec(path: KeyPath, leaf: PyTree) -> PyTree:
        if _is_gathered(leaf):
            by_device = _is_accumulator(leaf) and leaf.num_rows.ndim > 0
            axes = (axis_name,) if by_device else ()
            return jax.tree.map(lambda _: _make_spec(*axes), leaf)
        starts = (path[start:] for start in range(len(path) + 1))
        rows = next((owners[end] for end in starts if end in owners), None)
        by_row = rows is not None and np.shape(leaf)[:1] == (rows,)
        return _make_spec(axis_name) if by_row else _make_spec()

    return jax.tree_util.tree_map_with_path(spec, tree, is_leaf=_is_gathered)


def drop_device_axis(fun: Callable[..., Result]) -> Callable[..., Result]:
    """Makes ``fun``, to be mapped by `jax.shard_map`, see each device's own accumulators.

    `replicate` and `shard_init` make accumulators with a leading axis of devices. In mapped code it
    has length 1: dropped from every `AccumulatorState` among the arguments, wherever it stands in
    them, and put back on those that ``fun`` returns. All other arguments and results are left
    alone. `jax.pmap` drops that axis by itself.

    Args:
      fun: works on accumulators as `init` makes them.

    Returns:
      A function of the same arguments, for `jax.shard_map`.

    Raises:
      ValueError: while ``fun`` is traced: an accumulator has no such axis, or it is longer, as
        where the ``in_specs`` do not shard it.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
      >>> states = jaxaccum.replicate(jaxaccum.init((100, 1), capacity=4), mesh, "data")
      >>> def add(state, ids):
      ...     grad = jaxaccum.IndexedSlices(ids, jnp.ones((len(ids), 1)), (100, 1))
      ...     return jaxaccum.apply(state, grad)[0]
      >>> add = jax.shard_map(
      ...     jaxaccum.drop_device_axis(add), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
      >>> states = add(states, jnp.arange(2 * jax.device_count()))
      >>> states.num_rows[-1]
      Array(2, dtype=int32)

    Source: of this package; what `jax.pmap` does by itself.
    """

    def drop(node: PyTree) -> PyTree:
        if not _is_accumulator(node):
            return node
        if node.num_rows.shape != (1,):
            raise ValueError(
                "an accumulator must have an axis of devices of length 1 in mapped code, from "
                "replicate or shard_init by in_specs of its axis_name; got num_rows of shape "
                f"{node.num_rows.shape}"
            )
        return jax.tree.map(lambda leaf: leaf[0], node)

    def put_back(node: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[None], node) if _is_accumulator(node) else node

    @functools.wraps(fun)
    def mapped(*args: PyTree) -> Result:
        results = fun(*jax.tree.map(drop, args, is_leaf=_is_accumulator))
        return cast("Result", jax.tree.map(put_back, results, is_leaf=_is_accumulator))

    return mapped


def _find_owners(params: PyTree, tables: Tables) -> dict[KeyPath, int | None]:
    """The key path of every leaf of the params, with the rows of those that are tables."""
    selected = jax.tree.leaves(select_tables(tables, params))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        path: np.shape(leaf)[0] if is_table else None
        for (path, leaf), is_table in zip(leaves, selected, strict=True)
    }


def _is_accumulator(node: object) -> bool:
    return isinstance(node, AccumulatorState)


def _is_gathered(node: object) -> bool:
    """Whether its rows are those that were gathered, not those of a table."""
    return isinstance(node, AccumulatorState | PooledRows | RowSums)


def _make_spec(*axes: AxisName) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def _count_devices(mesh: Mesh, axis_name: AxisName) -> int:
    names = as_names(axis_name)
    missing = [name for name in names if name not in mesh.shape]
    if missing:
        raise ValueError(f"axis_name must be of the mesh's {mesh.axis_names}, got {axis_name!r}")
    return int(np.prod([mesh.shape[name] for name in names]))


def _divide_rows(rows: int, mesh: Mesh, axis_name: AxisName, argument: str) -> int:
    num_devices = _count_devices(mesh, axis_name)
    if rows % num_devices:
        more = -rows % num_devices
        raise ValueError(
            f"{argument} must have rows that divide among the {num_devices} devices of axis "
            f"{axis_name!r}, got {rows}; pad the table with {more} rows that nothing looks up"
        )
    return rows // num_devices


def _check_alike(description: str) -> None:
    """Raises unless all processes give the same description.

    Programs of different shapes would wait for each other's messages, or take them for their own.
    """
    if jax.process_count() == 1:
        return
    # The digest stands for what does not fit.
    text = hashlib.sha256(description.encode()).digest() + description.encode()[:224].ljust(224)
    told = [bytes(row) for row in multihost_utils.process_allgather(np.frombuffer(text, np.uint8))]
    if len(set(told)) > 1:
        listed = "; ".join(
            f"process {i}: {each[32:].decode(errors='replace').strip()}"
            for i, each in enumerate(told)
        )
        raise ValueError(f"all processes must pass the same, got {listed}")
