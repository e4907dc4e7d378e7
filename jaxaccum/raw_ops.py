"""TensorFlow's raw ops by their names and argument names, all keyword-only, on concrete arrays.

Results have exactly the entries there are. Wrong arguments raise `jaxaccum.InvalidArgumentError`
with TensorFlow's message. Inside ``jit``, and for derivatives, use what lies beneath: `jaxaccum.
apply`, `jaxaccum.sparse_add` and the rest, whose results have static sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._coordinator.coordinator import Coordinator
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._sparse_ops.ops import sparse_add, sparse_slice
from jaxaccum._sparse_ops.raw_grads import pull_slice, sparse_add_grad
from jaxaccum._tensorflow import raw_checks as checks
from jaxaccum._tensorflow.conditional_accumulator import SparseConditionalAccumulator
from jaxaccum._tensorflow.sparse_gradient import SparseGradient, as_tuple

# ruff: noqa: N802  (TensorFlow's names)

__all__ = [
    "AccumulatorNumAccumulated",
    "AccumulatorSetGlobalStep",
    "AddGrads",
    "SparseAccumulatorApplyGradient",
    "SparseAccumulatorTakeGradient",
    "SparseAdd",
    "SparseAddGrad",
    "SparsePart",
    "SparseSlice",
    "SparseSliceGrad",
    "SparseSum",
]

_Handle = SparseConditionalAccumulator | Coordinator
_Array = checks.Array


class SparseSum(NamedTuple):
    """What `SparseAdd` returns.

    Attributes:
      sum_indices: int32 ``[nnz, ndims]``, ascending.
      sum_values: ``[nnz]``.
      sum_shape: int64 ``[ndims]``, in host memory.
    """

    sum_indices: jax.Array
    sum_values: jax.Array
    sum_shape: np.ndarray


class SparsePart(NamedTuple):
    """What `SparseSlice` returns.

    Attributes:
      output_indices: int32 ``[nnz, ndims]``, ascending.
      output_values: ``[nnz]``.
      output_shape: int64 ``[ndims]``, in host memory.
    """

    output_indices: jax.Array
    output_values: jax.Array
    output_shape: np.ndarray


class AddGrads(NamedTuple):
    """What `SparseAddGrad` returns.

    Attributes:
      a_val_grad: ``[nnz_a]``.
      b_val_grad: ``[nnz_b]``.
    """

    a_val_grad: jax.Array
    b_val_grad: jax.Array


def SparseAccumulatorApplyGradient(
    *,
    handle: _Handle,
    local_step: ArrayLike,
    gradient_indices: _Array,
    gradient_values: _Array,
    gradient_shape: _Array,
    has_known_shape: bool,
    name: str | None = None,
) -> bool:
    """Adds a gradient to an accumulator unless it is stale.

    Args:
      handle: an accumulator, or its ``accumulator_ref``.
      local_step: an integer, the step at which the gradient was computed.
      gradient_indices: integers ``[n]``.
      gradient_values: ``[n, *row]``.
      gradient_shape: integers, not looked at unless ``has_known_shape``.
      has_known_shape: whether to check ``gradient_shape`` (TensorFlow's text says the opposite of
        what its kernel does).
      name: ignored.

    Returns:
      True if it was accepted, False if it was stale.

    Example:
      >>> import jaxaccum
      >>> acc = jaxaccum.SparseConditionalAccumulator("float32", shape=(3, 2))
      >>> jaxaccum.raw_ops.SparseAccumulatorApplyGradient(
      ...     handle=acc, local_step=0, gradient_indices=[1], gradient_values=[[1.0, 2.0]],
      ...     gradient_shape=[3, 2], has_known_shape=True)
      True

    Source: TensorFlow's ``tf.raw_ops.SparseAccumulatorApplyGradient``.
    """
    if not isinstance(has_known_shape, bool):
        raise TypeError(f"Expected bool for argument 'has_known_shape' not {has_known_shape!r}.")
    if gradient_shape is None:
        raise ValueError("None values not supported: gradient_shape")
    checks.integers("local_step", local_step)
    checks.integers("gradient_indices", gradient_indices)
    return _core(handle).apply(
        local_step,
        gradient_indices,
        gradient_values,
        gradient_shape if has_known_shape else None,
    )


def SparseAccumulatorTakeGradient(
    *, handle: _Handle, num_required: ArrayLike, dtype: DTypeLike, name: str | None = None
) -> SparseGradient:
    """Waits for ``num_required`` gradients, and takes the average of all there are.

    Args:
      handle: an accumulator, or its ``accumulator_ref``.
      num_required: an integer, at least 1.
      dtype: the accumulator's.
      name: ignored.

    Returns:
      A named tuple ``(indices, values, shape)``.

    Example:
      >>> import jaxaccum
      >>> acc = jaxaccum.SparseConditionalAccumulator("float32", shape=(3, 2))
      >>> acc.apply_grad([1], [[1.0, 2.0]])
      True
      >>> jaxaccum.raw_ops.SparseAccumulatorTakeGradient(
      ...     handle=acc, num_required=1, dtype="float32").indices
      Array([1], dtype=int32)

    Source: TensorFlow's ``tf.raw_ops.SparseAccumulatorTakeGradient``.
    """
    core = _core(handle)
    expected = core.spec.leaves[0].dtype
    if jnp.dtype(getattr(dtype, "as_numpy_dtype", dtype)) != expected:
        raise InvalidArgumentError(f"dtype must be {expected} as the handle's, got {dtype}")
    return as_tuple(core.take(num_required, None, trim=True)[0][0])


def AccumulatorNumAccumulated(*, handle: _Handle, name: str | None = None) -> int:
    """Returns how many gradients were accepted since the last take.

    Example:
      >>> import jaxaccum
      >>> acc = jaxaccum.SparseConditionalAccumulator("float32")
      >>> jaxaccum.raw_ops.AccumulatorNumAccumulated(handle=acc)
      0

    Source: TensorFlow's ``tf.raw_ops.AccumulatorNumAccumulated``.
    """
    return _core(handle).num_accumulated()


def AccumulatorSetGlobalStep(
    *, handle: _Handle, new_global_step: ArrayLike, name: str | None = None
) -> None:
    """Sets the step; a lower one is logged as a warning, and set.

    Example:
      >>> import jaxaccum
      >>> acc = jaxaccum.SparseConditionalAccumulator("float32")
      >>> jaxaccum.raw_ops.AccumulatorSetGlobalStep(handle=acc, new_global_step=3)

    Source: TensorFlow's ``tf.raw_ops.AccumulatorSetGlobalStep``.
    """
    _core(handle).set_global_step(new_global_step)


def SparseAdd(
    *,
    a_indices: _Array,
    a_values: _Array,
    a_shape: _Array,
    b_indices: _Array,
    b_values: _Array,
    b_shape: _Array,
    thresh: ArrayLike,
    name: str | None = None,
) -> SparseSum:
    """Adds two sparse arrays; `jaxaccum.sparse_add` says how.

    Args:
      a_indices: integers ``[nnz_a, ndims]``.
      a_values: ``[nnz_a]``.
      a_shape: integers ``[ndims]``.
      b_indices: integers ``[nnz_b, ndims]``.
      b_values: ``[nnz_b]``.
      b_shape: integers ``[ndims]``.
      thresh: a real scalar: sums of two entries are dropped if smaller in magnitude.
      name: ignored.

    Returns:
      A named tuple ``(sum_indices, sum_values, sum_shape)``, ascending.

    Example:
      >>> import jaxaccum
      >>> jaxaccum.raw_ops.SparseAdd(
      ...     a_indices=[[0], [2]], a_values=[1.0, 2.0], a_shape=[4],
      ...     b_indices=[[2]], b_values=[-2.0], b_shape=[4], thresh=0.1).sum_values.tolist()
      [1.0]

    Source: TensorFlow's ``tf.raw_ops.SparseAdd``.
    """
    checks.add(a_indices, a_values, a_shape, b_indices, b_values, b_shape, thresh)
    a = _bcoo(a_indices, a_values, a_shape)
    b = _bcoo(b_indices, b_values, b_shape)
    return SparseSum(*_trimmed(sparse_add(a, b, thresh)))


def SparseAddGrad(
    *,
    backprop_val_grad: _Array,
    a_indices: _Array,
    b_indices: _Array,
    sum_indices: _Array,
    name: str | None = None,
) -> AddGrads:
    """Returns the gradients of the operands of `SparseAdd`.

    Args:
      backprop_val_grad: ``[nnz_sum]``.
      a_indices: integers ``[nnz_a, ndims]``.
      b_indices: integers ``[nnz_b, ndims]``.
      sum_indices: integers ``[nnz_sum, ndims]``.
      name: ignored.

    Returns:
      A named tuple ``(a_val_grad, b_val_grad)``.

    Example:
      >>> import jaxaccum
      >>> grads = jaxaccum.raw_ops.SparseAddGrad(
      ...     backprop_val_grad=[3.0], a_indices=[[0]], b_indices=[[2]], sum_indices=[[0]])
      >>> grads.a_val_grad.tolist(), grads.b_val_grad.tolist()
      ([3.0], [0.0])

    Source: TensorFlow's ``tf.raw_ops.SparseAddGrad``.
    """
    checks.add_grad(backprop_val_grad, a_indices, b_indices, sum_indices)
    rows = map(_index_array, (a_indices, b_indices, sum_indices))
    return AddGrads(*sparse_add_grad(jnp.asarray(backprop_val_grad), *rows))


def SparseSlice(
    *,
    indices: _Array,
    values: _Array,
    shape: _Array,
    start: _Array,
    size: _Array,
    name: str | None = None,
) -> SparsePart:
    """Cuts a box out of a sparse array; `jaxaccum.sparse_slice` says how.

    Args:
      indices: integers ``[nnz, ndims]``.
      values: ``[nnz]``.
      shape: integers ``[ndims]``.
      start: integers ``[ndims]``; a negative one shifts, it does not wrap.
      size: integers ``[ndims]``.
      name: ignored.

    Returns:
      A named tuple ``(output_indices, output_values, output_shape)``, ascending.

    Example:
      >>> import jaxaccum
      >>> part = jaxaccum.raw_ops.SparseSlice(
      ...     indices=[[0], [2]], values=[1.0, 2.0], shape=[4], start=[1], size=[9])
      >>> part.output_indices.tolist(), part.output_values.tolist()
      ([[1]], [2.0])

    Source: TensorFlow's ``tf.raw_ops.SparseSlice``.
    """
    checks.slice_(indices, values, shape, start, size)
    x = _bcoo(indices, values, shape)
    box = [tuple(np.asarray(bound).tolist()) for bound in (start, size)]
    return SparsePart(*_trimmed(sparse_slice(x, *box)))


def SparseSliceGrad(
    *,
    backprop_val_grad: _Array,
    input_indices: _Array,
    input_start: _Array,
    output_indices: _Array,
    name: str | None = None,
) -> jax.Array:
    """Returns the gradient of the input of `SparseSlice`.

    Args:
      backprop_val_grad: ``[nnz_out]``.
      input_indices: integers ``[nnz_in, ndims]``.
      input_start: integers ``[ndims]``.
      output_indices: integers ``[nnz_out, ndims]``.
      name: ignored.

    Returns:
      ``[nnz_in]``.

    Raises:
      ValueError: a row of the output is none of the input: its gradient would be lost.

    Example:
      >>> import jaxaccum
      >>> jaxaccum.raw_ops.SparseSliceGrad(
      ...     backprop_val_grad=[3.0], input_indices=[[0], [2]], input_start=[1],
      ...     output_indices=[[1]]).tolist()
      [0.0, 3.0]

    Source: TensorFlow's ``tf.raw_ops.SparseSliceGrad``.
    """
    checks.slice_grad(backprop_val_grad, input_indices, input_start, output_indices)
    return pull_slice(
        jnp.asarray(backprop_val_grad),
        _index_array(input_indices),
        np.asarray(input_start),
        _index_array(output_indices),
        allow_padding=False,
    )


def _core(handle: _Handle) -> Coordinator:
    if isinstance(handle, SparseConditionalAccumulator):
        handle = handle.accumulator_ref
    if not isinstance(handle, Coordinator):
        raise TypeError(f"handle must be an accumulator, got {type(handle).__name__}")
    return handle


def _index_array(indices: _Array) -> np.ndarray | jax.Array:
    if isinstance(indices, jax.Array):
        return indices
    host = np.asarray(indices)
    return host.astype(np.int32) if host.size == 0 else host


def _bcoo(indices: _Array, values: _Array, shape: _Array) -> sparse.BCOO:
    dims = tuple(np.asarray(shape).tolist())
    rows = _index_array(indices)
    if isinstance(rows, np.ndarray):
        checks.fit_int32(rows)
    return sparse.BCOO((jnp.asarray(values), jnp.asarray(rows)), shape=dims)


def _trimmed(mat: sparse.BCOO) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Exactly the entries there are; in host memory, for each number would be a program."""
    indices, values = np.asarray(mat.indices), np.asarray(mat.data)
    is_real = (indices < np.array(mat.shape, np.int64)).all(axis=1)
    shape = np.array(mat.shape, np.int64)
    return jnp.asarray(indices[is_real]), jnp.asarray(values[is_real]), shape
