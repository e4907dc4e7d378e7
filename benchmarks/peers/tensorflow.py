"""TensorFlow's side: its accumulator in a graph, and its sparse ops eagerly."""

from __future__ import annotations

import functools
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from benchmarks import workloads
from benchmarks.peers import server
from benchmarks.steps import Step, by_threads

FUTURE = 1 << 40  # never stale
tf1 = tf.compat.v1


def cycle(
    *, applies: int, ids: int, rows: int, columns: int, zipf: float | None, device: str
) -> dict[str, Step]:
    """Gradients one by one, a call each, as in the other libraries; or all in one run."""
    del device
    given = workloads.gradients(applies, ids, rows, columns, zipf)
    lines = {"TensorFlow": False, "TensorFlow, one run": True}
    return {line: Step(_cycle(given, rows, at_once=at_once)) for line, at_once in lines.items()}


def _cycle(given: list[workloads.Gradient], rows: int, *, at_once: bool) -> Callable[[], None]:
    runs, run_take, count = _graph(given, rows, at_once=at_once)

    def run() -> None:
        for run_apply in runs:
            run_apply()
        run_take()

    for run_apply in runs:
        run_apply()
    assert count() == len(given)
    run_take()
    return run


def apply(*, ids: int, rows: int, columns: int, zipf: float | None, device: str) -> dict[str, Step]:
    """One gradient after the other; after eight of them, what is held is taken untimed."""
    del device
    runs, run_take, _ = _graph(workloads.gradients(8, ids, rows, columns, zipf), rows)
    turn, calls = itertools.count(), itertools.cycle(runs)
    for run in runs:
        run()

    def prepare() -> None:
        if next(turn) % len(runs) == 0:
            run_take()

    return {"TensorFlow": Step(lambda: next(calls)(), prepare=prepare)}


def _graph(given: list[workloads.Gradient], rows: int, *, at_once: bool = False) -> Any:
    """Its accumulator needs sorted unique rows: unique and segment-sum, then apply.

    Operands are variables, so that nothing is folded away and nothing fed, and no result is
    fetched. All applies in one call let TensorFlow prepare several of them in parallel.
    """
    graph = tf.Graph()
    with graph.as_default():
        shape = tf.TensorShape((rows, given[0][1].shape[1]))
        accumulator = tf1.SparseConditionalAccumulator(tf.float32, shape)
        step = tf1.Variable(0, dtype=tf.int64)
        applies = []
        for ids, values in given:
            unique, position = tf.unique(tf1.Variable(ids.astype(np.int64)))
            order = tf.argsort(unique)
            slot = tf.gather(tf.math.invert_permutation(order), position)
            sums = tf.math.unsorted_segment_sum(tf1.Variable(values), slot, tf.size(unique))
            applies.append(accumulator.apply_grad(tf.gather(unique, order), sums, local_step=step))
        taken = accumulator.take_grad(1)
        advance = tf1.assign_add(step, 1)
        session = tf1.Session(graph=graph)
        session.run(tf1.global_variables_initializer())
        calls = [applies] if at_once else [[op] for op in applies]
        runs = [session.make_callable(ops) for ops in calls]
        run_take = session.make_callable([taken.values.op, advance.op])
        count = session.make_callable(accumulator.num_accumulated())
    return runs, run_take, count


def coordinator(
    *, rows: int | None, ids: int, columns: int, applies: int, threads: int, device: str
) -> dict[str, Step]:
    """Each apply is a prepared callable of one session: fed, or with the gradient a constant.

    It wants sorted, unique ids; "raw" gives it the unsorted, repeated ones the others are given,
    which cost it less but add up to something else.
    """
    del device
    raw = workloads.gradients(8, ids, rows or 10_000, columns)
    ordered = workloads.deduplicated(raw)
    sides = {
        "TensorFlow, fed": _accumulator(rows, ordered, feed=True),
        "TensorFlow, constant": _accumulator(rows, ordered, feed=False),
        "TensorFlow, fed raw ids": _accumulator(rows, raw, feed=True),
    }
    dealt = {"given": len(raw), "applies": applies, "threads": threads}
    return {line: Step(by_threads(*side, **dealt)) for line, side in sides.items()}


