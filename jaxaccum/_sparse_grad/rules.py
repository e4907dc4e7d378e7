"""What each equation of a backward pass does to a cotangent that is a sum of slices."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core, source_info_util
from jax.sharding import NamedSharding, PartitionSpec

from jaxaccum._sparse_grad.terms import Carry, SparseSum, Term


class NotSparseError(Exception):
    """An equation cannot keep its result as terms."""


# Gives an equation's results from its operands, which are arrays or SparseSums.
Rule = Callable[[Any, Sequence[Any]], list[SparseSum]]


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr itself, closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_var(atom: Any) -> bool:
    """Whether an operand or result is a variable and no literal."""
    return not isinstance(atom, core.Literal)


def place(eqn: Any) -> str:
    """The line of the user's source that an equation comes from."""
    own = str(pathlib.Path(__file__).parent)
    frames = source_info_util.summarize(eqn.source_info, num_frames=50).splitlines()[::-1]
    users = [f for f in frames if "site-packages" not in f and not f.startswith(own)]
    return (users or frames or ["an unknown line"])[0]


def blame(eqn: Any) -> str:
    """Says that an equation makes a gradient dense."""
    name = eqn.primitive.name
    return f"{place(eqn)} does more than look up rows of it (`{name}` going backward)"


def is_zero(atom: Any) -> bool:
    """Whether an operand of an equation is the literal number 0."""
    return isinstance(atom, core.Literal) and np.ndim(atom.val) == 0 and not atom.val


def _terms(operand: Any) -> tuple[Term, ...]:
    """The terms of a cotangent that can be looked into."""
    if not isinstance(operand, SparseSum) or any(isinstance(t, Carry) for t in operand.terms):
        raise NotSparseError
    return operand.terms  # type: ignore[return-value]  # no Carry is among them


def _mask(coords: Iterable[jax.Array], sizes: Iterable[int], valid: jax.Array) -> Any:
    return tuple(jnp.where(valid, c, s) for c, s in zip(coords, sizes, strict=True))


# Where slices come from: the transposes of gathers and slices.


def windows(start: dict[int, jax.Array], window: jax.Array, shape: Any, *, clip: bool) -> Term:
    """The term of windows written into zeros, as scatters and slice updates write them.

    Axes in which a window is one wide become coordinates, and so does axis 0 unless the window
    covers it. A window over a part of any other axis is put into zeros of that axis' size: some
    columns of a row make a whole row.

    Args:
      start: integers ``[n]`` for each axis that is indexed; the others start at 0.
      window: ``[n, *window sizes]``, a size for every axis of ``shape``.
      shape: of the whole array.
      clip: moves windows that overhang inside, as XLA's slices do; else they are dropped.
    """
    sizes, count = window.shape[1:], window.shape[0]
    points = [a for a, w in enumerate(sizes) if w < shape[a] and (w == 1 or a == 0)]
    points = points or [0] * (sizes[0] == 1)
    if not points or max(shape) > np.iinfo(np.int32).max:
        raise NotSparseError
    first, valid = _starts(start, sizes, shape, count, clip)
    for axis, width in enumerate(sizes):
        if axis not in points and width < shape[axis]:
            window = _widen(window, first[axis], axis, shape[axis])
    # Windows of several rows fall apart into their rows.
    span = sizes[0] if 0 in points else 1
    coords = {axis: jnp.repeat(first[axis], span) for axis in points}
    if span > 1:
        coords[0] += jnp.tile(jnp.arange(span, dtype=jnp.int32), count)
    whole = [window.shape[1 + a] for a in range(len(shape)) if a not in points]
    masked = _mask(coords.values(), [shape[a] for a in points], jnp.repeat(valid, span))
    return Term(masked, window.reshape(count * span, *whole), tuple(points), tuple(shape))


def _starts(
    start: dict[int, jax.Array], sizes: Any, shape: Any, count: int, clip: bool
) -> tuple[list[jax.Array], jax.Array]:
    """Where windows start in each axis, int32, and which of them are there at all."""
    first, valid = [jnp.zeros(count, jnp.int32)] * len(shape), jnp.ones(count, bool)
    for axis, ids in start.items():
        last = shape[axis] - sizes[axis]
        # Ids of a narrow type could not hold the row count they are compared with.
        ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
        valid = valid if clip else valid & (ids >= 0) & (ids <= last)
        first[axis] = jnp.clip(ids, 0, last).astype(jnp.int32)
    return first, valid


def _widen(window: jax.Array, start: jax.Array, axis: int, size: int) -> jax.Array:
    zeros = jnp.zeros((*window.shape[1 : axis + 1], size, *window.shape[axis + 2 :]), window.dtype)
    put = functools.partial(lax.dynamic_update_slice_in_dim, zeros, axis=axis)
    return jax.vmap(put)(window, start)


