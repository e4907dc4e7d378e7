"""What a parameter server is made from, and what its workers must know of it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxaccum._accumulator.state import Reduction
from jaxaccum._coordinator.policy import Policy
from jaxaccum._ray.layout import Layout
from jaxaccum._rows.tree import Leaf, PyTree

# A part that was never committed goes after so many steps beyond the staleness allowed; a commit
# that comes later is refused, so that nothing is counted of which a part is gone.
_KEEP_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a server is made from.

    Attributes:
      run: of this server alone: a coordinator that finds a checkpoint of its own was restarted.
      name: for logs and names of actors.
      layout, skeleton, tx, reduction: see `ParameterServerShard`.
      num_required, policy: see `Tickets`.
      folder: of the checkpoints; ``None``: a server that dies is gone.
      checkpoint_every: steps between them.
      actor_options: what Ray is told of the actors.
    """

    run: str
    name: str
    layout: Layout
    skeleton: PyTree
    tx: PyTree
    reduction: Reduction
    num_required: int
    policy: Policy
    folder: str | None
    checkpoint_every: int
    actor_options: dict[str, object]

    @property
    def keep_steps(self) -> int:
        """For how many steps a part waits for its commit."""
        return _KEEP_STEPS + self.policy.max_staleness

    @property
    def shards(self) -> tuple[Layout, PyTree, PyTree, Reduction, int]:
        """What each shard is told beside its number."""
        return self.layout, self.skeleton, self.tx, self.reduction, self.keep_steps

    def __str__(self) -> str:
        """Says what can be said of it in a line: two servers of one name must say the same."""
        return (
            f"{self.layout}, {self.reduction}, num_required {self.num_required}, {self.policy}, "
            f"checkpoint_dir {self.folder}, checkpoint_every {self.checkpoint_every}"
        )


class View(NamedTuple):
    """What a worker must know to talk to the server as it now is.

    Attributes:
      epoch: since the last time it went back.
      others: the actors of the shards but for the first, which the coordinator's has.
      plan: what it is made from.
    """

    epoch: str
    others: list[Leaf]
    plan: Plan