def _accumulator(
    rows: int | None, given: list[workloads.Gradient], *, feed: bool
) -> tuple[Callable[[int], None], Callable[[], Any]]:
    columns = given[0][1].shape[1]
    with tf1.Graph().as_default():
        accumulator = tf1.SparseConditionalAccumulator(tf.float32, (rows, columns))
        session = tf1.Session()
        take = session.make_callable(accumulator.take_indexed_slices_grad(1))
        if feed:
            ids = tf1.placeholder(tf.int64, [None])
            values = tf1.placeholder(tf.float32, [None, columns])
            op = accumulator.apply_grad(ids, values, local_step=FUTURE)
            fed = session.make_callable(op, [ids, values])
            wide = [(each.astype(np.int64), values) for each, values in given]
            return lambda k: fed(*wide[k]), take
        baked = [
            session.make_callable(
                accumulator.apply_grad(
                    tf.constant(i.astype(np.int64)), tf.constant(v), local_step=FUTURE
                )
            )
            for i, v in given
        ]
        return lambda k: baked[k](), take


_cluster: list[subprocess.Popen[str]] = []


def parameter_server(
    *, ids: int, workers: int, rows: int, pushes: int, device: str
) -> dict[str, Step]:
    """Its accumulator in the process of a server, fed by the processes of workers."""
    del device
    while _cluster:
        _cluster.pop().kill()
    ports = [socket.socket() for _ in range(workers + 1)]
    for port in ports:
        port.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{port.getsockname()[1]}" for port in ports]
    for port in ports:
        port.close()
    for rank in range(workers + 1):
        task = {"addresses": addresses, "rank": rank, "ids": ids, "rows": rows}
        module = "benchmarks.peers.tensorflow_cluster"
        command = [sys.executable, "-m", module, json.dumps(task)]
        pipe = subprocess.PIPE
        _cluster.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))

    def ask(processes: list[Any], number: int) -> None:
        for process in processes:
            print(number, file=process.stdin, flush=True)
        for process in processes:
            if process.stdout.readline() != "done\n":
                raise RuntimeError("a process of TensorFlow's cluster has died")

    push = functools.partial(ask, _cluster[1:], pushes)
    take = functools.partial(ask, _cluster[1:2], 0)
    return {"TensorFlow": Step(push, prepare=take)}


def sparse_ops(*, entries: int, device: str) -> dict[str, Step]:
    """Its four raw ops, eagerly, on the same matrices; a line each, named by the op."""
    del device
    ops, side = tf.raw_ops, workloads.SIDE
    shape, thresh = tf.constant([side, side], tf.int64), tf.constant(0.0)
    start, size = (tf.constant([n, n], tf.int64) for n in (workloads.START, workloads.SIZE))

    def add(ia: Any, va: Any, ib: Any, vb: Any) -> Any:
        return ops.SparseAdd(
            a_indices=ia, a_values=va, a_shape=shape,
            b_indices=ib, b_values=vb, b_shape=shape, thresh=thresh,
        )  # fmt: skip

    def cut(indices: Any, values: Any, *_: Any) -> Any:
        return ops.SparseSlice(indices=indices, values=values, shape=shape, start=start, size=size)

    def add_grad(values: Any, ia: Any, ib: Any, indices: Any) -> Any:
        return ops.SparseAddGrad(
            backprop_val_grad=values, a_indices=ia, b_indices=ib, sum_indices=indices
        )

    def slice_grad(values: Any, rows: Any, indices: Any) -> Any:
        return ops.SparseSliceGrad(
            backprop_val_grad=values, input_indices=rows, input_start=start, output_indices=indices
        )

    inputs = [
        tuple(
            part
            for indices, values in pair
            for part in (tf.constant(indices, tf.int64), tf.constant(values))
        )
        for pair in workloads.sparse_pairs(entries)
    ]
    sums, parts = [add(*args) for args in inputs], [cut(*args) for args in inputs]
    of_sums = [(s[1], args[0], args[2], s[0]) for s, args in zip(sums, inputs, strict=True)]
    of_parts = [(p[1], args[0], p[0]) for p, args in zip(parts, inputs, strict=True)]
    return {
        "add": _in_turn(add, inputs),
        "add gradient": _in_turn(add_grad, of_sums),
        "slice": _in_turn(cut, inputs),
        "slice gradient": _in_turn(slice_grad, of_parts),
    }


def _in_turn(op: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Step:
    turn = itertools.cycle(inputs)
    return Step(lambda: op(*next(turn)))


if __name__ == "__main__":
    makers = (cycle, apply, coordinator, parameter_server, sparse_ops)
    server.serve(tf.__version__, {make.__name__: make for make in makers})
