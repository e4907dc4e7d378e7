"""Bags: several rows of a table looked up for one example and summed, or averaged."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Combiner = Literal["sum", "mean"]


def embedding_bag(
    table: jax.Array,
    ids: ArrayLike,
    *,
    combiner: Combiner = "mean",
    weights: ArrayLike | None = None,
    padding_id: int | None = None,
    segment_ids: ArrayLike | None = None,
    offsets: ArrayLike | None = None,
    num_bags: int | None = None,
) -> jax.Array:
    """Looks up bags of rows, and sums or averages each.

    For features of several values, as the words of a query or the items of a history. Bags come
    padded to one length, ``ids [..., length]`` with a ``padding_id``, or ragged: all ids in one
    vector, with the bag of each (``segment_ids`` and ``num_bags``) or the first position of each
    bag (``offsets``). It is plain JAX: `value_and_sparse_grad` makes rows of its gradient, and
    entries that pad have none.

    Args:
      table: ``[rows, *row]``.
      ids: integers ``[..., length]``, or ``[n]`` if ragged. As in ``table[ids]``, negative ones
        count from the end; but one out of range makes its bag NaN.
      combiner: ``"sum"``, or ``"mean"``: the sum divided by the number of ids in the bag, or by
        their total weight. An empty bag is zero.
      weights: a number for each id.
      padding_id: ids that stand for none.
      segment_ids: the bag of each id, int ``[n]``, in any order. Ids whose bag is not below
        ``num_bags`` belong to none.
      offsets: where each bag starts, ascending from 0, int ``[num_bags]``; the last ends with the
        ids.
      num_bags: how many bags ``segment_ids`` tell apart. Static.

    Returns:
      ``[..., *row]``, or ``[num_bags, *row]`` if ragged, of the dtype of the table.

    Raises:
      ValueError: a bad ``combiner``; shapes that do not fit; both, or half, of what ragged bags
        are given by.
      TypeError: ``ids`` are no integers.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> table = jnp.array([[1.0], [2.0], [4.0]])
      >>> jaxaccum.embedding_bag(table, jnp.array([[0, 2], [1, -1]]), padding_id=-1).ravel()
      Array([2.5, 2. ], dtype=float32)
      >>> ids, bag = jnp.array([0, 2, 1]), jnp.array([0, 0, 2])
      >>> jaxaccum.embedding_bag(table, ids, combiner="sum", segment_ids=bag, num_bags=3).ravel()
      Array([5., 0., 2.], dtype=float32)

    Source: ``tf.nn.embedding_lookup_sparse``, ``torch.nn.EmbeddingBag``.
    """
    ids = jnp.asarray(ids)
    if combiner not in get_args(Combiner):
        raise ValueError(f"combiner must be one of {get_args(Combiner)}, got {combiner!r}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    bag_of = _segments(ids, segment_ids, offsets, num_bags)
    if weights is not None and jnp.shape(weights) != ids.shape:
        raise ValueError(
            f"weights must have the shape of ids, {ids.shape}, got {jnp.shape(weights)}"
        )
    is_id = jnp.ones(ids.shape, bool) if padding_id is None else ids != padding_id
    # One past the end is where lookups have no gradient: padding makes no slices that count.
    rows = table.at[jnp.where(is_id, ids, table.shape[0])].get(mode="fill", fill_value=jnp.nan)
    given = jnp.ones((), table.dtype) if weights is None else jnp.asarray(weights, table.dtype)
    share = jnp.where(is_id, given, jnp.zeros((), table.dtype))
    wide = jnp.expand_dims(is_id, tuple(range(ids.ndim, rows.ndim)))
    rows = jnp.where(wide, rows, jnp.zeros((), rows.dtype))
    if weights is not None:
        rows = rows * share.reshape(wide.shape)
    total, weight = (_sums(x, ids.ndim - 1, bag_of, num_bags, offsets) for x in (rows, share))
    if combiner == "sum":
        return total
    return total / jnp.where(weight == 0, 1, weight).reshape(
        *weight.shape, *[1] * (total.ndim - weight.ndim)
    ).astype(total.dtype)


def _segments(
    ids: jax.Array,
    segment_ids: ArrayLike | None,
    offsets: ArrayLike | None,
    num_bags: int | None,
) -> jax.Array | None:
    """The bag of each id if they are ragged."""
    if segment_ids is None and offsets is None and num_bags is None:
        if ids.ndim == 0:
            raise ValueError("ids must be [..., length], got a scalar")
        return None
    if (segment_ids is None) == (offsets is None) or (num_bags is None) != (segment_ids is None):
        raise ValueError(
            "ragged bags are given by segment_ids and num_bags, or by offsets alone; got "
            f"segment_ids={segment_ids!r}, num_bags={num_bags!r}, offsets={offsets!r}"
        )
    if ids.ndim != 1:
        raise ValueError(f"ids of ragged bags must have rank 1, got shape {ids.shape}")
    if segment_ids is None:
        position = jnp.arange(ids.shape[0], dtype=jnp.int32)
        starts = jnp.asarray(offsets, jnp.int32)
        return jnp.searchsorted(starts, position, side="right").astype(jnp.int32) - 1
    bag_of = jnp.asarray(segment_ids)
    if bag_of.shape != ids.shape:
        raise ValueError(f"segment_ids must have shape {ids.shape}, got {bag_of.shape}")
    return bag_of


def _sums(
    x: jax.Array,
    axis: int,
    bag_of: jax.Array | None,
    num_bags: int | None,
    offsets: ArrayLike | None,
) -> jax.Array:
    if bag_of is None:
        return jnp.sum(x, axis=axis)
    count = jnp.asarray(offsets).shape[0] if num_bags is None else num_bags
    return jax.ops.segment_sum(x, bag_of, count)
