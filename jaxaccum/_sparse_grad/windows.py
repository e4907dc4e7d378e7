"""Where slices come from: scatters into zeros and slice updates, which gathers leave behind."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaccum._sparse_grad.jaxpr import Equation, find_source_line, get_type
from jaxaccum._sparse_grad.terms import Operand, SparseSum, Term


class NotSparseError(Exception):
    """An equation cannot keep its result as terms."""


def mask(
    coords: Iterable[jax.Array], sizes: Iterable[int], valid: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns ``coords`` where ``valid``, and one past the end elsewhere."""
    return tuple(jnp.where(valid, c, s) for c, s in zip(coords, sizes, strict=True))


def make_term(
    start: dict[int, jax.Array], window: jax.Array, shape: tuple[int, ...], *, clip: bool
) -> Term:
    """Returns the term of windows written into zeros, as scatters and slice updates write them.

    ::

        start {0: [2, 0]}, window [2, 1, 2]          coords[0]   values [2, 3]

          zeros (4, 3)   . . .                                   (axis 1 widened to 3)
          0 --> b b .    . . .             --->          2       a a .
          2 --> a a .    . . .                           0       b b .

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
    first, valid = _clip_starts(start, sizes, shape, count, clip)
    for axis, width in enumerate(sizes):
        if axis not in points and width < shape[axis]:
            window = _widen(window, first[axis], axis, shape[axis])
    # Windows of several rows fall apart into their rows.
    span = sizes[0] if 0 in points else 1
    coords = {axis: jnp.repeat(first[axis], span) for axis in points}
    if span > 1:
        coords[0] += jnp.tile(jnp.arange(span, dtype=jnp.int32), count)
    whole = [window.shape[1 + a] for a in range(len(shape)) if a not in points]
    masked = mask(coords.values(), [shape[a] for a in points], jnp.repeat(valid, span))
    return Term(masked, window.reshape(count * span, *whole), tuple(points), tuple(shape))


def _clip_starts(
    start: dict[int, jax.Array],
    sizes: tuple[int, ...],
    shape: tuple[int, ...],
    count: int,
    clip: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """Returns where windows start in each axis, int32, and which of them are there at all."""
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


def add_scattered(
    eqn: Equation, sums: Sequence[Operand], arrays: Sequence[jax.Array]
) -> list[Operand]:
    """Adds the slices of a scatter-add to those it is added to."""
    (base,), (indices, updates) = sums, arrays
    if not isinstance(base, SparseSum):
        raise NotSparseError
    dims, mode, shape = (
        eqn.params["dimension_numbers"],
        eqn.params["mode"],
        get_type(eqn.outvars[0]).shape,
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
    term = make_term(start, window, shape, clip=mode == known.CLIP)
    return [SparseSum((*base.terms, dataclasses.replace(term, source_line=find_source_line(eqn))))]


def update_slice(
    eqn: Equation, sums: Sequence[Operand], arrays: Sequence[jax.Array]
) -> list[Operand]:
    """Gives the slices of a dynamic_update_slice of zeros."""
    (base,), (update, *start) = sums, arrays
    if not isinstance(base, SparseSum) or base.terms:
        raise NotSparseError  # what is overwritten would have to be searched for
    starts = {axis: jnp.asarray(first)[None] for axis, first in enumerate(start)}
    term = make_term(starts, update[None], get_type(eqn.outvars[0]).shape, clip=True)
    return [SparseSum((dataclasses.replace(term, source_line=find_source_line(eqn)),))]
