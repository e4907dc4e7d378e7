"""From a loss to updated tables inside `jax.shard_map`, three ways, against one device."""

import functools

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import NUM_DEVICES
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum import Verdict

pytestmark = pytest.mark.usefixtures("as_it_comes")
ROWS, WIDTH, BATCH, STEPS = 10 * NUM_DEVICES, 4, 6, 3
MESHES = pytest.mark.parametrize(
    "mesh",
    [
        devices.MESHES["data"],
        pytest.param(devices.MESHES[("host", "core")], marks=pytest.mark.full),
        pytest.param(devices.EXPLICIT, marks=pytest.mark.full),
    ],
    ids=["one_axis", "two_axes", "explicit"],
)
DTYPES = pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.full)], ids=["f32", "bf16"]
)


def start(dtype):
    rng = np.random.default_rng(0)
    return {
        "table": jnp.asarray(rng.standard_normal((ROWS, WIDTH)), dtype),
        "w": jnp.asarray(rng.standard_normal(WIDTH), jnp.float32),
    }


def batches():
    rng = np.random.default_rng(1)
    return rng.integers(0, ROWS, (STEPS, NUM_DEVICES * BATCH)).astype(np.int32)


def row_loss(rows, w):
    return jnp.mean(jnp.square(jnp.tanh(rows.astype(jnp.float32)) @ w - 1.0))


def loss(params, ids):
    return row_loss(params["table"][ids], params["w"])


@functools.cache
def on_one_device(dtype, rate=0.5):
    """Dense gradients of whole batches, plain Adagrad."""
    params, tx = start(dtype), adagrad(rate)
    state = tx.init(params)
    for ids in batches():
        grads = jax.grad(loss)(params, ids)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def adagrad(rate=0.5):
    # Its step is zero where the gradient is: the lazy one is the dense one.
    return optax.adagrad(rate, initial_accumulator_value=1.0, eps=0.0)


def assert_close(params, expected, dtype):
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
    for name, leaf in expected.items():
        np.testing.assert_allclose(
            np.asarray(params[name], np.float32),
            np.asarray(leaf, np.float32),
            rtol=tolerance,
            atol=tolerance,
        )


TABLES = {"table": True, "w": False}


def placed(mesh, tree, *spec):
    """On explicit axes `jax.shard_map` takes its arguments only as they are to lie."""
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def accumulated(mesh, mean_over_devices, tx):
    """`accumulate` with everything alike on all devices."""
    axes = mesh.axis_names

    def device_loss(params, ids):
        value = loss(params, ids)
        return jax.lax.pmean(value, axes) if mean_over_devices else value

    grad_fn = jaxaccum.value_and_sparse_grad(device_loss, tables=TABLES)

    def step(params, state, ids):
        _, grads = grad_fn(params, ids)
        updates, state = tx.update(grads, state, params)
        return jaxaccum.apply_updates(params, updates), state

    specs = {"in_specs": (P(), P(), P(axes)), "out_specs": (P(), P())}
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs))


@MESHES
@DTYPES
def test_accumulate_with_the_mean_of_the_loss(mesh, dtype):
    capacity = NUM_DEVICES * BATCH
    tx = jaxaccum.accumulate(adagrad(), 1, tables=TABLES, capacity=capacity)
    params, step = placed(mesh, start(dtype)), accumulated(mesh, True, tx)
    state = placed(mesh, tx.init(params))
    for ids in batches():
        params, state = step(params, state, placed(mesh, ids, mesh.axis_names))
        assert state.verdict == Verdict.ACCEPTED
    assert_close(params, on_one_device(dtype), dtype)


def test_without_the_mean_the_gradient_is_the_number_of_devices_too_large():
    tx = jaxaccum.accumulate(optax.sgd(0.5), 1, tables=TABLES, capacity=NUM_DEVICES * BATCH)
    params, ids, mesh = start(jnp.float32), batches()[0], devices.MESHES["data"]
    moves = []
    for mean_over_devices in (True, False):
        moved, _ = accumulated(mesh, mean_over_devices, tx)(params, tx.init(params), ids)
        moves.append(jax.tree.map(lambda new, old: np.asarray(new - old), moved, params))
    assert np.abs(moves[0]["table"]).max() > 1e-3
    for name in TABLES:
        np.testing.assert_allclose(moves[1][name], 8 * moves[0][name], rtol=1e-4, atol=1e-6)


