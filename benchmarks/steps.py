"""A step to be timed, in whichever process its library lives; no library is imported here."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Step:
    """Something that is run over and over.

    Attributes:
      call: what is timed.
      wait: waits for what ``call`` returned; its time counts.
      prepare: called before each ``call``; its time does not count.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any] = lambda result: result
    prepare: Callable[[], None] | None = None

    def seconds(self, in_a_row: int = 1, wait_each: bool = True) -> list[float]:
        """Times of some calls in a row, after one that finds the cache full of what others left.

        Without ``wait_each`` only the last is waited for, as a training loop does, and the one
        time returned is its share of the row: on a CPU, JAX hands all but the least programs to
        another thread, and to be woken by it takes longer than a small program.
        """
        if in_a_row > 1:
            self._timed()
        if wait_each:
            return [self._timed() for _ in range(in_a_row)]
        if self.prepare is not None:
            raise ValueError("a step that is prepared each time must be waited for each time")
        start = time.perf_counter()
        for _ in range(in_a_row):
            result = self.call()
        self.wait(result)
        return [(time.perf_counter() - start) / in_a_row]

    def _timed(self) -> float:
        if self.prepare is not None:
            self.prepare()
        start = time.perf_counter()
        self.wait(self.call())
        return time.perf_counter() - start


def by_threads(
    apply: Callable[[int], Any], take: Callable[[], Any], *, given: int, applies: int, threads: int
) -> Callable[[], Any]:
    """``applies`` calls of ``apply(k)``, with ``k < given``, dealt to threads; then a take."""

    def work(first: int) -> None:
        for k in range(first, applies, threads):
            apply(k % given)

    def cycle() -> Any:
        workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return take()

    return cycle
