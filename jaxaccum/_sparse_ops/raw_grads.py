"""Gradients of sparse addition and slices from bare index arrays, as TensorFlow's ops take them.

The places of the entries are found by matching rows by value; the gradients are then gathered at
them, just as where the ops themselves are differentiated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxaccum._sparse_ops import checks, keys, match
from jaxaccum._sparse_ops.bounds import Start


def sparse_add_grad(
    backprop_val_grad: ArrayLike,
    a_indices: ArrayLike,
    b_indices: ArrayLike,
    sum_indices: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the operands of a sparse addition, from bare index arrays.

    Each row of ``a_indices`` and ``b_indices`` gets the gradient of the equal row of
    ``sum_indices``, zero if there is none (``thresh`` dropped it). Rows are matched by value, in
    any order; sorted sums are found faster. Rows of the sum that neither operand has are ignored,
    and of equal rows of the sum the first one counts. No shape is known here, so padding is a row
    like any other. Linear in ``backprop_val_grad`` and differentiable in either mode.
    TensorFlow's ``SparseAddGrad``.

    Args:
      backprop_val_grad: ``[nnz_sum]``, the gradient of the values of the sum.
      a_indices: integers ``[nnz_a, ndims]``.
      b_indices: integers ``[nnz_b, ndims]``.
      sum_indices: integers ``[nnz_sum, ndims]``.

    Returns:
      ``a_val_grad`` ``[nnz_a]`` and ``b_val_grad`` ``[nnz_b]``.

    Raises:
      ValueError: ranks or lengths do not fit together.
      TypeError: indices are no integers, or the gradient is no numeric array.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> a_grad, b_grad = jaxaccum.sparse_add_grad(
      ...     jnp.array([1.0, 2.0, 3.0]), [[0], [7]], [[7], [2], [5]], [[0], [2], [7]])
      >>> a_grad.tolist(), b_grad.tolist()
      ([1.0, 3.0], [3.0, 2.0, 0.0])

    Source: ``tf.raw_ops.SparseAddGrad``.
    """
    named = {"a_indices": a_indices, "b_indices": b_indices, "sum_indices": sum_indices}
    grad, (a_rows, b_rows, sum_rows) = checks.read_grad_and_rows(backprop_val_grad, named)
    a_found, b_found = _match(sum_rows, a_rows, b_rows)
    return pull(grad, a_found), pull(grad, b_found)


def sparse_slice_grad(
    backprop_val_grad: ArrayLike,
    input_indices: ArrayLike,
    input_start: Start,
    output_indices: ArrayLike,
) -> jax.Array:
    """Returns the gradient of the input of a sparse slice, from bare index arrays.

    Each row of ``input_indices`` gets the gradient of the row of ``output_indices`` that lies
    ``input_start`` below it, zero if there is none. Rows are matched by value, in any order.
    Linear in ``backprop_val_grad`` and differentiable in either mode. TensorFlow's
    ``SparseSliceGrad``.

    The output may end in padding, as ``sparse_slice`` leaves it; its gradient goes nowhere. As no
    shape is known here, padding is what can be nothing else: the last row and its equals, if it
    lies beyond all others in every column and the input has fewer of it. A single row of padding
    that meets an entry of the input, outside the slice, cannot be told from a real one: cut it off.

    Args:
      backprop_val_grad: ``[nnz_out]``, the gradient of the values of the slice.
      input_indices: integers ``[nnz_in, ndims]``.
      input_start: integers ``[ndims]``, where the slice started.
      output_indices: integers ``[nnz_out, ndims]``.

    Returns:
      ``val_grad`` ``[nnz_in]``.

    Raises:
      ValueError: ranks or lengths do not fit together, or a row of ``output_indices`` that is not
        padding matches no row of the input or repeats one, so that its gradient would be lost.
        Where indices are traced that is a ``checkify.debug_check``.
      TypeError: indices are no integers, or the gradient is no numeric array.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> jaxaccum.sparse_slice_grad(
      ...     jnp.array([1.0, 2.0]), [[0], [4], [6]], [3], [[1], [3]]).tolist()
      [0.0, 1.0, 2.0]

    Source: ``tf.raw_ops.SparseSliceGrad``.
    """
    indices = input_indices, input_start, output_indices
    return pull_slice(backprop_val_grad, *indices, allow_padding=True)


def pull_slice(
    backprop_val_grad: ArrayLike,
    input_indices: ArrayLike,
    input_start: Start,
    output_indices: ArrayLike,
    *,
    allow_padding: bool,
) -> jax.Array:
    """Does the work of ``sparse_slice_grad``; TensorFlow's own op knows no padding."""
    named = {"input_indices": input_indices, "output_indices": output_indices}
    grad, (rows, out) = checks.read_grad_and_rows(backprop_val_grad, named)
    matched = _match_slice(*checks.read_slice(rows, input_start, out))
    num_used = matched.num_used + matched.num_padding if allow_padding else matched.num_used
    checks.check_all_propagated(num_used, len(grad))
    val_grad: jax.Array = pull(grad, matched.found)
    return val_grad


# Compiled apart from the gathers, so that a new dtype of the gradient compiles no new search.
_match = jax.jit(match.match_rows)


@jax.jit
def _match_slice(rows: jax.Array, start: jax.Array, out: jax.Array) -> match.Matched:
    # The output, mostly the shorter of the two, is moved. Where that wraps, the rows it is compared
    # with are as far off.
    return match.match_in_line(out + start[None], rows)


@jax.jit
def pull(grad: jax.Array, place: jax.Array) -> jax.Array:
    """Applies the transposed map: each entry fetches its place's gradient, zero without a place."""
    # A pullback may be handed a NumPy array.
    return keys.take_or_zero(jnp.asarray(grad), place)
