"""Sparse add and slice against TensorFlow's vectors, dictionary twins and dense arithmetic."""

import collections
import functools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental import checkify, sparse
from jax.test_util import check_grads

import jaxaccum
from sparse_harness import (
    DTYPES,
    X64,
    array,
    assert_same,
    bcoo,
    dense_of,
    entries,
    golden,
    random_bcoo,
    stored,
    twin_add,
    twin_slice,
)

FLAGGED = (True, True)
KINDS = ["flagged", "sorted", "unique", "wild"]
SHAPES = [
    (),
    (5,),
    (3, 4),
    (0, 3),
    (2, 3, 2),
    (2, 1, 3, 2),
    (2, 2, 1, 2, 2),
    (1, 2, 2, 1, 2, 2),
    (70_000, 70_000),  # more cells than 32 bits count: two words
    (2**31 - 1, 2, 2**31 - 1),
]


def groups(cases, values):
    """Golden cases by dtype and rank: each group compiles once, for operands padded alike."""
    found = collections.defaultdict(list)
    for case in cases:
        spec = case[values]
        if spec["dtype"] in [*DTYPES, "bool"] and case["name"] not in IMPROVED:
            rank = len(case.get("dense_shape", case.get("shape")))
            found[f"{spec['dtype']}-r{rank}"].append(case)
    return [pytest.param(cases, id=name) for name, cases in sorted(found.items())]


# Where we differ from TensorFlow on purpose; each has a test of its own below.
IMPROVED = {"nan-sum-dropped-even-at-0", "int32-min-dropped", "unsorted-keeps-order"}
ROOM = 40


def padded_rows(rows, nse, fill):
    return np.concatenate([rows, np.full((nse - len(rows), rows.shape[1]), fill)]).astype(np.int32)


def padded(values, nse):
    return np.concatenate([values, np.zeros(nse - len(values), values.dtype)])


@jax.jit
def add_and_pull(a, b, thresh, cotangent):
    def values(x, y):
        a_like, b_like = (with_data(m, v) for m, v in ((a, x), (b, y)))
        total = jaxaccum.sparse_add(a_like, b_like, thresh)
        return total.data, total

    _, pull, total = jax.vjp(values, a.data, b.data, has_aux=True)
    return total, pull(cotangent)


@jax.jit
def add_only(a, b, thresh, cotangent):
    return (jaxaccum.sparse_add(a, b, thresh),)


def with_data(mat, data):
    return sparse.BCOO(
        (data, mat.indices),
        shape=mat.shape,
        indices_sorted=mat.indices_sorted,
        unique_indices=mat.unique_indices,
    )


@pytest.mark.parametrize("cases", groups(golden("sparse_add.json"), "a_values"))
def test_add_equals_tensorflow(cases):
    shape = tuple(np.max([case["dense_shape"] for case in cases], axis=0).tolist())
    raw = jaxaccum.sparse_add_grad
    for case in cases:
        rows = {name: array(case[f"{name}_indices"]) for name in ("a", "b", "sum")}
        a, b = (
            bcoo(rows[name], array(case[f"{name}_values"]), shape, FLAGGED, ROOM) for name in "ab"
        )
        want, ct = array(case["sum_values"]), array(case["backprop_val_grad"])
        ct_padded, is_exact = padded(ct, 2 * ROOM), not jnp.issubdtype(want.dtype, jnp.inexact)
        total, *pulled = (add_only if is_exact else add_and_pull)(
            a, b, array(case["thresh"]), ct_padded
        )
        assert list(stored(total)) == [tuple(row) for row in rows["sum"].tolist()]
        assert_same(total.data[: len(want)], want)

        grads = array(case["a_val_grad"]), array(case["b_val_grad"])
        sum_rows = padded_rows(rows["sum"], 2 * ROOM, 99)
        for both in (*pulled, raw(ct_padded, a.indices, b.indices, sum_rows)):
            for got, grad in zip(both, grads, strict=True):
                assert_same(got[: len(grad)], grad)


