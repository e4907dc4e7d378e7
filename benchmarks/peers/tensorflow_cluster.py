"""A process of a TensorFlow cluster: the server, or a worker that pushes as often as it is told.

python -m benchmarks.peers.tensorflow_cluster SETTING, a number a line on its input
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

from benchmarks import workloads

tf1 = tf.compat.v1
FUTURE, POOL = 1 << 40, 4


def main(addresses: list[str], rank: int, ids: int, rows: int) -> None:
    """Ends when its input does: with the process that started it, however that ends."""
    tf1.disable_eager_execution()
    cluster = tf.train.ClusterSpec({"ps": addresses[:1], "worker": addresses[1:]})
    if rank == 0:
        server = tf1.train.Server(cluster, job_name="ps", task_index=0)
        sys.stdin.read()
    else:
        server = tf1.train.Server(cluster, job_name="worker", task_index=rank - 1)
        work(server.target, rank, ids, rows)
    os._exit(0)


def work(target: str, rank: int, ids: int, rows: int) -> None:
    columns = workloads.WIDTH
    with tf.device("/job:ps/task:0"):
        acc = tf1.SparseConditionalAccumulator(tf.float32, (rows, columns), shared_name="table")
        take = acc.take_indexed_slices_grad(1).op
    fed = tf1.placeholder(tf.int64, [None]), tf1.placeholder(tf.float32, [None, columns])
    with tf.device("/job:ps/task:0"):
        apply = acc.apply_grad(*fed, local_step=FUTURE)
    session = tf1.Session(target)
    push = session.make_callable(apply, list(fed))
    raw = workloads.gradients(POOL, ids, rows, columns, seed=rank - 1)
    given = workloads.deduplicated(raw)
    for line in sys.stdin:
        for k in range(int(line)):
            push(*given[k % POOL])
        if int(line) == 0:  # takes what there is, and sees that there is something
            push(*given[0])
            session.run(take)
        print("done", flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
