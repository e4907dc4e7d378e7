"""Row-sparse gradients: which rows of a table a gradient touches, and their values."""

from __future__ import annotations

import dataclasses
import operator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jax.typing import ArrayLike

from jaxaccum._rows.public import public, pytree

# No row has this index: the padding of gradients whose row count is unknown.
UNKNOWN_ROWS_PADDING = 2**31 - 1


@public
@pytree(data_fields=["indices", "values"], meta_fields=["dense_shape"])
@dataclasses.dataclass(frozen=True)
class IndexedSlices:
    """Rows of a gradient that is zero everywhere else.

    Indices may come unsorted and repeated; repetitions mean their sum. An index one past the end
    is padding: its values are ignored, so that gradients of one fixed size can carry fewer rows.
    After TensorFlow's ``IndexedSlices``, with the padding of ``jax.experimental.sparse.BCOO``.

    Attributes:
      indices: int32 ``[n]``, the row each slice belongs to.
      values: ``[n, *row]``, the slices.
      dense_shape: the shape of the whole gradient, ``(rows, *row)``. ``rows`` is ``None`` where the
        vocabulary is unknown; ``None`` alone claims no shape at all. Static under ``jit``.

    Raises:
      ValueError: ``indices`` is a NumPy array with an entry that does not fit int32 (JAX would
        truncate it silently), or ``dense_shape`` is no shape.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> grad = jaxaccum.IndexedSlices(
      ...     jnp.array([2, 0, 2, 4]), jnp.array([[1.0], [2.0], [3.0], [9.0]]), (4, 1))
      >>> grad.row_mask  # index 4 is one past the end: padding
      Array([ True,  True,  True, False], dtype=bool)
      >>> grad.to_dense().ravel()
      Array([2., 0., 4., 0.], dtype=float32)
    """

    indices: jax.Array
    values: jax.Array
    dense_shape: tuple[int | None, ...] | None

    def __post_init__(self) -> None:
        # JAX also builds this class around placeholders, so the leaves are never converted. NumPy
        # indices are looked at all the same: nothing later can tell that an id was truncated.
        check_host_indices(self.indices)
        if self.dense_shape is not None:
            object.__setattr__(self, "dense_shape", canonical_shape(self.dense_shape))

    @property
    def num_rows(self) -> int | None:
        """Rows of the whole gradient, ``None`` where unknown."""
        return self.dense_shape[0] if self.dense_shape else None

    @property
    def padding_index(self) -> int:
        """The index that marks padding: one past the end, ``2**31 - 1`` where rows are unknown."""
        return padding_index(self.dense_shape)

    @property
    def row_mask(self) -> jax.Array:
        """Which slices are real rows, bool ``[n]``: neither padding nor out of range."""
        return (self.indices >= 0) & (self.indices < self.padding_index)

    def to_dense(self) -> jax.Array:
        """Returns the gradient as an array of ``dense_shape``, repeated rows summed.

        Raises:
          ValueError: the row count is unknown.
        """
        shape = self._known_shape("to_dense")
        # Negative indices would wrap to the last rows, whatever the scatter mode.
        rows = jnp.where(self.row_mask, self.indices, shape[0])
        return jnp.zeros(shape, self.values.dtype).at[rows].add(self.values, mode="drop")

    def to_bcoo(self) -> sparse.BCOO:
        """Returns the gradient as a BCOO matrix of one sparse dimension; nothing is copied.

        Raises:
          ValueError: the row count is unknown.
        """
        return sparse.BCOO((self.values, self.indices[:, None]), shape=self._known_shape("to_bcoo"))

    @classmethod
    def from_bcoo(cls, mat: sparse.BCOO) -> IndexedSlices:
        """Takes the rows of a BCOO matrix with one sparse and no batch dimension.

        Args:
          mat: ``[rows, *row]`` with ``n_sparse == 1`` and ``n_batch == 0``.

        Raises:
          ValueError: the layout of ``mat`` is another one.
        """
        if mat.n_batch != 0 or mat.n_sparse != 1:
            raise ValueError(
                "mat must have n_batch=0 and n_sparse=1, got "
                f"n_batch={mat.n_batch} and n_sparse={mat.n_sparse}"
            )
        return cls(mat.indices[:, 0], mat.data, mat.shape)

    def _known_shape(self, caller: str) -> tuple[int, ...]:
        if self.num_rows is None:
            raise ValueError(
                f"{caller} needs a dense_shape of known row count, got {self.dense_shape}"
            )
        return (self.num_rows, *self.values.shape[1:])


def canonical_shape(dense_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Returns ``dense_shape`` as a tuple of ints whose first entry may be ``None``."""
    try:
        rows, *row = dense_shape
        shape = (
            None if rows is None else operator.index(rows),
            *(operator.index(d) for d in cast("list[int]", row)),
        )
    except (TypeError, ValueError):
        raise ValueError(
            f"dense_shape must be (rows, *row) of ints, rows None if unknown, got {dense_shape!r}"
        ) from None
    if any(d is not None and not 0 <= d <= UNKNOWN_ROWS_PADDING for d in shape):
        raise ValueError(f"dense_shape must lie within 0 and 2**31 - 1, got {dense_shape!r}")
    return shape


def padding_index(dense_shape: tuple[int | None, ...] | None) -> int:
    """Returns the index that marks padding in a gradient of ``dense_shape``."""
    rows = dense_shape[0] if dense_shape else None
    return UNKNOWN_ROWS_PADDING if rows is None else rows


def check_host_indices(indices: object) -> None:
    """Raises ``ValueError`` if NumPy ``indices`` hold an entry that int32 cannot."""
    if isinstance(indices, np.ndarray) and indices.dtype.kind in "iu" and indices.size:
        low, high = indices.min(), indices.max()
        if low < -(2**31) or high >= 2**31:
            raise ValueError(
                f"indices must fit int32, got entries from {low} to {high}; map 64-bit ids "
                "to table rows (or hash them to 31 bits) before they reach jaxaccum"
            )


def as_device_slices(grad: IndexedSlices) -> IndexedSlices:
    """Returns ``grad`` with array leaves, checked for what is wrong whatever it is used for.

    Raises:
      TypeError: ``grad`` is no ``IndexedSlices``, or its indices are no integers.
      ValueError: ranks or lengths do not fit together.
    """
    if not isinstance(grad, IndexedSlices):
        raise TypeError(f"grad must be an IndexedSlices, got {type(grad).__name__}")
    indices, values = _as_array(grad.indices), _as_array(grad.values)
    if indices.ndim == 1 and indices.size == 0 and not isinstance(grad.indices, jax.Array):
        indices = indices.astype(jnp.int32)  # an empty list has no dtype of its own
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"grad.indices must be integers, got {indices.dtype}")
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)  # wide enough to be compared with any row count
    if indices.ndim != 1:
        raise ValueError(f"grad.indices must have rank 1, got shape {indices.shape}")
    if values.ndim == 0 or values.shape[0] != indices.shape[0]:
        raise ValueError(
            f"grad.values must hold one slice an index, got shape {values.shape} "
            f"for {indices.shape[0]} indices"
        )
    shape = grad.dense_shape
    if shape is not None and tuple(shape[1:]) != values.shape[1:]:
        raise ValueError(
            f"grad.dense_shape {shape} does not fit grad.values of shape {values.shape}"
        )
    return IndexedSlices(indices, values, shape)


def _as_array(leaf: ArrayLike) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return leaf
    host = np.asarray(leaf)
    check_host_indices(host)
    return jnp.asarray(host)
