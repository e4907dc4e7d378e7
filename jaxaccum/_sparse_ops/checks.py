"""What the sparse ops refuse, and what they make of scalars, bounds and flags."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify, sparse
from jax.typing import ArrayLike

from jaxaccum._rows.indexed_slices import check_host_indices
from jaxaccum._sparse_ops import keys, places


def operand(name: str, mat: object, *, numeric: bool) -> None:
    """Raises unless ``mat`` is a BCOO whose dimensions are all sparse."""
    if not isinstance(mat, sparse.BCOO):
        raise TypeError(f"{name} must be a BCOO array, got {type(mat).__name__}")
    rows, data = jnp.shape(mat.indices), jnp.shape(mat.data)
    if len(data) != 1 or rows != (*data, mat.ndim):
        raise ValueError(
            f"{name} must have n_batch=0, n_dense=0 and n_sparse={mat.ndim}: data [nse] and "
            f"indices [nse, {mat.ndim}] for its shape {mat.shape}, got data of shape {data} "
            f"and indices of shape {rows}"
        )
    if numeric and mat.data.dtype == bool:
        raise TypeError(f"{name} must have a numeric dtype, got bool")


def same_kind(a: sparse.BCOO, b: sparse.BCOO) -> None:
    """Raises unless shapes and dtypes agree."""
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {a.shape} and {b.shape}")
    if a.data.dtype != b.data.dtype:
        raise TypeError(f"a and b must have the same dtype, got {a.data.dtype} and {b.data.dtype}")


def flags(mat: sparse.BCOO) -> places.Flags:
    """Returns the promises of ``mat``; those of an array without dimensions mean nothing."""
    is_unique = mat.unique_indices and (mat.ndim > 0 or mat.nse <= 1)
    return places.Flags(mat.indices_sorted or mat.ndim == 0, is_unique)


def layout(shape: Sequence[int], *indices: jax.Array) -> keys.KeyLayout:
    """Returns how indices into ``shape`` fold, which must be expressible in their dtype."""
    dtype = keys.common_dtype(*indices)
    dims = tuple(operator.index(d) for d in shape)
    if any(not 0 <= d <= np.iinfo(dtype).max for d in dims):
        raise ValueError(
            f"shape {dims} must lie within 0 and {np.iinfo(dtype).max} for {dtype} indices: "
            "padding is one past the end"
        )
    return keys.KeyLayout(dims, dtype)


def room(nse: int | None, default: int) -> int:
    """Returns the number of entries of a result."""
    if nse is None:
        return default
    try:
        count = operator.index(nse)
    except TypeError:
        raise TypeError(f"nse must be an int, got {nse!r}") from None
    if count < 0:
        raise ValueError(f"nse must not be negative, got {count}")
    return count


def fits(count: jax.Array, nse: int, most: int) -> None:
    """Raises if ``count`` entries do not fit ``nse``; where traced, checkify reports it."""
    if nse >= most:
        return
    text = f"nse={nse} is too small: entries of the result: "
    if isinstance(count, jax.core.Tracer):
        checkify.debug_check(count <= nse, text + "{count}", count=count)
    elif int(count) > nse:
        raise ValueError(text + f"{int(count)}")


def tangent(name: str, dot: ArrayLike, values: jax.Array) -> jax.Array:
    """Returns a tangent as an array like ``values``."""
    dot = jnp.asarray(dot)
    if dot.shape != values.shape:
        raise ValueError(f"{name} must have the shape {values.shape}, got {dot.shape}")
    if dot.dtype != values.dtype:
        raise TypeError(f"{name} must have the dtype {values.dtype}, got {dot.dtype}")
    return dot


def threshold(thresh: ArrayLike, dtype: np.dtype[Any]) -> places.Limit | None:
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
    size = places.magnitude_dtype(dtype)
    if isinstance(thresh, jax.core.Tracer):
        return _traced_limit(thresh, size)
    return _static_limit(thresh.item(), size)


def _static_limit(thresh: Any, size: np.dtype[Any]) -> places.Limit | None:
    if thresh <= 0:
        return None
    if jnp.issubdtype(size, jnp.floating):
        with np.errstate(over="ignore"):  # beyond the type's range: infinity
            return places.Limit(jnp.asarray(np.float64(thresh).astype(size)), jnp.asarray(False))
    least = math.ceil(thresh) if math.isfinite(thresh) else math.inf
    exceeds = least > np.iinfo(size).max
    return places.Limit(jnp.asarray(0 if exceeds else least, size), jnp.asarray(exceeds))


def _traced_limit(thresh: jax.Array, size: np.dtype[Any]) -> places.Limit:
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


def window(
    shape: tuple[int, ...], start: Any, size: Any, dtype: np.dtype[Any]
) -> tuple[tuple[int, ...], places.Window]:
    """Returns the shape of a slice and the rows it keeps, by TensorFlow's bounds."""
    origin = _start(start, len(shape))
    sizes = _sizes(size, len(shape))
    if isinstance(origin, jax.core.Tracer):
        return _traced_window(shape, origin, sizes, dtype)
    out, rows = [], []
    for axis, (dim, first, extent) in enumerate(zip(shape, origin.tolist(), sizes, strict=True)):
        # TensorFlow looks at the size only where the start leaves any of the dimension to cut.
        if first < dim - extent and extent < 0:
            raise _negative(sizes, axis)
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


