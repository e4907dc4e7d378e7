"""What runs on the device for the coordinator, compiled once for states of one structure.

Programs take and return the leaves of a state in a tuple. To return an `AccumulatorState` they
would run its constructor, in Python, where a signal may strike: see `_device_state`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from jaxaccum._accumulator.apply import apply as add_gradient
from jaxaccum._accumulator.state import Verdict
from jaxaccum._accumulator.take import take as take_all
from jaxaccum._rows.indexed_slices import IndexedSlices

Leaves = tuple[jax.Array, ...]

_trace_state: Callable[[], object] = get_opaque_trace_state  # jax leaves it untyped


class Programs(NamedTuple):
    """The programs for states of one structure; each is given the state's buffers for good.

    Attributes:
      treedef: the structure.
      apply: adds a gradient.
      apply_staged: adds several, one after the other.
      take: takes everything.
    """

    treedef: jax.tree_util.PyTreeDef
    apply: Any
    apply_staged: Any
    take: Any


@functools.cache
def programs(treedef: jax.tree_util.PyTreeDef) -> Programs:
    """Returns the programs for states of one structure."""

    def add(leaves: Leaves, indices: jax.Array, values: jax.Array, rows: int | None) -> Leaves:
        state = jax.tree.unflatten(treedef, leaves)
        gradient = IndexedSlices(indices, values, (rows, *values.shape[1:]))
        state, _ = add_gradient(state, gradient)
        return tuple(jax.tree.leaves(state))

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
    def apply_staged(
        leaves: Leaves,
        indices: jax.Array,
        values: jax.Array,
        num_staged: jax.Array,
        rows: int | None,
    ) -> Leaves:
        # A gradient more costs the device 1 to 5 us here, 40 us in a dispatch of its own. As one
        # gradient they would be added faster yet, but on a GPU in an order of its own.
        def body(k: jax.Array, leaves: Leaves) -> Leaves:
            return add(leaves, indices[k], values[k], rows)

        return jax.lax.fori_loop(jnp.int32(0), num_staged, body, leaves)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
    def take(leaves: Leaves, num_rejected: jax.Array, size: int) -> tuple[Leaves, Leaves]:
        state = jax.tree.unflatten(treedef, leaves)
        rejected, num_rows = state.verdict_counts[Verdict.INVALID], state.num_rows
        # Rejections the host has not heard of: not ready, whatever was accumulated.
        state, gradient, ready = take_all(
            state, jnp.where(rejected > num_rejected, jnp.int32(2**31 - 1), jnp.int32(1))
        )
        facts = jnp.stack([num_rows, rejected, ready.astype(jnp.int32)])
        # XLA reads and divides only the rows that are left: their number is bounded by ``size``.
        taken = (gradient.indices[:size], gradient.values[:size], facts)
        return tuple(jax.tree.leaves(state)), taken

    apply = jax.jit(add, donate_argnums=0, static_argnums=3)
    return Programs(treedef, apply, apply_staged, take)


def is_traced() -> bool:
    """Whether a trace is under way in this thread, which would record what is dispatched."""
    now = _trace_state()
    if now in _OUTSIDE:
        return False
    if isinstance(jnp.zeros((), jnp.int32), jax.core.Tracer):
        return True
    _OUTSIDE[:] = [now]
    return False


# What the state of tracing was when last found to be none: to look costs 0.2 us, to find out 20.
_OUTSIDE: list[object] = []
