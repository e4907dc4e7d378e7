r"""Catching up with the steps a row slept through, as the dense optimizer would have taken them.

A dense optimizer also steps rows without a gradient. From the state :math:`s` and parameter
:math:`p` that a row fell asleep with, step :math:`j = 1 \dots k` does

.. math:: s_j = a \cdot s_{j-1}, \qquad p_j = d \cdot p_{j-1} + u_j,

where :math:`a` decays moments, :math:`d` is decoupled weight decay, and :math:`u_j` moves the
parameter on by momentum. Adam's :math:`u_j` falls by :math:`b_1 / \sqrt{b_2}` a step, momentum's by
its decay, lion's not at all: :math:`u_j = r^{j-1} u_1` gives the closed form

.. math:: s_k = a^k s, \qquad p_k = d^k p + u_1 \frac{d^k - r^k}{d - r}.

None of this is known of an opaque transform, so it is measured: steps without a gradient from
states and parameters of zeros and ones give :math:`a` and :math:`d`, the first two steps of the row
itself give :math:`u_1` and :math:`r`, at the step count it fell asleep at. It is exact for momentum
and for decay at a constant rate; Adam's bias correction and a schedule bend the geometric series.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef
from jax.typing import ArrayLike

from jaxaccum._optimizers.optax_import import Transform
from jaxaccum._optimizers.state_layout import RowLayout, Trainee
from jaxaccum._optimizers.trial import Trial, agree, run_now
from jaxaccum._rows.public import named_tuple, one_line, public
from jaxaccum._rows.row_arithmetic import expand_to_rows
from jaxaccum._rows.tree import Leaf, PyTree

# Below this the quotient of differences loses more to rounding than its limit is off.
_NEARLY_EQUAL = 1e-5


@named_tuple
@public
class CatchUpState(NamedTuple):
    """State of `lazy_rows` with ``catch_up``.

    Attributes:
      inner_state: of the wrapped transform.
      num_steps: int32 ``[]``, steps so far; it stays at ``2**31 - 1``.
      last_step: a tree like the params, for each leaf int32 ``[rows]``: when each row was last
        touched, counting from 1; 0 is never.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> tx = jaxaccum.lazy_rows(optax.sgd(0.5, momentum=0.9), catch_up=True)
      >>> table = jnp.ones((4, 1))
      >>> grad = jaxaccum.IndexedSlices(jnp.array([2]), jnp.array([[1.0]]), (4, 1))
      >>> updates, state = tx.update(grad, tx.init(table), table)
      >>> state.num_steps, state.last_step
      (Array(1, dtype=int32), Array([0, 0, 1, 0], dtype=int32))

    Source: as of `lazy_rows`.
    """

    inner_state: PyTree
    num_steps: jax.Array
    last_step: PyTree

    def __repr__(self) -> str:
        return one_line(self)


def init_catch_up(inner_state: PyTree, params: PyTree) -> CatchUpState:
    """Returns the state before the first step. Any leaf may turn out to be a table."""
    last_step = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p)[:1], jnp.int32), params)
    return CatchUpState(inner_state, jnp.int32(0), last_step)


def check_last_step(
    state: object, treedef: PyTreeDef, expected: Mapping[int, tuple[int, ...]]
) -> None:
    """Raises ``ValueError`` if ``state`` does not tell when the rows of tables were last touched.

    Args:
      state: given to ``update``.
      treedef: the structure of the params.
      expected: the shape that the leaf of each table must have, by its position.
    """
    if not isinstance(state, CatchUpState):
        raise ValueError(f"state must be what init returned, a CatchUpState, got {type(state)}")
    paths, state_treedef = jax.tree_util.tree_flatten_with_path(state.last_step)
    if state_treedef != treedef:
        raise ValueError(f"state.last_step must be a tree like the params, got {state_treedef}")
    for position, shape in expected.items():
        path, leaf = paths[position]
        if jnp.shape(leaf) != shape:
            raise ValueError(
                "state must be what init returned for these params, got "
                f"state.last_step{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}, "
                f"expected {shape}"
            )


@dataclasses.dataclass(frozen=True)
class RestStep:
    """What one step of ``tx`` does to single rows of a table if no gradient comes.

    Attributes:
      layout: of the state of ``tx``.
      is_counter: for every leaf of the state, whether it counts steps.
      state: the leaves of the state.
      grads: zeros for every leaf, one row for tables.
      params: parameters for every leaf, one row for tables.
      table: position among the leaves of the table that is stepped.
      owner: position of that table among the tables.
    """

    tx: Transform
    treedef: PyTreeDef
    layout: RowLayout
    is_counter: tuple[bool, ...]
    state: list[Leaf]
    grads: list[Leaf]
    params: list[Leaf]
    extra_args: Mapping[str, object]
    table: int
    owner: int

    def __call__(
        self, rows: list[jax.Array], param: jax.Array, ahead: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Steps every row on its own.

        Args:
          rows: ``[n, *row]`` for every leaf of the state that follows the table.
          param: ``[n, *row]``.
          ahead: int32 ``[n]``, how far to turn the step counters of each row.

        Returns:
          The updates ``[n, *row]`` and the new ``rows``.
        """
        # Compiled even if the caller is not: dense leaves are only stepped to be thrown away.
        return jax.jit(jax.vmap(self._one))(rows, param, ahead)

    def _one(
        self, rows: list[jax.Array], param: jax.Array, ahead: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        leaves = [
            jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)
            if owner is not None
            else leaf + ahead.astype(leaf.dtype)
            if is_counter
            else leaf
            for owner, leaf, is_counter in zip(
                self.layout.owners, self.state, self.is_counter, strict=True
            )
        ]
        leaves = self.layout.with_rows(leaves, self.owner, [row[None] for row in rows])
        params = [*self.params[: self.table], param[None], *self.params[self.table + 1 :]]
        updates, state = self.tx.update(
            jax.tree.unflatten(self.treedef, self.grads),
            jax.tree.unflatten(self.layout.treedef, leaves),
            jax.tree.unflatten(self.treedef, params),
            **self.extra_args,
        )
        update = self.treedef.flatten_up_to(updates)[self.table][0]
        new_rows = self.layout.rows_of(self.layout.flatten(state), self.owner)
        return update.astype(jnp.float32), [row[0] for row in new_rows]


