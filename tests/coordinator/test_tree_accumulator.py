"""`TreeAccumulator`: one verdict for a whole model, policies for late gradients, what is kept."""

import asyncio
import itertools
import pickle
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import takers
import trees_by_hand

import jaxaccum
from jaxaccum._coordinator.staging import Stage

FUTURE = 1 << 40
ACCEPTED, STALE = jaxaccum.Verdict.ACCEPTED, jaxaccum.Verdict.STALE


def by_age(staleness):
    """A weight for each age, a power of two: so that sums are exact, and tell which was used."""
    return 1.0 / jnp.left_shift(jnp.int32(1), staleness).astype(jnp.float32)


POLICIES = {
    "reject stale": {},
    "bounded staleness": {"max_staleness": 2},
    "weights": {"max_staleness": 3, "staleness_weight": by_age},
    "exactly": {"exactly": True},
    "carry-over": {"carry_over": True},
    "carry-over and bound": {"carry_over": True, "max_staleness": 1},
    "all at once": {
        "carry_over": True,
        "max_staleness": 1,
        "exactly": True,
        "staleness_weight": by_age,
    },
}


def accumulator(**options):
    return jaxaccum.TreeAccumulator(trees_by_hand.like(), **options)


def gradient(seed=0):
    return trees_by_hand.draw_gradient(np.random.default_rng(seed))


def grads(seed=0):
    return trees_by_hand.as_grads(gradient(seed))


def snapshot(acc):
    """Everything a failed call must leave alone."""
    stats = acc.statistics()
    stats.pop("invalid")
    return stats, {name: array.tolist() for name, array in acc.state_dict().items()}


# Policies.


def policies_and_reductions():
    """All of one and some of the other; the rest with --full."""
    for policy, reduction in itertools.product(POLICIES, get_args(jaxaccum.Reduction)):
        is_first = reduction == "mean_per_gradient" or policy == "weights"
        yield pytest.param(policy, reduction, marks=[] if is_first else [pytest.mark.full])


@pytest.mark.parametrize(("policy", "reduction"), list(policies_and_reductions()))
def test_any_sequence_of_calls_agrees_with_the_oracle(policy, reduction):
    options = POLICIES[policy] | {"reduction": reduction}
    rng = np.random.default_rng(len(policy) + len(reduction))
    acc = accumulator(**options)
    weight = {"staleness_weight": lambda age: 0.5**age} if "staleness_weight" in options else {}
    expected = trees_by_hand.Oracle(**options | weight)
    num_taken, seen = 0, set()

    def apply():
        drawn, local_step = (
            trees_by_hand.draw_gradient(rng),
            expected.step - int(rng.integers(-1, 5)),
        )
        accepted = expected.apply(drawn, local_step)
        seen.add(accepted)
        verdict, step = acc.apply_grad(trees_by_hand.as_grads(drawn), local_step)
        assert verdict == (ACCEPTED if accepted else STALE)
        assert step == expected.step

    def take():
        nonlocal num_taken
        num_required = int(rng.integers(1, 4))
        mean = expected.take(num_required)
        if mean is None:
            with pytest.raises(jaxaccum.DeadlineExceededError):
                acc.take_grad(num_required, timeout=0)
            return
        num_taken += 1
        trees_by_hand.assert_same(acc.take_grad(num_required), mean)

    def set_step():
        expected.step += int(rng.integers(-1, 3))
        acc.set_global_step(expected.step)

    def reload():
        nonlocal acc
        resumed, stats = accumulator(**options), acc.statistics()
        assert stats["staleness"] == dict(sorted(expected.ages.items()))
        assert stats["stale"] == expected.num_stale
        expected.ages, expected.num_stale = {}, 0
        resumed.load_state_dict(acc.state_dict())
        acc.close()
        acc = resumed

    for _ in range(130):
        rng.choice([apply, take, set_step, reload], p=[0.66, 0.28, 0.03, 0.03])()
        assert acc.num_accumulated() == expected.num_accumulated
        assert acc.global_step == expected.step
    assert num_taken > 5
    assert seen == ({True} if options.get("carry_over") else {True, False})


