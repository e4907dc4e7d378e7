"""Many threads, one accumulator: the lock, and the queue of those who wait to take.

What is stale, how many are there and whether there is room is known on the host, so an apply is a
dispatch under the lock and waits for no device. Nobody who waits holds the lock.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import operator
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxaccum._coordinator.device_state import DeviceState, Taken
from jaxaccum._coordinator.errors import CancelledError, DeadlineExceededError, InvalidArgumentError
from jaxaccum._coordinator.host_gradient import GradientReader, as_step, brackets
from jaxaccum._coordinator.placement import Placement
from jaxaccum._coordinator.spec import Spec
from jaxaccum._rows.indexed_slices import IndexedSlices

logger = logging.getLogger("jaxaccum")


class Waiter:
    """A place in the queue.

    Attributes:
      num_required: gradients waited for.
      wake: called when there is an outcome, perhaps repeatedly, by any thread.
      outcome: a list of one: ``None`` while waiting, then what was taken or an exception. Written
        under the lock.
    """

    __slots__ = ("num_required", "outcome", "wake")

    def __init__(self, num_required: int, wake: Callable[[], object]) -> None:
        self.num_required = num_required
        self.wake = wake
        self.outcome: list[Taken | Exception | None] = [None]

    def arrays(self) -> tuple[jax.Array, ...]:
        """Returns what the device may still be at work on."""
        (taken,) = self.outcome
        return taken.arrays or () if isinstance(taken, Taken) else ()


class Coordinator:
    """The accumulator behind one or several handles.

    A waiter that has an outcome but has not been woken stays at the head of the queue, so that an
    apply interrupted between the two is finished by whoever comes next.
    """

    def __init__(self, spec: Spec, name: str, capacity: int | None, placement: Placement) -> None:
        self.spec = spec
        self.is_closed = False
        self._name = name
        self._reader = GradientReader(spec.dtype, spec.shape, placement.gradients)
        self._state = DeviceState(spec, capacity, placement)
        # Reentrant, for a signal handler may close what its own thread is just applying to.
        self._lock = threading.RLock()
        self._queue: collections.deque[Waiter] = collections.deque()
        # Outcomes whose takers went away before they had seen them, for those who come next.
        self._unclaimed: collections.deque[Waiter] = collections.deque()
        self._num_stale = 0
        self._num_invalid = 0

    def apply(
        self,
        indices: Any,
        values: Any,
        dense_shape: Any,
        local_step: Any,
        *,
        padding: int | None = None,
        validate: bool = True,
    ) -> bool:
        """Adds a gradient; returns whether it was accepted rather than stale."""
        local_step = as_step(local_step, "local_step")
        state = self._state
        # Most are not stale, which it takes no lock to see: it is looked at again below.
        if local_step < state.global_step and self._is_stale(local_step):
            return False
        try:
            # Outside the lock, for it may copy much. It reads nothing that changes.
            gradient = self._reader.read(
                indices, values, dense_shape, padding=padding, validate=validate
            )
            with self._lock:
                is_late = self.is_closed or local_step < state.global_step
                if is_late and self._is_stale(local_step):
                    return False
                try:
                    state.add(gradient)
                finally:
                    self._settle()
        except InvalidArgumentError:
            with self._lock:
                self._num_invalid += 1
            raise
        return True

    def take(self, num_required: Any, timeout: float | None, *, trim: bool) -> IndexedSlices:
        """Waits for ``num_required`` gradients and takes all there are."""
        num_required, timeout = _as_required(num_required), _as_timeout(timeout)
        event = threading.Event()
        waiter = Waiter(num_required, event.set)
        try:
            self._enqueue(waiter)
            if not _wait(event, timeout):
                self._expire(waiter)
            return self._collect(waiter, trim=trim)
        except BaseException:
            self._leave(waiter)
            raise

    async def take_async(
        self, num_required: Any, timeout: float | None, *, trim: bool
    ) -> IndexedSlices:
        """Waits as `take` does, but lets the event loop run meanwhile."""
        num_required, timeout = _as_required(num_required), _as_timeout(timeout)
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop is closed, and the waiter gone with it
                self._leave(waiter)

        waiter = Waiter(num_required, wake)
        try:
            self._enqueue(waiter)
            try:
                await asyncio.wait_for(event.wait(), timeout)
            except TimeoutError:
                self._expire(waiter)
            await asyncio.to_thread(jax.block_until_ready, waiter.arrays())
            return self._collect(waiter, trim=trim)
        except BaseException:
            self._leave(waiter)
            raise

    def num_accumulated(self) -> int:
        """Returns how many gradients were accepted since the last take."""
        with self._lock:
            self._check_open()
            return self._state.num_accumulated

    def set_global_step(self, new_global_step: Any) -> None:
        """Sets the step; the queue is not looked at, for no count has changed."""
        new = as_step(new_global_step, "new_global_step")
        with self._lock:
            self._check_open()
            old, self._state.global_step = self._state.global_step, new
        if new < old:
            logger.warning(
                "Attempt to set current_global_step_ to smaller value: "
                "current_global_step_ = %d >= %d = new_global_step.",
                old,
                new,
            )

    def statistics(self) -> dict[str, Any]:
        """Returns counts since the beginning, and what is held now."""
        with self._lock:
            self._check_open()
            state = self._state
            try:
                return {
                    "accepted": state.num_accepted,
                    "stale": self._num_stale,
                    "invalid": self._num_invalid + state.num_invalid,
                    "taken": state.num_taken,
                    "grown": state.num_grown,
                    "waiting": len(self._queue),
                    "unclaimed": len(self._unclaimed),
                    "num_accumulated": state.num_accumulated,
                    "global_step": state.global_step,
                    "rows": state.num_rows(),
                    "capacity": state.capacity,
                    "compiled_sizes": sorted(state.sizes),
                }
            finally:
                self._settle()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns what is accumulated."""
        with self._lock:
            self._check_open()
            try:
                return self._state.save()
            finally:
                self._settle()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Replaces what is accumulated."""
        with self._lock:
            self._check_open()
            self._state.load(saved)
            self._settle()

    def close(self) -> None:
        """Cancels all who wait and frees the state."""
        with self._lock:
            self.is_closed = True
            while self._queue:
                head = self._queue[0]
                if head.outcome[0] is None:
                    head.outcome[0] = CancelledError("TakeGrad operation was cancelled")
                self._release(head)
            self._unclaimed.clear()
            self._state.clear()

    def _check_open(self) -> None:
        if self.is_closed:
            raise CancelledError(f"Attempted to use a closed accumulator: {self._name}")

    def _is_stale(self, local_step: int) -> bool:
        with self._lock:
            self._check_open()
            if local_step >= self._state.global_step:
                return False
            self._num_stale += 1
            self._serve()
            logger.debug("stale gradient: %d < %d", local_step, self._state.global_step)
            return True

    def _enqueue(self, waiter: Waiter) -> None:
        with self._lock:
            self._check_open()
            self._queue.append(waiter)
            self._serve()

    def _settle(self) -> None:
        """Ends whatever dispatches."""
        self._close_if_lost()
        if self._queue:
            self._serve()

    def _close_if_lost(self) -> None:
        if self._state.is_lost():
            logger.error("accumulator %s lost its rows in a call that failed", self._name)
            self.close()

    def _serve(self) -> None:
        """Serves the head of the queue, and who comes after, for as long as it can."""
        while self._queue:
            head = self._queue[0]
            try:
                if head.outcome[0] is None and not self._is_served(head):
                    return
            finally:
                if head.outcome[0] is not None:
                    self._release(head)

    def _release(self, head: Waiter) -> None:
        head.wake()
        # Waking it may have closed the accumulator, or sent the waiter away.
        if self._queue and self._queue[0] is head:
            self._queue.popleft()

    def _is_served(self, head: Waiter) -> bool:
        while self._unclaimed:
            (taken,) = self._unclaimed[0].outcome
            if isinstance(taken, Taken):
                if taken.num_accumulated < head.num_required:
                    break
                head.outcome, self._unclaimed[0].outcome = self._unclaimed[0].outcome, [None]
            self._unclaimed.popleft()
            if taken is not None:
                return True
        if self._state.num_accumulated < head.num_required:
            return False
        try:
            self._state.take(head.outcome)
        except Exception as error:  # out of memory, say: the taker's concern, not the applier's
            head.outcome[0] = error
            self._close_if_lost()
        return True

    def _expire(self, waiter: Waiter) -> None:
        with self._lock:
            if waiter.outcome[0] is None:
                self._leave(waiter)
                raise DeadlineExceededError("Timed out waiting for notification")

    def _leave(self, waiter: Waiter) -> None:
        """Forgets a waiter; what it was served and has not collected goes to the next."""
        with self._lock:
            if waiter in self._queue:
                self._queue.remove(waiter)
            if isinstance(waiter.outcome[0], Taken) and not self.is_closed:
                logger.warning("a taker left without its gradient; the next one gets it")
                self._unclaimed.append(waiter)
            self._serve()

    def _collect(self, waiter: Waiter, *, trim: bool) -> IndexedSlices:
        """Returns what the waiter was served, waiting for the device outside the lock."""
        (taken,) = waiter.outcome
        if isinstance(taken, Exception):
            raise taken
        assert taken is not None
        assert taken.arrays is not None
        if taken.is_tentative:
            facts = np.asarray(taken.arrays[2])
            with self._lock:
                try:
                    self._state.settle(taken, facts)
                except InvalidArgumentError:
                    waiter.outcome[0] = None
                    raise
                finally:
                    self._serve()
        return self._state.gradient(taken, trim=trim)


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


def _as_required(num_required: Any) -> int:
    if num_required is None:
        raise ValueError("None values not supported: num_required")
    if type(num_required) is not int:
        host = np.asarray(num_required)
        if host.ndim != 0:
            raise InvalidArgumentError(
                f"Argument num_required must be scalar, but had bad shape {brackets(host.shape)}"
            )
        num_required = operator.index(host.item())
    if num_required < 1:
        raise InvalidArgumentError(
            f"Argument num_required must be positive, but was {num_required}"
        )
    if num_required >= 2**31:
        raise InvalidArgumentError(f"Argument num_required must fit int32, but was {num_required}")
    return num_required


def _as_timeout(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    seconds = float(timeout)
    if seconds != seconds:
        raise ValueError("timeout must be a number of seconds, got NaN")
    return min(max(seconds, 0.0), threading.TIMEOUT_MAX)
