"""What each equation of a backward pass does to a cotangent that is a sum of slices.

A rule is given the operands its equation is linear in and those that are plain arrays. It must know
what every shape and parameter it is given means, and raises ``NotSparseError`` where it does not:
the equation is then evaluated as it is, on whole arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxaccum._sparse_grad.jaxpr import (
    Equation,
    bind,
    find_source_line,
    get_type,
    is_zero,
)
from jaxaccum._sparse_grad.terms import Carry, Operand, SparseSum, Term, cast_to_varying
from jaxaccum._sparse_grad.windows import NotSparseError, add_scattered, mask, update_slice

# (equation, operands it is linear in, the other operands) -> results. A result that is an array
# rather than a SparseSum is dense.
Rule: TypeAlias = Callable[[Equation, Sequence[Operand], Sequence[jax.Array]], list[Operand]]


def _terms(operand: Operand) -> tuple[Term, ...]:
    """Returns the terms of a cotangent that can be looked into."""
    if not isinstance(operand, SparseSum) or any(isinstance(t, Carry) for t in operand.terms):
        raise NotSparseError
    return operand.terms  # type: ignore[return-value]  # no Carry is among them


def _term_wise(rule: Callable[[Equation, Term], Term]) -> Rule:
    """Makes a rule of what happens to each term of the only operand."""

    def apply(eqn: Equation, sums: Sequence[Operand], _: Sequence[jax.Array]) -> list[Operand]:
        return [SparseSum(tuple(rule(eqn, term) for term in _terms(sums[0])))]

    return apply


# Slices moved: what pads, slices and the like do.


def _pad(eqn: Equation, sums: Sequence[Operand], _: Sequence[jax.Array]) -> list[Operand]:
    operand, shape = sums[0], get_type(eqn.outvars[0]).shape
    if not is_zero(eqn.invars[1]):
        raise NotSparseError
    if not isinstance(operand, SparseSum):  # the rows of a slice of the table
        if operand.shape[0] == shape[0]:
            raise NotSparseError
        rows = jnp.arange(operand.shape[0], dtype=jnp.int32)
        operand = SparseSum((Term((rows,), operand, (0,), operand.shape, find_source_line(eqn)),))
    config = eqn.params["padding_config"]
    return [SparseSum(tuple(_pad_term(term, config, shape) for term in _terms(operand)))]


def _pad_term(term: Term, config: Sequence[tuple[int, int, int]], shape: tuple[int, ...]) -> Term:
    valid = jnp.ones(term.values.shape[:1], bool)
    moved = []
    for axis, coord in zip(term.axes, term.coords, strict=True):
        low, _, interior = (int(c) for c in config[axis])
        at = low + coord * (1 + interior)
        valid &= (coord < term.shape[axis]) & (at >= 0) & (at < shape[axis])
        moved.append(at)
    widths = [(0, 0, 0)] + [config[axis] for axis in term.whole_axes]
    zero = jnp.zeros((), term.values.dtype)
    values = lax.pad(term.values, zero, [(int(a), int(b), int(c)) for a, b, c in widths])
    return Term(
        mask(moved, [shape[a] for a in term.axes], valid),
        values,
        term.axes,
        shape,
        term.source_line,
    )


def _shift(operand: Operand, axis: int, low: int, shape: tuple[int, ...]) -> SparseSum:
    """Returns ``operand`` moved by ``low`` along ``axis``, cut or padded to ``shape``."""
    terms = []
    for term in _terms(operand):
        config = [(0, 0, 0)] * len(shape)
        config[axis] = (low, shape[axis] - term.shape[axis] - low, 0)
        terms.append(_pad_term(term, config, shape))
    return SparseSum(tuple(terms))


def _slice(eqn: Equation, sums: Sequence[Operand], _: Sequence[jax.Array]) -> list[Operand]:
    result, start = sums[0], eqn.params["start_indices"]
    if eqn.params["strides"] is not None and set(eqn.params["strides"]) != {1}:
        raise NotSparseError
    shape = list(get_type(eqn.invars[0]).shape)
    for axis, size in enumerate(get_type(eqn.outvars[0]).shape):
        shape[axis] = size
        result = _shift(result, axis, -start[axis], tuple(shape))
    return [result]


def _split(eqn: Equation, sums: Sequence[Operand], _: Sequence[jax.Array]) -> list[Operand]:
    parts: list[Operand] = []
    start, axis = 0, eqn.params["axis"]
    for shape in (get_type(var).shape for var in eqn.outvars):
        parts.append(_shift(sums[0], axis, -start, shape))
        start += shape[axis]
    return parts


def _concatenate(eqn: Equation, sums: Sequence[Operand], _: Sequence[jax.Array]) -> list[Operand]:
    terms: list[Term | Carry] = []
    start, axis = 0, eqn.params["dimension"]
    for atom, operand in zip(eqn.invars, sums, strict=True):
        terms.extend(_shift(operand, axis, start, get_type(eqn.outvars[0]).shape).terms)
        start += get_type(atom).shape[axis]
    return [SparseSum(tuple(terms))]


# Axes renamed, added, joined and summed away.


def _broadcast_in_dim(
    eqn: Equation, sums: Sequence[Operand], _: Sequence[jax.Array]
) -> list[Operand]:
    if is_zero(eqn.invars[0]):
        return [SparseSum(())]
    to, shape = eqn.params["broadcast_dimensions"], get_type(eqn.outvars[0]).shape
    terms: list[Term | Carry] = []
    for term in _terms(sums[0]):
        axes = tuple(int(to[a]) for a in term.axes)
        if any(term.shape[a] != shape[b] for a, b in zip(term.axes, axes, strict=True)):
            raise NotSparseError
        whole = [a for a in range(len(shape)) if a not in axes]
        at = (0, *(1 + whole.index(to[a]) for a in term.whole_axes))
        sizes = (term.values.shape[0], *(shape[a] for a in whole))
        values = lax.broadcast_in_dim(term.values, sizes, at)
        terms.append(Term(term.coords, values, axes, shape, term.source_line))
    return [SparseSum(tuple(terms))]


def _reshape(eqn: Equation, term: Term) -> Term:
    """Keeps coordinates along axes that are as long as before, with as many entries before them."""
    shape = get_type(eqn.outvars[0]).shape
    is_turned = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    if 0 in shape or is_turned:
        raise NotSparseError
    axes: list[int] = []
    for a in term.axes:
        kept = (math.prod(term.shape[:a]), term.shape[a])
        # Axes of size 1 may look alike: each is taken once, in order.
        for b in range(1 + max(axes, default=-1), len(shape)):
            if (math.prod(shape[:b]), shape[b]) == kept:
                axes.append(b)
                break
        else:
            raise NotSparseError
    whole = [size for b, size in enumerate(shape) if b not in axes]
    values = term.values.reshape(term.values.shape[0], *whole)
    return Term(term.coords, values, tuple(axes), shape, term.source_line)


def _transpose(eqn: Equation, term: Term) -> Term:
    order, shape = eqn.params["permutation"], get_type(eqn.outvars[0]).shape
    axes = tuple(b for b, a in enumerate(order) if a in term.axes)
    coords = tuple(term.coords[term.axes.index(order[b])] for b in axes)
    whole = (1 + term.whole_axes.index(a) for a in order if a not in term.axes)
    values = lax.transpose(term.values, (0, *whole))
    return Term(coords, values, axes, shape, term.source_line)


def _reduce_sum(eqn: Equation, term: Term) -> Term:
    gone, shape = eqn.params["axes"], get_type(eqn.outvars[0]).shape
    kept = [a for a in range(len(term.shape)) if a not in gone]
    axes = tuple(b for b, a in enumerate(kept) if a in term.axes)
    if not axes:
        raise NotSparseError
    pairs = zip(term.coords, term.axes, strict=True)
    coords = tuple(coord for coord, axis in pairs if axis not in gone)
    values = jnp.sum(term.values, [1 + i for i, a in enumerate(term.whole_axes) if a in gone])
    return Term(coords, values, axes, shape, term.source_line)


# Arithmetic.


def _entry_wise(eqn: Equation, term: Term) -> Term:
    return dataclasses.replace(term, values=bind(eqn, [term.values]))


def _cast(eqn: Equation, term: Term) -> Term:
    """Casts the slices. Casts to and from integers do not get here: `find_leading` stops there."""
    values = lax.convert_element_type(term.values, eqn.params["new_dtype"])
    return dataclasses.replace(term, values=values)


def _add(eqn: Equation, sums: Sequence[Operand], _: Sequence[jax.Array]) -> list[Operand]:
    """Adds terms up, or into a dense array: a table used both ways gets one array of its size."""
    left, right = sums
    if isinstance(left, SparseSum) and isinstance(right, SparseSum):
        return [SparseSum((*left.terms, *right.terms))]
    slices, total = (left, right) if isinstance(left, SparseSum) else (right, left)
    if isinstance(total, SparseSum):
        raise NotSparseError
    for term in _terms(slices):
        total = term.add_to(total)
    return [total]


def _scale(eqn: Equation, sums: Sequence[Operand], arrays: Sequence[jax.Array]) -> list[Operand]:
    """Multiplies or divides: of the other operand, only the entries at the slices matter."""
    left, right = sums[0], (arrays or sums[1:])[0]  # a quotient is linear in the first alone
    if isinstance(right, SparseSum):
        left, right = right, left
    if isinstance(right, SparseSum) or eqn.params.get("out_dtype") is not None:
        raise NotSparseError
    scale = lax.mul if eqn.primitive.name == "mul" else lax.div
    terms = []
    for term in _terms(left):
        if term.shape != get_type(eqn.outvars[0]).shape:
            raise NotSparseError  # one row that becomes many
        values = scale(term.values, _look_up(right, term))
        terms.append(dataclasses.replace(term, values=values))
    return [SparseSum(tuple(terms))]


def _look_up(factor: jax.Array, term: Term) -> jax.Array:
    """Returns the entries of ``factor`` for the slices of ``term``, of the rank of its values.

    An axis of ``factor`` has the size it has in ``term`` or size 1: one number for all coordinates.
    """
    if jnp.ndim(factor) == 0:
        return factor
    each = [k for k, axis in enumerate(term.axes) if factor.shape[axis] != 1]
    alike = [axis for axis in term.axes if factor.shape[axis] == 1]
    order = (*(term.axes[k] for k in each), *alike, *term.whole_axes)
    factor = lax.transpose(factor, order)
    if each:
        coords = tuple(term.coords[k] for k in each)
        factor = factor.at[coords].get(mode="fill", fill_value=1)
    count = term.values.shape[0] if each else 1
    return factor.reshape(count, *factor.shape[len(factor.shape) - len(term.whole_axes) :])


# Devices, inside shard_map, and what leaves a cotangent as it is.


def _vary(eqn: Equation, term: Term) -> Term:
    """Types the slices as varying over devices, as the whole array is then typed."""
    vary = functools.partial(cast_to_varying, axes=frozenset(eqn.params["axes"]))
    return dataclasses.replace(term, coords=tuple(map(vary, term.coords)), values=vary(term.values))


def _all_gather(eqn: Equation, term: Term) -> Term:
    """The sum over devices: the slices of all of them."""
    if eqn.params.get("axis_index_groups") is not None:
        raise NotSparseError
    for axis in eqn.params["axes"]:
        gather = functools.partial(lax.all_gather, axis_name=axis, tiled=True, to="invarying")
        term = dataclasses.replace(
            term, coords=tuple(map(gather, term.coords)), values=gather(term.values)
        )
    return term


def _reshard(eqn: Equation, term: Term) -> Term:
    """To another sharding, or into or out of Auto axes: all slices on every device."""
    sharding = get_type(eqn.outvars[0]).sharding
    row = (sharding.spec[axis] for axis in term.whole_axes)

    def move(x: jax.Array, *spec: object) -> jax.Array:
        to = NamedSharding(sharding.mesh, PartitionSpec(*spec))  # type: ignore[no-untyped-call]
        moved: jax.Array = bind(eqn, [x], dst_sharding=to)
        return moved

    coords = tuple(move(coord, None) for coord in term.coords)
    return dataclasses.replace(term, coords=coords, values=move(term.values, None, *row))


def _keep(eqn: Equation, sums: Sequence[Operand], _: Sequence[jax.Array]) -> list[Operand]:
    return list(sums)


RULES: dict[str, Rule] = {
    "scatter-add": add_scattered,
    "dynamic_update_slice": update_slice,
    "pad": _pad,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "broadcast_in_dim": _broadcast_in_dim,
    "add_any": _add,
    "mul": _scale,
    "div": _scale,
    "reshape": _term_wise(_reshape),
    "squeeze": _term_wise(_reshape),
    "transpose": _term_wise(_transpose),
    "reduce_sum": _term_wise(_reduce_sum),
    "neg": _term_wise(_entry_wise),
    "convert_element_type": _term_wise(_cast),
    "reduce_precision": _term_wise(_entry_wise),
    "copy": _keep,
    "sharding_constraint": _keep,
    "reshard": _term_wise(_reshard),
    "optimization_barrier": _keep,
    "pvary": _term_wise(_vary),
    "psum_invariant": _term_wise(_all_gather),
}

# How many operands an equation is linear in, where that is not just the first; None for all.
_LINEAR_OPERANDS = {"add_any": 2, "mul": 2, "concatenate": None, "optimization_barrier": None}


def count_linear_operands(eqn: Equation) -> int:
    """Returns how many of its first operands an equation with a rule is linear in."""
    count = _LINEAR_OPERANDS.get(eqn.primitive.name, 1)
    return len(eqn.invars) if count is None else count
