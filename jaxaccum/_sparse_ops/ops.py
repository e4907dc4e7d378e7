"""Sparse addition and slices of BCOO arrays, and how they are differentiated.

Each op is integer structure (``places``) and a linear map. With P the matrix that carries each
stored entry to its place in the result, ``sum = P_a a + P_b b``, so the cotangent of ``a`` is
``P_a^T g``: one gather at the places the forward pass has computed. P depends on values through
``thresh`` alone, and there only in jumps. The rules are plain JAX underneath, so derivatives of
every order exist.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import sparse
from jax.typing import ArrayLike

from jaxaccum._sparse_ops import bounds, checks, places
from jaxaccum._sparse_ops.bounds import Size, Start
from jaxaccum._sparse_ops.raw_grads import pull


def sparse_add(
    a: sparse.BCOO, b: sparse.BCOO, thresh: ArrayLike = 0, *, nse: int | None = None
) -> sparse.BCOO:
    """Adds two sparse arrays; the result is sorted and without repetitions.

    An entry that both operands store is dropped where the magnitude of the sum is below
    ``thresh``; one that a single operand stores is kept whatever its value. Sums that are NaN are
    kept. Operands may be unsorted, repeat entries (which means their sum) and hold padding, that
    is entries outside the shape. If they are flagged ``indices_sorted`` they are merged without a
    sort, and the flags are taken at their word.

    Differentiable in the values of ``a`` and ``b`` by a ``custom_vjp`` rule, to any order:
    ``sparse_add_grad`` says what it gives; a repeated entry gets the whole cotangent each time,
    padding gets zero. Forward mode (``jax.jvp``) does not go through ``custom_vjp``:
    ``sparse_add_jvp`` has it. After TensorFlow's ``SparseAdd``, which drops NaN sums.

    Args:
      a: ``[*shape]`` of any rank, all dimensions sparse, of any numeric dtype.
      b: the same shape and dtype.
      thresh: a real scalar, may be traced. Zero or less keeps all entries.
      nse: how many entries the result can hold, ``a.nse + b.nse`` by default.

    Returns:
      ``[*shape]`` with ``nse`` entries, ascending, padding last: its indices are one past the end,
      its values zero.

    Raises:
      TypeError: an operand is no ``BCOO``, the dtypes differ, or ``thresh`` is no real number.
      ValueError: shapes differ, an operand has batch or dense dimensions, ``thresh`` is no scalar,
        or ``nse`` is too small. Where values are traced the last is a ``checkify.debug_check``.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> from jax.experimental import sparse
      >>> a = sparse.BCOO.fromdense(jnp.array([[1.0, 0.0, 2.0]]))
      >>> b = sparse.BCOO.fromdense(jnp.array([[0.5, 0.0, -2.0]]))
      >>> total = jaxaccum.sparse_add(a, b, thresh=0.1)  # 2 and -2 cancel: not stored
      >>> total.indices.tolist(), total.data.tolist()
      ([[0, 0], [1, 3], [1, 3], [1, 3]], [1.5, 0.0, 0.0, 0.0])

    Source: ``tf.sparse.add``.
    """
    spec, args = _read_add(a, b, thresh, nse)
    data, indices = _add(spec, *args)
    return _make_result(data, indices, a.shape)


def sparse_add_jvp(
    a: sparse.BCOO,
    b: sparse.BCOO,
    a_dot: ArrayLike,
    b_dot: ArrayLike,
    thresh: ArrayLike = 0,
    *,
    nse: int | None = None,
) -> tuple[sparse.BCOO, jax.Array]:
    """Adds two sparse arrays and carries tangents of their values along: forward mode.

    Args:
      a: as in ``sparse_add``, and so are ``b``, ``thresh`` and ``nse``.
      b: see ``a``.
      a_dot: ``[a.nse]``, the tangent of ``a.data``.
      b_dot: ``[b.nse]``, the tangent of ``b.data``.
      thresh: see ``a``.
      nse: see ``a``.

    Returns:
      The sum and ``[nse]``, the tangent of its values. Linear in the tangents, and itself
      differentiable in either mode.

    Raises:
      ValueError: as ``sparse_add``, or a tangent has another shape than the values.
      TypeError: as ``sparse_add``, or a tangent has another dtype than the values.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> from jax.experimental import sparse
      >>> a = sparse.BCOO.fromdense(jnp.array([1.0, 2.0, 0.0]))
      >>> b = sparse.BCOO.fromdense(jnp.array([0.0, 5.0, 0.0]))
      >>> total, dot = jaxaccum.sparse_add_jvp(a, b, jnp.array([10.0, 20.0]), jnp.array([30.0]))
      >>> total.data.tolist(), dot.tolist()
      ([1.0, 7.0, 0.0], [10.0, 50.0, 0.0])

    Source: the derivative of ``tf.sparse.add``.
    """
    spec, args = _read_add(a, b, thresh, nse)
    a_dot = checks.read_tangent("a_dot", a_dot, args[0])
    b_dot = checks.read_tangent("b_dot", b_dot, args[1])
    placed = _place_add(spec, *jax.lax.stop_gradient(args))
    data = _spread(spec.nse, placed, args[:2])
    return _make_result(data, placed.indices, a.shape), _spread(spec.nse, placed, (a_dot, b_dot))


def sparse_slice(
    x: sparse.BCOO,
    start: Start,
    size: Size,
    *,
    nse: int | None = None,
) -> sparse.BCOO:
    """Cuts a box out of a sparse array; the result is sorted and without repetitions.

    The box holds the rows ``start <= index < start + size`` and clips at the end of ``x``: a
    dimension of 6 cut at 3 with size 100 keeps 3, at 6 or later 0. A negative start does not
    wrap: it shifts indices up and may make the result larger than ``x`` (-3 with size 10 on 6
    gives 9). These are the bounds of TensorFlow's ``SparseSlice``. A ``start`` that is traced
    cannot change a shape: ``size`` is then clipped to the shape of ``x``, the result has that
    shape, and what would lie past the end of ``x`` is empty.

    Differentiable in the values of ``x`` by a ``custom_vjp`` rule, to any order, equal to
    ``sparse_slice_grad`` (a repeated entry gets the whole cotangent each time, padding zero).
    Forward mode (``jax.jvp``) does not go through it: ``sparse_slice_jvp`` has it.

    Args:
      x: ``[*shape]`` of any rank, all dimensions sparse, of any numeric dtype or bool. It may be
        unsorted, repeat entries (which means their sum) and hold padding.
      start: ``ndim`` integers, an array or a sequence; may be traced.
      size: ``ndim`` Python integers, not negative.
      nse: how many entries the result can hold, ``x.nse`` by default.

    Returns:
      An array with ``nse`` entries, ascending, padding last.

    Raises:
      TypeError: ``x`` is no ``BCOO``, or ``start`` or ``size`` are no integers.
      ValueError: ``x`` has batch or dense dimensions, ``start`` or ``size`` the wrong length, a
        size is negative, or ``nse`` is too small. Where ``x`` is traced the last is a
        ``checkify.debug_check``.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> from jax.experimental import sparse
      >>> x = sparse.BCOO.fromdense(jnp.array([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0]]))
      >>> jaxaccum.sparse_slice(x, [0, 1], [2, 5]).todense()
      Array([[1., 2.],
             [0., 4.]], dtype=float32)

    Source: ``tf.sparse.slice``.
    """
    shape, spec, args = _read_slice(x, start, size, nse)
    data, indices = _slice(spec, *args)
    return _make_result(data, indices, shape)


def sparse_slice_jvp(
    x: sparse.BCOO,
    x_dot: ArrayLike,
    start: Start,
    size: Size,
    *,
    nse: int | None = None,
) -> tuple[sparse.BCOO, jax.Array]:
    """Slices a sparse array and carries the tangent of its values along: forward mode.

    Args:
      x: as in ``sparse_slice``, and so are ``start``, ``size`` and ``nse``.
      x_dot: ``[x.nse]``, the tangent of ``x.data``.
      start: see ``x``.
      size: see ``x``.
      nse: see ``x``.

    Returns:
      The slice and ``[nse]``, the tangent of its values. Linear in the tangent, and itself
      differentiable in either mode.

    Raises:
      ValueError: as ``sparse_slice``, or the tangent has another shape than the values.
      TypeError: as ``sparse_slice``, or the tangent has another dtype than the values.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> from jax.experimental import sparse
      >>> x = sparse.BCOO.fromdense(jnp.array([1.0, 2.0, 3.0]))
      >>> part, dot = jaxaccum.sparse_slice_jvp(x, jnp.array([10.0, 20.0, 30.0]), [1], [2])
      >>> part.data.tolist(), dot.tolist()
      ([2.0, 3.0, 0.0], [20.0, 30.0, 0.0])

    Source: the derivative of ``tf.sparse.slice``.
    """
    shape, spec, args = _read_slice(x, start, size, nse)
    x_dot = checks.read_tangent("x_dot", x_dot, args[0])
    placed = _place_slice(spec, *jax.lax.stop_gradient(args))
    data = _spread(spec.nse, placed, args[:1])
    return _make_result(data, placed.indices, shape), _spread(spec.nse, placed, (x_dot,))


def _spread(nse: int, placed: places.Placed, values: tuple[jax.Array, ...]) -> jax.Array:
    """Applies the map itself, for forward mode: every entry is added to its place."""
    total = jnp.zeros(nse, values[0].dtype)
    for place, entries in zip(placed.places, values, strict=True):
        total = total.at[place].add(entries, mode="drop")
    return total


def _make_result(data: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> sparse.BCOO:
    # Without dimensions no index can say that an entry is padding, so several are repetitions.
    is_unique = bool(shape) or len(data) <= 1
    return sparse.BCOO((data, indices), shape=shape, indices_sorted=True, unique_indices=is_unique)


_AddArgs = tuple[jax.Array, jax.Array, jax.Array, jax.Array, places.Limit | None]
_SliceArgs = tuple[jax.Array, jax.Array, places.Window]
# The values and indices of a result, and the place of each entry of the operands.
_Outputs = tuple[jax.Array, jax.Array]
_Places = tuple[jax.Array, ...]


def _read_add(
    a: sparse.BCOO, b: sparse.BCOO, thresh: ArrayLike, nse: int | None
) -> tuple[places.AddSpec, _AddArgs]:
    checks.check_operand("a", a, numeric=True)
    checks.check_operand("b", b, numeric=True)
    checks.check_same_kind(a, b)
    limit = bounds.make_limit(thresh, a.data.dtype)
    layout = checks.make_layout(a.shape, a.indices, b.indices)
    num_held = checks.read_nse(nse, a.nse + b.nse)
    spec = places.AddSpec(layout, checks.read_flags(a), checks.read_flags(b), num_held)
    a_rows, b_rows = (x.indices.astype(layout.dtype) for x in (a, b))
    return spec, (jnp.asarray(a.data), jnp.asarray(b.data), a_rows, b_rows, limit)


def _place_add(spec: places.AddSpec, *args: *_AddArgs) -> places.Placed:
    placed: places.Placed = places.place_add(spec, *args)
    checks.check_fits(placed.num_entries, spec.nse, len(args[0]) + len(args[1]))
    return placed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add(spec: places.AddSpec, *args: *_AddArgs) -> _Outputs:
    return _add_fwd(spec, *args)[0]


def _add_fwd(spec: places.AddSpec, *args: *_AddArgs) -> tuple[_Outputs, _Places]:
    placed = _place_add(spec, *args)
    return (placed.data, placed.indices), placed.places


def _add_bwd(
    spec: places.AddSpec, entry_places: _Places, cotangents: _Outputs
) -> tuple[jax.Array | None, ...]:
    return *_pull_all(cotangents[0], entry_places), None, None, None


_add.defvjp(_add_fwd, _add_bwd)


def _read_slice(
    x: sparse.BCOO, start: Start, size: Size, nse: int | None
) -> tuple[tuple[int, ...], places.SliceSpec, _SliceArgs]:
    checks.check_operand("x", x, numeric=False)
    layout = checks.make_layout(x.shape, x.indices)
    shape, window = bounds.make_window(x.shape, start, size, layout.dtype)
    flags = checks.read_flags(x)
    layouts = None if all(flags) else (layout, checks.make_layout(shape, x.indices))
    spec = places.SliceSpec(layouts, flags, checks.read_nse(nse, x.nse))
    return shape, spec, (jnp.asarray(x.data), x.indices.astype(layout.dtype), window)


def _place_slice(spec: places.SliceSpec, *args: *_SliceArgs) -> places.Placed:
    placed: places.Placed = places.place_slice(spec, *args)
    checks.check_fits(placed.num_entries, spec.nse, len(args[0]))
    return placed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slice(spec: places.SliceSpec, *args: *_SliceArgs) -> _Outputs:
    return _slice_fwd(spec, *args)[0]


def _slice_fwd(spec: places.SliceSpec, *args: *_SliceArgs) -> tuple[_Outputs, _Places]:
    placed = _place_slice(spec, *args)
    return (placed.data, placed.indices), placed.places


def _slice_bwd(
    spec: places.SliceSpec, entry_places: _Places, cotangents: _Outputs
) -> tuple[jax.Array | None, ...]:
    return *_pull_all(cotangents[0], entry_places), None, None


_slice.defvjp(_slice_fwd, _slice_bwd)


def _pull_all(grad: jax.Array, entry_places: _Places) -> tuple[jax.Array | None, ...]:
    is_zero = not jnp.issubdtype(grad.dtype, jnp.inexact)  # values that have no derivative
    return tuple(None if is_zero else pull(grad, place) for place in entry_places)
