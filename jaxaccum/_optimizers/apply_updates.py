"""optax over trees that mix tables and dense leaves: applying updates, counting invalid ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxaccum._optimizers.unique_leaf import UniqueRows
from jaxaccum._rows.indexed_slices import add_update, as_device_slices, is_invalid, is_slices
from jaxaccum._rows.row_arithmetic import promote_dtypes
from jaxaccum._rows.tree import Leaf, PyTree


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Adds updates to parameters: rows into tables, everything else as optax does.

    Jitted with the parameters donated, rows are written in place. The updates of a row are summed
    in float32 at least, and what comes out is rounded once, to the parameter's dtype.

    Args:
      params: a tree of arrays.
      updates: the same tree of updates, ``IndexedSlices`` for tables of which only rows change.

    Returns:
      The updated parameters, with the structure, shapes and dtypes of ``params``.

    Raises:
      ValueError: an update does not fit its parameter, or outside ``jit`` has indices that are
        neither rows of its table nor padding. Inside ``jit`` such slices are dropped, and
        :func:`count_invalid` counts them.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> rows = jaxaccum.IndexedSlices(jnp.array([1]), jnp.array([[5.0]]), (3, 1))
      >>> jaxaccum.apply_updates(jnp.zeros((3, 1)), rows).ravel()
      Array([0., 5., 0.], dtype=float32)

    Source: ``optax.apply_updates``, for trees that hold rows.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, param, update: _add(param, update, f"updates{jax.tree_util.keystr(path)}"),
        params,
        updates,
        is_leaf=lambda leaf: leaf is None,  # a frozen parameter, as in optax.apply_updates
    )


def count_invalid(grads: PyTree, params: PyTree) -> PyTree:
    """Counts the slices of each leaf whose index is neither a row of its table nor padding.

    Outside of ``jit`` such slices raise in `lazy_rows` and `apply_updates`. Inside, where nothing
    can raise, they are dropped: report this count beside the loss to know. (`accumulate` refuses
    the whole gradient; its state counts those.)

    Args:
      grads: a tree of gradients or updates, ``IndexedSlices`` for tables.
      params: the same tree of arrays.

    Returns:
      The same tree of int32 scalars; zero for leaves that are no tables.

    Raises:
      ValueError: ``grads`` and ``params`` are not trees alike.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> params = {"bias": jnp.ones(2), "table": jnp.ones((3, 1))}
      >>> ids = jnp.array([2_000_000_000, 1, -1, 2**31 - 1])  # the last is padding
      >>> table = jaxaccum.IndexedSlices(ids, jnp.ones((4, 1)), (None, 1))
      >>> jaxaccum.count_invalid({"bias": jnp.ones(2), "table": table}, params)
      {'bias': Array(0, dtype=int32), 'table': Array(2, dtype=int32)}

    Source: of this package.
    """

    def count(grad: Leaf, param: Leaf) -> jax.Array:
        if not is_slices(grad):
            return jnp.int32(0)
        return jnp.sum(is_invalid(as_device_slices(grad), param.shape[0]), dtype=jnp.int32)

    return jax.tree.map(count, grads, params, is_leaf=is_slices)


def _add(param: Leaf, update: Leaf, name: str) -> Leaf:
    if param is None:
        return None
    param = jnp.asarray(param)
    if isinstance(update, UniqueRows):
        update = update.slices
    if is_slices(update):
        with jax.named_scope("jaxaccum.scatter"):
            return add_update(param, update, name)
    wide = promote_dtypes(param.dtype, update.dtype)
    return (param.astype(wide) + update.astype(wide)).astype(param.dtype)
