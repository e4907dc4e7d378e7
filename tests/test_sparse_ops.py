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

import jaxaccum
from jaxaccum import _sparse_keys as keys

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


def vector(rows, values, size=6, flags=FLAGGED):
    return bcoo(np.array(rows)[:, None], np.array(values, np.float32), (size,), flags)


def test_nan_sums_are_kept():
    total = jaxaccum.sparse_add(vector([0, 1], [np.nan, np.inf]), vector([0, 1], [1, -np.inf]), 5)
    assert np.isnan(np.asarray(total.data)).tolist() == [True, True, False, False]
    assert len(stored(total)) == 2


def test_nan_thresh_drops_what_both_have():
    a, b = vector([0, 1], [9, 9]), vector([1, 2], [9, 9])
    for thresh in (np.float32("nan"), jnp.float32("nan")):
        assert list(stored(jaxaccum.sparse_add(a, b, thresh))) == [(0,), (2,)]
    whole = [bcoo(m.indices, np.asarray(m.data).astype(np.int32), (6,)) for m in (a, b)]
    traced = jax.jit(jaxaccum.sparse_add)(*whole, jnp.float32("nan"))
    assert list(stored(traced)) == [(0,), (2,)]


def test_least_integer_has_a_magnitude():
    half = bcoo([[0]], np.array([-(2**30)], np.int32), (2,))
    assert stored(jaxaccum.sparse_add(half, half, 2**31 - 1)) == {(0,): -(2**31)}
    assert stored(jaxaccum.sparse_add(half, half, 2**31)) == {(0,): -(2**31)}
    assert stored(jaxaccum.sparse_add(half, half, 2**31 + 1)) == {}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "float16"])
@pytest.mark.parametrize("thresh", [2.5, 3, 3.5, 2.0**40, 1e30, -1e30, -5])
def test_thresh_of_another_type_is_converted_not_reinterpreted(dtype, thresh):
    one = bcoo([[0], [1]], np.array([1, 2]).astype(dtype), (2,))
    two = bcoo([[0], [1]], np.array([2, 2]).astype(dtype), (2,))
    want = twin_add(one, two, thresh)
    assert_entries(jaxaccum.sparse_add(one, two, thresh), want)
    assert_entries(jax.jit(jaxaccum.sparse_add)(one, two, np.float32(thresh)), want)


def test_slice_sorts_what_tensorflow_leaves_unsorted():
    (case,) = (c for c in golden("sparse_slice.json") if c["name"] == "unsorted-keeps-order")
    x = bcoo(array(case["indices"]), array(case["values"]), case["shape"])
    part = jaxaccum.sparse_slice(x, case["start"], case["size"])
    order = np.lexsort(array(case["output_indices"]).T[::-1])
    assert list(stored(part)) == [tuple(r) for r in array(case["output_indices"])[order].tolist()]
    assert_same(part.data, array(case["output_values"])[order])
    # The raw gradient matches by value, so TensorFlow's order of rows serves as well as ours.
    grad = jaxaccum.sparse_slice_grad(
        array(case["backprop_val_grad"]), x.indices, case["start"], array(case["output_indices"])
    )
    assert_same(grad, array(case["val_grad"]))


def test_slice_bounds_saturate():
    x = vector([0, 2, 5], [1, 2, 3])
    assert list(stored(jaxaccum.sparse_slice(x, [1], [2**63 - 1]))) == [(1,), (4,)]
    assert stored(jaxaccum.sparse_slice(x, [2**63 - 1], [2**63 - 1])) == {}
    assert stored(jaxaccum.sparse_slice(x, [-(2**63)], [3])) == {}
    cut = jax.jit(lambda x, start: jaxaccum.sparse_slice(x, start, [4]))
    for start in (2**31 - 1, -(2**31)):
        assert stored(cut(x, jnp.array([start], jnp.int32))) == {}
    assert stored(cut(x, jnp.array([2**32 - 1], jnp.uint32))) == {}
    assert list(stored(cut(x, jnp.array([-1], jnp.int8)))) == [(1,), (3,)]
    assert list(stored(cut(x, jnp.array([2], jnp.uint8)))) == [(0,), (3,)]