@pytest.mark.parametrize("cases", groups(golden("sparse_slice.json"), "values"))
def test_slice_equals_tensorflow(cases):
    raw = jaxaccum.sparse_slice_grad
    for case in cases:
        room = ROOM if case["shape"] else None  # without dimensions nothing can be padding
        x = bcoo(array(case["indices"]), array(case["values"]), case["shape"], FLAGGED, room)
        if "expect" in case:
            with pytest.raises(ValueError, match="size must not be negative, got -"):
                jaxaccum.sparse_slice(x, case["start"], case["size"])
            continue
        want, rows = array(case["output_values"]), array(case["output_indices"])
        part = jaxaccum.sparse_slice(x, case["start"], case["size"])
        assert part.shape == tuple(case["output_shape"]["data"])
        assert part.nse == x.nse
        assert_same(part.data[: len(want)], want)
        assert np.asarray(part.indices[: len(want)]).tolist() == rows.tolist()
        assert len(stored(part)) == len(want)
        if "val_grad" not in case:
            continue
        ct, grad = array(case["backprop_val_grad"]), array(case["val_grad"])
        # Rows far outside pair off among themselves, so that all cases have the same lengths.
        start = np.array(case["start"], np.int32)
        spare = ROOM - len(rows) if len(start) else 0
        far = np.arange(1000, 1000 + spare)[:, None] + np.zeros_like(start)
        outputs = np.concatenate([rows, far - start]).astype(np.int32)
        inputs = np.concatenate([array(case["indices"]), far]).astype(np.int32)
        inputs = padded_rows(inputs, 2 * ROOM, 9999) if len(start) else inputs
        assert_same(raw(padded(ct, len(outputs)), inputs, start, outputs)[: len(grad)], grad)
        if jnp.issubdtype(want.dtype, jnp.inexact):
            cut = functools.partial(slice_values, x, case["start"], case["size"])
            assert_same(jax.vjp(cut, x.data)[1](padded(ct, x.nse))[0][: len(grad)], grad)


def slice_values(x, start, size, data):
    return jaxaccum.sparse_slice(with_data(x, data), start, size).data