def test_a_refused_worker_learns_where_the_others_are():
    acc = accumulator()
    assert acc.apply_grad(grads()) == jaxaccum.Applied(ACCEPTED, 0)
    acc.take_grad(1)
    acc.set_global_step(7)
    assert acc.apply_grad(grads(), 6) == (STALE, 7)
    assert acc.apply_grad({"not": "looked at"}, 6) == (STALE, 7)
    assert acc.num_accumulated() == 0


def test_what_is_carried_over_does_not_count(monkeypatch):
    """A step waits for as many fresh gradients as ever; the late ones are in its mean."""
    acc = accumulator(carry_over=True)
    acc.set_global_step(2)
    assert acc.apply_grad(grads(1), 0) == (ACCEPTED, 2)
    assert acc.num_accumulated() == 0
    taker = takers.Watch(monkeypatch).take(acc, 1)
    assert acc.apply_grad(grads(2), 1) == (ACCEPTED, 2)
    assert takers.waiting(acc) == [taker.waiter]
    acc.apply_grad(grads(3), 2)
    scales = [float(gradient(seed)["scale"]) for seed in (1, 2, 3)]
    np.testing.assert_allclose(taker.result()["scale"], np.mean(scales))
    stats = acc.statistics()
    assert (stats["accepted"], stats["carried"], stats["stale"]) == (3, 2, 0)


@pytest.mark.parametrize("reduction", ["mean_per_gradient", "mean_per_row"])
def test_gradients_may_weigh_nothing(reduction):
    """Alone they are a mean of zero, not of NaN; and nothing of the step before shows."""

    def weight(staleness):
        return jnp.where(staleness > 0, 0.0, 1.0)

    acc = accumulator(max_staleness=1, staleness_weight=weight, reduction=reduction)
    acc.apply_grad(grads(1), 0)
    np.testing.assert_array_equal(acc.take_grad(1)["bias"], gradient(1)["bias"])
    acc.apply_grad(grads(1), 0)
    mean = acc.take_grad(1)
    assert mean["bias"].tolist() == [0, 0, 0]
    assert not np.asarray(mean["items"].values).any()
    acc.apply_grad(grads(1), 1)
    acc.apply_grad(grads(2), 2)
    np.testing.assert_array_equal(acc.take_grad(2)["bias"], gradient(2)["bias"])


def test_exactly_as_many_as_asked_for_and_the_rest_stays(monkeypatch):
    acc = accumulator(exactly=True, reduction="sum")
    for seed in range(5):
        acc.apply_grad(grads(seed))
    watch = takers.Watch(monkeypatch)
    results = [watch.take(acc, n).result() for n in (2, 2)]
    last = watch.take(acc, 2)
    assert takers.waiting(acc) == [last.waiter]
    assert acc.num_accumulated() == 1
    assert acc.apply_grad(grads(5), 1) == (STALE, 2)
    assert acc.apply_grad(grads(5), 2) == (ACCEPTED, 3)
    for result, seeds in zip([*results, last.result()], [(0, 1), (2, 3), (4, 5)], strict=True):
        expected = sum(gradient(seed)["bias"] for seed in seeds)
        assert result["bias"].tolist() == expected.tolist()


def test_a_kept_gradient_is_our_own():
    """Whether it is small or large, NumPy's or JAX's: overwritten or donated, it stays."""
    for size, array in itertools.product((4, 1 << 15), (np.array, jnp.array)):
        acc = jaxaccum.TreeAccumulator(np.zeros(size, np.float32), exactly=True)
        given = array(np.ones(size, np.float32))
        acc.apply_grad(given)
        if array is np.array:
            given[:] = 7
        else:
            given.delete()
        assert acc.statistics()["kept_bytes"] == 4 * size
        np.testing.assert_array_equal(acc.take_grad(1), np.ones(size))


