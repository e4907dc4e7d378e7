"""Adagrad for trees of gradients in which tables come as rows: only those rows are touched."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum import IndexedSlices


def is_rows(leaf: Any) -> bool:
    return isinstance(leaf, IndexedSlices)


def init(params: Any, start: float = 1e-7) -> Any:
    """The sums of squares, as large as the parameters."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, start), params)


def update(params: Any, squares: Any, grads: Any, learning_rate: float) -> tuple[Any, Any]:
    """Returns ``params`` and ``squares`` after a step. Donate both, and tables stay in place."""
    rate = jnp.float32(learning_rate)

    def dense(param: jax.Array, square: jax.Array, grad: jax.Array) -> Any:
        square = square + grad**2
        return param - rate * grad / jnp.sqrt(square), square

    def rows(param: jax.Array, square: jax.Array, grad: IndexedSlices) -> Any:
        ids, sums = summed(grad)
        new = square.at[ids].get(mode="fill", fill_value=1) + sums**2
        step = rate * sums / jnp.sqrt(new)
        return param.at[ids].add(-step, mode="drop"), square.at[ids].set(new, mode="drop")

    leaves, treedef = jax.tree.flatten(grads, is_leaf=is_rows)
    pairs = [
        (rows if is_rows(grad) else dense)(param, square, grad)
        for param, square, grad in zip(
            treedef.flatten_up_to(params), treedef.flatten_up_to(squares), leaves, strict=True
        )
    ]
    return tuple(treedef.unflatten(half) for half in zip(*pairs, strict=True))  # type: ignore


def summed(grad: IndexedSlices) -> tuple[jax.Array, jax.Array]:
    """Each row once, with the sum of its slices; padding keeps the padding index."""
    ids, at = jnp.unique(
        grad.indices, size=len(grad.indices), fill_value=grad.padding_index, return_inverse=True
    )
    return ids, jax.ops.segment_sum(grad.values, at.ravel(), len(ids))
