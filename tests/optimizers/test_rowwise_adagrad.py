"""Row-wise Adagrad against its formula in NumPy; stochastic rounding against its expectation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum
from jaxaccum import IndexedSlices

ROWS, WIDTH = 9, 4


def test_it_is_the_formula_of_fbgemm():
    rate, eps = 0.5, 1e-3
    tx = jaxaccum.lazy_rows(jaxaccum.rowwise_adagrad(rate, initial_accumulator_value=0.25, eps=eps))
    rng = np.random.default_rng(0)
    table = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    params = {"bias": jnp.ones(2), "table": jnp.asarray(table)}
    state, update = tx.init(params), jax.jit(tx.update)
    sums, bias, bias_sums = np.full(ROWS, 0.25), np.ones(2), np.full(2, 0.25)
    for _ in range(3):
        rows, values = rng.integers(0, ROWS + 1, 6), rng.normal(size=(6, WIDTH))
        grads = {
            "bias": jnp.array([1.0, -2.0]),
            "table": IndexedSlices(
                jnp.asarray(rows, jnp.int32), jnp.asarray(values, jnp.float32), (ROWS, WIDTH)
            ),
        }
        updates, state = update(grads, state, params)
        params = jaxaccum.apply_updates(params, updates)
        for row in set(rows.tolist()) - {ROWS}:
            grad = values[rows == row].sum(axis=0)
            sums[row] += (grad**2).mean()
            table[row] -= rate * grad / (np.sqrt(sums[row]) + eps)
        bias_sums += np.array([1.0, 4.0])
        bias -= rate * np.array([1.0, -2.0]) / (np.sqrt(bias_sums) + eps)
    np.testing.assert_allclose(params["table"], table, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(params["bias"], bias, rtol=1e-5)
    np.testing.assert_allclose(state[0].sum_of_squares["table"], sums, rtol=1e-5)


def test_a_schedule():
    tx = jaxaccum.rowwise_adagrad(lambda count: jnp.where(count == 0, 1.0, 0.5), eps=0.0)
    state = tx.init(jnp.zeros((1, 2)))
    steps = []
    for _ in range(2):
        updates, state = tx.update(jnp.ones((1, 2)), state)
        steps.append(updates[0, 0])
    np.testing.assert_allclose(steps, [-1, -0.5 / np.sqrt(2)], rtol=1e-6)


def rounding(seed=0):
    """Steps of exactly -2**-11 from one: three sixteenths of the gap below it."""
    tx = jaxaccum.rowwise_adagrad(2.0**-11, eps=0.0, stochastic_rounding=True, seed=seed)
    params = {"half": jnp.ones((128, 64), jnp.bfloat16), "full": jnp.ones((2, 3))}
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return tx, params, updates, state


def test_stochastic_rounding_hits_a_neighbour_with_the_right_odds():
    _, params, updates, _ = rounding()
    new = jaxaccum.apply_updates(params, updates)
    below, odds = 1 - 2.0**-8, 2.0**-11 / 2.0**-8
    values = np.asarray(new["half"].astype(jnp.float32))
    assert set(np.unique(values)) == {below, 1.0}
    deviation = np.sqrt(odds * (1 - odds) / values.size)
    assert abs((values == below).mean() - odds) < 4 * deviation
    assert np.all(np.abs((values == below).mean(axis=0) - odds) < 6 * deviation * np.sqrt(64))
    np.testing.assert_array_equal(new["full"], np.full((2, 3), np.float32(1 - 2.0**-11)))


def test_random_bits_differ_by_step_leaf_and_seed_and_can_be_had_again():
    tx, params, first, state = rounding()
    again = rounding()[2]
    np.testing.assert_array_equal(first["half"], again["half"])
    other_seed = rounding(seed=1)[2]
    second, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    for other in (other_seed["half"], second["half"]):
        assert np.any((np.asarray(first["half"]) == 0) != (np.asarray(other) == 0))
    pair = {"a": params["half"], "b": params["half"]}
    updates, _ = tx.update(pair, tx.init(pair), pair)
    assert np.any(np.asarray(updates["a"]) != np.asarray(updates["b"]))


def test_a_bfloat16_table_learns_what_rounding_to_nearest_would_lose():
    def train(stochastic_rounding):
        tx = jaxaccum.lazy_rows(
            jaxaccum.rowwise_adagrad(
                0.01, initial_accumulator_value=100.0, stochastic_rounding=stochastic_rounding
            )
        )
        table = jnp.ones((ROWS, WIDTH), jnp.bfloat16)
        grad = IndexedSlices(jnp.array([2, 5]), jnp.ones((2, WIDTH), jnp.bfloat16), table.shape)

        def step(carry, _):
            updates, state = tx.update(grad, carry[1], carry[0])
            return (jaxaccum.apply_updates(carry[0], updates), state), None

        (table, _), _ = jax.lax.scan(step, (table, tx.init(table)), length=300)
        return np.asarray(table.astype(jnp.float32))

    exact = 1 - sum(0.01 / np.sqrt(100 + k) for k in range(1, 301))
    nearest, stochastic = train(stochastic_rounding=False), train(stochastic_rounding=True)
    np.testing.assert_array_equal(nearest, np.ones((ROWS, WIDTH)))
    np.testing.assert_array_equal(np.delete(stochastic, [2, 5], axis=0), 1)
    assert abs(stochastic[[2, 5]].mean() - exact) < 0.02


def test_infinities_stay():
    tx = jaxaccum.rowwise_adagrad(1.0, stochastic_rounding=True)
    params = jnp.array([[jnp.inf], [-jnp.inf], [jnp.nan]], jnp.bfloat16)
    updates, _ = tx.update(jnp.ones_like(params), tx.init(params), params)
    new = jaxaccum.apply_updates(params, updates).astype(jnp.float32)
    np.testing.assert_array_equal(new.ravel(), [np.inf, -np.inf, np.nan])


def test_stochastic_rounding_needs_params():
    tx = jaxaccum.rowwise_adagrad(1.0, stochastic_rounding=True)
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
