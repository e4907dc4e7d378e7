"""Waiting, leaving, closing, interrupting; and everything at once."""

import asyncio
import collections
import contextlib
import gc
import os
import pathlib
import random
import subprocess
import sys
import textwrap
import threading
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import takers

import jaxaccum
from jaxaccum._coordinator.coordinator import Coordinator, Waiter

# Seeds of the stress test. The gate runs a hundred; see its slower part.
STRESS_SEEDS = int(os.environ.get("JAXACCUM_STRESS_SEEDS", "2"))


def rows_of(grad):
    return dict(
        zip(np.asarray(grad.indices).tolist(), np.asarray(grad.values).tolist(), strict=True)
    )


@pytest.fixture
def watch(monkeypatch):
    return takers.Watch(monkeypatch)


# Time.


@pytest.mark.parametrize("timeout", [0, 0.0, -1, 0.01])
def test_a_take_that_times_out_takes_nothing(timeout):
    acc = takers.accumulator()
    acc.apply_grad([1], [2])
    with pytest.raises(jaxaccum.DeadlineExceededError, match="Timed out waiting for notification"):
        acc.take_grad(2, timeout=timeout)
    assert acc.statistics()["waiting"] == 0
    assert acc.statistics()["global_step"] == 0
    assert rows_of(acc.take_grad(1, timeout=timeout)) == {1: 2}


def test_timeouts_may_be_endless_but_not_nan():
    acc = takers.accumulator()
    acc.apply_grad([1], [2])
    assert rows_of(acc.take_grad(1, timeout=float("inf"))) == {1: 2}
    with pytest.raises(ValueError, match="NaN"):
        acc.take_grad(1, timeout=float("nan"))


def test_a_head_that_times_out_lets_the_next_be_served_at_once(watch):
    acc = takers.accumulator()
    head, small, large = (watch.take(acc, n) for n in (3, 1, 2))
    acc.apply_grad([1], [2])
    assert takers.waiting(acc) == [head.waiter, small.waiter, large.waiter]
    watch.expire(head)
    assert rows_of(small.result()) == {1: 2}
    with pytest.raises(jaxaccum.DeadlineExceededError):
        head.result()
    assert takers.waiting(acc) == [large.waiter]
    assert acc.num_accumulated() == 0
    acc.close()


def test_a_taker_served_as_its_time_runs_out_gets_its_gradient(watch):
    """Served and expired at once: whoever holds the lock first decides, and nothing is lost."""
    acc = takers.accumulator()
    taker = watch.take(acc, 1)
    watch.late.append(taker.waiter.wake.__self__)
    acc.apply_grad([1], [2])
    assert rows_of(taker.result()) == {1: 2}


def test_a_taker_cancelled_as_its_time_runs_out_is_told_so(watch):
    acc = takers.accumulator()
    taker = watch.take(acc, 1)
    watch.late.append(taker.waiter.wake.__self__)
    acc.close()
    with pytest.raises(jaxaccum.CancelledError, match="TakeGrad operation was cancelled"):
        taker.result()


# Closing.


def calls(acc):
    return [
        lambda: acc.apply_grad([1], [1]),
        lambda: acc.apply_grad([1], [1], local_step=-1),
        lambda: acc.take_grad(1),
        lambda: acc.take_indexed_slices_grad(1, timeout=0),
        lambda: asyncio.run(acc.take_grad_async(1)),
        lambda: acc.set_global_step(1),
        acc.num_accumulated,
        acc.statistics,
        acc.state_dict,
        lambda: acc.load_state_dict({}),
    ]


def test_closing_cancels_every_waiter_and_later_calls_raise(watch):
    with takers.accumulator() as acc:
        waiting = [watch.take(acc, n) for n in (3, 1, 2)]
        acc.apply_grad([1], [2])
    for taker in waiting:
        with pytest.raises(jaxaccum.CancelledError, match="TakeGrad operation was cancelled"):
            taker.result()
    acc.close()
    for call in calls(acc):
        with pytest.raises(jaxaccum.CancelledError, match="closed"):
            call()


