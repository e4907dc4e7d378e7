"""TensorFlow's accumulator on a server of its own, fed by worker processes.

    python -m benchmarks.peers.tensorflow_cluster '{"rank": 0, "addresses": [...], ...}'

is the server of rank 0, or a worker that pushes each time it reads a line. They end with it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks import workloads
from benchmarks.steps import Step

FUTURE = 1 << 40  # never stale
POOL = 4


def servers(*, workers: int, device: str, **task: Any) -> dict[str, Step]:
    """A step in which every worker pushes so many gradients; the first one then takes."""
    del device
    processes = start(workers, task)

    def run() -> None:
        for process in processes[1:]:
            print(file=process.stdin, flush=True)
        for process in processes[1:]:
            if process.stdout.readline() != "done\n":
                raise RuntimeError("a process of TensorFlow's cluster has died")

    return {"TensorFlow": Step(run)}


def start(workers: int, task: dict[str, Any]) -> list[subprocess.Popen[str]]:
    ports = [socket.socket() for _ in range(workers + 1)]
    for port in ports:
        port.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{port.getsockname()[1]}" for port in ports]
    for port in ports:
        port.close()
    module = [sys.executable, "-m", "benchmarks.peers.tensorflow_cluster"]
    tasks = [
        json.dumps({"rank": rank, "addresses": addresses, **task}) for rank in range(len(ports))
    ]
    pipe = subprocess.PIPE
    return [subprocess.Popen([*module, t], stdin=pipe, stdout=pipe, text=True) for t in tasks]


def main(rank: int, addresses: list[str], pushes: int, **gradient: int) -> None:
    import tensorflow as tf

    tf1 = tf.compat.v1
    tf1.disable_eager_execution()
    cluster = tf.train.ClusterSpec({"ps": addresses[:1], "worker": addresses[1:]})
    if rank == 0:
        server = tf1.train.Server(cluster, job_name="ps", task_index=0)
        sys.stdin.read()
        return
    server = tf1.train.Server(cluster, job_name="worker", task_index=rank - 1)
    push, take = graph(tf, server.target, gradient["rows"], gradient["columns"])
    given = workloads.deduplicated(workloads.gradients(POOL, **gradient))
    for _ in sys.stdin:
        for k in range(pushes):
            push(*given[k % POOL])
        if rank == 1:
            take()
        print("done", flush=True)


def graph(tf: Any, target: str, rows: int, columns: int) -> tuple[Callable[..., Any], Any]:
    tf1 = tf.compat.v1
    with tf.device("/job:ps/task:0"):
        acc = tf1.SparseConditionalAccumulator(tf.float32, (rows, columns), shared_name="table")
        ids, values = (
            tf1.placeholder(tf.int64, [None]),
            tf1.placeholder(tf.float32, [None, columns]),
        )
        apply = acc.apply_grad(ids, values, local_step=FUTURE)
        take = acc.take_indexed_slices_grad(1).values[:0]
    session = tf1.Session(target)
    return session.make_callable(apply, [ids, values]), session.make_callable(take)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
