"""Whole gradients from many threads: each accepted one is in one mean, on all leaves."""

import os
import pathlib
import subprocess
import sys
import textwrap
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import takers

import jaxaccum

# The gate runs a hundred; see its slower part.
STRESS_SEEDS = int(os.environ.get("JAXACCUM_STRESS_SEEDS", "4"))
NUM_WORKERS, NUM_TAKERS, NUM_GRADIENTS = 12, 3, 8
NUM_IDS = NUM_WORKERS * NUM_GRADIENTS + 64  # and what is fed at the end
EVERY = NUM_IDS  # the row that each gradient touches
FUTURE = 1 << 40

POLICIES = [
    {},
    {"exactly": True},
    {"carry_over": True},
    {"max_staleness": 1},
    {"exactly": True, "carry_over": True},
]


def whole_gradient(number, kind=np.asarray):
    """Says on every leaf whose it is: a row of its own in two tables, an entry of a dense leaf."""
    dense = np.zeros(NUM_IDS + 1, np.float32)
    dense[[number, EVERY]] = 1
    ones = kind(np.ones((3, 1), np.float32))
    few = jaxaccum.IndexedSlices(np.array([number, EVERY, number]), ones / 2, (NUM_IDS + 1, 1))
    many = jaxaccum.IndexedSlices(np.array([EVERY, number]), ones[:2], (None, 1))
    return {"few": few, "dense": kind(dense), "many": many}


LIKE = whole_gradient(0)


class Storm:
    """Workers and takers with minds of their own, all decided by the seed."""

    def __init__(self, seed):
        self.seed, self.policy = seed, POLICIES[seed % len(POLICIES)]
        self.acc = jaxaccum.TreeAccumulator(LIKE, **self.policy)
        self.accepted, self.refused, self.means, self.errors = [], [], [], []
        self.start = threading.Barrier(NUM_WORKERS + NUM_TAKERS, timeout=takers.PATIENCE)

    def worker(self, number):
        rng = np.random.default_rng((self.seed, number))
        self.start.wait()
        step = 0
        for k in range(NUM_GRADIENTS):
            gradient = whole_gradient(
                NUM_GRADIENTS * number + k, (np.asarray, jnp.asarray)[int(rng.random() < 0.1)]
            )
            if rng.random() < 0.1:  # what is bad on the last leaf is added on none
                bad = jaxaccum.IndexedSlices(np.array([1, -1]), np.ones((2, 1), np.float32), None)
                with pytest.raises(jaxaccum.InvalidArgumentError):
                    self.acc.apply_grad(gradient | {"many": bad}, FUTURE)
            if rng.random() < 0.05:
                self.acc.set_global_step(step + 1)
            age = int(rng.integers(0, 3)) if rng.random() < 0.4 else 0
            verdict, step = self.acc.apply_grad(gradient, step - age, worker=number)
            fates = self.accepted if verdict == jaxaccum.Verdict.ACCEPTED else self.refused
            fates.append(NUM_GRADIENTS * number + k)

    def taker(self, number):
        rng = np.random.default_rng((self.seed, -number % 97))
        self.start.wait()
        while True:
            num_required = int(rng.integers(1, 5))
            timeout = float(rng.choice([0, 1e-3, takers.PATIENCE]))
            try:
                mean = self.acc.take_grad(num_required, timeout=timeout)
            except jaxaccum.DeadlineExceededError:
                continue
            except jaxaccum.CancelledError:
                return
            self.means.append((num_required, mean))

    def guarded(self, role, number):
        try:
            role(number)
        except BaseException as error:
            self.errors.append(error)

    def run(self):
        roles = [(self.worker, k) for k in range(NUM_WORKERS)]
        roles += [(self.taker, k) for k in range(NUM_TAKERS)]
        threads = [threading.Thread(target=self.guarded, args=role, daemon=True) for role in roles]
        for thread in threads:
            thread.start()
        for thread in threads[:NUM_WORKERS]:
            thread.join(takers.PATIENCE)
        self.drain()
        self.acc.close()
        for thread in threads[NUM_WORKERS:]:
            thread.join(takers.PATIENCE)
        assert not self.errors
        assert not any(thread.is_alive() for thread in threads)

    def drain(self):
        """Takes what is left, and feeds those who wait for more than that."""
        fed = NUM_WORKERS * NUM_GRADIENTS
        while self.is_holding(stats := self.acc.statistics()):
            num_required = max(stats["num_accumulated"], 1)
            try:
                self.means.append((num_required, self.acc.take_grad(num_required, timeout=0)))
            except jaxaccum.DeadlineExceededError:
                assert self.acc.apply_grad(whole_gradient(fed), FUTURE).verdict == 0
                self.accepted.append(fed)
                fed += 1
        assert stats["accepted"] == len(self.accepted)
        assert stats["stale"] == len(self.refused)
        assert sum(stats["staleness"].values()) == stats["accepted"] + stats["stale"]

    def is_holding(self, stats):
        held = stats["kept_bytes"] if self.policy.get("exactly") else sum(stats["rows"].values())
        return held or stats["num_accumulated"] or stats["unclaimed"]

    def gradients_in(self, num_required, mean):
        """The numbers of the gradients in a mean, which must be whole and alike on all leaves."""
        dense = np.asarray(mean["dense"])
        numbers = np.flatnonzero(dense)[:-1].tolist()
        share = np.float32(1) / np.float32(len(numbers))
        assert dense[EVERY] == 1
        assert set(dense[numbers].tolist()) == {float(share)}
        for name, of_all in (("few", 0.5), ("many", 1.0)):
            rows = mean[name]
            mask = np.asarray(rows.row_mask)
            assert np.asarray(rows.indices)[mask].tolist() == [*numbers, EVERY]
            values = np.asarray(rows.values)[mask, 0].tolist()
            assert values == [float(share)] * len(numbers) + [of_all]
        if self.policy == {"exactly": True}:
            assert len(numbers) == num_required
        elif "carry_over" not in self.policy:
            assert len(numbers) >= num_required
        return numbers


