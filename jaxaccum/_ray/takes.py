"""Takers of other processes: each in the queue as long as it asks, and no longer.

A taker in this process waits in a thread, and leaves the queue when that is interrupted. One in
another may die without a word, and its place in the queue would take a gradient for nobody. So it
asks again every `ASK_SECONDS`; one that has not for `LEASE_SECONDS` is cancelled, and what it was
served goes to the next.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine

from jaxaccum._rows.tree import PyTree

logger = logging.getLogger("jaxaccum")

ASK_SECONDS = 2.0
LEASE_SECONDS = 10.0


@dataclasses.dataclass
class _Take:
    task: asyncio.Task[PyTree]
    last_asked: float


class Takes:
    """The takers that wait, by ticket.

    Args:
      clock: what tells seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._takes: dict[str, _Take] = {}
        self._unclaimed: collections.deque[PyTree] = collections.deque()

    async def ask(
        self, ticket: str, take: Callable[[], Coroutine[None, None, PyTree]], seconds: float
    ) -> tuple[PyTree] | None:
        """Waits some seconds for the taker of that ticket; ``None`` if it has to ask again.

        What ``take`` returns, or raises, is this taker's; it is called once a ticket.
        """
        self.expire()
        entry = self._takes.pop(ticket, None)
        if entry is None:
            if self._unclaimed:
                return (self._unclaimed.popleft(),)
            entry = _Take(asyncio.get_running_loop().create_task(take()), 0.0)
        elif self._unclaimed and entry.task.cancel():
            return (self._unclaimed.popleft(),)
        self._takes[ticket], entry.last_asked = entry, self._clock()
        done, _ = await asyncio.wait({entry.task}, timeout=seconds)
        if not done:
            return None
        self._takes.pop(ticket, None)
        return (entry.task.result(),)

    async def keep_expiring(self) -> None:
        """Looks after takers that go away, for ever."""
        while True:
            await asyncio.sleep(ASK_SECONDS)
            self.expire()

    def expire(self) -> None:
        """Cancels the takers that have gone away."""
        for ticket, entry in list(self._takes.items()):
            if self._clock() - entry.last_asked < LEASE_SECONDS:
                continue
            logger.warning("a taker has not asked for %s s: its place is given up", LEASE_SECONDS)
            del self._takes[ticket]
            if not entry.task.cancel() and not entry.task.exception():
                self._unclaimed.append(entry.task.result())
