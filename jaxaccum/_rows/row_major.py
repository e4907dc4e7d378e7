"""Tables stored one row after the other, which TPUs do not by themselves."""

from __future__ import annotations

import math
import warnings

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding, SingleDeviceSharding

from jaxaccum._rows.tree import Leaf, PyTree

_LARGE = 2**20  # entries; a copy of fewer costs little


def row_major(tree: PyTree, sharding: PyTree = None) -> PyTree:
    """The formats in which the rows of tables lie together, for `jax.device_put` and `jax.jit`.

    XLA for TPUs stores arrays of rows narrower than 128 numbers column by column, and then copies
    the whole table whenever rows of it are looked up or updated. Tables, accumulators and the
    optimizer's state placed in these formats, and given back in them by every step, are updated in
    place::

        formats = jaxaccum.row_major((params, opt_state))
        params, opt_state = jax.device_put((params, opt_state), formats)
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*formats, None))

    Without ``out_shardings`` the results would be column by column again. Rows then take the memory
    of a multiple of 128 numbers: twice as much for 64 float32, eight times for 16. CPUs and GPUs
    store rows together anyhow, and lose nothing.

    Args:
      tree: of arrays, or of their shapes as from `jax.eval_shape`, so that a state can be made in
        its format: ``jax.jit(tx.init, out_shardings=row_major(shapes))``.
      sharding: of all arrays, or a tree of them as prefix of ``tree``. By default each array stays
        where it is, and shapes are for the default device.

    Returns:
      The tree of ``jax.experimental.layout.Format``, or of shardings for arrays without rows.

    Raises:
      ValueError: ``sharding`` is no prefix of ``tree``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> table = jnp.zeros((8, 4))
      >>> table = jax.device_put(table, jaxaccum.row_major(table))
      >>> table.format.layout.major_to_minor
      (0, 1)

    Source: ``jax.experimental.layout.Format``.
    """
    if sharding is None:
        return jax.tree.map(lambda leaf: _choose_format(leaf, _get_sharding(leaf)), tree)
    try:
        shardings = jax.tree.broadcast(sharding, tree)
    except ValueError as error:
        raise ValueError(f"sharding must be one, or a prefix of tree: {error}") from None
    return jax.tree.map(_choose_format, tree, shardings)


def warn_if_copied(tree: PyTree, name: str) -> None:
    """Warns of arrays in ``tree`` that are large and column-major; traced ones cannot be read."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            continue
        if leaf.size < _LARGE or not _has_rows(leaf):
            continue
        layout = leaf.format.layout  # type: ignore[attr-defined]
        if layout is not None and tuple(layout.major_to_minor) != tuple(range(leaf.ndim)):
            warnings.warn(
                f"{name}{jax.tree_util.keystr(path)} of shape {leaf.shape} is stored by columns, "
                "and will be copied whole wherever its rows are read or written: place it, and let "
                "jit return it, in the formats of jaxaccum.row_major",
                stacklevel=3,
            )


def _get_sharding(leaf: Leaf) -> Sharding:
    where = getattr(leaf, "sharding", None)
    return where if where is not None else SingleDeviceSharding(jax.devices()[0])


def _choose_format(leaf: Leaf, where: Sharding) -> Format | Sharding:
    return Format(Layout(tuple(range(leaf.ndim))), where) if _has_rows(leaf) else where


def _has_rows(leaf: Leaf) -> bool:
    # Rows of one number lie together in any order of the axes, and padded would take 128 times.
    return leaf.ndim > 1 and math.prod(leaf.shape[1:]) > 1