@MESHES
@DTYPES
def test_each_device_accumulates_its_own_and_all_take_adds_up(mesh, dtype):
    axes, tx = mesh.axis_names, jaxaccum.lazy_rows(adagrad())
    grad_fn = jaxaccum.value_and_sparse_grad(loss, tables=TABLES)

    def step(params, optimizer, pending, ids):
        # Own copies: the gradient of what is known to be alike is summed over the devices at once.
        own = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying"), params)
        _, grads = grad_fn(own, ids)
        pending, applied = jaxaccum.apply(pending, grads["table"])
        pending, table, _, merged = jaxaccum.all_take(pending, axes)
        grads = {"table": table, "w": jax.lax.pmean(grads["w"], axes)}
        updates, optimizer = tx.update(grads, optimizer, params)
        params = jaxaccum.apply_updates(params, updates)
        verdict = jnp.maximum(jax.lax.pmax(applied, axes), merged)
        return params, optimizer, pending, verdict

    step = jax.shard_map(
        jaxaccum.drop_device_axis(step),
        mesh=mesh,
        in_specs=(P(), P(), P(axes), P(axes)),
        out_specs=(P(), P(), P(axes), P()),
    )
    state = jaxaccum.init(
        (ROWS, WIDTH), dtype, capacity=NUM_DEVICES * BATCH, reduction="mean_per_gradient"
    )
    params, pending = placed(mesh, start(dtype)), jaxaccum.replicate(state, mesh, axes)
    optimizer = placed(mesh, tx.init(params))
    step = jax.jit(step)
    for ids in batches():
        ids = placed(mesh, ids, axes)
        params, optimizer, pending, verdict = step(params, optimizer, pending, ids)
        assert verdict == Verdict.ACCEPTED
    assert_close(params, on_one_device(dtype), dtype)


def through_the_lookup(mesh, tx, params, bucket=None):
    """The gradient of a shard by its own row numbers comes from `all_lookup` itself."""
    axes = mesh.axis_names

    def device_loss(params, ids):
        rows, verdict = jaxaccum.all_lookup(params["table"], ids, axes, bucket=bucket)
        value = jax.lax.pmean(row_loss(rows, params["w"]), axes)
        return value, jax.lax.pmax(verdict, axes)

    grad_fn = jaxaccum.value_and_sparse_grad(device_loss, has_aux=True, tables=TABLES)

    def step(params, state, ids):
        (value, verdict), grads = grad_fn(params, ids)
        updates, state = tx.update(grads, state, params)
        return jaxaccum.apply_updates(params, updates), state, value, verdict

    state = tx.init(params)
    selection = {"tables": TABLES, "params": params}
    specs = jaxaccum.shard_specs((params, state), axes, **selection)
    step = jax.shard_map(step, mesh=mesh, in_specs=(*specs, P(axes)), out_specs=(*specs, P(), P()))
    return jax.jit(step), *jaxaccum.shard_rows((params, state), mesh, axes, **selection)


@MESHES
@DTYPES
def test_a_sharded_table_is_trained_through_its_lookup(mesh, dtype):
    step, params, state = through_the_lookup(mesh, jaxaccum.lazy_rows(adagrad()), start(dtype))
    for ids in batches():
        params, state, _, verdict = step(params, state, placed(mesh, ids, mesh.axis_names))
        assert verdict == Verdict.ACCEPTED
    assert params["table"].addressable_shards[0].data.shape == (10, WIDTH)
    assert_close(params, on_one_device(dtype), dtype)


def test_a_lookup_that_overflows_shows_in_the_loss_and_in_the_verdict():
    tx = jaxaccum.lazy_rows(adagrad())
    step, params, state = through_the_lookup(
        devices.MESHES["data"], tx, start(jnp.float32), bucket=2
    )
    fitting = np.tile(np.array([1, 1, 2, 2, 1, 11], np.int32), NUM_DEVICES)
    crowded = fitting.copy()
    crowded[:3] = [1, 2, 3]
    for ids, expected in ((fitting, Verdict.ACCEPTED), (crowded, Verdict.OVERFLOW)):
        _, _, value, verdict = step(params, state, ids)
        assert verdict == expected
        assert bool(jnp.isnan(value)) == (expected == Verdict.OVERFLOW)
