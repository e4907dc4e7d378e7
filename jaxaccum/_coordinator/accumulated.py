"""What a `Coordinator` asks of the thing it guards, be it one table or a whole tree."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(slots=True, eq=False)
class Counts:
    """What the host knows without asking the device; Python numbers, which have no end.

    Attributes:
      global_step: what the staleness of a gradient is counted from.
      num_accumulated: gradients added since the last take, but for those carried over.
      accepted, carried, stale, invalid, taken: gradients added, those of them carried over, dropped
        and refused; and takes, since the beginning. Whoever holds the lock counts the stale and the
        invalid.
    """

    global_step: int = 0
    num_accumulated: int = 0
    accepted: int = 0
    carried: int = 0
    stale: int = 0
    invalid: int = 0
    taken: int = 0


# Gradients of this age and older are counted together.
OLDEST_AGE = 1000


@dataclasses.dataclass(slots=True, eq=False)
class Tally:
    """What became of the gradients of one worker."""

    accepted: int = 0
    stale: int = 0
    invalid: int = 0
    ages: collections.defaultdict[int, int] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(int)
    )

    def as_dict(self) -> dict[str, Any]:
        """Returns it as users see it."""
        counts = {"accepted": self.accepted, "stale": self.stale, "invalid": self.invalid}
        return counts | {"staleness": dict(sorted(self.ages.items()))}


@dataclasses.dataclass(slots=True, eq=False)
class Taken:
    """What was taken, on its way to a taker.

    Attributes:
      num_accumulated: how many gradients are in it, but for those carried over.
      arrays: what the device may still be at work on.
    """

    num_accumulated: int
    arrays: Any = None


class Accumulated(Protocol):
    """Gradients added up somewhere.

    Its owner holds a lock, outside jit and whatever mesh its caller has set, but for `read`,
    `deliver` and what `prepare` returns: where these use devices, see `outside_jit`.

    Each of `add`, `take` and `load` is done whole or not at all, whatever is raised in it, and
    changes ``counts`` together with the rest.

    Attributes:
      counts: what is known of it.
    """

    counts: Counts

    def read(self, *gradient: Any) -> Any:
        """Checks a caller's gradient against what never changes; copies what must be copied."""

    def prepare(self, gradient: Any, will_take: bool) -> Callable[[], object] | None:
        """Sees to the capacity for a gradient, if there is one, and checks that it fits.

        Returns:
          What has to be compiled before it is added (and then all is taken, if ``will_take``), to
          be called outside the lock before asking again; ``None`` if nothing has.
        """

    def add(self, gradient: Any, staleness: int) -> None:
        """Adds a gradient that `prepare` has just agreed to, so many steps old."""

    def take(self, outcome: list[Any], num_required: int) -> None:
        """Puts what one step uses into ``outcome[0]``, as a `Taken`; the step is over."""

    def deliver(self, taken: Taken, *, trim: bool) -> Any:
        """Returns what the taker's caller gets; it may wait for the device."""

    def statistics(self) -> dict[str, Any]:
        """Returns what there is to tell beside ``counts``."""

    def save(self) -> dict[str, np.ndarray]:
        """Returns what is accumulated, as arrays of their own."""

    def load(self, saved: Mapping[str, Any]) -> None:
        """Replaces what is accumulated by what `save` returned."""

    def clear(self) -> None:
        """Frees the memory."""

    def is_lost(self) -> bool:
        """Whether a call failed so that what was accumulated is gone."""
