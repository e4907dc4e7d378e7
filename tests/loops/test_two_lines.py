"""Each library's getting-started loop, with its gradient and its optimizer changed and no more."""

import functools
import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxaccum

ROWS, WIDTH = 11, 3
IDS = jnp.array([[4, 1, 4, 10], [7, 7, 2, 1], [0, 1, 0, 9]], jnp.int32)
TARGETS = jnp.linspace(-1.0, 1.0, 4, dtype=jnp.float32)
EVERY_ROW = jnp.stack([jnp.arange(ROWS), jnp.arange(ROWS)[::-1]]).astype(jnp.int32)


pytestmark = pytest.mark.usefixtures("as_it_comes")


def is_table(path, leaf):
    return "embed" in jax.tree_util.keystr(path)


sparse_grad = functools.partial(jaxaccum.value_and_sparse_grad, tables=is_table)


def square_error(predictions, targets):
    return jnp.mean((predictions - targets) ** 2)


def train_flax(value_and_grad, tx, batches, rows=ROWS):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(1)(nn.Embed(rows, WIDTH, name="embed")(ids))[:, 0]

    model = Model()
    variables = model.init(jax.random.key(0), IDS[0])
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, ids, targets):
        def loss_fn(params):
            return square_error(state.apply_fn({"params": params}, ids), targets)

        loss, grads = value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    hlo = train_step.lower(state, *batches[0]).compile().as_text()
    for batch in batches:
        state, loss = train_step(state, *batch)
    return state.params, loss, hlo


def train_nnx(value_and_grad, tx, batches, rows=ROWS):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(rows, WIDTH, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.linear = nnx.Linear(WIDTH, 1, rngs=rngs)

        def __call__(self, ids):
            return self.linear(self.dropout(self.embed(ids)))[:, 0]

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def train_step(model, optimizer, ids, targets):
        def loss_fn(model, ids, targets):
            return square_error(model(ids), targets)

        loss, grads = value_and_grad(loss_fn)(model, ids, targets)
        optimizer.update(model, grads)
        return loss

    hlo = train_step.lower(model, optimizer, *batches[0]).compile().as_text()
    for batch in batches:
        loss = train_step(model, optimizer, *batch)
    assert model.dropout.rngs.count[...] == len(batches)  # what a call changes is changed
    return nnx.as_pure(nnx.state(model, nnx.Param)), loss, hlo


def train_equinox(value_and_grad, tx, batches, rows=ROWS):
    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        mlp: eqx.nn.MLP  # holds functions and numbers beside its arrays

        def __call__(self, token):
            return self.mlp(self.embed(token))[0]

    keys = jax.random.split(jax.random.key(0))
    model = Model(
        eqx.nn.Embedding(rows, WIDTH, key=keys[0]), eqx.nn.MLP(WIDTH, 1, 4, 1, key=keys[1])
    )
    opt_state = tx.init(eqx.filter(model, eqx.is_array))

    def loss_fn(model, ids, targets):
        return square_error(jax.vmap(model)(ids), targets)

    @eqx.filter_jit(donate="all-except-first")
    def make_step(batch, model, opt_state):
        loss, grads = value_and_grad(loss_fn)(model, *batch)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), opt_state, loss

    hlo = make_step.lower(batches[0], model, opt_state).compile().compiled.as_text()
    for batch in batches:
        model, opt_state, loss = make_step(batch, model, opt_state)
    return eqx.filter(model, eqx.is_array), loss, hlo


def train_haiku(value_and_grad, tx, batches, rows=ROWS):
    def forward(ids):
        return hk.Linear(1)(hk.Embed(rows, WIDTH, name="embed")(ids))[:, 0]

    network = hk.without_apply_rng(hk.transform(forward))
    params = network.init(jax.random.key(0), IDS[0])

    def loss_fn(params, ids, targets):
        return square_error(network.apply(params, ids), targets)

    return train_plain(value_and_grad, tx, batches, rows, params, loss_fn)


def train_optax(value_and_grad, tx, batches, rows=ROWS):
    keys = jax.random.split(jax.random.key(0))
    params = {
        "embed": jax.random.normal(keys[0], (rows, WIDTH)),
        "kernel": jax.random.normal(keys[1], (WIDTH,)),
    }

    def loss_fn(params, ids, targets):
        return square_error(params["embed"][ids] @ params["kernel"], targets)

    return train_plain(value_and_grad, tx, batches, rows, params, loss_fn)


