"""Which gradient counts, and in which step: the one verdict over all shards.

Only keys and numbers are here, no arrays, and nothing that waits.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from jaxaccum._accumulator.state import Verdict
from jaxaccum._coordinator.arguments import as_step
from jaxaccum._coordinator.policy import Policy
from jaxaccum._ray.answers import Answers
from jaxaccum._rows.tree import Leaf


class Ticket(NamedTuple):
    """A gradient that was accepted and waits for its step.

    Attributes:
      key: of the push.
      weight: what its values count.
      counts: whether it is one of those a step waits for; one that is carried over is not.
    """

    key: str
    weight: float
    counts: bool


@dataclasses.dataclass
class Fate:
    """What became of the gradients of all workers, or of one.

    Attributes:
      accepted, carried, stale: how many; those carried over were accepted.
      staleness: how many were so many steps old, those refused too.
    """

    accepted: int = 0
    carried: int = 0
    stale: int = 0
    staleness: dict[int, int] = dataclasses.field(default_factory=dict)

    def note(self, staleness: int, *, is_accepted: bool, counts: bool) -> None:
        """Counts one."""
        self.accepted += is_accepted
        self.carried += is_accepted and not counts
        self.stale += not is_accepted
        self.staleness[staleness] = self.staleness.get(staleness, 0) + 1


class Tickets:
    """Accepts gradients and gives steps out.

    Args:
      num_required: how many gradients a step waits for.
      policy: which are wanted.
      keep_steps: a part staged so many steps ago may be gone, and its gradient is stale.
      step: the first one.
    """

    def __init__(self, num_required: int, policy: Policy, keep_steps: int, step: int = 0) -> None:
        self.step, self.num_steps = step, 0
        self.waiting: list[Ticket] = []
        self.refused: list[str] = []
        self.answers = Answers()
        self.all, self.by_worker = Fate(), collections.defaultdict[str, Fate](Fate)
        self._num_required, self._policy, self._keep_steps = num_required, policy, keep_steps

    def commit(self, key: str, local_step: int, worker: str | None, staged_at: int) -> Verdict:
        """Decides on a gradient whose parts are all there, staged at that step or later."""
        local_step = as_step(local_step, "local_step")
        staleness = max(self.step - local_step, 0)
        is_gone = staged_at <= self.step - self._keep_steps
        is_accepted = staleness <= self._policy.oldest and not is_gone
        counts = staleness <= self._policy.max_staleness
        for fate in (self.all, *([self.by_worker[worker]] if worker is not None else [])):
            fate.note(staleness, is_accepted=is_accepted, counts=counts)
        if is_accepted:
            self.waiting.append(Ticket(key, self._weigh(staleness), counts))
        else:
            self.refused.append(key)
        return self.answers.keep(key, Verdict.ACCEPTED if is_accepted else Verdict.STALE)

    @property
    def num_accumulated(self) -> int:
        """How many gradients there are of those a step waits for."""
        return sum(ticket.counts for ticket in self.waiting)

    def take(self) -> list[Ticket]:
        """Returns the gradients of the next step, which thereby begins; none if they are too few.

        All that wait, or with ``exactly`` those up to the last one that is required.
        """
        if self.num_accumulated < self._num_required:
            return []
        end = len(self.waiting)
        if self._policy.exactly:
            counted = [i for i, ticket in enumerate(self.waiting) if ticket.counts]
            end = counted[self._num_required - 1] + 1
        taken, self.waiting = self.waiting[:end], self.waiting[end:]
        self.step += 1
        self.num_steps += 1
        return taken

    def _weigh(self, staleness: int) -> float:
        weigh = self._policy.staleness_weight
        return 1.0 if weigh is None else float(weigh(staleness))  # type: ignore[arg-type]

    def save(self) -> dict[str, object]:
        """Returns what a checkpoint has to remember, ready for JSON, and never changed again."""
        return {
            "waiting": list(self.waiting),
            "answers": self.answers.save(),
            "num_steps": self.num_steps,
            "all": dataclasses.asdict(self.all),
            "by_worker": {name: dataclasses.asdict(fate) for name, fate in self.by_worker.items()},
        }

    def load(self, saved: Mapping[str, Leaf], step: int) -> None:
        """Goes back to what was saved; steps go on from ``step``."""
        self.step = step
        self.num_steps = saved["num_steps"]
        self.waiting = [Ticket(*ticket) for ticket in saved["waiting"]]
        self.refused = []
        self.answers = Answers({key: Verdict(verdict) for key, verdict in saved["answers"].items()})
        self.all = _fate(saved["all"])
        self.by_worker.clear()
        self.by_worker.update((name, _fate(fate)) for name, fate in saved["by_worker"].items())


def _fate(saved: Mapping[str, Leaf]) -> Fate:
    # JSON makes text of the keys of a dictionary.
    staleness = {int(steps): count for steps, count in saved["staleness"].items()}
    return Fate(saved["accepted"], saved["carried"], saved["stale"], staleness)
