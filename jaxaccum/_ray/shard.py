"""One shard of a parameter server: rows of tables, their optimizer state, gradients that wait.

A gradient comes in parts, one a shard. A part is staged: kept under the gradient's key, and counted
by nobody. When the coordinator has taken a step it names the gradients of that step, the same to
every shard, and these are added and given to the optimizer. So a gradient is in a step on all
shards or on none, whoever dies meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from jaxaccum._accumulator.state import Reduction
from jaxaccum._optimizers.apply_updates import apply_updates
from jaxaccum._optimizers.lazy_rows import lazy_rows
from jaxaccum._ray.checkpoints import load_arrays, save_arrays
from jaxaccum._ray.errors import RolledBackError
from jaxaccum._ray.layout import Layout, Part, TableInit
from jaxaccum._ray.parcels import unpack
from jaxaccum._ray.part_sum import join_parts, sum_rows
from jaxaccum._rows.row_arithmetic import gather_rows
from jaxaccum._rows.tree import Leaf, PyTree


class Entry(NamedTuple):
    """A gradient of a step.

    Attributes:
      key: of the push.
      weight: what its values count.
    """

    key: str
    weight: float


class ParameterServerShard:
    """The actor. One event loop runs all of it, so that nobody sees a step half done.

    Args:
      number: which shard this is.
      layout: what lives where.
      skeleton: the tree of parameters, positions for leaves.
      tx: the optax transform.
      reduction: what is made of the sums.
      keep_steps: after how many steps a part that nobody counts is thrown away.
    """

    def __init__(
        self,
        number: int,
        layout: Layout,
        skeleton: PyTree,
        tx: PyTree,
        reduction: Reduction,
        keep_steps: int,
    ) -> None:
        self._layout, self._number, self._tx = layout, number, lazy_rows(tx)
        self._treedef: PyTreeDef = jax.tree.structure(skeleton)
        self._keep_steps = keep_steps
        self._reduction = reduction
        self._epoch: str | None = None  # no call fits until something is loaded
        self._step = self._num_done = 0
        self._staged: dict[str, tuple[int, Part]] = {}
        self._room: dict[int, np.ndarray] = {}
        self._changed = asyncio.Event()
        self._optimize = jax.jit(self._run_optimizer, donate_argnums=(0, 1))

    async def load(self, epoch: str, step: int, source: Part | str) -> None:
        """Starts from parameters, or goes back to a checkpoint; ``step`` is the one to go on at."""
        is_table = [False] * len(self._layout.leaves)
        leaves: list[Leaf] = [jnp.zeros(0, leaf.dtype) for leaf in self._layout.leaves]
        saved = load_arrays(pathlib.Path(source)) if isinstance(source, str) else None
        for i in self._layout.owned(self._number):
            start, stop = self._layout.leaves[i].start_stop(self._number)
            part = saved[f"params {i}"] if saved is not None else source[i]
            if isinstance(part, TableInit):
                part = part.init(start, stop)
            is_table[i] = self._layout.leaves[i].is_table
            # A copy, for it is donated, and JAX would read the caller's memory in place.
            leaves[i] = jnp.array(part, self._layout.leaves[i].dtype, copy=True)
        self._params = jax.tree.unflatten(self._treedef, leaves)
        self._state = self._tx.init(self._params)
        # A transform that couples rows is refused now, not when the first step is taken.
        self._tx.update.check(self._params, jax.tree.unflatten(self._treedef, is_table))
        self._staged = {}
        if saved is not None:
            self._load_rest(saved)
        self._epoch, self._step = epoch, step
        self._done(0)

    def _load_rest(self, saved: dict[str, np.ndarray]) -> None:
        states, treedef = jax.tree.flatten(self._state)
        states = [jnp.array(saved[f"state {i}"], copy=True) for i in range(len(states))]
        self._state = jax.tree.unflatten(treedef, states)
        for name, array in saved.items():
            kind, _, rest = name.partition(" ")
            if kind == "ids" or kind == "dense":
                i, key = rest.split(" ", 1)
                values = saved.get(f"values {rest}")
                part = array if kind == "dense" else (array, values)
                self._staged.setdefault(key, (0, {}))[1][int(i)] = part
            elif kind == "staged":
                self._staged[rest] = (int(array), self._staged.get(rest, (0, {}))[1])

    async def pull(self, epoch: str, ids: Part, at_least: int) -> tuple[Part, int]:
        """Returns the rows of ``ids`` (dense leaves whole) once step ``at_least`` is reached."""
        await self._until(epoch, lambda: self._step >= at_least)
        leaves = self._treedef.flatten_up_to(self._params)
        rows = {
            i: np.array(leaves[i]) if of is None else _gather(leaves[i], of)
            for i, of in ids.items()
        }
        return rows, self._step

    async def stage(self, *parcel: Leaf) -> int:
        """Keeps a part until its gradient is counted; returns the step it came at."""
        push: tuple[str, str, Part] = unpack(parcel)
        epoch, key, part = push
        self._check(epoch)
        return self.keep(key, part, self._step)

    def keep(self, key: str, part: Part, step: int) -> int:
        """Keeps a part that came at ``step``; returns that, or that at which it first came."""
        return self._staged.setdefault(key, (step, part))[0]

    async def update(
        self,
        epoch: str,
        number: int,
        step: int,
        entries: Sequence[Entry],
        waiting: Sequence[str],
        refused: Sequence[str],
    ) -> None:
        """Adds the gradients of a step, runs the optimizer on the rows they touch: ``step`` begins.

        Those of ``waiting`` are counted too, but for a later step; those of ``refused`` never.
        """
        await self._until(epoch, lambda: self._num_done == number)
        parts = [self._staged.pop(entry.key)[1] for entry in entries]
        weights, owned = [entry.weight for entry in entries], self._layout.owned(self._number)
        joined = join_parts(
            parts, weights, self._layout.leaves, owned, self._number, self._reduction, self._room
        )
        self._params, self._state = self._optimize(self._params, self._state, joined)
        for leaf in jax.tree.leaves((self._params, self._state)):
            leaf.block_until_ready()  # what was joined is not read any more, either
        first, kept = step - self._keep_steps, set(waiting)
        self._staged = {
            key: staged
            for key, staged in self._staged.items()
            if key in kept or (staged[0] > first and key not in refused)
        }
        self._step = step
        self._done(number + 1)

    async def save(self, epoch: str, number: int, path: str, waiting: Sequence[str]) -> None:
        """Writes what there is at this step, while the next ones go on."""
        await self._until(epoch, lambda: self._num_done == number)
        params = self._treedef.flatten_up_to(self._params)
        arrays = {f"params {i}": params[i] for i in self._layout.owned(self._number)}
        arrays |= {f"state {i}": leaf for i, leaf in enumerate(jax.tree.leaves(self._state))}
        # Copies, for the next step writes in place.
        copies = {name: np.array(array) for name, array in arrays.items()}
        for key in waiting:
            step, part = self._staged[key]
            copies[f"staged {key}"] = np.array(step)
            for i, leaf in part.items():
                if isinstance(leaf, tuple):
                    copies[f"ids {i} {key}"], copies[f"values {i} {key}"] = leaf
                else:
                    copies[f"dense {i} {key}"] = leaf
        self._done(number + 1)
        await asyncio.to_thread(save_arrays, pathlib.Path(path), copies)

    async def ping(self, epoch: str) -> tuple[int, int]:
        """Returns the process and how many parts wait in it, if it is of this epoch."""
        self._check(epoch)
        return os.getpid(), len(self._staged)

    def stop(self) -> None:
        """Refuses whoever waits, and whoever comes: the coordinator tells them why."""
        self._epoch = None
        self._done(self._num_done)

    def _check(self, epoch: str) -> None:
        if epoch != self._epoch:
            raise RolledBackError(f"shard {self._number} is at {self._epoch}, not {epoch}")

    async def _until(self, epoch: str, is_ready: Callable[[], bool]) -> None:
        """Waits: Ray runs the calls of such an actor in any order, so each waits for its turn."""
        self._check(epoch)
        while not is_ready():
            await self._changed.wait()
            self._check(epoch)

    def _done(self, number: int) -> None:
        """So many of the coordinator's commands are done; wakes all who wait for something."""
        self._num_done = number
        self._changed.set()
        self._changed = asyncio.Event()

    def _run_optimizer(self, params: PyTree, state: PyTree, joined: Part) -> tuple[PyTree, PyTree]:
        # What lies on other shards is an array of nothing here, and so is its gradient.
        grads = self._treedef.flatten_up_to(params)
        for i, sums in joined.items():
            is_table = self._layout.leaves[i].is_table
            grads[i] = sum_rows(sums, grads[i].shape[0]) if is_table else sums
        grads = jax.tree.unflatten(self._treedef, grads)
        updates, state = self._tx.update(grads, state, params)
        return apply_updates(params, updates), state


_gather_padded = jax.jit(gather_rows)


def _gather(table: jax.Array, ids: np.ndarray) -> np.ndarray:
    """Rows of a table; ids padded to a power of two, so that few programs are compiled."""
    size = 1 << max(len(ids) - 1, 31).bit_length()
    return np.asarray(_gather_padded(table, np.pad(ids, (0, size - len(ids)))))[: len(ids)]