def _scatter_add(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
    base, indices, updates = operands
    if not isinstance(base, SparseSum):
        raise NotSparseError
    dims, mode, shape = (
        eqn.params["dimension_numbers"],
        eqn.params["mode"],
        eqn.outvars[0].aval.shape,
    )
    known = lax.GatherScatterMode
    if mode not in (known.CLIP, known.FILL_OR_DROP, known.PROMISE_IN_BOUNDS):
        raise NotSparseError
    batch = indices.shape[:-1]
    axes = dims.scatter_dims_to_operand_dims
    start = {int(axis): indices[..., k].reshape(-1) for k, axis in enumerate(axes)}
    batching = zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims, strict=True)
    for axis, dim in batching:
        start[int(axis)] = lax.broadcasted_iota(jnp.int32, batch, int(dim)).reshape(-1)
    scattered = [d for d in range(updates.ndim) if d not in dims.update_window_dims]
    window = lax.transpose(updates, (*scattered, *(int(d) for d in dims.update_window_dims)))
    sizes = iter(window.shape[len(batch) :])
    narrow = (*dims.inserted_window_dims, *dims.operand_batching_dims)
    full = [1 if axis in narrow else next(sizes) for axis in range(len(shape))]
    window = window.reshape(math.prod(batch), *full)
    term = windows(start, window, shape, clip=mode == known.CLIP)
    return [SparseSum((*base.terms, dataclasses.replace(term, origin=place(eqn))))]


