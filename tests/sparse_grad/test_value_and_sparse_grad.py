"""Gradients of unchanged functions as rows: against jax.grad, by the ids, in the compiled HLO."""

import inspect
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import primitives
from trees import densified, is_slices

from jaxaccum import value_and_sparse_grad

ROWS, WIDTH = 11, 4
END = ROWS  # the padding index
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, WIDTH)), jnp.float32)
IDS = jnp.array([1, 2, -1, 5, 1], jnp.int32)
WHERE = [1, 2, 10, 5, 1]  # the rows that IDS mean
WILD = jnp.array([1, 20, -30, 11, -11], jnp.int32)
ONES = jnp.ones((5, WIDTH), jnp.float32)
ONE = jnp.ones(WIDTH, jnp.float32)
ROW_SCALES = jnp.arange(2, 2 + ROWS, dtype=jnp.float32)
COLUMN_SCALES = jnp.array([2.0, 3.0, 0.5, 5.0], jnp.float32)


def loss_of(lookup):
    """A scalar in which every entry of what is looked up has a cotangent of its own."""

    def loss(params, *args):
        found = lookup(params, *args)
        weights = jnp.arange(1, 1 + found.size, dtype=jnp.float32).reshape(found.shape)
        # An id that is filled with NaN must not make a NaN of the loss.
        return jnp.sum(jnp.nan_to_num(jnp.sin(found)).astype(jnp.float32) * weights)

    return loss


def both(lookup, params, *args, tables=True, **options):
    """Value and gradient of jaxaccum's and of JAX's, compiled as one."""
    loss = loss_of(lookup)

    @jax.jit
    def run(params, *args):
        ours = value_and_sparse_grad(loss, tables=tables, **options)(params, *args)
        return ours, jax.value_and_grad(loss)(params, *args)

    return run(params, *args)


def assert_same(ours, theirs, rtol=2e-6, atol=1e-6):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rtol, atol=atol)


@jax.custom_vjp
def doubled(table, ids):
    return table[ids] * 2


doubled.defvjp(
    lambda table, ids: (doubled(table, ids), (table, ids)),
    lambda kept, g: (jnp.zeros_like(kept[0]).at[kept[1]].add(2 * g), None),
)


@jax.custom_jvp
def tripled(table, ids):
    return table[ids] * 3


@tripled.defjvp
def _(primals, tangents):
    return tripled(*primals), tangents[0][primals[1]] * 3


@jax.custom_vjp
def added_up(table, ids):
    return table[ids]


def _add_up(kept, g):
    table, ids = kept
    start = jnp.zeros_like(table).at[ids[0]].add(g[0])
    add = lambda total, row: (total.at[row[0]].add(row[1]), None)  # noqa: E731
    return lax.scan(add, start, (ids[1:], g[1:]))[0], None


added_up.defvjp(lambda table, ids: (added_up(table, ids), (table, ids)), _add_up)


def scanned(step, start, xs):
    return lax.scan(lambda carry, x: (step(carry, x), None), start, xs)[0]


def on_one_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


