"""`all_merge` and `all_take` on eight devices: refusals, repetitions, bits, bytes, wrong calls."""

import re

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from breadth import in_breadth
from devices import NUM_DEVICES, bits, copies, device, on_devices, spread
from jax.sharding import PartitionSpec

import jaxaccum
from jaxaccum import IndexedSlices, Verdict

ROWS, CAPACITY = 24, 14


def filled(axis_name, ids, values, rows=ROWS, capacity=CAPACITY, **options):
    """An accumulator that has seen one gradient, of ids below 0 nothing."""
    padding = 2**31 - 1 if rows is None else rows
    grad = IndexedSlices(jnp.where(ids < 0, padding, ids), values, (rows, *values.shape[1:]))
    state = jaxaccum.init(grad.dense_shape, values.dtype, capacity=capacity, **options)
    return jaxaccum.apply(state, grad)[0]


def run(program, *args, way="shard_map"):
    return on_devices(program, way)(*spread(args, way))


def disjoint_ids(count):
    """Two rows for each of the first devices until there are ``count``, none for the others."""
    ids = np.full(2 * NUM_DEVICES, -1, np.int32)
    ids[:count] = np.arange(count)
    return ids.reshape(NUM_DEVICES, 2)


def held(state):
    used = int(state.num_rows)
    rows = zip(state.indices[:used].tolist(), state.values[:used], state.counts[:used], strict=True)
    return {row: (value.tolist(), int(count)) for row, value, count in rows}


@pytest.mark.parametrize("exchange", ["rows", "dense"])
@pytest.mark.parametrize("count", [14, 15])
def test_capacity_is_exact_and_refusal_alike_and_harmless(exchange, count):
    def program(axis_name, ids, values):
        before = filled(axis_name, ids, values)
        return before, *jaxaccum.all_merge(before, axis_name, exchange=exchange)

    values = np.arange(4 * NUM_DEVICES, dtype=np.float32).reshape(NUM_DEVICES, 2, 2)
    before, after, verdict = run(program, disjoint_ids(count), values)
    assert (np.asarray(verdict) == (Verdict.ACCEPTED if count == 14 else Verdict.OVERFLOW)).all()
    for i in range(NUM_DEVICES):
        old, new = device(before, i), device(after, i)
        if count == 14:
            assert held(new) == {r: (values.reshape(-1, 2)[r].tolist(), 1) for r in range(14)}
            assert new.num_accumulated == NUM_DEVICES
            assert bits(new) == bits(device(after, 0))
        else:
            changed = {name for name, leaf in bits(old).items() if leaf != bits(new)[name]}
            assert changed == {".verdict_counts", ".shared_verdicts"}
            assert new.verdict_counts.tolist() == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("rows", in_breadth([ROWS, None], {ROWS}))
def test_refused_merges_lose_nothing(rows):
    """Too many rows for the capacity, then for max_rows: grown, all are there."""

    def refuse(axis_name, ids, values):
        state = filled(axis_name, ids, values, rows, capacity=2)
        state, first = jaxaccum.all_merge(state, axis_name, exchange="rows")
        state, second = jaxaccum.all_merge(state, axis_name, max_rows=1, exchange="rows")
        return state, jnp.stack([first, second])

    values = np.arange(4 * NUM_DEVICES, dtype=np.int32).reshape(NUM_DEVICES, 2, 2)
    states, verdicts = run(refuse, disjoint_ids(10), values)
    assert (np.asarray(verdicts) == Verdict.OVERFLOW).all()
    grown = [jaxaccum.grow(device(states, i), 10) for i in range(NUM_DEVICES)]
    grown = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *grown)
    merge = on_devices(lambda axis, s: jaxaccum.all_merge(s, axis, max_rows=2), "shard_map")
    states, verdict = merge(spread(grown, "shard_map"))
    assert (np.asarray(verdict) == Verdict.ACCEPTED).all()
    for i in range(NUM_DEVICES):
        state = device(states, i)
        assert held(state) == {r: (values.reshape(-1, 2)[r].tolist(), 1) for r in range(10)}
        assert state.verdict_counts.tolist() == [NUM_DEVICES, 0, 2, 0, 0]


def test_the_latest_step_is_kept():
    def program(axis_name, ids, values):
        state = filled(axis_name, ids, values)
        state = jaxaccum.set_step(state, 3 - jax.lax.axis_index(axis_name).astype(jnp.int32))
        merged, _ = jaxaccum.all_merge(state, axis_name)
        taken, _, _, _ = jaxaccum.all_take(state, axis_name)
        return merged.global_step, taken.global_step

    steps = run(program, disjoint_ids(4), np.ones((NUM_DEVICES, 2, 1), np.float32))
    assert np.array_equal(steps, [[3] * NUM_DEVICES, [4] * NUM_DEVICES])