def train_plain(value_and_grad, tx, batches, rows, params, loss_fn):
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, ids, targets):
        loss, grads = value_and_grad(loss_fn)(params, ids, targets)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    hlo = step.lower(params, opt_state, *batches[0]).compile().as_text()
    for batch in batches:
        params, opt_state, loss = step(params, opt_state, *batch)
    return params, loss, hlo


LOOPS = {
    "flax": (train_flax, jax.value_and_grad),
    "nnx": (train_nnx, nnx.value_and_grad),
    "equinox": (train_equinox, eqx.filter_value_and_grad),
    "haiku": (train_haiku, jax.value_and_grad),
    "optax": (train_optax, jax.value_and_grad),
}


def batches_of(ids):
    return [(row + 0, jnp.linspace(-1.0, 1.0, row.size)) for row in ids]


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("name", LOOPS)
def test_with_all_rows_touched_a_loop_of_two_changed_lines_is_the_dense_loop(name):
    train, value_and_grad = LOOPS[name]
    batches = batches_of(EVERY_ROW)
    dense, dense_loss, _ = train(value_and_grad, optax.adam(0.1), batches)
    lazy, loss, _ = train(sparse_grad, jaxaccum.lazy_rows(optax.adam(0.1)), batches)
    np.testing.assert_allclose(loss, dense_loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(lazy), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def through_apply_updates(monkeypatch):
    """The same loop, its last step ours."""

    def apply_to_module(model, updates):
        arrays, others = eqx.partition(model, eqx.is_array)
        return eqx.combine(jaxaccum.apply_updates(arrays, updates), others)

    monkeypatch.setattr(optax, "apply_updates", jaxaccum.apply_updates)
    monkeypatch.setattr(eqx, "apply_updates", apply_to_module)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("name", LOOPS)
def test_it_is_bit_equal_to_apply_updates_and_copies_no_table(name, monkeypatch):
    train, _ = LOOPS[name]
    rows = 4001
    tx = jaxaccum.lazy_rows(optax.adam(0.1))
    params, loss, hlo = train(sparse_grad, tx, batches_of(IDS), rows)
    assert f"f32[{rows},{WIDTH}]" in hlo
    assert not re.findall(rf"= f32\[{rows},{WIDTH}\]\S* copy\(", hlo)
    with monkeypatch.context() as patch:
        through_apply_updates(patch)
        expected, expected_loss, _ = train(sparse_grad, tx, batches_of(IDS), rows)
    assert loss == expected_loss
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_accumulated_micro_batches_fit_equinox_too():
    tx = jaxaccum.accumulate(optax.sgd(0.1), 2, tables=is_table, capacity=8)
    lazy, _, _ = train_equinox(sparse_grad, tx, batches_of(IDS[:2]))
    dense = optax.MultiSteps(optax.sgd(0.1), 2)
    expected, _, _ = train_equinox(eqx.filter_value_and_grad, dense, batches_of(IDS[:2]))
    for a, b in zip(jax.tree.leaves(lazy), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_sgd_written_by_hand():
    table, ids = jnp.ones((ROWS, WIDTH)), IDS[0]

    def loss_fn(table):
        return jnp.sum(jnp.sin(table[ids]))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(table):
        _, grads = jaxaccum.value_and_sparse_grad(loss_fn, tables=True)(table)
        return jax.tree.map(lambda p, g: p - 0.1 * g, table, grads)

    expected = table - 0.1 * jax.grad(loss_fn)(table)
    np.testing.assert_allclose(step(table), expected, rtol=1e-6)


def test_nnx_differentiates_in_what_diff_state_says():
    model = nnx.Embed(ROWS, WIDTH, rngs=nnx.Rngs(0))
    model.scale = nnx.BatchStat(jnp.ones(WIDTH))

    def loss_fn(ids, model):
        model.scale[...] += 1.0
        return jnp.sum(model(ids)) + jnp.sum(model.scale[...])

    (value, aux), grads = jaxaccum.value_and_sparse_grad(
        lambda ids, model: (loss_fn(ids, model), ids),
        argnums=nnx.DiffState(1, nnx.Param),
        has_aux=True,
        tables=True,
    )(IDS[0], model)
    np.testing.assert_array_equal(aux, IDS[0])
    assert isinstance(grads, nnx.State)
    np.testing.assert_array_equal(model.scale[...], 2 * jnp.ones(WIDTH))
    slices = nnx.as_pure(grads)["embedding"]
    np.testing.assert_array_equal(slices.indices, IDS[0])
    np.testing.assert_allclose(value, jnp.sum(model(IDS[0])) + 2 * WIDTH, rtol=1e-6)