PAIRS = jnp.stack([IDS, IDS + 1], axis=1)
# lookup, its ids, the rows in which the gradient must come
LOOKUPS = {
    "index": (lambda t, i: t[i], IDS, WHERE),
    "index of rank 2": (lambda t, i: t[i], PAIRS.T, [*WHERE, 2, 3, 0, 6, 2]),
    "take": (lambda t, i: jnp.take(t, i, axis=0), IDS, WHERE),
    "take twice": (lambda t, i: jnp.take(t, i, axis=0) + t[i], IDS, [*WHERE, *WHERE]),
    "take_along_axis": (lambda t, i: jnp.take_along_axis(t, i[:, None], axis=0), IDS, WHERE),
    "python id": (lambda t, i: t[3], IDS, [3]),
    "scalar id": (lambda t, i: t[i], jnp.int32(-2), [9]),
    "rows of a slice": (lambda t, i: t[2:5], IDS, [2, 3, 4]),
    "every third row": (lambda t, i: t[1:9:3], IDS, [1, 4, 7]),
    "dynamic slice that overhangs": (
        lambda t, i: lax.dynamic_slice_in_dim(t, i, 3), jnp.int32(9), [8, 9, 10],
    ),
    "vmapped dynamic slices": (
        lambda t, i: jax.vmap(lambda j: lax.dynamic_slice_in_dim(t, j, 2))(i), IDS,
        [1, 2, 2, 3, 9, 10, 5, 6, 1, 2],
    ),
    "some columns": (lambda t, i: t[i, 1:3], IDS, WHERE),
    "columns, then rows": (lambda t, i: t[:, :2][i], IDS, WHERE),
    "single entries": (lambda t, i: t[i, i % WIDTH], IDS, WHERE),
    "columns of the transposed": (lambda t, i: t.T[:, i], IDS, WHERE),
    "vmapped scalar id": (lambda t, i: jax.vmap(lambda j: t[j])(i), IDS, WHERE),
    "vmapped over columns": (
        lambda t, i: jax.vmap(lambda c, j: c[j], (1, 1))(t[:, :2], i), PAIRS,
        [*WHERE, 2, 3, 0, 6, 2],
    ),
    "vmapped over a broadcast": (
        lambda t, i: jax.vmap(lambda u, j: u[j])(jnp.broadcast_to(t, (2, *t.shape)), i), PAIRS.T,
        [*WHERE, 2, 3, 0, 6, 2],
    ),
    "fill": (lambda t, i: t.at[i].get(mode="fill"), WILD, [1, END, END, END, 0]),
    "clip": (lambda t, i: t.at[i].get(mode="clip"), WILD, [1, 10, 0, 10, 0]),
    "promise_in_bounds": (
        lambda t, i: t.at[i].get(mode="promise_in_bounds"), WILD, [1, END, END, END, 0],
    ),
    "take, fill": (lambda t, i: jnp.take(t, i, axis=0), WILD, [1, END, END, END, 0]),
    "take, clip": (lambda t, i: jnp.take(t, i, axis=0, mode="clip"), WILD, [1, 10, 0, 10, 0]),
    "take, wrap": (lambda t, i: jnp.take(t, i, axis=0, mode="wrap"), WILD, [1, 9, 3, 0, 0]),
    "no ids": (lambda t, i: t[i], IDS[:0], []),
    "int8 ids": (lambda t, i: t[i], IDS.astype(jnp.int8), WHERE),
    "uint32 ids": (lambda t, i: t.at[i].get(mode="fill"), jnp.uint32([1, 2**32 - 1]), [1, END]),
    "rows of a table of vectors": (lambda t, i: t[:, 0][i], IDS, WHERE),
    "rows of a table of matrices": (lambda t, i: t.reshape(ROWS, 2, 2)[i], IDS, WHERE),
    "an axis more": (lambda t, i: t[:, None][i], IDS, WHERE),
    "without the first rows": (lambda t, i: t[2:][i], IDS, [3, 4, 10, 7, 3]),
    "without the last rows": (lambda t, i: t[:-3][i], IDS, [1, 2, 7, 5, 1]),
    "wild ids without the last rows": (
        lambda t, i: t[:-3].at[i].get(mode="fill"), WILD, [1, END, END, END, END],
    ),
    "one of two parts": (lambda t, i: jnp.split(t, [4])[1][i], IDS, [5, 6, 10, 9, 5]),
    "with a row more": (lambda t, i: jnp.concatenate([t, ONES[:1]])[i], IDS, [1, 2, END, 5, 1]),
    "scaled by a number": (lambda t, i: (t * 8)[i], IDS, WHERE),
    "divided by a traced scalar": (
        lambda t, i: (t / i[1].astype(jnp.float32))[i], IDS, WHERE,
    ),
    "rows scaled": (
        lambda t, i: (t * jnp.arange(ROWS, dtype=jnp.float32)[:, None])[i], IDS, WHERE,
    ),
    "columns scaled": (lambda t, i: (t * COLUMN_SCALES[None])[i], IDS, WHERE),
    "columns scaled in a checkpoint in a scan": (
        lambda t, i: scanned(
            jax.checkpoint(lambda c, j: c * jnp.cos((t / COLUMN_SCALES[None])[j])), ONE, i
        ), IDS, WHERE,
    ),
    "scaled by one number of rank 2": (lambda t, i: (t / COLUMN_SCALES[None, 1:2])[i], IDS, WHERE),
    "entries of rows scaled": (
        lambda t, i: (t * ROW_SCALES[:, None])[i, i % WIDTH], IDS, WHERE,
    ),
    "jit": (jax.jit(lambda t, i: t[i]), IDS, WHERE),
    "checkpoint": (jax.checkpoint(lambda t, i: jnp.cos(t[i])), IDS, WHERE),
    "vmap of checkpoint of jit": (
        lambda t, i: jax.vmap(jax.checkpoint(jax.jit(lambda j: jnp.cos(t[j]))))(i), IDS, WHERE,
    ),
    "custom_vjp": (doubled, IDS, WHERE),
    "vmap of custom_vjp": (jax.vmap(doubled, (None, 0)), IDS, WHERE),
    "checkpoint of custom_vjp": (jax.checkpoint(doubled), IDS, WHERE),
    "vmap of custom_jvp": (jax.vmap(tripled, (None, 0)), IDS, WHERE),
    "custom_vjp that adds row by row": (added_up, IDS, WHERE),
    "scan": (lambda t, i: scanned(lambda c, j: c * t[j], ONE, i), IDS, WHERE),
    "scan of checkpoint of rank 1": (
        lambda t, i: scanned(jax.checkpoint(lambda c, j: c * jnp.cos(t[j])), ONES[:2], i), PAIRS,
        [1, 2, 2, 3, 10, 0, 5, 6, 1, 2],
    ),
    "scan in scan, a lookup outside": (
        lambda t, i: scanned(
            lambda c, j: c * scanned(lambda d, k: d + t[k], ONE, j), ONE, i
        ) + t[i[0, 0]],
        PAIRS, [1, 1, 2, 2, 3, 10, 0, 5, 6, 1, 2],
    ),
    "scan that carries the table": (
        lambda t, i: scanned(lambda c, j: (c[0], c[1] * c[0][j]), (t, ONE), i)[1], IDS, WHERE,
    ),
    "scan that carries a cast": (
        lambda t, i: scanned(
            lambda c, j: (c[0], c[1] * jax.jit(lambda u: u * 2)(c[0])[j]), (t, ONE), i
        )[1], IDS, WHERE,
    ),
    "map": (lambda t, i: lax.map(lambda j: t[j], i), IDS, WHERE),
    "fori_loop": (lambda t, i: lax.fori_loop(0, 5, lambda k, c: c * t[i[k]], ONE), IDS, WHERE),
    "cond": (lambda t, i: lax.cond(i[0] > 0, lambda: t[i], lambda: ONES), IDS, WHERE),
    "cond, the other way": (
        lambda t, i: lax.cond(i[0] < 0, lambda: t[i], lambda: ONES), IDS, [END] * 5,
    ),
    "switch of unequal branches": (
        lambda t, i: lax.switch(
            i[0], [lambda: t[i], lambda: ONES * t[i[1]][None], lambda: ONES]
        ), IDS, [2, END, END, END, END],
    ),
    "cond in scan": (
        lambda t, i: scanned(lambda c, j: lax.cond(j > 1, lambda: c * t[j], lambda: c), ONE, i),
        IDS, [END, 2, END, 5, END],
    ),
    "optimization barrier": (lambda t, i: lax.optimization_barrier((t, i))[0][i], IDS, WHERE),
    "sharding constraint": (
        lambda t, i: lax.with_sharding_constraint(t, on_one_device())[i], IDS, WHERE,
    ),
}  # fmt: skip


