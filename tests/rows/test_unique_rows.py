"""Rows made unique: against a loop in NumPy, and in an order that does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from internals import add_in_order, add_where_they_lie

import jaxaccum

ROWS = 6


def slices(seed, n=40, dtype=np.float32, rows=ROWS, low=0):
    rng = np.random.default_rng(seed)
    indices = rng.integers(low, rows + 1, n).astype(np.int32)  # padding among them
    values = (rng.standard_normal((n, 2, 3)) * 8).astype(dtype)
    return jaxaccum.IndexedSlices(jnp.asarray(indices), jnp.asarray(values), (rows, 2, 3))


def summed(grad):
    """Rows in ascending order and their sums, by a loop in the order they come in."""
    totals = {}
    for i, value in zip(np.asarray(grad.indices).tolist(), np.asarray(grad.values), strict=True):
        if i != grad.padding_index:
            wide = value.astype(np.float32) if value.dtype.itemsize < 4 else value
            totals[i] = totals[i] + wide if i in totals else wide
    return sorted(totals), [totals[i] for i in sorted(totals)]


def check(unique, grad):
    rows, sums = summed(grad)
    n = len(rows)
    assert unique.indices.tolist() == rows + [grad.padding_index] * (len(grad.indices) - n)
    assert unique.values.dtype == grad.values.dtype
    expected = np.array(sums).reshape(n, *grad.values.shape[1:]).astype(grad.values.dtype)
    np.testing.assert_array_equal(unique.values[:n], expected)
    assert not np.any(np.asarray(unique.values[n:]))


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.complex64, jnp.bfloat16])
def test_rows_are_summed_in_the_order_they_come_in(dtype):
    for seed in range(5):
        grad = slices(seed, dtype=dtype)
        check(jax.jit(jaxaccum.sum_duplicates)(grad), grad)


def test_sorted_unique_rows_pass_through():
    grad = jaxaccum.IndexedSlices(jnp.array([1, 4, 9, 9]), jnp.arange(4.0)[:, None], (9, 1))
    unique = jaxaccum.sum_duplicates(grad)
    assert unique.indices.tolist() == [1, 4, 9, 9]
    assert unique.values.ravel().tolist() == [0, 1, 0, 0]  # whatever padding held


@pytest.mark.parametrize("n", [0, 1])
def test_few_slices(n):
    grad = slices(0, n=n)
    check(jaxaccum.sum_duplicates(grad), grad)


@pytest.mark.cpu
def test_unknown_row_count():
    known = slices(0)
    indices = jnp.where(known.indices == ROWS, 2**31 - 1, known.indices)
    check(
        jaxaccum.sum_duplicates(jaxaccum.IndexedSlices(indices, known.values, None)),
        jaxaccum.IndexedSlices(indices, known.values, None),
    )


def test_invalid_rows_are_still_refused():
    state = jaxaccum.init((ROWS, 2, 3), capacity=ROWS)
    for bad in (-1, ROWS + 1):
        grad = slices(0)
        grad = jaxaccum.IndexedSlices(grad.indices.at[5].set(bad), grad.values, grad.dense_shape)
        _, verdict = jaxaccum.apply(state, jaxaccum.sum_duplicates(grad))
        assert verdict == jaxaccum.Verdict.INVALID


def test_wide_ids_do_not_become_others():
    with jax.enable_x64(True):
        state = jaxaccum.init((ROWS, 2, 3), capacity=ROWS)
        grad = slices(0)
        wide = grad.indices.astype(jnp.int64).at[5].set(2**32 + 1)  # 1, were it cut to 32 bits

        @jax.jit
        def apply(indices):
            each = jaxaccum.IndexedSlices(indices, grad.values, grad.dense_shape)
            return jaxaccum.apply(state, jaxaccum.sum_duplicates(each))[1]

        assert apply(wide) == jaxaccum.Verdict.INVALID
        assert apply(wide.at[5].set(1)) == jaxaccum.Verdict.ACCEPTED


@pytest.mark.cpu
def test_accumulating_unique_rows_changes_no_count():
    grad = slices(3)
    state = jaxaccum.init(grad.dense_shape, capacity=ROWS)
    _, plain, _ = jaxaccum.take(jaxaccum.apply(state, grad)[0])
    _, unique, _ = jaxaccum.take(jaxaccum.apply(state, jaxaccum.sum_duplicates(grad))[0])
    np.testing.assert_array_equal(plain.indices, unique.indices)
    np.testing.assert_array_equal(plain.values, unique.values)


def test_the_scan_for_other_devices_sums_the_same_rows():
    # Integers in floats: any order gives the same bits.
    for seed in range(5):
        grad = slices(seed)
        order = np.argsort(grad.indices, kind="stable")
        _, segment = np.unique(np.asarray(grad.indices)[order], return_inverse=True)
        arguments = jnp.round(grad.values), jnp.asarray(order), jnp.asarray(segment, jnp.int32)
        np.testing.assert_array_equal(add_in_order(*arguments), add_where_they_lie(*arguments))


@pytest.mark.cpu
@pytest.mark.parametrize(("platform", "num_adding"), [("cpu", 1), ("cuda", 0), ("tpu", 0)])
def test_no_scatter_adds_floats_off_the_cpu(platform, num_adding):
    lower = jax.export.export(jax.jit(jaxaccum.sum_duplicates), platforms=[platform])
    scatters = lower(slices(0)).mlir_module().split('"stablehlo.scatter"')[1:]
    assert len(scatters) >= 2
    bodies = [text[: text.index("stablehlo.return")] for text in scatters]
    assert sum("stablehlo.add" in body for body in bodies) == num_adding


def test_gradients_are_those_of_the_dense_twin():
    grad, direction = slices(1, n=12), slices(2, n=12).values

    def of(values):
        return jaxaccum.IndexedSlices(grad.indices, values, grad.dense_shape)

    def total(values):
        return jnp.sum(jaxaccum.sum_duplicates(of(values)).values ** 3)

    def dense(values):
        return jnp.sum(of(values).to_dense() ** 3)

    for derive in (jax.grad, lambda f: lambda v: jax.jvp(jax.grad(f), (v,), (direction,))[1]):
        ours, theirs = derive(total)(grad.values), derive(dense)(grad.values)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert np.any(theirs)
