"""``TreeAccumulator`` for the workers of a Ray cluster: one actor has it, its handle travels."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import threading
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxaccum._accumulator.state import Reduction, Verdict
from jaxaccum._coordinator import tree_accumulator as local
from jaxaccum._coordinator.arguments import as_required, as_step, as_timeout
from jaxaccum._coordinator.host_memory import round_up
from jaxaccum._coordinator.policy import TENSORFLOWS, Policy
from jaxaccum._coordinator.spec import TreeSpec
from jaxaccum._coordinator.tree_accumulator import Applied
from jaxaccum._coordinator.tree_layout import make_layout
from jaxaccum._optimizers.state_layout import struct_of
from jaxaccum._ray.answers import Answers
from jaxaccum._ray.calls import NAMESPACE, Deadline, check_version, import_ray, version, wait_for
from jaxaccum._ray.parcels import pack, unpack
from jaxaccum._ray.takes import ASK_SECONDS, Takes
from jaxaccum._rows.indexed_slices import is_slices
from jaxaccum._rows.tables import Tables
from jaxaccum._rows.tree import Leaf, PyTree

# How many of those who wait do so in threads of their own. One that asks again and again is in its
# thread for some seconds at a time, so there may be more of these.
_WAITING = {"takes": 64, "references": 64}

# The key of a push, the gradient, its step and whose it is, as they travel.
Push = tuple[str, PyTree, int, str | None]


class Design(NamedTuple):
    """What an accumulator is made of: the arguments of the local class, ready to travel."""

    like: PyTree
    tables: PyTree
    reduction: Reduction
    capacity: PyTree
    policy: Policy


class OwningAccumulator(local.TreeAccumulator):
    """Of gradients that Ray has brought, in memory that nobody can write to: none is copied."""

    _owns_gradients = True


class TreeAccumulatorActor:
    """The actor. Gradients are added by one thread, in turn; those who wait do so in others.

    An actor of coroutines would need no other threads, but each of its calls changes thread twice,
    from the one that Ray calls to that of the event loop and back: as long as it takes to add a
    gradient. Those who wait can spare that time; their coroutines run in an event loop of its own.
    One coroutine among the methods, and Ray would run all of them in its own.
    """

    def __init__(self, design: Design, about: str) -> None:
        like, tables, reduction, capacity, policy = design
        self._acc = OwningAccumulator(
            like,
            tables=tables,
            reduction=reduction,
            capacity=capacity,
            max_staleness=policy.max_staleness,
            staleness_weight=policy.staleness_weight,
            exactly=policy.exactly,
            carry_over=policy.carry_over,
        )
        self._answers, self._takes, self._about = Answers(), Takes(), about
        self._adding = threading.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="takes", daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._takes.keep_expiring(), self._loop)

    def hello(self, of_version: str, about: str) -> None:
        """Looks at whoever comes first: same version, same accumulator."""
        check_version(of_version)
        if about != self._about:
            raise ValueError(f"shared_name is that of an accumulator of {self._about}, not {about}")

    def apply_grad(self, *parcel: Leaf) -> Applied:
        """Adds a gradient once, however often it comes."""
        push: Push = unpack(parcel)
        key, grads, local_step, worker = push
        # With a `max_concurrency` of the user's there are several threads here: a repetition must
        # not slip in between the look and the answer.
        with self._adding:
            if (before := self._answers.find(key)) is not None:
                return Applied(before, self._acc.global_step)
            applied = self._acc.apply_grad(grads, local_step, worker=worker)
            self._answers.keep(key, applied.verdict)
            return applied

    def apply_grad_plainly(self, *parcel: Leaf) -> tuple[int, int]:
        """Does as `apply_grad`, and answers with numbers, which Ray need not pickle."""
        verdict, step = self.apply_grad(*parcel)
        return int(verdict), step

    def call(self, method: str, *args: Leaf) -> Leaf:
        """Calls a method that neither waits nor takes."""
        result = getattr(self._acc, method)
        return result(*args) if callable(result) else result

    def ask_take(
        self, ticket: str, num_required: int, timeout: float | None, trim: bool, seconds: float
    ) -> tuple[PyTree] | None:
        """Waits some of the time a taker may; see `Takes`."""
        take = functools.partial(_take, self._acc, num_required, timeout, trim)
        return self._in_loop(self._takes.ask(ticket, take, seconds))

    def take_grad(self, num_required: int, timeout: float | None, trim: bool) -> PyTree:
        """Takes for whoever holds the reference to what this returns."""
        return self._in_loop(_take(self._acc, num_required, timeout, trim))

    def _in_loop(self, work: Coroutine[None, None, Leaf]) -> Leaf:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class TreeAccumulator:
    """A `jaxaccum.TreeAccumulator` that workers in other processes and on other machines share.

    It lives in an actor, and this is a handle: pass it to tasks and actors, or make it again under
    the same ``shared_name``. Methods, answers and errors are those of the local class. Every call
    ends: where the actor is not reached in time, it raises `UnavailableError`. A taker that dies
    leaves the queue within some seconds.

    Gradients travel as NumPy arrays, and so do the trees that are taken; `jax.numpy.asarray` puts
    them on a device. Classes in the tree must be importable where the actor runs.

    Args:
      like, tables, reduction, capacity, max_staleness, staleness_weight, exactly, carry_over: as
        there.
      shared_name: one accumulator of this name exists on a Ray cluster: who makes it again gets it.
      timeout: seconds within which the actor must answer; takes may wait longer.
      actor_options: what Ray is told of the actor: ``num_cpus``, ``lifetime``, ``resources``, ...

    Raises:
      ImportError: Ray is not installed.
      ValueError, TypeError: as there; or ``shared_name`` is that of another accumulator.

    Example:
      >>> import jax.numpy as jnp, jaxaccum.ray
      >>> acc = jaxaccum.ray.TreeAccumulator(jnp.zeros(2), shared_name="grads")  # doctest: +SKIP
      >>> acc.apply_grad(jnp.ones(2), local_step=0, worker="me")  # doctest: +SKIP
      Applied(verdict=<Verdict.ACCEPTED: 0>, global_step=0)
      >>> acc.take_grad(num_required=1, timeout=60)  # doctest: +SKIP
      array([1., 1.], dtype=float32)
    """

    __module__ = "jaxaccum.ray"

    def __init__(
        self,
        like: PyTree,
        *,
        tables: Tables | None = None,
        shared_name: str | None = None,
        reduction: Reduction = "mean_per_gradient",
        capacity: PyTree = None,
        max_staleness: int = 0,
        staleness_weight: Callable[[jax.Array], ArrayLike] | None = None,
        exactly: bool = False,
        carry_over: bool = False,
        timeout: float = 60.0,
        actor_options: dict[str, Leaf] | None = None,
    ) -> None:
        policy = Policy(max_staleness, staleness_weight, exactly, carry_over)
        # What is wrong is said here, not by an actor that dies of it.
        layout, _ = make_layout(like, tables, capacity, reduction, policy)
        design = Design(_skeleton(like), tables, reduction, capacity, policy)
        about = _describe(layout.spec)
        name = shared_name or f"accumulator {uuid.uuid4().hex[:8]}"
        actor = import_ray().remote(concurrency_groups=_WAITING)(TreeAccumulatorActor)
        options = {"num_cpus": 0, **(actor_options or {})}
        actor = actor.options(
            name=name, namespace=NAMESPACE, get_if_exists=shared_name is not None, **options
        )
        self._attach(actor.remote(design, about), name, about, timeout)
        self._greet()

    def _attach(self, actor: Leaf, name: str, about: str, timeout: float) -> None:
        self._actor, self.name, self._about, self._timeout = actor, name, about, timeout
        self._is_known = False
        # Of this handle in this process alone: its gradients are told apart from all others.
        self._client, self._numbers = uuid.uuid4().hex, itertools.count()

    def __reduce__(self) -> tuple[Callable[..., TreeAccumulator], tuple[Leaf, ...]]:
        """Travels as the actor it talks to."""
        return _rebuild, (self._actor, self.name, self._about, self._timeout)

    def apply_grad(
        self,
        grads: PyTree,
        local_step: ArrayLike = 0,
        *,
        worker: str | None = None,
        key: str | None = None,
    ) -> Applied:
        """Adds a gradient on all leaves, or on none.

        Args:
          grads: a tree like ``like``.
          local_step: the step at which the gradient was computed.
          worker: a name under which `statistics` counts it.
          key: a name for this one gradient. A later one of the same key is answered as this one
            was, and not added: for whoever repeats what ended in `UnavailableError`, and for Ray
            tasks that are retried.

        Raises:
          InvalidArgumentError, CancelledError: as there.
          UnavailableError: there was no answer in time; it may have been added.
        """
        parcel = self._pack(grads, local_step, worker, key)
        verdict, step = self._wait(self._actor.apply_grad_plainly.remote(*parcel))
        return Applied(Verdict(verdict), step)

    def apply_grad_ref(
        self,
        grads: PyTree,
        local_step: ArrayLike = 0,
        *,
        worker: str | None = None,
        key: str | None = None,
    ) -> Leaf:
        """Begins `apply_grad`, and returns a Ray ``ObjectRef`` of its answer."""
        return self._actor.apply_grad.remote(*self._pack(grads, local_step, worker, key))

    async def apply_grad_async(
        self,
        grads: PyTree,
        local_step: ArrayLike = 0,
        *,
        worker: str | None = None,
        key: str | None = None,
    ) -> Applied:
        """Does as `apply_grad`, and lets the event loop run meanwhile."""
        return await asyncio.to_thread(self.apply_grad, grads, local_step, worker=worker, key=key)

    def take_grad(
        self, num_required: int, *, timeout: float | None = None, trim: bool = False
    ) -> PyTree:
        """Waits for gradients and takes what a step uses; see `jaxaccum.TreeAccumulator.take_grad`.

        Raises:
          UnavailableError: the actor is not reached.
        """
        ask = self._asker(num_required, timeout, trim=trim)
        while (answer := self._wait(ask(), ASK_SECONDS)) is None:
            pass
        return answer[0]

    async def take_grad_async(
        self, num_required: int, *, timeout: float | None = None, trim: bool = False
    ) -> PyTree:
        """Does as `take_grad` in asyncio code; if cancelled, it leaves the queue in a while."""
        ask = await asyncio.to_thread(self._asker, num_required, timeout, trim=trim)
        while (answer := await asyncio.to_thread(self._wait, ask(), ASK_SECONDS)) is None:
            pass
        return answer[0]

    def take_grad_ref(
        self, num_required: int, *, timeout: float | None = None, trim: bool = False
    ) -> Leaf:
        """Begins `take_grad`, and returns a Ray ``ObjectRef`` of the tree, to be passed to tasks.

        It stays in the queue, whoever holds the reference, until it is served or ``timeout`` is
        over. Of more than 64 such, the others join the queue, and their time begins, as those
        before them leave it.
        """
        self._greet()
        take = self._actor.take_grad.options(concurrency_group="references").remote
        return take(as_required(num_required), as_timeout(timeout), trim)

    @property
    def global_step(self) -> int:
        """How many takes there were, or what `set_global_step` said, and takes since."""
        return self._call("global_step")

    def num_accumulated(self) -> int:
        """Returns how many gradients were accepted since the last take."""
        return self._call("num_accumulated")

    def set_global_step(self, new_global_step: int) -> None:
        """Sets the step; what is accumulated stays and counts."""
        self._call("set_global_step", as_step(new_global_step, "new_global_step"))

    def statistics(self) -> dict[str, Leaf]:
        """Returns counts of what happened; see `jaxaccum.TreeAccumulator.statistics`."""
        return self._call("statistics")

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns what is accumulated and the step, as NumPy arrays to be saved."""
        return self._call("state_dict")

    def load_state_dict(self, state: Mapping[str, Leaf]) -> None:
        """Replaces what is accumulated, and the step, by what `state_dict` returned."""
        self._call("load_state_dict", dict(state))

    def close(self) -> None:
        """Cancels all who wait, and frees the memory; whatever is called afterwards raises."""
        self._call("close")

    def _pack(
        self, grads: PyTree, local_step: ArrayLike, worker: str | None, key: str | None
    ) -> list[Leaf]:
        """What the actor is sent of a gradient."""
        self._greet()
        key = f"{self._client}-{next(self._numbers)}" if key is None else key
        push: Push = (key, to_host(grads), as_step(local_step, "local_step"), worker)
        return pack(push)

    def _asker(self, num_required: int, timeout: float | None, *, trim: bool) -> Callable[[], Leaf]:
        """What asks, again and again, under one ticket."""
        self._greet()
        ticket, required, seconds = uuid.uuid4().hex, as_required(num_required), as_timeout(timeout)
        ask = self._actor.ask_take.options(concurrency_group="takes").remote
        return functools.partial(ask, ticket, required, seconds, trim, ASK_SECONDS)

    def _call(self, method: str, *args: Leaf) -> Leaf:
        self._greet()
        return self._wait(self._actor.call.remote(method, *args))

    def _greet(self) -> None:
        if not self._is_known:
            self._wait(self._actor.hello.remote(version(), self._about))
            self._is_known = True

    def _wait(self, call: Leaf, more: float = 0.0) -> Leaf:
        return wait_for(call, Deadline(self._timeout + more), f"accumulator {self.name!r}")


