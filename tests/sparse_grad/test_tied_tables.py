"""One table that is looked up in and used as a whole: what it costs, and training with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaccum import IndexedSlices, apply_updates, lazy_rows, value_and_sparse_grad

ROWS, WIDTH = 13, 4
IDS = np.array([3, 0, 3, 12], np.int32)


def negative_log_likelihood(params, ids):
    """A language model of one layer: rows of the table go in, the whole table comes out."""
    found = params["words"][ids] + params["places"][ids % 5]
    logits = jnp.tanh(found @ params["kernel"]) @ params["words"].T
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), (ids + 1) % ROWS])


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"words": (ROWS, WIDTH), "places": (5, WIDTH), "kernel": (WIDTH, WIDTH)}
    names = zip(shapes, keys, strict=True)
    return {name: jax.random.normal(key, shapes[name]) for name, key in names}


def test_training_a_tied_table_beside_another_is_dense_training(as_it_comes):
    tables = {"words": True, "places": True, "kernel": False}
    grad_fn = value_and_sparse_grad(negative_log_likelihood, tables=tables, allow_dense=True)
    dense, sparse = optax.adam(0.1), lazy_rows(optax.sgd(0.1))
    kinds = {"words": "dense", "places": "sparse", "kernel": "dense"}
    rows_tx = optax.partition({"dense": dense, "sparse": sparse}, kinds)
    dense_tx = optax.partition({"dense": dense, "sparse": optax.sgd(0.1)}, kinds)

    @jax.jit
    def rows_step(params, state, ids):
        _, grads = grad_fn(params, ids)
        assert isinstance(grads["places"], IndexedSlices)
        assert isinstance(grads["words"], jax.Array)
        updates, state = rows_tx.update(grads, state, params)
        return apply_updates(params, updates), state

    @jax.jit
    def dense_step(params, state, ids):
        grads = jax.grad(negative_log_likelihood)(params, ids)
        updates, state = dense_tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    ours = theirs = make_params()
    our_state, their_state = rows_tx.init(ours), dense_tx.init(theirs)
    for step in range(4):
        ids = (IDS * (step + 1)) % ROWS
        ours, our_state = rows_step(ours, our_state, ids)
        theirs, their_state = dense_step(theirs, their_state, ids)
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-4, atol=1e-5)


def test_rows_are_added_into_the_one_dense_gradient():
    rows = 100_003

    def loss(table, ids):
        return jnp.sum(jnp.sin(table[ids])) + jnp.sum(jnp.tanh(table[ids] @ table.T))

    shapes = jax.ShapeDtypeStruct((rows, 64), jnp.float32), IDS
    allowing = value_and_sparse_grad(loss, tables=True, allow_dense=True)
    memory = jax.jit(allowing).lower(*shapes).compile().memory_analysis()
    assert memory.output_size_in_bytes < 1.1 * rows * 64 * 4
    assert memory.temp_size_in_bytes < rows * 64 * 4 / 2
    # In the program itself there are no zeros of the table's size, which XLA would have to remove.
    jaxpr = jax.make_jaxpr(allowing)(*shapes)
    zeros = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "broadcast_in_dim"]
    assert (rows, 64) not in [eqn.outvars[0].aval.shape for eqn in zeros]


def test_the_error_says_what_to_do():
    grad_fn = value_and_sparse_grad(
        negative_log_likelihood, tables={"words": True, "places": True, "kernel": False}
    )
    with pytest.raises(ValueError, match="whose gradient is dense") as caught:
        jax.eval_shape(grad_fn, make_params(), IDS)

    message = str(caught.value)
    assert "leaf ['words']" in message
    assert "test_tied_tables.py" in message
    assert "pass allow_dense=True" in message
    assert "leave the leaf out of tables" in message
