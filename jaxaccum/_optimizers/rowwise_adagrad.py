"""Row-wise Adagrad: one accumulator a row, and tables in bfloat16 that still learn."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef

from jaxaccum._optimizers.optax_import import import_optax
from jaxaccum._rows.public import named_tuple, one_line, public
from jaxaccum._rows.row_arithmetic import expand_to_rows
from jaxaccum._rows.tree import PyTree

if TYPE_CHECKING:
    import optax  # type: ignore[import-untyped]


@named_tuple
@public
class RowwiseAdagradState(NamedTuple):
    """State of `rowwise_adagrad`.

    Attributes:
      sum_of_squares: a tree like the params, for every leaf float32 ``[rows]``: the sum over steps
        of the mean square of the row's gradient.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> jaxaccum.rowwise_adagrad(0.1, initial_accumulator_value=0.5).init(jnp.zeros((3, 2)))[0]
      RowwiseAdagradState(sum_of_squares=[0.5, 0.5, 0.5])

    Source: as of `rowwise_adagrad`.
    """

    sum_of_squares: PyTree

    def __repr__(self) -> str:
        return one_line(self)


@named_tuple
@public
class StochasticRoundingState(NamedTuple):
    """State of `rowwise_adagrad` with ``stochastic_rounding``.

    Attributes:
      num_steps: int32 ``[]``, how many steps have been rounded: the random bits are made from it.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> tx = jaxaccum.rowwise_adagrad(0.1, stochastic_rounding=True)
      >>> tx.init(jnp.zeros((3, 2), jnp.bfloat16))[2]
      StochasticRoundingState(num_steps=0)

    Source: as of `rowwise_adagrad`.
    """

    num_steps: jax.Array

    def __repr__(self) -> str:
        return one_line(self)


def rowwise_adagrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Adagrad with one scalar of state for each row of a table.

    A row's scalar grows by the mean of the squares of its gradient, and its step is
    ``learning_rate * grad / (sqrt(scalar) + eps)``, in float32 whatever the dtype of the table.
    A row of ``d`` floats needs one of state, where Adam needs ``2 * d``. Entries of a vector are
    rows of one entry, so that a bias gets plain Adagrad.

    Args:
      learning_rate: a number, or a schedule of the step count.
      initial_accumulator_value: what each scalar starts from.
      eps: added to the root, against division by zero.
      stochastic_rounding: round updated bfloat16 parameters up or down at random, so that the
        expected value is the exact sum. Rounded to nearest, a step below 1/256 of a weight would
        be lost each time. Other dtypes are left alone. Needs ``params`` in ``update``.
      seed: of the random bits.

    Returns:
      An optax transform; wrap it in `lazy_rows` or `accumulate` for sparse gradients.

    Raises:
      ImportError: optax is not installed.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> tx = jaxaccum.lazy_rows(jaxaccum.rowwise_adagrad(0.1))
      >>> table = jnp.zeros((4, 2))
      >>> grad = jaxaccum.IndexedSlices(jnp.array([2]), jnp.array([[3.0, 3.0]]), (4, 2))
      >>> updates, state = tx.update(grad, tx.init(table), table)
      >>> state[0].sum_of_squares, jaxaccum.apply_updates(table, updates)[2]
      (Array([0., 0., 9., 0.], dtype=float32), Array([-0.1, -0.1], dtype=float32))

    Source: ``RowWiseAdagrad`` of TorchRec, ``EXACT_ROWWISE_ADAGRAD`` of FBGEMM.
    """
    optax = import_optax("rowwise_adagrad")
    steps = [
        _scale_by_rowwise_rss(optax, initial_accumulator_value, eps),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if stochastic_rounding:
        steps.append(_round_stochastically(optax, seed))
    return optax.chain(*steps)


def _scale_by_rowwise_rss(
    optax: types.ModuleType, initial: float, eps: float
) -> optax.GradientTransformation:
    def init(params: PyTree) -> RowwiseAdagradState:
        return RowwiseAdagradState(
            jax.tree.map(lambda p: jnp.full(jnp.shape(p)[:1], initial, jnp.float32), params)
        )

    def update(
        updates: PyTree, state: RowwiseAdagradState, params: PyTree | None = None
    ) -> tuple[PyTree, RowwiseAdagradState]:
        del params
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        sums = jax.tree.map(lambda g, s: s + _mean_square(g), grads, state.sum_of_squares)
        updates = jax.tree.map(lambda g, s: g / (jnp.sqrt(expand_to_rows(s, g)) + eps), grads, sums)
        return updates, RowwiseAdagradState(sums)

    return optax.GradientTransformation(init, update)


def _mean_square(grad: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(grad), axis=tuple(range(1, grad.ndim)))


def _round_stochastically(optax: types.ModuleType, seed: int) -> optax.GradientTransformation:
    def init(params: PyTree) -> StochasticRoundingState:
        del params
        return StochasticRoundingState(jnp.int32(0))

    def update(
        updates: PyTree, state: StochasticRoundingState, params: PyTree | None = None
    ) -> tuple[PyTree, StochasticRoundingState]:
        if params is None:
            raise ValueError("params must be given to update with stochastic_rounding, got None")
        key = jax.random.fold_in(jax.random.key(seed), state.num_steps)
        treedef: PyTreeDef
        leaves, treedef = jax.tree.flatten(updates)
        keys = jax.random.split(key, len(leaves))
        rounded = [
            _rounded_update(leaf, param, key)
            for leaf, param, key in zip(leaves, treedef.flatten_up_to(params), keys, strict=True)
        ]
        return jax.tree.unflatten(treedef, rounded), StochasticRoundingState(state.num_steps + 1)

    return optax.GradientTransformation(init, update)


def _rounded_update(update: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
    """The float32 step from ``param`` to one of the two bfloat16 neighbours of the exact sum."""
    if param.dtype != jnp.bfloat16:
        return update
    start = param.astype(jnp.float32)
    target = start + update.astype(jnp.float32)
    # bfloat16 is the upper half of a float32: noise below the cut carries over into it with a
    # probability of just the part that is cut off.
    noise = jax.random.bits(key, target.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(target, jnp.uint32) + noise
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(target), cut - start, update)
