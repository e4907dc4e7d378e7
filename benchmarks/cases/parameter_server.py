"""Gradients pushed by worker processes on Ray: to an accumulator, to a parameter server, to nobody.

"Ray alone" moves the same arrays to an actor that does nothing with them: the floor. TensorFlow's
accumulator lies in a `tf.train.Server` process and is fed by others. A worker waits for each answer
before its next push. The server takes its steps on the way, and the last of them is waited for;
"between steps" it takes one after each run, which is not timed, nor is the accumulator's take.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import ray_workers, workloads
from benchmarks.harness import HASTE, Figures, Step, case, measure, peer_steps
from benchmarks.peers import ROOT

A_STEP, SECONDS = 8, 120


@case(
    "{ids:,}, {workers}",
    settings=[{"ids": ids, "workers": n} for ids in (1024, 4096, 65_536) for n in (1, 2, 4)],
    quick=[{"ids": 32, "workers": 1, "rows": 1000}],
    needs=("ray", "jaxaccum.ray"),
    environ={"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
)
def parameter_server(ids: int, workers: int, rows: int = 1_000_000) -> Figures:
    """A gradient of 1,024 to 65,536 rows of 64 floats pushed by processes, by their number."""
    pushes = 4 if HASTE.quick else max(8, 200_000 // ids)
    setting = {"ids": ids, "workers": workers, "rows": rows, "pushes": pushes}
    with on_ray(**setting) as ours:
        steps = ours | dict(peer_steps("tensorflow", "parameter_server", **setting))
        figures = measure(steps, turns=(9, 9), in_a_row=1, per=workers * pushes)
    megabytes = ids * (workloads.WIDTH + 1) * 4 / 1e6
    for metrics in figures.values():
        a_second = 1e3 / metrics["ms"]
        metrics |= {"pushes a second": a_second, "MB a second": a_second * megabytes}
    return figures


@functools.cache
def start_ray() -> None:
    """A cluster of this machine, that ends with the process."""
    import ray

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ray.init(
        "local",
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=(200 if HASTE.quick else 2000) * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )


@contextlib.contextmanager
def on_ray(ids: int, workers: int, rows: int, pushes: int) -> Iterator[dict[str, Step]]:
    """What workers on Ray push to, by line: a step has all of them push so often."""
    import ray

    import jaxaccum.ray

    start_ray()
    like = np.zeros((rows, workloads.WIDTH), np.float32)
    sink = ray.remote(ray_workers.Sink).options(num_cpus=0).remote()
    acc = jaxaccum.ray.TreeAccumulator(
        jax.ShapeDtypeStruct(like.shape, like.dtype), tables=True, timeout=SECONDS
    )
    make_server = functools.partial(
        jaxaccum.ray.ParameterServer, like, optax.sgd(0.1), tables=True, timeout=SECONDS
    )
    servers = {n: make_server(num_shards=n, num_required=A_STEP) for n in (1, 2)}
    servers[0] = make_server(num_required=workers * pushes)
    worker = ray.remote(ray_workers.Worker).options(num_cpus=0)
    started = [worker.remote(ids, rows, seed) for seed in range(workers)]

    def settle() -> None:
        """Leaves nobody at work, nor anything to take, whoever has run before."""
        servers[0].pull([0], at_least=servers[0].statistics()["global_step"])
        if acc.num_accumulated():
            acc.take_grad(1, timeout=SECONDS)

    def step(method: str, target: Any) -> Step:
        def call() -> None:
            calls = [getattr(each, method).remote(target, pushes) for each in started]
            steps = ray.get(calls, timeout=SECONDS)
            if target in (servers[1], servers[2]):
                target.pull([0], at_least=max(steps))

        return Step(call, prepare=settle)

    try:
        yield {
            "accumulator": step("accumulator", acc),
            "server": step("server", servers[1]),
            "server, 2 shards": step("server", servers[2]),
            "server, between steps": step("server", servers[0]),
            "Ray alone": step("sink", sink),
        }
    finally:
        for server in servers.values():
            server.close()
        for actor in (sink, acc._actor, *started):
            ray.kill(actor)