# TensorFlow's message, and what ours must say instead: the argument and both values.
OURS = {
    "SparseAdd-11": r"same shape, got \(3,\) and \(4,\)",
    "SparseAdd-12": r"same shape, got \(3, 4\) and \(3, 5\)",
    "SparseAdd-13": r"thresh must be a scalar, got shape \(1,\)",
    "SparseAddGrad-00": r"matrices .*'a_indices': \(1,\), 'b_indices': \(1, 1\)",
    "SparseAddGrad-01": r"matrices .*'b_indices': \(\)",
    "SparseAddGrad-02": r"matrices .*'sum_indices': \(1, 1, 1\)",
    "SparseAddGrad-03": r"backprop_val_grad must be a vector, got shape \(1, 1\)",
    "SparseAddGrad-04": r"backprop_val_grad must be a vector, got shape \(\)",
    "SparseAddGrad-05": r"same number of columns.*\(1, 1\).*\(1, 2\).*\(1, 1\)",
    "SparseAddGrad-06": r"same number of columns.*\(1, 1\).*\(1, 1\).*\(1, 3\)",
    "SparseAddGrad-07": r"one element a row of sum_indices, got 2 and 1",
    "SparseAddGrad-08": r"one element a row of sum_indices, got 0 and 1",
    "SparseAddGrad-09": r"matrices .*'a_indices': \(1,\)",
    "SparseAddGrad-10": r"backprop_val_grad must be a vector, got shape \(1, 1\)",
    "SparseAddGrad-11": r"same number of columns",
    "SparseSlice-08": r"start must be a vector of 1 integers, got shape \(\)",
    "SparseSlice-09": r"start must be a vector of 1 integers, got shape \(1, 1\)",
    "SparseSlice-10": r"size must be a vector of 1 integers, got shape \(\)",
    "SparseSlice-11": r"size must be a vector of 1 integers, got shape \(1, 1\)",
    "SparseSlice-12": r"start must have 1 entries, one an axis, got 2",
    "SparseSlice-13": r"size must have 1 entries, one an axis, got 2",
    "SparseSlice-14": r"size must have 1 entries, one an axis, got 0",
    "SparseSlice-15": r"start must have 1 entries, one an axis, got 2",
    "SparseSlice-16": r"size must not be negative, got -1 for axis 0",
    "SparseSlice-17": r"shape \(-6,\) must lie within 0 and",
    "SparseSliceGrad-00": r"matrices .*'input_indices': \(1,\), 'output_indices': \(1, 1\)",
    "SparseSliceGrad-01": r"matrices .*'output_indices': \(\)",
    "SparseSliceGrad-02": r"backprop_val_grad must be a vector, got shape \(1, 1\)",
    "SparseSliceGrad-03": r"backprop_val_grad must be a vector, got shape \(\)",
    "SparseSliceGrad-04": r"same number of columns.*\(1, 1\).*\(1, 2\)",
    "SparseSliceGrad-05": r"more rows than input_indices, got 2 and 1",
    "SparseSliceGrad-06": r"one element a row of output_indices, got 2 and 1",
    "SparseSliceGrad-07": r"one element a row of output_indices, got 0 and 1",
    "SparseSliceGrad-08": r"input_start must be a vector, got shape \(1, 1\)",
    "SparseSliceGrad-09": r"input_start must be a vector, got shape \(\)",
    "SparseSliceGrad-10": r"input_start must have 1 entries.* got 2",
    "SparseSliceGrad-11": r"input_start must have 1 entries.* got 0",
    "SparseSliceGrad-12": r"no row in input_indices: of 1 used 0",
}
# A BCOO cannot be built so at all: its own constructor refuses.
NO_BCOO = {f"SparseAdd-{i:02}" for i in (0, 1, 2, 3, 4, 5, 6, 9, 10)}
NO_BCOO |= {f"SparseSlice-{i:02}" for i in (0, 1, 2, 3, 6, 7)}
# A shape of a BCOO is neither a matrix nor a scalar. Rank 0, permuted rows of a slice and, where
# indices have 64 bits, a shape of more cells than int64 counts are no faults here.
NOT_WRONG = {"SparseAdd-07", "SparseAdd-08", "SparseSlice-04", "SparseSlice-05"}
NOT_WRONG |= {"SparseAdd-14", "SparseSliceGrad-13", "SparseSlice-18"}


def test_every_golden_error_is_accounted_for():
    names = {case["name"] for case in golden("errors.json")}
    assert names == OURS.keys() | NO_BCOO | NOT_WRONG


@pytest.mark.parametrize(
    "case",
    [c for c in golden("errors.json") if c["name"] in OURS],
    ids=lambda c: c["name"],
)
def test_refuses_what_tensorflow_refuses(case):
    args = {
        name: array(spec).astype(np.int32) if spec["dtype"] == "int64" else array(spec)
        for name, spec in case["inputs"].items()
    }

    def mat(prefix):
        data, rows = args[f"{prefix}values"], args[f"{prefix}indices"]
        shape = tuple(args[f"{prefix}shape"].tolist())
        return sparse.BCOO((jnp.asarray(data), jnp.asarray(rows)), shape=shape)

    calls = {
        "SparseAdd": lambda: jaxaccum.sparse_add(mat("a_"), mat("b_"), args["thresh"]),
        "SparseAddGrad": lambda: jaxaccum.sparse_add_grad(**args),
        "SparseSlice": lambda: jaxaccum.sparse_slice(mat(""), args["start"], args["size"]),
        "SparseSliceGrad": lambda: jaxaccum.sparse_slice_grad(**args),
    }
    with pytest.raises(ValueError, match=OURS[case["name"]]):
        calls[case["op"]]()