def test_an_interrupted_close_is_closed_and_the_next_one_finishes_it(watch):
    """Ctrl-C as the first waiter is woken: nobody gets in, and nobody is left behind."""
    acc = takers.accumulator()
    core, seen = acc.accumulator_ref, []

    def wake():
        seen.append(type(waiter.outcome[0]))
        if len(seen) == 1:
            raise KeyboardInterrupt

    waiter = Waiter(2, wake)
    core._enqueue(waiter)
    taker = watch.take(acc, 1)
    with pytest.raises(KeyboardInterrupt):
        acc.close()
    for call in calls(acc):
        with pytest.raises(jaxaccum.CancelledError, match="closed"):
            call()
    acc.close()
    assert seen == [jaxaccum.CancelledError] * 2
    with pytest.raises(jaxaccum.CancelledError, match="TakeGrad operation was cancelled"):
        taker.result()


def test_whoever_is_woken_by_closing_finds_it_closed():
    acc = takers.accumulator()
    core, errors = acc.accumulator_ref, []

    def wake():
        for call in (lambda: acc.apply_grad([1], [1]), acc.num_accumulated, acc.state_dict):
            with pytest.raises(jaxaccum.CancelledError, match="closed") as raised:
                call()
            errors.append(raised.value)

    core._enqueue(Waiter(2, wake))
    acc.close()
    assert len(errors) == 3


def test_closing_frees_what_was_held_staged_and_unclaimed(monkeypatch):
    acc = takers.accumulator()
    core = acc.accumulator_ref

    def die(*_, **__):
        raise SystemExit

    acc.apply_grad([1], [2])
    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "_collect", die)
        with pytest.raises(SystemExit):
            acc.take_grad(1)
    acc.apply_grad([1], [2], local_step=1)
    unclaimed = core._unclaimed[0]
    (taken,), _ = unclaimed.arrays
    held = [*core._accumulated._box[0], *core._accumulated._stage.values, *taken]
    held = [weakref.ref(array) for array in held]
    del unclaimed, taken
    gc.collect()
    assert all(ref() is not None for ref in held)
    acc.close()
    gc.collect()
    assert all(ref() is None for ref in held)


# A thread that dies while it waits, and one that does after it was served.


@pytest.mark.parametrize("death", [KeyboardInterrupt, SystemExit])
def test_what_a_dead_taker_was_served_goes_to_the_next(death, monkeypatch):
    acc = takers.accumulator()
    acc.apply_grad([1], [2])
    acc.apply_grad([1], [3])

    def die(*_, **__):
        raise death

    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "_collect", die)
        with pytest.raises(death):
            acc.take_grad(2)
    stats = acc.statistics()
    assert (stats["unclaimed"], stats["num_accumulated"], stats["global_step"]) == (1, 0, 1)
    acc.apply_grad([7], [7], local_step=1)
    with pytest.raises(jaxaccum.DeadlineExceededError):
        acc.take_grad(3, timeout=0)  # neither the two nor the one are enough
    assert rows_of(acc.take_grad(2)) == {1: 5}
    assert rows_of(acc.take_grad(1)) == {7: 7}
    assert acc.statistics()["unclaimed"] == 0


def test_a_dead_waiter_leaves_the_queue(watch, monkeypatch):
    acc = takers.accumulator()
    caught = []

    def died(*_):
        caught.append(True)
        return True

    monkeypatch.setattr(threading, "excepthook", died)
    head = watch.take(acc, 2)
    second = watch.take(acc, 1)
    event = head.waiter.wake.__self__
    expire, event.wait = event.set, None

    def interrupt(waiter):
        raise SystemExit

    monkeypatch.setattr(acc.accumulator_ref, "_expire", interrupt)
    watch.late.append(event)
    expire()
    head.join(takers.PATIENCE)
    assert takers.waiting(acc) == [second.waiter]
    acc.apply_grad([1], [2])
    assert rows_of(second.result()) == {1: 2}


def test_an_apply_that_fails_wedges_nobody(watch, monkeypatch):
    acc = takers.accumulator()
    taker = watch.take(acc, 1)
    state = acc.accumulator_ref._accumulated

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(state), "add", fail)
        with pytest.raises(MemoryError):
            acc.apply_grad([1], [1])
    assert takers.waiting(acc) == [taker.waiter]
    acc.apply_grad([1], [2])
    assert rows_of(taker.result()) == {1: 2}


