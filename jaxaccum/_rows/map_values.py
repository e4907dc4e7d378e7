"""Arithmetic on trees that mix gradients held as rows and dense ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxaccum._rows.indexed_slices import is_slices
from jaxaccum._rows.row_arithmetic import promote_dtypes, sum_dtype
from jaxaccum._rows.tree import Leaf, PyTree
from jaxaccum._rows.unique_rows import sum_duplicates


def map_values(fun: Callable[[jax.Array], jax.Array], tree: PyTree) -> PyTree:
    """Applies a function to the values of gradients; `jax.tree.map` would reach the indices too.

    Rows that repeat are seen one by one, and rows that are not held not at all: scaling, casting
    and clipping by value of unique rows come out as on the dense gradient (`sum_duplicates` makes
    them unique), but ``fun(0)`` should be 0.

    Args:
      fun: takes and returns an array; of rows the values ``[n, *row]``, one slice an index.
      tree: gradients, ``IndexedSlices`` among them.

    Returns:
      The tree with ``fun(grad)`` for dense leaves, and the same rows with ``fun(grad.values)``.

    Raises:
      ValueError: ``fun`` changes how many slices there are.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> rows = jaxaccum.IndexedSlices(jnp.array([2, 0]), jnp.array([[4.0], [-4.0]]), (3, 1))
      >>> half = jaxaccum.map_values(lambda g: 0.5 * g, {"table": rows, "bias": jnp.ones(1)})
      >>> half["table"].to_dense().ravel(), half["bias"]
      (Array([-2.,  0.,  2.], dtype=float32), Array([0.5], dtype=float32))

    Source: ``jax.tree.map``, for trees that hold rows.
    """

    def apply(leaf: Leaf) -> Leaf:
        if not is_slices(leaf):
            return fun(leaf)
        values = fun(leaf.values)
        if jnp.shape(values)[:1] != jnp.shape(leaf.indices):
            raise ValueError(
                f"fun must return a slice for each of {jnp.shape(leaf.indices)[0]} indices, got "
                f"values of shape {jnp.shape(values)}"
            )
        shape = leaf.dense_shape
        shape = None if shape is None else (shape[0], *values.shape[1:])
        return dataclasses.replace(leaf, values=values, dense_shape=shape)

    return jax.tree.map(apply, tree, is_leaf=is_slices)


def global_norm(tree: PyTree) -> jax.Array:
    """Computes the norm of all gradients together, as if those held as rows were dense.

    What ``optax.global_norm`` is of the dense gradients: repeated rows are summed first, padding
    counts nothing. 16-bit floats are squared in float32.

    Args:
      tree: gradients, ``IndexedSlices`` among them.

    Returns:
      A scalar, of the widest dtype among the leaves, float32 at least.

    Raises:
      TypeError: a leaf is no array of numbers.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> rows = jaxaccum.IndexedSlices(jnp.array([7, 7]), jnp.array([[1.0], [2.0]]), (9, 1))
      >>> jaxaccum.global_norm({"table": rows, "bias": jnp.array([4.0])})
      Array(5., dtype=float32)

    Source: ``optax.global_norm``; ``tf.linalg.global_norm`` leaves repeated rows as they are.
    """
    squares = [_sum_of_squares(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_slices)]
    dtype = functools.reduce(promote_dtypes, (s.dtype for s in squares), jnp.dtype(jnp.float32))
    total = functools.reduce(jnp.add, (s.astype(dtype) for s in squares), jnp.zeros((), dtype))
    return jnp.sqrt(total)


def _sum_of_squares(leaf: Leaf) -> jax.Array:
    if is_slices(leaf):
        values = leaf.values.astype(sum_dtype(leaf.values.dtype))
        array = sum_duplicates(dataclasses.replace(leaf, values=values)).values
    else:
        array = jnp.asarray(leaf)
        array = array.astype(sum_dtype(array.dtype))
    return jnp.sum(jnp.square(jnp.abs(array)))
