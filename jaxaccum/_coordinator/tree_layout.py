"""Which leaf of a tree lies where: trees as users have them, leaves as the coordinator has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.state import Reduction, init
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._coordinator.host_gradient import HostGradient, assemble, check_dense, check_rows
from jaxaccum._coordinator.policy import Policy
from jaxaccum._coordinator.spec import DenseSpec, Spec, TreeSpec
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.tables import Tables, select_tables
from jaxaccum._rows.tree import PyTree
from jaxaccum._rows.unique_rows import is_slices


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tables and dense leaves of a tree.

    Attributes:
      spec: what they are.
      places: where they stand among the leaves of the tree.
      paths: how errors call them.
    """

    spec: TreeSpec
    places: tuple[int, ...]
    paths: tuple[str, ...]

    def read(self, spec: TreeSpec, sharding: jax.sharding.Sharding, grads: PyTree) -> HostGradient:
        """Checks all leaves of a gradient."""
        try:
            leaves = spec.structure.flatten_up_to(grads)
        except ValueError as error:
            raise InvalidArgumentError(
                f"grads must be a tree as the accumulator is of: {error}"
            ) from None
        tables, dense = [], []
        i = 0
        try:
            for i, place in enumerate(self.places):
                leaf = leaves[place]
                if i < len(spec.tables):
                    tables.append(_check_table(spec.tables[i], leaf))
                else:
                    dense.append(_check_dense(spec.dense[i - len(spec.tables)], leaf))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"grads{self.paths[i]}: {error}") from None
        return assemble(spec, sharding, tables, dense)

    def join(self, tables: list[IndexedSlices], dense: list[jax.Array]) -> PyTree:
        """Returns the tree of what was taken."""
        leaves: list[Any] = [None] * len(self.places)
        for place, leaf in zip(self.places, [*tables, *dense], strict=True):
            leaves[place] = leaf
        return jax.tree.unflatten(self.spec.structure, leaves)


def _check_table(spec: Spec, leaf: Any) -> tuple[np.ndarray, np.ndarray | jax.Array]:
    if not isinstance(leaf, IndexedSlices):
        raise InvalidArgumentError(
            f"a table's gradient must be an IndexedSlices, got {type(leaf).__name__}"
        )
    shape = leaf.dense_shape if leaf.dense_shape != spec.shape else None
    rows = check_rows(spec, leaf.indices, leaf.values, shape, leaf.padding_index)
    if rows[1].shape[1:] != spec.row_shape:
        spec.check_row(rows[1].shape[1:], spec.row_shape)
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
    paths, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_slices)
    if not paths:
        raise ValueError("like must have leaves, got a tree of none")
    is_table = jax.tree.leaves(selected)
    places = sorted(range(len(paths)), key=lambda place: not is_table[place])
    specs = [_spec_of(leaf, is_table[i], reduction, policy) for i, (_, leaf) in enumerate(paths)]
    num_tables = sum(is_table)
    keystr = jax.tree_util.keystr
    spec = TreeSpec(
        tuple(specs[place] for place in places[:num_tables]),
        tuple(specs[place] for place in places[num_tables:]),  # type: ignore[misc]
        tuple(_name(paths[place][0]) for place in places),
        policy,
        structure,
    )
    given = _capacities(capacity, structure)
    layout = Layout(spec, tuple(places), tuple(keystr(paths[place][0]) for place in places))
    return layout, [given[place] for place in places[:num_tables]]


def _name(path: Any) -> str:
    text = jax.tree_util.keystr(path, simple=True, separator="/")
    return f"{text}/" if text else ""


def _spec_of(leaf: Any, is_table: bool, reduction: Reduction, policy: Policy) -> Spec:
    if is_slices(leaf):
        rows = leaf.dense_shape[0] if leaf.dense_shape else None
        shape, dtype = (rows, *leaf.values.shape[1:]), leaf.values.dtype
    else:
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if policy.staleness_weight is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"staleness_weight needs floating-point or complex leaves, got {dtype}")
    state = init((1,), dtype, capacity=1)
    kind = Spec if is_table else DenseSpec
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
