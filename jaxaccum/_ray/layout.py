"""Which shard has what: rows of tables in ranges, dense leaves whole; gradients cut accordingly.

Everything here is NumPy and runs in the worker, so that each shard is sent what is its own::

    rows      0 ........ 33 | 34 ........ 66 | 67 ....... 99
    shard           0       |        1       |       2
    gradient  [70 3 40 4]   ->  [3 4]  [40]-34  [70]-67

"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._optimizers.state_layout import struct
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.tables import Tables, select_tables
from jaxaccum._rows.tree import Leaf, PyTree

Part = dict[int, Leaf]
"""What goes to one shard: by position of the leaf, an array, or ids and values of rows."""


@dataclasses.dataclass(frozen=True)
class TableInit:
    """A table that no process ever holds whole: each shard makes its own rows.

    Attributes:
      shape: of the whole table, ``(rows, *row)``.
      dtype: of its entries.
      init: ``init(start, stop)`` returns rows ``[stop - start, *row]``; it travels to the shards.

    Example:
      >>> import jax.numpy as jnp, jaxaccum.ray
      >>> table = jaxaccum.ray.TableInit(
      ...     (10**9, 64), jnp.float32, lambda start, stop: jnp.zeros((stop - start, 64)))
      >>> table.shape
      (1000000000, 64)
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    init: Callable[[int, int], Leaf]

    @property
    def ndim(self) -> int:
        """Its rank."""
        return len(self.shape)


