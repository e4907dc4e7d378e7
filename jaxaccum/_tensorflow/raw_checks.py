"""What TensorFlow's sparse kernels refuse, in their order and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxaccum._coordinator.arguments import as_text
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._rows.shapes import check_host_indices

# What users give for a tensor.
Array: TypeAlias = ArrayLike | Sequence[Any]


def integers(name: str, value: Array) -> None:
    """Raises ``TypeError`` unless ``value`` holds integers."""
    dtype = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
    if np.size(value) and not (
        jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)
    ):
        raise TypeError(f"{name} must be an integer, got {dtype}")


def fit_int32(indices: np.ndarray) -> None:
    """Raises where JAX would truncate."""
    try:
        check_host_indices(indices)
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from None


def add(a_ids: Array, a_vals: Array, a_shape: Array, b_ids: Array, b_vals: Array, b_shape: Array,
        thresh: Array) -> None:  # fmt: skip
    """Checks the arguments of SparseAdd."""
    (ai, bi), (av, bv) = _shapes(a_ids, b_ids), _shapes(a_vals, b_vals)
    (sa, sb), (st,) = _shapes(a_shape, b_shape), _shapes(thresh)
    _require(
        len(ai) == len(bi) == 2,
        f"Input indices should be matrices but received shapes: {as_text(ai)} and {as_text(bi)}",
    )
    _require(ai[1] == bi[1], f"Input indices must have the same dimension, got {ai[1]} and {bi[1]}")
    _require(
        len(av) == len(bv) == 1,
        f"Input values should be vectors but received shapes: {as_text(av)} and {as_text(bv)}",
    )
    _require(
        av[0] == ai[0] and bv[0] == bi[0],
        f"Expected {ai[0]} and {bi[0]} non-empty input values, got {av[0]} and {bv[0]}",
    )
    _require(
        len(sa) == len(sb) == 1,
        f"Input shapes should be a vector but received shapes {as_text(sa)} and {as_text(sb)}",
    )
    _require(
        ai[1] == sa[0],
        f"Second dimension of a_indices and length of a_shape must match, got {ai[1]} and {sa[0]}",
    )
    _require(sa[0] > 0, "Tesors must not be empty")
    a_dims, b_dims = np.asarray(a_shape).tolist(), np.asarray(b_shape).tolist()
    _require(
        len(a_dims) == len(b_dims),
        "Operands do not have the same ranks; got shapes: "
        f"{' '.join(map(str, a_dims))} and {' '.join(map(str, b_dims))}",
    )
    for i, (a, b) in enumerate(zip(a_dims, b_dims, strict=True)):
        _require(a == b, f"Operands' shapes do not match: got {a} and {b} for dimension {i}")
    _require(st == (), f"The magnitude threshold must be a scalar: got shape {as_text(st)}")


def add_grad(grad: Array, a_indices: Array, b_indices: Array, sum_indices: Array) -> None:
    """Checks the arguments of SparseAddGrad."""
    (g,), (a, b, s) = _shapes(grad), _shapes(a_indices, b_indices, sum_indices)
    _require(
        len(a) == len(b) == len(s) == 2,
        "Input indices should be matrices but received shapes: "
        f"{as_text(a)} and {as_text(b)} and {as_text(s)}",
    )
    _vector("backprop_val_grad", g)
    # TensorFlow runs the three numbers together.
    _require(
        a[1] == b[1] == s[1],
        "The densified operands should have the same ndims; for A, B, sum got: "
        f"{a[1]}, {b[1]}, {s[1]}",
    )
    _same_count("sum_indices", g, s)


def slice_(indices: Array, values: Array, shape: Array, start: Array, size: Array) -> None:
    """Checks the arguments of SparseSlice."""
    (i, v, d), (st, sz) = _shapes(indices, values, shape), _shapes(start, size)
    _require(len(i) == 2, f"Sparse indices must be rank 2 but is rank {len(i)}")
    _require(len(v) == 1, f"Sparse values must be rank 1 but is rank {len(v)}")
    _require(len(d) == 1, f"Sparse shape must be rank 1 but is rank {len(d)}")
    _require(
        i[0] == v[0], f"Number of elements in indices ({i[0]}) and values ({v[0]}) do not match"
    )
    _require(i[1] == d[0], f"Index rank ({i[1]}) and shape rank ({d[0]}) do not match")
    _require(len(st) == 1, f"Input start should be a vector but received shape {as_text(st)}")
    _require(len(sz) == 1, f"Input size should be a vector but received shape {as_text(sz)}")
    for name, bound in (("start", st), ("size", sz)):
        _require(
            bound == d, f"Expected {name} to be a vector of length {d[0]} but got length {bound[0]}"
        )
    dims = np.asarray(shape).tolist()
    for dim in dims:
        _require(dim >= 0, f"Expected shape dimensions to be non-negative, got {dim}")
    for k in range(1, len(dims)):
        _require(
            math.prod(dims[: k + 1]) < 2**63,
            f"Encountered overflow when multiplying {math.prod(dims[:k])} with {dims[k]}, "
            "result: -1",
        )
    for extent in np.asarray(size).tolist():
        _require(extent >= 0, f"Expected a non-negative size, got {extent}")


def slice_grad(
    grad: Array, input_indices: Array, input_start: Array, output_indices: Array
) -> None:
    """Checks the arguments of SparseSliceGrad."""
    (g, st), (i, o) = _shapes(grad, input_start), _shapes(input_indices, output_indices)
    _require(
        len(i) == len(o) == 2,
        "Input and output indices should be matrices but received shapes: "
        f"{as_text(i)} and {as_text(o)}",
    )
    _vector("backprop_val_grad", g)
    _require(
        i[1] == o[1], f"The input and output should have the same ndims: got: {i[1]} and {o[1]}"
    )
    _require(
        o[0] <= i[0],
        "# rows of output_indices should be not greater than of input_indices, "
        f"got {o[0]} and {i[0]}",
    )
    _same_count("output_indices", g, o)
    _require(len(st) == 1, f"The input_start should be a vector but received shape {as_text(st)}")
    _require(
        st[0] == i[1],
        f"Expected input_start to be a vector of length {i[1]} but got length {st[0]}",
    )


def _shapes(*arrays: Array) -> list[tuple[int, ...]]:
    _require(
        not any(isinstance(array, np.ma.MaskedArray) for array in arrays),
        "Masked arrays are not accepted: fill them (numpy.ma.filled) or leave entries out",
    )
    return [np.shape(array) for array in arrays]


def _vector(name: str, shape: tuple[int, ...]) -> None:
    _require(
        len(shape) == 1, f"Input {name} should be a vector but received shape: {as_text(shape)}"
    )


def _same_count(name: str, grad: tuple[int, ...], rows: tuple[int, ...]) -> None:
    _require(
        grad[0] == rows[0],
        f"# elements of backprop_val_grad and # rows of {name} should match (#nnz of sum): "
        f"got {grad[0]} and {rows[0]}",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidArgumentError(message)
