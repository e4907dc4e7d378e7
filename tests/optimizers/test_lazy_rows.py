"""``lazy_rows`` and ``apply_updates`` against dense optax, with untouched rows put back."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import in_breadth
from jax.experimental import checkify
from trees import assert_close, draw

import jaxaccum
from jaxaccum import IndexedSlices

ROWS, WIDTH = 13, 3
SCHEDULE = optax.exponential_decay(0.1, transition_steps=2, decay_rate=0.5)

SEPARABLE = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adagrad": optax.adagrad(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(SCHEDULE, weight_decay=0.1),
    "lion": optax.lion(0.1),
    "yogi": optax.yogi(0.1),
    "chain": optax.chain(optax.clip(0.5), optax.clip_by_global_norm(0.2), optax.adam(0.1)),
    "masked": optax.masked(optax.adam(0.1), {"bias": False, "table": True}),
    "partition": optax.partition(
        {"rows": optax.adagrad(0.1), "whole": optax.lamb(0.1)}, {"bias": "whole", "table": "rows"}
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "finite": optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=3),
}


def shampoo_left():
    """Keeps products of all pairs of rows."""

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros(2 * p.shape[:1]), params)

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def shampoo_right():
    """Multiplies by the inverse of a product over rows: rows of zeros leave it as it is."""

    def precondition(grad, param):
        del param
        return grad @ jnp.linalg.inv(jnp.eye(WIDTH) + grad.T @ grad) if grad.ndim == 2 else grad

    return optax.stateless_with_tree_map(precondition)


COUPLED = {
    "adafactor": (optax.adafactor(0.1), "depends on rows"),
    "adafactor, factored": (optax.adafactor(0.1, min_dim_size_to_factor=2), "one entry a row"),
    "lamb": (optax.lamb(0.1), "depends on rows"),
    "lars": (optax.lars(0.1), "depends on rows"),
    "muon": (optax.contrib.muon(0.1), "muon"),
    "shampoo, left": (shampoo_left(), "one entry a row"),
    "shampoo, right": (shampoo_right(), "mixes the entries"),
    "sm3": (optax.sm3(0.1), "statistic|mixes"),
    "prodigy": (optax.contrib.prodigy(), "statistic"),
    "dog": (optax.contrib.dog(), "statistic"),
    "l-bfgs": (optax.scale_by_lbfgs(), "one entry a row"),
    "global norm of params": (optax.scale_by_param_block_norm(), "depends on rows"),
}


# What jaxaccum does alone is tested under "strict" below.
pytestmark = pytest.mark.usefixtures("optax_promotes")


def make_params(seed=0, dtype=jnp.float32):
    return draw({"bias": (4,), "table": (ROWS, WIDTH)}, seed, dtype)


def make_grads(indices, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "bias": jnp.asarray(rng.normal(size=4), dtype),
        "table": IndexedSlices(
            jnp.asarray(indices, jnp.int32),
            jnp.asarray(rng.normal(size=(len(indices), WIDTH)), dtype),
            (ROWS, WIDTH),
        ),
    }


def dense(grads):
    """The gradients as ``jax.grad`` gives them, summed in NumPy."""
    slices = grads["table"]
    table = np.zeros((ROWS + 1, WIDTH), np.float32)
    np.add.at(table, np.asarray(slices.indices), np.asarray(slices.values, np.float32))
    return {"bias": grads["bias"], "table": jnp.asarray(table[:ROWS], slices.values.dtype)}


def put_back(touched, new, old):
    """``new``, with the rows of ``old`` where a leaf has rows and they are not ``touched``."""

    def leaf(after, before):
        if after.ndim == 0 or after.shape[0] != ROWS:
            return after
        return jnp.where(touched.reshape(-1, *[1] * (after.ndim - 1)), after, before)

    return jax.tree.map(leaf, new, old)


def jitted(tx):
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return jaxaccum.apply_updates(params, updates), state

    return jax.jit(step)


BATCHES = ([4, 1, 4, ROWS], [7, 7, 2, 1], [ROWS, 1, 0, 12], [ROWS] * 4)


@pytest.mark.parametrize("name", in_breadth(SEPARABLE, {"adamw", "chain", "partition"}))
def test_touched_rows_get_what_the_dense_transform_gives_them(name):
    tx = SEPARABLE[name]
    lazy = jaxaccum.lazy_rows(tx)
    step, params, state = jitted(lazy), make_params(), lazy.init(make_params())
    expected, expected_state = params, tx.init(params)
    for seed, batch in enumerate(BATCHES):
        grads = make_grads(batch, seed)
        before, before_state = params, state
        params, state = step(grads, state, params)
        touched = np.isin(np.arange(ROWS), batch)
        updates, new_state = tx.update(dense(grads), expected_state, expected)
        new = optax.apply_updates(expected, updates)
        expected = put_back(touched, new, expected)
        expected_state = put_back(touched, new_state, expected_state)
        assert_close(params, expected, rtol=2e-5, atol=1e-6)
        assert_close(state, expected_state, rtol=2e-5, atol=1e-6)
        with_old_rows = put_back(touched, (params, state), (before, before_state))
        assert_close((params, state), with_old_rows, rtol=0)


@pytest.mark.parametrize("name", ["adam", "partition", "inject_hyperparams"])
def test_with_every_row_touched_it_is_the_dense_transform(name):
    tx, params = SEPARABLE[name], make_params()
    lazy = jaxaccum.lazy_rows(tx)
    grads = make_grads(np.random.default_rng(1).permutation(ROWS))
    updates, state = jax.jit(lazy.update)(grads, lazy.init(params), params)
    expected, expected_state = jax.jit(tx.update)(dense(grads), tx.init(params), params)
    assert_close(dense(updates), expected, rtol=1e-6, atol=0)
    assert_close(state, expected_state, rtol=1e-6, atol=0)


def test_a_zero_gradient_touches_its_row():
    tx = jaxaccum.lazy_rows(optax.sgd(1.0, momentum=0.5))
    table = jnp.zeros((4, 1))
    state = tx.init(table)
    for value in (1.0, 0.0):
        grad = IndexedSlices(jnp.array([2]), jnp.array([[value]]), (4, 1))
        updates, state = tx.update(grad, state, table)
        table = jaxaccum.apply_updates(table, updates)
    np.testing.assert_array_equal(table.ravel(), [0, 0, -1.5, 0])


@pytest.mark.parametrize("name", COUPLED)
def test_a_transform_that_couples_rows_is_refused_with_the_reason(name):
    tx, reason = COUPLED[name]
    lazy, params = jaxaccum.lazy_rows(tx), make_params()
    with pytest.raises(ValueError, match=f"row-separable, but .*({reason})"):
        jax.eval_shape(lazy.update, make_grads([1]), lazy.init(params), params)


def test_norms_run_over_the_touched_rows_of_all_tables():
    tx = jaxaccum.lazy_rows(optax.clip_by_global_norm(1.0))
    params = {"a": jnp.ones((5, 1)), "b": jnp.ones((6, 1))}
    grads = {
        "a": IndexedSlices(jnp.array([1, 1]), jnp.array([[1.0], [2.0]]), (5, 1)),
        "b": IndexedSlices(jnp.array([6, 3]), jnp.array([[50.0], [4.0]]), (6, 1)),
    }
    updates, _ = tx.update(grads, tx.init(params), params)
    new = jaxaccum.apply_updates(params, updates)
    np.testing.assert_allclose(new["a"].ravel(), [1, 1.6, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(new["b"].ravel(), [1, 1, 1, 1.8, 1, 1], rtol=1e-6)


def test_two_tables_of_one_size_keep_their_state_apart():
    tx = jaxaccum.lazy_rows(optax.adagrad(0.5, initial_accumulator_value=0.0))
    params = [jnp.zeros((5, 2)), jnp.zeros((5, 2))]
    grads = [IndexedSlices(jnp.array([i]), jnp.full((1, 2), i + 2.0), (5, 2)) for i in (0, 3)]
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    sums = state[0].sum_of_squares
    np.testing.assert_allclose(sums[0][:, 0], [4, 0, 0, 0, 0])
    np.testing.assert_allclose(sums[1][:, 0], [0, 0, 0, 25, 0])


def test_a_learning_rate_of_the_surrounding_trace():
    params = make_params()

    def step(rate):
        tx = jaxaccum.lazy_rows(optax.sgd(rate))
        updates, _ = tx.update(make_grads([3]), tx.init(params), params)
        return jaxaccum.apply_updates(params, updates)["table"][3]

    rates = jnp.array([0.0, 0.5])
    moved = jax.jit(jax.vmap(step))(rates) - params["table"][3][None]
    expected = -rates[:, None] * make_grads([3])["table"].values
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_it_stays_itself_under_jit_and_scan(scan):
    tx, params = jaxaccum.lazy_rows(optax.adam(0.1)), make_params()
    batches = [make_grads(batch, seed) for seed, batch in enumerate(BATCHES)]
    expected = (params, tx.init(params))
    for grads in batches:
        updates, state = tx.update(grads, expected[1], expected[0])
        expected = (jaxaccum.apply_updates(expected[0], updates), state)
    step = jitted(tx)
    carry = (params, tx.init(params))
    if scan:
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
        carry, _ = jax.lax.scan(lambda c, g: (step(g, c[1], c[0]), None), carry, stacked)
    else:
        for grads in batches:
            carry = step(grads, carry[1], carry[0])
        assert step._cache_size() == 1
    assert_close(carry, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", in_breadth(["adam", "adamw", "chain"], {"adamw"}))
def test_a_donated_step_copies_no_table(name):
    rows, n = 50_021, 64  # a size that nothing else has
    tx = jaxaccum.lazy_rows(SEPARABLE[name])
    params = {"bias": jnp.ones(4), "table": jnp.ones((rows, 2))}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, indices):
        values = jnp.take(params["table"], indices, axis=0)
        grads = {
            "bias": params["bias"],
            "table": IndexedSlices(indices, values, (rows, 2)),
        }
        updates, state = tx.update(grads, state, params)
        return jaxaccum.apply_updates(params, updates), state

    compiled = step.lower(params, tx.init(params), jnp.arange(n, dtype=jnp.int32)).compile()
    assert f"{rows}" in compiled.as_text()
    assert not re.findall(rf"= \S*\[{rows}\S* copy\(.*", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < rows * 4


BY_POSITION = {
    "freezes the first row": lambda x: x.at[0].set(0),
    "freezes the last row": lambda x: x.at[-1].set(0),
    "a rate by position": lambda x: x * jnp.arange(x.shape[0])[:, None],
    "minus the first row": lambda x: x - x[:1],
    "running sums": lambda x: jnp.cumsum(x, axis=0),
    # Rows beyond those of any trial.
    "freezes the eighth row": lambda x: x.at[7].set(0),
    "freezes a thousand rows": lambda x: jnp.where((jnp.arange(len(x)) < 1000)[:, None], 0, x),
    "freezes rows of a list": lambda x: x.at[jnp.array([9, 6])].multiply(0),
    "writes a row": lambda x: jax.lax.dynamic_update_slice(x, x[:1] * 0, (8, 0)),
}


@pytest.mark.parametrize("name", BY_POSITION)
def test_a_transform_that_treats_rows_by_position_is_refused(name):
    tx = jaxaccum.lazy_rows(optax.stateless_with_tree_map(lambda g, _: BY_POSITION[name](g)))
    table = jnp.ones((ROWS, WIDTH))
    grad = IndexedSlices(jnp.array([5]), jnp.ones((1, WIDTH)), (ROWS, WIDTH))
    with pytest.raises(ValueError, match=r"row-separable, but .*(position|depends).*"):
        jax.eval_shape(tx.update, grad, tx.init(table), table)


def test_what_a_transform_keeps_for_each_row_may_come_from_its_number():
    def init(table):
        return jnp.arange(table.shape[0], dtype=jnp.float32)

    def update(updates, state, params=None):
        return updates * state[:, None], state

    tx = jaxaccum.lazy_rows(optax.GradientTransformation(init, update))
    table = jnp.ones((ROWS, WIDTH))
    grad = IndexedSlices(jnp.array([5, 2]), jnp.ones((2, WIDTH)), (ROWS, WIDTH))
    updates, _ = tx.update(grad, tx.init(table), table)
    np.testing.assert_array_equal(updates.to_dense()[[5, 2], 0], [5, 2])


FROZEN = {"bias": None, "table": [0, 7]}


class TestFreezeRows:
    @pytest.mark.parametrize("catch_up", [False, True])
    def test_frozen_rows_are_left_alone_and_the_others_are_not(self, catch_up):
        lazy = jaxaccum.lazy_rows(optax.adamw(0.1, weight_decay=0.5), catch_up=catch_up)
        tx = optax.chain(jaxaccum.freeze_rows(FROZEN), lazy)
        peer, batches = jitted(lazy), ([0, 1, 7, 1], [2, 7, 0, 1])
        step, params = jitted(tx), make_params()
        state, without, its_state = tx.init(params), params, lazy.init(params)
        for seed, batch in enumerate(batches):
            grads = make_grads(batch, seed)
            params, state = step(grads, state, params)
            kept = np.where(np.isin(batch, [0, 7]), ROWS, batch)
            grads["table"] = IndexedSlices(jnp.asarray(kept), grads["table"].values, (ROWS, WIDTH))
            without, its_state = peer(grads, its_state, without)
        assert_close((params, state[1]), (without, its_state), rtol=1e-6)
        start = make_params()["table"]
        changed = np.any(np.asarray(params["table"] != start), axis=1)
        assert list(np.flatnonzero(changed)) == [1, 2]

    def test_wrong_rows_are_named(self):
        params, grads = make_params(), make_grads([1])
        with pytest.raises(ValueError, match=rf"rows\['table'\] must be rows .* 0 to {ROWS}"):
            jaxaccum.freeze_rows({"bias": None, "table": [0, ROWS]}).init(params)
        with pytest.raises(TypeError, match=r"rows\['table'\] must be a list of ints"):
            jaxaccum.freeze_rows({"bias": None, "table": [0.5]}).init(params)
        with pytest.raises(ValueError, match="rows must be a tree like the params"):
            jaxaccum.freeze_rows({"table": [0]}).init(params)
        tx = jaxaccum.freeze_rows(FROZEN)
        with pytest.raises(TypeError, match=r"updates\['table'\] has frozen rows"):
            tx.update(dense(grads), tx.init(params), params)


class TestApplyUpdates:
    @pytest.mark.parametrize("jit", [False, True])
    def test_narrow_updates_of_one_row_are_summed_in_float32(self, jit):
        n = 3_000
        updates = IndexedSlices(
            jnp.full(n, 2, jnp.int32), jnp.full((n, 1), 2.0**-8, jnp.bfloat16), (4, 1)
        )
        apply = jax.jit(jaxaccum.apply_updates) if jit else jaxaccum.apply_updates
        table = apply(jnp.zeros((4, 1), jnp.bfloat16), updates)
        exact = jnp.bfloat16(n * 2.0**-8)
        np.testing.assert_array_equal(table.ravel(), jnp.array([0, 0, exact, 0], jnp.bfloat16))

    def test_repeated_rows_add_up_and_padding_is_skipped(self):
        updates = IndexedSlices(jnp.array([2, 4, 2]), jnp.array([[1.0], [9.0], [2.0]]), (4, 1))
        table = jaxaccum.apply_updates(jnp.ones((4, 1)), updates)
        np.testing.assert_array_equal(table.ravel(), [1, 1, 4, 1])

    def test_a_wider_update_is_rounded_once(self):
        table = jnp.ones((4, 1), jnp.bfloat16)
        third = jnp.full((3, 1), 0.75 * 2.0**-8)  # alone each would be rounded away
        with jax.numpy_dtype_promotion("strict"):
            updates = IndexedSlices(jnp.array([2, 0, 2]), third, (4, 1))
            new = jaxaccum.apply_updates(
                {"t": table, "frozen": None}, {"t": updates, "frozen": None}
            )
        assert new["t"].dtype == jnp.bfloat16
        assert new["frozen"] is None
        np.testing.assert_array_equal(new["t"].astype(jnp.float32).ravel(), [1, 1, 1 + 2.0**-7, 1])

    def test_dense_leaves_are_optax_own(self):
        params, updates = make_params(dtype=jnp.bfloat16), dense(make_grads([1]))
        new = jaxaccum.apply_updates(params, updates)
        expected = optax.apply_updates(params, updates)
        assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, expected)
        assert_close(new, expected, rtol=0)

    def test_updates_scaled_outside_of_lazy_rows_are_refused(self):
        tx = optax.chain(jaxaccum.lazy_rows(optax.sgd(0.1)), optax.scale(0.5))
        params = make_params()
        with pytest.raises(TypeError, match=r"^optax\.scale takes the row numbers .*lazy_rows"):
            tx.update(make_grads([1]), tx.init(params), params)

    def test_a_chain_of_lazy_transforms_composes(self):
        params = make_params()
        tx = optax.chain(
            *map(jaxaccum.lazy_rows, (optax.clip(0.1), optax.sgd(0.1), optax.scale(2.0)))
        )
        updates, _ = tx.update(make_grads([1, 1]), tx.init(params), params)
        expected = -0.2 * np.clip(np.asarray(make_grads([1, 1])["table"].values).sum(0), -0.1, 0.1)
        np.testing.assert_allclose(dense(updates)["table"][1], expected, rtol=1e-6)


def test_it_advises_where_a_dense_update_is_faster():
    rows = 2**14
    tx, table = jaxaccum.lazy_rows(optax.sgd(0.1)), jax.ShapeDtypeStruct((rows, 64), jnp.float32)

    def update(n):
        grad = IndexedSlices(
            jax.ShapeDtypeStruct((n,), jnp.int32),
            jax.ShapeDtypeStruct((n, 64), jnp.float32),
            (rows, 64),
        )
        jax.eval_shape(tx.update, grad, jax.eval_shape(tx.init, table), table)

    update(rows // 4 - 1)
    with pytest.warns(UserWarning, match=f"may touch {rows // 4} of {rows} rows: .* dense"):
        update(rows // 4)
    update(rows // 4)  # once is enough


class TestBadInput:
    def test_an_id_beyond_a_table_whose_gradient_knows_no_row_count(self):
        tx, table = jaxaccum.lazy_rows(optax.sgd(1.0)), jnp.zeros((100, 1))
        ids = jnp.array([2_000_000_000, 5, -3, 2**31 - 1])
        grad = IndexedSlices(ids, jnp.ones((4, 1)), (None, 1))
        message = "updates has indices outside of its table of 100 rows: -3, 2000000000;"
        with pytest.raises(ValueError, match=message):
            tx.update(grad, tx.init(table), table)
        with pytest.raises(ValueError, match=message):
            jaxaccum.apply_updates(table, grad)

        @jax.jit
        def step(grad, table):
            updates, _ = tx.update(grad, tx.init(table), table)
            count = jaxaccum.count_invalid(grad, table)
            return jaxaccum.apply_updates(table, updates), count

        new, count = step(grad, table)
        assert count == 2
        np.testing.assert_array_equal(new.ravel(), -1.0 * (np.arange(100) == 5))
        error, _ = checkify.checkify(step)(grad, table)
        assert "index outside of its 100 rows" in error.get()

    @pytest.mark.parametrize("catch_up", [False, True])
    def test_a_state_of_another_row_count(self, catch_up):
        tx = jaxaccum.lazy_rows(optax.adam(0.1), catch_up=catch_up)
        params, small = make_params(), {**make_params(), "table": jnp.ones((ROWS // 2, WIDTH))}
        message = rf"state\S*\['table'\] of shape \({ROWS // 2},.*\), expected \({ROWS},.*\)"
        with pytest.raises(ValueError, match=message):
            tx.update(make_grads([1]), tx.init(small), params)

    def test_index_out_of_range(self):
        tx, params = jaxaccum.lazy_rows(optax.sgd(0.1)), make_params()
        for index in (-1, ROWS + 1):
            grads = make_grads([1, index])
            with pytest.raises(
                ValueError, match=rf"updates\['table'\] has indices .* {ROWS} rows: {index};"
            ):
                tx.update(grads, tx.init(params), params)
            with pytest.raises(ValueError, match="indices"):
                jaxaccum.apply_updates(params, grads)
            error, (params_after, _) = checkify.checkify(jitted(tx))(grads, tx.init(params), params)
            assert "index outside" in error.get()
            changed = np.any(params_after["table"] != params["table"], axis=1)
            assert list(np.flatnonzero(changed)) == [1]

    @pytest.mark.parametrize(
        ("shape", "message"),
        [((ROWS, WIDTH + 1), "rows of shape"), ((ROWS + 1, WIDTH), f"{ROWS + 1} rows, .* {ROWS}")],
    )
    def test_a_gradient_of_another_shape(self, shape, message):
        tx, params = jaxaccum.lazy_rows(optax.sgd(0.1)), make_params()
        grad = IndexedSlices(jnp.array([1]), jnp.ones((1, *shape[1:])), shape)
        grads = {"bias": params["bias"], "table": grad}
        with pytest.raises(ValueError, match=rf"updates\['table'\] has {message}"):
            tx.update(grads, tx.init(params), params)

    def test_trees_that_differ(self):
        tx, params = jaxaccum.lazy_rows(optax.adam(0.1)), make_params()
        state, grads = tx.init(params), make_grads([1])
        with pytest.raises(ValueError, match="updates and params must be trees alike"):
            tx.update({"table": grads["table"]}, state, params)
        with pytest.raises(ValueError, match="state must be what init returned"):
            tx.update(grads, (), params)

    def test_unknown_row_count_needs_params(self):
        tx = jaxaccum.lazy_rows(optax.sgd(0.1))
        grad = IndexedSlices(jnp.array([1]), jnp.ones((1, 2)), (None, 2))
        with pytest.raises(ValueError, match="params must be given"):
            tx.update(grad, tx.init(jnp.ones((3, 2))))
        updates, _ = tx.update(grad, tx.init(jnp.ones((3, 2))), jnp.ones((3, 2)))
        assert updates.dense_shape == (3, 2)

    def test_multi_steps_inside(self):
        tx = jaxaccum.lazy_rows(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
        params = make_params()
        with pytest.raises(ValueError, match=r"jaxaccum\.accumulate"):
            tx.update(make_grads([1]), tx.init(params), params)

    def test_optax_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "optax", None)
        for build in (
            lambda: jaxaccum.lazy_rows(None),
            lambda: jaxaccum.accumulate(None, 1, tables=True, capacity=1),
        ):
            with pytest.raises(ImportError, match=r"needs optax: pip install 'jaxaccum\[optax\]'"):
                build()
