"""Gradients pushed by worker processes on Ray: to an accumulator, to a parameter server, to nobody.

"Ray alone" moves the same arrays to an actor that does nothing with them: the floor. TensorFlow's
accumulator lies in a `tf.train.Server` process and is fed by others, where TensorFlow is installed.
A worker waits for each answer before its next push; steps and takes happen on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import harness
import numpy as np

import jaxaccum
import jaxaccum.ray

FUTURE = 1 << 40  # never stale
COLUMNS, POOL, A_STEP = 64, 4, 8
TABLE_ROWS = 1000 if harness.TINY else 1_000_000
CASES = [(32, 1)] if harness.TINY else list(itertools.product((1024, 4096, 65_536), (1, 2, 4)))
REPEATS = 1 if harness.TINY else 7
SECONDS = 120


def gradients(rows: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Other rows at each push, of which some repeat."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, COLUMNS), np.float32)
    ids = rng.integers(0, TABLE_ROWS, (POOL, rows), dtype=np.int32)
    return [(of_push, values) for of_push in ids]


def pushes_of(rows: int) -> int:
    """How many a worker makes at a time: about half a second's work."""
    return 4 if harness.TINY else max(8, 400_000 // rows)


class Sink:
    """Does nothing with what it is sent."""

    async def push(self, grad: jaxaccum.IndexedSlices) -> int:
        """Answers."""
        return 0


class Worker:
    """Pushes gradients, one after the other, to what it is told."""

    def __init__(self, rows: int, seed: int) -> None:
        shape = (TABLE_ROWS, COLUMNS)
        self._grads = [jaxaccum.IndexedSlices(*pair, shape) for pair in gradients(rows, seed)]

    def sink(self, sink: Any, number: int) -> None:
        """Pushes to an actor that does nothing."""
        import ray

        for k in range(number):
            ray.get(sink.push.remote(self._grads[k % POOL]))

    def accumulator(self, acc: jaxaccum.ray.TreeAccumulator, number: int) -> None:
        """Pushes to an accumulator."""
        for k in range(number):
            acc.apply_grad(self._grads[k % POOL], FUTURE)

    def server(self, server: jaxaccum.ray.ParameterServer, number: int) -> None:
        """Pushes to a parameter server."""
        for k in range(number):
            server.push(self._grads[k % POOL], FUTURE)


@contextlib.contextmanager
def ray_sides(rows: int, num_workers: int) -> Iterator[dict[str, Any]]:
    """What workers on Ray push to: by line, a function that has all of them push so often."""
    import jax
    import optax
    import ray

    like = np.zeros((TABLE_ROWS, COLUMNS), np.float32)
    sink = ray.remote(Sink).options(num_cpus=0).remote()
    acc = jaxaccum.ray.TreeAccumulator(
        jax.ShapeDtypeStruct(like.shape, like.dtype), tables=True, timeout=SECONDS
    )
    servers = {
        shards: jaxaccum.ray.ParameterServer(
            like, optax.sgd(0.1), tables=True, num_shards=shards, num_required=A_STEP,
            timeout=SECONDS,
        )
        for shards in (1, 2)
    }  # fmt: skip
    worker = ray.remote(Worker).options(num_cpus=0)
    workers = [worker.remote(rows, seed) for seed in range(num_workers)]

    def side(method: str, target: Any) -> Any:
        def run(number: int) -> None:
            calls = [getattr(each, method).remote(target, number) for each in workers]
            ray.get(calls, timeout=SECONDS)
            if method == "accumulator":  # its share of the time is that of a step
                acc.take_grad(1, timeout=SECONDS)

        return run

    try:
        yield {
            "Ray alone": side("sink", sink),
            "accumulator": side("accumulator", acc),
            **{f"server, {n} shard{'s'[: n > 1]}": side("server", s) for n, s in servers.items()},
        }
    finally:
        for server in servers.values():
            server.close()
        for actor in (sink, acc._actor, *workers):
            ray.kill(actor)


@contextlib.contextmanager
def tensorflow_side(rows: int, num_workers: int) -> Iterator[dict[str, Any]]:
    """The same pushes to TensorFlow's accumulator, by processes that listen on their input."""
    if not harness.is_installed("tensorflow"):
        yield {}
        return
    ports = [socket.socket() for _ in range(num_workers + 1)]
    for port in ports:
        port.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{port.getsockname()[1]}" for port in ports]
    for port in ports:
        port.close()
    started = []
    for rank in range(num_workers + 1):
        task = json.dumps({"addresses": addresses, "rank": rank, "rows": rows})
        command = [sys.executable, __file__, "--tensorflow", task]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))

    def run(number: int) -> None:
        for process in started[1:]:
            print(number, file=process.stdin, flush=True)
        for process in started[1:]:
            if process.stdout.readline() != "done\n":
                raise RuntimeError("a process of TensorFlow's has died")

    try:
        yield {"TensorFlow": run}
    finally:
        for process in started:
            process.kill()
            process.wait()


