"""Threads that take, and a way to know that they wait: no test needs to sleep."""

import queue
import threading

from internals import Coordinator

import jaxaccum

PATIENCE = 60  # seconds; nothing below waits that long unless something is broken


class Taker(threading.Thread):
    """Takes once, and keeps the gradient or the exception."""

    def __init__(self, acc, num_required, **options):
        super().__init__(daemon=True)
        self.acc, self.num_required, self.options = acc, num_required, options
        self.grad = self.error = self.waiter = None
        self.start()

    def run(self):
        try:
            self.grad = self.acc.take_grad(self.num_required, **self.options)
        except Exception as error:
            self.error = error

    def result(self):
        self.join(PATIENCE)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.grad


class Watch:
    """Sees each waiter enter the queue, and can let its time run out."""

    def __init__(self, monkeypatch):
        entered, enqueue = queue.Queue(), Coordinator._enqueue

        def watched(core, waiter):
            event = getattr(waiter.wake, "__self__", None)
            if isinstance(event, threading.Event):
                wait, waiter_is_late = event.wait, self.late
                event.wait = lambda timeout=None: wait(PATIENCE) and event not in waiter_is_late
            enqueue(core, waiter)
            entered.put(waiter)

        self.entered, self.late = entered, []
        monkeypatch.setattr(Coordinator, "_enqueue", watched)

    def take(self, acc, num_required, **options):
        """Starts a taker, and returns when it is in the queue or served."""
        taker = Taker(acc, num_required, **options)
        taker.waiter = self.entered.get(timeout=PATIENCE)
        return taker

    def expire(self, taker):
        """Lets a taker's time run out."""
        event = taker.waiter.wake.__self__
        self.late.append(event)
        event.set()


def waiting(acc):
    """The takers in the queue, first come first, by their waiters."""
    return list(acc._core._queue)


def accumulator(**options):
    options = {"dtype": "int32", "shape": (16,), "reduction_type": "SUM", "capacity": 16} | options
    return jaxaccum.SparseConditionalAccumulator(**options)
