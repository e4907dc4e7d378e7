"""``freeze_rows``: rows of a table that no optimizer is to touch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from jaxaccum._optimizers.optax_import import import_optax
from jaxaccum._rows.indexed_slices import IndexedSlices, as_slices, is_slices
from jaxaccum._rows.tree import Leaf, PyTree

if TYPE_CHECKING:
    import optax  # type: ignore[import-untyped]


def freeze_rows(rows: PyTree) -> optax.GradientTransformation:
    """Drops the gradients of some rows of tables, so that nothing behind it ever touches them.

    Chained before `lazy_rows` or `accumulate` it leaves these rows alone entirely: parameters,
    optimizer state, momentum, weight decay, and what ``catch_up`` would make up for. They take no
    slots of ``capacity`` either. For padding rows, and for rows that were trained before.

    Args:
      rows: a tree like the params. For each leaf the numbers of its frozen rows (a list or an array
        of ints, ``[n]``), or ``None``.

    Returns:
      A transform without state, whose updates are the gradients with the slices of frozen rows made
      padding.

    Raises:
      ImportError: optax is not installed.
      TypeError: ``rows`` holds something else than integers. In ``update``: the gradient of a table
        with frozen rows is no ``IndexedSlices``, so that an optimizer would step all rows.
      ValueError: in ``init`` and ``update``: ``rows`` is no tree like the params, or a number in it
        is no row of its table.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> params = {"bias": jnp.zeros(2), "table": jnp.ones((4, 1))}
      >>> tx = optax.chain(
      ...     jaxaccum.freeze_rows({"bias": None, "table": [0]}),
      ...     jaxaccum.lazy_rows(optax.adamw(0.5, weight_decay=0.5)))
      >>> table = jaxaccum.IndexedSlices(jnp.array([0, 2]), jnp.zeros((2, 1)), (4, 1))
      >>> grads = {"bias": jnp.zeros(2), "table": table}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> jaxaccum.apply_updates(params, updates)["table"].ravel()
      Array([1.  , 1.  , 0.75, 1.  ], dtype=float32)

    Source: ``optax.masked`` for rows; ``padding_idx`` of ``torch.nn.Embedding``.
    """
    optax = import_optax("freeze_rows")

    def init(params: PyTree) -> PyTree:
        for path, leaf, ids in _pair(params, rows):
            _check_rows(ids, jnp.shape(leaf)[:1], path)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        del params
        leaves = [_drop(grad, ids, path) for path, grad, ids in _pair(updates, rows)]
        return jax.tree.unflatten(jax.tree.structure(updates, is_leaf=is_slices), leaves), state

    return optax.GradientTransformation(init, update)


def _pair(tree: PyTree, rows: PyTree) -> list[tuple[str, Leaf, np.ndarray]]:
    """Each leaf of ``tree`` with the path to it and the rows that are frozen in it."""
    treedef: PyTreeDef
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_slices)
    try:
        frozen = treedef.flatten_up_to(rows)
    except ValueError as err:
        raise ValueError(f"rows must be a tree like the params: {err}") from None
    return [
        (jax.tree_util.keystr(path), leaf, _as_ids(ids, jax.tree_util.keystr(path)))
        for (path, leaf), ids in zip(leaves, frozen, strict=True)
    ]


def _as_ids(ids: object, path: str) -> np.ndarray:
    ids = np.asarray([] if ids is None else ids)
    if ids.size == 0:
        return np.zeros(0, np.int32)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise TypeError(f"rows{path} must be a list of ints, got {ids.dtype} of shape {ids.shape}")
    return np.unique(ids)


def _check_rows(ids: np.ndarray, shape: tuple[int | None, ...], path: str) -> None:
    last = 2**31 - 1 if shape[:1] == (None,) else (*shape, 0)[0]
    if ids.size and (ids[0] < 0 or ids[-1] >= last):
        raise ValueError(
            f"rows{path} must be rows of a table of shape {shape}, got {ids[0]} to {ids[-1]}"
        )


def _drop(grad: Leaf, ids: np.ndarray, path: str) -> Leaf:
    if not ids.size:
        return grad
    if not is_slices(grad):
        raise TypeError(
            f"updates{path} has frozen rows and must be an IndexedSlices, got {type(grad).__name__}"
        )
    grad = as_slices(grad, f"updates{path}")
    _check_rows(ids, (grad.num_rows,), path)
    is_frozen = jnp.isin(grad.indices, jnp.asarray(ids, grad.indices.dtype))
    indices = jnp.where(is_frozen, grad.padding_index, grad.indices)
    return IndexedSlices(indices, grad.values, grad.dense_shape)
