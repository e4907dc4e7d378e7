"""``accumulate`` where a gradient does not fit: steps come early, and no mass is lost."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import in_breadth
from devices import on_devices
from micro_batch_model import OVERFLOW, MicroBatchModel

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


def stacked(train):
    """What eight devices would return, one after the other."""
    results = [jax.jit(train)(jnp.float32(x)) for x in range(8)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


def assert_same(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), actual, expected)


def num_required(step):
    return 1 + step % 5


def draw(seed):
    """Gradients of small integers, ``{table: (ids, values)}``, each ``[LENGTH, SLICES]``; steps."""
    rng = np.random.default_rng(seed)
    grads = {}
    for name, rows in ROWS.items():
        ids = rng.integers(0, rows + 1, (LENGTH, SLICES))
        ids[rng.random((LENGTH, SLICES)) < 0.01] = rows + 1  # no row
        values = rng.integers(-8, 9, (LENGTH, SLICES)).astype(np.float32)
        values[rng.random((LENGTH, SLICES)) < 0.02] = np.nan
        values[(ids == rows) & (rng.random((LENGTH, SLICES)) < 0.2)] = np.inf
        grads[name] = ids, values
    return grads, rng.integers(-2, 2, LENGTH) * (rng.random(LENGTH) < 0.3)


def transform(capacity, on_overflow="step", max_staleness=0):
    return jaxaccum.accumulate(
        optax.sgd(1.0),
        num_required,
        tables=True,
        capacity=capacity,
        reduction="sum",
        on_overflow=on_overflow,
        skip=optax.skip_not_finite,
        max_staleness=max_staleness,
        staleness_weight=(lambda s: 2.0**-s) if max_staleness else None,
    )


@functools.cache
def program(capacity, on_overflow, max_staleness):
    """All of the gradients in one scan; returns the params and the state after each."""
    tx = transform(capacity, on_overflow, max_staleness)

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
@pytest.mark.parametrize(
    "options",
    in_breadth(
        [("step", 1), ("refuse", 0), ("step", 0), ("refuse", 1)], {("step", 1), ("refuse", 0)}
    ),
)
@pytest.mark.parametrize("capacity", in_breadth([4, 5, 8, 13], {5}))
def test_it_keeps_its_rules_over_random_gradients(capacity, options, seed):
    on_overflow, max_staleness = options
    grads, lags = draw(seed)
    integers = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if x.dtype == int else None), grads)
    params, states = program(capacity, on_overflow, max_staleness)(
        integers, jnp.asarray(lags, jnp.int32)
    )
    params, states = jax.tree.map(np.asarray, (params, states))
    model = MicroBatchModel(ROWS, capacity, num_required, on_overflow, max_staleness)
    for t in range(LENGTH):
        grad = {name: (ids[t], values[t]) for name, (ids, values) in grads.items()}
        assert states["verdict"][t] == model.add(grad, model.step + lags[t])
        assert states["num_accumulated"][t] == len(model.held)
        assert (states["global_step"][t], states["num_early"][t]) == (model.step, model.num_early)
        assert states["peak_rows"][t].tolist() == list(model.peak.values())
        for name, table in model.params.items():
            np.testing.assert_array_equal(params[name][t], table)
    assert states["verdict_counts"][-1].tolist() == model.verdicts
    assert all(count > 0 for verdict, count in enumerate(model.verdicts) if verdict != OVERFLOW)
    expected = model.ages if max_staleness else None
    assert jax.tree.map(lambda counts: counts[-1].tolist(), states["staleness_counts"]) == expected
    assert (model.num_early > 0) == (on_overflow == "step")


@pytest.mark.parametrize("jit", in_breadth([False, True], {True}))
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


@pytest.mark.parametrize("answer", [bool, lambda is_large: (is_large, {"is_large": is_large})])
def test_skip_sees_values_steps_and_params(answer):
    """Padding is zero, whatever it held; indices are none of the predicate's business."""
    seen = []

    def skip(updates, global_step, params):
        seen.append((jax.tree.map(np.shape, updates), int(global_step), params["bias"].tolist()))
        total = sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(updates))
        return answer(total > 5)

    tables = {"bias": False, "table": True}
    tx = jaxaccum.accumulate(optax.sgd(1.0), 2, tables=tables, capacity=2, skip=skip)
    params = {"bias": jnp.ones(1), "table": jnp.zeros((900, 1))}
    state = tx.init(params)
    for value in (2.0, 3.0, 1.0):
        values = jnp.array([[value], [jnp.inf]])
        table = IndexedSlices(jnp.array([899, 900]), values, (900, 1))
        updates, state = tx.update({"bias": jnp.array([value]), "table": table}, state, params)
    assert seen == 3 * [({"bias": (1,), "table": (2, 1)}, 0, [1])]
    assert state.verdict_counts.tolist() == [2, 0, 0, 0, 1]
    assert updates["bias"] == updates["table"].to_dense()[899] == -1.5