def catch_up_rows(
    step: RestStep, rows: list[jax.Array], param: jax.Array, missed: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Returns state and parameters of rows, float32, as if they had taken ``missed`` steps more.

    Args:
      step: one step without a gradient.
      rows: ``[n, *row]`` for every leaf of the state that follows the table.
      param: ``[n, *row]``.
      missed: int32 ``[n]``.
    """
    none, zero_rows = jnp.zeros_like(param), jax.tree.map(jnp.zeros_like, rows)
    one = [jnp.ones_like(leaf[:1]) for leaf in rows]
    _, factors = step(one, none[:1], jnp.zeros((1,), jnp.int32))
    first, after = step(rows, none, -missed)
    second, _ = step(after, none, 1 - missed)
    # Under a schedule the rate of decay changes while a row sleeps: the mean of both ends.
    ends = (-missed, -jnp.minimum(missed, 1))
    d_first, d_last = (1 + step(zero_rows, jnp.ones_like(param), end)[0] for end in ends)
    d = jnp.sqrt(jnp.maximum(d_first, 0) * jnp.maximum(d_last, 0))
    r = jnp.clip(jnp.where(first == 0, 0.0, second / jnp.where(first == 0, 1.0, first)), 0.0, 1.0)
    k = expand_to_rows(missed, param).astype(jnp.float32)
    d_k, r_k, gap = jnp.power(d, k), jnp.power(r, k), d - r
    is_near = jnp.abs(gap) < _NEARLY_EQUAL
    series = jnp.where(
        is_near, k * jnp.power(d, jnp.maximum(k - 1, 0)), (d_k - r_k) / jnp.where(is_near, 1.0, gap)
    )
    new_rows = [
        (leaf * jnp.power(factor, expand_to_rows(missed, leaf).astype(leaf.dtype))).astype(
            leaf.dtype
        )
        for leaf, factor in zip(rows, factors, strict=True)
    ]
    return new_rows, d_k * param.astype(jnp.float32) + series * first


def check_can_catch_up(trainee: Trainee) -> tuple[bool, ...]:
    """Tries whether a transform steps rows without a gradient as the closed form says.

    Returns:
      For every leaf of the state, whether it counts steps.

    Raises:
      ValueError: it does not; the message says how.
    """
    trial = Trial(trainee)
    (start, once), (_, twice) = run_now(trial.shared_states, np.array([1, 2], np.float32))
    if not agree(once, twice):
        raise ValueError(
            "catch_up cannot know the statistics of all gradients that tx kept while a row slept "
            "(as novograd does)"
        )
    shared = [i for i, owner in enumerate(trial.layout.owners) if owner is None]
    changes = [i for i, old, new in zip(shared, start, once, strict=True) if not agree(old, new)]
    counters = {i for i in changes if _counts(start[shared.index(i)], once[shared.index(i)])}
    is_counter = tuple(i in counters for i in range(len(trial.layout.owners)))
    drifting = [i for i in changes if i not in counters]
    for owner in range(len(trainee.tables)):
        rest = functools.partial(_rest_steps, trial, is_counter, drifting, owner)
        [(actual, expected, drifted)] = run_now(rest, np.ones(1, np.float32))
        if not agree(actual, expected, tolerance=1e-5):
            raise ValueError(
                "catch_up has no closed form for what tx does to a row without a gradient: its "
                "state must decay by constant factors and its step be linear in the parameter, as "
                "in sgd with momentum, adagrad, rmsprop, adam, adamw and lion"
            )
        if not agree(actual, drifted):
            raise ValueError(
                "catch_up can turn back counts of steps only, and tx keeps another count that "
                "matters to a row without a gradient (as schedule_free does)"
            )
    return is_counter


def _counts(before: Leaf, after: Leaf) -> bool:
    is_int = jnp.issubdtype(before.dtype, jnp.integer) and before.ndim == 0
    return bool(is_int and after == before + Trial.num_steps)


def _rest_steps(
    trial: Trial, is_counter: tuple[bool, ...], drifting: list[int], owner: int, scale: ArrayLike
) -> tuple[PyTree, PyTree, PyTree]:
    """Three rows after a step, what they are if it is linear, and if what drifts were another."""
    state, grads, params, table = trial.at_rest(owner, scale)
    step = RestStep(
        trial.tx, trial.treedef, trial.layout, is_counter, state, grads, params, trial.extra_args,
        table, owner,
    )  # fmt: skip
    rows, param = trial.layout.rows_of(trial.random_rows(), owner), trial.random_params(table)
    ahead = jnp.array([0, 3, 50], jnp.int32)
    none, zeros = jnp.zeros_like(param), jax.tree.map(jnp.zeros_like, rows)
    update, after = step(rows, param, ahead)
    _, factors = step([jnp.ones_like(leaf) for leaf in rows], none, ahead[::-1])
    shrinkage, _ = step(zeros, jnp.ones_like(param), ahead)
    moved, _ = step(rows, none, ahead)
    expected = [leaf * factor for leaf, factor in zip(rows, factors, strict=True)]
    other = [leaf + jnp.ones_like(leaf) if i in drifting else leaf for i, leaf in enumerate(state)]
    drifted = dataclasses.replace(step, state=other)(rows, param, ahead)
    return (after, update), (expected, moved + shrinkage * param), drifted[::-1]