TableInit.__module__ = "jaxaccum.ray"


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """Where one leaf lives.

    Attributes:
      path: what it is called in errors.
      shape, dtype: of the whole.
      is_table: whether it lies in ranges of rows.
      bounds: shard ``k`` has rows ``bounds[k]`` to ``bounds[k + 1]``; of a dense leaf, that one
        has all which has any.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    is_table: bool
    bounds: tuple[int, ...]

    @property
    def owner(self) -> int:
        """The shard that has a dense leaf."""
        return self.bounds.index(1) - 1

    def start_stop(self, shard: int) -> tuple[int, int]:
        """The rows of a shard."""
        return self.bounds[shard], self.bounds[shard + 1]

    def route(self, ids: np.ndarray) -> list[np.ndarray]:
        """The positions in ``ids`` whose rows are those of each shard; of padding, none."""
        if len(self.bounds) == 2 and (ids.size == 0 or ids.max() < self.bounds[1]):
            return [np.arange(ids.size)]
        owner = np.searchsorted(self.bounds[1:], ids, side="right")
        return [np.flatnonzero(owner == shard) for shard in range(len(self.bounds) - 1)]

    def as_ids(self, ids: Leaf) -> np.ndarray:
        """Returns row numbers that somebody asks for, or raises."""
        array = np.asarray(ids)
        if array.size == 0 and not hasattr(ids, "dtype"):  # an empty list has no dtype of its own
            array = array.astype(np.int32)
        self.check_ids(array, self.shape[0], "ids")
        return array

    def check_ids(self, ids: np.ndarray, padding: int, name: str) -> None:
        """Raises unless each is a row or padding."""
        if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 1:
            raise InvalidArgumentError(
                f"{name}{self.path} must be integers of rank 1, got {ids.dtype} {ids.shape}"
            )
        wrong = ((ids < 0) | (ids >= self.shape[0])) & (ids != padding)
        if wrong.any():
            raise InvalidArgumentError(
                f"{name}{self.path} has row {ids[wrong][0]} of a table of {self.shape[0]} rows"
            )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where all leaves live.

    Attributes:
      leaves: in the order of the flattened tree.
      num_shards: how many there are.
    """

    leaves: tuple[LeafLayout, ...]
    num_shards: int

    @classmethod
    def of(cls, params: PyTree, tables: Tables, num_shards: int) -> Layout:
        """Cuts tables evenly; a dense leaf goes to the shard that has least so far."""
        # What is selected must look like arrays, which is all that is asked of them.
        shapes = jax.tree.map(lambda x: struct(x.shape, x.dtype), params)
        chosen = jax.tree.leaves(select_tables(tables, shapes))
        load, leaves = [0] * num_shards, []
        paths = jax.tree_util.tree_leaves_with_path(shapes)
        for (path, leaf), is_table in zip(paths, chosen, strict=True):
            if is_table:
                bounds = tuple(leaf.shape[0] * k // num_shards for k in range(num_shards + 1))
            else:
                owner = load.index(min(load))
                load[owner] += math.prod(leaf.shape) * leaf.dtype.itemsize
                bounds = tuple(int(k > owner) for k in range(num_shards + 1))
            name = jax.tree_util.keystr(path)
            if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
                raise TypeError(f"params{name} of {leaf.dtype} needs jax_enable_x64")
            leaves.append(LeafLayout(name, leaf.shape, leaf.dtype, is_table, bounds))
        return cls(tuple(leaves), num_shards)

    def owned(self, shard: int) -> list[int]:
        """The leaves of which a shard has something."""
        spans = [leaf.start_stop(shard) for leaf in self.leaves]
        return [i for i, (start, stop) in enumerate(spans) if start < stop]

    def split_params(self, params: Sequence[Leaf], shard: int) -> Part:
        """What a shard starts from: arrays, or what makes them there."""
        part: Part = {}
        for i in self.owned(shard):
            leaf, (start, stop) = params[i], self.leaves[i].start_stop(shard)
            if isinstance(leaf, TableInit):
                part[i] = leaf
            else:
                part[i] = np.asarray(leaf[start:stop] if self.leaves[i].is_table else leaf)
        return part

    def split_gradient(self, grads: Sequence[Leaf]) -> list[Part]:
        """Cuts a gradient, or raises and says which leaf does not fit and why."""
        parts: list[Part] = [{} for _ in range(self.num_shards)]
        for i, (grad, leaf) in enumerate(zip(grads, self.leaves, strict=True)):
            if not leaf.is_table:
                parts[leaf.owner][i] = _as_dense(grad, leaf)
                continue
            ids, values = _as_rows(grad, leaf)
            for shard, where in enumerate(leaf.route(ids)):
                if where.size == ids.size:
                    parts[shard][i] = (ids - leaf.bounds[shard], values)
                elif where.size:
                    parts[shard][i] = (ids[where] - leaf.bounds[shard], values[where])
        return parts

    def __str__(self) -> str:
        """Says it in a line, for those who disagree."""
        kinds = [f"{x.path or 'params'} {x.dtype}{list(x.shape)}{' table' * x.is_table}"
                 for x in self.leaves]  # fmt: skip
        return f"{', '.join(kinds)}, {self.num_shards} shards"


def _as_rows(grad: Leaf, leaf: LeafLayout) -> tuple[np.ndarray, np.ndarray]:
    name = f"grads{leaf.path}"
    if not isinstance(grad, IndexedSlices):
        raise InvalidArgumentError(f"{name} must be an IndexedSlices, got {type(grad).__name__}")
    ids, values = np.asarray(grad.indices), np.asarray(grad.values)
    if values.dtype != leaf.dtype or values.shape != (*ids.shape, *leaf.shape[1:]):
        raise InvalidArgumentError(
            f"{name} must be rows {leaf.dtype}{list(leaf.shape[1:])}, one an index, got "
            f"{values.dtype}{list(values.shape)} for {list(ids.shape)} indices"
        )
    if grad.num_rows not in (None, leaf.shape[0]):
        raise InvalidArgumentError(f"{name} has {grad.num_rows} rows, its table {leaf.shape[0]}")
    leaf.check_ids(ids, grad.padding_index, "grads")
    return ids.astype(np.int32, copy=False), values


def _as_dense(grad: Leaf, leaf: LeafLayout) -> np.ndarray:
    if isinstance(grad, IndexedSlices):
        raise InvalidArgumentError(f"grads{leaf.path} must be an array, got an IndexedSlices")
    array = np.asarray(grad)
    if array.dtype != leaf.dtype or array.shape != leaf.shape:
        raise InvalidArgumentError(
            f"grads{leaf.path} must be {leaf.dtype}{list(leaf.shape)}, got "
            f"{array.dtype}{list(array.shape)}"
        )
    return array
