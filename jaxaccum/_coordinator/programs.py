"""What runs on the device for one tree, compiled once for sums of one structure.

Programs take and return the leaves of the sums in a tuple. To return an `AccumulatorState` they
would run its constructor, in Python, where a signal may strike: see `device_state`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator import merge
from jaxaccum._accumulator.staleness import StalenessWeight, find_weight
from jaxaccum._accumulator.state import Reduction, weight_dtype
from jaxaccum._accumulator.tree_sums import Arrays, Sums, add_to_sums, take_sums

Leaves = tuple[jax.Array, ...]


class Kind(NamedTuple):
    """What programs depend on.

    Attributes:
      treedef: the structure of the `Sums`.
      reduction: what a take makes of them.
      dtypes: of the gradients of dense leaves.
      staleness_weight: what gradients weigh.
    """

    treedef: jax.tree_util.PyTreeDef
    reduction: Reduction
    dtypes: tuple[np.dtype, ...]
    staleness_weight: StalenessWeight | None


class Programs(NamedTuple):
    """The programs for one `Kind`; all are given the sums for good.

    Attributes:
      apply: adds a gradient.
      apply_staged: adds several, one after the other.
      take: takes everything, and returns the first rows of each table, so many as are asked for.
    """

    apply: Any
    apply_staged: Any
    take: Any


@functools.cache
def make_programs(kind: Kind) -> Programs:
    """Returns the programs for one kind of sums."""

    def apply(
        leaves: Leaves, indices: Arrays, values: Arrays, dense: Arrays, staleness: jax.Array | None
    ) -> Leaves:
        weight = None
        if staleness is not None:
            weight = find_weight(kind.staleness_weight, staleness, weight_dtype())
        sums = add_to_sums(_unflatten(kind, leaves), indices, values, dense, weight)
        return tuple(jax.tree.leaves(sums))

    @functools.partial(jax.jit, donate_argnums=0)
    def apply_staged(leaves: Leaves, staged: Any, num_staged: jax.Array) -> Leaves:
        # A gradient more costs the device 1 to 5 us here, 40 us in a dispatch of its own. As one
        # gradient they would be added faster yet, but on a GPU in an order of its own.
        def body(k: jax.Array, leaves: Leaves) -> Leaves:
            return apply(leaves, *jax.tree.map(lambda each: each[k], staged))

        return jax.lax.fori_loop(jnp.int32(0), num_staged, body, leaves)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
    def take(leaves: Leaves, sizes: tuple[int, ...]) -> tuple[Leaves, Any]:
        # The host has counted, in numbers that have no end.
        sums, taken = take_sums(_unflatten(kind, leaves), kind.reduction, sizes, kind.dtypes)
        return tuple(jax.tree.leaves(sums)), taken

    return Programs(jax.jit(apply, donate_argnums=0), apply_staged, take)


grow = jax.jit(merge.grow, static_argnums=1)


def _unflatten(kind: Kind, leaves: Leaves) -> Sums:
    sums: Sums = jax.tree.unflatten(kind.treedef, leaves)
    return sums
