"""The accumulator in an actor: what workers in other processes see of it."""

import asyncio
import inspect
import os
import signal
import sys

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'jaxaccum[ray]'")

import ray
from internals import OwningAccumulator, TreeAccumulatorActor

import jaxaccum
import jaxaccum.ray

pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import it

ROWS = 7
LIKE = {"table": np.zeros((ROWS, 2), np.float32), "bias": np.zeros(2, np.float32)}
TABLES = {"table": True, "bias": False}
SECONDS = 60


def gradient(number):
    ids = np.array([number % ROWS, (3 * number) % ROWS, ROWS], np.int32)
    table = jaxaccum.IndexedSlices(ids, np.full((3, 2), number, np.float32), (ROWS, 2))
    return {"table": table, "bias": np.full(2, number, np.float32)}


def summed(numbers):
    table = np.zeros((ROWS, 2), np.float32)
    for number in numbers:
        for row in gradient(number)["table"].indices[:2]:
            table[row] += number
    return {"table": table, "bias": np.full(2, sum(numbers), np.float32)}


def check(taken, numbers):
    expected = summed(numbers)
    np.testing.assert_array_equal(taken["table"].to_dense(), expected["table"])
    np.testing.assert_array_equal(taken["bias"], expected["bias"])


@pytest.fixture(scope="module")
def acc(cluster):
    return jaxaccum.ray.TreeAccumulator(
        LIKE, tables=TABLES, reduction="sum", shared_name="sums", timeout=SECONDS
    )


@pytest.fixture
def push(cluster):
    return cluster.remote(num_cpus=0)(push_all)


def push_all(acc, numbers, step, name):
    return [acc.apply_grad(gradient(n), step, worker=name).verdict for n in numbers]


def test_tasks_push_and_a_waiting_taker_gets_their_sum(acc, push):
    step = acc.global_step
    taken = acc.take_grad_ref(6, timeout=SECONDS)
    calls = [push.remote(acc, range(1, 4), step, "one"), push.remote(acc, range(4, 7), step, "two")]
    assert ray.get(calls, timeout=SECONDS) == [[jaxaccum.Verdict.ACCEPTED] * 3] * 2
    check(ray.get(taken, timeout=SECONDS), range(1, 7))
    late = ray.get(push.remote(acc, [9], step, "two"), timeout=SECONDS)
    assert late == [jaxaccum.Verdict.STALE]
    workers = acc.statistics()["workers"]
    assert (workers["one"]["accepted"], workers["two"]["stale"]) == (3, 1)
    assert acc.global_step == step + 1


def take_by_name(name):
    acc = jaxaccum.ray.TreeAccumulator(LIKE, tables=TABLES, reduction="sum", shared_name=name)
    return acc.take_grad(1, timeout=SECONDS, trim=True)


def test_it_is_found_by_its_name_and_no_other_is_taken_for_it(acc, cluster):
    acc.apply_grad(gradient(5), acc.global_step)
    taken = ray.get(cluster.remote(num_cpus=0)(take_by_name).remote("sums"), timeout=SECONDS)
    check(taken, [5])
    with pytest.raises(ValueError, match=r"shared_name is that of an accumulator of .*SUM"):
        jaxaccum.ray.TreeAccumulator(LIKE, tables=TABLES, shared_name="sums")


def test_accumulators_of_one_name_weigh_alike(cluster):
    def make(weight):
        return jaxaccum.ray.TreeAccumulator(
            LIKE, tables=TABLES, max_staleness=2, staleness_weight=weight,
            shared_name="weighted", timeout=SECONDS,
        )  # fmt: skip

    acc = make(lambda old: 1 / (1.0 + old))
    assert make(lambda age: 1 / (age + 1.0)).global_step == acc.global_step
    with pytest.raises(ValueError, match=r"weights \[1\.0, 0\.5, .*, not .* 0\.7"):
        make(lambda old: (1.0 + old) ** -0.5)
    acc.close()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"bias": np.ones(2, np.float32)}, "grads must be a tree like the accumulator"),
        (gradient(1) | {"bias": np.ones(3, np.float32)}, r"grads\['bias'\]"),
        (gradient(1) | {"bias": np.ones(2, np.int32)}, r"grads\['bias'\]"),
        (gradient(1) | {"table": np.ones((ROWS, 2), np.float32)}, r"grads\['table'\]"),
    ],
)
def test_bad_gradients_are_told_to_the_worker_and_the_server_lives(acc, bad, message):
    step = acc.global_step
    with pytest.raises(jaxaccum.InvalidArgumentError, match=message) as error:
        acc.apply_grad(bad, step)
    assert type(error.value) is jaxaccum.InvalidArgumentError
    with pytest.raises(jaxaccum.InvalidArgumentError, match="local_step"):
        acc.apply_grad(gradient(1), np.array([1, 2]))
    acc.apply_grad(gradient(2), step)
    check(acc.take_grad(1, timeout=SECONDS), [2])


