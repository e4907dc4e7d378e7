"""Many threads, one thing accumulated: the lock, the step, and the queue of those who wait to take.

What is accumulated, and where, this file does not know: see `Accumulated`. What is stale and how
many gradients are there is known on the host, so nothing here waits for a device, and nobody who
waits holds the lock.

Python runs signal handlers in the main thread, between any two calls it makes, so also while that
thread holds the lock. A handler that raises is met by the order in which things are done; one that
calls this very object is refused, except that it may close it.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import math
import operator
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NoReturn, TypeVar

import numpy as np

from jaxaccum._coordinator.accumulated import OLDEST_AGE, Accumulated, Taken, Tally
from jaxaccum._coordinator.arguments import as_required, as_step, as_timeout
from jaxaccum._coordinator.errors import CancelledError, DeadlineExceededError, InvalidArgumentError
from jaxaccum._coordinator.placement import is_at_home, outside_jit
from jaxaccum._coordinator.spec import TreeSpec

logger = logging.getLogger("jaxaccum")
_Result = TypeVar("_Result")


@dataclasses.dataclass(slots=True, eq=False)
class Waiter:
    """Somebody in the queue.

    Attributes:
      num_required: gradients waited for.
      wake: called when there is an outcome, perhaps repeatedly, by any thread; returns False where
        the waiter can no longer be woken.
      outcome: a list of one, written under the lock: ``None`` while waiting, then what was taken
        or an exception; empty once that has gone to another.
    """

    num_required: int
    wake: Callable[[], object]
    outcome: list[Any] = dataclasses.field(default_factory=lambda: [None])


class Coordinator:
    """What one or several handles share.

    A waiter that has an outcome but has not been woken stays at the head of the queue, so that a
    call interrupted between the two is finished by whoever comes next.

    Args:
      spec: what all who share this must agree on.
      name: for error messages.
      accumulated: what is guarded.
    """

    def __init__(self, spec: TreeSpec, name: str, accumulated: Accumulated) -> None:
        self.spec = spec
        self.is_closed = False
        self._name = name
        self._accumulated = accumulated
        self._counts = accumulated.counts
        self._policy = spec.policy
        self._oldest = spec.policy.oldest
        # Of all workers, and of those that have named themselves.
        self._ages: collections.defaultdict[int, int] = collections.defaultdict(int)
        self._workers: collections.defaultdict[Hashable, Tally] = collections.defaultdict(Tally)
        # Reentrant, so that a signal handler need not wait for its own thread; see `_locked`.
        self._lock = threading.RLock()
        self._is_busy = False
        self._queue: collections.deque[Waiter] = collections.deque()
        # Whose takers went away before they had seen it: for those who come next.
        self._unclaimed: collections.deque[Taken] = collections.deque()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled or copied, and says what to do instead."""
        raise TypeError(
            "an accumulator can be neither pickled nor copied: it is one object of one process. "
            "Pass it to threads as it is or make another handle with the same shared_name; "
            "elsewhere make a new one and load what state_dict() returns"
        )

    def apply(self, local_step: Any, *gradient: Any, worker: Hashable = None) -> bool:
        """Adds a gradient; returns whether it was accepted rather than stale."""
        local_step, read = as_step(local_step, "local_step"), None
        try:
            # Else it is stale, and not looked at.
            if self._counts.global_step - local_step <= self._oldest:
                # Outside the lock, for it may copy much. It reads nothing that changes.
                read = self._accumulated.read(*gradient)
            locked = self._alone if is_at_home() else self._locked  # the same, in less time
            while callable(outcome := locked(self._add, read, local_step, worker)):
                outcome()
            return outcome
        except InvalidArgumentError:
            with self._lock:
                self._counts.invalid += 1
                if worker is not None:
                    self._workers[worker].invalid += 1
            raise

    def take(self, num_required: Any, timeout: float | None, *, trim: bool) -> Any:
        """Waits for ``num_required`` gradients and takes all there are."""
        timeout, event = as_timeout(timeout), threading.Event()
        waiter = Waiter(as_required(num_required), event.set)
        try:
            self._enqueue(waiter)
            if not _wait(event, timeout):
                self._locked(self._expire, waiter, even_closed=True)
            return self._collect(waiter, trim=trim)
        except BaseException:
            self._locked(self._forget, waiter, even_closed=True)
            raise

    async def take_async(self, num_required: Any, timeout: float | None, *, trim: bool) -> Any:
        """Waits as `take` does, but lets the event loop run meanwhile."""
        timeout, event, loop = as_timeout(timeout), asyncio.Event(), asyncio.get_running_loop()

        def wake() -> bool:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop is closed, and the waiter gone with it
                return False
            return True

        waiter = Waiter(as_required(num_required), wake)
        try:
            while (compile_ahead := self._locked(self._append, waiter)) is not None:
                await asyncio.to_thread(compile_ahead)
            try:
                await asyncio.wait_for(event.wait(), timeout)
            except TimeoutError:
                self._locked(self._expire, waiter, even_closed=True)
            return await asyncio.to_thread(self._collect, waiter, trim=trim)
        except BaseException:
            self._locked(self._forget, waiter, even_closed=True)
            raise

    @property
    def global_step(self) -> int:
        """The step there is now."""
        return self._counts.global_step

    def num_accumulated(self) -> int:
        """Returns how many gradients were accepted since the last take."""
        return self._locked(lambda: self._counts.num_accumulated)

    def set_global_step(self, new_global_step: Any) -> None:
        """Sets the step; what is accumulated stays and counts."""
        new = as_step(new_global_step, "new_global_step")

        def exchange() -> int:
            old, self._counts.global_step = self._counts.global_step, new
            return old

        old = self._locked(exchange)
        if new < old:
            logger.warning(
                "Attempt to set current_global_step_ to smaller value: "
                "current_global_step_ = %d >= %d = new_global_step.",
                old,
                new,
            )

    def statistics(self) -> dict[str, Any]:
        """Returns counts since the beginning, and what is held now."""

        def count() -> dict[str, Any]:
            waiting = {"waiting": len(self._queue), "unclaimed": len(self._unclaimed)}
            ages = {"staleness": dict(sorted(self._ages.items()))}
            workers = {"workers": {name: tally.as_dict() for name, tally in self._workers.items()}}
            counts = dataclasses.asdict(self._counts) | waiting | ages | workers
            return counts | self._accumulated.statistics()

        return self._locked(count)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns what is accumulated."""
        return self._locked(self._accumulated.save)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Replaces what is accumulated."""
        self._locked(self._accumulated.load, saved)

    def close(self) -> None:
        """Cancels all who wait and frees the state.

        Called by a signal handler in the middle of a call, it lets that call come to its end first.
        """
        self.is_closed = True
        with self._lock:
            if self._is_busy:
                return
            self._is_busy = True
            try:
                while self._queue:
                    head = self._queue[0]
                    if head.outcome[0] is None:
                        head.outcome[0] = CancelledError("TakeGrad operation was cancelled")
                    self._release(head)
                self._unclaimed.clear()
                self._accumulated.clear()
            finally:
                self._is_busy = False

    @outside_jit
    def _locked(
        self, act: Callable[..., _Result], *args: Any, even_closed: bool = False
    ) -> _Result:
        """Calls ``act`` under the lock, whatever mesh the caller has set; refuses to be traced."""
        return self._alone(act, *args, even_closed=even_closed)

    def _alone(self, act: Callable[..., _Result], *args: Any, even_closed: bool = False) -> _Result:
        """Calls ``act`` under the lock, alone, and serves whom it has made ready.

        Between the lock and ``_is_busy``, and between that and what is done last, nothing is
        called: there a signal handler finds everything at rest, elsewhere it finds ``_is_busy``.
        """
        with self._lock:
            if self._is_busy:
                self._check_open()
                raise RuntimeError(
                    f"accumulator {self._name} is in the middle of a call of this very thread, "
                    "which a signal handler (or a callback) has interrupted: there it can be "
                    "closed, and nothing else; set a flag, and look after the call"
                )
            self._is_busy = True
            try:
                try:
                    if self.is_closed and not even_closed:
                        self._check_open()
                    return act(*args)
                except BaseException:
                    self._close_if_lost()
                    raise
                finally:
                    if self._queue:
                        self._serve()
            finally:
                self._is_busy = False
                if self.is_closed:
                    self.close()

    def _check_open(self) -> None:
        if self.is_closed:
            raise CancelledError(f"Attempted to use a closed accumulator: {self._name}")

    def _add(self, gradient: Any, local_step: int, worker: Hashable) -> bool | Callable[[], object]:
        """Adds a gradient unless it is stale, as ``None`` is.

        Returns:
          Whether it was accepted; or what has to be compiled first.
        """
        counts, queue = self._counts, self._queue
        staleness = counts.global_step - local_step
        if gradient is None or staleness > self._oldest:
            return self._refuse(staleness, worker)
        staleness = staleness if staleness > 0 else 0
        will_take = False
        if queue:
            num_accumulated = counts.num_accumulated + (staleness <= self._policy.max_staleness)
            will_take = queue[0].num_required <= num_accumulated
        compile_ahead = self._accumulated.prepare(gradient, will_take)
        if compile_ahead is not None:
            return compile_ahead
        tally = None if worker is None else self._workers[worker]
        self._accumulated.add(gradient, staleness)
        # What follows calls nothing, and is counted together with the rest.
        age = staleness if staleness < OLDEST_AGE else OLDEST_AGE
        self._ages[age] += 1
        if tally is not None:
            tally.ages[age] += 1
            tally.accepted += 1
        return True

    def _refuse(self, staleness: int, worker: Hashable) -> bool:
        """Counts a stale gradient."""
        logger.debug("stale gradient: %d steps old", staleness)
        age = min(staleness, OLDEST_AGE)
        tally = None if worker is None else self._workers[worker]
        self._counts.stale += 1
        self._ages[age] += 1
        if tally is not None:
            tally.ages[age] += 1
            tally.stale += 1
        return False

    def _enqueue(self, waiter: Waiter) -> None:
        """Puts a waiter at the end of the queue, and serves it if its turn has come."""
        while (compile_ahead := self._locked(self._append, waiter)) is not None:
            compile_ahead()

    def _append(self, waiter: Waiter) -> Callable[[], object] | None:
        """Puts a waiter at the end of the queue, or returns what has to be compiled first."""
        if not self._queue and waiter.num_required <= self._counts.num_accumulated:
            compile_ahead = self._accumulated.prepare(None, True)
            if compile_ahead is not None:
                return compile_ahead
        self._queue.append(waiter)
        return None

    def _serve(self) -> None:
        """Serves the head of the queue, and who comes after, for as long as it can."""
        while self._queue and not self.is_closed:
            head = self._queue[0]
            try:
                if head.outcome[0] is None and not self._serve_head(head):
                    return
            finally:
                if head.outcome[0] is not None:
                    self._release(head)

    def _serve_head(self, head: Waiter) -> bool:
        """Gives ``head`` what nobody claimed, or all there is, if it is enough."""
        unclaimed = self._unclaimed
        # What one taker left is for another who wants as much: just as much, where that is told.
        fits = operator.eq if self._policy.exactly else operator.ge
        if unclaimed and fits(unclaimed[0].num_accumulated, head.num_required):
            head.outcome[:] = map(collections.deque.popleft, (unclaimed,))
            return True
        if self._counts.num_accumulated < head.num_required:
            return False
        try:
            self._accumulated.take(head.outcome, head.num_required)
        except Exception as error:  # out of memory, say: the taker's concern, not the applier's
            head.outcome[0] = error
            self._close_if_lost()
        return True

    def _release(self, head: Waiter) -> None:
        """Wakes the head of the queue, which has its outcome, and lets it go."""
        if head.wake() is False:
            self._forget(head)
        else:
            self._queue.popleft()

    def _forget(self, waiter: Waiter) -> None:
        """Takes a waiter out of the queue; what it has not collected is for the next."""
        if waiter in self._queue:
            self._queue.remove(waiter)
        if waiter.outcome and isinstance(waiter.outcome[0], Taken) and not self.is_closed:
            logger.warning("a taker left without its gradient; the next one gets it")
            # Moved in C, as in `_serve_head`: no signal finds it with both, or with neither.
            self._unclaimed.extend(map(waiter.outcome.pop, (0,)))

    def _close_if_lost(self) -> None:
        if not self.is_closed and self._accumulated.is_lost():
            logger.error("accumulator %s lost its rows in a call that failed", self._name)
            self.is_closed = True  # `_locked` does the rest

    def _expire(self, waiter: Waiter) -> None:
        """Ends a wait, unless there is an outcome just now."""
        if waiter.outcome[0] is None and not self.is_closed:
            self._forget(waiter)
            raise DeadlineExceededError("Timed out waiting for notification")

    def _collect(self, waiter: Waiter, *, trim: bool) -> Any:
        """Returns what the waiter was served, waiting for the device outside the lock."""
        (taken,) = waiter.outcome
        if isinstance(taken, Taken):
            return self._accumulated.deliver(taken, trim=trim)
        raise taken or CancelledError("TakeGrad operation was cancelled")


# A signal that comes just before the main thread blocks is noticed only when it wakes.
_NAP = 0.2


def _wait(event: threading.Event, timeout: float | None) -> bool:
    """Waits for ``event`` such that a signal is handled within `_NAP` seconds."""
    if threading.current_thread() is not threading.main_thread():
        return event.wait(timeout)
    end = math.inf if timeout is None else time.monotonic() + timeout
    while (left := end - time.monotonic()) > _NAP:
        if event.wait(_NAP):
            return True
    return event.wait(max(left, 0.0))
