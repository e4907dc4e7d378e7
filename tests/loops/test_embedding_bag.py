"""Bags of rows against sums and means written out, and their gradients as rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from breadth import in_breadth

import jaxaccum

TABLE = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
BAGS = [[4, 1, 4], [], [5], [0, 2]]
WEIGHTS = [[0.5, 2.0, 1.0], [], [3.0], [1.0, -0.25]]


pytestmark = pytest.mark.usefixtures("as_it_comes")


def written_out(combiner, weighted):
    rows = np.zeros((4, 2))
    for k, (bag, weights) in enumerate(zip(BAGS, WEIGHTS, strict=True)):
        share = np.array(weights if weighted else np.ones(len(bag)))
        rows[k] = share @ TABLE[np.array(bag, int)] if bag else 0
        if combiner == "mean" and bag:
            rows[k] /= share.sum()
    return rows


def arguments(layout, padding_id=-1):
    """The bags as ``(ids, weights, how they are told apart)``."""
    flat = [i for bag in BAGS for i in bag], [w for bag in WEIGHTS for w in bag]
    lengths = [len(bag) for bag in BAGS]
    if layout == "padded":
        fill = [[*bag, *[padding_id] * (3 - len(bag))] for bag in BAGS]
        weights = [[*bag, *[7.0] * (3 - len(bag))] for bag in WEIGHTS]
        return jnp.array(fill), jnp.array(weights), {"padding_id": padding_id}
    if layout == "offsets":
        starts = np.cumsum([0, *lengths[:-1]])
        return jnp.array(flat[0]), jnp.array(flat[1]), {"offsets": starts}
    ids, weights = (jnp.array(x)[::-1] for x in flat)  # in any order
    bag_of = jnp.asarray(np.repeat(np.arange(4), lengths)[::-1])
    return ids, weights, {"segment_ids": bag_of, "num_bags": 4}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combiner", ["sum", "mean"])
@pytest.mark.parametrize("layout", in_breadth(["padded", "offsets", "segments"], {"padded"}))
def test_bags_are_summed_and_averaged(layout, combiner, weighted):
    ids, weights, options = arguments(layout)
    options |= {"combiner": combiner, "weights": weights if weighted else None}

    def pooled(table):
        return jaxaccum.embedding_bag(table, ids, **options)

    def loss(table):
        return jnp.sum(jnp.sin(pooled(table)))

    table = jnp.asarray(TABLE)
    np.testing.assert_allclose(
        jax.jit(pooled)(table), written_out(combiner, weighted), rtol=1e-5, atol=1e-6
    )
    _, rows = jax.jit(jaxaccum.value_and_sparse_grad(loss, tables=True))(table)
    np.testing.assert_allclose(rows.to_dense(), jax.grad(loss)(table), rtol=1e-5, atol=1e-6)
    assert int(rows.row_mask.sum()) == 6  # what pads touches no row


def test_padding_may_be_a_row_and_makes_no_nan():
    table = jnp.asarray(TABLE).at[3].set(jnp.nan)
    ids, _, options = arguments("padded", padding_id=3)
    pooled = jaxaccum.embedding_bag(table, ids, combiner="sum", **options)
    np.testing.assert_allclose(pooled, written_out("sum", False), rtol=1e-6)


def test_an_id_out_of_range_cannot_be_missed():
    pooled = jaxaccum.embedding_bag(jnp.asarray(TABLE), jnp.array([[0, 6], [1, 2]]))
    assert jnp.isnan(pooled).all(axis=1).tolist() == [True, False]


def test_narrow_tables_are_pooled_in_their_dtype():
    ids, weights, options = arguments("padded")
    table = jnp.asarray(TABLE, jnp.bfloat16)
    pooled = jaxaccum.embedding_bag(table, ids, weights=weights, **options)
    assert pooled.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        pooled.astype(jnp.float32), written_out("mean", True), rtol=3e-2, atol=3e-2
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"combiner": "max"}, ValueError, "combiner must be one of"),
        ({"ids": jnp.ones((2, 2))}, TypeError, "ids must be integers, got float"),
        ({"ids": jnp.int32(1)}, ValueError, "got a scalar"),
        ({"weights": jnp.ones(3)}, ValueError, r"weights must have the shape of ids, \(2, 2\)"),
        ({"num_bags": 2}, ValueError, "segment_ids and num_bags, or by offsets alone"),
        ({"offsets": jnp.array([0])}, ValueError, "ragged bags must have rank 1"),
        (
            {"ids": jnp.ones(3, int), "segment_ids": jnp.zeros(2, int), "num_bags": 1},
            ValueError,
            r"segment_ids must have shape \(3,\), got \(2,\)",
        ),
    ],
)
def test_wrong_calls_name_the_argument(options, error, message):
    ids = options.pop("ids", jnp.ones((2, 2), int))
    with pytest.raises(error, match=message):
        jaxaccum.embedding_bag(jnp.asarray(TABLE), ids, **options)