# Kin of others in the list, which differ from them in what JAX does before it gets here.
BREADTH = {
    "index of rank 2", "take", "scalar id", "every third row", "some columns", "vmapped scalar id",
    "vmapped over columns", "vmapped over a broadcast", "promise_in_bounds", "take, fill",
    "take, clip", "take, wrap", "uint32 ids", "rows of a table of vectors", "an axis more",
    "without the last rows", "scaled by a number", "rows scaled", "jit", "vmap of custom_vjp",
    "checkpoint of custom_vjp", "vmap of custom_jvp", "fori_loop", "map", "cond, the other way",
    "scan that carries the table", "optimization barrier", "entries of rows scaled",
}  # fmt: skip


def param(name):
    return pytest.param(name, marks=[pytest.mark.full] if name in BREADTH else [])


def test_the_breadth_is_of_known_lookups():
    assert LOOKUPS.keys() >= BREADTH


@pytest.mark.parametrize("name", [param(name) for name in LOOKUPS])
def test_lookups_give_rows(name):
    lookup, ids, rows = LOOKUPS[name]
    (value, grad), (true_value, true_grad) = both(lookup, TABLE, ids)
    assert value == true_value
    assert sorted(grad.indices.tolist()) == sorted(rows)
    assert grad.indices.dtype == jnp.int32
    assert grad.values.shape == (len(rows), WIDTH)
    assert grad.dense_shape == TABLE.shape
    assert_same(grad.to_dense(), true_grad)


def test_rows_are_the_cotangents_of_the_lookups():
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(5, WIDTH)), jnp.float32)
    grad_fn = value_and_sparse_grad(lambda t: jnp.sum(t[IDS] * weights), tables=True)
    value, grad = grad_fn(TABLE)
    np.testing.assert_allclose(value, np.sum(np.asarray(TABLE)[WHERE] * weights), rtol=1e-6)
    np.testing.assert_array_equal(grad.indices, WHERE)
    np.testing.assert_array_equal(grad.values, weights)


