"""Which optax transforms can run on a few rows of a table, found out by a trial run.

A transform is row-separable if the step of a row, and the state kept for it, depend on that row's
gradient, parameters and state alone, and on what all rows share. A tiny table is trained for a few
steps and four things must hold, each of which a known family of transforms breaks:

* what is shared must not depend on the rows a step does not touch (statistics over all rows);
* nor must the step of a touched row depend on the parameters of untouched rows, or on there being
  any (trust ratios, parameter norms, means over the table);
* the rows in another order must get the same steps, in that order (a rate by position, a padding
  row frozen by its number: in a block of touched rows, positions are no row numbers);
* permuting the entries within one row, which changes no norm, must leave other rows alone
  (orthogonalisation, Kronecker factors, column statistics).

What passes may still couple touched rows by norms of their gradients or updates, as clipping by
the global norm does: untouched rows have zeros there, so the touched ones are enough.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxaccum._optimizers.row_numbers import is_row_named
from jaxaccum._optimizers.state_layout import Trainee, lay_out_rows, refusal, struct
from jaxaccum._rows.tree import Leaf, PyTree

# Rows of the trial table: two that every step touches, one that sleeps in the last step after
# having been touched, and one of zeros like the padding of a block.
_TOUCHED, _ASLEEP, _PADDING = slice(0, 2), slice(2, 3), slice(3, 4)
_TRIAL_ROWS = 4
# Another order of these rows, in which those that are touched come last and the other way round.
_ORDER, _COMPACT = (2, 3, 1, 0), (0, 1)
# The coupling looked for is a factor, rounding is not: anything between tells them apart.
_TOLERANCE = 1e-3
_BY_POSITION = (
    "it treats rows by their position, which in the block of touched rows is not their number (to "
    "leave rows of a table as they are, use jaxaccum.freeze_rows)"
)
# What the last step of a trial comes to, by name: leaves of the state and of the updates.
_Outcome: TypeAlias = dict[str, list[Leaf]]


def check_row_separable(trainee: Trainee) -> None:
    """Tries a transform on a tiny table and raises if rows cannot be updated apart from each other.

    Raises:
      ValueError: the transform couples rows; the message says how.
    """
    trial = Trial(trainee)
    scales = np.array([1e-2, 1e2], np.float32)  # thresholds, as in clipping, act on one side only
    try:
        outcomes = run_now(trial.outcomes, scales)
    except (TypeError, ValueError) as err:
        reason = f"it fails on two rows of a table of {_TRIAL_ROWS}: {err}"
        raise TrialFailedError(str(refusal(reason))) from err
    for compact, whole, fresh, moved, mixed in outcomes:
        if not agree(compact["shared"], whole["shared"]):
            raise refusal(
                "it keeps a statistic over all rows of the table, also those the gradient does "
                "not touch (as in prodigy or dog)"
            )
        if not agree(compact, fresh):
            raise refusal(
                "the step of a row depends on rows the gradient does not touch (as in lamb and "
                "lars, whose trust ratio is a norm of the whole table, in adafactor and in muon)"
            )
        if not agree(compact, moved) and not _only_noise_moves(trial, scales):
            raise refusal(_BY_POSITION)
        if not agree(_first_row(whole), _first_row(mixed)):
            raise refusal(
                "it mixes the entries of different rows (as in muon, shampoo, or sm3's columns)"
            )
    # Four rows do not show what happens to the eighth.
    if is_row_named(dataclasses.replace(trainee, extra_args=trial.extra_args)):
        raise refusal(_BY_POSITION)


def _only_noise_moves(trial: Trial, scales: np.ndarray) -> bool:
    """Whether rows in another order differ by random numbers alone, which are drawn by position."""
    if "random_bits" not in str(jax.make_jaxpr(trial.outcomes)(scales[0])):
        return False
    # Noise that is added is the same whatever the gradient, and drops out of a difference.
    return all(agree(straight, moved) for straight, moved in run_now(trial.differences, scales))


class TrialFailedError(ValueError):
    """The transform could not even be tried."""


class Trial:
    """A tiny table trained for a few steps, in the variants that are compared."""

    num_steps = 4

    def __init__(self, trainee: Trainee) -> None:
        self.tx, self.treedef, self.tables = trainee.tx, trainee.treedef, trainee.tables
        self.params = [_shrink(p, i in self.tables) for i, p in enumerate(trainee.params)]
        self.extra_args = stand_ins(trainee.extra_args)
        self.layout = lay_out_rows(dataclasses.replace(trainee, params=self.params))

    def outcomes(self, scale: ArrayLike) -> tuple[_Outcome, ...]:
        """The last step on the touched rows alone, and on all rows in four variants.

        They are: as trained; with a fresh state for the others; that in another order; and with
        the entries of one row permuted.
        """
        state = self._history(scale)
        compact, moved, fresh = self._rearranged(state)
        return (
            self._last_step(compact, scale, order=_COMPACT),
            self._last_step(state, scale),
            self._last_step(fresh, scale),
            self._last_step(moved, scale, order=_ORDER),
            self._last_step(self._history(scale, permuted=True), scale, permuted=True),
        )

    def differences(self, scale: ArrayLike) -> tuple[_Outcome, _Outcome]:
        """How far a gradient's last step is from that of one twice as large, in two orders."""
        compact, moved, _ = self._rearranged(self._history(scale))

        def change(state: PyTree, order: Sequence[int]) -> _Outcome:
            once, twice = (self._last_step(state, k * scale, order=order) for k in (1, 2))
            return jax.tree.map(jnp.subtract, twice, once)

        return change(compact, _COMPACT), change(moved, _ORDER)

    def _rearranged(self, state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """The touched rows alone, all rows in another order, and with a fresh state for others."""
        fresh = self.layout.map_rows(
            lambda _, leaf, new: jnp.concatenate(
                [leaf[_TOUCHED], new[_ASLEEP], jnp.zeros_like(leaf[_PADDING])]
            ),
            state,
            self.tx.init(self._params(0)),
        )
        compact = self.layout.map_rows(lambda _, leaf: leaf[_TOUCHED], state)
        moved = self.layout.map_rows(lambda _, leaf: leaf[np.array(_ORDER)], fresh)
        return compact, moved, fresh

    def shared_states(self, scale: ArrayLike) -> tuple[list[Leaf], list[Leaf]]:
        """What rows share: at first, and after `num_steps` steps.

        Dense leaves get no gradient, so that only tables can make a difference.
        """
        start = self.tx.init(self._params(0))
        return self._shared(start), self._shared(self._history(scale, dense=0.0))

    def at_rest(
        self, owner: int, scale: ArrayLike
    ) -> tuple[list[Leaf], list[Leaf], list[Leaf], int]:
        """State, and for one row of each table no gradient and parameters of zero."""
        state = self.layout.flatten(self._history(scale))
        params = self.treedef.flatten_up_to(self._params(0))
        grads = [jnp.zeros_like(p[:1] if i in self.tables else p) for i, p in enumerate(params)]
        params = [grads[i] if i in self.tables else p for i, p in enumerate(params)]
        return state, grads, params, self.tables[owner]

    def random_rows(self) -> list[jax.Array]:
        """Three rows of every leaf of the state, positive as second moments are."""
        leaves = self.layout.flatten(jax.eval_shape(self.tx.init, self._params(0)))
        rng = np.random.default_rng(2)
        shapes = [(3, *leaf.shape[1:]) for leaf in leaves]
        return [
            jnp.asarray(rng.uniform(0.5, 1.5, shape).astype(leaf.dtype))
            for shape, leaf in zip(shapes, leaves, strict=True)
        ]

    def random_params(self, table: int) -> jax.Array:
        """Three rows of a table."""
        leaf = self.params[table]
        return jnp.asarray(_normal((3, *leaf.shape[1:]), 3).astype(leaf.dtype))

    def _shared(self, state: PyTree) -> list[Leaf]:
        pairs = zip(self.layout.owners, self.layout.flatten(state), strict=True)
        # Rows do not enter a random key; what is drawn from it shows in the updates.
        return [jnp.zeros(()) if _is_key(leaf) else leaf for owner, leaf in pairs if owner is None]

    def _history(self, scale: ArrayLike, *, permuted: bool = False, dense: float = 1.0) -> PyTree:
        state = self.tx.init(self._params(0, permuted=permuted))
        for step in range(self.num_steps):
            grads = self._grads(step, scale, permuted=permuted, dense=dense)
            params = self._params(step, permuted=permuted)
            _, state = self.tx.update(grads, state, params, **self.extra_args)
        return state

    def _last_step(
        self,
        state: PyTree,
        scale: ArrayLike,
        *,
        order: Sequence[int] = range(_TRIAL_ROWS),
        permuted: bool = False,
    ) -> _Outcome:
        grads = self._grads(self.num_steps, scale, permuted=permuted, asleep=0.0, order=order)
        params = self._params(self.num_steps, permuted=permuted, order=order)
        updates, state = self.tx.update(grads, state, params, **self.extra_args)
        pairs = zip(self.layout.owners, self.layout.flatten(state), strict=True)
        steps = self.treedef.flatten_up_to(updates)
        touched = np.array(
            [list(order).index(row) for row in range(*_TOUCHED.indices(_TRIAL_ROWS))]
        )
        return {
            "shared": self._shared(state),
            "rows": [leaf[touched] for owner, leaf in pairs if owner is not None],
            "table_updates": [steps[i][touched] for i in self.tables],
            "dense_updates": [u for i, u in enumerate(steps) if i not in self.tables],
        }

    # The run looks like training: gradients that mostly agree, parameters that went against them.
    # Transforms that estimate distances (prodigy, dog) keep still on noise.
    def _grads(self, step: int, scale: ArrayLike, **variant: Any) -> PyTree:
        grads = self._tree(lambda trend, noise: trend + 0.3 * noise(10 + step), **variant)
        return jax.tree.map(lambda g: g * jnp.asarray(scale).astype(g.dtype), grads)

    def _params(self, step: int, **variant: Any) -> PyTree:
        return self._tree(lambda trend, noise: noise(1) - step * trend, **variant)

    def _tree(
        self,
        values_of: Callable[..., np.ndarray],
        *,
        permuted: bool = False,
        asleep: float = 10.0,
        dense: float = 1.0,
        order: Sequence[int] = range(_TRIAL_ROWS),
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
                values = values[np.array(order)]
            else:
                values *= dense
            leaves.append(jnp.asarray(values.astype(leaf.dtype)))
        return jax.tree.unflatten(self.treedef, leaves)


def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _shrink(leaf: Leaf, is_table: bool) -> jax.ShapeDtypeStruct:
    # Tables keep their row shape, for which transforms may have rules; float32 keeps rounding,
    # stochastic rounding included, out of the comparison.
    dtype = leaf.dtype
    if is_table:
        shape = (_TRIAL_ROWS, *leaf.shape[1:])
        dtype = jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32
    else:
        shape = tuple(min(d, 3) for d in leaf.shape)
    return struct(shape, dtype)


def stand_ins(tree: PyTree) -> PyTree:
    """Returns ``tree`` with ones of the same shapes in place of its arrays, traced or not."""
    return jax.tree.map(
        lambda leaf: (
            np.ones(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array | np.ndarray) else leaf
        ),
        tree,
    )


def run_now(fun: Callable[[ArrayLike], PyTree], args: np.ndarray) -> list[Leaf]:
    """Computes ``fun`` of each of ``args`` at once, also while something else is being traced.

    Values of the surrounding trace that ``fun`` closes over, such as a learning rate that is
    itself an argument of the jitted step, are replaced by small constants.
    """
    jaxpr, shape = jax.make_jaxpr(fun, return_shape=True)(args[0])
    consts = [
        np.full(c.shape, 0.1, c.dtype) if isinstance(c, jax.core.Tracer) else c
        for c in jaxpr.consts
    ]
    closed = jax.extend.core.ClosedJaxpr(jaxpr.jaxpr, consts)
    with jax.ensure_compile_time_eval():
        compiled = jax.jit(jax.extend.core.jaxpr_as_fun(closed))
        results = [[np.asarray(leaf) for leaf in compiled(arg)] for arg in args]
    return [jax.tree.unflatten(jax.tree.structure(shape), leaves) for leaves in results]


def _first_row(outcome: _Outcome) -> list[Leaf]:
    return [leaf[:1] for leaf in (*outcome["rows"], *outcome["table_updates"])]


def agree(left: PyTree, right: PyTree, *, tolerance: float = _TOLERANCE) -> bool:
    """Whether two trees are the same but for rounding."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(_close(a, b, tolerance) for a, b in pairs)


def _is_key(leaf: Leaf) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _close(left: Leaf, right: Leaf, tolerance: float) -> bool:
    a, b = (np.asarray(x).astype(np.complex128) for x in (left, right))
    largest = np.max(np.abs(np.where(np.isfinite(a), a, 0.0)), initial=0.0)
    return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True))
