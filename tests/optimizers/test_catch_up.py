"""``lazy_rows(catch_up=True)`` against dense optax, which steps every row every time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import in_breadth
from trees import draw

import jaxaccum
from jaxaccum import IndexedSlices

ROWS, WIDTH, BATCH, STEPS = 40, 3, 4, 60
DECAYING = optax.cosine_decay_schedule(0.05, decay_steps=STEPS, alpha=0.1)


pytestmark = pytest.mark.usefixtures("optax_promotes")


def make_params():
    return draw({"bias": (2,), "table": (ROWS, WIDTH)})


def make_batches():
    """Gradients that prefer low rows; in the end every row gets a gradient of zero."""
    rng = np.random.default_rng(1)
    odds = 1 / np.arange(1, ROWS + 1)
    touched = [rng.choice(ROWS, BATCH, p=odds / odds.sum()) for _ in range(STEPS)]
    batches = []
    for rows in [*touched, np.arange(ROWS)]:
        indices, values = np.full(ROWS, ROWS), np.zeros((ROWS, WIDTH), np.float32)
        indices[: len(rows)] = rows
        if len(rows) == BATCH:
            values[:BATCH] = 0.3 + rng.normal(size=(BATCH, WIDTH))
        slices = IndexedSlices(jnp.asarray(indices, jnp.int32), jnp.asarray(values), (ROWS, WIDTH))
        batches.append({"bias": jnp.ones(2, jnp.float32), "table": slices})
    return batches


def train(tx, is_dense):
    @jax.jit
    def step(carry, grads):
        if is_dense:
            grads = {**grads, "table": grads["table"].to_dense()}
        updates, state = tx.update(grads, carry[1], carry[0])
        return (jaxaccum.apply_updates(carry[0], updates), state), None

    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *make_batches())
    (params, state), _ = jax.lax.scan(step, (make_params(), tx.init(make_params())), batches)
    return params["table"], state


EXACT = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.8, nesterov=True),
    "decay": optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    "rmsprop": optax.rmsprop(0.05, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "lion": optax.lion(0.01, weight_decay=0.1),
    "row-wise adagrad": jaxaccum.rowwise_adagrad(0.1),
}


@pytest.mark.parametrize("name", in_breadth(EXACT, {"decay", "lion"}))
def test_where_the_closed_form_is_exact_it_is_the_dense_optimizer(name):
    dense, dense_state = train(EXACT[name], is_dense=True)
    lazy, state = train(jaxaccum.lazy_rows(EXACT[name], catch_up=True), is_dense=False)
    np.testing.assert_allclose(lazy, dense, rtol=2e-5, atol=2e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5),
        state.inner_state,
        dense_state,
    )


@pytest.mark.parametrize(
    ("name", "tx"),
    [
        pytest.param("adam", optax.adam(0.05), marks=pytest.mark.full),
        ("adamw", optax.adamw(DECAYING, weight_decay=0.5)),
        pytest.param(
            "inject",
            optax.inject_hyperparams(optax.adamw)(learning_rate=0.05, weight_decay=0.5),
            marks=pytest.mark.full,
        ),
    ],
)
def test_it_tracks_dense_adam_far_closer_than_plain_lazy_rows(name, tx):
    dense, _ = train(tx, is_dense=True)
    plain, _ = train(jaxaccum.lazy_rows(tx), is_dense=False)
    caught_up, _ = train(jaxaccum.lazy_rows(tx, catch_up=True), is_dense=False)
    plain_distance = np.abs(plain - dense).mean()
    assert plain_distance > 0.02
    assert np.abs(caught_up - dense).mean() < plain_distance / 10


def test_the_moments_of_adam_are_the_dense_ones():
    tx = optax.adam(0.05)
    _, dense_state = train(tx, is_dense=True)
    _, state = train(jaxaccum.lazy_rows(tx, catch_up=True), is_dense=False)
    for moment in ("mu", "nu"):
        expected = getattr(dense_state[0], moment)["table"]
        actual = getattr(state.inner_state[0], moment)["table"]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


def test_rows_that_never_sleep_are_not_moved():
    tx, params = optax.adamw(0.1, weight_decay=0.1), make_params()
    lazy = jaxaccum.lazy_rows(tx, catch_up=True)
    lazy_step, step = jax.jit(lazy.update), jax.jit(tx.update)
    state, expected_state, expected = lazy.init(params), tx.init(params), params
    rng = np.random.default_rng(3)
    for _ in range(3):
        values = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
        slices = IndexedSlices(jnp.arange(ROWS, dtype=jnp.int32), values, (ROWS, WIDTH))
        updates, state = lazy_step(
            {"bias": jnp.ones(2, jnp.float32), "table": slices}, state, params
        )
        params = jaxaccum.apply_updates(params, updates)
        grads = {"bias": jnp.ones(2, jnp.float32), "table": values}
        updates, expected_state = step(grads, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), params, expected)
    np.testing.assert_array_equal(state.last_step["table"], np.full(ROWS, 3))


def test_untouched_rows_stay_as_they_are():
    tx, params = jaxaccum.lazy_rows(optax.adamw(0.1), catch_up=True), make_params()
    state, update = tx.init(params), jax.jit(tx.update)
    slices = IndexedSlices(jnp.array([7, ROWS]), jnp.ones((2, WIDTH), jnp.float32), (ROWS, WIDTH))
    for _ in range(2):
        updates, state = update({"bias": jnp.ones(2, jnp.float32), "table": slices}, state, params)
        assert list(updates["table"].indices) == [7, ROWS]
    moments = state.inner_state[0].nu["table"]
    assert list(np.flatnonzero(np.any(moments != 0, axis=1))) == [7]
    np.testing.assert_array_equal(state.last_step["table"], 2 * (np.arange(ROWS) == 7))


@pytest.mark.parametrize(
    ("tx", "reason"),
    [
        (optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1)), "no closed form"),
        (optax.amsgrad(0.1), "no closed form"),
        (optax.novograd(0.1), "statistics of all gradients"),
        (optax.contrib.schedule_free_adamw(0.1), "another count"),
    ],
)
def test_what_has_no_closed_form_is_refused(tx, reason):
    lazy, params = jaxaccum.lazy_rows(tx, catch_up=True), make_params()
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(lazy.update, make_batches()[0], lazy.init(params), params)


def test_params_are_needed():
    tx, params = jaxaccum.lazy_rows(optax.sgd(0.1), catch_up=True), make_params()
    with pytest.raises(ValueError, match="params must be given to update with catch_up"):
        jax.eval_shape(tx.update, make_batches()[0], tx.init(params))


def test_the_count_of_steps_stays_at_the_top():
    tx, table = jaxaccum.lazy_rows(optax.sgd(0.1, momentum=0.5), catch_up=True), jnp.ones((3, 1))
    top = jnp.int32(2**31 - 1)
    state = tx.init(table)._replace(num_steps=top, last_step=jnp.full(3, top, jnp.int32))
    grad = jaxaccum.IndexedSlices(jnp.array([1]), jnp.ones((1, 1)), (3, 1))
    updates, state = tx.update(grad, state, table)
    assert state.num_steps == top
    assert state.last_step.tolist() == 3 * [top]
    np.testing.assert_allclose(updates.values, [[-0.1]], rtol=1e-6)