def test_a_push_that_is_repeated_counts_once(acc):
    step = acc.global_step
    answers = [acc.apply_grad(gradient(3), step, key="mine") for _ in range(3)]
    assert answers == [(jaxaccum.Verdict.ACCEPTED, step)] * 3
    assert [repr(answer.verdict) for answer in answers] == ["<Verdict.ACCEPTED: 0>"] * 3
    assert acc.num_accumulated() == 1
    check(acc.take_grad(1, timeout=SECONDS), [3])
    # The answer is the first one's, the step that of now.
    again = acc.apply_grad(gradient(3), step, key="mine")
    assert again == (jaxaccum.Verdict.ACCEPTED, step + 1)
    assert acc.num_accumulated() == 0


def test_a_push_that_is_repeated_counts_once_whatever_the_number_of_threads(cluster):
    acc = jaxaccum.ray.TreeAccumulator(
        LIKE, tables=TABLES, reduction="sum", timeout=SECONDS, actor_options={"max_concurrency": 8}
    )
    for k in range(10):
        ray.get([acc.apply_grad_ref(gradient(1), key=str(k)) for _ in range(8)], timeout=SECONDS)
    assert acc.num_accumulated() == 10
    check(acc.take_grad(10, timeout=SECONDS), [1] * 10)
    acc.close()


def test_a_take_ends_in_time(acc):
    with pytest.raises(jaxaccum.DeadlineExceededError):
        acc.take_grad(1, timeout=0.01)
    with pytest.raises(jaxaccum.InvalidArgumentError, match="num_required"):
        acc.take_grad(0)


def test_asyncio(acc):
    async def work():
        taken = asyncio.create_task(acc.take_grad_async(3, timeout=SECONDS))
        step = acc.global_step
        answers = await asyncio.gather(
            *(acc.apply_grad_async(gradient(n), step) for n in (1, 2, 4))
        )
        return answers, await taken

    answers, taken = asyncio.run(work())
    assert {answer.verdict for answer in answers} == {jaxaccum.Verdict.ACCEPTED}
    check(taken, [1, 2, 4])


def sum_of(tree):
    return float(tree["bias"].sum())


def test_references_go_on_to_other_tasks(acc, cluster):
    step = acc.global_step
    pushed = [acc.apply_grad_ref(gradient(n), step) for n in (1, 2)]
    total = cluster.remote(num_cpus=0)(sum_of).remote(acc.take_grad_ref(2))
    assert ray.get(total, timeout=SECONDS) == 6
    assert [type(answer) for answer in ray.get(pushed)] == [jaxaccum.Applied] * 2


def test_more_references_than_threads_are_served_in_the_end(cluster):
    acc = jaxaccum.ray.TreeAccumulator(LIKE, tables=TABLES, reduction="sum", timeout=SECONDS)
    waiting = [acc.take_grad_ref(1) for _ in range(70)]
    with pytest.raises(jaxaccum.DeadlineExceededError):  # has a thread all the same
        acc.take_grad(1, timeout=0.01)
    pushed = 0
    while waiting:
        assert acc.apply_grad(gradient(1), 10**9).verdict == jaxaccum.Verdict.ACCEPTED
        pushed += 2
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.001)
        pushed -= sum(sum_of(tree) for tree in ray.get(done))
    assert pushed == 2 * acc.num_accumulated()
    acc.close()


def test_no_method_of_the_actor_is_a_coroutine():
    """One, and Ray would take two thread switches more for each gradient, without a word."""
    assert not inspect.getmembers(TreeAccumulatorActor, inspect.iscoroutinefunction)


def test_what_is_saved_can_be_loaded(acc):
    step = acc.global_step
    acc.apply_grad(gradient(6), step)
    saved = acc.state_dict()
    check(acc.take_grad(1, timeout=SECONDS), [6])
    acc.load_state_dict(saved)
    assert acc.global_step == step
    check(acc.take_grad(1, timeout=SECONDS), [6])
    acc.set_global_step(step + 5)
    assert acc.global_step == step + 5


