"""The parts of a parameter server, each by itself: no actors, and no Ray."""

import asyncio
import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from internals import (
    Folder,
    Layout,
    Policy,
    Tickets,
    join_parts,
    load_arrays,
    ray_takes,
    save_arrays,
    sum_rows,
)

import jaxaccum
import jaxaccum.ray

ACCEPTED, STALE = jaxaccum.Verdict.ACCEPTED, jaxaccum.Verdict.STALE
PARAMS = {
    "bias": np.zeros((3,), np.float32),
    "scale": np.zeros((), np.float32),
    "small": np.zeros((2, 3), np.float32),
    "table": np.zeros((11, 2), np.float32),
}
TABLES = {"bias": False, "scale": False, "small": True, "table": True}


def random_gradient(rng, num):
    def rows(shape):
        ids = rng.integers(0, shape[0] + 1, num).astype(np.int32)  # the last is padding
        values = rng.integers(-9, 10, (num, *shape[1:])).astype(np.float32)
        return jaxaccum.IndexedSlices(ids, values, shape)

    return {
        "bias": rng.integers(-9, 10, 3).astype(np.float32),
        "scale": np.float32(rng.integers(-9, 10)),
        "small": rows((2, 3)),
        "table": rows((11, 2)),
    }


def leaves_of(grads):
    return jax.tree.leaves(grads, is_leaf=lambda x: isinstance(x, jaxaccum.IndexedSlices))


def expected_mean(grads, weights, reduction):
    """Dense NumPy, one gradient and one slice at a time."""
    result = {}
    for name, param in PARAMS.items():
        total, touches = np.zeros(param.shape), np.zeros(param.shape)
        for grad, weight in zip(grads, weights, strict=True):
            leaf, touched = grad[name], np.zeros(param.shape)
            if not TABLES[name]:
                total, touched = total + weight * leaf, np.ones(param.shape)
            else:
                for row, value in zip(leaf.indices, leaf.values, strict=True):
                    if row < param.shape[0]:
                        total[row] += weight * value
                        touched[row] = 1
            touches += weight * touched
        if reduction == "mean_per_gradient":
            total = total / sum(weights)
        elif reduction == "mean_per_row":
            total = np.divide(total, touches, out=np.zeros_like(total), where=touches > 0)
        result[name] = total
    return result


@pytest.mark.parametrize("reduction", ["sum", "mean_per_gradient", "mean_per_row"])
@pytest.mark.parametrize(("num_shards", "held"), [(1, 0), (3, 0), (1, 128), (3, 32)])
def test_parts_of_all_shards_are_the_whole(num_shards, held, reduction):
    rng = np.random.default_rng(num_shards)
    layout = Layout.of(PARAMS, TABLES, num_shards)
    grads, weights = [random_gradient(rng, num) for num in (9, 0, 40)], [1.0, 0.5, 2.0]
    parts = [layout.split_gradient(leaves_of(grad)) for grad in grads]
    expected, seen = expected_mean(grads, weights, reduction), set()
    for shard in range(num_shards):
        of_shard = [each[shard] for each in parts]
        room = {
            i: np.full((held, *leaf.shape[1:]), np.nan, leaf.dtype)  # of a step before
            for i, leaf in enumerate(layout.leaves)
            if leaf.is_table and held
        }
        joined = join_parts(
            of_shard, weights, layout.leaves, layout.owned(shard), shard, reduction, room
        )
        for i, sums in joined.items():
            leaf = layout.leaves[i]
            start, stop = leaf.start_stop(shard)
            name = leaf.path.strip("[]'")
            if leaf.is_table:
                mean = sum_rows(sums, stop - start).slices.to_dense()
                seen |= {(name, row) for row in range(start, stop)}
                wanted = expected[name][start:stop]
            else:
                mean, wanted = sums, expected[name]
                seen |= {(name, 0)}
            np.testing.assert_allclose(mean, wanted, rtol=1e-6)
    rows = {(n, r) for n, p in PARAMS.items() for r in range(len(p) if TABLES[n] else 1)}
    assert seen == rows