def test_a_take_that_fails_is_the_takers_concern(watch, monkeypatch):
    acc = takers.accumulator()
    first, second = watch.take(acc, 1), watch.take(acc, 1)
    state, fails = acc.accumulator_ref._accumulated, [True]
    take = type(state).take

    def flaky(self, outcome, num_required):
        if fails:
            raise MemoryError(fails.pop())
        take(self, outcome, num_required)

    monkeypatch.setattr(type(state), "take", flaky)
    assert acc.apply_grad([1], [2])
    with pytest.raises(MemoryError):
        first.result()
    assert rows_of(second.result()) == {1: 2}


DISPATCHES = {
    "apply": lambda acc: acc.apply_grad(np.arange(32) % 16, jnp.ones(32, jnp.int32)),
    "statistics": lambda acc: acc.statistics(),
    "state_dict": lambda acc: acc.state_dict(),
}


def lose_the_state(acc):
    for leaf in acc.accumulator_ref._accumulated._box[0]:
        leaf.delete()


@pytest.mark.parametrize("call", DISPATCHES)
def test_losing_the_state_is_loud(call, watch, caplog):
    """Were a dispatch to fail after its buffers were given away, nobody would wait in vain."""
    acc = takers.accumulator()
    acc.apply_grad([1], [2])
    taker = watch.take(acc, 2)
    lose_the_state(acc)
    with pytest.raises(RuntimeError, match="deleted"):
        DISPATCHES[call](acc)
    with pytest.raises(jaxaccum.CancelledError):
        taker.result()
    assert "lost its rows" in caplog.text


def test_a_take_that_loses_the_state_closes(caplog):
    acc = takers.accumulator()
    acc.apply_grad([1], [2])
    lose_the_state(acc)
    with pytest.raises(RuntimeError, match="deleted"):
        acc.take_grad(1)
    assert "lost its rows" in caplog.text
    with pytest.raises(jaxaccum.CancelledError, match="closed"):
        acc.num_accumulated()


# Signals. In processes of their own, for they concern the main thread.


def run(program):
    # What a shell starts in the background is born deaf to Ctrl-C, and so are its children.
    hearing = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    result = subprocess.run(
        [sys.executable, "-c", hearing + textwrap.dedent(program)],
        cwd=pathlib.Path(__file__).parents[1] / "helpers",
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(jaxaccum.__file__).parents[1])},
        timeout=takers.PATIENCE * 2,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("between", [5, pytest.param(100, marks=pytest.mark.full)])
def test_ctrl_c_at_any_moment_tears_nothing(between):
    """A storm of signals, each raising wherever the main thread happens to be.

    NumPy's are staged, and sent by a take or, when it takes long to come, by an apply; those of JAX
    are dispatched one by one.
    """
    told = run(
        f"""
        import signal, takers, numpy as np, jax.numpy as jnp

        acc = takers.accumulator(shape=(64,), capacity=64)
        ids = np.arange(32)
        class Storm(Exception):
            pass

        def strike(*_):
            raise Storm

        def storm(ones):
            for n in range(1, 12):  # compiled in peace: jit's first call of a kind runs Python code
                for _ in range(n):
                    acc.apply_grad(ids, ones, local_step=1 << 40)
                acc.take_grad(1)
            signal.signal(signal.SIGALRM, strike)
            struck = 0
            for k in range(3000):
                try:
                    signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-6, 60e-6)))
                    acc.apply_grad(ids, ones, local_step=1 << 40)
                    if k % {between} == 0:
                        acc.take_grad(1, timeout=0)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Storm:
                    struck += 1
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            stats, state = acc.statistics(), acc.state_dict()
            assert stats["waiting"] == 0, stats
            assert state["num_accumulated"] == acc.num_accumulated() <= stats["accepted"]
            held = int(state["values"][0]) if len(state["values"]) else 0
            assert held == acc.num_accumulated(), (held, stats)
            assert struck > 300, struck
            print("consistent", struck)

        rng = np.random.default_rng(0)
        storm(np.ones(32, np.int32))
        storm(jnp.ones(32, jnp.int32))
    """
    )
    assert told.count("consistent") == 2


