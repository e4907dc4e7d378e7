"""IndexedSlices: what rows mean, padding, and the way to and from BCOO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

from jaxaccum import IndexedSlices

INDICES = np.array([3, 0, 3, 4, 1], np.int32)  # unsorted, repeated, one of padding
VALUES = np.arange(10, dtype=np.float32).reshape(5, 2)
DENSE = np.array([[2, 3], [8, 9], [0, 0], [0 + 4, 1 + 5]], np.float32)


def grad(shape=(4, 2)):
    return IndexedSlices(jnp.asarray(INDICES), jnp.asarray(VALUES), shape)


def test_repeated_rows_mean_their_sum_and_padding_nothing():
    for call in (IndexedSlices.to_dense, jax.jit(IndexedSlices.to_dense)):
        np.testing.assert_array_equal(call(grad()), DENSE)


def test_row_mask_tells_rows_from_padding_and_nonsense():
    assert grad().row_mask.tolist() == [True, True, True, False, True]
    assert grad((None, 2)).row_mask.all()  # padding is 2**31 - 1 there
    odd = IndexedSlices(jnp.array([-1, 5, 2**31 - 1]), jnp.ones((3, 2)), (4, 2))
    assert not odd.row_mask.any()
    assert not odd.to_dense().any()  # -1 does not wrap to the last row


def test_round_trip_through_bcoo():
    mat = grad().to_bcoo()
    assert (mat.n_sparse, mat.n_dense, mat.shape) == (1, 1, (4, 2))
    np.testing.assert_array_equal(mat.todense(), DENSE)
    back = IndexedSlices.from_bcoo(mat)
    np.testing.assert_array_equal(back.indices, INDICES)
    np.testing.assert_array_equal(back.values, VALUES)
    assert back.dense_shape == (4, 2)
    summed = IndexedSlices.from_bcoo(mat.sum_duplicates(nse=5))  # pads one past the end, as we do
    np.testing.assert_array_equal(summed.to_dense(), DENSE)
    assert summed.row_mask.sum() == 3


def test_other_layouts_of_bcoo_are_refused():
    for layout in ({"n_dense": 0}, {"n_batch": 1, "n_dense": 0}):
        mat = sparse.BCOO.fromdense(jnp.asarray(DENSE), **layout)
        with pytest.raises(ValueError, match="mat must have n_batch=0 and n_sparse=1, got"):
            IndexedSlices.from_bcoo(mat)


@pytest.mark.parametrize("shape", [None, (None, 2)])
def test_unknown_row_counts_have_no_dense_form(shape):
    unknown = grad(shape)
    assert unknown.num_rows is None
    for method in (unknown.to_dense, unknown.to_bcoo):
        with pytest.raises(ValueError, match="needs a dense_shape of known row count, got "):
            method()


def test_shape_is_static_and_the_rest_are_leaves():
    assert len(jax.tree.leaves(grad())) == 2
    assert jax.jit(lambda g: g)(grad([4, 2])).dense_shape == (4, 2)  # a list will do
    doubled = jax.tree.map(lambda leaf: leaf * 2, grad())
    np.testing.assert_array_equal(doubled.values, 2 * VALUES)
    nothing = jax.tree.map(lambda leaf: None, grad())
    assert nothing.indices is None  # built around placeholders without complaint


def test_to_dense_is_differentiable():
    def loss(values):
        return jnp.sum(IndexedSlices(jnp.asarray(INDICES), values, (4, 2)).to_dense() ** 2)

    want = np.where(INDICES[:, None] < 4, 2 * DENSE[np.minimum(INDICES, 3)], 0)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(VALUES)), want)