@pytest.mark.parametrize("reduction", ["mean_per_gradient", "mean_per_row", "sum"])
def test_means_are_of_weighted_gradients(reduction):
    weigh = lambda s: 1 / jnp.sqrt(1.0 + s)  # noqa: E731
    tables = {"bias": False, "table": True}
    tx = jaxaccum.accumulate(
        optax.sgd(1.0), 3, tables=tables, capacity=3, reduction=reduction,
        max_staleness=3, staleness_weight=weigh,
    )  # fmt: skip
    params = {"bias": jnp.zeros(1), "table": jnp.zeros((5, 2))}
    update = jax.jit(tx.update)
    state = dataclasses.replace(tx.init(params), global_step=jnp.int32(9))
    for local_step, row, value in (
        (9, 1, 1.0),
        (6, 1, 2.0),
        (5, 4, 7.0),
        (-(2**31), 4, 7.0),
        (8, 2, 4.0),
    ):
        table = IndexedSlices(jnp.array([row]), jnp.full((1, 2), value), (5, 2))
        grad = {"bias": jnp.array([value]), "table": table}
        updates, state = update(grad, state, params, local_step=local_step)
    weights = np.array([1, 1 / 2, 1 / np.sqrt(2)])
    sums = np.array([[1, 0], [1, 0], [0, 4 / np.sqrt(2)]]).sum(axis=0)
    per_row = {"mean_per_row": [1.5, weights[2]], "sum": [1, 1]}.get(reduction, 2 * [weights.sum()])
    total = 1 if reduction == "sum" else weights.sum()
    np.testing.assert_allclose(-updates["bias"], sums.sum() / total, rtol=1e-6)
    np.testing.assert_allclose(-updates["table"].values[:2, 1], sums / per_row, rtol=1e-6)
    assert state.staleness_counts.tolist() == [1, 1, 0, 1, 2]
    assert state.verdict_counts.tolist() == [3, 2, 0, 0, 0]
    assert (state.total_weight, state.global_step) == (0, 10)


@pytest.mark.parametrize("on_overflow", in_breadth(["step", "refuse"], {"step"}))
def test_under_shard_map_each_device_keeps_its_own(on_overflow):
    """What varies over the mesh, and what does not yet, may meet in branches and loops."""
    options = {"tables": {"bias": False, "table": True}, "on_overflow": on_overflow}
    tx = jaxaccum.accumulate(optax.adam(0.1), 3, capacity=3, **options)
    params = {"bias": jnp.zeros(2), "table": jnp.zeros((8, 2))}

    def train(x):
        carry = params, tx.init(params)
        for k in range(3):
            ids = jnp.array([0, 1]) + k * (x.astype(jnp.int32) % 2)
            table = IndexedSlices(ids, jnp.ones((2, 2)) * (x + k), (8, 2))
            updates, state = tx.update(
                {"bias": jnp.ones(2) * x, "table": table}, carry[1], carry[0]
            )
            carry = jaxaccum.apply_updates(carry[0], updates), state
        return carry[0], state.num_early, state.num_accumulated

    assert_same(on_devices(lambda _, x: train(x), "shard_map")(jnp.arange(8.0)), stacked(train))