def add_cases(shape, dtype, kinds, nses, seed, repeats=6):
    """Pairs of operands of one layout: one compilation serves all of them."""
    rng = np.random.default_rng(seed)
    for _ in range(repeats):
        a, b = (random_bcoo(rng, shape, n, dtype, k) for n, k in zip(nses, kinds, strict=True))
        if math.prod(shape) > 10**6 and a.nse and b.nse:  # so many cells never meet by chance
            shared = a.indices[: min(a.nse, b.nse)]
            b = sparse.BCOO((b.data[: len(shared)], shared), shape=shape)
        yield a, b


def assert_entries(mat, want):
    got = stored(mat)
    if not mat.ndim:  # nothing tells padding from entries, whose sum comes first
        assert not np.asarray(mat.data)[1:].any()
        got = {row: np.asarray(mat.data)[0] for row in want}
    assert {row: value.item() for row, value in got.items()} == {
        row: value.item() for row, value in want.items()
    }


@hypothesis.given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["float32", "int8", "complex64"]),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    nses=st.sampled_from([(6, 5), (0, 5), (6, 0), (0, 0)]),
    thresh=st.sampled_from([0, -1.5, 1, 2.5, 3.0, np.float32(4), np.int8(2), float("inf")]),
    seed=st.integers(0, 2**20),
)
def test_add_equals_its_twin(shape, dtype, kinds, nses, thresh, seed):
    for a, b in add_cases(shape, dtype, kinds, nses, seed):
        total = jaxaccum.sparse_add(a, b, thresh)
        assert (total.shape, total.nse, total.dtype) == (a.shape, a.nse + b.nse, a.dtype)
        assert_entries(total, twin_add(a, b, thresh))


@hypothesis.given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["float32", "int8", "bool"]),
    kind=st.sampled_from(KINDS),
    nse=st.sampled_from([7, 0]),
    traced=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_slice_equals_its_twin(shape, dtype, kind, nse, traced, seed):
    rng = np.random.default_rng(seed)
    size = [int(rng.integers(0, min(d, 9) + 3)) for d in shape]
    if traced:
        size = [min(e, d) for e, d in zip(size, shape, strict=True)]
    cut = jax.jit(lambda x, start: jaxaccum.sparse_slice(x, start, size))
    for _ in range(6):
        x = random_bcoo(rng, shape, nse, dtype, kind)
        start = [int(rng.integers(-3, min(d, 9) + 2)) for d in shape]
        want, out_shape = twin_slice(x, start, size)
        if traced:
            part = cut(x, jnp.array(start, jnp.int32))
            assert part.shape == tuple(size)
        else:
            part = jaxaccum.sparse_slice(x, start, size)
            assert part.shape == out_shape
        assert part.dtype == x.dtype
        assert_entries(part, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype):
    for a, b in add_cases((3, 4), dtype, ("wild", "flagged"), (6, 5), seed=1):
        for thresh in (0, 3):
            assert_entries(jaxaccum.sparse_add(a, b, thresh), twin_add(a, b, thresh))
        part = jaxaccum.sparse_slice(a, [1, -1], [2, 4])
        assert_entries(part, twin_slice(a, [1, -1], [2, 4])[0])


def test_many_rows_use_directory_and_bit_counts():
    rng = np.random.default_rng(0)
    shape = (300, 300)
    for kinds in (("flagged", "flagged"), ("wild", "sorted")):
        a, b = (random_bcoo(rng, shape, 6000, "int32", kind) for kind in kinds)
        assert_entries(jaxaccum.sparse_add(a, b, 2), twin_add(a, b, 2))
        assert_entries(
            jaxaccum.sparse_slice(a, [50, -20], [200, 200]),
            twin_slice(a, [50, -20], [200, 200])[0],
        )
        # The raw gradients see a few thousand rows too.
        total = jaxaccum.sparse_add(a, b)
        raw = jaxaccum.sparse_add_grad(
            jnp.arange(total.nse) + 1, a.indices, b.indices, total.indices
        )
        place = {tuple(row): i + 1 for i, row in reversed(list(enumerate(total.indices.tolist())))}
        for grad, mat in zip(raw, (a, b), strict=True):
            assert grad.tolist() == [place.get(tuple(row), 0) for row in mat.indices.tolist()]