def test_what_a_dead_taker_left_goes_to_one_who_wants_as_many(monkeypatch):
    acc = accumulator(exactly=True)
    for seed in range(3):
        acc.apply_grad(grads(seed))

    def die(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(takers.Coordinator, "_collect", die)
        with pytest.raises(SystemExit):
            acc.take_grad(2)
    assert acc.statistics()["unclaimed"] == 1
    np.testing.assert_allclose(acc.take_grad(1)["bias"], gradient(2)["bias"])
    mean = (gradient(0)["bias"] + gradient(1)["bias"]) / 2
    np.testing.assert_allclose(acc.take_grad(2)["bias"], mean)


def test_staleness_is_told_of_all_and_of_each_worker():
    acc = accumulator(max_staleness=1)
    acc.set_global_step(5)
    for worker, local_step in [("a", 5), ("a", 4), ("b", 3), (None, 9), ("b", -(10**9))]:
        acc.apply_grad(grads(), local_step, worker=worker)
    with pytest.raises(jaxaccum.InvalidArgumentError):
        acc.apply_grad({}, 5, worker="b")
    stats = acc.statistics()
    assert stats["staleness"] == {0: 2, 1: 1, 2: 1, 1000: 1}
    assert stats["workers"] == {
        "a": {"accepted": 2, "stale": 0, "invalid": 0, "staleness": {0: 1, 1: 1}},
        "b": {"accepted": 0, "stale": 2, "invalid": 1, "staleness": {2: 1, 1000: 1}},
    }
    assert (stats["accepted"], stats["stale"], stats["invalid"]) == (3, 2, 1)


# All leaves or none.

BAD = {
    "index": ({"words": ([-1], np.ones((1, 4)))}, r"grads\['words'\]: .*negative"),
    "row count": ({"items": ([8], np.ones((1, 2)))}, r"grads\['items'\]: .* exceeded 7"),
    "row shape": ({"items": ([1], np.ones((1, 3)))}, r"\['items'\]: .*dim 1 to be 2, got 3"),
    "length": ({"items": ([1, 2], np.ones((1, 2)))}, r"\['items'\]: Expected 2 .* got 1"),
    "dense shape": ({"bias": np.ones(4)}, r"\['bias'\]: Shape mismatch: expected \[3\], got \[4\]"),
    "scalar": ({"scale": np.ones(1)}, r"\['scale'\]: Shape mismatch: expected \[\], got \[1\]"),
}


@pytest.mark.parametrize("exactly", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_gradient_that_is_bad_on_one_leaf_is_added_on_none(case, exactly):
    acc = accumulator(exactly=exactly)
    acc.apply_grad(grads())
    before = snapshot(acc)
    change, message = BAD[case]
    bad = gradient(1)
    for name, leaf in change.items():
        bad[name] = np.float32(leaf) if len(leaf) > 2 or isinstance(leaf, np.ndarray) else (
            np.array(leaf[0]), leaf[1].astype(np.float32))  # fmt: skip
    with pytest.raises(jaxaccum.InvalidArgumentError, match=message):
        acc.apply_grad(
            {
                name: jaxaccum.IndexedSlices(
                    *leaf, (trees_by_hand.SHAPES[name][0], *leaf[1].shape[1:])
                )
                if trees_by_hand.TABLES[name]
                else leaf
                for name, leaf in bad.items()
            }
        )
    assert snapshot(acc) == before
    acc.apply_grad(grads(1))
    expected = trees_by_hand.Oracle()
    expected.apply(gradient(), 0)
    expected.apply(gradient(1), 0)
    trees_by_hand.assert_same(acc.take_grad(2), expected.take(2))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "grads must be a tree like"),
        (grads() | {"more": 1.0}, "grads must be a tree like"),
        (grads() | {"bias": grads()["items"]}, r"grads\['bias'\]: must be an array"),
        (grads() | {"items": np.ones((7, 2))}, r"grads\['items'\]: must be an IndexedSlices"),
        (grads() | {"bias": np.ones(3)}, r"grads\['bias'\]: grad must be float32 .*float64"),
        (grads() | {"bias": np.ma.masked_array([1.0, 2, 3])}, "masked"),
    ],
)
def test_another_tree_is_refused(bad, message):
    acc = accumulator()
    with pytest.raises(jaxaccum.InvalidArgumentError, match=message):
        acc.apply_grad(bad)
    assert acc.num_accumulated() == 0