def test_signals_reach_a_thread_that_waits():
    """Ctrl-C interrupts its take, and a handler may close what it waits for."""
    told = run("""
        import os, signal, threading, takers
        from jaxaccum._coordinator.coordinator import Coordinator

        acc, enqueue, waits = takers.accumulator(), Coordinator._enqueue, threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: acc.close())

        def watched(core, waiter):
            enqueue(core, waiter)
            waits.set()

        def press(number):
            waits.wait(takers.PATIENCE)
            waits.clear()
            os.kill(os.getpid(), number)

        Coordinator._enqueue = watched
        threading.Thread(target=press, args=(signal.SIGINT,)).start()
        try:
            acc.take_grad(1)
        except KeyboardInterrupt:
            assert acc.statistics()["waiting"] == 0
            acc.apply_grad([1], [5])
            print("interrupted, then", acc.take_grad(1).values.tolist())
        waits.clear()
        threading.Thread(target=press, args=(signal.SIGTERM,)).start()
        try:
            acc.take_grad(1)
        except takers.jaxaccum.CancelledError as error:
            print(error)
    """)
    assert told.splitlines() == ["interrupted, then [5]", "TakeGrad operation was cancelled"]


# A handler that looks, in the middle of what it interrupts: at every call of it, one by one.

LOOKS = {
    "statistics": lambda acc: acc.statistics(),
    "state_dict": lambda acc: acc.state_dict(),
    "num_accumulated": lambda acc: acc.num_accumulated(),
    "apply": lambda acc: acc.apply_grad([3], [1], local_step=1 << 40),
    "take": lambda acc: acc.take_grad(1, timeout=0),
    "load": lambda acc: acc.load_state_dict({}),
}


def interrupting(handler, call, before=lambda: None, after=lambda: None):
    """Runs ``call`` as often as it makes calls inside the library, ``handler`` at one of them.

    A signal handler runs where Python enters or leaves a function: a profiler does so too.
    """
    moment, is_over = 0, False
    while not is_over:
        moment, left = moment + 1, moment

        def profile(frame, event, _):
            nonlocal left
            if "_coordinator" in frame.f_code.co_filename:
                left -= 1
                if left == -1:
                    sys.setprofile(None)
                    handler()

        before()
        sys.setprofile(profile)
        try:
            call()
        finally:
            sys.setprofile(None)
        after()
        is_over = left >= 0
    return moment


@pytest.mark.parametrize("look", LOOKS)
def test_a_handler_that_looks_spoils_nothing(look):
    acc, told = takers.accumulator(), collections.Counter()
    ids, ones = np.arange(2), np.ones(2, np.int32)
    seen = collections.Counter()
    for _ in range(40):  # compiled in peace
        acc.apply_grad(ids, ones)
    acc.take_grad(1)

    def handler():
        try:
            result = LOOKS[look](acc)
        except RuntimeError as error:
            told["refused" if "signal handler" in str(error) else error] += 1
        except (jaxaccum.DeadlineExceededError, KeyError):
            told["answered"] += 1
        else:
            told["answered"] += 1
            if look == "apply":
                told["applied"] += result
            if look == "take":
                seen.update(rows_of(result))

    def call():
        told["calls"] += 1
        acc.apply_grad(ids, ones, local_step=1 << 40)
        if told["calls"] % 3 == 0:
            with contextlib.suppress(jaxaccum.DeadlineExceededError):
                seen.update(rows_of(acc.take_grad(1, timeout=0)))

    interrupting(handler, call)
    acc.apply_grad([], np.zeros(0, np.int32), local_step=1 << 40)
    seen.update(rows_of(acc.take_grad(1)))
    assert set(told) <= {"calls", "refused", "answered", "applied"}
    assert told["refused"] > 10
    assert told["answered"] > 2
    assert seen[0] == seen[1] == told["calls"]
    assert seen[3] == told["applied"]


def test_a_handler_may_close_at_any_moment():
    """The call it interrupts ends, whoever waits is told, and nothing is kept."""
    fates, made = collections.Counter(), []

    def make():
        made[:] = [takers.accumulator(), Waiter(3, lambda: None)]
        made[0].accumulator_ref._enqueue(made[1])

    def call():
        with contextlib.suppress(jaxaccum.CancelledError):
            made[0].apply_grad([1], [2])
            made[0].apply_grad(np.arange(32) % 16, jnp.ones(32, jnp.int32))

    def look():
        core, waiter = made[0].accumulator_ref, made[1]
        fates[type(waiter.outcome[0]), bool(core._accumulated._box), len(core._queue)] += 1

    make()
    call()  # compiled in peace
    moments = interrupting(lambda: made[0].close(), call, make, look)
    assert fates.pop((type(None), True, 1)) == 1  # the last, which was not interrupted
    assert fates == {(jaxaccum.CancelledError, False, 0): moments - 1}


