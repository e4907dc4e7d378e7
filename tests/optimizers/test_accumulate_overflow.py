"""``accumulate`` where a gradient does not fit: steps come early, and no mass is lost."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import in_breadth
from micro_batch_model import MicroBatchModel

import jaxaccum
from jaxaccum import IndexedSlices

ROWS = {"items": 13, "users": 29}
SLICES, LENGTH = 4, 200


@pytest.fixture(autouse=True)
def _optax_promotes():
    # optax multiplies ints with floats, which the strict setting of the other tests forbids.
    with jax.numpy_dtype_promotion("standard"):
        yield


def zeros():
    return {name: jnp.zeros(rows) for name, rows in ROWS.items()}


def num_required(step):
    return 1 + step % 5


def draw(seed):
    """Gradients of small integers, ``{table: (ids, values)}``, each ``[LENGTH, SLICES]``; steps."""
    rng = np.random.default_rng(seed)
    grads = {}
    for name, rows in ROWS.items():
        ids = rng.integers(0, rows + 1, (LENGTH, SLICES))
        ids[rng.random((LENGTH, SLICES)) < 0.01] = rows + 1  # no row
        grads[name] = ids, rng.integers(-8, 9, (LENGTH, SLICES)).astype(np.float32)
    return grads, rng.integers(-2, 2, LENGTH) * (rng.random(LENGTH) < 0.3)


def transform(capacity, on_overflow="step", reduction="sum"):
    return jaxaccum.accumulate(
        optax.sgd(1.0),
        num_required,
        tables=True,
        capacity=capacity,
        reduction=reduction,
        on_overflow=on_overflow,
    )


@functools.cache
def program(capacity, on_overflow):
    """All of the gradients in one scan; returns the params and the state after each."""
    tx = transform(capacity, on_overflow)

    def update(carry, step):
        params, state = carry
        grads, lag = step
        slices = {
            name: IndexedSlices(ids, values, (ROWS[name],)) for name, (ids, values) in grads.items()
        }
        updates, state = tx.update(slices, state, params, local_step=state.global_step + lag)
        params = jaxaccum.apply_updates(params, updates)
        return (params, state), (params, {**vars(state), "sums": None, "inner_state": None})

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, grads, lags):
        return jax.lax.scan(update, carry, (grads, lags))

    return lambda grads, lags: run((zeros(), tx.init(zeros())), grads, lags)[1]


@pytest.mark.parametrize("seed", in_breadth(range(64), {0, 1}))
@pytest.mark.parametrize("on_overflow", ["step", "refuse"])
@pytest.mark.parametrize("capacity", in_breadth([4, 5, 8, 13], {5}))
def test_it_keeps_its_rules_over_random_gradients(capacity, on_overflow, seed):
    grads, lags = draw(seed)
    integers = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if x.dtype == int else None), grads)
    params, states = program(capacity, on_overflow)(integers, jnp.asarray(lags, jnp.int32))
    params, states = jax.tree.map(np.asarray, (params, states))
    model = MicroBatchModel(ROWS, capacity, num_required, on_overflow)
    for t in range(LENGTH):
        grad = {name: (ids[t], values[t]) for name, (ids, values) in grads.items()}
        assert states["verdict"][t] == model.add(grad, model.step + lags[t])
        assert states["num_accumulated"][t] == len(model.held)
        assert (states["global_step"][t], states["num_early"][t]) == (model.step, model.num_early)
        assert states["peak_rows"][t].tolist() == list(model.peak.values())
        for name, table in model.params.items():
            np.testing.assert_array_equal(params[name][t], table)
    assert states["verdict_counts"][-1].tolist() == model.verdicts
    assert min(model.verdicts[0], model.verdicts[1], model.verdicts[3]) > 0
    assert (model.num_early > 0) == (on_overflow == "step")


@pytest.mark.parametrize("jit", [False, True])
def test_an_early_step_is_the_mean_of_what_was_held(jit):
    tx = jaxaccum.accumulate(optax.sgd(1.0), 3, tables={"bias": False, "table": True}, capacity=2)
    params = {"bias": jnp.zeros(1), "table": jnp.zeros((6, 1))}
    update, state = jax.jit(tx.update) if jit else tx.update, tx.init(params)
    steps = []
    for value, rows in ((1.0, [0, 1]), (3.0, [1, 0]), (5.0, [2, 1]), (7.0, [2, 6]), (9.0, [6, 6])):
        grad = IndexedSlices(jnp.array(rows), jnp.full((2, 1), value), (6, 1))
        updates, state = update({"bias": jnp.array([value]), "table": grad}, state, params)
        steps.append((-updates["bias"][0], *-updates["table"].to_dense().ravel()[:3]))
    nothing = (0, 0, 0, 0)
    expected = [nothing, nothing, (2, 2, 2, 0), nothing, (7, 0, 5 / 3, 4)]
    np.testing.assert_allclose(steps, expected, rtol=1e-6)
    assert (state.global_step, state.num_early, state.num_accumulated) == (2, 1, 0)
    assert state.peak_rows.tolist() == [3]


def test_the_loop_of_the_readme_goes_on_with_a_capacity_that_is_too_small():
    """Two of three gradients fit: every third call but the first takes a step."""
    tx = jaxaccum.accumulate(optax.sgd(1.0), 4, tables=True, capacity=10)
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(1_000))
    total = 0.0
    for t in range(20):
        grad = IndexedSlices(jnp.arange(5 * t, 5 * t + 5), jnp.ones(5), (1_000,))
        updates, state = update(grad, state)
        total -= jnp.sum(updates.values) * 2  # the mean of two
    assert (state.global_step, state.num_early, state.num_accumulated) == (9, 9, 2)
    assert total == 90


def test_a_single_gradient_must_fit():
    match = r"capacity 3 of params\['users'\] must be at least 4: one gradient has 4 slices of 29"
    tx = transform({"items": 13, "users": 3})
    grads = {name: IndexedSlices(jnp.zeros(4, int), jnp.zeros(4), (n,)) for name, n in ROWS.items()}
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(tx.update, grads, tx.init(zeros()), zeros())
    wide = {
        name: IndexedSlices(jnp.zeros(40, int), jnp.zeros(40), (n,)) for name, n in ROWS.items()
    }
    tx = transform(ROWS)  # no more rows than there are
    jax.eval_shape(tx.update, wide, tx.init(zeros()), zeros())


def test_a_donated_step_copies_no_table():
    rows, capacity, n = 50_021, 128, 64  # a number of rows that nothing else has
    tx = jaxaccum.accumulate(optax.adam(0.1), 4, tables=True, capacity=capacity)
    params = {"a": jnp.ones((rows, 2)), "b": jnp.ones((rows, 2))}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, indices):
        grads = {
            name: IndexedSlices(indices, jnp.take(table, indices, axis=0), (rows, 2))
            for name, table in params.items()
        }
        updates, state = tx.update(grads, state, params)
        return jaxaccum.apply_updates(params, updates), state

    compiled = step.lower(params, tx.init(params), jnp.arange(n, dtype=jnp.int32)).compile()
    assert f"[{rows}" in compiled.as_text()
    assert not re.findall(rf"= \S*\[{rows}\S* copy\(.*", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < rows