# Trees of every kind.


def test_it_is_made_like_parameters_or_like_gradients():
    params = {"table": np.zeros((5, 2), np.float32), "rest": [np.zeros(3, np.float32), None]}
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))

    def is_table(path, leaf):
        return "table" in jax.tree_util.keystr(path)

    table = jaxaccum.IndexedSlices(np.array([1, 5]), np.ones((2, 2), np.float32), (5, 2))
    given = {"table": table, "rest": [np.ones(3, np.float32), None]}
    for acc in (
        jaxaccum.TreeAccumulator(params, tables=is_table),
        jaxaccum.TreeAccumulator(shapes, tables={"table": True, "rest": False}),
        jaxaccum.TreeAccumulator(given),
    ):
        acc.apply_grad(given)
        taken = acc.take_grad(1, trim=True)
        assert taken["table"].indices.tolist() == [1]  # 5 is padding
        assert taken["rest"][0].tolist() == [1, 1, 1]
        assert taken["rest"][1] is None
    assert jax.tree.structure(taken) == jax.tree.structure(given)


def test_a_table_alone_is_the_class_of_one_table():
    """The same machinery: what one has saved the other loads, and takes to the last bit."""
    rng = np.random.default_rng(0)
    one = jaxaccum.SparseConditionalAccumulator("float32", (50, 3))
    acc = jaxaccum.TreeAccumulator(
        np.zeros((50, 3), np.float32), tables=True, reduction="mean_per_row"
    )
    for n in (3, 40, 0, 17):
        ids, rows = rng.integers(0, 50, n), rng.standard_normal((n, 3), np.float32)
        one.apply_grad(ids, rows)
        acc.apply_grad(jaxaccum.IndexedSlices(ids, rows, (50, 3)))
    acc.load_state_dict(acc.state_dict())
    saved = one.state_dict()
    assert saved.keys() == acc.state_dict().keys()
    taken = acc.take_grad(4, trim=True)
    expected = one.take_indexed_slices_grad(4)
    assert taken.indices.tolist() == expected.indices.tolist()
    assert np.asarray(taken.values).tobytes() == np.asarray(expected.values).tobytes()
    acc.load_state_dict(saved)
    again = acc.take_grad(4, trim=True)
    assert np.asarray(again.values).tobytes() == np.asarray(expected.values).tobytes()


def test_large_leaves_and_arrays_on_the_device_add_up_like_small_ones():
    """Dispatched one by one, staged, and some of each: in the order of arrival."""
    shape, rng = (1 << 15,), np.random.default_rng(0)
    acc = jaxaccum.TreeAccumulator(
        {"t": np.zeros((9, 2), np.float32), "d": np.zeros(shape, np.float32)},
        tables={"t": True, "d": False},
        reduction="sum",
    )
    total = {"t": np.zeros((9, 2), np.float32), "d": np.zeros(shape, np.float32)}
    for k in range(12):
        ids, rows = rng.integers(0, 9, 32), rng.integers(-5, 5, (32, 2)).astype(np.float32)
        dense = rng.integers(-5, 5, shape).astype(np.float32)
        np.add.at(total["t"], ids, rows)
        total["d"] += dense
        kind = (np.array, jnp.array)[k % 2]
        table = jaxaccum.IndexedSlices(kind(ids.astype(np.int32)), kind(rows), (9, 2))
        given = {"t": table, "d": kind(dense)}
        acc.apply_grad(given)
        if k % 2 == 0:
            rows[:], dense[:] = 99, 99  # the caller's own again
    taken = acc.take_grad(12)
    np.testing.assert_array_equal(taken["t"].to_dense(), total["t"])
    np.testing.assert_array_equal(taken["d"], total["d"])


