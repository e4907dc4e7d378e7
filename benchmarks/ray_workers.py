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

    def sink(self, sink: Any, number: int) -> None:
        """Pushes to an actor that does nothing."""
        import ray

        for k in range(number):
            ray.get(sink.push.remote(self._grads[k % POOL]))

    def accumulator(self, acc: Any, number: int) -> None:
        """Pushes to an accumulator."""
        for k in range(number):
            acc.apply_grad(self._grads[k % POOL], FUTURE)

    def server(self, server: Any, number: int) -> None:
        """Pushes to a parameter server."""
        for k in range(number):
            server.push(self._grads[k % POOL], FUTURE)