def test_traced_start_may_be_mixed_with_known_numbers():
    x = bcoo([[0, 1], [2, 2]], np.array([1, 2], np.float32), (3, 3), FLAGGED)
    cut = jax.jit(lambda i: jaxaccum.sparse_slice(x, (i, 1), (2, 9)))
    assert cut(1).shape == (2, 3)
    assert list(stored(cut(1))) == [(1, 1)]


def test_rank_zero_adds_scalars():
    one = bcoo(np.zeros((1, 0)), np.array([3], np.float32), (), FLAGGED)
    total = jaxaccum.sparse_add(one, one)
    assert total.todense() == 6
    # Two entries with the only index there is: adding again must see both.
    assert jaxaccum.sparse_add(total, total).todense() == 12
    assert jaxaccum.sparse_add(one, one, 7).todense() == 0


def test_negative_zero_survives_alone():
    for flags in (FLAGGED, (False, False)):
        total = jaxaccum.sparse_add(vector([0, 1], [-0.0, -0.0], 6, flags), vector([1], [-0.0]))
        assert np.signbit(np.asarray(total.data)).tolist() == [True, True, False]
        part = jaxaccum.sparse_slice(vector([1, 0], [-0.0, -0.0], 6, (False, False)), [0], [6])
        assert np.signbit(np.asarray(part.data)).tolist() == [True, True]


def test_sorted_operands_may_hold_stray_rows_between_real_ones():
    rows = [[0, 1], [1, 5], [1, 9], [2, 0], [7, 1], [8, 0]]
    a = bcoo(rows, np.arange(1, 7, dtype=np.float32), (3, 4), FLAGGED)
    b = bcoo([[1, 0], [2, 0]], np.array([10, 20], np.float32), (3, 4), FLAGGED)
    assert stored(jaxaccum.sparse_add(a, b)) == {(0, 1): 1, (1, 0): 10, (2, 0): 24}
    assert stored(jaxaccum.sparse_add(b, a)) == {(0, 1): 1, (1, 0): 10, (2, 0): 24}


@pytest.mark.parametrize("num_rows", [3, 700])
def test_search_agrees_with_numpy(num_rows):
    rng = np.random.default_rng(num_rows)
    for span in (10, 2**32 - 1):  # crowded into one bucket, and spread over all
        table = np.sort(rng.integers(0, span, num_rows, dtype=np.uint32))
        asked = np.append(rng.integers(0, span, 50, dtype=np.uint32), table[:5])
        search = jax.jit(functools.partial(keys.lower_bound, largest=span))
        for found in (
            search((jnp.array(table),), (jnp.array(asked),)),
            keys.lower_bound((jnp.array(table),), (jnp.array(asked),), jnp.uint32(span)),
        ):
            np.testing.assert_array_equal(found, np.searchsorted(table, asked))


@pytest.mark.parametrize("far", [0, 2**31 - 8])  # one word, and a box of more than 2**32 cells
def test_match_rows_takes_the_first_of_equal_rows(far):
    table = np.array([[5, 1], [-3, 2], [5, 1], [-2, 7], [-3, 2 + far], [far, -far]], np.int32)
    asked = np.array([[5, 1], [-3, 2], [0, 0], [-2, 7], [9, 9], [-3, 2 + far], [far, -far]])
    place = {tuple(row): i for i, row in reversed(list(enumerate(table.tolist())))}
    want = [place.get(tuple(row), 6) for row in asked.tolist()]
    (found,) = keys.match_rows(jnp.array(table), jnp.array(asked, jnp.int32))
    assert found.tolist() == want


@pytest.mark.parametrize("size", [1, 31, 4095, 4096, 4127, 4128])
def test_count_before_agrees_with_numpy(size):
    mask = np.random.default_rng(size).random(size) < 0.5
    want = np.concatenate([[0], np.cumsum(mask)])
    np.testing.assert_array_equal(keys.count_before(jnp.array(mask)), want)


