"""What runs on the device for one table, compiled once for states of one structure.

Programs take and return the leaves of a state in a tuple. To return an `AccumulatorState` they
would run its constructor, in Python, where a signal may strike: see `device_state`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._accumulator import merge
from jaxaccum._accumulator.apply import apply as add_gradient
from jaxaccum._accumulator.state import AccumulatorState
from jaxaccum._accumulator.take import take_if
from jaxaccum._rows.indexed_slices import IndexedSlices

Leaves = tuple[jax.Array, ...]


class Programs(NamedTuple):
    """The programs for states of one structure; all but `grow` are given the state for good.

    Attributes:
      treedef: the structure.
      apply: adds a gradient.
      apply_staged: adds several, one after the other.
      take: takes everything, and returns the first ``size`` of the rows.
      grow: makes a copy of a larger capacity.
    """

    treedef: jax.tree_util.PyTreeDef
    apply: Any
    apply_staged: Any
    take: Any
    grow: Any


@functools.cache
def make_programs(treedef: jax.tree_util.PyTreeDef) -> Programs:
    """Returns the programs for states of one structure."""

    def add(leaves: Leaves, indices: jax.Array, values: jax.Array) -> Leaves:
        state: AccumulatorState = jax.tree.unflatten(treedef, leaves)
        gradient = IndexedSlices(indices, values, state.dense_shape)
        state, _ = add_gradient(state, gradient)
        return tuple(jax.tree.leaves(state))

    @functools.partial(jax.jit, donate_argnums=0)
    def apply_staged(
        leaves: Leaves, indices: jax.Array, values: jax.Array, num_staged: jax.Array
    ) -> Leaves:
        # A gradient more costs the device 1 to 5 us here, 40 us in a dispatch of its own. As one
        # gradient they would be added faster yet, but on a GPU in an order of its own.
        def body(k: jax.Array, leaves: Leaves) -> Leaves:
            return add(leaves, indices[k], values[k])

        return jax.lax.fori_loop(jnp.int32(0), num_staged, body, leaves)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
    def take(leaves: Leaves, size: int) -> tuple[Leaves, Leaves]:
        state: AccumulatorState = jax.tree.unflatten(treedef, leaves)
        num_rows = state.num_rows
        # The host has counted, in numbers that have no end.
        state, gradient = take_if(state, jnp.bool_(True))
        # XLA reads and divides only the rows that are left: their number is bounded by ``size``.
        taken = (gradient.indices[:size], gradient.values[:size], num_rows)
        return tuple(jax.tree.leaves(state)), taken

    @functools.partial(jax.jit, static_argnums=1)
    def grow(leaves: Leaves, capacity: int) -> Leaves:
        return tuple(jax.tree.leaves(merge.grow(jax.tree.unflatten(treedef, leaves), capacity)))

    return Programs(treedef, jax.jit(add, donate_argnums=0), apply_staged, take, grow)
