"""Under `jax.shard_map` types say over which axes values vary; branches and loops must agree."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

_Tree = TypeVar("_Tree")


def varying_axes(leaf: Any) -> frozenset[Any]:
    """The mesh axes over which ``leaf``, an array or the shape of one, varies; none elsewhere."""
    aval = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    kind = aval.manual_axis_type
    return frozenset(kind.varying if kind else ())


def vary_like(tree: _Tree, *others: Any, along: jax.Array) -> _Tree:
    """Marks each leaf of ``tree`` as varying wherever that leaf of ``others``, or ``along``, does.

    Nothing is computed, and outside of `jax.shard_map` nothing changes.
    """

    def vary(leaf: Any, *rest: Any) -> Any:
        wanted = varying_axes(along).union(*map(varying_axes, rest))
        missing = tuple(wanted - varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree, *others)


def vary_along(leaf: jax.Array, axis_name: Any) -> jax.Array:
    """Marks ``leaf`` as varying along mesh axes, which need not be mapped over here."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    missing = tuple((manual & set(names)) - varying_axes(leaf))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf
