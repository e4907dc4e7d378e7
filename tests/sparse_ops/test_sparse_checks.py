"""What the sparse ops report and refuse, and what they hand to others."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from breadth import in_breadth
from jax.experimental import checkify, sparse
from sparse_harness import (
    FLAGGED,
    X64,
    bcoo,
    dense_of,
    ramp,
    random_pair,
    stored,
    vector,
    with_data,
)

import jaxaccum


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


checked_slice_grad = jax.jit(checkify.checkify(jaxaccum.sparse_slice_grad))


@pytest.mark.parametrize(
    ("out", "num_used"),
    [
        ([[2], [3]], 1),  # the first has no row, and is not the last
        ([[0], [0], [3]], 2),  # the second claims the row of the first
        ([[3], [2]], 1),  # what comes last lies beyond no other
        ([[0], [3], [3], [3]], 2),  # repeated as often as the input does: real for all one knows
    ],
)
def test_gradient_rows_that_match_nothing_are_reported(out, num_used):
    call = jnp.ones(len(out)), jnp.array([[1], [4], [4], [4]]), jnp.array([1]), jnp.array(out)
    text = f"no row in input_indices: of {len(out)} used {num_used}"
    with pytest.raises(ValueError, match=text):
        jaxaccum.sparse_slice_grad(*call)
    error, _ = checked_slice_grad(*call)
    assert text in error.get()


def test_gradient_rows_that_all_match_are_not_reported():
    rows = jnp.array([[1], [4], [4], [4]])
    error, grad = checked_slice_grad(ramp(1.0, 3.0), rows, jnp.array([1]), jnp.array([[3], [0]]))
    assert error.get() is None
    assert grad.tolist() == [2, 1, 1, 1]


# Entries of a vector of 6, the slice's start and size: padding beyond the input, on an entry of it
# outside of the slice, alone, and nothing but padding; from below zero, and of a repeated entry.
PADDED_SLICES = [([0, 3, 5], 1, 9), ([0, 3, 5], 0, 3), ([0, 1, 5], 0, 3), ([0, 3, 4], 1, 2)]
PADDED_SLICES += [([3, 4, 5], 0, 0), ([0, 2, 4], -2, 5), ([5, 0, 0], 0, 5)]


@pytest.mark.parametrize(("entries", "start", "size"), PADDED_SLICES)
@pytest.mark.parametrize("extra", in_breadth([0, 2], {2}))
def test_gradient_of_a_padded_slice_is_that_of_its_rule(entries, start, size, extra):
    x = vector(entries, np.ones(len(entries)), 6, (False, False))
    part = jaxaccum.sparse_slice(x, [start], [size], nse=x.nse + extra)
    call = ramp(1.0, part.nse + 1), x.indices, jnp.array([start]), part.indices
    inside = sorted({i for i in entries if start <= i < start + size})
    want = [1.0 + inside.index(i) if i in inside else 0.0 for i in entries]
    assert jaxaccum.sparse_slice_grad(*call).tolist() == want
    error, grad = checked_slice_grad(*call)
    assert error.get() is None
    assert grad.tolist() == want


def test_sum_rows_that_nobody_has_are_ignored():
    grads = jaxaccum.sparse_add_grad(ramp(1.0, 5.0), [[2]], [[0]], [[0], [1], [2], [3]])
    assert [g.tolist() for g in grads] == [[3], [1]]


def test_empty_index_lists():
    empty = np.zeros((0, 2), np.int32)
    a_grad, b_grad = jaxaccum.sparse_add_grad([], empty, [[1, 2]], empty)
    assert (a_grad.shape, b_grad.tolist()) == ((0,), [0])
    assert jaxaccum.sparse_slice_grad([], [[1, 2]], [0, 0], empty).tolist() == [0]
    assert jaxaccum.sparse_slice_grad([], empty, [0, 0], empty).shape == (0,)


@pytest.mark.full
def test_results_feed_the_rest_of_jax_sparse():
    a, b = random_pair("sorted", "wild")
    total = jaxaccum.sparse_add(a, b)
    dense = dense_of(a.data, a) + dense_of(b.data, b)
    np.testing.assert_array_equal(total.todense(), dense)
    right = ramp(8.0).reshape(4, 2)
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
    grad, _ = jaxaccum.sparse_add_grad(ramp(1.0, 5.0), a.indices, b.indices, total.indices)
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
    "traced kind": (
        TypeError,
        "real number, got dtype complex64",
        lambda a: (a, a, jnp.complex64(1j)),
    ),
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
    with pytest.raises(TypeError, match="a_indices must hold integers, got float"):
        jaxaccum.sparse_add_grad([1.0], [[0.5]], [[0]], [[0]])
    with pytest.raises(TypeError, match="backprop_val_grad must have a numeric dtype, got bool"):
        jaxaccum.sparse_add_grad([True], [[0]], [[0]], [[0]])
    with pytest.raises(TypeError, match="input_start must hold integers, got float"):
        jaxaccum.sparse_slice_grad([1.0], [[0]], jnp.zeros(1), [[0]])


def test_host_indices_are_not_truncated():
    far = 2**31
    text = f"indices must fit int32, got entries from 0 to {far}"
    refusal = contextlib.nullcontext() if X64 else pytest.raises(ValueError, match=text)
    rows = np.array([[0], [far]])
    grads = [[[1.0, 2.0], [1.0]]] * X64  # where 64 bits are held, the row is found
    with refusal:
        found = jaxaccum.sparse_add_grad([1.0, 2.0], rows, rows[:1], rows)
        grads.remove([g.tolist() for g in found])
    assert not grads
