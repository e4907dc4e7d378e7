"""What goes where on a mesh: an accumulator for each device, tables in shards."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxaccum._accumulator.state import AccumulatorState, init
from jaxaccum._distributed.exchange import AxisName
from jaxaccum._rows.indexed_slices import canonical_shape


def replicate(state: AccumulatorState, mesh: Mesh, axis_name: AxisName) -> AccumulatorState:
    """Makes a copy of an empty accumulator for each device along a mesh axis.

    The leaves have a leading axis of devices, and are sharded along it: pass them to
    `jax.shard_map` with ``PartitionSpec(axis_name)``, and inside drop the axis, which has length 1
    there, by ``jax.tree.map(lambda leaf: leaf[0], state)``; put it back by ``leaf[None]``.

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
    """
    num_devices = _num_devices(mesh, axis_name)
    _check_alike(
        f"state of capacity {state.capacity}, dense_shape {state.dense_shape}, dtype "
        f"{state.dtype}, accumulator_dtype {state.values.dtype}, reduction {state.reduction}"
    )
    if state.num_accumulated != 0:
        raise ValueError(
            f"state must hold no gradients to be copied, got num_accumulated "
            f"{state.num_accumulated}"
        )
    sharding = NamedSharding(mesh, _spec(axis_name))
    state = dataclasses.replace(state, shared_verdicts=state.verdict_counts)

    def copied(leaf: jax.Array) -> jax.Array:
        host = np.asarray(leaf)[None]
        shape = (num_devices, *leaf.shape)
        return jax.make_array_from_callback(shape, sharding, lambda _: host)

    return jax.tree.map(copied, state)


def shard_init(
    dense_shape: tuple[int, ...],
    dtype: DTypeLike = np.float32,
    *,
    mesh: Mesh,
    axis_name: AxisName,
    **options: Any,
) -> AccumulatorState:
    """Makes an accumulator for each shard of a row-sharded table.

    Args:
      dense_shape: shape of the whole table, ``(rows, *row)``.
      dtype: as in `init`.
      mesh: as in `replicate`.
      axis_name: the axis, or axes, of ``mesh`` the table is sharded over.
      **options: the keyword arguments of `init`; ``capacity`` is that of one shard.

    Returns:
      An `AccumulatorState` of ``(rows / n, *row)`` with a leading axis of devices, as from
      `replicate`. `all_apply` adds to it, `take` takes from it.

    Raises:
      TypeError: as `init`.
      ValueError: as `init` and `replicate`, or the rows do not divide among the devices.

    Example:
      >>> import jax, jaxaccum
      >>> mesh = jax.make_mesh((jax.device_count(),), ("rows",))
      >>> shape = (jax.device_count() * 100, 2)
      >>> jaxaccum.shard_init(shape, capacity=8, mesh=mesh, axis_name="rows").dense_shape
      (100, 2)
    """
    rows, *row = canonical_shape(dense_shape)
    if rows is None:
        raise ValueError(f"dense_shape must have a known row count, got {dense_shape}")
    shard = _shard_length(rows, mesh, axis_name, "dense_shape")
    return replicate(init((shard, *row), dtype, **options), mesh, axis_name)


def shard_rows(tree: Any, mesh: Mesh, axis_name: AxisName, *, num_rows: int) -> Any:
    """Shards a table, and all of an optimizer's state that goes by its rows, over a mesh axis.

    Args:
      tree: of arrays. Those of ``num_rows`` rows are sharded by ranges of rows, all others are
        replicated. In a run of many processes each passes the same, whole arrays.
      mesh: of any number of axes.
      axis_name: one axis of ``mesh``, or a tuple of them.
      num_rows: rows of the table.

    Returns:
      The tree of sharded arrays.

    Raises:
      ValueError: ``num_rows`` does not divide among the devices, or ``mesh`` has no such axis; or
        processes pass arrays of different shapes, which every process is told before anything is
        exchanged.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> mesh = jax.make_mesh((jax.device_count(),), ("rows",))
      >>> table = jnp.zeros((jax.device_count() * 4, 2))
      >>> table = jaxaccum.shard_rows(table, mesh, "rows", num_rows=len(table))
      >>> table.addressable_shards[0].data.shape
      (4, 2)
    """
    _shard_length(num_rows, mesh, axis_name, "num_rows")
    shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree)]
    _check_alike(f"tree of {', '.join(shapes)}")

    def placed(leaf: Any, spec: PartitionSpec) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(placed, tree, shard_specs(tree, axis_name, num_rows=num_rows))


def shard_specs(tree: Any, axis_name: AxisName, *, num_rows: int) -> Any:
    """The ``PartitionSpec`` of each array as `shard_rows` shards it, for `jax.shard_map`.

    Args:
      tree: of arrays, or of their shapes.
      axis_name: the axis, or axes, to shard over.
      num_rows: rows of the table.

    Returns:
      A tree of ``PartitionSpec(axis_name)`` for arrays of ``num_rows`` rows, else
      ``PartitionSpec()``.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> params = {"step": jnp.zeros(()), "table": jnp.zeros((8, 2))}
      >>> jaxaccum.shard_specs(params, "rows", num_rows=8)
      {'step': P(), 'table': P('rows',)}
    """

    def spec(leaf: Any) -> PartitionSpec:
        has_rows = np.ndim(leaf) > 0 and np.shape(leaf)[0] == num_rows
        return _spec(axis_name) if has_rows else _spec()

    return jax.tree.map(spec, tree)


def _spec(*axes: AxisName) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def _num_devices(mesh: Mesh, axis_name: AxisName) -> int:
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    missing = [name for name in names if name not in mesh.shape]
    if missing:
        raise ValueError(f"axis_name must be of the mesh's {mesh.axis_names}, got {axis_name!r}")
    return int(np.prod([mesh.shape[name] for name in names]))


def _shard_length(rows: int, mesh: Mesh, axis_name: AxisName, argument: str) -> int:
    num_devices = _num_devices(mesh, axis_name)
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
