"""``ParameterServer``: tables in shards on several machines, as a worker sees them."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple, get_args

import jax
import numpy as np
from jax.tree_util import PyTreeDef

from jaxaccum._accumulator.state import Reduction, Verdict
from jaxaccum._coordinator.arguments import as_required, as_step
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._coordinator.policy import Policy
from jaxaccum._coordinator.tree_accumulator import Applied
from jaxaccum._ray.calls import NAMESPACE, Deadline, import_ray, version, wait_for
from jaxaccum._ray.coordinator import ParameterServerCoordinator
from jaxaccum._ray.errors import FailedError, RolledBackError, UnavailableError
from jaxaccum._ray.layout import Layout, Part
from jaxaccum._ray.parcels import pack
from jaxaccum._ray.plan import Plan, View
from jaxaccum._rows.indexed_slices import is_slices
from jaxaccum._rows.tables import Tables
from jaxaccum._rows.tree import Leaf, PyTree

_RETRY_SECONDS = 0.1


class Pulled(NamedTuple):
    """Parameters, and the step they are of.

    Attributes:
      values: the tree of parameters: of tables the rows asked for, ``[n, *row]``; NumPy arrays.
      global_step: the ``local_step`` of gradients computed from them. Where a step was taken
        meanwhile, some shards are further: this is the least of them.
    """

    values: PyTree
    global_step: int


Pulled.__module__ = "jaxaccum.ray"


class ParameterServer:
    """Tables that one machine cannot hold, trained by workers on many.

    Rows of tables lie in ranges on ``num_shards`` actors, with their optimizer state; each dense
    leaf lies whole on one. Workers `pull` the rows they need and `push` gradients of them. When
    ``num_required`` gradients have been accepted, every shard adds the same ones, runs the
    optimizer on the rows they touch, and the next step begins: one step and one verdict over all
    shards, which the first of them decides. There is no chief; the server takes steps by itself.

    The handle travels: pass it to tasks and actors, or make another by `attach`. Whatever it does
    ends within its time-out. A worker that dies, dies with the one gradient it had not pushed:
    a gradient counts on all shards or on none. With a ``checkpoint_dir``, an actor of the server
    that dies is started again by Ray, and all of them go back to the last checkpoint; workers
    notice a delay. `lost` tells which gradients went with it.

    Memory: a shard keeps the gradients of a step until all are there, beside its rows, and room to
    join their values in.

    Args:
      params: a tree of arrays, the first parameters; a `TableInit` for a table whose rows are made
        where they will lie.
      tx: a row-separable optax transform, as for `jaxaccum.lazy_rows`, which is put around it here.
        It runs on each shard apart: a norm is that of a shard's part.
      tables: which leaves are tables, as everywhere; their gradients are ``IndexedSlices``.
      num_required: how many gradients a step is made of.
      num_shards: how many actors the rows lie on.
      reduction: what is made of the gradients' sum; see `jaxaccum.init`.
      max_staleness, staleness_weight, exactly, carry_over: which gradients count, as in
        `jaxaccum.TreeAccumulator`.
      shared_name: one server of this name exists on a Ray cluster: who makes it again gets it.
      checkpoint_dir: a folder that all machines of the server see.
      checkpoint_every: how many steps lie between checkpoints.
      resume: go on from the checkpoint that the folder holds.
      timeout: seconds that a call may take where it does not say otherwise.
      actor_options: what Ray is told of the actors: ``num_cpus``, ``resources``, ...

    Raises:
      ImportError: Ray is not installed.
      ValueError: ``shared_name`` is that of a server of other parameters, policy or counts (whether
        optimizers are the same nobody can tell); a bad count or policy; the folder holds a
        checkpoint, and ``resume`` is not set, or it does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, jaxaccum.ray, optax
      >>> server = jaxaccum.ray.ParameterServer(
      ...     {"table": jnp.zeros((1000, 2))}, optax.sgd(1.0), tables=True,
      ...     num_shards=2)  # doctest: +SKIP
      >>> rows, step = server.pull({"table": [3, 700]})  # doctest: +SKIP
      >>> grad = jaxaccum.IndexedSlices(jnp.array([3, 700]), jnp.ones((2, 2)), (1000, 2))
      >>> server.push({"table": grad}, step)  # doctest: +SKIP
      Applied(verdict=<Verdict.ACCEPTED: 0>, global_step=1)
    """

    __module__ = "jaxaccum.ray"

    def __init__(
        self,
        params: PyTree,
        tx: PyTree,
        *,
        tables: Tables,
        num_required: int = 1,
        num_shards: int = 1,
        reduction: Reduction = "mean_per_gradient",
        max_staleness: int = 0,
        staleness_weight: Callable[[jax.Array], jax.typing.ArrayLike] | None = None,
        exactly: bool = False,
        carry_over: bool = False,
        shared_name: str | None = None,
        checkpoint_dir: str | None = None,
        checkpoint_every: int = 100,
        resume: bool = False,
        timeout: float = 60.0,
        actor_options: dict[str, object] | None = None,
    ) -> None:
        run = uuid.uuid4().hex
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
        leaves, treedef = jax.tree.flatten(params)
        plan = Plan(
            run=run,
            name=shared_name or f"parameter server {run[:8]}",
            layout=Layout.of(params, tables, _positive(num_shards, "num_shards")),
            skeleton=jax.tree.unflatten(treedef, range(len(leaves))),
            tx=tx,
            reduction=reduction,
            num_required=as_required(num_required),
            policy=Policy(max_staleness, staleness_weight, exactly, carry_over),
            folder=None if checkpoint_dir is None else str(checkpoint_dir),
            checkpoint_every=_positive(checkpoint_every, "checkpoint_every"),
            actor_options=dict(actor_options or {}),
        )
        self._start(plan, leaves, timeout, resume=resume, is_shared=shared_name is not None)

    def _start(
        self, plan: Plan, leaves: list[Leaf], timeout: float, *, resume: bool, is_shared: bool
    ) -> None:
        """Makes the actors, unless another has, and sends each shard its rows."""
        ray, layout = import_ray(), plan.layout
        actor = ray.remote(ParameterServerCoordinator).options(
            name=plan.name,
            namespace=NAMESPACE,
            get_if_exists=is_shared,
            max_restarts=-1 if plan.folder else 0,
            **plan.actor_options,
        )
        self._attach(actor.remote(plan), plan.name, timeout)
        parts = [ray.put(layout.split_params(leaves, k)) for k in range(layout.num_shards)]
        start = self._actor.start.remote(parts, resume=resume)
        wait_for(start, Deadline(timeout), self.name)
        found = self._look(Deadline(timeout))
        if str(found) != str(plan):
            raise ValueError(
                f"shared_name {plan.name!r} is that of a server of {found}, not {plan}"
            )

    @classmethod
    def attach(cls, shared_name: str, *, timeout: float = 60.0) -> ParameterServer:
        """Returns a handle of the server of that name, made by whatever process.

        Raises:
          UnavailableError: there is none.
        """
        try:
            actor = import_ray().get_actor(shared_name, namespace=NAMESPACE)
        except ValueError:
            raise UnavailableError(f"there is no parameter server {shared_name!r}") from None
        return _rebuild(actor, shared_name, timeout)

    def _attach(self, actor: Leaf, name: str, timeout: float) -> None:
        self._actor, self.name, self._timeout = actor, name, timeout
        self._view: View | None = None
        self._plan: Plan | None = None
        # Of this handle in this process alone: its pushes are told apart from all others, and it
        # is not given parameters older than a step that it has been told of.
        self._client, self._numbers, self._seen = uuid.uuid4().hex, itertools.count(), 0

    def __reduce__(self) -> tuple[Callable[..., ParameterServer], tuple[Leaf, ...]]:
        """Travels as the actor it talks to."""
        return _rebuild, (self._actor, self.name, self._timeout)

    def pull(self, ids: PyTree, *, at_least: int = 0, timeout: float | None = None) -> Pulled:
        """Returns rows of tables, and dense leaves whole: as new as any step this handle knows of.

        Args:
          ids: the tree of parameters with row numbers for tables, ``[n]``; for dense leaves
            anything, ``None`` perhaps. The padding index gives zeros.
          at_least: a step to wait for, of which the handle has not heard yet: after a gradient of
            step ``s``, ``s + 1`` waits until it counts, as workers do that train synchronously.
          timeout: seconds.

        Raises:
          InvalidArgumentError: ``ids`` is another tree, or names rows that are not there.
          UnavailableError: there is no answer in time.
        """
        deadline = self._deadline(timeout)
        plan = self._look(deadline)
        layout, skeleton = plan.layout, plan.skeleton
        treedef: PyTreeDef = jax.tree.structure(skeleton)
        try:
            given = treedef.flatten_up_to(ids)
        except ValueError as error:
            raise InvalidArgumentError(f"ids must be a tree as params: {error}") from None
        ids = [
            leaf.as_ids(of) if leaf.is_table else None
            for of, leaf in zip(given, layout.leaves, strict=True)
        ]
        routes, asked = _route(layout, ids)
        at_least = as_step(at_least, "at_least")

        def attempt(view: View) -> list[Leaf]:
            shards, step = [self._actor, *view.others], max(at_least, self._seen)
            return [shards[k].pull.remote(view.epoch, part, step) for k, part in asked.items()]

        answers = dict(zip(asked, self._call(attempt, deadline), strict=True))
        values = []
        for i, leaf in enumerate(layout.leaves):
            if not leaf.is_table:
                values.append(answers[leaf.owner][0][i])
                continue
            rows = np.zeros((ids[i].size, *leaf.shape[1:]), leaf.dtype)
            for k, where in enumerate(routes[i]):
                if where.size:
                    rows[where] = answers[k][0][i]
            values.append(rows)
        steps = [step for _, step in answers.values()]
        self._seen = max(self._seen, *steps)
        return Pulled(treedef.unflatten(values), min(steps))

    def push(
        self,
        grads: PyTree,
        local_step: int,
        *,
        worker: str | None = None,
        key: str | None = None,
        timeout: float | None = None,
    ) -> Applied:
        """Hands a gradient over; returns what became of it, and the step the server is at.

        It is repeated while the server is started again, and counted once however often.

        Args:
          grads: the tree of parameters, ``IndexedSlices`` for tables.
          local_step: the `Pulled.global_step` of the parameters it was computed from.
          worker: whose it is in the statistics.
          key: a name for this one gradient. A later push of the same key is answered as this one
            was, and not counted: for whoever repeats pushes that ended in `UnavailableError`, and
            for Ray tasks that are retried.
          timeout: seconds.

        Raises:
          InvalidArgumentError: another tree, shape or dtype, or rows that are not there.
          UnavailableError: there is no answer in time; it may have been counted.
        """
        deadline = self._deadline(timeout)
        plan, local_step = self._look(deadline), as_step(local_step, "local_step")
        leaves, treedef = jax.tree.flatten(grads, is_leaf=is_slices)
        expected: PyTreeDef = jax.tree.structure(plan.skeleton)
        if treedef != expected:
            raise InvalidArgumentError(f"grads must be a tree as params {expected}, got {treedef}")
        parts = plan.layout.split_gradient(leaves)
        key = f"{self._client}-{next(self._numbers)}" if key is None else key

        def attempt(view: View) -> Leaf:
            # Shards that get nothing are asked too: all are of this epoch, or nothing counts.
            staged = [
                shard.stage.remote(*pack((view.epoch, key, part)))
                for shard, part in zip(view.others, parts[1:], strict=True)
            ]
            push = (view.epoch, key, local_step, worker, parts[0])
            return self._actor.commit.remote(*staged, *pack(push))

        verdict, step = self._call(attempt, deadline)
        self._seen = max(self._seen, step)
        return Applied(Verdict(verdict), step)

    async def pull_async(
        self, ids: PyTree, *, at_least: int = 0, timeout: float | None = None
    ) -> Pulled:
        """Does as `pull`, and lets the event loop run meanwhile."""
        return await asyncio.to_thread(self.pull, ids, at_least=at_least, timeout=timeout)

    async def push_async(
        self,
        grads: PyTree,
        local_step: int,
        *,
        worker: str | None = None,
        key: str | None = None,
        timeout: float | None = None,
    ) -> Applied:
        """Does as `push`, and lets the event loop run meanwhile."""
        return await asyncio.to_thread(
            self.push, grads, local_step, worker=worker, key=key, timeout=timeout
        )

    def statistics(self, *, timeout: float | None = None) -> dict[str, object]:
        """Returns what became of the gradients, of all and by worker, and how the server is.

        ``accepted``, those of them ``carried`` over, ``stale``, ``staleness`` (how many were how
        many steps old, those refused too) and ``workers``, the same by worker: of the server's life
        but for what was ``lost``, accepted after the last checkpoint of a server that died;
        ``restarts``. ``num_steps`` taken and not lost, and ``global_step``, which goes on where
        steps are lost; ``num_accumulated`` for the next one. Processes: ``pid`` of the coordinator,
        which has the first shard, and of ``shards`` ``pid`` and the number of parts ``staged``.
        """
        return self._call(lambda _: self._actor.statistics.remote(), self._deadline(timeout))

    def lost(self, *, timeout: float | None = None) -> list[str]:
        """Returns the keys of gradients that were accepted, and went with a server that died."""
        return self._call(lambda _: self._actor.lost.remote(), self._deadline(timeout))

    def checkpoint(self, *, timeout: float | None = None) -> int:
        """Saves the whole server as it is at one step, which is returned; training goes on.

        Raises:
          ValueError: the server has no ``checkpoint_dir``.
        """
        if self._look(self._deadline(timeout)).folder is None:
            raise ValueError("checkpoint needs a server with a checkpoint_dir")
        return self._call(lambda _: self._actor.checkpoint.remote(), self._deadline(timeout))

    def close(self) -> None:
        """Ends the server, for all who have a handle; its checkpoints stay."""
        import_ray().kill(self._actor)

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self._timeout if timeout is None else timeout)

    def _look(self, deadline: Deadline) -> Plan:
        """What the server is made from, asked for once."""
        if self._plan is None:
            self._call(lambda _: [], deadline)
        assert self._plan is not None
        return self._plan

    def _call(self, attempt: Callable[[View], Leaf], deadline: Deadline) -> Leaf:
        """Makes calls, again and again while the server is not what it was, or not there."""
        suspect, num_dead = None, 0
        while True:
            view = self._view
            try:
                if view is None:
                    look = self._actor.view.remote(version(), suspect)
                    view = self._view = wait_for(look, deadline, self.name)
                    self._plan, self._seen = view.plan, 0
                num_dead, suspect = 0, view.epoch
                return wait_for(attempt(view), deadline, self.name)
            except FailedError as error:
                raise UnavailableError(str(error)) from error
            except (RolledBackError, UnavailableError) as error:
                # One that dies may have been at work on this call; one that is dead stays so.
                num_dead += view is None and "died" in str(error)
                if deadline.left() == 0 or num_dead >= 3:
                    raise UnavailableError(str(error)) from error
                self._view = None
                time.sleep(_RETRY_SECONDS)


def _route(
    layout: Layout, ids: list[np.ndarray]
) -> tuple[dict[int, list[np.ndarray]], dict[int, Part]]:
    """Which of the ids go to which shard, and what each shard is asked for."""
    routes: dict[int, list[np.ndarray]] = {}
    asked: dict[int, Part] = {}
    for i, leaf in enumerate(layout.leaves):
        if not leaf.is_table:
            asked.setdefault(leaf.owner, {})[i] = None
            continue
        routes[i] = leaf.route(ids[i])
        for k, where in enumerate(routes[i]):
            if where.size:
                asked.setdefault(k, {})[i] = (ids[i][where] - leaf.bounds[k]).astype(np.int32)
    return routes, asked or {0: {}}


def _rebuild(actor: Leaf, name: str, timeout: float) -> ParameterServer:
    server = ParameterServer.__new__(ParameterServer)
    server._attach(actor, name, timeout)
    return server


def _positive(number: int, name: str) -> int:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
