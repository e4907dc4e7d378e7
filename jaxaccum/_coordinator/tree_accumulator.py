"""`TreeAccumulator`: the gradients of a whole model, from many threads, under one verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike

from jaxaccum._accumulator.staleness import StalenessWeight
from jaxaccum._accumulator.state import Reduction, Verdict
from jaxaccum._coordinator.device_state import DeviceState
from jaxaccum._coordinator.handle import Handle
from jaxaccum._coordinator.kept import Kept
from jaxaccum._coordinator.placement import Placement, outside_jit
from jaxaccum._coordinator.policy import Policy
from jaxaccum._coordinator.tree_layout import make_layout
from jaxaccum._rows.public import public
from jaxaccum._rows.tables import Tables
from jaxaccum._rows.tree import PyTree

_DEFAULT_NAME = "tree_accumulator"
_ACCEPTED, _STALE = Verdict.ACCEPTED, Verdict.STALE  # an enumeration is slow to look into


@public
class Applied(NamedTuple):
    """What `TreeAccumulator.apply_grad` answers.

    Attributes:
      verdict: ``Verdict.ACCEPTED`` or ``Verdict.STALE``.
      global_step: a scalar, the accumulator's step now: what a refused worker has to catch up with.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> acc = jaxaccum.TreeAccumulator(jnp.zeros(2))
      >>> acc.apply_grad(jnp.ones(2), local_step=-1)
      Applied(verdict=<Verdict.STALE: 1>, global_step=0)

    Source: TensorFlow's accumulators answer nothing; its workers read the global step anew.
    """

    verdict: Verdict
    global_step: int


@public
class TreeAccumulator(Handle):
    """Gathers gradients of a whole model from many threads until enough are there to be taken.

    What `SparseConditionalAccumulator` does for one table, for all leaves of a tree: gradients of
    tables are accumulated by row, those of other leaves as they are. There is one lock, one step
    and one verdict: a gradient is added on all leaves or on none, and what is taken comes from the
    same gradients on all of them. Threads, queue, time-outs, signals, memory and compilation are as
    that class has them.

    A gradient computed at step ``local_step`` is ``global_step - local_step`` steps old when it
    arrives (never less than 0), which is its staleness for good. What becomes of it:

    * By default it is refused if it is stale at all, as TensorFlow does.
    * ``max_staleness=s`` accepts it if its staleness is at most ``s``.
    * ``staleness_weight`` makes it count ``w = staleness_weight(staleness)`` times: sums are
      weighted sums, and means divide by sums of weights.
    * ``exactly=True``: a take uses the first ``num_required`` gradients in order of arrival, no
      more; the rest stay for the next.
    * ``carry_over=True``: none is refused. One older than ``max_staleness`` is added to what the
      next take returns, but does not count towards ``num_required``.

    They go together. With ``exactly`` and ``carry_over`` a take uses the first ``num_required``
    gradients that count and those carried over that came before the last of them.

    With ``exactly`` gradients are kept one by one until they are taken, in memory that
    ``statistics()["kept_bytes"]`` tells, and are added up by the taker.

    Args:
      like: the parameters, arrays or `jax.ShapeDtypeStruct`; or a tree as `value_and_sparse_grad`
        returns, in which tables are `IndexedSlices`.
      tables: which leaves of ``like`` are tables: a predicate ``(path, leaf) -> bool`` or a
        (prefix) tree of bools. By default those that are `IndexedSlices`.
      shared_name: where not empty, accumulators made under it in this process are one.
      name: made unique among the living by appending a number.
      reduction: ``"mean_per_gradient"`` divides by the number of gradients, ``"mean_per_row"`` each
        row of a table by the number of gradients that touched it, ``"sum"`` by none.
      capacity: how many rows a table holds at first and at least, a number for all tables or a
        (prefix) tree of numbers; by default a guess from the gradients.
      max_staleness: how many steps old a gradient may be to count.
      staleness_weight: what one weighs that is ``s`` steps old, a positive number for the int32
        scalar ``s``; traced by JAX. FedBuff's is ``lambda s: 1 / jnp.sqrt(1.0 + s)``.
      exactly: whether a take uses no more gradients than it asks for.
      carry_over: whether gradients too old to count are added all the same.
      device: where to accumulate.

    Raises:
      ValueError: ``like`` has no leaves, ``tables`` or ``capacity`` do not match it, a bad
        reduction, capacity or staleness; or ``shared_name`` is that of an accumulator of another
        tree or policy.
      TypeError: a leaf is of no numeric dtype, or ``staleness_weight`` is asked for integers.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> params = {"table": jnp.ones((5, 2)), "bias": jnp.zeros(2)}
      >>> tables = {"table": True, "bias": False}
      >>> loss = lambda params, ids: jnp.sum(params["table"][ids] ** 2 + params["bias"])
      >>> _, grads = jaxaccum.value_and_sparse_grad(loss, tables=tables)(params, jnp.array([3, 1]))
      >>> acc = jaxaccum.TreeAccumulator(params, tables=tables)
      >>> acc.apply_grad(grads, local_step=0)
      Applied(verdict=<Verdict.ACCEPTED: 0>, global_step=0)
      >>> mean = acc.take_grad(num_required=1, trim=True)
      >>> mean["table"].indices, mean["bias"]
      (Array([1, 3], dtype=int32), Array([2., 2.], dtype=float32))
      >>> acc.apply_grad(grads, local_step=0)
      Applied(verdict=<Verdict.STALE: 1>, global_step=1)

    Source: TensorFlow's ``SparseConditionalAccumulator`` and ``ConditionalAccumulator``, of which
    ``SyncReplicasOptimizer`` makes one a variable; weights by staleness, Nguyen et al., "Federated
    Learning with Buffered Asynchronous Aggregation" (2022).
    """

    # Whether whoever hands a gradient over never writes to its NumPy arrays again.
    _owns_gradients = False

    @outside_jit
    def __init__(
        self,
        like: PyTree,
        *,
        tables: Tables | None = None,
        shared_name: str | None = None,
        name: str | None = _DEFAULT_NAME,
        reduction: Reduction = "mean_per_gradient",
        capacity: PyTree = None,
        max_staleness: int = 0,
        staleness_weight: StalenessWeight | None = None,
        exactly: bool = False,
        carry_over: bool = False,
        device: jax.Device | None = None,
    ) -> None:
        policy = Policy(max_staleness, staleness_weight, exactly, carry_over)
        layout, capacities = make_layout(like, tables, capacity, reduction, policy)
        # What is kept would keep the memory of others alive, perhaps more of it.
        layout = dataclasses.replace(layout, copies=exactly or not self._owns_gradients)
        self._layout = layout
        make = Kept if exactly else DeviceState
        super().__init__(
            name or _DEFAULT_NAME,
            shared_name,
            layout.spec,
            lambda: make(layout.spec, capacities, Placement(device), layout.read),
        )

    @property
    def global_step(self) -> int:
        """How many takes there were, or what `set_global_step` said, and takes since."""
        return self._core.global_step

    def apply_grad(
        self, grads: PyTree, local_step: ArrayLike = 0, *, worker: Hashable = None
    ) -> Applied:
        """Adds a gradient on all leaves, or on none.

        Args:
          grads: a tree like ``like``: an `IndexedSlices` for each table, whose padding is skipped,
            and an array for each other leaf. NumPy arrays may be overwritten afterwards.
          local_step: the step at which the gradient was computed: what `global_step` was when its
            parameters were.
          worker: a name under which `statistics` counts it.

        Returns:
          The verdict, and the step there is now. A stale gradient is not looked at.

        Raises:
          InvalidArgumentError: a leaf does not fit, and which; nothing has changed.
          CancelledError: the accumulator is closed.

        Example:
          >>> import jaxaccum, numpy as np
          >>> acc = jaxaccum.TreeAccumulator({"w": np.zeros((2, 3), np.float32)})
          >>> acc.apply_grad({"w": np.ones((2, 3), np.float32)}, worker="one").verdict
          <Verdict.ACCEPTED: 0>
          >>> acc.statistics()["workers"]["one"]["accepted"]
          1
        """
        is_accepted = self._core.apply(local_step, grads, worker=worker)
        return Applied(_ACCEPTED if is_accepted else _STALE, self._core.global_step)

    def take_grad(
        self, num_required: int, *, timeout: float | None = None, trim: bool = False
    ) -> PyTree:
        """Waits until ``num_required`` gradients have been accepted, and takes what a step uses.

        That is all there are; with ``exactly`` just as many.

        Args:
          num_required: at least 1.
          timeout: seconds to wait; 0 only looks, ``None`` waits for ever.
          trim: whether to cut the padding off, which waits for the device. Padded, a gradient is of
            one of a few sizes, so that what consumes it compiles a few times only.

        Returns:
          A tree like ``like``: of each table an `IndexedSlices` of distinct rows, ascending, and of
          each other leaf an array. `lazy_rows` takes it.

        Raises:
          InvalidArgumentError: ``num_required`` is less than 1.
          DeadlineExceededError: it took longer than ``timeout``; nothing is taken.
          CancelledError: the accumulator is closed, or was so meanwhile.

        Example:
          >>> import jaxaccum, numpy as np
          >>> acc = jaxaccum.TreeAccumulator(np.zeros(2, np.float32))
          >>> for value in (1, 3):
          ...     applied = acc.apply_grad(np.full(2, value, np.float32))
          >>> acc.take_grad(2), acc.global_step
          (Array([2., 2.], dtype=float32), 1)
        """
        return self._layout.join(*self._core.take(num_required, timeout, trim=trim))

    async def take_grad_async(
        self, num_required: int, *, timeout: float | None = None, trim: bool = False
    ) -> PyTree:
        """Does what `take_grad` does in asyncio code; cancelling the task leaves the queue."""
        return self._layout.join(*await self._core.take_async(num_required, timeout, trim=trim))

    def statistics(self) -> dict[str, Any]:
        """Returns counts of what happened and of what is held; it waits for the device.

        Since the beginning: gradients ``accepted``, those of them ``carried`` over, ``stale`` and
        ``invalid`` (those whose call raised, too), ``taken`` takes and how often a table has
        ``grown``; ``staleness``, how many gradients were how many steps old, those refused too
        (1,000 and more in one); ``workers``, the same by worker.

        Now: ``waiting`` takers, ``unclaimed`` gradients whose takers went away,
        ``num_accumulated``, ``global_step``; by table the ``rows`` held, the ``capacity``, and the
        ``compiled_sizes`` gradients were padded to; or with ``exactly`` the ``kept_bytes``.

        Example:
          >>> import jaxaccum, numpy as np
          >>> acc = jaxaccum.TreeAccumulator(np.zeros(2, np.float32), max_staleness=2)
          >>> acc.set_global_step(5)
          >>> for step in (5, 4, 4, 1):
          ...     applied = acc.apply_grad(np.ones(2, np.float32), step)
          >>> acc.statistics()["staleness"], acc.statistics()["stale"]
          ({0: 1, 1: 2, 4: 1}, 1)
        """
        return self._core.statistics()