def test_max_rows_is_exact():
    def program(axis_name, ids, values):
        state = filled(axis_name, ids, values)
        verdicts = [
            jaxaccum.all_merge(state, axis_name, max_rows=k, exchange="rows")[1] for k in (1, 2)
        ]
        return jnp.stack(verdicts)

    verdicts = run(program, disjoint_ids(4), np.ones((NUM_DEVICES, 2, 1), np.float32))
    assert (np.asarray(verdicts) == [Verdict.OVERFLOW, Verdict.ACCEPTED]).all()


@pytest.mark.parametrize("exchange", in_breadth(["rows", "dense"], {"rows"}))
def test_what_is_merged_is_not_merged_again(exchange):
    """Refused, with or without more on top; after a take all goes on, counts and all."""

    def program(axis_name, ids, values):
        def merge(state):
            return jaxaccum.all_merge(state, axis_name, exchange=exchange)

        once, _ = merge(filled(axis_name, ids, values))
        twice, second = merge(once)
        # Only the first device accumulates on top, yet all refuse.
        more = jnp.where(jax.lax.axis_index(axis_name) == 0, ids, ROWS)
        grad = IndexedSlices(more, values, (ROWS, *values.shape[1:]))
        on_top = jaxaccum.apply(twice, grad, jax.lax.axis_index(axis_name).astype(jnp.int32) * -1)
        refused, third = merge(on_top[0])
        taken, _, _ = jaxaccum.take(refused)
        again, fourth = merge(jaxaccum.apply(taken, grad)[0])
        return once, twice, refused, again, jnp.stack([second, third, fourth])

    values = np.ones((NUM_DEVICES, 2, 1), np.float32)
    once, twice, refused, again, verdicts = run(program, disjoint_ids(4), values)
    expected = [Verdict.INVALID, Verdict.INVALID, Verdict.ACCEPTED]
    assert (np.asarray(verdicts) == expected).all()
    before, after = bits(once), bits(twice)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {".verdict_counts", ".shared_verdicts"}
    # Eight gradients; one more and seven stale ones by themselves; two refusals; eight more.
    for i in range(NUM_DEVICES):
        own = [1, 0] if i == 0 else [0, 1]
        counts = device(refused, i).verdict_counts.tolist()
        assert counts == [8 + own[0], own[1], 0, 2, 0]
        assert device(again, i).verdict_counts.tolist() == [8 + 1 + 8, 7, 0, 2, 0]
        assert device(again, i).num_accumulated == 8


@pytest.mark.parametrize("exchange", ["rows", "dense"])
def test_floats_agree_with_one_device_to_rounding_and_with_each_other_in_every_bit(exchange):
    rng = np.random.default_rng(5)
    ids = rng.integers(0, ROWS, (NUM_DEVICES, 40)).astype(np.int32)
    values = (rng.standard_normal((NUM_DEVICES, 40, 3)) * 10.0 ** rng.integers(-3, 4)).astype("f4")

    def program(axis_name, ids, values):
        state = filled(axis_name, ids, values, capacity=ROWS)
        merged, _ = jaxaccum.all_merge(state, axis_name, exchange=exchange)
        _, taken, _, _ = jaxaccum.all_take(state, axis_name, exchange=exchange)
        return merged, taken

    merged, taken = run(program, ids, values)
    assert len({str(bits(device((merged, taken), i))) for i in range(NUM_DEVICES)}) == 1
    state = jaxaccum.init((ROWS, 3), capacity=ROWS)
    for i in range(NUM_DEVICES):
        state, _ = jaxaccum.apply(state, IndexedSlices(ids[i], values[i], (ROWS, 3)))
    merged_grad = jaxaccum.take(jax.tree.map(jnp.asarray, device(merged, 0)))[1]
    expected = jaxaccum.take(state)[1]
    # 40 terms or so: half a unit in the last place each, of the sum of magnitudes.
    bound = 40 * np.finfo(np.float32).eps * np.abs(values).max()
    for grad in (merged_grad, device(taken, 0)):
        assert (np.asarray(grad.indices) == np.asarray(expected.indices)).all()
        np.testing.assert_allclose(grad.values, expected.values, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "dtype",
    ["int8", "bfloat16"]
    + [pytest.param(d, marks=pytest.mark.full) for d in ("uint16", "float16", "complex64")],
)
def test_dtypes_and_reductions(dtype):
    reductions = ("mean_per_row", "mean_per_gradient", "sum")

    def program(axis_name, ids, values):
        # Small integers: exact in every dtype.
        values, out = values.astype(dtype), []
        for reduction in reductions:
            state = filled(axis_name, ids, values, reduction=reduction)
            for exchange in ("rows", "dense"):
                out.append(jaxaccum.all_take(state, axis_name, exchange=exchange)[1])
        return out

    ids = np.tile(np.array([3, 5], np.int32), (NUM_DEVICES, 1))
    ids[4:, 1] = -1
    results = run(program, ids, np.tile(np.array([[2], [12]], np.int32), (NUM_DEVICES, 1, 1)))
    sums = {"mean_per_row": [2, 12], "mean_per_gradient": [2, 6], "sum": [16, 48]}
    for reduction, pair in zip(reductions, (results[:2], results[2:4], results[4:]), strict=True):
        for taken in pair:
            assert taken.values.dtype == dtype
            assert (np.asarray(taken.indices)[:, :3] == [3, 5, ROWS]).all()
            expected = np.array(sums[reduction], dtype)
            assert (np.asarray(taken.values)[:, :2, 0] == expected).all()
            assert not np.asarray(taken.values)[:, 2:].any()


