"""Which leaf of a tree lies where: trees as users have them, leaves as the coordinator has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.state import Reduction, init
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._coordinator.host_gradient import HostGradient, assemble, check_dense, check_rows
from jaxaccum._coordinator.policy import Policy
from jaxaccum._coordinator.spec import DenseSpec, Spec, TreeSpec
from jaxaccum._rows.indexed_slices import IndexedSlices, is_slices
from jaxaccum._rows.tables import Tables, select_tables
from jaxaccum._rows.tree import PyTree

_Kind = TypeVar("_Kind", bound=Spec)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tables and dense leaves of a tree.

    Attributes:
      spec: what they are.
      tables, dense: what each is, and its place among the leaves of the tree.
      paths: how errors call the leaves of the tree.
      copies: whether NumPy arrays of gradients are copied, for their owner may write to them.
    """

    spec: TreeSpec
    tables: tuple[tuple[Spec, int], ...]
    dense: tuple[tuple[DenseSpec, int], ...]
    paths: tuple[str, ...]
    copies: bool = True

    def read(self, spec: TreeSpec, sharding: jax.sharding.Sharding, grads: PyTree) -> HostGradient:
        """Checks all leaves of a gradient."""
        try:
            leaves = spec.structure.flatten_up_to(grads)
        except ValueError as error:
            raise InvalidArgumentError(
                f"grads must be a tree like the accumulator: {error}"
            ) from None
        tables, dense, place = [], [], 0
        try:
            for table, place in self.tables:
                tables.append(_check_table(table, leaves[place]))
            for leaf, place in self.dense:
                dense.append(_check_dense(leaf, leaves[place]))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"grads{self.paths[place]}: {error}") from None
        return assemble(spec, sharding, tables, dense, copies=self.copies)

    def join(self, tables: list[IndexedSlices], dense: list[jax.Array]) -> PyTree:
        """Returns the tree of what was taken."""
        leaves: list[Any] = [None] * len(self.paths)
        for (_, place), leaf in zip((*self.tables, *self.dense), (*tables, *dense), strict=True):
            leaves[place] = leaf
        return jax.tree.unflatten(self.spec.structure, leaves)


def _check_table(spec: Spec, leaf: Any) -> tuple[np.ndarray, np.ndarray | jax.Array, int]:
    if not isinstance(leaf, IndexedSlices):
        raise InvalidArgumentError(
            f"must be an IndexedSlices, for it is a table; got {type(leaf).__name__}"
        )
    shape, padding = None, spec.padding
    if leaf.dense_shape != spec.shape:
        shape, padding = leaf.dense_shape, leaf.padding_index
    rows = check_rows(spec, leaf.indices, leaf.values, shape, padding)
    row_shape = rows[1].shape[1:]
    if row_shape != spec.row_shape:
        spec.check_row(row_shape, spec.row_shape)
    return rows


def _check_dense(spec: DenseSpec, leaf: Any) -> np.ndarray | jax.Array:
    if isinstance(leaf, IndexedSlices):
        raise InvalidArgumentError("must be an array, for it is no table; got an IndexedSlices")
    return check_dense(spec, leaf)


def make_layout(
    like: PyTree, tables: Tables | None, capacity: PyTree, reduction: Reduction, policy: Policy
) -> tuple[Layout, Sequence[int | None]]:
    """Makes sense of a constructor's arguments; also returns the capacities of the tables."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if tables is None:
        selected = jax.tree.map(is_slices, like, is_leaf=is_slices)
    else:
        selected = select_tables(tables, like)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_slices)
    if not leaves:
        raise ValueError("like must have leaves, got a tree of none")
    tables, dense = [], []
    for i, ((_, leaf), is_table) in enumerate(zip(leaves, jax.tree.leaves(selected), strict=True)):
        if is_table:
            tables.append((_spec_of(Spec, leaf, reduction, policy), i))
        else:
            dense.append((_spec_of(DenseSpec, leaf, reduction, policy), i))
    spec = TreeSpec(
        tuple(each for each, _ in tables),
        tuple(each for each, _ in dense),
        tuple(_name(leaves[place][0]) for _, place in (*tables, *dense)),
        policy,
        structure,
    )
    paths = tuple(jax.tree_util.keystr(path) for path, _ in leaves)
    capacities = _capacities(capacity, structure)
    layout = Layout(spec, tuple(tables), tuple(dense), paths)
    return layout, [capacities[place] for _, place in tables]


def _name(path: Any) -> str:
    text = jax.tree_util.keystr(path, simple=True, separator="/")
    return f"{text}/" if text else ""


def _spec_of(kind: type[_Kind], leaf: Any, reduction: Reduction, policy: Policy) -> _Kind:
    if is_slices(leaf):
        rows = leaf.dense_shape[0] if leaf.dense_shape else None
        shape, dtype = (rows, *leaf.values.shape[1:]), leaf.values.dtype
    else:
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if policy.staleness_weight is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"staleness_weight needs floating-point or complex leaves, got {dtype}")
    state = init((1,), dtype, capacity=1)
    return kind(state.dtype, shape, reduction, state.values.dtype)


def _capacities(capacity: PyTree, structure: Any) -> list[int | None]:
    def is_none(node: object) -> bool:
        return node is None

    leaves = jax.tree.unflatten(structure, [0] * structure.num_leaves)
    try:
        given = jax.tree.broadcast(capacity, leaves, is_leaf=is_none)
    except ValueError as error:
        raise ValueError(f"capacity must match like or be a prefix of it: {error}") from None
    return jax.tree.leaves(given, is_leaf=is_none)
