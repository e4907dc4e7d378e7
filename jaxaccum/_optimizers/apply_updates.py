"""optax over trees that mix tables and dense leaves: applying updates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.unique_rows import (
    add_rows,
    fit_to_table,
    gather_rows,
    is_slices,
    promote_dtypes,
    scatter_rows,
    unique_rows,
)

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
      TypeError: the indices of an update are no integers: a transform that does not know
        ``IndexedSlices`` has treated them as parameters.
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
    if not is_slices(update):
        wide = promote_dtypes(param.dtype, update.dtype)
        return (param.astype(wide) + update.astype(wide)).astype(param.dtype)
    return _add_rows(param, _checked(update, param, name), update.values)


def _checked(update: IndexedSlices, param: jax.Array, name: str) -> IndexedSlices:
    try:
        return fit_to_table(update, param.shape, name)
    except TypeError as err:
        raise TypeError(
            f"{name} has lost its row numbers ({err}): wrap the transforms that see sparse "
            "leaves in lazy_rows"
        ) from err


def _add_rows(param: jax.Array, update: IndexedSlices, values: jax.Array) -> jax.Array:
    wide = promote_dtypes(param.dtype, values.dtype)
    if wide == param.dtype:
        # Padding is dropped whatever its values are: nothing to be gained by zeroing those first.
        return add_rows(param, update.indices, jnp.asarray(values).astype(wide))
    # Rounded once a row, so that narrow tables neither lose duplicates nor round twice.
    update = unique_rows(update)
    rows = gather_rows(param, update.indices).astype(wide) + update.values.astype(wide)
    return scatter_rows(param, update.indices, rows)
