"""``accumulate`` against ``optax.MultiSteps`` and NumPy."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from breadth import in_breadth
from internals import pooled_rows
from trees import assert_close
from trees import densified as dense

import jaxaccum
from jaxaccum import IndexedSlices, Verdict

ROWS, WIDTH = 11, 2
TABLES = {"bias": False, "items": True, "users": True}


@pytest.fixture(autouse=True)
def _optax_promotes():
    # optax multiplies ints with floats, which the strict setting of the other tests forbids.
    with jax.numpy_dtype_promotion("standard"):
        yield


def make_params(dtype=jnp.float32):
    shapes = {"bias": (3,), "items": (ROWS, WIDTH), "users": (2 * ROWS,)}
    return trees.draw(shapes, dtype=dtype)


def make_grads(seed, items=None, users=None, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    items = rng.integers(0, ROWS + 1, 4) if items is None else np.array(items)
    users = rng.integers(0, 2 * ROWS + 1, 4) if users is None else np.array(users)

    def slices(indices, shape):
        values = jnp.asarray(rng.normal(size=(len(indices), *shape[1:])), dtype)
        return IndexedSlices(jnp.asarray(indices, jnp.int32), values, shape)

    return {
        "bias": jnp.asarray(rng.normal(size=3), dtype),
        "items": slices(items, (ROWS, WIDTH)),
        "users": slices(users, (2 * ROWS,)),
    }


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def make(tx=None, num_required=3, capacity=12, **options):
    tx = optax.sgd(0.1) if tx is None else tx
    return jaxaccum.accumulate(tx, num_required, tables=TABLES, capacity=capacity, **options)


@pytest.mark.parametrize("wrapped", in_breadth([False, True], {True}))
@pytest.mark.parametrize("name", in_breadth(["sgd", "adagrad"], {"adagrad"}))
def test_it_equals_multi_steps_step_by_step(name, wrapped):
    inner = {"sgd": optax.sgd(0.1), "adagrad": optax.adagrad(0.1)}[name]
    num_required = lambda step: 2 + step % 2  # noqa: E731
    peer = optax.MultiSteps(inner, num_required)
    tx = make(jaxaccum.lazy_rows(inner) if wrapped else inner, num_required)
    params = make_params()
    state, peer_state = tx.init(params), peer.init(params)
    update, peer_update = jax.jit(tx.update), jax.jit(peer.update)
    for seed in range(8):
        grads = make_grads(seed)
        updates, state = update(grads, state, params)
        expected, peer_state = peer_update(dense(grads), peer_state, params)
        assert_close(dense(updates), expected, rtol=1e-5, atol=1e-7)
        assert_close(state.inner_state, peer_state.inner_opt_state, rtol=1e-5, atol=1e-7)
        assert (state.num_accumulated, state.global_step) == (
            peer_state.mini_step,
            peer_state.gradient_step,
        )
        assert state.verdict == Verdict.ACCEPTED
        params = jaxaccum.apply_updates(params, updates)
    assert state.global_step == 3
    np.testing.assert_array_equal(state.verdict_counts, [8, 0, 0, 0, 0])
    assert update._cache_size() == 1


@pytest.mark.parametrize("reduction", ["mean_per_row", "sum"])
def test_other_reductions(reduction):
    tx, params = make(optax.sgd(1.0), reduction=reduction), make_params()
    state, batches = tx.init(params), [make_grads(seed) for seed in range(3)]
    step = jax.jit(tx.update)
    for grads in batches:
        updates, state = step(grads, state, params)
    expected = jax.tree.map(lambda *g: -np.sum(g, axis=0), *map(dense, batches))
    if reduction == "mean_per_row":
        expected["bias"] /= 3
        for name in ("items", "users"):
            rows = expected[name].shape[0]
            touched = sum(np.isin(np.arange(rows), g[name].indices) for g in batches)
            touched = np.maximum(touched, 1).reshape(-1, *[1] * (expected[name].ndim - 1))
            expected[name] = expected[name] / touched
    assert_close(dense(updates), expected, rtol=1e-6, atol=1e-7)


def test_the_inner_state_rests_until_enough_gradients_have_come():
    tx, params = make(optax.adam(0.1)), make_params()
    before, step = tx.init(params), jax.jit(tx.update)
    state = before
    for seed in range(2):
        updates, state = step(make_grads(seed), state, params)
        assert_same(state.inner_state, before.inner_state)
        assert_same(dense(updates), jax.tree.map(jnp.zeros_like, params))
        assert not np.any(updates["items"].row_mask)
    _, state = step(make_grads(2), state, params)
    assert state.inner_state[0].count == 1


@pytest.mark.parametrize(
    ("verdict", "bad"),
    [
        (Verdict.OVERFLOW, {"users": np.arange(13)}),
        (Verdict.INVALID, {"items": [1, ROWS + 1]}),
        (Verdict.INVALID, {"users": [1, 2 * ROWS + 1]}),
        (Verdict.INVALID, {"items": [1, -1], "users": np.arange(13)}),
        (Verdict.STALE, {"items": [1, -1]}),
    ],
)
def test_a_gradient_that_is_refused_changes_nothing(verdict, bad):
    tx, params = make(on_overflow="refuse"), make_params()
    state = dataclasses.replace(tx.init(params), global_step=jnp.int32(7))
    _, state = tx.update(make_grads(0), state, params)
    local_step = 6 if verdict == Verdict.STALE else 7
    update = jax.jit(functools.partial(tx.update, local_step=local_step))
    updates, after = update(make_grads(1, **bad), state, params)
    assert after.verdict == verdict
    counts = np.bincount([Verdict.ACCEPTED, verdict], minlength=5)
    np.testing.assert_array_equal(after.verdict_counts, counts)
    assert_same(dense(updates), jax.tree.map(jnp.zeros_like, params))

    def without_counts(state):
        return dataclasses.replace(state, verdict=0, verdict_counts=0, peak_rows=0)

    assert_same(without_counts(after), without_counts(state))


@pytest.mark.parametrize("full", ["items", "users"])
def test_any_of_several_tables_may_be_the_one_that_is_full(full):
    capacity = {"bias": None, "items": 12, "users": 12} | {full: 3}
    tx, params = make(capacity=capacity, on_overflow="refuse"), make_params()
    update = jax.jit(tx.update)
    _, state = update(make_grads(0, items=[0, 1], users=[0, 1]), tx.init(params), params)
    _, after = update(make_grads(1, items=[2, 3], users=[2, 3]), state, params)
    assert after.verdict == Verdict.OVERFLOW
    assert after.rows[0].num_rows.tolist() == [2, 2]
    assert_same(after.rows[0].row_index, state.rows[0].row_index)


def test_capacity_is_exact_over_gradients_and_frees_after_a_step():
    capacity = {"bias": None, "items": 4, "users": 3}
    tx, params = make(num_required=2, capacity=capacity, on_overflow="refuse"), make_params()
    update, state = jax.jit(tx.update), tx.init(params)
    verdicts = []
    for users in ([5, 6, 5, 22], [7, 5, 8, 6], [7, 5, 7, 6], [0, 1, 2, 1]):
        _, state = update(make_grads(0, [0, 1, 2, 3], users), state, params)
        verdicts.append(int(state.verdict))
    expected = [Verdict.ACCEPTED, Verdict.OVERFLOW, Verdict.ACCEPTED, Verdict.ACCEPTED]
    assert verdicts == expected
    assert (state.global_step, state.num_accumulated) == (1, 1)
    assert state.rows[0].num_rows.tolist() == [4, 3]


def test_one_table_judges_its_own_room():
    table = jnp.zeros((5, 1))
    tx = jaxaccum.accumulate(optax.sgd(1.0), 3, tables=True, capacity=2, on_overflow="refuse")
    update, state = jax.jit(tx.update), tx.init(table)
    for rows, verdict in (([1, 2], 0), ([1, 3], 2), ([-1, 1], 3), ([2, 2], 0), ([5, 1], 0)):
        grad = IndexedSlices(jnp.array(rows), jnp.ones((2, 1)), (5, 1))
        updates, state = update(grad, state, table)
        assert state.verdict == verdict
    np.testing.assert_allclose(-3 * updates.to_dense().ravel(), [0, 2, 3, 0, 0], rtol=1e-6)


def test_outside_of_jit_what_does_not_fit_raises():
    tx, params = make(capacity=3, on_overflow="refuse"), make_params()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"capacity \[3, 3\] has no room .* after 0 gradients"):
        tx.update(make_grads(0, items=[1, 2, 3, 4]), state, params)
    with pytest.raises(
        ValueError, match=rf"updates\['items'\] has indices outside .* {ROWS} rows: {ROWS + 1};"
    ):
        tx.update(make_grads(0, items=[ROWS + 1]), state, params)


@pytest.mark.parametrize("scan", in_breadth([False, True], {True}))
def test_it_composes_in_a_chain(scan):
    def chain(middle):
        lazy = jaxaccum.lazy_rows
        return optax.chain(lazy(optax.clip_by_global_norm(1.0)), middle, lazy(optax.scale(0.5)))

    tx = chain(make(optax.adagrad(0.1), num_required=2))
    peer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.MultiSteps(optax.adagrad(0.1), 2).gradient_transformation(),
        optax.scale(0.5),
    )
    batches = [make_grads(seed) for seed in range(4)]

    def run(tx, batches):
        @jax.jit
        def step(carry, grads):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (jaxaccum.apply_updates(carry[0], updates), state), None

        carry = (make_params(), tx.init(make_params()))
        if scan:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
            return jax.lax.scan(step, carry, stacked)[0][0]
        for grads in batches:
            carry, _ = step(carry, grads)
        return carry[0]

    assert_close(run(tx, batches), run(peer, list(map(dense, batches))), rtol=1e-5, atol=1e-6)


def test_lazy_rows_catch_up_inside():
    inner = optax.sgd(0.1, momentum=0.5)
    tx = make(jaxaccum.lazy_rows(inner, catch_up=True), num_required=1, capacity=2 * ROWS)
    params, expected = make_params(), make_params()
    state, expected_state = tx.init(params), inner.init(params)
    step, dense_step = jax.jit(tx.update), jax.jit(inner.update)
    for seed in range(4):
        # All rows in the end, and always as many, so that one compilation does.
        touched = 4 if seed < 3 else 2 * ROWS
        users = np.where(np.arange(2 * ROWS) < touched, np.arange(2 * ROWS), 2 * ROWS)
        items = np.minimum(users[:ROWS], ROWS)
        grads = make_grads(seed, items, users)
        updates, state = step(grads, state, params)
        params = jaxaccum.apply_updates(params, updates)
        updates, expected_state = dense_step(dense(grads), expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_close(params, expected, rtol=1e-5, atol=1e-6)


def test_sixteen_bit_gradients_accumulate_in_float32():
    tx, params = make(optax.sgd(1.0), num_required=3, reduction="sum"), make_params(jnp.bfloat16)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for value in (1.0, 2.0**-8, 2.0**-8):  # in bfloat16, 1 + 2**-8 is 1
        updates, state = step(
            {
                "bias": jnp.full(3, value, jnp.bfloat16),
                "items": IndexedSlices(
                    jnp.array([4]), jnp.full((1, WIDTH), value, jnp.bfloat16), (ROWS, WIDTH)
                ),
                "users": IndexedSlices(jnp.array([4]), jnp.full(1, value, jnp.bfloat16), (22,)),
            },
            state,
            params,
        )
    assert updates["items"].values.dtype == updates["bias"].dtype == jnp.bfloat16
    for leaf in (updates["bias"], updates["items"].values[0], updates["users"].values[:1]):
        np.testing.assert_array_equal(leaf.astype(jnp.float32), -1 - 2.0**-7)


@pytest.mark.parametrize("name", in_breadth(["sgd", "adam"], {"adam"}))
def test_a_donated_step_copies_no_table(name):
    rows, capacity, n = 50_021, 128, 64  # a number of rows that nothing else has
    inner = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.1)}[name]
    tx = jaxaccum.accumulate(inner, 4, tables={"a": True, "b": True, "c": False}, capacity=capacity)
    params = {"a": jnp.ones((rows, 2)), "b": jnp.ones((rows, 2)), "c": jnp.ones(3)}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, indices):
        grads = {
            name: IndexedSlices(indices, jnp.take(params[name], indices, axis=0), (rows, 2))
            for name in ("a", "b")
        }
        updates, state = tx.update({**grads, "c": params["c"]}, state, params)
        return jaxaccum.apply_updates(params, updates), state

    compiled = step.lower(params, tx.init(params), jnp.arange(n, dtype=jnp.int32)).compile()
    assert f"[{rows}" in compiled.as_text()
    assert not re.findall(rf"= \S*\[{rows}\S* copy\(.*", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < rows


def test_an_id_beyond_its_table_is_refused_whatever_row_count_the_gradient_claims():
    tx, table = jaxaccum.accumulate(optax.sgd(1.0), 1, tables=True, capacity=4), jnp.zeros((100, 1))
    grad = IndexedSlices(jnp.array([2_000_000_000, 5]), jnp.ones((2, 1)), (None, 1))
    state = tx.init(table)
    with pytest.raises(ValueError, match=r"updates has indices outside .* 100 rows: 2000000000;"):
        tx.update(grad, state, table)
    updates, state = jax.jit(tx.update)(grad, state, table)
    assert state.verdict == Verdict.INVALID
    assert not np.any(updates.row_mask)


@pytest.mark.parametrize("jit", in_breadth([False, True], {True}))
def test_a_table_of_no_rows(jit):
    tx, table = jaxaccum.accumulate(optax.adam(0.1), 1, tables=True, capacity=1), jnp.ones((0, 4))
    update = jax.jit(tx.update) if jit else tx.update
    grad = IndexedSlices(jnp.zeros(2, jnp.int32), jnp.ones((2, 4)), (0, 4))  # all padding
    updates, state = update(grad, tx.init(table), table)
    assert state.global_step == 1
    assert jaxaccum.apply_updates(table, updates).shape == (0, 4)


@pytest.mark.parametrize("jit", in_breadth([False, True], {False}))
def test_a_transform_that_keeps_a_typed_random_key(jit):
    tx = make(optax.chain(optax.add_noise(0.0, 0.5, jax.random.key(3)), optax.sgd(1.0)), 1)
    params, grads = make_params(), make_grads(0)
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    updates, after = update(grads, state, params)
    assert after.inner_state[0].rng_key != state.inner_state[0].rng_key
    assert_close(dense(updates), jax.tree.map(jnp.negative, dense(grads)), rtol=1e-6)


def test_counters_stay_at_the_top():
    tx, table = jaxaccum.accumulate(optax.sgd(1.0), 1, tables=True, capacity=4), jnp.zeros((3, 1))
    top, state = 2**31 - 1, tx.init(table)
    full = {"global_step": jnp.int32(top), "verdict_counts": jnp.full(5, top, jnp.int32)}
    grad = IndexedSlices(jnp.array([1]), jnp.ones((1, 1)), (3, 1))
    _, state = tx.update(grad, dataclasses.replace(state, **full), table)
    assert state.global_step == top
    np.testing.assert_array_equal(state.verdict_counts, np.full(5, top))


def test_more_rows_than_int32_can_number():
    """Three tables of a billion rows stand under two indexes; shapes alone, nothing is computed."""
    rows = 1_000_000_000
    tables = {name: jax.ShapeDtypeStruct((rows, 2), jnp.float32) for name in "abc"}
    tx = jaxaccum.accumulate(optax.sgd(0.1), 2, tables=True, capacity=5)
    state = jax.eval_shape(tx.init, tables)
    assert [pool.lengths for pool in state.rows] == [(rows, rows), (rows,)]
    ids = jax.ShapeDtypeStruct((3,), jnp.int32)
    values = jax.ShapeDtypeStruct((3, 2), jnp.float32)
    grads = {name: IndexedSlices(ids, values, (rows, 2)) for name in tables}
    updates, after = jax.eval_shape(tx.update, grads, state, tables)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert updates["c"].dense_shape == (rows, 2)


def test_two_indexes_are_one(monkeypatch):
    """The same steps, with tables under an index each."""
    params = make_params()

    def run():
        tx = make(optax.adam(0.1), num_required=2, capacity=5)
        update, state = jax.jit(tx.update), tx.init(params)
        results = []
        for seed in range(7):
            updates, state = update(make_grads(seed), state, params)
            results.append(updates)
        return len(state.rows), (results, state.verdict_counts, state.peak_rows, state.num_early)

    numbers, expected = run()
    monkeypatch.setattr(pooled_rows, "_MOST_ROWS", 2 * ROWS)
    others, actual = run()
    assert (numbers, others) == (1, 2)
    assert expected[-1] > 0
    assert_same(actual, expected)


@pytest.mark.cpu
def test_a_table_more_is_five_scatters_more():
    """Scatters are what takes long to compile: two of sums, two of moments, one of parameters."""

    def count(num_tables):
        tx = jaxaccum.accumulate(optax.adam(0.1), 2, tables=True, capacity=8)
        params = {f"table{k:02d}": jnp.zeros((50, 2)) for k in range(num_tables)}

        def step(params, state, ids):
            values = jnp.ones((*ids.shape, 2))
            grads = {name: IndexedSlices(ids, values, (50, 2)) for name in params}
            updates, state = tx.update(grads, state, params)
            return jaxaccum.apply_updates(params, updates), state

        args = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((4,), jnp.int32)
        return jax.jit(step).lower(*args).as_text().count('"stablehlo.scatter"')

    assert count(4) - count(3) == 5


def test_the_inner_transform_is_traced_once():
    calls = []

    def update(updates, state, params=None):
        calls.append(1)
        return updates, state

    tx = make(optax.GradientTransformation(lambda _: (), update))
    params = make_params()
    state = tx.init(params)
    calls.clear()  # of the trial
    jax.eval_shape(tx.update, make_grads(0), state, params)
    assert len(calls) == 1


class TestBadInput:
    def test_a_state_of_another_table(self):
        tx, params = make(), make_params()
        state, other = tx.init(params), {**params, "items": jnp.ones((ROWS + 1, WIDTH))}
        grads = make_grads(0)
        with pytest.raises(ValueError, match=r"params\['items'\] .*\(12, 2\).*sums\['items'\]"):
            tx.update(grads, state, other)
        grads["items"] = dataclasses.replace(grads["items"], dense_shape=(ROWS + 1, WIDTH))
        with pytest.raises(ValueError, match=r"updates\['items'\] .*\(12, 2\).*sums\['items'\]"):
            tx.update(grads, state)

    @pytest.mark.parametrize("outer", [optax.clip(1.0), optax.scale(0.5)])
    def test_a_transform_of_the_chain_that_turns_row_numbers_into_floats(self, outer):
        tx, params = optax.chain(outer, make()), make_params()
        with pytest.raises(TypeError, match=r"^optax\.\w+ takes the row numbers .*lazy_rows"):
            tx.update(make_grads(0), tx.init(params), params)

    def test_leaves_that_are_not_what_tables_says(self):
        tx, params = make(), make_params()
        grads, state = make_grads(0), tx.init(params)
        with pytest.raises(TypeError, match=r"updates\['items'\] is selected by tables"):
            tx.update(dense(grads), state, params)
        with pytest.raises(TypeError, match=r"updates\['bias'\] is an IndexedSlices"):
            tx.update({**grads, "bias": grads["users"]}, state, params)
        with pytest.raises(
            ValueError, match=r"updates\['bias'\] must have shape \(3,\), got \(2,\)"
        ):
            tx.update({**grads, "bias": jnp.ones(2)}, state, params)
        with pytest.raises(ValueError, match="updates must be a tree like the params"):
            tx.update({"items": grads["items"]}, state, params)

    def test_options(self):
        with pytest.raises(ValueError, match="num_required must be positive, got 0"):
            make(num_required=0)
        with pytest.raises(ValueError, match=r"on_overflow must be one of .*, got 'grow'"):
            make(on_overflow="grow")
        with pytest.raises(ValueError, match="max_staleness must not be negative, got -1"):
            make(max_staleness=-1)
        with pytest.raises(ValueError, match="capacity must match params"):
            make(capacity={"items": 3}).init(make_params())
        with pytest.raises(ValueError, match="reduction must be one of"):
            make(reduction="median").init(make_params())
        tx = jaxaccum.accumulate(optax.sgd(0.1), 2, tables=True, capacity=3)
        with pytest.raises(TypeError, match="floating-point"):
            tx.init(jnp.ones((3, 2), jnp.int32))

    def test_a_transform_that_couples_rows_is_refused_by_init(self):
        with pytest.raises(ValueError, match="row-separable"):
            make(optax.lamb(0.1)).init(make_params())
