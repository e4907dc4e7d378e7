"""``lazy_rows``: any row-separable optax transform, on the rows a gradient touches."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax

from jaxaccum._optax import import_optax
from jaxaccum._row_layout import RowLayout, row_layout, struct, struct_of
from jaxaccum._row_separable import TrialFailedError, check_row_separable
from jaxaccum._slices import IndexedSlices
from jaxaccum._unique_rows import fit_to_table, gather_rows, is_slices, scatter_rows, unique_rows

if TYPE_CHECKING:
    import optax  # type: ignore[import-untyped]

PyTree = Any


def lazy_rows(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs an optax transform on the touched rows of tables, and as it is on all other leaves.

    Leaves of the updates that are ``IndexedSlices`` are tables. Their rows are gathered from the
    parameters and from every leaf of the state that holds one entry a row, ``tx.update`` runs on
    that block, and the rows of the state are scattered back; what it would have done to the other
    rows waits until they are touched (a zero gradient touches too), and may then differ from the
    dense optimizer: Adam's moments do not decay while a row sleeps. With every row touched the
    results are those of ``tx``.

    The state is the one of ``tx``, so that checkpoints of both fit each other. A table is
    recognised in ``update``; give lookups of repeated rows as they come, they are summed first.

    Args:
      tx: a transform that treats rows apart: sgd, momentum, adagrad, rmsprop, adam, adamw, lion,
        yogi, clipping, schedules, and what ``chain``, ``masked``, ``partition`` and
        ``inject_hyperparams`` make of them. Norms over a gradient or an update run over its
        touched rows. Put ``lazy_rows`` outside of wrappers, and around every transform of a
        chain that sees sparse leaves.

    Returns:
      A transform over trees that mix ``IndexedSlices`` and arrays; sparse leaves stay sparse, for
      :func:`jaxaccum.apply_updates`.

    Raises:
      ImportError: optax is not installed.
      ValueError: while ``update`` is traced: ``tx`` couples the rows of a table (adafactor, lamb,
        lars, muon, shampoo, sm3), or updates, state and params do not fit together.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> tx = jaxaccum.lazy_rows(optax.sgd(0.5, momentum=0.9))
      >>> params = {"table": jnp.ones((4, 1)), "bias": jnp.ones(1)}
      >>> state = tx.init(params)
      >>> grad = jaxaccum.IndexedSlices(jnp.array([2, 2]), jnp.array([[1.0], [1.0]]), (4, 1))
      >>> updates, state = tx.update({"table": grad, "bias": jnp.ones(1)}, state, params)
      >>> jaxaccum.apply_updates(params, updates)["table"].ravel()
      Array([1., 1., 0., 1.], dtype=float32)
    """
    optax = import_optax("lazy_rows")
    inner = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(inner.init, LazyUpdate(inner))


@dataclasses.dataclass(frozen=True)
class UniqueRows:
    """An ``IndexedSlices`` known to hold every row once, as one opaque leaf of a tree.

    ``accumulate`` hands these to its inner transform: ``lazy_rows`` need not look for duplicates,
    and a transform that does not know them fails instead of treating indices as parameters.
    """

    slices: IndexedSlices


def is_sparse(node: object) -> bool:
    """Whether ``node`` stands for the gradient of a table."""
    return isinstance(node, IndexedSlices | UniqueRows)