def to_host(tree: PyTree) -> PyTree:
    """Returns a tree of NumPy arrays: what Ray moves without copies of its own."""
    return jax.tree.map(np.asarray, tree)


async def _take(
    acc: OwningAccumulator, num_required: int, timeout: float | None, trim: bool
) -> PyTree:
    taken = await acc.take_grad_async(num_required, timeout=timeout, trim=trim)
    return await asyncio.to_thread(_ready_to_travel, taken)


def _ready_to_travel(taken: PyTree) -> PyTree:
    """Returns it as NumPy arrays, without most of the padding: that would be moved as well."""

    def cut(leaf: Leaf) -> Leaf:
        leaf = to_host(leaf)
        if not is_slices(leaf):
            return leaf
        num_rows = int(np.searchsorted(leaf.indices, leaf.padding_index))
        size = round_up(num_rows, len(leaf.indices))
        return type(leaf)(leaf.indices[:size], leaf.values[:size], leaf.dense_shape)

    return jax.tree.map(cut, taken, is_leaf=is_slices)


def _skeleton(like: PyTree) -> PyTree:
    """The tree with nothing in it but shapes."""

    def hollow(leaf: Leaf) -> Leaf:
        if is_slices(leaf):
            empty = np.zeros((0, *leaf.values.shape[1:]), leaf.values.dtype)
            return type(leaf)(np.zeros(0, np.int32), empty, leaf.dense_shape)
        return struct_of(leaf)

    return jax.tree.map(hollow, like, is_leaf=is_slices)


def _describe(spec: TreeSpec) -> str:
    """Says what an accumulator is: two of one name must say the same, in any process."""
    return f"{dataclasses.replace(spec, policy=TENSORFLOWS)}, {spec.policy}"


def _rebuild(actor: Leaf, name: str, about: str, timeout: float) -> TreeAccumulator:
    acc = TreeAccumulator.__new__(TreeAccumulator)
    acc._attach(actor, name, about, timeout)
    return acc