@pytest.mark.parametrize(
    "dtype",
    [jnp.uint8, *(pytest.param(d, marks=pytest.mark.full) for d in (jnp.int16, "uint32", "int32"))],
)
def test_ids_of_any_integer_type_reach_any_row(dtype):
    high = min(int(jnp.iinfo(dtype).max), 299)
    ids = jnp.array([high, 0, 7], dtype)

    def loss(table):
        sliced = jax.vmap(lambda word: lax.dynamic_index_in_dim(table, word))(ids)
        return jnp.sum(table.at[ids].get(mode="clip")) + jnp.sum(sliced)

    _, grad = value_and_sparse_grad(loss, tables=True)(jnp.ones((300, 1)))
    assert grad.indices.tolist() == [high, 0, 7] * 2
    assert grad.indices.dtype == jnp.int32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param("float16", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        lambda f: lambda t, i: lax.map(lambda j: f(t, j), i),
        lambda f: lambda t, i: lax.cond(i[0] > 0, f, lambda t, i: t[:5] * 2, t, i),
    ],
    ids=["plain", "jit", "checkpoint", "map", "cond"],
)
def test_a_cast_table_gives_rows_of_its_own_dtype(wrap, dtype):
    lookup = wrap(lambda table, ids: table[ids])
    args = (TABLE, jnp.array([1, 2, -1, 5, 3]))  # no repetition: no sum is rounded
    (value, grad), (true_value, true_grad) = both(lambda t, i: lookup(t.astype(dtype), i), *args)
    assert value == true_value
    assert grad.values.dtype == jnp.float32
    assert_same(grad.to_dense(), true_grad, rtol=1e-2)


def test_repeated_rows_of_a_cast_table_are_summed_in_the_dtype_of_the_table():
    small = jnp.float32(2.0**-9)  # lost when added to 1 in bfloat16
    weights = jnp.array([1, small, small, small], jnp.bfloat16)[:, None]

    def loss(table):
        return jnp.sum(
            (table.astype(jnp.bfloat16)[jnp.zeros(4, int)] * weights).astype(jnp.float32)
        )

    _, grad = value_and_sparse_grad(loss, tables=True)(TABLE[:, :1])
    assert grad.to_dense()[0, 0] == 1 + 3 * small


# Models


class Linen(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, ids, other):
        found = nn.Embed(ROWS, WIDTH, dtype=self.dtype)(ids)
        shared = nn.remat(nn.Embed)(ROWS + 2, WIDTH, dtype=self.dtype)(other)
        hidden = nn.relu(nn.Dense(8, dtype=self.dtype)(found + shared))
        return nn.remat(nn.Dense)(3, dtype=self.dtype)(hidden)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(ROWS, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, ids):
        return self.head(nnx.relu(self.embed(ids)))


class Equinox(eqx.Module):
    embed: eqx.nn.Embedding
    head: eqx.nn.MLP

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(ROWS, WIDTH, key=key)
        self.head = eqx.nn.MLP(WIDTH, 3, 8, 1, key=key)

    def __call__(self, word):
        return self.head(self.embed(word))


def is_embedding(path, leaf):
    return "mbed" in jax.tree_util.keystr(path)


def tables_in(grads):
    return [leaf for leaf in jax.tree.leaves(grads, is_leaf=is_slices) if is_slices(leaf)]


@pytest.mark.parametrize("dtype", [None, pytest.param(jnp.bfloat16, marks=pytest.mark.full)])
def test_linen(dtype):
    model = Linen(dtype)
    params = jax.jit(model.init)(jax.random.key(0), IDS, IDS)
    (value, grads), (true_value, true_grads) = both(
        model.apply, params, IDS, jnp.array([0, 12, 5, 5, 7]), tables=is_embedding
    )
    assert value == true_value
    assert sorted(g.indices.tolist() for g in tables_in(grads)) == [[0, 12, 5, 5, 7], WHERE]
    assert_same(densified(grads), true_grads, rtol=2e-6 if dtype is None else 2e-2)


def test_nnx_by_split_and_by_module():
    model = Nnx(nnx.Rngs(0))
    graph, params = nnx.split(model)

    def merged(params, ids):
        return nnx.merge(graph, params)(ids)

    for lookup, tree in ((merged, params), (lambda model, ids: model(ids), model)):
        (value, grads), (true_value, true_grads) = both(lookup, tree, IDS, tables=is_embedding)
        assert value == true_value
        assert [g.indices.tolist() for g in tables_in(grads)] == [WHERE]
        assert_same(jax.tree.leaves(densified(grads)), jax.tree.leaves(true_grads))


def test_equinox():
    params, static = eqx.partition(Equinox(jax.random.key(0)), eqx.is_inexact_array)

    def lookup(params, ids):
        return jax.vmap(eqx.combine(params, static))(ids)

    (value, grads), (true_value, true_grads) = both(lookup, params, IDS, tables=is_embedding)
    assert value == true_value
    assert [g.indices.tolist() for g in tables_in(grads)] == [WHERE]
    assert_same(densified(grads), true_grads)


