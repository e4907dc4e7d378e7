"""SparseConditionalAccumulator beside TensorFlow's: microseconds an apply, takes included.

"tree" is a `TreeAccumulator` of the same table alone.

TensorFlow runs each apply as a prepared callable of one session: once with the gradient fed as
NumPy arrays, as ours is given, and once with the gradient baked into the graph as a constant, the
least it can do. It wants sorted, unique ids; "raw" gives it the unsorted, repeated ones ours is
given, which cost it less but add up to something else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import harness
import jax
import jax.numpy as jnp
import numpy as np

import jaxaccum

FUTURE = 1 << 40  # never stale
Gradients = list[tuple[np.ndarray, np.ndarray]]


def gradients(rows: int, n: int, columns: int, count: int) -> Gradients:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((n, columns), np.float32)
    return [(rng.integers(0, rows, n), values) for _ in range(count)]


def deduplicated(raw: Gradients) -> Gradients:
    """Sorted and summed, as TensorFlow wants it; the time this takes is not counted."""
    result = []
    for ids, values in raw:
        unique, inverse = np.unique(ids, return_inverse=True)
        sums = np.zeros((len(unique), values.shape[1]), values.dtype)
        np.add.at(sums, inverse, values)
        result.append((unique, sums))
    return result


def ours(rows: int | None, given: Gradients) -> tuple[Callable[[int], None], Callable[[], Any]]:
    columns = given[0][1].shape[1]
    acc = jaxaccum.SparseConditionalAccumulator("float32", (rows, columns))

    def apply(k: int) -> None:
        acc.apply_grad(*given[k], local_step=FUTURE)

    return apply, lambda: acc.take_indexed_slices_grad(1)


def tree(rows: int | None, given: Gradients) -> tuple[Callable[[int], None], Callable[[], Any]]:
    """The same for a `TreeAccumulator` of that one table."""
    grads = [
        {"table": jaxaccum.IndexedSlices(ids, values, (rows, values.shape[1]))}
        for ids, values in given
    ]
    acc = jaxaccum.TreeAccumulator(grads[0], reduction="mean_per_row")

    def apply(k: int) -> None:
        acc.apply_grad(grads[k], FUTURE)

    return apply, lambda: acc.take_grad(1, trim=True)


def theirs(
    rows: int | None, given: Gradients, *, feed: bool
) -> tuple[Callable[[int], None], Callable[[], Any]]:
    import tensorflow as tf

    tf1, columns = tf.compat.v1, given[0][1].shape[1]
    with tf1.Graph().as_default():
        acc = tf1.SparseConditionalAccumulator(tf.float32, (rows, columns))
        session = tf1.Session()
        take = session.make_callable(acc.take_indexed_slices_grad(1))
        if feed:
            ids = tf1.placeholder(tf.int64, [None])
            values = tf1.placeholder(tf.float32, [None, columns])
            fed = session.make_callable(
                acc.apply_grad(ids, values, local_step=FUTURE), [ids, values]
            )
            return lambda k: fed(*given[k]), take
        baked = [
            session.make_callable(acc.apply_grad(tf.constant(i), tf.constant(v), local_step=FUTURE))
            for i, v in given
        ]
        return lambda k: baked[k](), take


def cycle_us(
    sides: dict[str, tuple[Callable[[int], None], Callable[[], Any]]],
    given: int,
    applies: int,
    threads: int,
    repeats: int,
) -> dict[str, float]:
    """Median microseconds an apply, of cycles that end with a take; sides take turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 2):
        for name, (apply, take) in sides.items():
            start = time.perf_counter()
            workers = [
                threading.Thread(
                    target=lambda a=apply, t=t: [a(k % given) for k in range(t, applies, threads)]
                )
                for t in range(threads)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            jax.block_until_ready(take())
            if repeat >= 2:
                times[name].append((time.perf_counter() - start) / applies * 1e6)
    return {name: statistics.median(each) for name, each in times.items()}


def model(
    num_dense: int, shape: tuple[int, ...], ids: int, kind: Callable[[Any], Any]
) -> dict[str, tuple[Callable[[int], None], Callable[[], Any]]]:
    """One accumulator for a model of two tables and some dense leaves, and one for each leaf."""
    rng, table = np.random.default_rng(0), (100_000, 16)

    def slices() -> jaxaccum.IndexedSlices:
        rows = kind(rng.integers(0, table[0], ids).astype(np.int32))
        return jaxaccum.IndexedSlices(rows, kind(np.ones((ids, table[1]), np.float32)), table)

    tables = [slices() for _ in range(2)]
    dense = [kind(np.ones(shape, np.float32)) for _ in range(num_dense)]
    whole = jaxaccum.TreeAccumulator((tables, dense))
    of_tables = [
        jaxaccum.SparseConditionalAccumulator("float32", table, reduction_type="MEAN_PER_GRADIENT")
        for _ in tables
    ]
    of_dense = [jaxaccum.ConditionalAccumulator("float32", shape) for _ in dense]

    def apply_each(_: int) -> None:
        for acc, grad in zip(of_tables, tables, strict=True):
            acc.apply_indexed_slices_grad(grad, FUTURE)
        for acc, grad in zip(of_dense, dense, strict=True):
            acc.apply_grad(grad, FUTURE)

    def take_each() -> Any:
        rows = [acc.take_indexed_slices_grad(1, trim=False) for acc in of_tables]
        return rows, [acc.take_grad(1) for acc in of_dense]

    def apply(_: int) -> None:
        whole.apply_grad((tables, dense), FUTURE)

    return {"one tree": (apply, lambda: whole.take_grad(1)), "one each": (apply_each, take_each)}


MODELS = [
    # dense leaves, of shape, ids of each table, where gradients are
    (20, (8, 8), 32, np.asarray),
    (20, (64, 64), 1024, jnp.asarray),
    (2, (1024, 1024), 1024, jnp.asarray),
]

CASES = [
    # rows, ids, columns, distinct gradients, applies a cycle, threads, repeats
    (10_000, 32, 16, 8, 1000, 1, 9),
    (None, 32, 16, 8, 1000, 1, 9),
    (10_000, 32, 16, 8, 1000, 4, 9),
    (10_000, 32, 16, 8, 1000, 8, 9),
    (1_000_000, 4096, 64, 8, 8, 1, 9),
    (1_000_000, 4096, 64, 8, 8, 4, 9),
    (1_000_000, 4096, 64, 8, 8, 8, 9),
    (1_000_000, 65_536, 64, 8, 8, 1, 5),
    (1_000_000, 65_536, 64, 8, 8, 4, 5),
    (1_000_000, 65_536, 64, 8, 8, 8, 5),
]


if harness.TINY:
    CASES = [(1000, 32, 16, 8, 16, 1, 1), (None, 4096, 64, 2, 4, 2, 1)]
    MODELS = [(2, (8, 8), 32, np.asarray)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    has_peer = harness.is_installed("tensorflow")
    table = []
    for rows, n, columns, count, applies, threads, repeats in CASES:
        raw = gradients(rows or 10_000, n, columns, count)
        sides = {"jaxaccum": ours(rows, raw), "tree": tree(rows, raw)}
        if has_peer:
            sorted_ids = deduplicated(raw)
            sides["TF fed"] = theirs(rows, sorted_ids, feed=True)
            sides["TF constant"] = theirs(rows, sorted_ids, feed=False)
            sides["TF fed, raw ids"] = theirs(rows, raw, feed=True)
        times = cycle_us(sides, count, applies, threads, repeats)
        row: dict[str, Any] = {
            "ids x columns": f"{n} x {columns}",
            "rows": rows or "unknown",
            "threads": threads,
        }
        row |= {f"{name} us": round(us, 1) for name, us in times.items()}
        row |= {
            f"{name} / ours": round(us / times["jaxaccum"], 2)
            for name, us in times.items()
            if name != "jaxaccum"
        }
        table.append(row)
    harness.report(
        "coordinator",
        table,
        note="Microseconds an apply, its share of the cycle's take included.",
    )
    table = []
    for num_dense, shape, ids, kind in MODELS:
        times = cycle_us(model(num_dense, shape, ids, kind), 1, 32, 1, 9)
        whose = "NumPy" if kind is np.asarray else "JAX"
        row = {"dense leaves": f"{num_dense} x {shape}", "ids": ids, "gradients": whose}
        row |= {f"{name} us": round(us) for name, us in times.items()}
        table.append(row | {"each / tree": round(times["one each"] / times["one tree"], 1)})
    harness.report(
        "coordinator_models",
        table,
        note="Tables of 100,000 x 16 and dense leaves: one TreeAccumulator, or one for each leaf.",
    )


if __name__ == "__main__":
    main()
