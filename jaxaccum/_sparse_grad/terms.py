"""What a cotangent is while it is kept as the few slices it is made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray

from jaxaccum._sparse_grad.jaxpr import Cause, Var, get_varying_axes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["coords", "values"],
    meta_fields=["axes", "shape", "source_line"],
)
@dataclasses.dataclass(frozen=True)
class Term:
    """An array of ``shape`` that is zero outside ``n`` slices.

    Slice ``i`` lies at ``coords[k][i]`` of axis ``axes[k]`` and is whole in all other axes::

        axes = (0,), shape = (4, 3)              the array it stands for

        coords[0]     values                     row 0   b b b
            2         a a a                      row 1   . . .
            0         b b b            --->      row 2   a+c a+c a+c
            2         c c c                      row 3   . . .
            4         d d d   (ignored)

    Repeated coordinates mean the sum of their slices. A slice that is to be ignored has every
    coordinate one past the end, so that the others still say so when an axis is summed away.

    Attributes:
      coords: int32 ``[n]`` for each of ``axes``.
      values: ``[n, *sizes of the axes that are not in axes]``.
      axes: ascending, at least one. Static.
      shape: of the whole array. Static.
      source_line: where in the user's source the slices were looked up, empty if unknown. Static.
    """

    coords: tuple[jax.Array, ...]
    values: jax.Array
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    source_line: str = ""

    @property
    def whole_axes(self) -> tuple[int, ...]:
        """The axes that ``values`` holds whole, in order."""
        return tuple(a for a in range(len(self.shape)) if a not in self.axes)

    def add_to(self, dense: jax.Array) -> jax.Array:
        """Returns ``dense`` with the slices added to it."""
        order = (*self.axes, *self.whole_axes)
        total = lax.transpose(dense, order).at[self.coords].add(self.values, mode="drop")
        return lax.transpose(total, tuple(int(i) for i in np.argsort(order)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["variable"])
@dataclasses.dataclass(frozen=True)
class Carry:
    """What a loop has summed up before the current step.

    It is outside of the program of the step, which can add terms to it and nothing else.

    Attributes:
      variable: that holds it in the program of the step. Static.
    """

    variable: Var


@functools.partial(jax.tree_util.register_dataclass, data_fields=["terms"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SparseSum:
    """A sum of terms; zero if there are none."""

    terms: tuple[Term | Carry, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["cause"])
@dataclasses.dataclass(frozen=True)
class Dense:
    """A cotangent that was to be a sum of slices and is none.

    Attributes:
      value: the whole array.
      cause: what made it dense, and where that stands in the user's source. Static.
    """

    value: jax.Array
    cause: Cause


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class Table:
    """A table that is to be read as another dtype: cast where it is read, never as a whole."""

    value: jax.Array
    dtype: np.dtype

    @property
    def is_cast(self) -> bool:
        """Whether it is read as another dtype than it has."""
        return self.dtype != self.value.dtype


# What a variable of a backward pass holds while that is evaluated, and what a rule is given.
Value: TypeAlias = jax.Array | SparseSum | Dense | Table
Operand: TypeAlias = jax.Array | SparseSum


class CarryReadError(Exception):
    """A loop does more to a running sum than add to it."""

    def __init__(self, carry: Carry, cause: Cause | None = None) -> None:
        super().__init__(carry, cause)
        self.carry, self.cause = carry, cause


def make_whole(value: Value, array_type: ShapedArray) -> jax.Array:
    """Returns the array that ``value`` stands for."""
    if isinstance(value, Table):
        return lax.convert_element_type(value.value, value.dtype)
    if isinstance(value, Dense):
        return value.value
    if not isinstance(value, SparseSum):
        return value
    dense = jnp.zeros(array_type.shape, array_type.dtype)
    for term in value.terms:
        if isinstance(term, Carry):
            raise CarryReadError(term)
        dense = term.add_to(dense)
    return cast_to_varying(dense, get_varying_axes(array_type))


def cast_to_varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Returns an array that varies along these axes of an enclosing shard_map, at the least."""
    missing = tuple(sorted(axes - get_varying_axes(jax.typeof(array))))
    return lax.pcast(array, missing, to="varying") if missing else array


def join(terms: Sequence[Term]) -> Term:
    """Returns one term of the slices of several that have the same axes and shape."""
    if len(terms) == 1:
        return terms[0]
    coords = tuple(map(jnp.concatenate, zip(*(t.coords for t in terms), strict=True)))
    return dataclasses.replace(
        terms[0], coords=coords, values=jnp.concatenate([t.values for t in terms])
    )
