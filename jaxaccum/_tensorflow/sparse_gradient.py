"""What a take returns in TensorFlow's words."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.public import public


@public
class SparseGradient(NamedTuple):
    """A gradient as `SparseConditionalAccumulator.take_grad` returns it.

    Attributes:
      indices: int32 ``[n]``, ascending and distinct.
      values: ``[n, *row]``.
      shape: int64 ``[1 + len(row)]`` in host memory, -1 where the row count is unknown.

    Example:
      >>> import jaxaccum
      >>> acc = jaxaccum.SparseConditionalAccumulator("float32", shape=(9, 1))
      >>> acc.apply_grad([5], [[1.0]])
      True
      >>> acc.take_grad(1).shape
      array([9, 1])

    Source: what TensorFlow's ``SparseConditionalAccumulator.take_grad`` returns.
    """

    indices: jax.Array
    values: jax.Array
    shape: np.ndarray


def as_tuple(grad: IndexedSlices) -> SparseGradient:
    """Returns ``grad`` as TensorFlow's tuple."""
    assert grad.dense_shape is not None
    shape = [-1 if d is None else d for d in grad.dense_shape]
    return SparseGradient(grad.indices, grad.values, np.array(shape, np.int64))