def test_large_dense_leaves_are_spread():
    params = {name: np.zeros(size, np.float32) for name, size in zip("abc", (9, 5, 5), strict=True)}
    layout = Layout.of(params, False, 2)
    assert [leaf.owner for leaf in layout.leaves] == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("table", np.zeros((11, 2), np.float32), "must be an IndexedSlices, got ndarray"),
        ("bias", np.zeros(4, np.float32), r"must be float32\[3\], got float32\[4\]"),
        ("bias", np.zeros(3, np.float64), r"must be float32\[3\], got float64\[3\]"),
        ("table", ([12], np.zeros((1, 2), np.float32), (11, 2)), "has row 12 of a table of 11"),
        ("table", ([-1], np.zeros((1, 2), np.float32), (11, 2)), "has row -1 of a table of 11"),
        ("table", ([1], np.zeros((1, 2), np.float32), (12, 2)), "has 12 rows, its table 11"),
        ("table", ([1], np.zeros((1, 3), np.float32), (11, 3)), r"must be rows float32\[2\]"),
        ("table", ([1], np.zeros((1, 2), np.int32), (11, 2)), r"must be rows float32\[2\]"),
        ("bias", ([1], np.zeros((1, 2), np.float32), (11, 2)), "must be an array"),
    ],
)
def test_a_gradient_that_does_not_fit_is_told(name, bad, message):
    grad = random_gradient(np.random.default_rng(0), 4)
    if isinstance(bad, tuple):
        ids, values, shape = bad
        bad = jaxaccum.IndexedSlices(np.array(ids, np.int32), values, shape)
    with pytest.raises(jaxaccum.InvalidArgumentError, match=rf"grads\['{name}'\] {message}"):
        Layout.of(PARAMS, TABLES, 2).split_gradient(leaves_of(grad | {name: bad}))


def expected_steps(arrivals, num_required, policy):
    """The policies as `TreeAccumulator` tells them, one gradient at a time: verdicts, steps."""
    step, waiting, verdicts, steps = 0, [], [], []
    for key, local_step in arrivals:
        old = max(step - local_step, 0)
        counts = old <= policy.max_staleness
        verdicts.append(ACCEPTED if counts or policy.carry_over else STALE)
        if verdicts[-1] == ACCEPTED:
            weight = policy.staleness_weight(old) if policy.staleness_weight else 1.0
            waiting.append((key, weight, counts))
        while sum(counts for *_, counts in waiting) >= num_required:
            taken, missing = [], num_required
            while waiting and (missing or not policy.exactly):
                taken.append(waiting.pop(0))
                missing -= taken[-1][2]
            steps.append([(key, weight) for key, weight, _ in taken])
            step += 1
    return verdicts, steps


@pytest.mark.parametrize("seed", range(12))
def test_tickets_follow_the_policies(seed):
    rng = np.random.default_rng(seed)
    weight = (lambda old: 1 / (1.0 + old)) if seed % 2 else None
    policy = Policy(int(rng.integers(0, 3)), weight, bool(seed & 2), bool(seed & 4))
    required = int(rng.integers(1, 4))
    tickets, verdicts, steps, arrivals = Tickets(required, policy, 100), [], [], []
    for number in range(40):
        key, local_step = str(number), max(tickets.step - int(rng.integers(0, 5)), 0)
        arrivals.append((key, local_step))
        verdicts.append(tickets.commit(key, local_step, f"w{number % 3}", tickets.step))
        while taken := tickets.take():
            steps.append([(ticket.key, ticket.weight) for ticket in taken])
        # Saved and loaded in between, as by a server that dies.
        saved, again = json.loads(json.dumps(tickets.save())), Tickets(required, policy, 100)
        again.load(saved, tickets.step)
        again.refused = tickets.refused
        assert again.save() == tickets.save()
        tickets = again
    assert (verdicts, steps) == expected_steps(arrivals, required, policy)
    assert tickets.all.accepted == verdicts.count(ACCEPTED)
    assert sum(fate.stale for fate in tickets.by_worker.values()) == verdicts.count(STALE)
    assert tickets.refused == [
        k for (k, _), v in zip(arrivals, verdicts, strict=True) if v == STALE
    ]