def large_gradients(num, ids):
    """Of many bytes, which travel in Ray's store: integers, so that sums are exact."""
    rng = np.random.default_rng(num)
    return [
        {
            "table": jaxaccum.IndexedSlices(
                rng.integers(0, 50, ids).astype(np.int32),
                rng.integers(-8, 8, (ids, 64)).astype(np.float32),
                (1000, 64),
            ),
            "dense": rng.integers(-8, 8, (256, 128)).astype(np.float32),
        }
        for _ in range(num)
    ]


@pytest.mark.parametrize(("ids", "exactly"), [(512, False), (500, False), (512, True)])
def test_large_gradients_are_summed_and_travel_back_without_much_padding(cluster, ids, exactly):
    given = large_gradients(3, ids)
    acc = jaxaccum.ray.TreeAccumulator(
        given[0], reduction="sum", capacity=800, exactly=exactly, timeout=SECONDS
    )
    expected = np.zeros((1000, 64), np.float32)
    for grad in given:
        acc.apply_grad(grad)
        np.add.at(expected, grad["table"].indices, grad["table"].values)
    taken = acc.take_grad(3, timeout=SECONDS)
    acc.close()
    assert isinstance(taken["table"].values, np.ndarray)
    assert taken["table"].values.shape == (64, 64)  # 50 rows, rounded up
    np.testing.assert_array_equal(taken["table"].to_dense(), expected)
    np.testing.assert_array_equal(taken["dense"], sum(grad["dense"] for grad in given))


def read_in_actor(ids, *, exactly):
    """What the actor hands to the device for a gradient, table and dense leaf."""
    (grad,) = large_gradients(1, ids)
    acc = OwningAccumulator(grad, exactly=exactly)
    read = acc._core._accumulated.read(grad)
    theirs = grad["table"].indices, grad["table"].values, grad["dense"]
    ours = read.indices[0], read.values[0], read.dense[0]
    return [np.shares_memory(a, b) for a, b in zip(ours, theirs, strict=True)]


def test_the_actor_copies_only_what_must_be_padded_or_is_kept():
    assert read_in_actor(512, exactly=False) == [True, True, True]
    assert read_in_actor(500, exactly=False) == [False, False, True]
    assert read_in_actor(512, exactly=True) == [False, False, False]


def test_another_version_is_told(acc, monkeypatch):
    handle = ray.cloudpickle.loads(ray.cloudpickle.dumps(acc))
    monkeypatch.setattr("jaxaccum._ray.tree_accumulator.version", lambda: "0.0.1")
    message = r"the worker runs jaxaccum 0\.0\.1, the server \d.*: install the same"
    with pytest.raises(jaxaccum.ray.VersionMismatchError, match=message):
        handle.num_accumulated()


def pid():
    return os.getpid()


def test_a_server_that_does_not_answer_is_told_in_time(cluster):
    acc = jaxaccum.ray.TreeAccumulator(LIKE, tables=TABLES, timeout=SECONDS)
    waiting = acc.take_grad_ref(1)
    process = ray.get(acc._actor.__ray_call__.remote(lambda self: os.getpid()), timeout=SECONDS)
    impatient = ray.cloudpickle.loads(ray.cloudpickle.dumps(acc))
    assert impatient.num_accumulated() == 0
    impatient._timeout = 0.3
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(jaxaccum.ray.UnavailableError, match=r"has not answered within 0\.3 s"):
        impatient.apply_grad(gradient(1))
    os.kill(process, signal.SIGCONT)
    # It had arrived: as it says, a push that ends so may yet be counted.
    check(ray.get(waiting, timeout=SECONDS), [1])
    os.kill(process, signal.SIGKILL)
    with pytest.raises(jaxaccum.ray.UnavailableError, match="cannot be reached"):
        acc.apply_grad(gradient(1))


def test_closing_cancels_those_who_wait(cluster):
    acc = jaxaccum.ray.TreeAccumulator(LIKE, tables=TABLES, timeout=SECONDS)
    waiting = acc.take_grad_ref(1)
    assert acc.statistics()["waiting"] in (0, 1)
    acc.close()
    with pytest.raises(jaxaccum.CancelledError):
        ray.get(waiting, timeout=SECONDS)
    with pytest.raises(jaxaccum.CancelledError):
        acc.num_accumulated()