def test_training_with_rows_is_training():
    model = Linen()
    start = jax.jit(model.init)(jax.random.key(0), IDS, IDS)
    loss = loss_of(model.apply)

    @jax.jit
    def rows_step(params, ids):
        _, grads = value_and_sparse_grad(loss, tables=is_embedding)(params, ids, ids)
        return jax.tree.map(
            lambda g, p: (
                p.at[g.indices].add(-0.01 * g.values, mode="drop") if is_slices(g) else p - 0.01 * g
            ),
            grads,
            params,
            is_leaf=is_slices,
        )

    @jax.jit
    def dense_step(params, ids):
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params, ids, ids))

    ours = theirs = start
    for seed in range(5):
        ids = jax.random.randint(jax.random.key(seed), (6,), -ROWS, ROWS)
        ours, theirs = rows_step(ours, ids), dense_step(theirs, ids)
    assert_same(ours, theirs, rtol=1e-5)


# The arguments


def test_several_arguments_keywords_and_auxiliary_data():
    def loss(table, strength, mode, *, ids, key):
        assert mode == "sum"
        kept = jax.random.bernoulli(key, 0.5, (5, 1)).astype(jnp.float32)
        return strength * jnp.sum(table[ids] ** 2 * kept), {"kept": kept, "keys": (key, ids)}

    args, options = (TABLE, 2.0, "sum"), {"ids": np.asarray(IDS), "key": jax.random.key(3)}
    grad_fn = value_and_sparse_grad(loss, (0, -2), has_aux=True, tables=(True, False))
    ours, grads = grad_fn(*args, **options)
    theirs, true_grads = jax.value_and_grad(loss, (0, -2), has_aux=True)(*args, **options)
    assert isinstance(grads, tuple)
    assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, theirs)
    assert ours[0] == theirs[0]
    np.testing.assert_array_equal(ours[1]["kept"], theirs[1]["kept"])
    np.testing.assert_array_equal(ours[1]["keys"][1], IDS)
    assert_same(densified(grads), true_grads)


def test_auxiliary_data_of_any_kind():
    thing = object()

    def loss(table, ids):
        found = table[ids]
        return jnp.sum(found), {"name": "a", "thing": thing, "n": 3, "none": None, "found": found}

    (_, aux), grad = value_and_sparse_grad(loss, has_aux=True, tables=True)(TABLE, IDS)
    np.testing.assert_array_equal(aux.pop("found"), TABLE[IDS])
    assert aux == {"name": "a", "thing": thing, "n": 3, "none": None}
    assert grad.indices.tolist() == WHERE


def test_learned_scales_and_a_number_of_rank_2():
    def lookup(params, ids):
        return (params["table"] * params["scale"][None] / params["all"])[ids]

    params = {"table": TABLE, "scale": COLUMN_SCALES, "all": jnp.full((1, 1), 3, jnp.float32)}
    tables = {"table": True, "scale": False, "all": False}
    for allow_dense in (False, True):
        ours, theirs = both(lookup, params, IDS, tables=tables, allow_dense=allow_dense)
        assert is_slices(ours[1]["table"])
        assert_same(densified(ours[1]), theirs[1], rtol=1e-5)


@pytest.mark.parametrize(
    "lookup",
    [
        lambda t, i: t[0],
        lambda t, i: t[:1],
        lambda t, i: t[i, i % WIDTH],
        lambda t, i: t.T[:, i],
        lambda t, i: t[i],
        lambda t, i: jnp.sum(t) * t[i],
    ],
    ids=["python id", "slice", "entries", "transposed", "index", "norm"],
)
def test_a_table_of_one_row_always_has_rows(lookup):
    (_, grad), (_, true_grad) = both(lookup, TABLE[:1], jnp.array([0, -1, 0]))
    assert set(grad.indices.tolist()) == {0}
    assert_same(grad.to_dense(), true_grad, rtol=1e-5)


def test_one_table_is_sparse_and_the_other_dense_as_selected():
    def lookup(params, ids):
        return params["a"][ids] * params["b"][ids + 1]

    tree = {"a": TABLE, "b": TABLE + 1}
    for tables in ({"a": True, "b": False}, lambda path, leaf: path[0].key == "a"):
        (_, grads), (_, true_grads) = both(lookup, tree, IDS, tables=tables)
        assert (is_slices(grads["a"]), is_slices(grads["b"])) == (True, False)
        assert_same(densified(grads), true_grads)


def test_what_does_not_reach_the_loss_may_use_the_whole_table():
    def loss(table):
        found = table[IDS]
        scores = found @ table.T  # a metric
        frozen = lax.stop_gradient(jnp.linalg.norm(table))
        return jnp.sum(found) * frozen, jnp.argmax(scores, axis=-1)

    _, grad = value_and_sparse_grad(loss, has_aux=True, tables=True)(TABLE)
    np.testing.assert_allclose(grad.values, jnp.broadcast_to(jnp.linalg.norm(TABLE), (5, WIDTH)))


# Transformations around it