def test_what_is_saved_changes_no_more():
    """It is written when all shards have been: by then others have come."""
    tickets = Tickets(2, Policy(), 100)
    tickets.commit("one", 0, "worker", 0)
    saved = tickets.save()
    before = json.dumps(saved)
    tickets.commit("two", 0, "worker", 0)
    assert json.dumps(saved) == before


def test_a_commit_whose_parts_may_be_gone_is_stale():
    """Whatever the policy: shards throw parts away that have waited so long."""
    for age, verdict in [(3, ACCEPTED), (4, STALE)]:
        tickets = Tickets(1, Policy(carry_over=True), keep_steps=4, step=9)
        assert tickets.commit("key", 9, None, staged_at=9 - age) == verdict


def test_arrays_of_any_dtype_are_saved(tmp_path):
    dtypes = [np.float32, ml_dtypes.bfloat16, np.int32, ml_dtypes.float8_e4m3fn, np.complex64]
    arrays = {f"params {i}": np.arange(6).astype(d).reshape(2, 3) for i, d in enumerate(dtypes)}
    arrays["a key with spaces/and more"] = np.array(3)
    save_arrays(tmp_path / "new" / "some.npz", arrays)
    loaded = load_arrays(tmp_path / "new" / "some.npz")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].tobytes() == array.tobytes()


def test_the_journal_tells_what_was_accepted_since_the_last_whole_checkpoint(tmp_path):
    folder = Folder(tmp_path)
    assert folder.latest() is None
    for keys, is_whole in [("ab", True), ("cd", True), ("ef", False)]:
        number = folder.begin()
        folder.shard_path(number, 0).parent.mkdir()
        if is_whole:
            folder.finish(number, {"step": 10 * number})
        for key in keys:
            folder.note("accepted", key)
        folder.note("step", 10 * number + 5)
    folder.close()
    with (tmp_path / "since-3.jsonl").open("a") as journal:
        journal.write('["accep')  # the process died while it wrote
    latest = Folder(tmp_path).latest()
    assert (latest["number"], latest["step"]) == (2, 20)
    assert folder.read_journal(latest["number"]) == (["c", "d", "e", "f"], 35)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest.json", "save-2", "save-3", "since-2.jsonl", "since-3.jsonl",
    ]  # fmt: skip


def test_a_taker_that_asks_no_more_leaves_its_place_and_what_it_was_served():
    now = [0.0]

    async def work():
        acc = jaxaccum.TreeAccumulator(np.zeros(1, np.float32))
        takes = ray_takes.Takes(lambda: now[0])
        take = functools.partial(acc.take_grad_async, 1, timeout=60)
        assert await takes.ask("dies waiting", take, 0.0) is None
        now[0] = 5.0
        assert await takes.ask("lives", take, 0.0) is None
        now[0] = 9.0
        acc.apply_grad(np.full(1, 7.0, np.float32))  # the first in the queue is served
        assert await takes.ask("lives", take, 0.05) is None
        now[0] = 11.0
        return await takes.ask("lives", take, 60.0)

    assert asyncio.run(work())[0] == 7.0


def test_a_taker_that_dies_is_noticed_though_nobody_asks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ray_takes, "ASK_SECONDS", 0.01)

    async def work():
        acc = jaxaccum.TreeAccumulator(np.zeros(1, np.float32))
        takes = ray_takes.Takes(lambda: now[0])
        watching = asyncio.create_task(takes.keep_expiring())
        take = functools.partial(acc.take_grad_async, 1, timeout=60)
        assert await takes.ask("dies waiting", take, 0.0) is None
        now[0] = 11.0
        await asyncio.sleep(0.2)
        acc.apply_grad(np.ones(1, np.float32))
        watching.cancel()
        return acc.num_accumulated()

    assert asyncio.run(work()) == 1