def _traced_window(
    shape: tuple[int, ...], start: jax.Array, sizes: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[tuple[int, ...], places.Window]:
    for axis, extent in enumerate(sizes):
        if extent < 0:
            raise _negative(sizes, axis)
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


def _negative(sizes: tuple[int, ...], axis: int) -> ValueError:
    return ValueError(f"size must not be negative, got {sizes[axis]} for axis {axis} in {sizes}")


def _sizes(size: Any, rank: int) -> tuple[int, ...]:
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


def _start(start: Any, rank: int) -> Any:
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


def cut_from(rows: jax.Array, start: Any, out: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the rows of a slice's input, where it started and its output, in one dtype."""
    start = _integers("input_start", start)
    if start.ndim != 1:
        raise ValueError(f"input_start must be a vector, got shape {start.shape}")
    if start.shape[0] != rows.shape[1]:
        raise ValueError(
            f"input_start must have {rows.shape[1]} entries, one a column of input_indices, "
            f"got {start.shape[0]}"
        )
    return same_dtype(rows, start, out)


def all_propagated(num_used: jax.Array, num_given: int) -> None:
    """Raises if a gradient found no row; where traced, checkify reports it."""
    text = f"elements of backprop_val_grad have no row in input_indices: of {num_given} used "
    if isinstance(num_used, jax.core.Tracer):
        checkify.debug_check(num_used == num_given, text + "{used}", used=num_used)
    elif int(num_used) != num_given:
        raise ValueError(text + f"{int(num_used)}")


def grad_and_rows(grad: Any, named: dict[str, Any]) -> tuple[jax.Array, list[jax.Array]]:
    """Returns a gradient and index matrices that fit together, the last of them row by row."""
    rows = {name: _integers(name, value) for name, value in named.items()}
    shapes = {name: array.shape for name, array in rows.items()}
    if any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"indices must be matrices [nnz, ndims], got shapes {shapes}")
    grad = jnp.asarray(grad)
    if grad.ndim != 1:
        raise ValueError(f"backprop_val_grad must be a vector, got shape {grad.shape}")
    if not jnp.issubdtype(grad.dtype, jnp.number):
        raise TypeError(f"backprop_val_grad must have a numeric dtype, got {grad.dtype}")
    if len({shape[1] for shape in shapes.values()}) != 1:
        raise ValueError(f"indices must have the same number of columns, got shapes {shapes}")
    name, (num_rows, _) = list(shapes.items())[-1]
    if num_rows != grad.shape[0]:
        raise ValueError(
            f"backprop_val_grad must have one element a row of {name}, "
            f"got {grad.shape[0]} and {num_rows}"
        )
    return grad, list(same_dtype(*rows.values()))


def _integers(name: str, value: Any) -> jax.Array:
    if isinstance(value, jax.Array):
        array = value
    else:
        host = np.asarray(value)
        if not host.size:  # an empty list has no dtype of its own
            host = host.astype(np.int32)
        if jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
            check_host_indices(host)  # JAX would truncate them
        array = jnp.asarray(host)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    return array


def same_dtype(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns index arrays in the dtype that holds all of them."""
    dtype = keys.common_dtype(*arrays)
    # Outside of jit an astype that changes nothing still costs microseconds.
    return tuple(array if array.dtype == dtype else array.astype(dtype) for array in arrays)
