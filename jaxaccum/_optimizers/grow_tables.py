"""``grow_tables``: more rows for tables, more capacity for their sums, in the middle of a run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxaccum._accumulator.grow_pools import grow_pools
from jaxaccum._optimizers.micro_batch_state import MicroBatchState
from jaxaccum._rows.tree import PyTree

if TYPE_CHECKING:
    import optax  # type: ignore[import-untyped]


def grow_tables(
    tx: optax.GradientTransformation, params: PyTree, state: PyTree, rows: PyTree | None = None
) -> tuple[PyTree, PyTree]:
    """Adds rows to tables, and capacity to the sums of `accumulate`; call it outside ``jit``.

    Parameters, optimizer state, sums, what `accumulate` has gathered so far and what ``catch_up``
    counts grow together, and the run goes on as if it had had those rows, and that capacity, from
    the start: to the bit, for the same gradients.

    Args:
      tx: the transform to go on with, of the same structure as the one so far. Where the sums of
        `accumulate` are to hold more, it is one of a larger ``capacity``, such as
        `MicroBatchState.needed_capacity` says.
      params: as they are.
      state: of the transform so far.
      rows: a tree like the params, for each leaf the rows to append to it, ``[more, *row]``, or
        ``None`` for none. By default no leaf gets any.

    Returns:
      The params, and the state, for ``tx``.

    Raises:
      ValueError: ``rows`` is no tree like the params or does not fit them; ``tx`` is of another
        structure; or it has a smaller capacity.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> tx = jaxaccum.accumulate(optax.adam(0.1), 4, tables=True, capacity=3)
      >>> table = jnp.zeros((4, 2))
      >>> larger = jaxaccum.accumulate(optax.adam(0.1), 4, tables=True, capacity=6)
      >>> table, state = jaxaccum.grow_tables(larger, table, tx.init(table), jnp.ones((1, 2)))
      >>> table.shape, state.sums.values.shape, state.inner_state[0].mu.shape
      ((5, 2), (6, 2), (5, 2))

    Source: the dynamic vocabularies of recommenders, such as TensorFlow Recommenders Addons'
    ``dynamic_embedding``.
    """
    params = _append(params, rows)
    return params, _move(state, tx.init(params))


def _append(params: PyTree, rows: PyTree | None) -> PyTree:
    if rows is None:
        return params
    treedef: Any
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    try:
        more = treedef.flatten_up_to(rows)
    except ValueError as err:
        raise ValueError(f"rows must be a tree like the params: {err}") from None
    leaves = []
    for (path, param), extra in zip(paths, more, strict=True):
        if extra is not None and jnp.shape(extra)[1:] != jnp.shape(param)[1:]:
            raise ValueError(
                f"rows{jax.tree_util.keystr(path)} must be rows of a table of shape "
                f"{jnp.shape(param)}, got shape {jnp.shape(extra)}"
            )
        added = [] if extra is None else [jnp.asarray(extra, param.dtype)]
        leaves.append(jnp.concatenate([param, *added]) if added else param)
    return jax.tree.unflatten(treedef, leaves)


def _move(state: PyTree, fresh: PyTree) -> PyTree:
    """Returns ``fresh`` with all that ``state`` holds; what is new is as in ``fresh``."""
    treedef: Any
    fresh_treedef: Any
    paths, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_micro_batch_state)
    leaves, fresh_treedef = jax.tree.flatten(fresh, is_leaf=_is_micro_batch_state)
    if treedef != fresh_treedef:
        raise ValueError(
            "state must be of a transform of the structure of tx, got "
            f"{treedef}, expected {fresh_treedef}"
        )
    return jax.tree.unflatten(
        treedef,
        [
            _move_sums(old, new)
            if _is_micro_batch_state(old)
            else _move_leaf(old, new, f"state{jax.tree_util.keystr(path)}")
            for (path, old), new in zip(paths, leaves, strict=True)
        ],
    )


def _move_sums(state: MicroBatchState, fresh: MicroBatchState) -> MicroBatchState:
    if state.num_accumulated.ndim:  # one for each device
        devices = state.num_accumulated.shape
        fresh = fresh.map_own(lambda leaf: jnp.broadcast_to(leaf, (*devices, *leaf.shape)))
    rows = grow_pools(state.rows, fresh.rows)
    parts = {"sums": state.sums, "inner_state": state.inner_state}
    moved = _move(parts, {name: getattr(fresh, name) for name in parts})
    counts = dataclasses.replace(state, rows=(), sums=None, inner_state=None)
    expected = dataclasses.replace(fresh, rows=(), sums=None, inner_state=None)
    shapes = [jax.tree.map(jnp.shape, counted) for counted in (counts, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"tx must count as the transform so far, got {shapes[1]}, not {shapes[0]}")
    return dataclasses.replace(state, rows=rows, **moved)


def _move_leaf(old: Any, new: Any, name: str) -> Any:
    shapes = jnp.shape(old), jnp.shape(new)
    if shapes[0] == shapes[1]:
        return old
    grown = [i for i, (a, b) in enumerate(zip(*shapes, strict=False)) if a != b]
    if (
        len(shapes[0]) != len(shapes[1])
        or len(grown) != 1
        or old.shape[grown[0]] > new.shape[grown[0]]
    ):
        raise ValueError(f"{name} of shape {shapes[0]} cannot grow to {shapes[1]}")
    start = [0] * old.ndim
    return jax.lax.dynamic_update_slice(new, old.astype(new.dtype), start)


def _is_micro_batch_state(node: object) -> bool:
    return isinstance(node, MicroBatchState)