def test_tables_grow_each_as_it_needs_and_shrink_again():
    acc = jaxaccum.TreeAccumulator(
        {"few": np.zeros((10**6, 1), np.float32), "many": np.zeros((10**6, 1), np.float32)},
        tables=True,
        capacity={"few": 8, "many": None},
        reduction="sum",
    )

    def step(k, num):
        ids = np.arange(num)
        acc.apply_grad(
            {
                "few": jaxaccum.IndexedSlices(ids[:3], np.ones((3, 1), np.float32), (10**6, 1)),
                "many": jaxaccum.IndexedSlices(ids, np.ones((num, 1), np.float32), (10**6, 1)),
            },
            k,
        )
        taken = acc.take_grad(1, trim=True)
        assert [taken[name].indices.shape[0] for name in ("few", "many")] == [3, num]

    step(0, 9000)
    before = acc.statistics()["capacity"]
    for k in range(1, 13):
        step(k, 5)
    after = acc.statistics()["capacity"]
    assert before["few"] == after["few"] == 8
    assert before["many"] > 9000
    assert after["many"] <= 4096


@pytest.mark.parametrize("policy", ["reject stale", "weights"])
def test_nothing_that_is_held_is_copied_to_add_to_it(policy):
    """Read off what XLA compiled: no copy of anything as large as a table, a capacity or a leaf."""
    like = {"t": np.zeros((5000, 7), np.float32), "d": np.zeros((1003, 11), np.float32)}
    tables = {"t": True, "d": False}
    acc = jaxaccum.TreeAccumulator(like, tables=tables, capacity=2048, **POLICIES[policy])
    table = jaxaccum.IndexedSlices(np.arange(32), np.ones((32, 7), np.float32), (5000, 7))
    given = like | {"t": table}
    acc.apply_grad(given)
    state = acc._core._accumulated
    gradient, leaves, programs = state.read(given), state._box[0], state._programs
    staged = Stage(gradient, acc._core.spec).arrays
    for lowered in (
        programs.apply.lower(leaves, *state._arguments(gradient, 0)),
        programs.apply_staged.lower(leaves, staged, np.int32(1)),
    ):
        text = lowered.compile().as_text()
        assert "[2048,7]" in text
        assert not re.findall(r"\[(?:5000|2048|1003)\b[^ ]* copy\(", text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_staleness": -1}, ValueError, "max_staleness must not be negative, got -1"),
        ({"staleness_weight": 0.5}, TypeError, "staleness_weight must be a function, got 0.5"),
        ({"reduction": "MEAN"}, ValueError, "reduction must be one of .* got 'MEAN'"),
        ({"capacity": {"items": 3}}, ValueError, "capacity must match like"),
        ({"capacity": 0}, ValueError, "capacity must be from 1"),
        ({"tables": {"items": True}}, ValueError, "tables must match"),
        ({"device": "cpu"}, TypeError, "device must be a device"),
    ],
)
def test_bad_constructor_arguments(options, error, message):
    with pytest.raises(error, match=message):
        accumulator(**options)


def test_trees_that_cannot_be():
    with pytest.raises(ValueError, match="like must have leaves"):
        jaxaccum.TreeAccumulator({"a": None})
    with pytest.raises(TypeError, match=r"staleness_weight needs floating-point .* int32"):
        jaxaccum.TreeAccumulator(np.zeros(3, np.int32), staleness_weight=by_age)
    with pytest.raises(TypeError, match="numeric"):
        jaxaccum.TreeAccumulator(np.zeros(3, bool))


# What handles of all kinds have in common.


def test_handles_share_a_tree_and_a_policy():
    first = accumulator(shared_name="model", max_staleness=1)
    second = accumulator(shared_name="model", max_staleness=1)
    first.apply_grad(grads(0))
    assert second.num_accumulated() == 1
    for other in ({"max_staleness": 2}, {"reduction": "sum", "max_staleness": 1}):
        with pytest.raises(ValueError, match=r"shared_name 'model'.*words"):
            accumulator(shared_name="model", **other)
    with pytest.raises(ValueError, match="shared_name 'model'"):
        jaxaccum.SparseConditionalAccumulator("float32", shared_name="model")
    with pytest.raises(TypeError, match="shared_name"):
        pickle.dumps(first)


