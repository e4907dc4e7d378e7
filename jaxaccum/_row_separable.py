"""Which optax transforms can run on a few rows of a table: shapes first, then a trial run.

A transform is opaque, so it is tried. Its state is laid out for tables of two sizes without
allocating either: a leaf whose leading axis follows the row count of a table is held by row, one
that stays is shared by all rows, anything else cannot be cut into rows. Then a tiny table is
trained for a few steps and three things must hold, each of which a known family breaks:

* what is shared must not depend on the rows a step does not touch (statistics over all rows);
* nor must the step of a touched row depend on the parameters of untouched rows, or on there being
  any (trust ratios, parameter norms, means over the table);
* permuting the entries within one row, which changes no norm, must leave other rows alone
  (orthogonalisation, Kronecker factors, column statistics).

What passes may still couple touched rows by norms of their gradients or updates, as clipping by
the global norm does: untouched rows have zeros there, so the touched ones are enough.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

PyTree = Any

# Rows of the trial table: two that every step touches, one that sleeps in the last step after
# having been touched, and one of zeros like the padding of a block.
_TOUCHED, _ASLEEP, _PADDING = slice(0, 2), slice(2, 3), slice(3, 4)
_TRIAL_ROWS, _HISTORY = 4, 4
# The coupling looked for is a factor, rounding is not: anything between tells them apart.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How a transform's state follows the rows of the tables.

    Attributes:
      owners: for every leaf of the state the position of the table it follows, or ``None``.
      treedef: the structure of the state.
    """

    owners: tuple[int | None, ...]
    treedef: Any

    def map_rows(
        self, fun: Callable[..., Any], state: PyTree, *rest: PyTree, shared: Any = None
    ) -> PyTree:
        """Applies ``fun(owner, leaf, *rest)`` to leaves held by row, ``shared`` to all others."""
        others = [self.flatten(tree) for tree in rest]
        leaves = [
            (shared(*args) if shared else args[0]) if owner is None else fun(owner, *args)
            for owner, *args in zip(self.owners, self.flatten(state), *others, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def flatten(self, state: PyTree) -> list[Any]:
        """Returns the leaves of ``state``, which must be one that this transform made."""
        leaves, treedef = jax.tree.flatten(state)
        if treedef != self.treedef:
            raise ValueError(
                "state must be what init returned for these params, got the structure "
                f"{treedef}, expected {self.treedef}"
            )
        return leaves


def row_layout(tx: Any, params: list[Any], treedef: Any, tables: tuple[int, ...]) -> RowLayout:
    """Lays out the state of ``tx`` for params of these shapes, without computing anything.

    Args:
      tx: the transform.
      params: one ``ShapeDtypeStruct`` a leaf.
      treedef: the structure of the params.
      tables: the positions among ``params`` that are tables.

    Raises:
      ValueError: the state cannot be cut into rows.
    """
    small, rows_of = list(params), {}
    for position, table in enumerate(tables):
        rows, *row = params[table].shape
        few = 1 + position  # tells the tables apart, and from the true row count
        few += len(tables) if few == rows else 0
        rows_of[few] = (position, rows)
        small[table] = struct((few, *row), params[table].dtype)
    state = jax.eval_shape(tx.init, jax.tree.unflatten(treedef, params))
    if any(map(_is_multi_steps, jax.tree.leaves(state, is_leaf=_is_multi_steps))):
        raise _refusal(
            "optax.MultiSteps keeps its sums as rows that only emit when they are touched again; "
            "use jaxaccum.accumulate"
        )
    state_treedef: Any
    whole, state_treedef = jax.tree_util.tree_flatten_with_path(state)
    part, part_treedef = jax.tree.flatten(
        jax.eval_shape(tx.init, jax.tree.unflatten(treedef, small))
    )
    if part_treedef != state_treedef:
        raise _refusal("the structure of its state depends on the number of rows")
    owners = tuple(
        _owner(path, leaf.shape, other.shape, rows_of)
        for (path, leaf), other in zip(whole, part, strict=True)
    )
    return RowLayout(owners, state_treedef)


def _is_multi_steps(node: object) -> bool:
    return type(node).__name__ == "MultiStepsState"


def _owner(
    path: Any, whole: tuple[int, ...], part: tuple[int, ...], rows_of: Mapping[int, tuple[int, int]]
) -> int | None:
    if whole == part:
        return None
    position, rows = rows_of.get(part[0], (-1, -1)) if part else (-1, -1)
    if position >= 0 and whole == (rows, *part[1:]):
        return position
    raise _refusal(
        f"its state{jax.tree_util.keystr(path)} of shape {whole} does not hold one entry a row "
        "(as in adafactor's factored moments)"
    )


def check_row_separable(
    tx: Any,
    params: list[Any],
    treedef: Any,
    tables: tuple[int, ...],
    extra_args: Mapping[str, Any],
) -> None:
    """Tries ``tx`` on a tiny table and raises if rows cannot be updated apart from each other.

    Arguments as in :func:`row_layout`; ``extra_args`` go to ``update``, arrays among them as ones.

    Raises:
      ValueError: the transform couples rows; the message says how.
    """
    trial = _Trial(tx, params, treedef, tables, extra_args)
    for scale in (1e-2, 1e2):  # thresholds, as in clipping, act on one side only
        try:
            compact, whole, fresh, mixed = run_now(functools.partial(trial.outcomes, scale))
        except (TypeError, ValueError) as err:
            reason = f"it fails on two rows of a table of {_TRIAL_ROWS}: {err}"
            raise TrialFailedError(str(_refusal(reason))) from err
        if not _agree(compact["shared"], whole["shared"]):
            raise _refusal(
                "it keeps a statistic over all rows of the table, also those the gradient does "
                "not touch (as in prodigy or dog)"
            )
        if not _agree(compact, fresh):
            raise _refusal(
                "the step of a row depends on rows the gradient does not touch (as in lamb and "
                "lars, whose trust ratio is a norm of the whole table, in adafactor and in muon)"
            )
        if not _agree(_first_row(whole), _first_row(mixed)):
            raise _refusal(
                "it mixes the entries of different rows (as in muon, shampoo, or sm3's columns)"
            )


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"tx must be row-separable, but {reason}. Give the tables a transform of their own by "
        "optax.partition, or keep their gradients dense"
    )


class TrialFailedError(ValueError):
    """The transform could not even be tried."""


class _Trial:
    """A tiny table trained for three steps, in the variants that are compared."""

    def __init__(
        self, tx: Any, params: list[Any], treedef: Any, tables: tuple[int, ...], extra_args: Any
    ) -> None:
        self.tx, self.treedef, self.tables = tx, treedef, tables
        self.params = [_shrunk(p, i in tables) for i, p in enumerate(params)]
        self.extra_args = stand_ins(extra_args)
        self.layout = row_layout(tx, self.params, treedef, tables)

    def outcomes(self, scale: float) -> tuple[Any, Any, Any, Any]:
        """The last step on the touched rows alone, on all rows in two variants, and permuted."""
        state = self._history(scale, permuted=False)
        touched = self.layout.map_rows(lambda _, leaf: leaf[_TOUCHED], state)
        start = self.tx.init(self._params(0, permuted=False))
        fresh = self.layout.map_rows(
            lambda _, leaf, new: jnp.concatenate(
                [leaf[_TOUCHED], new[_ASLEEP], jnp.zeros_like(leaf[_PADDING])]
            ),
            state,
            start,
        )
        return (
            self._last_step(touched, scale, rows=_TOUCHED),
            self._last_step(state, scale),
            self._last_step(fresh, scale),
            self._last_step(self._history(scale, permuted=True), scale, permuted=True),
        )

    def _history(self, scale: float, *, permuted: bool) -> PyTree:
        state = self.tx.init(self._params(0, permuted=permuted))
        for step in range(_HISTORY):
            grads = self._grads(step, scale, permuted=permuted)
            params = self._params(step, permuted=permuted)
            _, state = self.tx.update(grads, state, params, **self.extra_args)
        return state

    def _last_step(
        self, state: PyTree, scale: float, *, rows: slice = slice(None), permuted: bool = False
    ) -> dict[str, Any]:
        grads = self._grads(_HISTORY, scale, permuted=permuted, asleep=0.0, rows=rows)
        params = self._params(_HISTORY, permuted=permuted, rows=rows)
        updates, state = self.tx.update(grads, state, params, **self.extra_args)
        leaves = self.layout.flatten(state)
        pairs = list(zip(self.layout.owners, leaves, strict=True))
        steps = self.treedef.flatten_up_to(updates)
        return {
            "shared": [leaf for owner, leaf in pairs if owner is None and not _is_key(leaf)],
            "rows": [leaf[_TOUCHED] for owner, leaf in pairs if owner is not None],
            "table_updates": [steps[i][_TOUCHED] for i in self.tables],
            "dense_updates": [u for i, u in enumerate(steps) if i not in self.tables],
        }

    # The run looks like training: gradients that mostly agree, parameters that went against them.
    # Transforms that estimate distances (prodigy, dog) keep still on noise.
    def _grads(self, step: int, scale: float, **variant: Any) -> PyTree:
        return self._tree(lambda trend, noise: scale * (trend + 0.3 * noise(10 + step)), **variant)

    def _params(self, step: int, **variant: Any) -> PyTree:
        return self._tree(lambda trend, noise: noise(1) - step * trend, **variant)

    def _tree(
        self,
        values_of: Callable[..., np.ndarray],
        *,
        permuted: bool,
        asleep: float = 10.0,
        rows: slice = slice(None),
    ) -> PyTree:
        leaves = []
        for i, leaf in enumerate(self.params):
            noise = functools.partial(_normal, leaf.shape)
            values = np.asarray(values_of(noise(0), noise))
            if i in self.tables:
                values[_ASLEEP] *= asleep
                values[_PADDING] = 0.0
                if permuted:  # within one row, so that no norm of it changes
                    values[1] = np.flip(values[1])
                values = values[rows]
            leaves.append(jnp.asarray(values.astype(leaf.dtype)))
        return jax.tree.unflatten(self.treedef, leaves)


def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _shrunk(leaf: Any, is_table: bool) -> jax.ShapeDtypeStruct:
    # Tables keep their row shape, for which transforms may have rules; float32 keeps rounding,
    # stochastic rounding included, out of the comparison.
    dtype = leaf.dtype
    if is_table:
        shape = (_TRIAL_ROWS, *leaf.shape[1:])
        dtype = jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32
    else:
        shape = tuple(min(d, 3) for d in leaf.shape)
    return struct(shape, dtype)


def struct(shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array that need not exist."""
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def struct_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of ``leaf``, an array or a number."""
    return struct(jnp.shape(leaf), jnp.result_type(leaf))


def stand_ins(tree: PyTree) -> PyTree:
    """Returns ``tree`` with ones of the same shapes in place of its arrays, traced or not."""
    return jax.tree.map(
        lambda leaf: (
            np.ones(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array | np.ndarray) else leaf
        ),
        tree,
    )


def run_now(fun: Callable[[], Any]) -> Any:
    """Computes ``fun()`` at once, also while something else is being traced.

    Values of the surrounding trace that ``fun`` closes over, such as a learning rate that is
    itself an argument of the jitted step, are replaced by small constants.
    """
    jaxpr, shape = jax.make_jaxpr(fun, return_shape=True)()
    consts = [
        np.full(c.shape, 0.1, c.dtype) if isinstance(c, jax.core.Tracer) else c
        for c in jaxpr.consts
    ]
    closed = jax.extend.core.ClosedJaxpr(jaxpr.jaxpr, consts)
    with jax.ensure_compile_time_eval():
        leaves = [np.asarray(x) for x in jax.jit(jax.extend.core.jaxpr_as_fun(closed))()]
    return jax.tree.unflatten(jax.tree.structure(shape), leaves)


def _first_row(outcome: dict[str, Any]) -> list[Any]:
    return [leaf[:1] for leaf in (*outcome["rows"], *outcome["table_updates"])]


def _agree(left: PyTree, right: PyTree) -> bool:
    return all(map(_close, jax.tree.leaves(left), jax.tree.leaves(right)))


def _is_key(leaf: Any) -> bool:
    # Rows do not enter a key; what is drawn from it shows in the updates.
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _close(left: Any, right: Any) -> bool:
    a, b = (np.asarray(x).astype(np.complex128) for x in (left, right))
    largest = np.max(np.abs(np.where(np.isfinite(a), a, 0.0)), initial=0.0)
    return bool(np.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True))