@dataclasses.dataclass(frozen=True)
class _Block:
    """One update: the touched rows of every table, and how the state follows them."""

    treedef: Any
    leaves: list[Any]  # updates; unique IndexedSlices for tables
    params: list[Any] | None
    tables: tuple[int, ...]
    opaque: tuple[bool, ...]
    layout: RowLayout

    def update(self, tx: Any, state: PyTree, extra_args: dict[str, Any]) -> tuple[PyTree, PyTree]:
        rows = [self.leaves[t].indices for t in self.tables]
        block_state = self.layout.map_rows(lambda i, leaf: gather_rows(leaf, rows[i]), state)
        updates, new_state = tx.update(
            self._tree(self.leaves, lambda _, grad: grad.values),
            block_state,
            None
            if self.params is None
            else self._tree(self.params, lambda i, table: gather_rows(table, rows[i])),
            **extra_args,
        )
        # Shared leaves come from the new state, rows go back into the old one.
        state = self.layout.map_rows(
            lambda i, old, new: scatter_rows(old, rows[i], new),
            state,
            new_state,
            shared=lambda _, new: new,
        )
        return self._emit(updates), state

    def _tree(self, leaves: list[Any], of_table: Callable[[int, Any], Any]) -> PyTree:
        leaves = list(leaves)
        for i, t in enumerate(self.tables):
            leaves[t] = of_table(i, leaves[t])
        return jax.tree.unflatten(self.treedef, leaves)

    def _emit(self, updates: PyTree) -> PyTree:
        leaves = self.treedef.flatten_up_to(updates)
        for t, opaque in zip(self.tables, self.opaque, strict=True):
            slices = dataclasses.replace(self.leaves[t], values=leaves[t])
            leaves[t] = UniqueRows(slices) if opaque else slices
        return jax.tree.unflatten(self.treedef, leaves)


class LazyUpdate:
    """The ``update`` of ``lazy_rows``; what only depends on shapes is found once and kept."""

    def __init__(self, tx: Any) -> None:
        self._tx = tx
        self._layouts: dict[Any, RowLayout] = {}

    def __call__(
        self, updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_sparse)
        tables = tuple(i for i, leaf in enumerate(leaves) if is_sparse(leaf))
        if not tables:
            return cast(
                "tuple[PyTree, PyTree]", self._tx.update(updates, state, params, **extra_args)
            )
        param_leaves = None if params is None else flatten_like(treedef, params)
        opaque = tuple(isinstance(leaves[t], UniqueRows) for t in tables)
        for t in tables:
            name = f"updates{_path(treedef, t)}"
            leaves[t] = _fit(leaves[t], None if param_leaves is None else param_leaves[t], name)
        shapes = [
            struct(u.dense_shape, u.values.dtype) if is_slices(u) else struct_of(u) for u in leaves
        ]
        if param_leaves is not None:
            shapes = [struct_of(p) for p in param_leaves]
        layout = self._layout(treedef, shapes, tables, extra_args)
        block = _Block(treedef, leaves, param_leaves, tables, opaque, layout)
        return block.update(self._tx, state, extra_args)

    def check(self, params: PyTree, is_table: PyTree) -> None:
        """Raises as the first update of ``params`` would, with the tables known beforehand."""
        leaves, treedef = jax.tree.flatten(params)
        tables = tuple(i for i, chosen in enumerate(jax.tree.leaves(is_table)) if chosen)
        if tables:
            with contextlib.suppress(TrialFailedError):  # it may need arguments only update gets
                self._layout(treedef, [struct_of(p) for p in leaves], tables, {})

    def _layout(
        self,
        treedef: Any,
        shapes: list[Any],
        tables: tuple[int, ...],
        extra_args: dict[str, Any],
    ) -> RowLayout:
        key = (treedef, tables, tuple((s.shape, s.dtype) for s in shapes), tuple(extra_args))
        if key not in self._layouts:
            layout = row_layout(self._tx, shapes, treedef, tables)
            check_row_separable(self._tx, shapes, treedef, tables, extra_args)
            self._layouts[key] = layout
        return self._layouts[key]


def _fit(leaf: IndexedSlices | UniqueRows, param: Any, name: str) -> IndexedSlices:
    slices = leaf.slices if isinstance(leaf, UniqueRows) else leaf
    shape = slices.dense_shape if param is None else param.shape
    slices = fit_to_table(slices, shape, name)
    return slices if isinstance(leaf, UniqueRows) else unique_rows(slices)


def flatten_like(treedef: Any, params: PyTree) -> list[Any]:
    """Returns the leaves of ``params``, whose tree must be that of the updates."""
    leaves, params_treedef = jax.tree.flatten(params)
    if params_treedef != treedef:
        raise ValueError(
            f"updates and params must be trees alike, got {treedef} and {params_treedef}"
        )
    return leaves


def _path(treedef: Any, position: int) -> str:
    numbered = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    path, _ = jax.tree_util.tree_leaves_with_path(numbered)[position]
    return jax.tree_util.keystr(path)