def tensorflow_process(addresses: list[str], rank: int, rows: int) -> None:
    """The server, of rank 0, or a worker that pushes as often as it is told."""
    import tensorflow as tf

    tf1 = tf.compat.v1
    tf1.disable_eager_execution()
    cluster = tf.train.ClusterSpec({"ps": addresses[:1], "worker": addresses[1:]})
    if rank == 0:
        tf1.train.Server(cluster, job_name="ps", task_index=0).join()
    server = tf1.train.Server(cluster, job_name="worker", task_index=rank - 1)
    with tf.device("/job:ps/task:0"):
        acc = tf1.SparseConditionalAccumulator(
            tf.float32, (TABLE_ROWS, COLUMNS), shared_name="table"
        )
        take = acc.take_indexed_slices_grad(1).op
    ids, values = tf1.placeholder(tf.int64, [None]), tf1.placeholder(tf.float32, [None, COLUMNS])
    with tf.device("/job:ps/task:0"):
        apply = acc.apply_grad(ids, values, local_step=FUTURE)
    session = tf1.Session(server.target)
    push = session.make_callable(apply, [ids, values])
    # It wants them sorted, and each once; the time this takes is not counted.
    unique = [np.unique(of_push, return_index=True) for of_push, _ in gradients(rows, rank - 1)]
    values_of = gradients(rows, rank - 1)[0][1]
    given = [(of_push.astype(np.int64), values_of[first]) for of_push, first in unique]
    for line in sys.stdin:
        for k in range(int(line)):
            push(*given[k % POOL])
        if rank == 1:
            session.run(take)
        print("done", flush=True)


def measure(rows: int, num_workers: int) -> dict[str, float]:
    """Pushes a second of all workers, by line; sides take turns."""
    number, rates = pushes_of(rows), {}
    with ray_sides(rows, num_workers) as ours, tensorflow_side(rows, num_workers) as theirs:
        sides = ours | theirs
        for repeat in range(REPEATS + 1):
            for line, run in sides.items():
                start = time.perf_counter()
                run(number)
                if repeat > 0:  # the first compiles
                    rate = num_workers * number / (time.perf_counter() - start)
                    rates.setdefault(line, []).append(rate)
    return {line: statistics.median(each) for line, each in rates.items()}


def records() -> list[dict[str, Any]]:
    """One a case and line: pushes and megabytes a second, and the share of what Ray alone does."""
    table = []
    for rows, num_workers in CASES:
        rates = measure(rows, num_workers)
        for line, rate in rates.items():
            table.append(
                {
                    "rows x columns": f"{rows} x {COLUMNS}",
                    "workers": num_workers,
                    "to": line,
                    "pushes/s": round(rate, 1),
                    "MB/s": round(rate * rows * (COLUMNS * 4 + 4) / 1e6, 1),
                    "of Ray alone": round(rate / rates["Ray alone"], 2),
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensorflow", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tensorflow:
        tensorflow_process(**args.tensorflow)
        return
    if not harness.is_installed("ray"):
        print("left out: Ray is not installed")
        return
    import ray

    here = str(pathlib.Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    ray.init(
        "local",
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=(200 if harness.TINY else 2000) * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    harness.report(
        "parameter_server",
        records(),
        note=f"Each worker waits for each answer. A step is of {A_STEP} gradients; an accumulator "
        "is taken once a turn.",
    )


if __name__ == "__main__":
    main()