def test_under_vmap_and_scan():
    loss = loss_of(lambda t, i: t[i])
    grad_fn = value_and_sparse_grad(loss, tables=True)
    ids = jnp.stack([IDS, IDS + 1])
    _, mapped = jax.jit(jax.vmap(grad_fn, (None, 0)))(TABLE, ids)
    _, looped = jax.jit(lambda: lax.scan(lambda _, i: (None, grad_fn(TABLE, i)), None, ids)[1])()
    one_by_one = jax.jit(grad_fn)
    for k in range(2):
        _, alone = one_by_one(TABLE, ids[k])
        for grad in (mapped, looped):
            np.testing.assert_array_equal(grad.indices[k], alone.indices)
            np.testing.assert_allclose(grad.values[k], alone.values, rtol=1e-6)


def test_gradients_of_gradients():
    loss = loss_of(lambda t, i: t[i])

    def ours(table):
        return jnp.sum(value_and_sparse_grad(loss, tables=True)(table, IDS)[1].to_dense() ** 2)

    def theirs(table):
        return jnp.sum(jax.grad(loss)(table, IDS) ** 2)

    assert_same(jax.jit(jax.grad(ours))(TABLE), jax.jit(jax.grad(theirs))(TABLE), rtol=1e-5)
    tangents = [jax.jvp(f, (TABLE,), (TABLE,))[1] for f in (ours, theirs)]
    np.testing.assert_allclose(*tangents, rtol=1e-5)


def test_a_step_on_rows_inside_the_loss_stays_sparse():
    def adapted(table, ids):
        inner = jax.grad(loss_of(lambda t, i: t[i]))(table, ids)
        return (table - 0.1 * inner)[ids + 1]

    (_, grad), (_, true_grad) = both(adapted, TABLE, IDS)
    assert set(grad.indices.tolist()) <= {*WHERE, *((row + 1) % ROWS for row in WHERE), END}
    assert_same(grad.to_dense(), true_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("local", [True, False])
def test_inside_shard_map(local):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    loss = loss_of(lambda t, i: t[i])

    def device_grad(table, ids):
        if local:
            table = lax.pcast(table, "d", to="varying")
        return value_and_sparse_grad(loss, tables=True)(table, ids)[1]

    def device_dense(table, ids):
        return jax.grad(loss)(table, ids)

    ids = jnp.arange(16) * 7 % ROWS
    shards, total = (spec(), spec("d")), spec("d") if local else spec()
    ours = jax.jit(jax.shard_map(device_grad, mesh=mesh, in_specs=shards, out_specs=total))
    theirs = jax.jit(jax.shard_map(device_dense, mesh=mesh, in_specs=shards, out_specs=spec()))
    grad = ours(TABLE, ids)
    np.testing.assert_array_equal(grad.indices, ids)
    assert_same(grad.to_dense(), theirs(TABLE, ids), rtol=1e-5)


def test_effects_happen_once(capfd):
    def loss(table):
        jax.debug.print("row {}", IDS[0])
        return jnp.sum(table[IDS])

    value_and_sparse_grad(loss, tables=True)(TABLE)
    jax.effects_barrier()
    assert capfd.readouterr().out == "row 1\n"


def test_traces_once_under_jit_and_compiles_once_outside():
    traces = []

    @jax.jit
    def loss(table, ids):
        traces.append(ids)
        return jnp.sum(jnp.take(table, ids, axis=0) ** 2)

    grad_fn = jax.jit(value_and_sparse_grad(loss, tables=True))
    grad_fn(TABLE, IDS), grad_fn(TABLE, IDS + 1)
    assert len(traces) == 1
    outside = value_and_sparse_grad(loss, tables=True)
    outside(TABLE, IDS)
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    outside(TABLE, IDS)
    count = len(compiled)
    jax.jit(lambda x: x * 3.25)(1.5)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert (count, len(compiled)) == (0, 1)


# What is compiled


@pytest.mark.parametrize(
    "lookup",
    [
        lambda t, i: t[i],
        lambda t, i: jnp.take(t.astype(jnp.bfloat16), i, axis=0) + t[i + 1].astype(jnp.bfloat16),
        lambda t, i: jax.vmap(lambda j: t[j])(i),
        lambda t, i: doubled(t, i),
        lambda t, i: jax.checkpoint(lambda t, i: jnp.cos(t[i]))(t.astype(jnp.bfloat16), i),
        lambda t, i: lax.map(lambda j: t.astype(jnp.bfloat16)[j], i),
        lambda t, i: scanned(lambda c, j: c * t[j], ONE, i),
        lambda t, i: lax.cond(
            i[0] > 0, lambda t: t[i], lambda t: t[:5] * 2, t.astype(jnp.bfloat16)
        ),
    ],
    ids=["index", "cast", "vmap", "custom_vjp", "checkpoint", "map of cast", "scan", "cond"],
)
def test_no_array_of_the_tables_size_is_made(lookup):
    rows, width = 100_003, WIDTH
    loss = loss_of(lookup)
    shapes = jax.ShapeDtypeStruct((rows, width), jnp.float32), IDS

    def big_arrays(grad_fn):
        compiled = jax.jit(grad_fn).lower(*shapes).compile()
        memory = compiled.memory_analysis()
        return (
            made_arrays(compiled.as_text(), rows),
            memory.temp_size_in_bytes + memory.output_size_in_bytes > rows * width,
        )

    assert big_arrays(value_and_sparse_grad(loss, tables=True)) == ([], False)
    assert big_arrays(jax.value_and_grad(loss))[1]  # the yardstick measures what it should


@pytest.mark.parametrize(
    "lookup",
    [
        lambda t, i: t[i],
        jax.checkpoint(lambda t, i: jnp.cos(t.astype(jnp.bfloat16)[i])),
        lambda t, i: scanned(lambda c, j: c + t[j], ONE, i),
    ],
    ids=["index", "checkpoint", "scan"],
)
@pytest.mark.parametrize("loss_of", [loss_of, lambda f: lambda *a: jnp.sum(f(*a), dtype="float32")])
def test_a_donated_table_is_updated_in_place(lookup, loss_of):
    rows = 100_003
    grad_fn = value_and_sparse_grad(loss_of(lookup), tables=True)

    def step(table, ids):
        value, grad = grad_fn(table, ids)
        return table.at[grad.indices].add(-grad.values, mode="drop"), value

    shapes = jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32), IDS
    compiled = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= rows * WIDTH * 4
    assert memory.temp_size_in_bytes < rows * WIDTH
    assert " copy(" not in "".join(made_arrays(compiled.as_text(), rows))


