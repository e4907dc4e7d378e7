"""Workers in processes, a server in shards, kills of all of them: no gradient is torn or lost."""

import os
import signal
import time

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'jaxaccum[ray]'")

import ray_gradients as given

import jaxaccum
import jaxaccum.ray

pytestmark = pytest.mark.slow

SECONDS = 120


def kill(pid):
    os.kill(pid, signal.SIGKILL)


class Run:
    """A server, its workers, and what has become of them."""

    def __init__(self, ray, folder, num_workers, each, **options):
        self.ray, self.folder, self.each = ray, folder, each
        self.num_gradients = (num_workers + 1) * each
        self.server = jaxaccum.ray.ParameterServer(
            given.params(self.num_gradients),
            given.optimizer(),
            tables=given.TABLES,
            reduction="sum",
            checkpoint_dir=folder / "server",
            timeout=SECONDS,
            **options,
        )
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.running, self.killed, self.num_deaths = {}, [], 0
        for k in range(num_workers):
            self.start_worker(range(k * each, (k + 1) * each))

    def start_worker(self, numbers):
        actor = self.ray.remote(given.Worker).options(num_cpus=0)
        log = self.logs / f"worker-{numbers.start // self.each}.jsonl"
        worker = actor.remote(self.server, log, self.num_gradients)
        pid = worker.pid.remote()
        self.running[worker.run.remote(numbers)] = (pid, worker, numbers)

    def wait(self, num_tried):
        """Until so many gradients have been tried; the last of a worker that died is given up."""
        end = time.monotonic() + SECONDS
        while len(given.read_logs(self.logs)) < num_tried and self.running:
            assert time.monotonic() < end
            done, _ = self.ray.wait(list(self.running), timeout=0.05)
            for run in done:
                *_, numbers = self.running.pop(run)
                try:
                    self.ray.get(run)
                except self.ray.exceptions.RayActorError:
                    self.num_deaths += 1
                    tried = [n for n in numbers if n in given.read_logs(self.logs)]
                    self.start_worker(
                        range(max(tried, default=numbers.start - 1) + 1, numbers.stop)
                    )

    def kill_worker(self, rng):
        """In the middle of what it does: its process is asked for before that."""
        alive = [run for run in self.running if run not in self.killed]
        if alive:
            self.killed.append(alive[rng.integers(len(alive))])
            pid, *_ = self.running[self.killed[-1]]
            kill(self.ray.get(pid, timeout=SECONDS))

    def kill_server(self, which):
        statistics = self.server.statistics()
        pids = [shard["pid"] for shard in statistics["shards"] if shard] + [statistics["pid"]]
        kill(pids[which % len(pids)])

    def finish(self):
        """Lets the workers end, and fills the last step up; returns the final parameters."""
        self.wait(self.num_gradients)
        while self.running:
            self.wait(self.num_gradients)
        first = self.num_gradients - self.each
        for number in range(first, self.num_gradients):
            statistics = self.server.statistics()
            if statistics["num_accumulated"] == 0 and number > first:
                break
            answer = self.server.push(
                given.gradient(number, self.num_gradients), statistics["global_step"]
            )
            assert answer.verdict == jaxaccum.Verdict.ACCEPTED
        values, _ = self.server.pull(given.ALL, at_least=answer.global_step)
        return values


def conserve(ray, folder, seed, num_workers, each, num_kills):
    rng = np.random.default_rng(seed)
    run = Run(
        ray, folder, num_workers, each, num_shards=3, num_required=int(rng.integers(1, 5)),
        max_staleness=int(rng.integers(0, 4)), exactly=bool(rng.integers(2)), checkpoint_every=3,
    )  # fmt: skip
    try:
        tried = np.sort(rng.integers(1, num_workers * each, num_kills))
        for k, num_tried in enumerate(tried):
            run.wait(num_tried)
            # A shard, two workers, the coordinator, and again.
            if k % 3 == 0:
                run.kill_server(3 if k % 2 else int(rng.integers(3)))
            else:
                run.kill_worker(rng)
        values = run.finish()
        lost, statistics = run.server.lost(), run.server.statistics()
        fates = given.read_logs(run.logs)
        counted = given.check_conservation(values, fates, lost)
        assert len(counted) == statistics["accepted"]
        assert statistics["restarts"] >= 1
        assert run.num_deaths >= 1
        assert len(fates) == num_workers * each
        assert sum(fate == "tried" for fate in fates.values()) <= num_kills
    finally:
        run.server.close()


def test_all_shards_go_back_together_and_tell_what_is_lost(cluster, tmp_path):
    """Gradient by gradient: those of the checkpoint, those that waited in it, those after it."""
    server = jaxaccum.ray.ParameterServer(
        given.params(10), given.optimizer(), tables=given.TABLES, reduction="sum", num_shards=2,
        num_required=2, checkpoint_dir=tmp_path, checkpoint_every=1000, timeout=SECONDS,
    )  # fmt: skip

    def push(*numbers):
        for number in numbers:
            step = server.statistics()["global_step"]
            answer = server.push(given.gradient(number, 10), step, key=str(number))
            assert answer.verdict == jaxaccum.Verdict.ACCEPTED

    def check(in_steps, lost):
        values, _ = server.pull(given.ALL, at_least=server.statistics()["global_step"])
        expected = np.zeros(10)
        for step, numbers in enumerate(in_steps):
            expected[list(numbers)] = step + 1
        np.testing.assert_array_equal(values["bias"], expected)
        given.check_conservation(values, {}, lost)
        assert sorted(server.lost()) == lost

    push(0, 1, 2, 3, 4)  # the last one waits
    assert server.checkpoint() == 2
    push(5, 6)
    check([(0, 1), (2, 3), (4, 5)], lost=[])
    kill(server.statistics()["shards"][1]["pid"])
    check([(0, 1), (2, 3)], lost=["5", "6"])
    push(7, 8, 6)  # whoever pushed 6 has not been answered, and repeats it
    check([(0, 1), (2, 3), (4, 7), (8, 6)], lost=["5"])
    server.checkpoint()
    push(9)
    kill(server.statistics()["pid"])
    check([(0, 1), (2, 3), (4, 7), (8, 6)], lost=["5", "9"])
    statistics = server.statistics()
    assert (statistics["num_steps"], statistics["accepted"], statistics["restarts"]) == (4, 8, 2)
    server.close()


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_torn_whoever_dies(cluster, tmp_path, seed):
    conserve(cluster, tmp_path, seed, num_workers=4, each=12, num_kills=4)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_torn_of_sixteen_workers(cluster, tmp_path, seed):
    conserve(cluster, tmp_path, seed, num_workers=16, each=20, num_kills=8)