# The compiler.


def test_others_go_on_while_one_waits_for_the_compiler(monkeypatch, watch):
    acc = takers.accumulator(shape=(4997,), capacity=4096)  # like no other
    acc.apply_grad([1], [1])
    programs = acc.accumulator_ref._accumulated._programs
    begun, may_go_on = threading.Event(), threading.Event()

    lowered = collections.Counter()

    class Slow:
        def __init__(self, program):
            self.program = program

        def lower(self, *args):
            lowered[self] += 1
            begun.set()
            assert may_go_on.wait(takers.PATIENCE)
            return self.program.lower(*args)

        def __call__(self, *args):
            return self.program(*args)

    slow = programs._replace(apply_staged=Slow(programs.apply_staged), take=Slow(programs.take))
    monkeypatch.setattr(acc.accumulator_ref._accumulated, "_programs", slow)
    threads = [
        threading.Thread(
            target=acc.apply_grad, args=(np.arange(200), np.ones(200, np.int32)), daemon=True
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(takers.PATIENCE)
    assert acc.apply_grad([2], [1])  # of a size that is compiled
    assert acc.num_accumulated() == 2
    may_go_on.set()
    for thread in threads:
        thread.join(takers.PATIENCE)
    assert acc.num_accumulated() == 6
    assert lowered == {slow.apply_staged: 1}  # by one for all
    may_go_on.clear()
    begun.clear()
    taker = takers.Taker(acc, 6)
    assert begun.wait(takers.PATIENCE)
    assert acc.apply_grad([2], [1])
    may_go_on.set()
    assert rows_of(taker.result())[2] == 6


# asyncio.


def test_async_takers_queue_with_the_others(watch):
    async def main():
        acc = takers.accumulator()
        thread = watch.take(acc, 1)
        tasks = [asyncio.create_task(acc.take_grad_async(1)) for _ in range(2)]
        slices = asyncio.create_task(acc.take_indexed_slices_grad_async(1))
        while len(takers.waiting(acc)) < 4:
            await asyncio.sleep(0)
        results = []
        for k, task in enumerate([None, *tasks, slices]):
            acc.apply_grad([k], [k + 1], local_step=k)
            results.append(thread.result() if task is None else await task)
        return [rows_of(grad) for grad in results]

    assert asyncio.run(main()) == [{0: 1}, {1: 2}, {2: 3}, {3: 4}]


def test_cancelled_tasks_leave_the_queue_and_lose_nothing():
    async def main():
        acc = takers.accumulator()
        head = asyncio.create_task(acc.take_grad_async(2))
        second = asyncio.create_task(acc.take_grad_async(1))
        while len(takers.waiting(acc)) < 2:
            await asyncio.sleep(0)
        acc.apply_grad([1], [2])
        head.cancel()
        assert rows_of(await second) == {1: 2}
        # Served first, and cancelled before the loop gets round to it.
        third = asyncio.create_task(acc.take_grad_async(1))
        while not takers.waiting(acc):
            await asyncio.sleep(0)
        acc.apply_grad([3], [4], local_step=1)
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        assert rows_of(await acc.take_grad_async(1)) == {3: 4}
        with pytest.raises(jaxaccum.DeadlineExceededError):
            await acc.take_grad_async(1, timeout=0.01)
        closing = asyncio.create_task(acc.take_grad_async(1))
        while not takers.waiting(acc):
            await asyncio.sleep(0)
        acc.close()
        with pytest.raises(jaxaccum.CancelledError):
            await closing

    asyncio.run(main())


@pytest.mark.parametrize("is_late", [False, True])
def test_a_closed_event_loop_does_not_keep_its_gradient(is_late):
    """Nor is it given away twice when what waited is torn down, before or after it was taken."""
    acc = takers.accumulator()
    loop = asyncio.new_event_loop()
    task = loop.create_task(acc.take_grad_async(1))

    def tear_down(task):
        with pytest.raises(RuntimeError):
            task.get_coro().throw(RuntimeError)

    while not takers.waiting(acc):
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    acc.apply_grad([3], [4])
    if not is_late:
        tear_down(task)
    assert rows_of(acc.take_grad(1)) == {3: 4}
    if is_late:
        tear_down(task)
    assert acc.statistics()["unclaimed"] == 0
    task._log_destroy_pending = False
    del task
    gc.collect()


# Everything at once.

NUM_APPLIERS, NUM_TAKERS, NUM_GRADIENTS, NUM_ROWS = 16, 4, 6, 97


class Storm:
    """Appliers and takers with minds of their own, all decided by the seed."""

    def __init__(self, seed):
        self.acc = takers.accumulator(
            shape=(None if seed % 4 > 1 else NUM_ROWS, 2), capacity=(1, 64, 4096)[seed % 3]
        )
        self.seed = seed
        self.sent = collections.Counter()
        self.received = collections.Counter()
        self.num_sent = self.num_stale = 0
        self.errors = []
        self.lock = threading.Lock()
        self.start = threading.Barrier(NUM_APPLIERS + NUM_TAKERS + 1, timeout=takers.PATIENCE)

    def applier(self, number):
        rng = np.random.default_rng((self.seed, number))
        self.start.wait()
        for _k in range(NUM_GRADIENTS):
            n = int(rng.integers(0, 60))
            ids = rng.integers(0, NUM_ROWS, n)
            values = rng.integers(-1000, 1000, (n, 2)).astype(np.int32)
            kind = rng.random()
            if kind < 0.1:
                with pytest.raises(jaxaccum.InvalidArgumentError):
                    self.acc.apply_grad([-1], [[1, 1]], local_step=1 << 40)
            if kind > 0.9:
                self.acc.set_global_step(int(rng.integers(0, 5)))
            local_step = int(rng.integers(0, 8)) if kind < 0.5 else 1 << 40
            accepted = self.acc.apply_grad(ids, values, local_step=local_step)
            with self.lock:
                if accepted:
                    self.num_sent += 1
                    for i, row in zip(ids.tolist(), values.tolist(), strict=True):
                        for column, value in enumerate(row):
                            self.sent[i, column] += value
                else:
                    self.num_stale += 1

    def taker(self, number):
        rng = random.Random(self.seed * 1000 + number)
        self.start.wait()
        while True:
            timeout = rng.choice([0, 1e-4, 1e-3, takers.PATIENCE])
            try:
                grad = self.acc.take_grad(rng.randint(1, 6), timeout=timeout)
            except jaxaccum.DeadlineExceededError:
                continue
            except jaxaccum.CancelledError:
                return
            self.receive(grad)

    def receive(self, grad):
        indices, values = np.asarray(grad.indices), np.asarray(grad.values)
        assert (np.diff(indices) > 0).all()
        with self.lock:
            for i, row in zip(indices.tolist(), values.tolist(), strict=True):
                for column, value in enumerate(row):
                    self.received[i, column] += value

    def guarded(self, role, number):
        try:
            role(number)
        except BaseException as error:
            self.errors.append(error)

    def run(self):
        threads = [
            threading.Thread(target=self.guarded, args=(role, number), daemon=True)
            for role, count in ((self.applier, NUM_APPLIERS), (self.taker, NUM_TAKERS))
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        self.start.wait()
        for thread in threads[:NUM_APPLIERS]:
            thread.join(takers.PATIENCE)
        self.rest()
        self.acc.close()
        for thread in threads[NUM_APPLIERS:]:
            thread.join(takers.PATIENCE)
        assert not self.errors
        assert not any(thread.is_alive() for thread in threads)

    def rest(self):
        """Feeds the takers until nothing is left, and looks at the books."""
        while (stats := self.acc.statistics())["num_accumulated"] or stats["unclaimed"]:
            # Nothing but a count, for those who wait for more gradients than there are.
            self.acc.apply_grad([], np.zeros((0, 2), np.int32), local_step=1 << 40)
            self.num_sent += 1
        assert stats["accepted"] == self.num_sent
        assert stats["stale"] == self.num_stale
        assert stats["rows"] == 0


@pytest.mark.parametrize("seed", range(STRESS_SEEDS))
def test_every_accepted_value_is_taken_once(seed):
    before = set(threading.enumerate())
    storm = Storm(seed)
    storm.run()
    assert {k: v for k, v in storm.sent.items() if v} == {
        k: v for k, v in storm.received.items() if v
    }
    assert storm.num_sent + storm.num_stale >= NUM_APPLIERS * NUM_GRADIENTS
    assert set(threading.enumerate()) <= before