def made_arrays(hlo, rows):
    """The instructions outside of fusions whose result is a new array of so many rows."""
    made, inside = [], ""
    for line in hlo.splitlines():
        if line.endswith("{"):
            inside = line
        passes = re.search(r" (parameter|get-tuple-element|tuple|bitcast)\(", line)
        is_big = re.search(rf" = [^(]*\[{rows},", line)
        if is_big and not passes and "fused" not in inside and "wrapped" not in inside:
            made.append(line.strip())
    return made


def test_checkpoint_still_recomputes():
    def loss(table):
        return jnp.sum(jax.checkpoint(lambda t: jnp.sin(jnp.cos(t[IDS])))(table))

    jaxpr = jax.make_jaxpr(value_and_sparse_grad(loss, tables=True))(TABLE)
    (remat,) = [eqn for eqn in jaxpr.eqns if eqn.primitive is primitives.remat_p]
    inside = [eqn.primitive.name for eqn in remat.params["jaxpr"].eqns]
    assert remat.params["differentiated"]
    assert "gather" in inside
    assert "scatter-add" not in inside


# Dense uses


def line_of(function, mark):
    lines, first = inspect.getsourcelines(function)
    return first + next(k for k, line in enumerate(lines) if mark in line)


def tied(table):
    def logits(hidden):
        return hidden @ table.T  # here

    hidden = jnp.tanh(table[IDS])
    return jnp.sum(logits(hidden))


def regularized(table):
    squares = table**2  # here
    return jnp.sum(table[IDS]) + jnp.sum(squares)


def one_hot(table):
    return jnp.sum(jax.nn.one_hot(IDS, ROWS, dtype=jnp.float32) @ table)  # here


def all_columns(table):
    column = table[:, 0]  # here
    return jnp.sum(jnp.sin(column))


def cleared(table):
    return jnp.sum(table.at[0].set(0)[IDS])  # here


def columns(table):
    return jnp.sum(table[:, jnp.array([0, 2])])  # here


def taken_columns(table):
    return jnp.sum(jnp.take(table, jnp.array([0, 2]), axis=1))  # here


def branched_columns(table):
    columns = jnp.array([0, 2])
    branches = lambda t: jnp.sum(t[:, columns]), lambda t: jnp.float32(0)  # here
    return lax.cond(table[0, 0] > 0, *branches, table)


def looped_columns(table):
    return jnp.sum(lax.map(lambda k: jnp.take(table, k, axis=1), jnp.array([0, 2])))  # here


@jax.jit
def jitted(table):
    return jnp.sum(table[IDS] * jnp.mean(table))  # here


@jax.checkpoint
def recomputed(table):
    return jnp.sum(jnp.cos(table[IDS] * jnp.mean(table)))  # here


def looped(table):
    def step(carry, word):
        return carry * table[word] * jnp.sum(table), None  # here

    return jnp.sum(lax.scan(step, ONE, IDS)[0])


def carried(table):
    def step(table, word):
        return table * 2, table[word]  # here

    return jnp.sum(lax.scan(step, table, IDS)[1])


