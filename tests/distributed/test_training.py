"""Training on eight devices, step by step, against oracles that know no devices."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from devices import NUM_DEVICES, copies, device, on_devices, spread
from hypothesis import strategies as st

import jaxaccum
from jaxaccum import IndexedSlices, Verdict

ROWS, SIZE, CAPACITY, STEPS, MICRO = 24, 4, 14, 3, 2
EVENTS = STEPS * MICRO * NUM_DEVICES
# Mostly what training brings; more of it than the capacity now and then.
KINDS = ("full", "full", "ragged", "empty", "stale", "invalid", "wide")


def gradient(kind, rng, rows):
    """Ids and values of a gradient: ``SIZE`` slices, padding among them."""
    padding = 2**31 - 1 if rows is None else rows
    ids = rng.integers(0, ROWS if kind == "wide" else 6, SIZE).astype(np.int32)
    ids[{"ragged": SIZE // 2, "empty": 0}.get(kind, SIZE) :] = padding
    if kind == "invalid":
        ids[0] = -3
    return ids, rng.integers(-9, 10, (SIZE, 2)).astype(np.int32)


class Fleet:
    """Eight oracles that accumulate by themselves, and are added up by another one."""

    def __init__(self, rows):
        self.rows, self.merged_verdicts, self.step = rows, np.zeros(5, int), 0
        self._start_afresh()

    def _start_afresh(self):
        self.devices = [oracle.Oracle(self.rows, CAPACITY, dtype=np.int32) for _ in range(8)]
        for one in self.devices:
            one.step = self.step

    def total(self):
        """One oracle that has what all devices have, and whether it fits."""
        total = oracle.Oracle(self.rows, CAPACITY, dtype=np.int32)
        total.step = self.step
        fits = all(total.merge(one) == oracle.ACCEPTED for one in self.devices)
        return total, fits

    def merge_and_take(self, required):
        """The verdict, and what was taken: None if it was not ready."""
        total, fits = self.total()
        if not fits:
            self.merged_verdicts[oracle.OVERFLOW] += 1
            return oracle.OVERFLOW, None
        taken = total.take(required)
        if taken is not None:
            self.merged_verdicts += total.verdicts
            self.step += 1
            self._start_afresh()
        return oracle.ACCEPTED, taken


def training(take, axis_name, states, batches):
    """A scan of steps: two tables, each accumulating micro-batches and then taking by ``take``."""

    def step(states, batch):
        outputs, new = {}, {}
        for table, state in states.items():
            verdicts = []
            for i in range(MICRO):
                ids, values, is_stale = (x[i] for x in batch[table])
                grad = IndexedSlices(ids, values, state.dense_shape)
                local_step = state.global_step - is_stale
                state, verdict = jaxaccum.apply(state, grad, local_step)
                verdicts.append(verdict)
            new[table], taken, ready, verdict = take(state, axis_name, batch["required"])
            outputs[table] = (jnp.stack(verdicts), taken, ready, verdict)
        return new, outputs

    return jax.lax.scan(step, states, batches)


def merge_then_take(state, axis_name, required):
    state, verdict = jaxaccum.all_merge(state, axis_name, exchange="rows")
    at_least = jnp.where(verdict == Verdict.ACCEPTED, 1, 2**31 - 1)
    state, taken, ready = jaxaccum.take(state, at_least)
    return state, taken, ready, verdict


def all_take(state, axis_name, required):
    exchange = None if state.dense_shape[0] is None else "dense"
    return jaxaccum.all_take(state, axis_name, required, exchange=exchange)


programs = {
    (way, take): on_devices(
        lambda axis_name, states, batches, take=take: training(take, axis_name, states, batches),
        way,
        donate=0,
    )
    for way, take in [
        ("pmap", merge_then_take),
        ("pmap", all_take),
        ("shard_map", merge_then_take),
        ("two_axes", all_take),
    ]
}
TABLES = {"known": ROWS, "unknown": None}


@pytest.mark.parametrize(
    ("way", "take"),
    [
        pytest.param(*p, marks=pytest.mark.full if p == ("pmap", merge_then_take) else ())
        for p in programs
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
@hypothesis.given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=EVENTS, max_size=EVENTS),
    required=st.lists(st.sampled_from([1, 5, 17]), min_size=STEPS, max_size=STEPS),
    seed=st.integers(0, 2**32 - 1),
)
def test_training_equals_one_device(way, take, kinds, required, seed):
    rng = np.random.default_rng(seed)
    required = [1] * STEPS if take is merge_then_take else required
    kinds = np.reshape(kinds, (NUM_DEVICES, STEPS, MICRO))
    drawn = {
        table: [[[gradient(kind, rng, rows) for kind in step] for step in one] for one in kinds]
        for table, rows in TABLES.items()
    }
    batches = {
        table: (
            *(np.array([[[m[i] for m in s] for s in d] for d in grads]) for i in (0, 1)),
            (kinds == "stale").astype(np.int32),
        )
        for table, grads in drawn.items()
    }
    batches["required"] = np.tile(np.array(required, np.int32), (NUM_DEVICES, 1))
    states = {
        table: copies(jaxaccum.init((rows, 2), jnp.int32, capacity=CAPACITY))
        for table, rows in TABLES.items()
    }
    states, outputs = programs[way, take](spread(states, way), spread(batches, way))
    for table, rows in TABLES.items():
        fleet, taken_last = Fleet(rows), False
        for step in range(STEPS):
            verdicts, taken, ready, verdict = jax.tree.map(
                lambda leaf, step=step: np.asarray(leaf)[:, step], outputs[table]
            )
            for i, one in enumerate(fleet.devices):
                for m, (ids, values) in enumerate(drawn[table][i][step]):
                    stale = fleet.step - int(kinds[i, step, m] == "stale")
                    assert one.apply(ids, values, stale) == verdicts[i, m]
            expected_verdict, expected = fleet.merge_and_take(required[step])
            assert (verdict == expected_verdict).all()
            taken_last = expected is not None
            assert (ready == taken_last).all()
            ids, rows_taken = expected if taken_last else ([], [])
            padding = taken.indices.shape[1] - len(ids)
            assert (taken.indices == [*ids, *[2**31 - 1 if rows is None else rows] * padding]).all()
            rows_taken = np.array([*rows_taken, *[np.zeros(2, np.int32)] * padding])
            assert (taken.values == rows_taken).all()
        check_states(states[table], fleet)


def check_states(states, fleet):
    for i, one in enumerate(fleet.devices):
        state = device(states, i)
        held = dict(zip(state.indices.tolist(), state.values.tolist(), strict=True))
        used = set(state.indices[: state.num_rows].tolist())
        assert used == set(one.sums)
        assert {row: held[row] for row in used} == {r: v.tolist() for r, v in one.sums.items()}
        assert state.global_step == fleet.step
        assert state.num_accumulated == one.num_accumulated
        assert state.verdict_counts.tolist() == (fleet.merged_verdicts + one.verdicts).tolist()
