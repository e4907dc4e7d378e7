"""The arithmetic of limits: the magnitude ``thresh`` sets, the rows ``start`` and ``size`` keep.

Each is worked out for numbers that are known and for traced ones, within the ranges of the types.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxaccum._sparse_ops import places
from jaxaccum._sparse_ops.keys import DType

# Where a slice starts and how far it goes, as callers write it.
Start = ArrayLike | Sequence[ArrayLike]
Size = Sequence[int]


def make_limit(thresh: ArrayLike, dtype: DType) -> places.Limit | None:
    """Returns the limit ``thresh`` sets to magnitudes of ``dtype``, None if it sets none.

    For integers ``|s| >= thresh`` is ``|s| >= ceil(thresh)``, so fractions lose nothing.
    """
    if not isinstance(thresh, jax.core.Tracer):
        thresh = np.asarray(thresh)
    if thresh.dtype == bool or not (
        jnp.issubdtype(thresh.dtype, jnp.integer) or jnp.issubdtype(thresh.dtype, jnp.floating)
    ):
        raise TypeError(f"thresh must be a real number, got dtype {thresh.dtype}")
    if thresh.shape != ():
        raise ValueError(f"thresh must be a scalar, got shape {thresh.shape}")
    size = places.choose_magnitude_dtype(dtype)
    if isinstance(thresh, jax.core.Tracer):
        return _make_traced_limit(thresh, size)
    return _make_static_limit(thresh.item(), size)


def _make_static_limit(thresh: float, size: DType) -> places.Limit | None:
    if thresh <= 0:
        return None
    if jnp.issubdtype(size, jnp.floating):
        with np.errstate(over="ignore"):  # beyond the type's range: infinity
            return places.Limit(jnp.asarray(np.float64(thresh).astype(size)), jnp.asarray(False))
    least = math.ceil(thresh) if math.isfinite(thresh) else math.inf
    exceeds = least > np.iinfo(size).max
    return places.Limit(jnp.asarray(0 if exceeds else least, size), jnp.asarray(exceeds))


def _make_traced_limit(thresh: jax.Array, size: DType) -> places.Limit:
    if jnp.issubdtype(size, jnp.floating):
        return places.Limit(thresh.astype(size), jnp.asarray(False))
    if jnp.issubdtype(thresh.dtype, jnp.floating):
        least = jnp.ceil(thresh)
        # The first number out of range is a power of two, exact in any float or infinite; and a
        # NaN is never below it.
        exceeds = ~(least < jnp.asarray(2.0 ** (8 * size.itemsize), thresh.dtype))
    else:
        least, most = thresh, np.iinfo(size).max
        fits_type = np.iinfo(thresh.dtype).max <= most
        exceeds = jnp.asarray(False) if fits_type else thresh > jnp.asarray(most, thresh.dtype)
    is_limit = (least > 0) & ~exceeds
    return places.Limit(jnp.where(is_limit, least, jnp.zeros_like(least)).astype(size), exceeds)


def make_window(
    shape: tuple[int, ...], start: Start, size: Size, dtype: DType
) -> tuple[tuple[int, ...], places.Window]:
    """Returns the shape of a slice and the rows it keeps, by TensorFlow's bounds."""
    origin = _read_start(start, len(shape))
    sizes = _read_sizes(size, len(shape))
    if isinstance(origin, jax.core.Tracer):
        return _make_traced_window(shape, origin, sizes, dtype)
    out, rows = [], []
    for axis, (dim, first, extent) in enumerate(zip(shape, origin.tolist(), sizes, strict=True)):
        # TensorFlow looks at the size only where the start leaves any of the dimension to cut.
        if first < dim - extent and extent < 0:
            raise _describe_negative(sizes, axis)
        out.append(extent if first < dim - extent else max(dim - first, 0))
        low = max(first, 0)
        reach = max(0, min(first + extent, dim) - low)
        rows.append((low, reach, first) if reach else (0, 0, 0))
    columns = [*np.array(rows, np.int64).reshape(-1, 3).T, np.array(out, object)]
    if out and max(out) > np.iinfo(dtype).max:
        raise ValueError(
            f"start {tuple(origin.tolist())} and size {sizes} give the shape {tuple(out)}, "
            f"which {dtype} indices cannot address"
        )
    return tuple(out), places.Window(*(jnp.asarray(c.astype(dtype)) for c in columns))


def _make_traced_window(
    shape: tuple[int, ...], start: jax.Array, sizes: tuple[int, ...], dtype: DType
) -> tuple[tuple[int, ...], places.Window]:
    for axis, extent in enumerate(sizes):
        if extent < 0:
            raise _describe_negative(sizes, axis)
    out = tuple(min(extent, dim) for extent, dim in zip(sizes, shape, strict=True))
    dims, extents = jnp.asarray(shape, dtype), jnp.asarray(out, dtype)
    if jnp.issubdtype(start.dtype, jnp.unsignedinteger):
        # Signed from here on; whatever lies above the signed range lies past the end too.
        signed = jnp.dtype(f"int{8 * start.dtype.itemsize}")
        most = jnp.asarray(np.iinfo(signed).max, start.dtype)
        past = start > most
        start = jnp.where(past, jnp.zeros_like(start), start).astype(signed)
        start = jnp.where(past, dims, start.astype(dtype))
    wide = dtype if start.dtype.itemsize <= dtype.itemsize else start.dtype
    # A box wholly before or past the array is moved to its edge, so that nothing overflows.
    first = jnp.clip(start.astype(wide), -extents.astype(wide), dims.astype(wide)).astype(dtype)
    reach = extents + jnp.minimum(first, 0)
    low = jnp.maximum(first, 0)
    # `low + reach` may pass the end, where only padding could be met.
    return out, places.Window(low, jnp.minimum(reach, dims - low), first, extents)


def _describe_negative(sizes: tuple[int, ...], axis: int) -> ValueError:
    return ValueError(f"size must not be negative, got {sizes[axis]} for axis {axis} in {sizes}")


def _read_sizes(size: Size, rank: int) -> tuple[int, ...]:
    if isinstance(size, jax.core.Tracer):
        raise TypeError("size decides a shape and must be static, got a traced array")
    if np.ndim(size) != 1:
        raise ValueError(f"size must be a vector of {rank} integers, got shape {np.shape(size)}")
    try:
        sizes = tuple(operator.index(s) for s in size)
    except TypeError:
        raise TypeError(f"size must hold integers, got {size!r}") from None
    if len(sizes) != rank:
        raise ValueError(f"size must have {rank} entries, one an axis, got {len(sizes)}: {sizes}")
    return sizes


def _read_start(start: Start, rank: int) -> np.ndarray | jax.Array:
    if not isinstance(start, jax.Array):
        if isinstance(start, Sequence) and any(isinstance(s, jax.core.Tracer) for s in start):
            start = jnp.stack([jnp.asarray(s) for s in start])
        else:
            start = np.asarray(start)
            start = start.astype(np.int64) if start.size == 0 else start
    if start.ndim != 1:
        raise ValueError(f"start must be a vector of {rank} integers, got shape {start.shape}")
    if start.shape[0] != rank:
        raise ValueError(f"start must have {rank} entries, one an axis, got {start.shape[0]}")
    if not jnp.issubdtype(start.dtype, jnp.integer):
        raise TypeError(f"start must hold integers, got {start.dtype}")
    return start if isinstance(start, jax.core.Tracer) else np.asarray(start)
