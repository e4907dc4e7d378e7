"""The sum of gradients over devices: dense ones added up, rows gathered."""

from __future__ import annotations

import dataclasses

import jax

from jaxaccum._distributed.exchange import AxisName, all_gather, axis_size
from jaxaccum._rows.indexed_slices import as_device_slices, is_slices
from jaxaccum._rows.tree import Leaf, PyTree


def all_sum(grads: PyTree, axis_name: AxisName) -> PyTree:
    """Sums gradients over devices, inside `jax.shard_map` or `jax.pmap`: `jax.lax.psum` for rows.

    A dense gradient is summed by `jax.lax.psum`. The rows of all devices are gathered, one after
    the other, which is their sum; each device then holds ``n`` times the slices. All devices get
    the same. Divide by the number of devices (`map_values`) for a mean. To exchange each distinct
    row once, or to accumulate first, use `all_merge` or `all_take`.

    Args:
      grads: a tree of gradients that vary over devices, ``IndexedSlices`` among them.
      axis_name: the axis to sum over, or a tuple of axes.

    Returns:
      The tree of sums; of ``n`` slices on each of ``m`` devices ``[m * n, *row]``.

    Raises:
      ValueError: called outside ``axis_name``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> def total(row):
      ...     grad = jaxaccum.IndexedSlices(row[None], jnp.ones((1, 1)), (9, 1))
      ...     return jaxaccum.all_sum(grad, "data").to_dense()
      >>> jax.pmap(total, axis_name="data")(jnp.array([7]))[0, 7]
      Array([1.], dtype=float32)

    Source: ``jax.lax.psum``, for trees that hold rows.
    """
    axis_size(axis_name)

    def add(grad: Leaf) -> Leaf:
        if not is_slices(grad):
            return jax.lax.psum(grad, axis_name)  # type: ignore[no-untyped-call]
        grad = as_device_slices(grad)
        return dataclasses.replace(
            grad,
            indices=all_gather(grad.indices, axis_name).reshape(-1),
            values=all_gather(grad.values, axis_name).reshape(-1, *grad.values.shape[1:]),
        )

    return jax.tree.map(add, grads, is_leaf=is_slices)
