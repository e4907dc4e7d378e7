"""``lazy_rows``: any row-separable optax transform, on the rows a gradient touches."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Hashable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef

from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._optimizers.catch_up import (
    CatchUpState,
    RestStep,
    catch_up_rows,
    check_can_catch_up,
    check_last_step,
    init_catch_up,
)
from jaxaccum._optimizers.optax_import import Transform, import_optax
from jaxaccum._optimizers.state_layout import (
    RowLayout,
    Trainee,
    lay_out_rows,
    struct,
    struct_of,
)
from jaxaccum._optimizers.trial import TrialFailedError, check_row_separable
from jaxaccum._optimizers.unique_leaf import UniqueRows, fit_updates
from jaxaccum._rows.cpu_workarounds import bound_indices
from jaxaccum._rows.indexed_slices import IndexedSlices, fit_to_table, is_slices
from jaxaccum._rows.row_arithmetic import gather_rows, scatter_rows
from jaxaccum._rows.row_major import warn_if_copied
from jaxaccum._rows.tree import Leaf, PyTree
from jaxaccum._rows.unique_rows import unique_rows, zero_padding

if TYPE_CHECKING:
    import optax  # type: ignore[import-untyped]

# From about this share of its rows on, a table is updated faster as a whole (for Adam on a CPU by
# benchmarks/cases/train_step.py). Tables of fewer entries take no time either way.
_DENSE_WINS, _LARGE_TABLE = 4, 2**20


def lazy_rows(
    tx: optax.GradientTransformation, *, catch_up: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Runs an optax transform on the touched rows of tables, and as it is on all other leaves.

    Leaves of the updates that are ``IndexedSlices`` are tables. Their rows are gathered from the
    parameters and from every leaf of the state that holds one entry a row, ``tx.update`` runs on
    that block, and the rows of the state are scattered back; what it would have done to the other
    rows waits until they are touched (a zero gradient touches too), and may then differ from the
    dense optimizer: Adam's moments do not decay while a row sleeps. With every row touched the
    results are those of ``tx``.

    This is right for transforms that are row-separable: the step of a row depends on that row's
    gradient, state and parameters and on what all rows share (a step count, a norm over the touched
    rows), not on other rows, nor on its position among them. Before its first use ``tx``
    is tried on a tiny table to see whether it is.

    The state is the one of ``tx``, so that checkpoints of both fit each other. A table is
    recognised in ``update``; give lookups of repeated rows as they come, they are summed first.

    Args:
      tx: a transform that treats rows apart: sgd, momentum, adagrad, rmsprop, adam, adamw, lion,
        yogi, clipping, schedules, and what ``chain``, ``masked``, ``partition`` and
        ``inject_hyperparams`` make of them. Norms over a gradient or an update run over its
        touched rows. Put ``lazy_rows`` outside of wrappers, and around every transform of a
        chain that sees sparse leaves: any other takes the row numbers in them for gradients.
      catch_up: let a row that is touched first catch up, in closed form, with the steps it slept
        through: moments decay, the parameter moves on by momentum and shrinks by decoupled weight
        decay, so that it follows the dense optimizer closely. Needs ``params`` in ``update``, an
        int32 a row of state (the state is then a `CatchUpState`), and a transform that does to rows
        without a gradient what can be put in closed form: sgd, momentum, adagrad, rmsprop, adam,
        adamw, lion.

    Returns:
      A transform over trees that mix ``IndexedSlices`` and arrays; sparse leaves stay sparse, for
      :func:`jaxaccum.apply_updates`.

    Raises:
      ImportError: optax is not installed.
      ValueError: while ``update`` is traced: ``tx`` couples the rows of a table (adafactor, lamb,
        lars, muon, shampoo, sm3), treats them by position, or cannot catch up; or updates, state
        and params do not fit together. Outside of ``jit``: an index is neither a row of its table
        nor padding. Inside ``jit`` such a slice is dropped; :func:`jaxaccum.count_invalid` counts
        them, and ``checkify`` reports them.
      TypeError: the indices of a sparse leaf are no integers.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> tx = jaxaccum.lazy_rows(optax.sgd(0.5, momentum=0.9))
      >>> params = {"table": jnp.ones((4, 1)), "bias": jnp.ones(1)}
      >>> state = tx.init(params)
      >>> grad = jaxaccum.IndexedSlices(jnp.array([2, 2]), jnp.array([[1.0], [1.0]]), (4, 1))
      >>> updates, state = tx.update({"table": grad, "bias": jnp.ones(1)}, state, params)
      >>> jaxaccum.apply_updates(params, updates)["table"].ravel()
      Array([1., 1., 0., 1.], dtype=float32)

    Source: ``LazyAdam`` of TensorFlow Addons and ``torch.optim.SparseAdam``, for any transform;
    catching up, Carpenter, "Lazy Sparse Stochastic Gradient Descent for Regularized Multinomial
    Logistic Regression" (2008).
    """
    optax = import_optax("lazy_rows")
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> PyTree:
        warn_if_copied(params, "params")
        state = inner.init(params)
        return init_catch_up(state, params) if catch_up else state

    return optax.GradientTransformationExtraArgs(init, LazyUpdate(inner, catch_up=catch_up))


