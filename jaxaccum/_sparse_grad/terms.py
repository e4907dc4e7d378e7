"""What a cotangent is while it is kept as the few slices it is made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["coords", "values"],
    meta_fields=["axes", "shape", "origin"],
)
@dataclasses.dataclass(frozen=True)
class Term:
    """An array of ``shape`` that is zero outside ``n`` slices.

    Slice ``i`` lies at ``coords[k][i]`` of axis ``axes[k]`` and is whole in all other axes. A slice
    that is to be ignored has every coordinate one past the end, so that it is still known for none
    after an axis is summed away. Repetitions mean their sum.

    Attributes:
      coords: int32 ``[n]`` for each of ``axes``.
      values: ``[n, *sizes of the axes that are not in axes]``.
      axes: ascending, at least one. Static.
      shape: of the whole array. Static.
      origin: where in the user's source the slices were looked up. Static.
    """

    coords: tuple[jax.Array, ...]
    values: jax.Array
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    origin: str = ""

    @property
    def whole_axes(self) -> tuple[int, ...]:
        """The axes that ``values`` holds whole, in order."""
        return tuple(a for a in range(len(self.shape)) if a not in self.axes)

    def add_to(self, dense: jax.Array) -> jax.Array:
        """Returns ``dense`` with the slices added to it."""
        order = (*self.axes, *self.whole_axes)
        total = lax.transpose(dense, order).at[self.coords].add(self.values, mode="drop")
        return lax.transpose(total, tuple(int(i) for i in np.argsort(order)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["index"])
@dataclasses.dataclass(frozen=True)
class Carry:
    """What a loop has summed up so far, unseen: all that a step may do is add to it."""

    index: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["terms"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SparseSum:
    """A sum of terms; zero if there are none."""

    terms: tuple[Term | Carry, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["reason"])
@dataclasses.dataclass(frozen=True)
class Dense:
    """A cotangent that was to be a sum of slices and is none.

    Attributes:
      value: the whole array.
      reason: what made it dense, and where that stands in the user's source. Static.
    """

    value: jax.Array
    reason: str


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class Table:
    """A table that is to be read as another dtype: cast where it is read, never as a whole."""

    value: jax.Array
    dtype: Any


class CarryReadError(Exception):
    """A loop does more to a running sum than add to it."""

    def __init__(self, carry: Carry, reason: str = "") -> None:
        super().__init__(carry, reason)
        self.carry, self.reason = carry, reason


def whole(value: Any, aval: Any) -> Any:
    """The array that ``value`` stands for."""
    if isinstance(value, Table):
        return lax.convert_element_type(value.value, value.dtype)
    if isinstance(value, Dense):
        return value.value
    if not isinstance(value, SparseSum):
        return value
    dense = jnp.zeros(aval.shape, aval.dtype)
    for term in value.terms:
        if isinstance(term, Carry):
            raise CarryReadError(term)
        dense = term.add_to(dense)
    return dense


def joined(terms: Sequence[Term]) -> Term:
    """One term of the slices of several that have the same axes and shape."""
    if len(terms) == 1:
        return terms[0]
    coords = tuple(map(jnp.concatenate, zip(*(t.coords for t in terms), strict=True)))
    return dataclasses.replace(
        terms[0], coords=coords, values=jnp.concatenate([t.values for t in terms])
    )
