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
        self.running = {}
        for k in range(num_workers):
            self.start_worker(range(k * each, (k + 1) * each))

    def start_worker(self, numbers):
        actor = self.ray.remote(given.Worker).options(num_cpus=0)
        log = self.logs / f"worker-{numbers.start // self.each}.jsonl"
        worker = actor.remote(self.server, log, self.num_gradients)
        self.running[worker.run.remote(numbers)] = (worker, numbers)

    def wait(self, num_tried):
        """Until so many gradients have been tried; the last of a worker that died is given up."""
        end = time.monotonic() + SECONDS
        while len(given.read_logs(self.logs)) < num_tried and self.running:
            assert time.monotonic() < end
            done, _ = self.ray.wait(list(self.running), timeout=0.05)
            for run in done:
                _, numbers = self.running.pop(run)
                try:
                    self.ray.get(run)
                except self.ray.exceptions.RayActorError:
                    tried = [n for n in numbers if n in given.read_logs(self.logs)]
                    self.start_worker(
                        range(max(tried, default=numbers.start - 1) + 1, numbers.stop)
                    )

    def kill_worker(self, rng):
        for worker, _ in rng.permutation(np.array(list(self.running.values()), object)):
            kill(self.ray.get(worker.pid.remote(), timeout=SECONDS))
            return

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
        assert len(fates) == num_workers * each
        assert sum(fate == "tried" for fate in fates.values()) <= num_kills
    finally:
        run.server.close()


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_torn_whoever_dies(cluster, tmp_path, seed):
    conserve(cluster, tmp_path, seed, num_workers=4, each=12, num_kills=4)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_torn_of_sixteen_workers(cluster, tmp_path, seed):
    conserve(cluster, tmp_path, seed, num_workers=16, each=20, num_kills=8)
