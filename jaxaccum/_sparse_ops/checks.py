"""Reads the arguments of the sparse ops, and refuses those that are wrong."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify, sparse
from jax.typing import ArrayLike

from jaxaccum._rows.shapes import check_host_indices
from jaxaccum._sparse_ops import keys, places
from jaxaccum._sparse_ops.bounds import Start


def check_operand(name: str, mat: object, *, numeric: bool) -> None:
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


def check_same_kind(a: sparse.BCOO, b: sparse.BCOO) -> None:
    """Raises unless shapes and dtypes agree."""
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {a.shape} and {b.shape}")
    if a.data.dtype != b.data.dtype:
        raise TypeError(f"a and b must have the same dtype, got {a.data.dtype} and {b.data.dtype}")


def read_flags(mat: sparse.BCOO) -> places.Flags:
    """Returns the promises of ``mat``; those of an array without dimensions mean nothing."""
    is_unique = mat.unique_indices and (mat.ndim > 0 or mat.nse <= 1)
    return places.Flags(mat.indices_sorted or mat.ndim == 0, is_unique)


def make_layout(shape: Sequence[int], *indices: jax.Array) -> keys.KeyLayout:
    """Returns how indices into ``shape`` fold, which must be expressible in their dtype."""
    dtype = keys.choose_dtype(*indices)
    dims = tuple(operator.index(d) for d in shape)
    if any(not 0 <= d <= np.iinfo(dtype).max for d in dims):
        raise ValueError(
            f"shape {dims} must lie within 0 and {np.iinfo(dtype).max} for {dtype} indices: "
            "padding is one past the end"
        )
    return keys.KeyLayout(dims, dtype)


def read_nse(nse: int | None, default: int) -> int:
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


def check_fits(count: jax.Array, nse: int, most: int) -> None:
    """Raises if ``count`` entries do not fit ``nse``; where traced, checkify reports it."""
    if nse >= most:
        return
    text = f"nse={nse} is too small: entries of the result: "
    if isinstance(count, jax.core.Tracer):
        checkify.debug_check(count <= nse, text + "{count}", count=count)
    elif int(count) > nse:
        raise ValueError(text + f"{int(count)}")


def read_tangent(name: str, dot: ArrayLike, values: jax.Array) -> jax.Array:
    """Returns a tangent as an array like ``values``."""
    dot = jnp.asarray(dot)
    if dot.shape != values.shape:
        raise ValueError(f"{name} must have the shape {values.shape}, got {dot.shape}")
    if dot.dtype != values.dtype:
        raise TypeError(f"{name} must have the dtype {values.dtype}, got {dot.dtype}")
    return dot


def read_slice(rows: jax.Array, start: Start, out: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the rows of a slice's input, where it started and its output, in one dtype."""
    start = _read_integers("input_start", start)
    if start.ndim != 1:
        raise ValueError(f"input_start must be a vector, got shape {start.shape}")
    if start.shape[0] != rows.shape[1]:
        raise ValueError(
            f"input_start must have {rows.shape[1]} entries, one a column of input_indices, "
            f"got {start.shape[0]}"
        )
    return unify_dtypes(rows, start, out)


def check_all_propagated(num_used: jax.Array, num_given: int) -> None:
    """Raises if a gradient found no row; where traced, checkify reports it."""
    text = f"elements of backprop_val_grad have no row in input_indices: of {num_given} used "
    if isinstance(num_used, jax.core.Tracer):
        checkify.debug_check(num_used == num_given, text + "{used}", used=num_used)
    elif int(num_used) != num_given:
        raise ValueError(text + f"{int(num_used)}")


def read_grad_and_rows(
    grad: ArrayLike, named: dict[str, ArrayLike]
) -> tuple[jax.Array, list[jax.Array]]:
    """Returns a gradient and index matrices that fit together, the last of them row by row."""
    rows = {name: _read_integers(name, value) for name, value in named.items()}
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
    return grad, list(unify_dtypes(*rows.values()))


def _read_integers(name: str, value: Start) -> jax.Array:
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


def unify_dtypes(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns index arrays in the dtype that holds all of them."""
    dtype = keys.choose_dtype(*arrays)
    # Outside of jit an astype that changes nothing still costs microseconds.
    return tuple(array if array.dtype == dtype else array.astype(dtype) for array in arrays)
