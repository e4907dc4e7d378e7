"""``grow_tables``: a run that is given rows and capacity goes on as if it had always had them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import in_breadth

import jaxaccum
from jaxaccum import IndexedSlices

OLD, NEW = {"items": 12, "users": 9}, {"items": 15, "users": 9}
SLICES, LENGTH, GROWN = 5, 14, 6


@pytest.fixture(autouse=True)
def _optax_promotes():
    # optax multiplies ints with floats, which the strict setting of the other tests forbids.
    with jax.numpy_dtype_promotion("standard"):
        yield


def start():
    rng = np.random.default_rng(0)
    tables = {name: rng.normal(size=(rows, 2)).astype(np.float32) for name, rows in NEW.items()}
    return {"bias": np.ones(2, np.float32), **tables}


def draw(rows, t):
    """A gradient of the rows there were before, until the run has grown."""
    rng = np.random.default_rng(t)
    grads = {"bias": jnp.asarray(rng.normal(size=2), jnp.float32)}
    for name in OLD:
        last = OLD[name] if t < GROWN else NEW[name]
        ids = rng.integers(0, last + 1, SLICES)
        ids = jnp.asarray(np.where(ids == last, rows[name], ids), jnp.int32)
        values = jnp.asarray(rng.normal(size=(SLICES, 2)), jnp.float32)
        grads[name] = IndexedSlices(ids, values, (rows[name], 2))
    return grads


def make(kind, capacity):
    adam = optax.adam(optax.linear_schedule(0.1, 0.01, 20))
    if kind == "lazy":
        return jaxaccum.lazy_rows(adam, catch_up=True)
    tables = {"bias": False, "items": True, "users": True}
    options = (
        {"max_staleness": 2, "staleness_weight": lambda s: 0.5**s} if kind == "weighted" else {}
    )
    inner = jaxaccum.lazy_rows(adam, catch_up=kind == "catch_up")
    return optax.chain(
        jaxaccum.lazy_rows(optax.clip(2.0)),
        jaxaccum.accumulate(inner, 4, tables=tables, capacity=capacity, **options),
    )


def run(tx, params, state, rows, steps):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jaxaccum.apply_updates(params, updates), state

    for t in steps:
        params, state = step(params, state, draw(rows, t))
    return params, state


@pytest.mark.parametrize("kind", in_breadth(["catch_up", "weighted", "lazy"], {"catch_up"}))
def test_it_goes_on_as_if_the_rows_had_always_been_there(kind):
    """In the middle of a step: two gradients are held when the tables grow."""
    whole = jax.tree.map(jnp.asarray, start())
    larger = make(kind, 20)
    expected = run(larger, whole, larger.init(whole), NEW, range(LENGTH))

    params = {name: whole[name][: OLD.get(name)] for name in whole}
    tx = make(kind, 17)
    params, state = run(tx, params, tx.init(params), OLD, range(GROWN))
    added = {"bias": None, "items": whole["items"][12:], "users": None}
    params, state = jaxaccum.grow_tables(larger, params, state, added)
    actual = run(larger, params, state, NEW, range(GROWN, LENGTH))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_states_of_many_devices_grow():
    tx = functools.partial(jaxaccum.accumulate, optax.adam(0.1), 4, tables=True, axis_name="data")
    table = jnp.zeros((6, 1))
    state = tx(capacity=2).init(table)
    state = state.map_own(lambda leaf: jnp.stack([leaf] * 3))
    _, grown = jaxaccum.grow_tables(tx(capacity=5), table, state, jnp.ones((2, 1)))
    fresh = tx(capacity=5).init(jnp.zeros((8, 1))).map_own(lambda leaf: jnp.stack([leaf] * 3))
    jax.tree.map(np.testing.assert_array_equal, grown, fresh)


def test_wrong_calls_say_what_is_wrong():
    tx = functools.partial(jaxaccum.accumulate, optax.adam(0.1), 4, tables=True)
    table = jnp.zeros((6, 1))
    state = tx(capacity=3).init(table)
    with pytest.raises(ValueError, match=r"table 0 .* at least the present \(6, 3\), got \(6, 2\)"):
        jaxaccum.grow_tables(tx(capacity=2), table, state)
    with pytest.raises(ValueError, match=r"rows must be rows of .* \(6, 1\), got shape \(1, 2\)"):
        jaxaccum.grow_tables(tx(capacity=3), table, state, jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="rows must be a tree like the params"):
        jaxaccum.grow_tables(tx(capacity=3), {"a": table}, tx(capacity=3).init({"a": table}), {})
    with pytest.raises(ValueError, match="state must be of a transform of the structure of tx"):
        jaxaccum.grow_tables(jaxaccum.lazy_rows(optax.adam(0.1)), table, state)
    with pytest.raises(ValueError, match="tx must count as the transform so far"):
        jaxaccum.grow_tables(tx(capacity=3, max_staleness=2), table, state)
    adam = optax.adam(0.1)
    state = adam.init(jnp.zeros((7, 1)))
    with pytest.raises(ValueError, match=r"state\[0\]\.mu of shape \(7, 1\) .* to \(6, 1\)"):
        jaxaccum.grow_tables(adam, table, state)


def test_the_capacity_that_would_have_done_does():
    """Of ids drawn alike: a run grown to it takes no step early again."""
    rng = np.random.default_rng(3)
    shape, tables = (2_000, 1), {"bias": False, "table": True}

    def advance(tx, params, state, steps):
        update = jax.jit(tx.update)
        for _ in range(steps):
            ids = jnp.asarray(rng.zipf(1.2, 64) % 2_000, jnp.int32)
            grads = {"bias": jnp.ones(1), "table": IndexedSlices(ids, jnp.ones((64, 1)), shape)}
            _, state = update(grads, state, params)
        return state

    make = functools.partial(jaxaccum.accumulate, optax.sgd(0.1), 8, tables=tables)
    params = {"bias": jnp.zeros(1), "table": jnp.zeros(shape)}
    tx = make(capacity=100)
    state = advance(tx, params, tx.init(params), 40)
    assert state.num_early > 10
    capacity = state.needed_capacity()
    assert capacity["bias"] is None
    assert 100 < capacity["table"] <= 8 * 64
    tx = make(capacity=capacity)
    params, grown = jaxaccum.grow_tables(tx, params, state)
    after = advance(tx, params, grown, 200)
    assert after.num_early == state.num_early
    assert tx.init(params).needed_capacity() == capacity