@pytest.mark.parametrize("seed", range(STRESS_SEEDS))
def test_every_accepted_gradient_is_taken_once(seed):
    before = set(threading.enumerate())
    storm = Storm(seed)
    storm.run()
    taken = [number for each in storm.means for number in storm.gradients_in(*each)]
    assert sorted(taken) == sorted(storm.accepted)
    assert len(storm.accepted) + len(storm.refused) >= NUM_WORKERS * NUM_GRADIENTS
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("exactly", [False, True])
def test_a_step_that_ends_while_a_gradient_is_read_makes_it_stale(exactly, monkeypatch):
    """What is fresh when it is looked at, outside the lock, may be stale when it is added."""
    acc = jaxaccum.TreeAccumulator(LIKE, exactly=exactly)
    acc.apply_grad(whole_gradient(0))
    guarded = acc._core._accumulated
    read = guarded.read

    def slow(gradient):
        acc.take_grad(1)
        return read(gradient)

    monkeypatch.setattr(guarded, "read", slow)
    assert acc.apply_grad(whole_gradient(1)) == (jaxaccum.Verdict.STALE, 1)
    assert acc.num_accumulated() == 0


@pytest.mark.parametrize("exactly", [False, True])
def test_ctrl_c_at_any_moment_tears_no_gradient(exactly):
    """A storm of signals, each raising wherever the main thread is; staged or dispatched."""
    program = f"""
        import signal, numpy as np, jax.numpy as jnp, jaxaccum

        exactly = {exactly}
        like = {{"a": np.zeros((64, 1), np.float32), "b": np.zeros((64, 1), np.float32),
                "d": np.zeros(3, np.float32)}}
        acc = jaxaccum.TreeAccumulator(like, tables={{"a": True, "b": True, "d": False}},
                                       reduction="sum", exactly=exactly)
        FUTURE = 1 << 40

        def gradient(kind):
            table = jaxaccum.IndexedSlices(np.arange(32), kind(np.ones((32, 1), np.float32)),
                                           (64, 1))
            return {{"a": table, "b": table, "d": kind(np.ones(3, np.float32))}}

        def look(mean):
            counts = [float(mean["a"].values[0, 0]), float(mean["b"].values[31, 0]),
                      float(mean["d"][1])]
            assert len(set(counts)) == 1, counts
            return int(counts[0])

        class Strike(Exception):
            pass

        def strike(*_):
            raise Strike

        def storm(given):
            for n in range(1, 12):  # compiled in peace: jit's first call of a kind runs Python code
                for _ in range(n):
                    acc.apply_grad(given, FUTURE)
                look(acc.take_grad(n, trim=True))
            signal.signal(signal.SIGALRM, strike)
            struck, means = 0, []
            for k in range(1500):
                try:
                    signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-6, 120e-6)))
                    acc.apply_grad(given, FUTURE)
                    if k % 7 == 0:  # takes some of which last longer than that
                        signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-6, 2e-2)))
                        means.append(acc.take_grad(1, timeout=0))
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Strike:
                    struck += 1
                except (SystemError, ValueError) as error:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    # What NumPy and JAX make of one that strikes while their C calls Python.
                    assert "exception set" in str(error) or "Strike" in str(error), error
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            stats = acc.statistics()
            assert stats["waiting"] == 0, stats
            held = acc.num_accumulated()
            unclaimed = stats["unclaimed"]
            while acc.statistics()["unclaimed"]:
                look(acc.take_grad(1, timeout=0, trim=True))
            assert not held or look(acc.take_grad(held, timeout=0, trim=True)) == held
            counts = [look(mean) for mean in means]
            assert len(counts) > 0 and min(counts) > 0, counts
            assert not exactly or set(counts) == {{1}}, counts
            assert struck > 150, struck
            print("consistent", struck, held, unclaimed)

        rng = np.random.default_rng(0)
        storm(gradient(np.asarray))
        storm(gradient(jnp.asarray))
    """
    hearing = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    result = subprocess.run(
        [sys.executable, "-c", hearing + textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(jaxaccum.__file__).parents[1])},
        timeout=takers.PATIENCE * 2,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("consistent") == 2
