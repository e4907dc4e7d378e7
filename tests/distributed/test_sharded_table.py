"""Tables in shards on eight devices, against oracles that know no shards."""

import devices
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from breadth import in_breadth
from devices import NUM_DEVICES, bits, copies, device, on_devices, spread
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import jaxaccum
from jaxaccum import IndexedSlices, Verdict

ROWS, SIZE, STEPS = 5 * NUM_DEVICES, 4, 3  # five rows a shard
KINDS = ("full", "full", "ragged", "empty", "stale", "invalid", "one_owner")


def gradient(kind, rng):
    ids = rng.integers(10 if kind == "one_owner" else 0, 15 if kind == "one_owner" else ROWS, SIZE)
    ids[{"ragged": SIZE // 2, "empty": 0}.get(kind, SIZE) :] = ROWS
    if kind == "invalid":
        ids[1] = ROWS + 1
    return ids.astype(np.int32), rng.integers(-9, 10, (SIZE, 2)).astype(np.int32)


def training(bucket, axis_name, state, batches):
    def step(state, batch):
        ids, values, is_stale = batch
        grad = IndexedSlices(ids, values, (ROWS, 2))
        before = state.global_step - is_stale
        state, verdict = jaxaccum.all_apply(state, grad, axis_name, before, bucket=bucket)
        state, taken, ready = jaxaccum.take(state, 12)
        return state, (verdict, taken, ready)

    return jax.lax.scan(step, state, batches)


programs = {
    (way, bucket, capacity): on_devices(
        lambda axis_name, state, batches, bucket=bucket: training(
            bucket, axis_name, state, batches
        ),
        way,
        donate=0,
    )
    for way, bucket, capacity in [("pmap", 2, 5), ("shard_map", None, 4), ("two_axes", 3, 5)]
}


class Shards:
    """One oracle for the whole table, and what the shards and their buckets have room for."""

    def __init__(self, capacity, bucket):
        self.whole = oracle.Oracle(ROWS, ROWS, dtype=np.int32)
        self.capacity, self.bucket = capacity, SIZE if bucket is None else bucket

    def apply(self, grads):
        """Verdicts of one gradient from each device, ``(ids, values, local_step)``."""
        good = [g for g in grads if self._trial(g) == oracle.ACCEPTED]
        rows = [{i for i in ids.tolist() if i != ROWS} for ids, _, _ in good]
        held = set(self.whole.sums) | {i for ids in rows for i in ids}
        most_sent = max((ids_of(owner, r) for r in rows for owner in range(NUM_DEVICES)), default=0)
        most_held = max(ids_of(owner, held) for owner in range(NUM_DEVICES))
        if most_sent > self.bucket or most_held > self.capacity:
            verdicts = [self._trial(g) or oracle.OVERFLOW for g in grads]
            for verdict in verdicts:
                self.whole.verdicts[verdict] += 1
            return verdicts
        return [self.whole.apply(*g) for g in grads]

    def _trial(self, grad):
        fresh = oracle.Oracle(ROWS, ROWS, dtype=np.int32)
        fresh.step = self.whole.step
        return fresh.apply(*grad)


def ids_of(owner, ids):
    return sum(owner * 5 <= i < owner * 5 + 5 for i in ids)


@pytest.mark.parametrize(("way", "bucket", "capacity"), programs)
@hypothesis.given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=STEPS * 8, max_size=STEPS * 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_shards_together_equal_one_accumulator(way, bucket, capacity, kinds, seed):
    rng = np.random.default_rng(seed)
    kinds = np.reshape(kinds, (NUM_DEVICES, STEPS))
    drawn = [[gradient(kind, rng) for kind in one] for one in kinds]
    batches = (
        *(np.array([[grad[i] for grad in one] for one in drawn]) for i in (0, 1)),
        (kinds == "stale").astype(np.int32),
    )
    state = copies(jaxaccum.init((ROWS // NUM_DEVICES, 2), jnp.int32, capacity=capacity))
    state, outputs = programs[way, bucket, capacity](spread(state, way), spread(batches, way))
    model = Shards(capacity, bucket)
    for step in range(STEPS):
        verdicts, taken, ready = jax.tree.map(
            lambda leaf, step=step: np.asarray(leaf)[:, step], outputs
        )
        before = model.whole.step - (kinds[:, step] == "stale")
        expected = model.apply([(*drawn[i][step], before[i]) for i in range(NUM_DEVICES)])
        assert verdicts.tolist() == expected
        expected = model.whole.take(12)
        assert (ready == (expected is not None)).all()
        rows = dict(zip(*(expected or ([], [])), strict=True))
        assert global_rows(taken) == {row: value.tolist() for row, value in rows.items()}
    for i in range(NUM_DEVICES):
        shard = device(state, i)
        assert shard.verdict_counts.tolist() == model.whole.verdicts
        assert shard.num_accumulated == model.whole.num_accumulated
        assert shard.global_step == model.whole.step
        used = shard.indices[: shard.num_rows] + 5 * i
        assert sorted(used) == sorted(r for r in model.whole.sums if r // 5 == i)


def global_rows(taken):
    """All shards' slices, by the rows of the whole table."""
    rows = {}
    for i in range(NUM_DEVICES):
        for row, value in zip(taken.indices[i].tolist(), taken.values[i].tolist(), strict=True):
            if row < 5:
                rows[5 * i + row] = value
    return rows


def test_refusal_leaves_every_shard_as_it_was():
    """The third shard alone has no room; the others give back what they had claimed."""

    def program(axis_name, state, ids, more):
        def apply(state, ids):
            grad = IndexedSlices(ids, jnp.ones((SIZE, 2), jnp.int32), (ROWS, 2))
            return jaxaccum.all_apply(state, grad, axis_name)

        before, _ = apply(state, ids)
        return before, *apply(before, more)

    state = copies(jaxaccum.init((ROWS // NUM_DEVICES, 2), jnp.int32, capacity=3))
    ids = np.tile(np.array([0, 10, 11, 39], np.int32), (NUM_DEVICES, 1))
    more = np.tile(np.array([1, 12, 13, 38], np.int32), (NUM_DEVICES, 1))
    before, after, verdict = on_devices(program, "shard_map")(*spread((state, ids, more), "pmap"))
    assert (np.asarray(verdict) == Verdict.OVERFLOW).all()
    for i in range(NUM_DEVICES):
        old, new = bits(device(before, i)), bits(device(after, i))
        assert {name for name in old if old[name] != new[name]} == {".verdict_counts"}
    assert (np.asarray(after.verdict_counts) == [8, 0, 8, 0, 0]).all()


@pytest.mark.parametrize("way", in_breadth(devices.WAYS, {"two_axes"}))
def test_rows_are_looked_up_wherever_they_are(way):
    rng = np.random.default_rng(3)
    table = rng.standard_normal((ROWS, 3)).astype(np.float32)
    ids = rng.permuted(np.tile(np.arange(0, ROWS + 1, 4, dtype=np.int32), (NUM_DEVICES, 1)), axis=1)
    ids[0, :9] = [9, 5, 7, 7, 6, 8, 7, 5, 9]  # all five rows of one owner, some of them repeated
    ids[0, 9:] = ROWS

    def program(axis_name, shard, ids):
        return [jaxaccum.all_lookup(shard, ids, axis_name, bucket=k) for k in (None, 5, 4)]

    shards = table.reshape(NUM_DEVICES, 5, 3)
    free, ample, tight = on_devices(program, way)(*spread((shards, ids), way))
    expected = np.concatenate([table, np.zeros((1, 3), np.float32)])[ids]
    for rows, verdict in (free, ample):
        assert np.array_equal(rows, expected)
        assert (np.asarray(verdict) == Verdict.ACCEPTED).all()
    rows, verdict = tight
    assert verdict.tolist() == [Verdict.OVERFLOW] + [Verdict.ACCEPTED] * 7
    expected[0][ids[0] == 9] = np.nan
    assert np.array_equal(rows, expected, equal_nan=True)


def test_crowded_ids_fit_a_bucket_of_twice_the_even_share():
    """Raw Zipf ids of a shuffled vocabulary: what is repeated is sent once."""
    rng = np.random.default_rng(7)
    rows, size = 128 * NUM_DEVICES, 256
    shuffled = rng.permutation(rows).astype(np.int32)
    ids = shuffled[rng.zipf(1.2, (NUM_DEVICES, size)) % rows]
    bucket = 2 * size // NUM_DEVICES
    crowded = np.apply_along_axis(np.bincount, 1, ids // 128, minlength=NUM_DEVICES)
    assert (crowded.max(axis=1) > bucket).all()
    values = rng.integers(-9, 10, (NUM_DEVICES, size, 2)).astype(np.float32)
    table = rng.standard_normal((rows, 2)).astype(np.float32)

    def program(axis_name, shard, ids, values):
        state = jaxaccum.init((128, 2), capacity=128, reduction="sum")
        grad = IndexedSlices(ids, values, (rows, 2))
        state, applied = jaxaccum.all_apply(state, grad, axis_name, bucket=bucket)
        found, looked_up = jaxaccum.all_lookup(shard, ids, axis_name, bucket=bucket)
        return jaxaccum.take(state)[1].to_dense(), state.counts, found, applied, looked_up

    args = spread((table.reshape(NUM_DEVICES, 128, 2), ids, values), "shard_map")
    sums, counts, found, *verdicts = on_devices(program, "shard_map")(*args)
    assert (np.asarray(verdicts) == Verdict.ACCEPTED).all()
    expected = np.zeros((rows, 2))
    np.add.at(expected, ids, values)
    assert np.array_equal(np.reshape(sums, (rows, 2)), expected)
    assert np.sum(counts) == sum(len(np.unique(one)) for one in ids)
    assert np.array_equal(found, table[ids])


def test_sums_before_sending_are_as_wide_as_the_accumulator():
    """300 slices of 1 and one of 256: in bfloat16 the small ones would be lost."""

    def program(axis_name, ids, values):
        state = jaxaccum.init((5, 1), jnp.bfloat16, capacity=5, reduction="sum")
        grad = IndexedSlices(ids, values.astype(jnp.bfloat16), (ROWS, 1))
        state, verdict = jaxaccum.all_apply(state, grad, axis_name, bucket=2)
        return state.values[0], verdict

    ids = np.full((NUM_DEVICES, 301), 3, np.int32)
    values = np.ones((NUM_DEVICES, 301, 1), np.float32)
    values[:, 0] = 256
    sums, verdict = on_devices(program, "shard_map")(*spread((ids, values), "shard_map"))
    assert (np.asarray(verdict) == Verdict.ACCEPTED).all()
    assert np.asarray(sums).ravel().tolist() == [NUM_DEVICES * 556] + [0] * 7


def test_ids_out_of_range_find_no_row_and_a_verdict():
    def program(axis_name, shard, ids):
        return jaxaccum.all_lookup(shard, ids, axis_name)

    ids = np.full((NUM_DEVICES, 2), 3, np.int32)
    ids[1, 0], ids[2, 1], ids[3, 0] = -1, ROWS + 1, ROWS
    for dtype, missing in ((np.float32, np.nan), (np.int32, -(2**31))):
        shards = np.ones((NUM_DEVICES, 5, 1), dtype)
        rows, verdict = on_devices(program, "shard_map")(*spread((shards, ids), "shard_map"))
        expected = np.ones((NUM_DEVICES, 2), dtype)
        expected[1, 0], expected[2, 1], expected[3, 0] = missing, missing, 0
        assert np.array_equal(np.asarray(rows)[:, :, 0], expected, equal_nan=dtype == np.float32)
        assert verdict.tolist() == [0, Verdict.INVALID, Verdict.INVALID, 0, 0, 0, 0, 0]


def test_a_table_its_optimizer_and_its_accumulator_live_in_shards():
    """Lazy Adagrad on shards, step by step, equals Adagrad on the whole table."""
    mesh, axis = devices.MESHES["data"], "data"
    rng = np.random.default_rng(11)
    table = rng.standard_normal((ROWS, 2)).astype(np.float32)
    ids = rng.integers(0, ROWS, (STEPS, NUM_DEVICES, SIZE)).astype(np.int32)
    tx = jaxaccum.lazy_rows(optax.adagrad(0.5, initial_accumulator_value=1.0, eps=0.0))
    optimizer = tx.init({"table": table})
    params = {"table": table, "optimizer": optimizer, "rate": np.float32(0.5)}
    selection = {"tables": {"table": True}, "params": {"table": table}}
    specs = jaxaccum.shard_specs(params, axis, **selection)
    assert (specs["table"], specs["rate"]) == (PartitionSpec(axis), PartitionSpec())
    assert specs["optimizer"][0].sum_of_squares["table"] == PartitionSpec(axis)
    sharded = jaxaccum.shard_rows(params, mesh, axis, **selection)
    assert sharded["table"].sharding.spec == PartitionSpec(axis)
    assert sharded["rate"].sharding.spec == PartitionSpec()
    states = jaxaccum.shard_init((ROWS, 2), mesh, axis, capacity=5)

    def step(params, state, ids):
        rows, _ = jaxaccum.all_lookup(params["table"], ids[0], axis)
        # The gradient of half the squared norm of the rows is the rows themselves.
        state, _ = jaxaccum.all_apply(state, IndexedSlices(ids[0], rows, (ROWS, 2)), axis)
        state, grad, _ = jaxaccum.take(state)
        table = {"table": params["table"]}
        updates, optimizer = tx.update({"table": grad}, params["optimizer"], table)
        table = jaxaccum.apply_updates(table, updates)
        return {**params, "optimizer": optimizer, **table}, state

    in_specs = (specs, PartitionSpec(axis), PartitionSpec(axis))
    step = jaxaccum.drop_device_axis(step)
    step = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=in_specs[:2])
    step = jax.jit(step, donate_argnums=(0, 1))
    squares = np.ones((ROWS, 2))
    table = table.astype(np.float64)
    for batch in ids:
        sharded, states = step(sharded, states, spread(batch, "shard_map"))
        grad, touches = np.zeros((ROWS, 2)), np.zeros((ROWS, 1))
        for one in batch:
            np.add.at(grad, one, table[one])
            touches[np.unique(one)] += 1
        grad /= np.maximum(touches, 1)
        squares += grad**2
        table -= 0.5 * grad / np.sqrt(squares)
    np.testing.assert_allclose(sharded["table"], table, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        sharded["optimizer"][0].sum_of_squares["table"], squares, rtol=1e-5, atol=1e-6
    )


def test_only_empty_accumulators_are_copied_and_their_verdicts_count_once():
    mesh = devices.MESHES[("host", "core")]
    state = jaxaccum.init((ROWS, 1), capacity=4)
    grad = IndexedSlices(jnp.array([3]), jnp.ones((1, 1), jnp.float32), (ROWS, 1))
    full, _ = jaxaccum.apply(state, grad)
    with pytest.raises(ValueError, match="must hold no gradients to be copied, got num_accum"):
        jaxaccum.replicate(full, mesh, "core")
    states = jaxaccum.replicate(jaxaccum.take(full)[0], mesh, "core")
    assert states.values.shape == (4, 4, 1)
    states = jaxaccum.replicate(jaxaccum.take(full)[0], mesh, ("host", "core"))
    merge = on_devices(lambda axis, state: jaxaccum.all_merge(state, axis)[0], "two_axes")
    assert (np.asarray(merge(states).verdict_counts) == [1, 0, 0, 0, 0]).all()


def test_wrong_calls_say_what_is_wrong():
    mesh = devices.MESHES["data"]
    table = np.zeros((41, 2), np.float32)
    with pytest.raises(ValueError, match=r"tree\['t'\] .* 8 devices of axis 'data', got 41; pad"):
        jaxaccum.shard_rows({"t": table}, mesh, "data", tables=True)
    with pytest.raises(ValueError, match=r"dense_shape .* 8 devices .* got 41; pad .* 7"):
        jaxaccum.shard_init((41, 2), mesh, "data", capacity=3)
    with pytest.raises(ValueError, match="dense_shape must have a known row count"):
        jaxaccum.shard_init((None, 2), mesh, "data", capacity=3)
    with pytest.raises(
        ValueError, match=r"axis_name must be of the mesh's \('data',\), got 'rows'"
    ):
        jaxaccum.shard_init((40, 2), mesh, "rows", capacity=3)
    with pytest.raises(ValueError, match="axis_name must be of the mesh's"):
        jaxaccum.replicate(jaxaccum.init((40, 2), capacity=3), mesh, ("data", "rows"))

    state = jaxaccum.init((5, 2), capacity=3)
    grad = IndexedSlices(jnp.array([3]), jnp.ones((1, 2), jnp.float32), (ROWS, 2))
    with pytest.raises(ValueError, match="maps over here, which are none, got 'data'"):
        jaxaccum.all_apply(state, grad, "data")
    with pytest.raises(ValueError, match="maps over here, which are none, got 'data'"):
        jaxaccum.all_lookup(jnp.ones((5, 2), jnp.float32), jnp.array([3]), "data")

    def apply(grad, state=state, **options):
        return on_devices(
            lambda axis, grad, state: jaxaccum.all_apply(state, grad, axis, **options)[1],
            "shard_map",
        )(copies(grad), copies(state))

    with pytest.raises(ValueError, match=r"grad\.dense_shape must have 40 rows, got 39"):
        apply(IndexedSlices(grad.indices, grad.values, (39, 2)))
    with pytest.raises(TypeError, match=r"grad.values must be float32 .* got int32"):
        apply(IndexedSlices(grad.indices, jnp.ones((1, 2), jnp.int32), (ROWS, 2)))
    with pytest.raises(ValueError, match="bucket must be at least 1, got 0"):
        apply(grad, bucket=0)
    with pytest.raises(ValueError, match="state must have a known row count to be sharded"):
        apply(grad, jaxaccum.init((None, 2), capacity=3))
    with pytest.raises(ValueError, match=r"without max_staleness and weighted.* got 2 and False"):
        apply(grad, jaxaccum.init((ROWS // NUM_DEVICES, 2), capacity=3, max_staleness=2))
    with pytest.raises(TypeError, match="indices must be integers, got float32"):
        on_devices(lambda axis, ids: jaxaccum.all_lookup(ids, ids, axis)[0], "shard_map")(
            np.ones((NUM_DEVICES, 3), np.float32)
        )
