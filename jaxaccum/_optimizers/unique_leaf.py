"""Rows as one leaf of a tree, which nothing takes apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxaccum._rows.indexed_slices import IndexedSlices, is_slices
from jaxaccum._rows.modules import holds_equinox
from jaxaccum._rows.tree import PyTree


@dataclasses.dataclass(frozen=True)
class UniqueRows:
    """An ``IndexedSlices`` of a table's shape, each row once, zeros as padding: one opaque leaf.

    ``accumulate`` hands these to its inner transform: ``lazy_rows`` need not check them or look for
    duplicates, and a transform that does not know them fails instead of treating indices as
    parameters.

    They are also the updates of Equinox modules. ``eqx.apply_updates`` maps over the leaves of the
    updates, and adds each to a parameter: a node of the tree could not stand there. JAX takes them
    for no array, so they cannot leave the jitted function that made them.
    """

    slices: IndexedSlices

    __array_ufunc__ = None

    def __radd__(self, table: Any) -> Any:
        """Adds the rows to a table."""
        return table + self.slices


def fit_updates(updates: PyTree, grads: PyTree) -> PyTree:
    """Returns ``updates`` as the loop that made ``grads`` adds them: leaves in Equinox modules."""
    if not holds_equinox(grads):
        return updates
    return jax.tree.map(lambda u: UniqueRows(u) if is_slices(u) else u, updates, is_leaf=is_slices)