def test_async_takers_and_closing():
    async def main():
        acc = accumulator()
        task = asyncio.create_task(acc.take_grad_async(1))
        while not takers.waiting(acc):
            await asyncio.sleep(0)
        acc.apply_grad(grads())
        taken = await task
        late = asyncio.create_task(acc.take_grad_async(1))
        while not takers.waiting(acc):
            await asyncio.sleep(0)
        acc.close()
        with pytest.raises(jaxaccum.CancelledError):
            await late
        return taken

    np.testing.assert_allclose(asyncio.run(main())["bias"], gradient()["bias"])


@pytest.mark.parametrize("policy", ["reject stale", "all at once"])
def test_npz_files_hold_a_model_in_the_middle_of_a_step(policy, tmp_path):
    params = {"deep": {"table": jnp.zeros((6, 2), jnp.bfloat16)}, "w": jnp.zeros(3, jnp.bfloat16)}
    options = POLICIES[policy] | {"tables": {"deep": True, "w": False}}
    acc, resumed = (jaxaccum.TreeAccumulator(params, **options) for _ in range(2))
    for step in (3, 2, 3):
        acc.set_global_step(3)
        rows = jnp.full((2, 2), step, jnp.bfloat16)
        table = jaxaccum.IndexedSlices(jnp.array([step, 1]), rows, (6, 2))
        acc.apply_grad({"deep": {"table": table}, "w": jnp.full(3, step, jnp.bfloat16)}, step)
    np.savez(tmp_path / "half.npz", **acc.state_dict())
    with np.load(tmp_path / "half.npz") as saved:
        resumed.load_state_dict(saved)
    ours, theirs = acc.take_grad(2), resumed.take_grad(2)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("exactly", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias/values": np.ones(3, np.float64)}, "float32"),
        ({"items/indices": np.array([7, 7, 7])}, "as many|from 0 to below 7|exceeded 7"),
        ({"bias/values": np.ones(4, np.float32)}, r"expected \[3\]"),
        ({"items/values": np.ones((3, 5), np.float32)}, "dim 1 to be 2, got 5"),
    ],
)
def test_what_does_not_fit_is_not_loaded(change, message, exactly):
    acc = accumulator(exactly=exactly)
    rows = jaxaccum.IndexedSlices(np.arange(3), np.ones((3, 2), np.float32), (7, 2))
    acc.apply_grad(grads() | {"items": rows})
    before = snapshot(acc)
    if exactly:  # each gradient has a name
        change = {f"0/{name}": array for name, array in change.items()}
    with pytest.raises(jaxaccum.InvalidArgumentError, match=message):
        acc.load_state_dict(acc.state_dict() | change)
    assert snapshot(acc) == before


def test_what_is_taken_trains_a_model():
    """Gradients of an unchanged loss function in, updates of lazy_rows out, both jitted."""
    optax = pytest.importorskip("optax")
    params = {"table": jnp.ones((8, 2)), "bias": jnp.zeros(2)}
    tables = {"table": True, "bias": False}

    def loss(params, ids):
        return jnp.sum((params["table"][ids] + params["bias"][None] - 3) ** 2)

    gradient_of = jax.jit(jaxaccum.value_and_sparse_grad(loss, tables=tables))
    tx = jaxaccum.lazy_rows(optax.sgd(0.1))

    @jax.jit
    def update(params, mean):
        updates, _ = tx.update(mean, tx.init(params), params)
        return jaxaccum.apply_updates(params, updates)

    batches = [jnp.array(ids) for ids in ([1, 2, 1], [2, 5, 7])]
    acc = jaxaccum.TreeAccumulator(params, tables=tables)
    for ids in batches:
        acc.apply_grad(gradient_of(params, ids)[1])
    trained = update(params, acc.take_grad(2))
    dense = [jax.grad(loss)(params, ids) for ids in batches]
    expected = jax.tree.map(lambda p, a, b: p - 0.1 * (a + b) / 2, params, *dense)
    for ours, theirs in zip(jax.tree.leaves(trained), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
