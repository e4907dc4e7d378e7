"""Row-sparse gradients: which rows of a table a gradient touches, and their values."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify, sparse
from jax.typing import ArrayLike

from jaxaccum._rows.on_mesh import unshard
from jaxaccum._rows.public import one_line, public, pytree
from jaxaccum._rows.row_arithmetic import add_to_table
from jaxaccum._rows.shapes import canonical_shape, check_host_indices, padding_index
from jaxaccum._rows.strangers import refuse_strangers


@public
@pytree(data_fields=["indices", "values"], meta_fields=["dense_shape"])
@dataclasses.dataclass(frozen=True)
class IndexedSlices:
    """Rows of a gradient that is zero everywhere else.

    Indices may come unsorted and repeated; repetitions mean their sum. An index one past the end
    is padding: its values are ignored, so that gradients of one fixed size can carry fewer rows.

    Gradients add up by ``a + b``, which puts their slices one after the other, and scale by
    ``2 * a``, ``a / 8`` and ``-a``. ``table + a`` and ``table - a`` are the table with the rows
    added, as by `apply_updates`; so that ``optax.apply_updates`` and training loops that end in it
    take rows as well. A function mapped over the *leaves* (``jax.tree.map``) reaches the indices
    too: `map_values` reaches the values alone.

    Attributes:
      indices: int32 ``[n]``, the row each slice belongs to.
      values: ``[n, *row]``, the slices.
      dense_shape: the shape of the whole gradient, ``(rows, *row)``. ``rows`` is ``None`` where the
        vocabulary is unknown; ``None`` alone claims no shape at all. Static under ``jit``.

    Raises:
      ValueError: ``indices`` is a NumPy array with an entry that does not fit int32 (JAX would
        truncate it silently), or ``dense_shape`` is no shape.
      TypeError: ``indices`` are floats: swapped with the values (TensorFlow's come first), or
        arithmetic has been mapped over the leaves.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> grad = jaxaccum.IndexedSlices(
      ...     jnp.array([2, 0, 2, 4]), jnp.array([[1.0], [2.0], [3.0], [9.0]]), (4, 1))
      >>> grad.row_mask  # index 4 is one past the end: padding
      Array([ True,  True,  True, False], dtype=bool)
      >>> grad.to_dense().ravel()
      Array([2., 0., 4., 0.], dtype=float32)
      >>> (jnp.ones((4, 1)) - 0.5 * grad).ravel()
      Array([ 0.,  1., -1.,  1.], dtype=float32)

    Source: ``tf.IndexedSlices``; padding, ``jax.experimental.sparse.BCOO``.
    """

    indices: jax.Array
    values: jax.Array
    dense_shape: tuple[int | None, ...] | None

    # NumPy arrays on the left leave the arithmetic to the methods below, as JAX's do.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        # Users build this class around placeholders too (specs, axes), so leaves are never
        # converted. NumPy indices are looked at all the same: nothing later can tell that an id was
        # truncated.
        check_host_indices(self.indices)
        if _is_inexact(self.indices):
            raise TypeError(
                f"indices must be integers, got {self.indices.dtype}: IndexedSlices takes indices "
                "first and values second (TensorFlow's takes values first)"
            )
        if self.dense_shape is not None:
            object.__setattr__(self, "dense_shape", canonical_shape(self.dense_shape))

    def __repr__(self) -> str:
        return one_line(self)

    def tree_flatten(self) -> tuple[tuple[Any, Any], Any]:
        """Returns the two leaves and the static shape, unless whoever asks would misuse them."""
        refuse_strangers(self.dense_shape, sys._getframe(1))
        return (self.indices, self.values), (self.dense_shape,)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        """Returns the leaves of ``tree_flatten`` with their names."""
        refuse_strangers(self.dense_shape, sys._getframe(1))
        return tuple(zip(_KEYS, (self.indices, self.values), strict=True)), (self.dense_shape,)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any], leaves: tuple[Any, Any]) -> IndexedSlices:
        """Puts leaves or placeholders together, unless row numbers have become floats."""
        (dense_shape,) = static
        if _is_inexact(leaves[0]):
            raise TypeError(
                f"the row numbers of a gradient of shape {dense_shape} have become "
                f"{leaves[0].dtype}: a function has been mapped over the leaves of an "
                "IndexedSlices. Scale and add it as a whole (0.5 * grad, a + b) or by "
                "jaxaccum.map_values, and put optax transforms inside jaxaccum.lazy_rows"
            )
        slices = object.__new__(cls)
        # JAX's own placeholders must pass, and the shape has been looked at before.
        for field, leaf in zip(("indices", "values"), leaves, strict=True):
            object.__setattr__(slices, field, leaf)
        object.__setattr__(slices, "dense_shape", dense_shape)
        return slices

    def __add__(self, other: Any) -> Any:
        """Puts the slices of two gradients one after the other, or adds rows to a table."""
        if isinstance(other, IndexedSlices):
            return _joined(self, other)
        if isinstance(other, int) and other == 0:  # what sum() starts from
            return self
        if not isinstance(other, jax.Array | np.ndarray):
            return NotImplemented
        return add_update(jnp.asarray(other), self, f"an update of shape {self.dense_shape}")

    __radd__ = __add__

    def __neg__(self) -> IndexedSlices:
        """Turns the sign of the values."""
        return dataclasses.replace(self, values=-self.values)

    def __sub__(self, other: IndexedSlices) -> IndexedSlices:
        """Adds the other gradient with its sign turned."""
        return _joined(self, -other) if isinstance(other, IndexedSlices) else NotImplemented

    def __rsub__(self, table: Any) -> Any:
        """Subtracts rows from a table."""
        return -self + table

    def __mul__(self, factor: ArrayLike) -> IndexedSlices:
        """Scales the values by a scalar."""
        return dataclasses.replace(self, values=self.values * _scalar(factor, "multiplied"))

    __rmul__ = __mul__

    def __truediv__(self, divisor: ArrayLike) -> IndexedSlices:
        """Divides the values by a scalar."""
        return dataclasses.replace(self, values=self.values / _scalar(divisor, "divided"))

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


_KEYS = tuple(map(jax.tree_util.GetAttrKey, ("indices", "values")))


def _is_inexact(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    # Compared first, because it is int32 at all but a few calls, of which there are many.
    return dtype is not None and dtype != np.int32 and bool(jnp.issubdtype(dtype, jnp.inexact))


def _scalar(number: Any, verb: str) -> Any:
    if np.ndim(number) != 0:
        raise TypeError(
            f"an IndexedSlices is {verb} by scalars, got shape {np.shape(number)}; "
            "jaxaccum.map_values applies any function to its values"
        )
    return number


def _joined(left: IndexedSlices, right: IndexedSlices) -> IndexedSlices:
    """The slices of both, one after the other: their sum."""
    known = left.num_rows if right.num_rows is None else right.num_rows
    shapes = [slices.values.shape[1:] for slices in (left, right)]
    if shapes[0] != shapes[1] or left.num_rows not in (None, known):
        raise ValueError(
            f"gradients of one table can be added, got shapes {left.dense_shape} and "
            f"{right.dense_shape}"
        )
    shape = right.dense_shape if left.num_rows is None else left.dense_shape
    with jax.numpy_dtype_promotion("standard"):
        values = jnp.concatenate([left.values, right.values])
    indices = [_with_padding(slices, shape) for slices in (left, right)]
    return IndexedSlices(jnp.concatenate(indices), values, shape)


def _with_padding(slices: IndexedSlices, shape: Any) -> jax.Array:
    """The indices, padded as gradients of ``shape`` are."""
    indices, padding = jnp.asarray(slices.indices, jnp.int32), padding_index(shape)
    if slices.padding_index == padding:
        return indices
    return jnp.where(indices == slices.padding_index, padding, indices)


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


def as_slices(slices: IndexedSlices, name: str) -> IndexedSlices:
    """Returns ``slices`` with array leaves, checked; ``name`` says in errors which leaf it is."""
    try:
        return as_device_slices(slices)
    except TypeError as err:
        raise TypeError(
            f"{name} has lost its row numbers ({err}): wrap every transform that sees the sparse "
            "leaf in lazy_rows"
        ) from err


def is_slices(node: object) -> bool:
    """Whether ``node`` is an ``IndexedSlices``: an ``is_leaf`` for trees that mix them in."""
    return isinstance(node, IndexedSlices)


def fit_to_table(
    slices: IndexedSlices, table_shape: tuple[int | None, ...] | None, name: str
) -> IndexedSlices:
    """Returns ``slices`` with the shape of the table, and int32 indices that are rows or padding.

    An index that is neither raises here if it can be read, that is outside ``jit``. Inside, the
    slice becomes padding: ``checkify`` reports it, and `count_invalid` counts it. Values stay as
    they are, those of padding too.

    Raises:
      TypeError: ``slices`` does not hold integer indices.
      ValueError: the row shape or row count differs from the table's, or an index is invalid.
    """
    slices = as_slices(slices, name)
    if table_shape is None or table_shape[0] is None:
        raise ValueError(
            f"params must be given where the row count is unknown, got {name} of shape "
            f"{table_shape}"
        )
    if slices.values.shape[1:] != table_shape[1:]:
        raise ValueError(
            f"{name} has rows of shape {slices.values.shape[1:]}, its table {table_shape[1:]}"
        )
    if slices.num_rows not in (None, table_shape[0]):
        raise ValueError(f"{name} has {slices.num_rows} rows, its table {table_shape[0]}")
    rows = table_shape[0]
    check_indices(slices, rows, name)
    indices, values = unshard(slices.indices), unshard(slices.values)
    is_row = (indices >= 0) & (indices < rows)
    return IndexedSlices(jnp.where(is_row, indices, rows).astype(jnp.int32), values, table_shape)


def is_invalid(slices: IndexedSlices, rows: int) -> jax.Array:
    """Which slices are neither padding nor a row of a table of ``rows`` rows: bool ``[n]``."""
    is_row = (slices.indices >= 0) & (slices.indices < rows)
    return ~is_row & (slices.indices != slices.padding_index)


def check_indices(slices: IndexedSlices, rows: int, name: str) -> None:
    """Raises ``ValueError`` outside ``jit``, and tells ``checkify`` inside, of invalid indices."""
    wrong = is_invalid(slices, rows)
    if isinstance(wrong, jax.core.Tracer):
        checkify.debug_check(~jnp.any(wrong), f"{name} has an index outside of its {rows} rows")
        return
    if np.any(wrong):
        ids = np.unique(np.asarray(slices.indices)[np.asarray(wrong)]).tolist()
        shown = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
        raise ValueError(
            f"{name} has indices outside of its table of {rows} rows: {shown}; rows are "
            f"0..{rows - 1} and {slices.padding_index} is padding"
        )


def add_update(table: jax.Array, update: IndexedSlices, name: str) -> jax.Array:
    """Returns ``table`` with the rows of ``update`` added, in place where it is donated.

    Raises:
      ValueError: ``update``, called ``name``, does not fit, or has invalid indices (outside jit).
    """
    update = fit_to_table(update, table.shape, name)
    return add_to_table(table, update.indices, update.values)
