"""Which gradients are still wanted, what they weigh, and how many of them a take uses."""

from __future__ import annotations

import dataclasses
import math

from jaxaccum._accumulator.staleness import StalenessWeight
from jaxaccum._accumulator.state import as_max_staleness


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is done with gradients that are late, or too many; see `jaxaccum.TreeAccumulator`.

    Attributes:
      max_staleness: how many steps old a gradient may be to count.
      staleness_weight: what one weighs that is so many steps old; ``None``: 1.
      exactly: whether a take uses just as many gradients as it asks for.
      carry_over: whether older gradients are added all the same, without counting.
    """

    max_staleness: int = 0
    staleness_weight: StalenessWeight | None = None
    exactly: bool = False
    carry_over: bool = False

    def __post_init__(self) -> None:
        as_max_staleness(self.max_staleness)
        if self.staleness_weight is not None and not callable(self.staleness_weight):
            raise TypeError(f"staleness_weight must be a function, got {self.staleness_weight!r}")

    @property
    def oldest(self) -> float:
        """How many steps old a gradient may be to be added at all."""
        return math.inf if self.carry_over else self.max_staleness

    def __str__(self) -> str:
        """Says it in a way that processes can compare: functions by their first values."""
        weigh, weights = self.staleness_weight, ""
        if weigh is not None:
            weights = f", weights {[float(weigh(s)) for s in range(8)]}"  # type: ignore[arg-type]
        return (
            f"max_staleness {self.max_staleness}, exactly {self.exactly}, "
            f"carry_over {self.carry_over}{weights}"
        )


TENSORFLOWS = Policy()