def _dynamic_update_slice(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
    base, update, *start = operands
    if not isinstance(base, SparseSum) or base.terms:
        raise NotSparseError  # what is overwritten would have to be searched for
    starts = {axis: jnp.asarray(first)[None] for axis, first in enumerate(start)}
    term = windows(starts, update[None], eqn.outvars[0].aval.shape, clip=True)
    return [SparseSum((dataclasses.replace(term, origin=place(eqn)),))]


def _pad(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
    operand, shape = operands[0], eqn.outvars[0].aval.shape
    if not is_zero(eqn.invars[1]):
        raise NotSparseError
    if not isinstance(operand, SparseSum):  # the rows of a slice of the table
        if operand.shape[0] == shape[0]:
            raise NotSparseError
        rows = jnp.arange(operand.shape[0], dtype=jnp.int32)
        operand = SparseSum((Term((rows,), operand, (0,), operand.shape, place(eqn)),))
    config = eqn.params["padding_config"]
    return [SparseSum(tuple(_padded(term, config, shape) for term in _terms(operand)))]


def _padded(term: Term, config: Sequence[Any], shape: tuple[int, ...]) -> Term:
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
        _mask(moved, [shape[a] for a in term.axes], valid), values, term.axes, shape, term.origin
    )


def _shifted(operand: Any, axis: int, low: int, shape: tuple[int, ...]) -> SparseSum:
    """``operand`` moved by ``low`` along ``axis``, cut or padded to ``shape``."""
    terms = []
    for term in _terms(operand):
        config = [(0, 0, 0)] * len(shape)
        config[axis] = (low, shape[axis] - term.shape[axis] - low, 0)
        terms.append(_padded(term, config, shape))
    return SparseSum(tuple(terms))


def _slice(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
    result, start = operands[0], eqn.params["start_indices"]
    if eqn.params["strides"] is not None and set(eqn.params["strides"]) != {1}:
        raise NotSparseError
    shape = list(eqn.invars[0].aval.shape)
    for axis, size in enumerate(eqn.outvars[0].aval.shape):
        shape[axis] = size
        result = _shifted(result, axis, -start[axis], tuple(shape))
    return [result]


def _split(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
    parts, start, axis = [], 0, eqn.params["axis"]
    for var in eqn.outvars:
        parts.append(_shifted(operands[0], axis, -start, var.aval.shape))
        start += var.aval.shape[axis]
    return parts


def _concatenate(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
    terms: list[Term | Carry] = []
    start, axis = 0, eqn.params["dimension"]
    for atom, operand in zip(eqn.invars, operands, strict=True):
        terms.extend(_shifted(operand, axis, start, eqn.outvars[0].aval.shape).terms)
        start += atom.aval.shape[axis]
    return [SparseSum(tuple(terms))]


# What is done to slices on their way back to the table.


def _term_wise(rule: Callable[[Any, Term], Term]) -> Rule:
    def apply(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
        return [SparseSum(tuple(rule(eqn, term) for term in _terms(operands[0])))]

    return apply


def _entry_wise(eqn: Any, term: Term) -> Term:
    return dataclasses.replace(term, values=eqn.primitive.bind(term.values, **eqn.params))


def _broadcast_in_dim(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
    if is_zero(eqn.invars[0]):
        return [SparseSum(())]
    to, shape = eqn.params["broadcast_dimensions"], eqn.outvars[0].aval.shape
    terms: list[Term | Carry] = []
    for term in _terms(operands[0]):
        axes = tuple(int(to[a]) for a in term.axes)
        if any(term.shape[a] != shape[b] for a, b in zip(term.axes, axes, strict=True)):
            raise NotSparseError
        whole = [a for a in range(len(shape)) if a not in axes]
        at = (0, *(1 + whole.index(to[a]) for a in term.whole_axes))
        sizes = (term.values.shape[0], *(shape[a] for a in whole))
        values = lax.broadcast_in_dim(term.values, sizes, at)
        terms.append(Term(term.coords, values, axes, shape, term.origin))
    return [SparseSum(tuple(terms))]


def _reshape(eqn: Any, term: Term) -> Term:
    shape = eqn.outvars[0].aval.shape
    # An axis stays what it is where its size and the number of entries before it do.
    kept = {(math.prod(shape[:b]), size): b for b, size in enumerate(shape)}
    try:
        axes = tuple(kept[math.prod(term.shape[:a]), term.shape[a]] for a in term.axes)
    except KeyError:
        raise NotSparseError from None
    if 0 in shape:
        raise NotSparseError
    whole = [size for b, size in enumerate(shape) if b not in axes]
    values = term.values.reshape(term.values.shape[0], *whole)
    return Term(term.coords, values, axes, shape, term.origin)


def _transpose(eqn: Any, term: Term) -> Term:
    order, shape = eqn.params["permutation"], eqn.outvars[0].aval.shape
    axes = tuple(b for b, a in enumerate(order) if a in term.axes)
    coords = tuple(term.coords[term.axes.index(order[b])] for b in axes)
    whole = (1 + term.whole_axes.index(a) for a in order if a not in term.axes)
    values = lax.transpose(term.values, (0, *whole))
    return Term(coords, values, axes, shape, term.origin)


def _reduce_sum(eqn: Any, term: Term) -> Term:
    gone = eqn.params["axes"]
    kept = [a for a in range(len(term.shape)) if a not in gone]
    axes = tuple(b for b, a in enumerate(kept) if a in term.axes)
    if not axes:
        raise NotSparseError
    pairs = zip(term.coords, term.axes, strict=True)
    coords = tuple(coord for coord, axis in pairs if axis not in gone)
    values = jnp.sum(term.values, [1 + i for i, a in enumerate(term.whole_axes) if a in gone])
    return Term(coords, values, axes, eqn.outvars[0].aval.shape, term.origin)


def _all_gather(eqn: Any, term: Term) -> Term:
    """The sum over devices, inside shard_map: the slices of all of them."""
    for axis in eqn.params["axes"]:
        gather = functools.partial(lax.all_gather, axis_name=axis, tiled=True, to="invarying")
        term = dataclasses.replace(
            term, coords=tuple(map(gather, term.coords)), values=gather(term.values)
        )
    return term


def _reshard(eqn: Any, term: Term) -> Term:
    """To another sharding, or into or out of Auto axes: all slices on every device."""
    sharding = eqn.outvars[0].aval.sharding
    row = (sharding.spec[a] for a in term.whole_axes)

    def moved(x: jax.Array, *spec: Any) -> jax.Array:
        to = NamedSharding(sharding.mesh, PartitionSpec(*spec))  # type: ignore[no-untyped-call]
        return cast("jax.Array", eqn.primitive.bind(x, **{**eqn.params, "dst_sharding": to}))

    coords = tuple(moved(coord, None) for coord in term.coords)
    return dataclasses.replace(term, coords=coords, values=moved(term.values, None, *row))


def _add(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
    if not all(isinstance(operand, SparseSum) for operand in operands):
        raise NotSparseError
    return [SparseSum(tuple(term for operand in operands for term in operand.terms))]


def _scale(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
    """Products and quotients with a dense operand: only its entries at the slices matter."""
    left, right = operands
    if isinstance(right, SparseSum) and eqn.primitive.name == "mul":
        left, right = right, left
    if isinstance(right, SparseSum):
        raise NotSparseError
    terms = []
    for term in _terms(left):
        factor = right
        if jnp.ndim(right):
            order = (*term.axes, *term.whole_axes)
            factor = lax.transpose(right, order).at[term.coords].get(mode="fill", fill_value=1)
        scaled = term.values * factor if eqn.primitive.name == "mul" else term.values / factor
        terms.append(dataclasses.replace(term, values=scaled))
    return [SparseSum(tuple(terms))]


def _identity(eqn: Any, operands: Sequence[Any]) -> list[SparseSum]:
    return list(operands)


RULES: dict[str, Rule] = {
    "scatter-add": _scatter_add,
    "dynamic_update_slice": _dynamic_update_slice,
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
    "convert_element_type": _term_wise(_entry_wise),
    "reduce_precision": _term_wise(_entry_wise),
    "copy": _identity,
    "copy_p": _identity,
    "sharding_constraint": _identity,
    "reshard": _term_wise(_reshard),
    "optimization_barrier": _identity,
    "pvary": _identity,
    "psum_invariant": _term_wise(_all_gather),
}

# How many operands an equation is linear in, where that is not just the first; None for all.
LINEAR_OPERANDS = {"add_any": 2, "mul": 2, "concatenate": None, "optimization_barrier": None}