@pytest.mark.parametrize("exchange", ["rows", "dense"])
def test_weights_and_ages_add_up(exchange):
    """Over two cycles: what devices have in common since the first is not counted again."""
    weights = np.array([1, 0.5, 0.25, 9], np.float32)
    ids = np.tile(np.array([3, 5], np.int32), (NUM_DEVICES, 1))
    ids[4:, 1] = -1
    values = np.arange(2 * NUM_DEVICES, dtype=np.float32).reshape(NUM_DEVICES, 2, 1)
    ages = np.arange(NUM_DEVICES, dtype=np.int32) % 4  # the last is too old

    def add(state, ids, values, age):
        grad = IndexedSlices(jnp.where(ids < 0, ROWS, ids), values, (ROWS, 1))
        weigh = lambda s: jnp.asarray(weights)[s]  # noqa: E731
        return jaxaccum.apply(state, grad, state.global_step - age, staleness_weight=weigh)[0]

    def program(axis_name, ids, values, age):
        policy = {"max_staleness": 2, "weighted": True, "reduction": "mean_per_row"}
        state = jaxaccum.init((ROWS, 1), capacity=CAPACITY, **policy)
        merged, _ = jaxaccum.all_merge(add(state, ids, values, age), axis_name, exchange=exchange)
        again, mean, _ = jaxaccum.take(merged)
        again = add(again, ids, values, age)
        again, mean_again, *_ = jaxaccum.all_take(again, axis_name, exchange=exchange)
        return merged, mean, again, mean_again

    merged, mean, again, mean_again = run(program, ids, values, ages)
    weight = weights[ages] * (ages < 3)
    totals = [weight.sum(), weight[:4].sum()]
    means = [weight @ values[:, 0, 0] / totals[0], weight[:4] @ values[:4, 1, 0] / totals[1]]
    for i in range(NUM_DEVICES):
        state = device(merged, i)
        assert state.counts[:2].tolist() == totals
        assert state.total_weight == totals[0]
        assert state.staleness_counts.tolist() == [2, 2, 2, 2]
        assert device(again, i).staleness_counts.tolist() == [4, 4, 4, 4]
        assert device(again, i).total_weight == 0
        for taken in (mean, mean_again):
            np.testing.assert_allclose(device(taken, i).values[:2, 0], means, rtol=1e-6)


def test_one_axis_of_two_can_be_merged():
    """Over the cores of each host alone: hosts differ, and a merge over hosts is then refused."""

    def program(axes, ids, values):
        state = filled(axes, ids, values)
        _, by_host, _, _ = jaxaccum.all_take(state, axes[1])
        merged, _ = jaxaccum.all_merge(state, axes[1])
        return by_host, held_sum(merged), jaxaccum.all_merge(merged, axes[0])[1]

    def held_sum(state):
        used = jnp.arange(state.capacity, dtype=jnp.int32) < state.num_rows
        return jnp.sum(jnp.where(used[:, None], state.values, 0))

    values = np.repeat(np.arange(NUM_DEVICES, dtype=np.float32), 2).reshape(NUM_DEVICES, 2, 1)
    ids = np.tile(np.array([3, 5], np.int32), (NUM_DEVICES, 1))
    by_host, sums, verdict = run(program, ids, values, way="two_axes")
    assert (np.asarray(verdict) == Verdict.INVALID).all()
    assert (np.asarray(by_host.values)[:4, :2] == 1.5).all()
    assert (np.asarray(by_host.values)[4:, :2] == 5.5).all()
    assert (np.asarray(sums) == [2 * 6] * 4 + [2 * 22] * 4).all()