def replaced(table):
    def step(first, word):
        return jnp.ones_like(table) * 2, first[word]

    return jnp.sum(lax.scan(step, table, IDS)[1])  # here


def doubling(table):
    def step(table, word):
        return table + table, table[word]

    return jnp.sum(lax.scan(step, table, IDS)[1])  # here


def branched(table):
    def whole(table):
        return jnp.sum(table)  # here

    return lax.cond(table[0, 0] > 0, lambda t: jnp.sum(t[IDS]), whole, table)


@jax.custom_vjp
def ruled(table):
    return jnp.sum(table[IDS])


ruled.defvjp(lambda table: (ruled(table), table), lambda table, g: (jnp.full_like(table, g),))

DENSE_USES = (
    tied, regularized, one_hot, all_columns, cleared, columns, taken_columns, branched_columns,
    looped_columns, jitted, recomputed, looped, carried,
    replaced, doubling, branched,
)  # fmt: skip


@pytest.mark.parametrize("use", DENSE_USES, ids=lambda use: use.__name__)
def test_a_dense_use_is_refused_with_its_line(use):
    place = f"{re.escape(__file__)}:{line_of(use, '# here')}:"
    with pytest.raises(ValueError, match=rf"shape \(11, 4\).*{place}.*allow_dense=True"):
        jax.eval_shape(value_and_sparse_grad(use, tables=True), TABLE)


@pytest.mark.parametrize("use", [*DENSE_USES, ruled], ids=lambda use: use.__name__)
def test_a_dense_use_comes_out_dense_if_allowed(use):
    value, grad = jax.jit(value_and_sparse_grad(use, tables=True, allow_dense=True))(TABLE)
    true_value, true_grad = jax.jit(jax.value_and_grad(use))(TABLE)
    assert isinstance(grad, jax.Array)
    np.testing.assert_allclose(value, true_value, rtol=1e-6)
    assert_same(grad, true_grad, rtol=1e-5, atol=1e-5)


def test_allow_dense_leaves_sparse_leaves_sparse():
    def loss(params):
        return tied(params["tied"]) + jnp.sum(params["looked up"][IDS])

    grad_fn = value_and_sparse_grad(loss, tables=lambda path, leaf: True, allow_dense=True)
    _, grads = grad_fn({"tied": TABLE, "looked up": TABLE})
    assert (is_slices(grads["tied"]), is_slices(grads["looked up"])) == (False, True)


def test_a_dense_rule_is_refused_by_name():
    with pytest.raises(ValueError, match=r"leaf \['table'\].*broadcast_in_dim"):
        value_and_sparse_grad(lambda p: ruled(p["table"]), tables=True)({"table": TABLE})


def test_entries_that_would_take_more_than_the_table_as_rows_are_refused():
    wide = jax.ShapeDtypeStruct((4, 2**18), jnp.float32)

    def loss(table):
        return jnp.sum(table[IDS % 4, IDS])

    with pytest.raises(ValueError, match="single entries"):
        jax.eval_shape(value_and_sparse_grad(loss, tables=True), wide)
    allowing = value_and_sparse_grad(loss, tables=True, allow_dense=True)
    assert jax.eval_shape(allowing, wide)[1].shape == wide.shape


# Wrong calls


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tables": False}, ValueError, "tables selects no leaf"),
        ({"tables": [True, True]}, ValueError, "tables must match the tree"),
        ({"tables": {"t": True, "n": True}}, ValueError, r"\['n'\].*never looked up"),
        ({"tables": (False, True), "argnums": (0, 1)}, TypeError, r"leaf \[1\].*got int32"),
        ({"tables": True, "argnums": (0, -2)}, ValueError, "argnums must name each argument once"),
        ({"tables": True, "argnums": 2}, ValueError, "argnums must lie within the 2 positional"),
    ],
)
def test_wrong_calls_are_named(options, error, message):
    def loss(params, ids):
        return jnp.sum(params["t"][ids])

    params = {"t": TABLE, "n": TABLE}
    with pytest.raises(error, match=message):
        value_and_sparse_grad(loss, **options)(params, IDS)


def test_a_lookup_that_is_cut_off_from_the_loss_is_refused():
    def loss(table):
        return jnp.sum(lax.stop_gradient(table[IDS]))

    with pytest.raises(ValueError, match="nothing that is looked up in it reaches the loss"):
        value_and_sparse_grad(loss, tables=True)(TABLE)


def test_what_jax_refuses_stays_refused():
    with pytest.raises(TypeError, match="scalar-output"):
        value_and_sparse_grad(lambda t: t[IDS], tables=True)(TABLE)
    with pytest.raises(TypeError, match="int32"):
        value_and_sparse_grad(lambda p: jnp.sum(p[0][p[1]]), tables=[True, False])([TABLE, IDS])