# ------------------------------------------------------------------ derivatives
def wild_pair(seed=3, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [random_bcoo(rng, (3, 4), n, dtype, "wild") for n in (7, 6)]


def add_dense(a, b, thresh, x, y):
    return jaxaccum.sparse_add(with_data(a, x), with_data(b, y), thresh).todense()


def slice_dense(a, x, *, start=(1, -1), size=(2, 4)):
    return jaxaccum.sparse_slice(with_data(a, x), start, size).todense()


def dense_slice(a, x):
    """The same by padding and cutting a dense array: one column before, none wrapped."""
    return jnp.pad(dense_of(x, a), ((0, 0), (1, 0)))[1:3, :4]


def cubes(fn):
    return lambda *args: jnp.sum(jnp.arange(1.0, fn(*args).size + 1) * fn(*args).ravel() ** 3)


def test_gradients_equal_those_of_the_dense_twins():
    a, b = wild_pair()
    ours = cubes(functools.partial(add_dense, a, b, 0))
    dense = cubes(lambda x, y: dense_of(x, a) + dense_of(y, b))
    args = a.data, b.data
    for order in (
        jax.grad,
        jax.hessian,
        lambda f, argnums: jax.jacrev(jax.jacrev(f, argnums), argnums),
    ):
        got, want = (order(f, argnums=(0, 1))(*args) for f in (ours, dense))
        jax.tree.map(np.testing.assert_array_equal, got, want)
    ours, dense = cubes(functools.partial(slice_dense, a)), cubes(functools.partial(dense_slice, a))
    for order in (jax.grad, jax.hessian):
        np.testing.assert_array_equal(order(ours)(a.data), order(dense)(a.data))
    batch = jnp.stack([a.data, 2 * a.data])
    np.testing.assert_array_equal(jax.vmap(jax.grad(ours))(batch), jax.vmap(jax.grad(dense))(batch))


def test_check_grads_to_second_order():
    a, b = wild_pair()
    # Linear maps: differences over a whole unit are exact up to rounding.
    exact = {"order": 2, "eps": 1.0, "atol": 1e-5, "rtol": 1e-5}
    add = jax.jit(functools.partial(add_dense, a, b, 0))
    check_grads(add, (a.data, b.data), modes=["rev"], **exact)
    check_grads(jax.jit(functools.partial(slice_dense, a)), (a.data,), modes=["rev"], **exact)
    total = jaxaccum.sparse_add(a, b)
    ct = jnp.arange(1.0, total.nse + 1)
    add_grad = lambda g: jaxaccum.sparse_add_grad(g, a.indices, b.indices, total.indices)  # noqa: E731
    slice_grad = lambda g: jaxaccum.sparse_slice_grad(g, [[4], [2], [7]], [1], [[1], [6]])  # noqa: E731
    for fn, g in ((add_grad, ct), (slice_grad, ct[:2])):
        check_grads(jax.jit(fn), (g,), modes=["fwd", "rev"], **exact)


def test_rules_give_what_the_raw_ops_give():
    rng = np.random.default_rng(14)
    a, b = (random_bcoo(rng, (3, 4), 9, "float32", "flagged") for _ in range(2))
    real = [m.indices[: len(entries(m))] for m in (a, b)]
    for thresh in (0, 4):
        total, (a_grad, b_grad) = add_and_pull(a, b, thresh, jnp.arange(1.0, 19.0))
        kept = len(stored(total))
        raw = jaxaccum.sparse_add_grad(jnp.arange(1.0, kept + 1), *real, total.indices[:kept])
        for grad, want in zip((a_grad, b_grad), raw, strict=True):
            np.testing.assert_array_equal(grad[: len(want)], want)
            assert not np.asarray(grad)[len(want) :].any(), "padding has no gradient"
    assert kept < len(entries(a).keys() | entries(b).keys()), "thresh has dropped something"
    cut = functools.partial(slice_values, a, [1, -1], [2, 3])
    (grad,) = jax.vjp(cut, a.data)[1](jnp.arange(1.0, 10.0))
    part = jaxaccum.sparse_slice(a, [1, -1], [2, 3])
    kept = len(stored(part))
    # Padding (3, 4) moved by the start (1, -1) is the real row (2, 5) of a larger slice: the
    # rule must not take it for one.
    raw = jaxaccum.sparse_slice_grad(
        jnp.arange(1.0, kept + 1), real[0], [1, -1], part.indices[:kept]
    )
    np.testing.assert_array_equal(grad[: len(raw)], raw)
    assert not np.asarray(grad)[len(raw) :].any()


def test_padding_that_a_start_moves_onto_a_real_row_gets_no_gradient():
    # Padding (6) of the operand, counted from start 3, is the row 3 of the result's dense twin;
    # and the padding row (3) of the result, counted back, is the operand's padding.
    x = bcoo([[3], [5]], np.ones(2, np.float32), (6,), FLAGGED, 4)
    pull = jax.vjp(functools.partial(slice_values, x, [3], [9]), x.data)[1]
    np.testing.assert_array_equal(pull(jnp.arange(1.0, 5.0))[0], [1, 2, 0, 0])


def test_forward_mode():
    a, b = wild_pair()
    dots = jnp.arange(1.0, 8.0), jnp.arange(2.0, 8.0)

    def add(x, y, x_dot, y_dot):
        ends = with_data(a, x), with_data(b, y)
        total, dot = jaxaccum.sparse_add_jvp(*ends, x_dot, y_dot, 2)
        return total.todense(), with_data(total, dot).todense()

    total, dot = jax.jit(add)(a.data, b.data, *dots)
    np.testing.assert_array_equal(total, add_dense(a, b, 2, a.data, b.data))
    _, pull = jax.vjp(functools.partial(add_dense, a, b, 2), a.data, b.data)
    weights = jnp.arange(1.0, 13.0).reshape(3, 4)
    back = sum(jnp.vdot(g, d) for g, d in zip(pull(weights), dots, strict=True))
    assert jnp.vdot(weights, dot) == back, "forward and reverse are transposes"

    part, dot = jaxaccum.sparse_slice_jvp(a, dots[0], (1, -1), (2, 4))
    np.testing.assert_array_equal(part.todense(), dense_slice(a, a.data))
    _, want = jax.jvp(functools.partial(dense_slice, a), (a.data,), (dots[0],))
    np.testing.assert_array_equal(with_data(part, dot).todense(), want)
    exact = {"order": 2, "eps": 1.0, "atol": 1e-5, "rtol": 1e-5}
    check_grads(jax.jit(lambda d: add(a.data, b.data, d, dots[1])[1]), (dots[0],), **exact)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(functools.partial(slice_dense, a), (a.data,), (a.data,))
    with pytest.raises(ValueError, match=r"a_dot must have the shape \(7,\), got \(6,\)"):
        jaxaccum.sparse_add_jvp(a, b, dots[1], dots[1])
    with pytest.raises(TypeError, match="x_dot must have the dtype float32, got int32"):
        jaxaccum.sparse_slice_jvp(a, jnp.zeros(7, jnp.int32), (1, -1), (2, 4))


def test_values_of_other_dtypes_beside_a_differentiated_one():
    a, b = wild_pair(dtype="int32")

    def loss(x):
        total = jaxaccum.sparse_add(a, b).todense().sum()
        return x * total.astype(jnp.float32)

    assert jax.grad(loss)(1.0) == float(np.sum([*entries(a).values(), *entries(b).values()]))


# ------------------------------------------------------------------ transformations
def test_modes_agree():
    rng = np.random.default_rng(8)
    pairs = [[random_bcoo(rng, (3, 4), n, "float32", "wild") for n in (7, 6)] for _ in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)

    def step(a, b):
        return jaxaccum.sparse_slice(jaxaccum.sparse_add(a, b, 1.5), [1, 0], [2, 4])

    want = [step(*pair) for pair in pairs]
    jitted = jax.jit(step)
    assert_equal_leaves([jitted(*pair) for pair in pairs], want)
    assert jitted._cache_size() == 1, "the second call compiles nothing"
    # To vmap, a batch of BCOOs is one BCOO with a batch dimension.
    stacked = [sparse.BCOO((m.data, m.indices), shape=(3, *m.shape)) for m in batch]
    vmapped = jax.vmap(step)(*stacked)
    assert (vmapped.n_batch, vmapped.shape) == (1, (3, 2, 4))
    _, scanned = jax.lax.scan(lambda carry, pair: (carry, step(*pair)), 0, batch)
    for i in range(3):
        for result in (vmapped, scanned):
            assert_equal_leaves(jax.tree.map(lambda leaf, i=i: leaf[i], result), want[i])
    raw = functools.partial(jaxaccum.sparse_add_grad, jnp.arange(7.0))
    rows = [m.indices for m in batch]
    got = jax.vmap(raw)(rows[0], rows[1], rows[0])
    for i in range(3):
        assert_equal_leaves([g[i] for g in got], raw(rows[0][i], rows[1][i], rows[0][i]))


def assert_equal_leaves(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(got), jax.tree.leaves(want))


def test_sums_accumulate_under_scan():
    parts = [vector([i, 5], [1, 2], 6, (False, False)) for i in range(4)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    zero = vector([6] * 6, [0] * 6)

    def add(total, part):
        return jaxaccum.sparse_add(total, part, nse=6), None

    total, _ = jax.lax.scan(add, zero, batch)
    assert stored(total) == {(0,): 1, (1,): 1, (2,): 1, (3,): 1, (5,): 8}


def test_sorted_operands_are_not_sorted_again():
    a = b = vector([0, 3], [1, 2])
    text = jax.jit(jaxaccum.sparse_add).lower(a, b).compile().as_text()
    assert not re.search(r"\bsort\(", text)
    text = jax.jit(jaxaccum.sparse_add).lower(a, vector([3, 0], [1, 2], 6, (False, False)))
    assert re.search(r"\bsort\(", text.compile().as_text()), "so the search finds sorts"
    cut = jax.jit(lambda x: jaxaccum.sparse_slice(x, [1], [3]))
    assert not re.search(r"\bsort\(", cut.lower(a).compile().as_text())


# ------------------------------------------------------------------ room and reports
def test_nse_that_is_too_small_is_loud():
    a, b = vector([0, 2], [1, 2]), vector([1, 2], [3, 4])
    assert stored(jaxaccum.sparse_add(a, b, nse=3)) == {(0,): 1, (1,): 3, (2,): 6}
    assert stored(jaxaccum.sparse_add(a, b, nse=9)) == {(0,): 1, (1,): 3, (2,): 6}
    # Entries that thresh drops take no room.
    assert stored(jaxaccum.sparse_add(a, b, 7, nse=2)) == {(0,): 1, (1,): 3}
    add = functools.partial(jaxaccum.sparse_add, nse=2)
    cut = functools.partial(jaxaccum.sparse_slice, start=[0], size=[6], nse=1)
    calls = [(lambda x: add(with_data(a, x), b), 2, 3), (lambda x: cut(with_data(a, x)), 1, 2)]
    for call, nse, num_entries in calls:
        text = f"nse={nse} is too small: entries of the result: {num_entries}"
        with pytest.raises(ValueError, match=text):
            call(a.data)
        with pytest.raises(ValueError, match=text):
            jax.grad(lambda x, call=call: call(x).data.sum())(a.data)
        error, _ = jax.jit(checkify.checkify(call))(a.data)
        assert text in error.get()
        checked = checkify.checkify(jax.vmap(call))
        error, _ = jax.jit(checked)(jnp.stack([a.data, a.data]))
        assert "is too small" in error.get()
    error, _ = jax.jit(checkify.checkify(functools.partial(jaxaccum.sparse_add, nse=3)))(a, b)
    assert error.get() is None


def test_gradient_rows_that_match_nothing_are_reported():
    rows, out = jnp.array([[1], [4]]), jnp.array([[0], [2]])
    call = lambda out: jaxaccum.sparse_slice_grad(jnp.ones(2), rows, jnp.array([1]), out)  # noqa: E731
    text = "no row in input_indices: of 2 used 1"
    for lost in (out, jnp.array([[0], [0]])):  # without a row, and second to claim one
        with pytest.raises(ValueError, match=text):
            call(lost)
        error, _ = jax.jit(checkify.checkify(call))(lost)
        assert text in error.get()
    error, grad = jax.jit(checkify.checkify(call))(jnp.array([[3], [0]]))
    assert error.get() is None
    assert grad.tolist() == [1, 1]


def test_sum_rows_that_nobody_has_are_ignored():
    grads = jaxaccum.sparse_add_grad(jnp.arange(1.0, 5.0), [[2]], [[0]], [[0], [1], [2], [3]])
    assert [g.tolist() for g in grads] == [[3], [1]]


def test_empty_index_lists():
    empty = np.zeros((0, 2), np.int32)
    a_grad, b_grad = jaxaccum.sparse_add_grad([], empty, [[1, 2]], empty)
    assert (a_grad.shape, b_grad.tolist()) == ((0,), [0])
    assert jaxaccum.sparse_slice_grad([], [[1, 2]], [0, 0], empty).tolist() == [0]
    assert jaxaccum.sparse_slice_grad([], empty, [0, 0], empty).shape == (0,)


# ------------------------------------------------------------------ neighbours and wrong calls
def test_results_feed_the_rest_of_jax_sparse():
    a, b = wild_pair()
    total = jaxaccum.sparse_add(a, b)
    dense = dense_of(a.data, a) + dense_of(b.data, b)
    np.testing.assert_array_equal(total.todense(), dense)
    right = jnp.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(total @ right, dense @ right)
    cut = sparse.bcoo_slice(total, start_indices=(1, 1), limit_indices=(3, 4))
    np.testing.assert_array_equal(cut.todense(), dense[1:, 1:])
    np.testing.assert_array_equal((total + total).todense(), 2 * dense)
    np.testing.assert_array_equal(total.sum_duplicates(nse=12).todense(), dense)
    np.testing.assert_array_equal(
        sparse.bcoo_transpose(total, permutation=(1, 0)).todense(), dense.T
    )
    np.testing.assert_array_equal(jaxaccum.sparse_add(cut, cut).todense(), 2 * dense[1:, 1:])
    np.testing.assert_array_equal(sparse.sparsify(jnp.sum)(total), dense.sum())


def test_indexed_slices_round_trip():
    grad = jaxaccum.IndexedSlices(jnp.array([4, 1, 4, 6]), jnp.array([1.0, 2, 3, 9]), (6,))
    total = jaxaccum.sparse_add(grad.to_bcoo(), grad.to_bcoo())
    back = jaxaccum.IndexedSlices.from_bcoo(total)
    assert back.dense_shape == (6,)
    np.testing.assert_array_equal(back.to_dense(), 2 * grad.to_dense())
    assert back.indices.tolist() == [1, 4] + [6] * 6
    rows = jaxaccum.IndexedSlices(jnp.array([1]), jnp.ones((1, 3)), (6, 3)).to_bcoo()
    with pytest.raises(ValueError, match="a must have n_batch=0, n_dense=0 and n_sparse=2"):
        jaxaccum.sparse_add(rows, rows)


@pytest.mark.parametrize("index_dtype", ["int32", "uint8", *["int64"] * X64])
def test_indices_come_out_as_int32_unless_64_bits_go_in(index_dtype):
    x = bcoo([[1, 200]], np.ones(1, np.float32), (2, 255), FLAGGED, 2, index_dtype)
    want = "int64" if index_dtype == "int64" else "int32"
    for result in (jaxaccum.sparse_add(x, x), jaxaccum.sparse_slice(x, [0, 100], [2, 200])):
        assert result.indices.dtype == want
        assert len(stored(result)) == 1


@pytest.mark.parametrize("side", [2**31 - 1, *[2**40, 2**62] * X64])
def test_ranks_beyond_a_word(side):
    dtype = np.int32 if side < 2**31 else np.int64
    rows = np.array([[side - 1, 0, side - 1], [0, side - 1, 0], [1, 0, 0]], dtype)
    a = bcoo(rows, np.array([1, 2, 3], np.float32), (side,) * 3, index_dtype=dtype)
    b = bcoo(rows[:1], np.array([10], np.float32), (side,) * 3, FLAGGED, index_dtype=dtype)
    want = {(0, side - 1, 0): 2, (1, 0, 0): 3, (side - 1, 0, side - 1): 11}
    total = jaxaccum.sparse_add(a, b)
    assert stored(total) == want
    assert list(stored(jaxaccum.sparse_slice(a, [side - 1, 0, 0], [9, 9, side]))) == [
        (0, 0, side - 1)
    ]
    grad, _ = jaxaccum.sparse_add_grad(jnp.arange(1.0, 5.0), a.indices, b.indices, total.indices)
    assert grad.tolist() == [3, 1, 2]


WRONG = {
    "no bcoo": (TypeError, "b must be a BCOO array, got ndarray", lambda a: (a, np.zeros(6))),
    "batched": (
        ValueError,
        r"a must have n_batch=0, n_dense=0 and n_sparse=2.* indices of shape \(2, 1, 1\)",
        lambda a: [sparse.BCOO.fromdense(jnp.eye(2), n_batch=1)] * 2,
    ),
    "dtypes": (
        TypeError,
        "same dtype, got float32 and int32",
        lambda a: (a, bcoo([[1]], np.ones(1, np.int32), (6,))),
    ),
    "bool": (
        TypeError,
        "a must have a numeric dtype, got bool",
        lambda a: [bcoo([[1]], np.ones(1, bool), (6,))] * 2,
    ),
    "complex thresh": (TypeError, "thresh must be a real number", lambda a: (a, a, 1j)),
    "bool thresh": (TypeError, "thresh must be a real number, got", lambda a: (a, a, True)),
    "text thresh": (TypeError, "thresh must be a real number", lambda a: (a, a, "1")),
    "no thresh": (TypeError, "thresh must be a real number", lambda a: (a, a, None)),
    "traced kind": (TypeError, "real number, got dtype complex64", lambda a: (a, a, jnp.array(1j))),
}


@pytest.mark.parametrize(("error", "text", "args"), WRONG.values(), ids=WRONG)
def test_wrong_additions(error, text, args):
    args = args(vector([0], [1]))
    with pytest.raises(error, match=text):
        jaxaccum.sparse_add(*args)


@pytest.mark.parametrize(
    ("error", "text", "kwargs"),
    [
        (TypeError, "x must be a BCOO array, got ", {"x": jnp.zeros(6)}),
        (TypeError, "start must hold integers, got float", {"start": [0.5]}),
        (TypeError, "start must hold integers, got bool", {"start": [True]}),
        (TypeError, "size must hold integers, got", {"size": [0.5]}),
        (TypeError, "nse must be an int, got 1.5", {"nse": 1.5}),
        (ValueError, "nse must not be negative, got -1", {"nse": -1}),
        (ValueError, "cannot address", {"start": [-(2**40)], "size": [2**41]}),
    ],
)
def test_wrong_slices(error, text, kwargs):
    call = {"x": vector([0], [1]), "start": [0], "size": [1]} | kwargs
    with pytest.raises(error, match=text):
        jaxaccum.sparse_slice(**call)


def test_wrong_calls_while_traced():
    x = vector([0], [1])
    with pytest.raises(ValueError, match="size must not be negative, got -1 for axis 0"):
        jax.jit(lambda start: jaxaccum.sparse_slice(x, start, [-1]))(jnp.array([9]))
    with pytest.raises(TypeError, match="size decides a shape and must be static"):
        jax.jit(lambda size: jaxaccum.sparse_slice(x, [0], size))(jnp.array([1]))
    with pytest.raises(ValueError, match=r"thresh must be a scalar, got shape \(1,\)"):
        jax.jit(jaxaccum.sparse_add)(x, x, jnp.zeros(1))


def test_wrong_raw_gradients():
    with pytest.raises(TypeError, match="a_indices must hold integers, got float32"):
        jaxaccum.sparse_add_grad([1.0], [[0.5]], [[0]], [[0]])
    with pytest.raises(TypeError, match="backprop_val_grad must have a numeric dtype, got bool"):
        jaxaccum.sparse_add_grad([True], [[0]], [[0]], [[0]])
    with pytest.raises(TypeError, match="input_start must hold integers, got float32"):
        jaxaccum.sparse_slice_grad([1.0], [[0]], jnp.zeros(1), [[0]])


@pytest.mark.parametrize("far", [2**31] if not X64 else [])
def test_host_indices_are_not_truncated(far):
    with pytest.raises(
        ValueError, match="indices must fit int32, got entries from 0 to 2147483648"
    ):
        jaxaccum.sparse_add_grad([1.0, 2.0], np.array([[0], [far]]), [[0]], [[0], [1]])
