"""Gradients pushed by worker processes on Ray: to nobody, an accumulator, a parameter server."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np

import jaxaccum
import jaxaccum.ray
from benchmarks import workloads
from benchmarks.harness import Figures, case, measure, peer_steps, with_metric
from benchmarks.peers import ROOT
from benchmarks.steps import Step

FUTURE = 1 << 40  # never stale
COLUMNS, POOL, A_STEP, SECONDS = 64, 4, 8, 120


class Sink:
    """An actor that does nothing with what it is sent: what moving it costs at the least."""

    async def push(self, grad: jaxaccum.IndexedSlices) -> int:
        return 0


class Worker:
    """Pushes gradients, each when the last one is answered."""

    def __init__(self, ids: int, table_rows: int) -> None:
        shape = (table_rows, COLUMNS)
        raw = workloads.gradients(POOL, ids, table_rows, COLUMNS)
        self._grads = [jaxaccum.IndexedSlices(*pair, shape) for pair in raw]

    def sink(self, sink: Any, pushes: int) -> None:
        import ray

        for k in range(pushes):
            ray.get(sink.push.remote(self._grads[k % POOL]))

    def accumulator(self, acc: jaxaccum.ray.TreeAccumulator, pushes: int) -> None:
        for k in range(pushes):
            acc.apply_grad(self._grads[k % POOL], FUTURE)

    def server(self, server: jaxaccum.ray.ParameterServer, pushes: int) -> None:
        for k in range(pushes):
            server.push(self._grads[k % POOL], FUTURE)


@case(
    "{ids:,} x 64, {workers}",
    settings=[
        {"ids": ids, "workers": workers, "table_rows": 1_000_000}
        for ids, workers in itertools.product((1024, 4096, 65_536), (1, 2, 4))
    ],
    quick=[{"ids": 32, "workers": 1, "table_rows": 1000}],
    needs=("ray", "optax"),
)
def parameter_server(ids: int, workers: int, table_rows: int) -> Figures:
    """A push over Ray, steps and takes included, beside Ray alone, by worker processes."""
    pushes = max(4, 100_000 // ids) if table_rows > 1000 else 4
    steps, close = ray_steps(ids, workers, table_rows, pushes)
    try:
        steps |= peer_steps(
            "tensorflow",
            "servers",
            ids=ids,
            workers=workers,
            rows=table_rows,
            columns=COLUMNS,
            pushes=pushes,
        )
        figures = measure(steps, in_a_row=2, per=pushes * workers)
    finally:
        close()
    rates = {line: 1e3 / metrics["ms"] for line, metrics in figures.items()}
    megabytes = ids * (COLUMNS * 4 + 4) / 1e6
    figures = with_metric(figures, "pushes a second", rates)
    return with_metric(figures, "MB/s", {line: r * megabytes for line, r in rates.items()})


def ray_steps(
    ids: int, workers: int, table_rows: int, pushes: int
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Steps in which all workers push, and what ends the processes."""
    import optax
    import ray

    start_ray()
    like = np.zeros((table_rows, COLUMNS), np.float32)
    sink = ray.remote(Sink).options(num_cpus=0).remote()
    acc = jaxaccum.ray.TreeAccumulator(like, tables=True, timeout=SECONDS)
    servers = {
        f"{shards} shard{'s' * (shards > 1)}": jaxaccum.ray.ParameterServer(
            like,
            optax.sgd(0.1),
            tables=True,
            num_shards=shards,
            num_required=A_STEP,
            timeout=SECONDS,
        )
        for shards in (1, 2)
    }
    actors = [
        ray.remote(Worker).options(num_cpus=0).remote(ids, table_rows) for _ in range(workers)
    ]

    def step(method: str, target: Any) -> Step:
        def run() -> None:
            calls = [getattr(actor, method).remote(target, pushes) for actor in actors]
            ray.get(calls, timeout=SECONDS)
            if method == "accumulator":
                acc.take_grad(1, timeout=SECONDS)

        return Step(run)

    def close() -> None:
        for server in servers.values():
            server.close()
        for actor in (sink, *actors):
            ray.kill(actor)

    steps = {
        "Ray alone": step("sink", sink),
        "jaxaccum.ray.TreeAccumulator": step("accumulator", acc),
        **{f"ParameterServer, {n}": step("server", server) for n, server in servers.items()},
    }
    return steps, close


def start_ray() -> None:
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ray.init(
        "local",
        ignore_reinit_error=True,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=2000 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