@pytest.mark.full
def test_vmapped_axes_merge_too():
    values = np.ones((NUM_DEVICES, 2, 1), np.float32)
    merged, verdict = jax.vmap(
        lambda i, v: jaxaccum.all_merge(filled("way", i, v), "way", exchange="rows"),
        axis_name="way",
    )(disjoint_ids(6), values)
    assert (verdict == Verdict.ACCEPTED).all()
    assert held(device(merged, 7)) == {r: ([1.0], 1) for r in range(6)}


def test_what_is_taken_leaves_shard_map_as_replicated():
    """With jax.shard_map's check on: it sees that the tables updated are alike on all devices."""

    def step(table, ids, values):
        state = filled("data", ids[0], values[0], capacity=2 * NUM_DEVICES)
        _, grad, ready, verdict = jaxaccum.all_take(state, "data")
        return table.at[grad.indices].add(-grad.values, mode="drop"), ready, verdict

    data = PartitionSpec("data")
    specs = {"in_specs": (PartitionSpec(), data, data), "out_specs": PartitionSpec()}
    step = jax.jit(jax.shard_map(step, mesh=devices.MESHES["data"], **specs))
    values = np.ones((NUM_DEVICES, 2, 1), np.float32)
    args = spread((disjoint_ids(16), values), "shard_map")
    table, ready, verdict = step(jnp.ones((ROWS, 1), jnp.float32), *args)
    assert table.ravel().tolist() == [0] * 16 + [1] * 8
    assert ready
    assert verdict == Verdict.ACCEPTED


def merge_hlo(rows, capacity, **options):
    program = on_devices(lambda a, s: jaxaccum.all_merge(s, a, **options), "shard_map", donate=0)
    state = copies(jaxaccum.init((rows, 8), capacity=capacity))
    return program.lower(spread(state, "shard_map")).compile().as_text()


@pytest.mark.parametrize(
    ("rows", "options", "is_dense"),
    [
        (100, {}, True),  # 8 * 64 * 40 bytes as rows, 2 * 100 * 36 dense
        (100, {"max_rows": 16}, False),  # 5,120 bytes against 7,200
        (100_000, {}, False),
        (100, {"exchange": "rows"}, False),
        (None, {}, False),
    ],
)
@pytest.mark.full
def test_the_exchange_follows_the_bytes(rows, options, is_dense):
    assert ("all-to-all" in merge_hlo(rows, 64, **options)) == is_dense


def test_no_copy_of_map_or_sums():
    hlo = merge_hlo(1_000_003, 4099, max_rows=16)
    assert "s32[1,1000003]" in hlo
    copies = re.findall(r"= (\S+) copy\(", hlo)
    assert copies
    assert not [c for c in copies if "1000003" in c or re.search(r"4099,8\]", c)]


def test_wrong_calls_say_what_is_wrong():
    state = jaxaccum.init((ROWS, 1), capacity=CAPACITY)
    unknown = jaxaccum.init((None, 1), capacity=CAPACITY)
    for verb in (jaxaccum.all_merge, jaxaccum.all_take):
        with pytest.raises(ValueError, match=r"axis_name .* over here, which are none, got 'data'"):
            verb(state, "data")
        for wrong in ("datum", ("data", "datum")):
            with pytest.raises(ValueError, match=r"over here, which are \('data',\), got .*datum"):
                run(lambda a, s, verb=verb, wrong=wrong: verb(s, wrong)[0], copies(state))
        for max_rows in (0, CAPACITY + 1):
            with pytest.raises(ValueError, match=rf"max_rows .* capacity 14, got {max_rows}"):
                run(lambda a, s, v=verb, k=max_rows: v(s, a, max_rows=k)[0], copies(state))
        with pytest.raises(ValueError, match=r"exchange must be one of .* got 'sparse'"):
            run(lambda a, s, verb=verb: verb(s, a, exchange="sparse")[0], copies(state))
        with pytest.raises(ValueError, match="row count is unknown, got 'dense'"):
            run(lambda a, s, verb=verb: verb(s, a, exchange="dense")[0], copies(unknown))
    with pytest.raises(ValueError, match="num_required must be positive, got 0"):
        run(lambda a, s: jaxaccum.all_take(s, a, 0)[0], copies(state))
