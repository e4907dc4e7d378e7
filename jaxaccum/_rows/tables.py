"""Which leaves of a tree are tables, said the same way everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._rows.indexed_slices import is_slices
from jaxaccum._rows.tree import Leaf, PyTree

# The way to a leaf.
KeyPath: TypeAlias = tuple[Any, ...]
# How tables are selected: by a predicate, or by a tree (or prefix) of bools.
Tables: TypeAlias = Callable[[KeyPath, Leaf], bool] | PyTree


def select_tables(tables: Tables, tree: PyTree) -> PyTree:
    """Returns a tree of bools shaped like ``tree``: which leaves are tables.

    Args:
      tables: a predicate ``(path, leaf) -> bool``, with the path as in
        ``jax.tree_util.tree_map_with_path``; or bools in a tree that matches ``tree`` or is a
        prefix of it. A callable that is itself a pytree (an Equinox module holding bools) is taken
        for a tree.
      tree: any pytree. An ``IndexedSlices`` in it counts as one leaf.

    Raises:
      TypeError: the predicate returns, or the tree holds, something else than a bool; or a selected
        leaf is no floating-point or complex array.
      ValueError: ``tables`` is no prefix of ``tree``, or a selected leaf is a scalar.
    """
    if callable(tables) and jax.tree_util.all_leaves([tables]):
        selected = jax.tree_util.tree_map_with_path(tables, tree, is_leaf=is_slices)
        origin = "tables(path, leaf) must return a bool"
    else:
        selected = _broadcast(tables, tree)
        origin = "tables must be a predicate (path, leaf) -> bool or a tree of bools"

    def check(path: KeyPath, leaf: Leaf, choice: object) -> bool:
        if not isinstance(choice, bool | np.bool_):
            raise TypeError(f"{origin}, got {choice!r} for {_name(path)}")
        if choice:
            _check_table(_name(path), leaf)
        return bool(choice)

    return jax.tree_util.tree_map_with_path(check, tree, selected, is_leaf=is_slices)


def _broadcast(prefix: PyTree, tree: PyTree) -> PyTree:
    leaves = jax.tree.map(lambda _: True, tree, is_leaf=is_slices)
    try:
        return jax.tree.broadcast(prefix, leaves)
    except ValueError as error:
        raise ValueError(
            "tables must match the tree it selects from, or be a prefix of it; got "
            f"{jax.tree.structure(prefix)} for {jax.tree.structure(leaves)}: {error}"
        ) from None


def _check_table(name: str, leaf: Leaf) -> None:
    if is_slices(leaf):
        return
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"tables selects {name}, which must be a floating-point or complex array, "
            f"got {type(leaf).__name__ if dtype is None else dtype}"
        )
    if leaf.ndim == 0:
        raise ValueError(f"tables selects {name}, which must have rows, got a scalar")


def _name(path: KeyPath) -> str:
    return f"leaf {jax.tree_util.keystr(path)}" if path else "the only leaf"
