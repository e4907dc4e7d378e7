"""Dense and dictionary twins of the sparse ops, sharing no code with the package."""

import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

import jaxaccum

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
X64 = jax.dtypes.canonicalize_dtype(np.int64) == np.int64

DTYPES = ["float16", "bfloat16", "float32", "complex64"]
DTYPES += ["int8", "int16", "int32", "uint8", "uint16", "uint32"]
DTYPES += ["float64", "complex128", "int64", "uint64"] * X64


def golden(file):
    return json.loads((GOLDEN / file).read_text())["cases"]


def array(spec):
    """A golden array; `float` reads the strings that stand for what JSON cannot."""
    dtype = jnp.dtype(spec["dtype"])
    flat = np.array(spec["data"], dtype=object).reshape(-1)
    if jnp.issubdtype(dtype, jnp.inexact):
        flat = np.array([float(x) for x in flat], np.float64)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        flat = flat[0::2] + 1j * flat[1::2]
    return flat.astype(dtype).reshape(spec["shape"])


def bits(values):
    values = np.asarray(values)
    return values.view(f"u{values.dtype.itemsize}") if values.dtype.kind not in "c?" else values


def assert_same(got, want):
    """Equal dtype, shape and bits; NaNs need only be NaN, and complex numbers equal."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    is_nan = np.isnan(want.astype(np.complex128))
    np.testing.assert_array_equal(np.isnan(got.astype(np.complex128)), is_nan)
    np.testing.assert_array_equal(bits(got[~is_nan]), bits(want[~is_nan]))


def bcoo(rows, values, shape, flags=(False, False), nse=None, index_dtype=np.int32):
    """A BCOO of `rows`; with `nse`, padded behind them as BCOO pads."""
    rows = np.asarray(rows, index_dtype).reshape(len(values), len(shape))
    values = np.asarray(values)
    if nse is not None:
        extra = nse - len(values)
        rows = np.concatenate([rows, np.tile(np.array(shape, index_dtype), (extra, 1))])
        # Whatever padding holds must not matter.
        values = np.concatenate([values, np.ones(extra, values.dtype)])
    return sparse.BCOO(
        (jnp.asarray(values), jnp.asarray(rows)),
        shape=tuple(shape),
        indices_sorted=flags[0],
        unique_indices=flags[1],
    )


def stored(mat):
    """`{row: value}` of a result, which must be sorted, unique and padded as promised."""
    rows, values = np.asarray(mat.indices), np.asarray(mat.data)
    shape = np.array(mat.shape, rows.dtype)
    is_padding = (rows == shape).any(axis=1)  # none of rank 0
    assert (np.diff(is_padding.astype(int)) >= 0).all(), "padding comes last"
    assert (rows[is_padding] == shape).all(), "padding is one past the end everywhere"
    assert (values[is_padding] == 0).all(), "padding holds zeros"
    real = [tuple(map(int, row)) for row in rows[~is_padding]]
    if mat.ndim:
        assert all(a < b for a, b in itertools.pairwise(real)), "sorted and unique"
        assert mat.unique_indices
    assert mat.indices_sorted
    return dict(zip(real, values[: len(real)], strict=True))


def entries(mat):
    """`{row: sum}` of any BCOO; entries outside its shape are padding."""
    found = {}
    for row, value in zip(np.asarray(mat.indices), np.asarray(mat.data), strict=True):
        row = tuple(map(int, row))
        if all(0 <= i < d for i, d in zip(row, mat.shape, strict=True)):
            with np.errstate(over="ignore"):
                found[row] = (found[row] + value if row in found else value).astype(value.dtype)
    return found


def twin_add(a, b, thresh):
    """The addition as a dictionary: what is in both is dropped below `thresh`."""
    left, right = entries(a), entries(b)
    total = {}
    for row in left.keys() | right.keys():
        if row not in left or row not in right:
            total[row] = left.get(row, right.get(row))
            continue
        with np.errstate(over="ignore"):
            value = (left[row] + right[row]).astype(left[row].dtype)
        # Exact: Python's integers and doubles hold every value and threshold drawn.
        size = abs(value.item()) if value.dtype.kind in "iufc" else abs(float(value))
        if not size < thresh:
            total[row] = value
    return dict(sorted(total.items()))


def twin_slice(x, start, size):
    """The slice as a dictionary, and the shape TensorFlow gives it."""
    part = {}
    for row, value in entries(x).items():
        if all(s <= i < s + e for i, s, e in zip(row, start, size, strict=True)):
            part[tuple(i - s for i, s in zip(row, start, strict=True))] = value
    shape = tuple(
        e if s < d - e else max(d - s, 0) for s, e, d in zip(start, size, x.shape, strict=True)
    )
    return dict(sorted(part.items())), shape


def random_bcoo(rng, shape, nse, dtype, kind):
    """Entries with small whole values, exact in every dtype and in every order of summation.

    `kind`: "flagged" (sorted, unique, padded behind), "sorted" (with repetitions), "unique"
    (in any order) or "wild" (unsorted, repeated, padding and stray rows anywhere).
    """
    cells = math.prod(shape)
    low = 0 if jnp.issubdtype(jnp.dtype(dtype), jnp.unsignedinteger) or dtype == "bool" else -4
    values = rng.integers(low, 5, nse).astype(jnp.dtype(dtype))
    if jnp.issubdtype(jnp.dtype(dtype), jnp.complexfloating):
        values = (values + 1j * rng.integers(-4, 5, nse)).astype(dtype)
    with_repetition = kind in ("sorted", "wild")
    room = nse if with_repetition else min(nse, cells)
    real = int(rng.integers(0, room + 1)) if shape and cells else (room if not shape else 0)
    real = min(real, cells) if not with_repetition else real * bool(cells)
    pool = min(cells, 12)  # few cells, so that operands meet
    picks = rng.integers(0, max(cells, 1), pool) if cells > 10**6 else np.arange(cells)
    picks = np.unique(picks)
    if not with_repetition:
        real = min(real, len(picks))
    keys = rng.choice(picks, real, replace=with_repetition) if real else np.zeros(0, np.int64)
    if kind in ("flagged", "sorted"):
        keys = np.sort(keys)
    rows = np.stack(np.unravel_index(keys.astype(np.int64), shape or (1,)), axis=1)
    rows = rows[:, : len(shape)].reshape(real, len(shape))
    if not shape:
        rows, real = np.zeros((nse, 0)), nse
    padding = np.tile(np.array(shape, np.int64), (nse - real, 1)).reshape(nse - real, len(shape))
    rows = np.concatenate([rows, padding]).astype(np.int32)
    if kind == "wild" and shape:
        rows = rows[rng.permutation(nse)]
        if nse > 2:  # a stray row: outside in its last column alone
            rows[1] = 0
            rows[1, -1] = shape[-1]
    flags = (kind in ("flagged", "sorted"), kind in ("flagged", "unique"))
    if kind == "unique" and shape:
        rows = rows[rng.permutation(nse)]
    return sparse.BCOO(
        (jnp.asarray(values), jnp.asarray(rows)),
        shape=shape,
        indices_sorted=flags[0],
        unique_indices=flags[1],
    )


def ramp(*args):
    """`jnp.arange` in float32, with or without x64."""
    return jnp.arange(*args, dtype=jnp.float32)


def random_pair(*kinds, dtype="float32"):
    """Two operands of shape (3, 4) that share entries."""
    rng = np.random.default_rng(3)
    return [random_bcoo(rng, (3, 4), n, dtype, k) for n, k in zip((7, 6), kinds, strict=True)]


def dense_of(data, like):
    """The dense array as a differentiable function of the values, by plain indexing."""
    rows, shape = np.asarray(like.indices), like.shape
    inside = ((rows >= 0) & (rows < np.array(shape, rows.dtype))).all(axis=1)
    flat = np.ravel_multi_index(tuple(np.where(inside[:, None], rows, 0).T), shape)
    dense = jnp.zeros(math.prod(shape), data.dtype)
    return dense.at[flat].add(jnp.where(inside, data, 0)).reshape(shape)


def with_data(mat, data):
    return sparse.BCOO(
        (data, mat.indices),
        shape=mat.shape,
        indices_sorted=mat.indices_sorted,
        unique_indices=mat.unique_indices,
    )


@jax.jit
def add_and_pull(a, b, thresh, cotangent):
    def values(x, y):
        a_like, b_like = (with_data(m, v) for m, v in ((a, x), (b, y)))
        total = jaxaccum.sparse_add(a_like, b_like, thresh)
        return total.data, total

    _, pull, total = jax.vjp(values, a.data, b.data, has_aux=True)
    return total, pull(cotangent)


def slice_values(x, start, size, data):
    return jaxaccum.sparse_slice(with_data(x, data), start, size).data


def assert_entries(mat, want):
    got = stored(mat)
    if not mat.ndim:  # nothing tells padding from entries, whose sum comes first
        assert not np.asarray(mat.data)[1:].any()
        got = {row: np.asarray(mat.data)[0] for row in want}
    assert {row: value.item() for row, value in got.items()} == {
        row: value.item() for row, value in want.items()
    }


FLAGGED = (True, True)


def vector(rows, values, size=6, flags=FLAGGED):
    return bcoo(np.array(rows)[:, None], np.array(values, np.float32), (size,), flags)
