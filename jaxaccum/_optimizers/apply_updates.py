"""optax over trees that mix tables and dense leaves: applying updates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._rows.opaque import UniqueRows
from jaxaccum._rows.table_update import add_to_table
from jaxaccum._rows.unique_rows import is_slices, promote_dtypes

PyTree = Any


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Adds updates to parameters: rows into tables, everything else as optax does.

    Jitted with the parameters donated, rows are written in place. Where an update is wider than
    its parameter, the sum is rounded once, to the parameter's dtype.

    Args:
      params: a tree of arrays.
      updates: the same tree of updates, ``IndexedSlices`` for tables of which only rows change.

    Returns:
      The updated parameters, with the structure, shapes and dtypes of ``params``.

    Raises:
      ValueError: an update does not fit its parameter, or outside ``jit`` has invalid indices.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> rows = jaxaccum.IndexedSlices(jnp.array([1]), jnp.array([[5.0]]), (3, 1))
      >>> jaxaccum.apply_updates(jnp.zeros((3, 1)), rows).ravel()
      Array([0., 5., 0.], dtype=float32)
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, param, update: _add(param, update, f"updates{jax.tree_util.keystr(path)}"),
        params,
        updates,
        is_leaf=lambda leaf: leaf is None,  # a frozen parameter, as in optax.apply_updates
    )


def _add(param: Any, update: Any, name: str) -> Any:
    if param is None:
        return None
    param = jnp.asarray(param)
    if isinstance(update, UniqueRows):
        update = update.slices
    if is_slices(update):
        return add_to_table(param, update, name)
    wide = promote_dtypes(param.dtype, update.dtype)
    return (param.astype(wide) + update.astype(wide)).astype(param.dtype)
