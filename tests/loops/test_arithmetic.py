"""What people write by habit with gradients: right, or refused by whoever sees it first."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum import IndexedSlices

SHAPE = (7, 2)


@pytest.fixture(autouse=True)
def _as_users_have_it(as_it_comes):
    pass


def grad(seed=0, indices=(5, 1, 5, 7), shape=SHAPE, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=(len(indices), 2))
    return IndexedSlices(jnp.asarray(indices, jnp.int32), jnp.asarray(values, dtype), shape)


def dense(slices):
    total = np.zeros((SHAPE[0] + 1, 2), np.float64)
    np.add.at(total, np.asarray(slices.indices), np.asarray(slices.values, np.float64))
    return total[:-1]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "arithmetic",
    [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: 0.5 * a + b * 3 - a / 4,
        lambda a, b: -a + jnp.float32(2) * b,
        lambda a, b: np.float32(2) * a + b,
        lambda a, b: sum([a, b, a]),
    ],
    ids=["add", "subtract", "scale", "negate", "numpy", "sum"],
)
def test_gradients_are_added_and_scaled_as_a_whole(arithmetic, wrap):
    a, b = grad(0), grad(1, (0, 5))
    result = wrap(arithmetic)(a, b)
    assert isinstance(result, IndexedSlices)
    assert result.dense_shape == SHAPE
    np.testing.assert_allclose(dense(result), arithmetic(dense(a), dense(b)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_a_table_and_rows_make_a_table(kind):
    table = kind(np.random.default_rng(2).normal(size=SHAPE).astype(np.float32))
    update = grad()
    for result in (table + update, update + table):
        np.testing.assert_array_equal(result, jaxaccum.apply_updates(jnp.asarray(table), update))
    np.testing.assert_allclose(table - update, table - dense(update), rtol=1e-6)


def test_narrow_tables_are_rounded_once():
    third = jnp.full((3, 2), 1 / 3, jnp.float32)
    update = IndexedSlices(jnp.array([2, 0, 2]), 2.0**-7 * third, SHAPE)
    table = jnp.ones(SHAPE, jnp.bfloat16)
    assert (table + update).dtype == jnp.bfloat16
    np.testing.assert_array_equal(table + update, jaxaccum.apply_updates(table, update))


def test_an_unknown_vocabulary_joins_a_known_one():
    unknown = grad(1, (3, 2**31 - 1), (None, 2))
    known = grad()
    for total in (known + unknown, unknown + known):
        assert total.dense_shape == SHAPE
        assert total.indices.max() == 7  # one padding for all
        want = dense(known)
        want[3] += np.asarray(unknown.values[0])
        np.testing.assert_allclose(total.to_dense(), want, rtol=1e-6)


def test_what_cannot_be_added_says_so():
    with pytest.raises(ValueError, match=r"got shapes \(7, 2\) and \(8, 2\)"):
        grad() + grad(shape=(8, 2))
    with pytest.raises(TypeError, match=r"multiplied by scalars, got shape \(2,\).*map_values"):
        grad() * jnp.ones(2)
    with pytest.raises(ValueError, match=r"update of shape \(7, 2\) has 7 rows, its table 8"):
        jnp.ones((8, 2)) + grad()
    with pytest.raises(TypeError, match="unsupported operand"):
        grad() + "a"


WRONG = {
    "0.5 * leaf": (lambda g: jax.tree.map(lambda x: 0.5 * x, g), "map_values"),
    "leaf / 2": (lambda g: jax.tree.map(lambda x: x / 2, g), "map_values"),
    "jnp.add": (lambda g: jax.tree.map(jnp.add, g, g), "added and scaled as a whole"),
    "operator.add": (lambda g: jax.tree.map(operator.add, g, g), "added and scaled as a whole"),
    "jnp.negative": (lambda g: jax.tree.map(jnp.negative, g), "added and scaled as a whole"),
    "optax.tree.norm": (optax.tree.norm, r"^optax\.tree_norm .*jaxaccum\.global_norm"),
    "optax.tree.add": (lambda g: optax.tree.add(g, g), r"^optax\.tree_add "),
    "swapped": (lambda g: IndexedSlices(g["t"].values, g["t"].indices, SHAPE), "first"),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", WRONG)
def test_arithmetic_on_row_numbers_is_refused(name, wrap):
    wrong, message = WRONG[name]
    with pytest.raises(TypeError, match=message):
        wrap(wrong)({"t": grad()})


TRANSFORMS = {
    "adam": (optax.adam(0.1), "scale_by_adam"),
    "sgd": (optax.sgd(0.1), "scale"),
    "momentum": (optax.sgd(0.1, momentum=0.9), "trace"),
    "clip": (optax.clip(1.0), "clip"),
    "clip_by_global_norm": (optax.clip_by_global_norm(1.0), "clip_by_global_norm"),
    "scale": (optax.scale(-1), "scale"),
    "weight decay": (optax.add_decayed_weights(0.1), "add_decayed_weights"),
}


@pytest.mark.parametrize("place", ["alone", "before", "behind"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_outside_of_lazy_rows_name_it_and_themselves(name, place):
    tx, called = TRANSFORMS[name]
    lazy = jaxaccum.lazy_rows(optax.sgd(0.1))
    tx = {"alone": tx, "before": optax.chain(tx, lazy), "behind": optax.chain(lazy, tx)}[place]
    params = {"t": jnp.ones(SHAPE)}
    with pytest.raises(TypeError, match=rf"^optax\.(tree_)?{called} .*\(7, 2\).*lazy_rows"):
        tx.update({"t": grad()}, tx.init(params), params)


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda lazy: optax.masked(lazy, {"t": True, "b": False}),
        lambda lazy: optax.partition(
            {"rows": lazy, "rest": optax.sgd(1.0)}, {"t": "rows", "b": "rest"}
        ),
        lambda lazy: optax.apply_if_finite(lazy, 3),
        lambda lazy: optax.chain(optax.identity(), lazy),
        lambda lazy: optax.inject_hyperparams(lambda scale: optax.chain(lazy))(scale=1.0),
    ],
    ids=["masked", "partition", "apply_if_finite", "chain", "inject_hyperparams"],
)
def test_wrappers_that_compute_nothing_may_stand_outside(wrapper):
    tx = wrapper(jaxaccum.lazy_rows(optax.sgd(1.0)))
    params = {"t": jnp.ones(SHAPE), "b": jnp.ones(2)}
    updates, _ = jax.jit(tx.update)({"t": grad(), "b": jnp.zeros(2)}, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["t"], 1 - dense(grad()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("collective", [jax.lax.psum, jax.lax.pmean])
def test_sums_over_devices_name_the_one_for_rows(collective):
    with pytest.raises(TypeError, match=r"would add up the row numbers .*jaxaccum\.all_sum"):
        jax.vmap(lambda g: collective(g, "i"), axis_name="i")(
            jax.tree.map(lambda x: x[None], grad())
        )


def test_what_keeps_rows_in_their_places_may_be_mapped():
    g = grad()
    half = jax.tree.map(operator.itemgetter(slice(2)), g)
    np.testing.assert_array_equal(half.indices, [5, 1])
    assert jax.tree.map(np.asarray, g).dense_shape == SHAPE
    assert jax.tree.map(jnp.shape, g).indices == (4,)
    picked = jax.tree.map(functools.partial(jnp.where, True), g, -g)
    np.testing.assert_array_equal(picked.to_dense(), g.to_dense())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_global_norm_is_that_of_the_dense_gradient(dtype):
    table = grad(dtype=dtype)
    tree = {"table": table, "bias": jnp.array([1.0, -2.0], dtype)}
    norm = jax.jit(jaxaccum.global_norm)(tree)
    want = np.sqrt(np.sum(dense(table) ** 2) + 5)
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, want, rtol=1e-6)


def test_map_values_reaches_values_alone():
    tree = {"table": grad(), "bias": jnp.array([1.0, -2.0])}
    mapped = jaxaccum.map_values(lambda g: g.astype(jnp.bfloat16), tree)
    assert mapped["table"].values.dtype == mapped["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(mapped["table"].indices, tree["table"].indices)
    narrow = jaxaccum.map_values(lambda g: g[..., :1], tree)
    assert narrow["table"].dense_shape == (7, 1)
    with pytest.raises(ValueError, match=r"slice for each of 4 indices, got values of shape \(2,"):
        jaxaccum.map_values(lambda g: g[:2], tree)


def test_all_sum_gathers_rows_and_adds_the_rest():
    mesh = jax.make_mesh((4,), ("data",))
    indices = jnp.array([[5, 1], [5, 7], [0, 6], [1, 1]], jnp.int32)
    values = jnp.asarray(np.random.default_rng(3).normal(size=(4, 2, 2)), jnp.float32)

    def total(indices, values):
        grads = {"t": IndexedSlices(indices[0], values[0], SHAPE), "b": values[0, 0]}
        summed = jaxaccum.all_sum(grads, "data")
        return summed["t"].to_dense(), summed["b"]  # alike on all devices, and known to be

    specs = (P("data"), P("data"))
    table, bias = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=(P(), P())))(
        *(jax.device_put(x, jax.NamedSharding(mesh, P("data"))) for x in (indices, values))
    )
    whole = IndexedSlices(indices.reshape(-1), values.reshape(-1, 2), SHAPE)
    np.testing.assert_allclose(table, dense(whole), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(bias, np.asarray(values[:, 0]).sum(0), rtol=1e-5)
    with pytest.raises(ValueError, match="axis_name"):
        jaxaccum.all_sum(grad(), "data")