def is_sparse(node: object) -> bool:
    """Whether ``node`` stands for the gradient of a table."""
    return isinstance(node, IndexedSlices | UniqueRows)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What depends on shapes only, found once: how the state of the transform is laid out."""

    layout: RowLayout
    is_counter: tuple[bool, ...] | None  # None: no catching up


@dataclasses.dataclass(frozen=True)
class _Block:
    """The touched rows of every table, with one update to be run on them."""

    tx: Transform
    treedef: PyTreeDef
    grads: list[Leaf]  # unique IndexedSlices for tables
    params: list[Leaf] | None
    tables: tuple[int, ...]
    plan: _Plan
    extra_args: dict[str, object]

    @property
    def rows(self) -> list[jax.Array]:
        """The touched rows of each table."""
        return [self.grads[t].indices for t in self.tables]

    def update(self, state: PyTree) -> tuple[list[Leaf], PyTree]:
        """Runs the transform; returns updates by leaf, dense in the rows, and the new state."""
        params = self._gather_params()
        if self.plan.is_counter is None:
            updates, new = self._run(self._gather(state), params)
            return updates, self._scatter(state, new)
        before, params, moved, last_step = self._catch_up_all(state, params)
        updates, new = self._run(before, params)
        for t, move in zip(self.tables, moved, strict=True):
            updates[t] = updates[t].astype(move.dtype) + move
        inner_state = self._scatter(state.inner_state, new)
        return updates, CatchUpState(inner_state, saturating_add(state.num_steps, 1), last_step)

    def _run(self, state: PyTree, params: list[Leaf] | None) -> tuple[list[Leaf], PyTree]:
        grads = [g.values if is_slices(g) else g for g in self.grads]
        updates, state = self.tx.update(
            jax.tree.unflatten(self.treedef, grads),
            state,
            None if params is None else jax.tree.unflatten(self.treedef, params),
            **self.extra_args,
        )
        return self.treedef.flatten_up_to(updates), state

    @jax.named_scope("jaxaccum.gather")
    def _gather_params(self) -> list[Leaf] | None:
        if self.params is None:
            return None
        pairs = zip(self.grads, self.params, strict=True)
        return [gather_rows(p, g.indices) if is_slices(g) else p for g, p in pairs]

    @jax.named_scope("jaxaccum.gather")
    def _gather(self, state: PyTree) -> PyTree:
        rows = self.rows
        return self.plan.layout.map_rows(lambda i, leaf: gather_rows(leaf, rows[i]), state)

    @jax.named_scope("jaxaccum.scatter")
    def _scatter(self, state: PyTree, new: PyTree) -> PyTree:
        # Shared leaves come from the new state, rows go back into the old one.
        rows = self.rows
        return self.plan.layout.map_rows(
            lambda i, old, block: scatter_rows(old, rows[i], block),
            state,
            new,
            shared=lambda _, leaf: leaf,
        )

    def _catch_up_all(
        self, state: CatchUpState, params: list[Leaf] | None
    ) -> tuple[PyTree, list[Leaf], list[jax.Array], PyTree]:
        """State and parameters as if the rows had never slept, how far they moved, and when."""
        if params is None:
            raise ValueError("params must be given to update with catch_up, got None")
        layout, is_counter = self.plan.layout, self.plan.is_counter
        now = saturating_add(state.num_steps, 1)
        before = layout.flatten(self._gather(state.inner_state))
        last, params = flatten_like(self.treedef, state.last_step), list(params)
        step = RestStep(
            self.tx, self.treedef, layout, is_counter or (), list(before),
            [jnp.zeros_like(g.values[:1] if is_slices(g) else g) for g in self.grads],
            [jnp.zeros_like(p[:1]) if i in self.tables else p for i, p in enumerate(params)],
            self.extra_args, 0, 0,
        )  # fmt: skip
        moved = []
        for owner, (t, rows) in enumerate(zip(self.tables, self.rows, strict=True)):
            missed = state.num_steps - gather_rows(last[t], rows)
            of_table = dataclasses.replace(step, table=t, owner=owner)
            new_rows, param = catch_up_rows(
                of_table, layout.rows_of(before, owner), params[t], missed
            )
            before = layout.with_rows(before, owner, new_rows)
            moved.append(param - params[t].astype(param.dtype))
            params[t] = param.astype(params[t].dtype)
            last[t] = scatter_rows(last[t], rows, jnp.broadcast_to(now, rows.shape))
        last = [
            leaf if i in self.tables else jnp.full_like(leaf, now) for i, leaf in enumerate(last)
        ]
        tree = jax.tree.unflatten(layout.treedef, before)
        return tree, params, moved, jax.tree.unflatten(self.treedef, last)


class LazyUpdate:
    """The ``update`` of ``lazy_rows``."""

    def __init__(self, tx: Transform, *, catch_up: bool) -> None:
        self._tx = tx
        self._catch_up = catch_up
        self._plans: dict[Hashable, _Plan] = {}
        self._told: set[tuple[str, int]] = set()

    def __call__(
        self, updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: object
    ) -> tuple[PyTree, PyTree]:
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_sparse)
        tables = tuple(i for i, leaf in enumerate(leaves) if is_sparse(leaf))
        if not tables and not self._catch_up:
            return self._tx.update(updates, state, params, **extra_args)
        param_leaves = None if params is None else flatten_like(treedef, params)
        grads = list(leaves)
        for t in tables:
            name = f"updates{_path(treedef, t)}"
            grads[t] = _fit(leaves[t], None if param_leaves is None else param_leaves[t], name)
            self._advise(name, grads[t])
        shapes = [
            struct(u.dense_shape, u.values.dtype) if is_slices(u) else struct_of(u) for u in grads
        ]
        if param_leaves is not None:
            shapes = [struct_of(p) for p in param_leaves]
        plan = self._plan(treedef, shapes, tables, extra_args)
        if self._catch_up:
            check_last_step(state, treedef, {t: shapes[t].shape[:1] for t in tables})
        plan.layout.check(state.inner_state if self._catch_up else state)
        block = _Block(self._tx, treedef, grads, param_leaves, tables, plan, extra_args)
        steps, state = block.update(state)
        for t in tables:
            slices = dataclasses.replace(grads[t], values=steps[t])
            steps[t] = UniqueRows(slices) if isinstance(leaves[t], UniqueRows) else slices
        return fit_updates(jax.tree.unflatten(treedef, steps), updates), state

    def check(self, params: PyTree, is_table: PyTree) -> None:
        """Raises as the first update of ``params`` would, with the tables known beforehand."""
        leaves, treedef = jax.tree.flatten(params)
        tables = tuple(i for i, chosen in enumerate(jax.tree.leaves(is_table)) if chosen)
        with contextlib.suppress(TrialFailedError):  # it may need arguments only update gets
            self._plan(treedef, [struct_of(p) for p in leaves], tables, {})

    def _advise(self, name: str, grad: IndexedSlices) -> None:
        shape, size = grad.dense_shape, grad.indices.size
        is_large = math.prod(map(int, shape or ())) >= _LARGE_TABLE  # type: ignore[arg-type]
        if is_large and _DENSE_WINS * size >= grad.padding_index and (name, size) not in self._told:
            self._told.add((name, size))
            warnings.warn(
                f"{name} may touch {size} of {grad.padding_index} rows: if more than one in "
                f"{_DENSE_WINS} rows is touched, a dense gradient and plain optax are faster",
                stacklevel=3,
            )

    def _plan(
        self,
        treedef: PyTreeDef,
        shapes: list[Leaf],
        tables: tuple[int, ...],
        extra_args: dict[str, object],
    ) -> _Plan:
        key = (treedef, tables, tuple((s.shape, s.dtype) for s in shapes), tuple(extra_args))
        if key not in self._plans:
            trainee = Trainee(self._tx, shapes, treedef, tables, extra_args)
            layout = lay_out_rows(trainee)
            if tables:
                check_row_separable(trainee)
            is_counter = check_can_catch_up(trainee) if self._catch_up else None
            self._plans[key] = _Plan(layout, is_counter)
        return self._plans[key]


def _fit(leaf: IndexedSlices | UniqueRows, param: Leaf, name: str) -> IndexedSlices:
    if not isinstance(leaf, UniqueRows):
        shape = leaf.dense_shape if param is None else param.shape
        return unique_rows(zero_padding(fit_to_table(leaf, shape, name)))
    shape = leaf.slices.dense_shape
    if param is not None and param.shape != shape:
        raise ValueError(f"{name} has shape {shape}, its table {param.shape}")
    indices = bound_indices(leaf.slices.indices, leaf.slices.padding_index)
    return dataclasses.replace(leaf.slices, indices=indices)


def flatten_like(treedef: PyTreeDef, params: PyTree) -> list[Leaf]:
    """Returns the leaves of ``params``, whose tree must be that of the updates."""
    leaves, params_treedef = jax.tree.flatten(params)
    if params_treedef != treedef:
        raise ValueError(
            f"updates and params must be trees alike, got {treedef} and {params_treedef}"
        )
    return leaves


def _path(treedef: PyTreeDef, position: int) -> str:
    numbered = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    path, _ = jax.tree_util.tree_leaves_with_path(numbered)[position]
    return jax.tree_util.keystr(path)
