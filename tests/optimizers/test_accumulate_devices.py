"""``accumulate`` with ``axis_name``: eight devices take the steps that one device would take."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import in_breadth
from devices import MESHES, WAYS, on_devices
from jax.sharding import PartitionSpec

import jaxaccum
from jaxaccum import IndexedSlices

ROWS, LENGTH = 24, 7
TABLES = {"bias": False, "table": True}


@pytest.fixture(autouse=True)
def _optax_promotes():
    # optax multiplies ints with floats, which the strict setting of the other tests forbids.
    with jax.numpy_dtype_promotion("standard"):
        yield


def params():
    return {"bias": jnp.zeros(2), "table": jnp.zeros((ROWS, 2))}


def train(tx, ids, values, ages=None):
    """Takes gradients ``[LENGTH, n]`` in a scan; returns the params, the state and all steps."""
    ages = jnp.zeros(LENGTH, jnp.int32) if ages is None else ages

    def update(carry, grad):
        ids, values, age = grad
        slices = IndexedSlices(ids, jnp.stack([values, -values], axis=1), (ROWS, 2))
        grads = {"bias": values[:2], "table": slices}
        local_step = carry[1].global_step - age
        updates, state = tx.update(grads, carry[1], carry[0], local_step=local_step)
        return (jaxaccum.apply_updates(carry[0], updates), state), (
            state.global_step,
            state.num_early,
        )

    start = params(), tx.init(params())
    (tables, state), steps = jax.lax.scan(update, start, (ids, values, ages))
    return tables, state, steps


def draw(seed, num_slices=3):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, ROWS + 1, (8, LENGTH, num_slices)).astype(np.int32)
    return ids, rng.integers(-8, 9, (8, LENGTH, num_slices)).astype(np.float32)


def expected(ids, values, capacity, num_required, ages=None, per_row=False):
    """All devices' gradients by rounds, with SGD of the mean: params, steps and early steps.

    A gradient of age ``s`` weighs ``2**-s``.
    """
    weights = np.ones(ids.shape[:2]) if ages is None else 2.0**-ages
    bias, table = np.zeros(2), np.zeros((ROWS + 1, 2))
    held, steps = [[] for _ in range(8)], []
    step = early = 0

    def take():
        nonlocal step
        total = sum(weight for *_, weight in itertools.chain(*held))
        touched = np.zeros((ROWS + 1, 1))
        for ids, _, weight in itertools.chain(*held):
            touched[np.unique(ids)] += weight
        count = np.where(touched > 0, touched, 1) if per_row else np.full((ROWS + 1, 1), total)
        for ids, values, weight in itertools.chain(*held):
            bias[:] -= weight * values[:2] / total
            rows = weight * np.stack([values, -values], axis=1)
            np.subtract.at(table, ids, rows / count[ids])
        step += 1
        for one in held:
            one.clear()

    for t in range(LENGTH):
        late = []
        for d in range(8):
            rows = {i for grad in held[d] for i in grad[0]} | set(ids[d, t])
            fits = len(rows - {ROWS}) <= capacity
            grad = ids[d, t], values[d, t], weights[d, t]
            (held[d] if fits else late).append(grad if fits else d)
        if late:
            take()
            early += 1
            for d in late:
                held[d].append((ids[d, t], values[d, t], weights[d, t]))
        elif sum(map(len, held)) >= num_required:
            take()
        steps.append((step, early))
    return {"bias": bias, "table": table[:ROWS]}, steps


@pytest.mark.parametrize("way", in_breadth(WAYS, {"shard_map"}))
@pytest.mark.parametrize("capacity", [5, 21])
def test_devices_step_together(way, capacity):
    ids, values = draw(1)

    def program(axis_name, ids, values):
        tx = jaxaccum.accumulate(
            optax.sgd(1.0), 20, tables=TABLES, capacity=capacity, axis_name=axis_name
        )
        tables, state, steps = train(tx, ids, values)
        return tables, steps, state.inner_state

    tables, steps, _ = on_devices(program, way)(ids, values)
    wanted, wanted_steps = expected(ids, values, capacity, 20)
    assert (wanted_steps[-1][1] > 0) == (capacity == 5)
    for d in range(8):
        assert np.stack([s[d] for s in steps], axis=1).tolist() == [list(s) for s in wanted_steps]
        for name, table in wanted.items():
            np.testing.assert_allclose(tables[name][d], table, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(tables[name][d], tables[name][0])


@pytest.mark.parametrize(
    "reduction", in_breadth(["mean_per_gradient", "mean_per_row"], {"mean_per_gradient"})
)
@pytest.mark.parametrize("way", in_breadth(WAYS, {"pmap"}))
def test_devices_weigh_what_is_stale(way, reduction):
    ids, values = draw(1)
    ages = np.random.default_rng(5).integers(0, 3, (8, LENGTH)).astype(np.int32)

    def program(axis_name, ids, values, ages):
        tx = jaxaccum.accumulate(
            optax.sgd(1.0), 20, tables=TABLES, capacity=5, axis_name=axis_name,
            reduction=reduction, max_staleness=3, staleness_weight=lambda s: 2.0**-s,
        )  # fmt: skip
        tables, state, steps = train(tx, ids, values, ages)
        return tables, steps, state.staleness_counts

    tables, steps, counts = on_devices(program, way)(ids, values, ages)
    wanted, wanted_steps = expected(ids, values, 5, 20, ages, reduction == "mean_per_row")
    assert np.stack([s[0] for s in steps], axis=1).tolist() == [list(s) for s in wanted_steps]
    for d in range(8):
        assert counts[d].tolist() == [*np.bincount(ages[d], minlength=4), 0]
        for name, table in wanted.items():
            np.testing.assert_allclose(tables[name][d], table, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(tables[name][d], tables[name][0])


def test_params_and_inner_state_leave_as_replicated_and_adam_counts_steps():
    ids, values = draw(2)
    tx = jaxaccum.accumulate(optax.adam(0.1), 16, tables=TABLES, capacity=21, axis_name="data")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=MESHES["data"],
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    def run(ids, values):
        tables, state, _ = train(tx, ids[0], values[0])
        return tables, state.inner_state, state.global_step

    tables, inner_state, step = run(ids, values)
    assert step == inner_state[0].count == 3  # two rounds of eight each, and one over
    assert jnp.any(tables["table"] != 0)


def test_an_axis_that_is_not_there():
    tx = jaxaccum.accumulate(optax.sgd(0.1), 2, tables=True, capacity=2, axis_name="nowhere")
    grad = IndexedSlices(jnp.zeros(1, jnp.int32), jnp.ones(1), (4,))
    with pytest.raises(ValueError, match=r"axis_name must be an axis .* got 'nowhere'"):
        jax.eval_shape(tx.update, grad, tx.init(jnp.zeros(4)), jnp.zeros(4))


@pytest.mark.parametrize(
    "rows", in_breadth([ROWS, 1_000], {1_000})
)  # exchanged as a dense table, and as rows
def test_the_state_goes_in_and_out_of_shard_map_donated(rows):
    ids, values = draw(1)
    tx = jaxaccum.accumulate(optax.sgd(1.0), 20, tables=TABLES, capacity=5, axis_name="data")
    tables = {"bias": jnp.zeros(2), "table": jnp.zeros((rows, 2))}
    state = tx.init(tables).map_own(lambda leaf: jnp.stack([leaf] * 8))
    specs = jax.tree.map(lambda _: PartitionSpec(), state)
    specs = specs.map_own(lambda _: PartitionSpec("data"))
    batch = PartitionSpec("data")

    def step(tables, state, ids, values):
        state = state.map_own(lambda leaf: leaf[0])
        ids = jnp.where(ids[0] == ROWS, rows, ids[0])
        slices = IndexedSlices(ids, jnp.stack([values[0], -values[0]], axis=1), (rows, 2))
        updates, state = tx.update({"bias": values[0, :2], "table": slices}, state, tables)
        return jaxaccum.apply_updates(tables, updates), state.map_own(lambda leaf: leaf[None])

    step = jax.shard_map(
        step,
        mesh=MESHES["data"],
        in_specs=(PartitionSpec(), specs, batch, batch),
        out_specs=(PartitionSpec(), specs),
    )
    step = jax.jit(step, donate_argnums=(0, 1))
    for t in range(LENGTH):
        tables, state = step(tables, state, ids[:, t], values[:, t])
    wanted, wanted_steps = expected(ids, values, 5, 20)
    assert (state.global_step, state.num_early) == wanted_steps[-1]
    assert np.sum(state.verdict_counts, axis=0).tolist() == [8 * LENGTH, 0, 0, 0, 0]
    for name, table in wanted.items():
        np.testing.assert_allclose(tables[name][:ROWS], table, rtol=1e-5, atol=1e-5)
