"""Tables and slices on a mesh, outside of mapped code.

Along axes that are Auto XLA decides what lies where, and is told one thing: that every device is to
see all slices. Left alone it would have each write those it has into a copy of a table's row map,
and add the copies up: a collective of the size of the map. Along Explicit axes the sharding of an
array is part of its type, and that of what is read from or written into a sharded table cannot be
told from the operands: a table keeps its own, its rows keep that of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def unshard(x: jax.Array) -> jax.Array:
    """Returns ``x [n, ...]`` with all slices on every device of the mesh it is on, if any."""
    if _explicit_mesh(x) is not None:
        return _reshard(x, x, None, *_spec_of(x)[1:])
    mesh = _mesh(x)
    if mesh is None or not isinstance(x, jax.core.Tracer):
        return x  # outside of jit there is no program for XLA to lay out
    row = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    constrained = jax.lax.with_sharding_constraint(x, _sharding(mesh, None, *row))  # type: ignore[no-untyped-call]
    return cast("jax.Array", constrained)


def match_rows(slices: jax.Array, table: jax.Array) -> jax.Array:
    """Returns slices ``[n, *row]`` with their rows sharded as those of ``table [rows, *row]``."""
    if _explicit_mesh(table) is None:
        return slices
    return _reshard(slices, table, None, *_spec_of(table)[1:])


def match(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns ``x`` sharded as ``other``, which is of the same shape."""
    return x if _explicit_mesh(other) is None else _reshard(x, other, *_spec_of(other))


def read_rows(read: Callable[..., jax.Array], table: jax.Array, *operands: jax.Array) -> jax.Array:
    """Returns ``read(table, *operands)``, slices ``[n, *row]``, each sharded as a row is."""
    return _run(read, table, operands, is_table=False)


def write_rows(
    write: Callable[..., jax.Array], table: jax.Array, *operands: jax.Array
) -> jax.Array:
    """Returns ``write(table, *operands)``, a new table, sharded as the old one."""
    return _run(write, table, operands, is_table=True)


def _run(
    fun: Callable[..., jax.Array],
    table: jax.Array,
    operands: tuple[jax.Array, ...],
    *,
    is_table: bool,
) -> jax.Array:
    mesh = _explicit_mesh(table)
    if mesh is None:
        return fun(table, *operands)
    rows, *row = _spec_of(table)
    sharding = _sharding(mesh, rows if is_table else None, *row)
    with jax.sharding.use_abstract_mesh(mesh):
        result: jax.Array = jax.sharding.auto_axes(fun, out_sharding=sharding)(table, *operands)
    return result


def _mesh(x: jax.Array) -> AbstractMesh | None:
    """The mesh that ``x`` is on; none in mapped code, where each device has its own ``x``."""
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def _explicit_mesh(x: jax.Array) -> AbstractMesh | None:
    mesh = _mesh(x)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None


def _spec_of(x: jax.Array) -> tuple[object, ...]:
    """What each axis of ``x`` is sharded over."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return (*spec, *[None] * (x.ndim - len(spec)))


def _reshard(x: jax.Array, other: jax.Array, *spec: object) -> jax.Array:
    """Returns ``x`` on the mesh of ``other``."""
    if not isinstance(other, jax.core.Tracer) and isinstance(other.sharding, NamedSharding):
        return jax.device_put(x, NamedSharding(other.sharding.mesh, PartitionSpec(*spec)))  # type: ignore[no-untyped-call]
    mesh = jax.typeof(other).sharding.mesh
    with jax.sharding.use_abstract_mesh(mesh):
        return cast("jax.Array", jax.sharding.reshard(x, _sharding(mesh, *spec)))  # type: ignore[no-untyped-call]


def _sharding(mesh: AbstractMesh, *spec: object) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*spec))  # type: ignore[no-untyped-call]
