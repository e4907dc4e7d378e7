"""Sparse add and slice against TensorFlow: its values, gradients, errors and quirks."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse
from sparse_harness import (
    DTYPES,
    FLAGGED,
    X64,
    add_and_pull,
    array,
    assert_entries,
    assert_same,
    bcoo,
    golden,
    slice_values,
    stored,
    twin_add,
    vector,
)

import jaxaccum


def groups(cases, values):
    """Golden cases by dtype and rank: each group compiles once, for operands padded alike."""
    found = collections.defaultdict(list)
    for case in cases:
        spec = case[values]
        if spec["dtype"] in [*DTYPES, "bool"] and case["name"] not in IMPROVED:
            rank = len(case.get("dense_shape", case.get("shape")))
            found[f"{spec['dtype']}-r{rank}"].append(case)
    return [
        pytest.param(cases, id=name, marks=[pytest.mark.full] * (name not in BY_DEFAULT))
        for name, cases in sorted(found.items())
    ]


# Every rank once, and a dtype of each further kind; test_every_dtype draws others.
BY_DEFAULT = [*(f"float32-r{rank}" for rank in range(9)), "bfloat16-r2", "uint32-r2", "bool-r2"]
# Where we differ from TensorFlow on purpose; each has a test of its own below.
IMPROVED = {"nan-sum-dropped-even-at-0", "int32-min-dropped", "unsorted-keeps-order"}
ROOM = 40


def padded_rows(rows, nse, fill):
    return np.concatenate([rows, np.full((nse - len(rows), rows.shape[1]), fill)]).astype(np.int32)


def padded(values, nse):
    return np.concatenate([values, np.zeros(nse - len(values), values.dtype)])


@jax.jit
def add_only(a, b, thresh, cotangent):
    return (jaxaccum.sparse_add(a, b, thresh),)


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
    "SparseSliceGrad-06": r"one element a row of output_indices, got 2 and 1",
    "SparseSliceGrad-07": r"one element a row of output_indices, got 0 and 1",
    "SparseSliceGrad-08": r"input_start must be a vector, got shape \(1, 1\)",
    "SparseSliceGrad-09": r"input_start must be a vector, got shape \(\)",
    "SparseSliceGrad-10": r"input_start must have 1 entries.* got 2",
    "SparseSliceGrad-11": r"input_start must have 1 entries.* got 0",
}
# A BCOO cannot be built so at all: its own constructor refuses.
NO_BCOO = {f"SparseAdd-{i:02}" for i in (0, 1, 2, 3, 4, 5, 6, 9, 10)}
NO_BCOO |= {f"SparseSlice-{i:02}" for i in (0, 1, 2, 3, 6, 7)}
# A shape of a BCOO is neither a matrix nor a scalar. Rank 0, permuted rows of a slice and, where
# indices have 64 bits, a shape of more cells than int64 counts are no faults here.
NOT_WRONG = {"SparseAdd-07", "SparseAdd-08", "SparseSlice-04", "SparseSlice-05"}
NOT_WRONG |= {"SparseAdd-14", "SparseSliceGrad-13", "SparseSlice-18"}
# Rows at the end that the input lacks are padding to the function; `raw_ops` refuses them.
NOT_WRONG |= {"SparseSliceGrad-05", "SparseSliceGrad-12"}


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


jitted_add = jax.jit(jaxaccum.sparse_add)


@pytest.mark.parametrize(
    "dtype",
    ["uint32", "float16", *(pytest.param(d, marks=pytest.mark.full) for d in ("int8", "uint8"))],
)
@pytest.mark.parametrize("thresh", [2.5, 3, 3.5, 2.0**40, 1e30, -1e30, -5])
def test_thresh_of_another_type_is_converted_not_reinterpreted(dtype, thresh):
    one = bcoo([[0], [1]], np.array([1, 2]).astype(dtype), (2,))
    two = bcoo([[0], [1]], np.array([2, 2]).astype(dtype), (2,))
    want = twin_add(one, two, thresh)
    assert_entries(jaxaccum.sparse_add(one, two, thresh), want)
    assert_entries(jitted_add(one, two, np.float32(thresh)), want)


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
    for start in (2**31 - 1, -(2**31), *[2**32, -(2**32)] * X64):
        assert stored(cut(x, jnp.array([start]))) == {}
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
    assert not total.unique_indices
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
