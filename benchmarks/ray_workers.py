"""What runs in Ray's processes for the case ``parameter_server``: workers that push, and a sink."""

from __future__ import annotations

from typing import Any

import jaxaccum
from benchmarks import workloads

FUTURE = 1 << 40  # never stale
POOL = 4


class Sink:
    """Does nothing with what it is sent."""

    def push(self, grad: jaxaccum.IndexedSlices) -> int:
        """Answers."""
        return 0


class Worker:
    """Pushes gradients, one after the other, to what it is told; waits for each answer."""

    def __init__(self, ids: int, rows: int, seed: int) -> None:
        given = workloads.gradients(POOL, ids, rows, workloads.WIDTH, seed=seed)
        shape = (rows, workloads.WIDTH)
        self._grads = [jaxaccum.IndexedSlices(*each, shape) for each in given]

    def sink(self, sink: Any, number: int) -> int:
        """Pushes to an actor that does nothing."""
        import ray

        for k in range(number):
            step = ray.get(sink.push.remote(self._grads[k % POOL]))
        return int(step)

    def accumulator(self, acc: Any, number: int) -> int:
        """Pushes to an accumulator; returns the step it is at."""
        for k in range(number):
            _, step = acc.apply_grad(self._grads[k % POOL], FUTURE)
        return int(step)

    def server(self, server: Any, number: int) -> int:
        """Pushes to a parameter server; returns the step it is at."""
        for k in range(number):
            _, step = server.push(self._grads[k % POOL], FUTURE)
        return int(step)
