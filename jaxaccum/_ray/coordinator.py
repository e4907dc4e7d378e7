"""The head of a parameter server: it decides, and the shards compute. It has the first of them.

A push of a worker, its parts on the other shards first, then one commit with the last part::

    worker ── stage ──> shard 1 ─┐ staged at step s1
           ── stage ──> shard 2 ─┤ staged at step s2
           ── commit ────────────┴──> coordinator and shard 0: verdict, step
                                          │ enough of them
    shards <── update(step, keys) ────────┘ the same keys to every shard

Ray runs the commit when the stages have returned, and not if one has failed. The commit is the one
moment at which a gradient comes to count, so nobody's death can split it. Shards run what the
coordinator asks in its order: each update, and each checkpoint, is of one step on all of them.

A call of an actor costs as much as summing a gradient of a megabyte and more: so the first shard
is in this process, and a server of one shard is handed a gradient in a single call.

When a shard or the coordinator dies, all go back to the last checkpoint under a new epoch: calls
of an earlier one are refused, and workers repeat them. Steps are numbered on, so that nobody waits
for a step again that has already been, and gradients of lost steps are as stale as they look.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence

from jaxaccum._accumulator.state import Verdict
from jaxaccum._ray.calls import NAMESPACE, cause_of, check_version, first_line, import_ray
from jaxaccum._ray.checkpoints import Folder
from jaxaccum._ray.errors import FailedError, RolledBackError
from jaxaccum._ray.layout import Part
from jaxaccum._ray.parcels import unpack
from jaxaccum._ray.plan import Plan, View
from jaxaccum._ray.shard import Entry, ParameterServerShard
from jaxaccum._ray.tickets import Tickets
from jaxaccum._rows.tree import Leaf

logger = logging.getLogger("jaxaccum")
_RETRY_SECONDS = 0.1


class ParameterServerCoordinator:
    """The actor. One event loop runs all of it: between two awaits nothing else happens."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tickets = Tickets(plan.num_required, plan.policy, plan.keep_steps)
        self._folder = None if plan.folder is None else Folder(plan.folder)
        self._epoch: str | None = None
        self._first = ParameterServerShard(0, *plan.shards)
        self._others: list[Leaf] = []
        self._is_open, self._opening, self._saving = asyncio.Event(), asyncio.Lock(), asyncio.Lock()
        self._failure = ""
        self._lost: dict[str, None] = {}
        self._num_restarts = self._num_commands = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, parts: Sequence[Leaf], *, resume: bool) -> None:
        """Makes the shards from their first parameters, or from the folder's checkpoint.

        Whoever comes second finds them made. ``parts`` are references, so that rows go from the
        worker that has them to the shard that gets them.
        """
        async with self._opening:
            if self._epoch is not None:
                return
            latest = None if self._folder is None else self._folder.latest()
            if latest is not None:
                if not resume:
                    raise ValueError(
                        f"checkpoint_dir {self._plan.folder} holds step {latest['step']} already: "
                        "pass resume=True to go on from there, or another folder"
                    )
                await self._restore()
                return
            self._make_shards()
            epoch = uuid.uuid4().hex
            # In a list they stay references; as arguments of others Ray resolves them.
            first, *others = parts
            await self._ask_each("load", [(epoch, 0, part) for part in (await first, *others)])
            self._epoch = epoch
            if self._folder is not None:
                await self._save()
            self._is_open.set()

    async def view(self, version: str, suspect: str | None = None) -> View:
        """Returns whom to talk to; whoever had trouble in epoch ``suspect`` has it looked at."""
        check_version(version)
        await self._open()
        if suspect is not None and suspect == self._epoch:
            troubles = [a for a in await self._ping() if isinstance(a, BaseException)]
            if troubles:
                await self._roll_back(suspect, troubles[0])
                await self._open()
        assert self._epoch is not None
        return View(self._epoch, self._others, self._plan)

    async def commit(self, *arguments: Leaf) -> tuple[int, int]:
        """Decides on a gradient of which all parts are there; begins a step if it was the last.

        Args:
          arguments: the steps at which the other shards staged it; then, as `pack` has made them,
            its epoch, its key, its step, its worker and the first shard's part.

        Returns:
          The verdict and the step, as numbers, which Ray need not pickle.
        """
        num_others = self._plan.layout.num_shards - 1
        staged_at, parcel = arguments[:num_others], arguments[num_others:]
        epoch, key, local_step, worker, part = unpack(parcel)
        await self._open()
        if epoch != self._epoch:
            raise RolledBackError(f"the server is at {self._epoch}, not {epoch}")
        if (before := self._tickets.answers.find(key)) is not None:
            return int(before), self._tickets.step
        now = self._tickets.step
        verdict = self._tickets.commit(key, local_step, worker, min(staged_at, default=now))
        if verdict == Verdict.ACCEPTED:
            self._first.keep(key, part, now)
            self._lost.pop(key, None)  # lost with the last server, and here again
            self._note("accepted", key)
            while taken := self._tickets.take():
                self._begin_step([Entry(t.key, t.weight) for t in taken])
        return int(verdict), self._tickets.step

    async def pull(self, epoch: str, ids: Part, at_least: int) -> tuple[Part, int]:
        """Does what the first shard does."""
        await self._open()
        return await self._first.pull(epoch, ids, at_least)

    async def statistics(self) -> dict[str, object]:
        """Returns what became of the gradients, and how the server is."""
        await self._open()
        tickets = self._tickets
        pings = await self._ping()
        shards = [None if isinstance(p, BaseException) else p for p in pings]
        return {
            "global_step": tickets.step,
            "num_steps": tickets.num_steps,
            "num_accumulated": tickets.num_accumulated,
            **dataclasses.asdict(tickets.all),
            "workers": {name: dataclasses.asdict(f) for name, f in tickets.by_worker.items()},
            "lost": len(self._lost),
            "restarts": self._num_restarts,
            "pid": os.getpid(),
            "shards": [None if p is None else {"pid": p[0], "staged": p[1]} for p in shards],
        }

    async def lost(self) -> list[str]:
        """Returns the keys of gradients that were accepted, and lost with a server that died."""
        await self._open()
        return list(self._lost)

    async def checkpoint(self) -> int:
        """Saves all shards at the present step, and returns that; training goes on."""
        await self._open()
        return await self._save()

    async def _open(self) -> None:
        """Waits until there is a server; one that was restarted goes back to its checkpoint."""
        if self._epoch is None and not self._failure and self._folder is not None:
            async with self._opening:
                latest = self._folder.latest()
                if self._epoch is None and latest is not None and latest["run"] == self._plan.run:
                    await self._restore()
        if not self._failure:
            await self._is_open.wait()
        if self._failure:
            raise FailedError(self._failure)

    async def _ping(self) -> list[Leaf]:
        """What every shard answers, or what was raised."""
        return await self._ask_all("ping", self._epoch, return_exceptions=True)

    def _ask_all(self, method: str, *arguments: Leaf, return_exceptions: bool = False) -> Leaf:
        """Calls a method of all shards; to be awaited."""
        each = [arguments] * self._plan.layout.num_shards
        return self._ask_each(method, each, return_exceptions=return_exceptions)

    def _ask_each(
        self, method: str, each: Sequence[tuple[Leaf, ...]], *, return_exceptions: bool = False
    ) -> Leaf:
        """Calls a method of all shards, each with arguments of its own; to be awaited."""
        calls = [getattr(self._first, method)(*each[0])]
        for shard, arguments in zip(self._others, each[1:], strict=True):
            calls.append(getattr(shard, method).remote(*arguments))
        return asyncio.gather(*calls, return_exceptions=return_exceptions)

    def _next_number(self) -> int:
        """The place of a command among all that shards are given: they run them in this order."""
        number, self._num_commands = self._num_commands, self._num_commands + 1
        return number

    def _make_shards(self) -> None:
        plan, actor = self._plan, import_ray().remote(ParameterServerShard)
        # Names are of this coordinator's life: those of the last one may take a while to die.
        life = uuid.uuid4().hex[:4]
        self._others = [
            actor.options(
                name=f"{plan.name} shard {k + 1} of {plan.layout.num_shards} ({life})",
                namespace=NAMESPACE,
                max_restarts=-1 if plan.folder else 0,
                **plan.actor_options,
            ).remote(k, *plan.shards)
            for k in range(1, plan.layout.num_shards)
        ]

    def _begin_step(self, entries: list[Entry]) -> None:
        """Has the shards take a step; what comes after it waits its turn at the shards."""
        tickets, epoch, start = self._tickets, self._epoch, time.monotonic()
        keys = [ticket.key for ticket in tickets.waiting]
        refused, tickets.refused = tickets.refused, []
        number = self._next_number()
        update = functools.partial(
            self._ask_all, "update", epoch, number, tickets.step, entries, keys, refused
        )
        self._note("step", tickets.step)
        self._spawn(self._take_step(epoch, tickets.step, len(entries), update, start))
        if self._folder is not None and tickets.num_steps % self._plan.checkpoint_every == 0:
            self._spawn(self._save_unless_saving())

    async def _take_step(
        self,
        epoch: str | None,
        step: int,
        num_gradients: int,
        update: Callable[[], Leaf],
        start: float,
    ) -> None:
        # The first shard's part keeps this thread busy: whoever pushed last is answered before it.
        await asyncio.sleep(0)
        try:
            await update()
        except RolledBackError:
            return
        except import_ray().exceptions.RayActorError as error:
            await self._roll_back(epoch, error)
        except Exception as error:  # the optimizer's own, which another try would not mend
            cause = cause_of(error)
            self._fail(f"step {step} failed: {type(cause).__name__}: {first_line(cause)}")
        else:
            logger.info(
                "%s: step %d of %d gradients in %.3f s; %d accepted, %d stale, %d lost so far",
                self._plan.name, step, num_gradients, time.monotonic() - start,
                self._tickets.all.accepted, self._tickets.all.stale, len(self._lost),
            )  # fmt: skip

    async def _save_unless_saving(self) -> None:
        if self._saving.locked():
            return
        epoch = self._epoch
        try:
            await self._save()
        except RolledBackError:
            return
        except import_ray().exceptions.RayActorError as error:
            await self._roll_back(epoch, error)
        except Exception as error:  # a full disk, perhaps: the last checkpoint stands
            logger.error("%s is not saved: %s", self._plan.name, first_line(cause_of(error)))

    async def _save(self) -> int:
        assert self._folder is not None, "without a folder nothing is saved"
        async with self._saving:
            # Until the calls are made nothing else runs: they see what is written here.
            step, folder = self._tickets.step, self._folder
            about = {
                "run": self._plan.run,
                "layout": str(self._plan.layout),
                "step": step,
                "lost": list(self._lost),
                "restarts": self._num_restarts,
                **self._tickets.save(),
            }
            keys, command = [t.key for t in self._tickets.waiting], self._next_number()
            number = folder.begin()
            await self._ask_each(
                "save",
                [
                    (self._epoch, command, str(folder.shard_path(number, k)), keys)
                    for k in range(self._plan.layout.num_shards)
                ],
            )
            await asyncio.to_thread(folder.finish, number, about)
            return step

    async def _roll_back(self, epoch: str | None, why: BaseException) -> None:
        """Goes back to the last checkpoint, once an epoch."""
        async with self._opening:
            if epoch != self._epoch or self._failure:
                return
            reason = first_line(cause_of(why))
            if self._folder is None:
                self._fail(f"{self._plan.name} has lost a shard, and has no checkpoints: {reason}")
                return
            self._epoch = None
            self._is_open.clear()
            logger.warning("%s goes back to its last checkpoint: %s", self._plan.name, reason)
            await self._restore()

    async def _restore(self) -> None:
        """Loads the last checkpoint on all shards, and finds out what is lost since."""
        assert self._folder is not None
        try:
            latest = self._folder.latest()
            if latest is None or latest["layout"] != str(self._plan.layout):
                raise ValueError(f"it is of {latest and latest['layout']}, not {self._plan.layout}")
            saved: int = latest["step"]
            accepted, last = self._folder.read_journal(latest["number"])
            last = max(last, saved)
            if not self._others:
                self._make_shards()
            while not await self._load(latest, accepted, last + 1):
                await asyncio.sleep(_RETRY_SECONDS)  # Ray is at work on it; workers' time-outs run
        except Exception as error:
            reason = first_line(cause_of(error))
            self._fail(f"{self._plan.name} cannot load what {self._folder.path} holds: {reason}")
            return
        logger.warning(
            "%s goes on at step %d from the checkpoint of step %d; %d gradients accepted since are "
            "lost", self._plan.name, last + 1, saved, len(accepted),
        )  # fmt: skip
        self._is_open.set()

    async def _load(self, latest: dict[str, Leaf], accepted: list[str], step: int) -> bool:
        """Tries to; false if a shard is not there, or not yet.

        ``step`` is past all that have been: a worker that has seen one must find it later.
        """
        assert self._folder is not None
        epoch, folder, number = uuid.uuid4().hex, self._folder, latest["number"]
        try:
            await self._ask_each(
                "load",
                [
                    (epoch, step, str(folder.shard_path(number, k)))
                    for k in range(self._plan.layout.num_shards)
                ],
            )
            self._tickets.load(latest, step)
            self._lost = dict.fromkeys([*latest["lost"], *accepted])
            self._num_restarts = latest["restarts"] + 1
            self._epoch, self._num_commands = epoch, 0
            await self._save()
        except import_ray().exceptions.RayActorError:
            return False
        return True

    def _fail(self, message: str) -> None:
        logger.error(message)
        self._failure = message
        self._is_open.set()
        self._first.stop()
        for shard in self._others:
            shard.stop.remote()

    def _note(self, what: str, value: str | int) -> None:
        try:
            if self._folder is not None:
                self._folder.note(what, value)
        except OSError as error:  # a full disk: what is lost will be told too low
            logger.error("%s: its journal is not written: %s", self._plan.name, error)

    def _spawn(self, work: Leaf) -> None:
        """Runs it beside what comes next, and holds it: the event loop does not."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
