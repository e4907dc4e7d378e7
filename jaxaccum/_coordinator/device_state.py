"""The sums of a tree on the device, and what the host knows of them without asking.

Signals: Python runs their handlers only between bytecodes that call something, so a dispatch whose
result C code stores in a list, followed by assignments that call nothing, cannot be torn by Ctrl-C:
the sums have been donated and replaced, and counted, or nothing has happened. That is why one
program adds to all leaves, and why programs return tuples: to return an `AccumulatorState` they
would run its constructor, in Python. The first call of a program is different, for jit runs Python
code around it: there is a moment in it when an exception would cost the sums, which
`DeviceState.is_lost` tells. A gradient that is staged instead is in the stage when ``num_staged``
says so, which changes with the other counters.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxaccum._accumulator.state import as_capacity
from jaxaccum._accumulator.tree_sums import Sums
from jaxaccum._coordinator.accumulated import Counts, Taken
from jaxaccum._coordinator.host_gradient import HostGradient
from jaxaccum._coordinator.host_memory import round_up
from jaxaccum._coordinator.placement import Placement, outside_jit
from jaxaccum._coordinator.programs import Kind, Leaves, Programs, grow, make_programs
from jaxaccum._coordinator.spec import Shape, TreeSpec
from jaxaccum._coordinator.staging import Stage, choose_depth
from jaxaccum._coordinator.sums import SMALLEST_CAPACITY, limit, load_sums, make_empty, save_sums
from jaxaccum._rows.indexed_slices import IndexedSlices

logger = logging.getLogger("jaxaccum")

# So many takes in a row must have needed a fourth of the capacity at most before it shrinks.
_WINDOW, _SLACK = 8, 4
_ENDLESS = 1 << 62
_Struct: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct  # jax leaves it untyped
_Key = tuple[object, ...]


@dataclasses.dataclass(slots=True, eq=False)
class TakenSums(Taken):
    """Indices, values and number of real rows of each table, and means of the dense leaves.

    Attributes:
      largest: slices of the largest gradient of each table.
    """

    largest: tuple[int, ...] = ()


class DeviceState:
    """The `Sums` of a tree, made when the shapes of its rows are known; see `Accumulated`.

    Args:
      spec: what is accumulated.
      capacities: of how many rows each table is at first and at least; by default a guess from the
        gradients.
      placement: where.
      read: a gradient, given the spec and where it is wanted; see `Accumulated`.
    """

    def __init__(
        self,
        spec: TreeSpec,
        capacities: Sequence[int | None],
        placement: Placement,
        read: Callable[..., HostGradient],
    ) -> None:
        self.counts = Counts()
        self.read: Callable[..., Any] = functools.partial(read, spec, placement.gradients)
        self._spec = spec
        self._max_staleness = spec.policy.max_staleness
        self._least = tuple(None if c is None else as_capacity(c) for c in capacities)
        self._placement = placement
        # The leaves of the sums, or none yet, and what they are the leaves of.
        self._box: list[Leaves] = []
        self._programs: Programs
        self._kind: Kind
        self._row_shapes: list[Shape] = []
        self._capacities = [0] * len(spec.tables)
        # Gradients counted but not dispatched yet; all else that dispatches sends them first.
        self._stage: Stage | None = None
        self._num_held = 0  # gradients added since the last take
        # How many slices surely fit at most, and now: less by those of each gradient. Where a table
        # can hold all its rows, that is beyond all numbers.
        self._space = [0] * len(spec.tables)
        self._room = [0] * len(spec.tables)
        self._next_room = self._room  # with the gradient that has just been prepared
        self._cycle: set[tuple[int, ...]] = set()  # padded sizes of the gradients since then
        self._num_grown = 0
        # What the last takes needed of each table: its rows and one more gradient.
        self._needed: collections.deque[list[int]] = collections.deque(maxlen=_WINDOW)
        # What has been compiled for sums like the present ones: a kind of program, and sizes.
        self._compiled: set[_Key] = set()
        self._last_key: _Key | None = None  # of the gradients that were last found to fit
        self._sizes: set[tuple[int, ...]] = set()
        self._compiler = threading.RLock()

    def prepare(
        self, gradient: HostGradient | None, will_take: bool
    ) -> Callable[[], object] | None:
        """Sees to the capacities for a gradient; see `Accumulated.prepare`."""
        room = self._room
        if gradient is not None:
            room = [*map(operator.sub, room, gradient.num_slices)]
            key: _Key = (gradient.is_small, gradient.sizes, gradient.row_shapes)
            if key != self._last_key or not self._num_held or (room and min(room) < 0):
                compile_ahead = self._fit(gradient) or self._plan_apply(gradient)
                if compile_ahead is not None:
                    return compile_ahead
                self._last_key = key
                room = [*map(operator.sub, self._room, gradient.num_slices)]
            self._next_room = room
        if will_take:
            sizes = self._take_sizes(room)
            return self._plan(("take", sizes), self._programs.take, self._box[0], sizes)
        return None

    def add(self, gradient: HostGradient, staleness: int) -> None:
        """Adds a gradient, or stages it."""
        counts, stage, room = self.counts, None, self._next_room
        if gradient.is_small:
            stage = self._stage
            if stage is None or stage.sizes != gradient.sizes or stage.num_staged == stage.depth:
                stage = self._begin_stage(gradient)
            stage.write(gradient, staleness)
        else:
            self._flush()
            self._cycle.add(gradient.sizes)
            box, arguments = self._box, zip(self._arguments(gradient, staleness))
            box[:] = map(self._programs.apply, box, *arguments)
            # No calls from here on: see the module's docstring.
        if stage is not None:
            stage.num_staged += 1
        if staleness > self._max_staleness:
            counts.carried += 1
        else:
            counts.num_accumulated += 1
        counts.accepted += 1
        self._num_held += 1
        self._room = room

    def take(self, outcome: list[Any], num_required: int) -> None:
        """Takes everything there is."""
        self._flush()
        counts, box, out = self.counts, self._box, list[Any]()
        largest = tuple(map(max, zip(*self._cycle, strict=True)))
        taken = TakenSums(counts.num_accumulated, None, largest or (0,) * len(self._room))
        sizes, cycle = self._take_sizes(self._room), set[tuple[int, ...]]()
        out[:] = map(self._programs.take, box, (sizes,))
        # No calls from here on: see the module's docstring.
        box[0], taken.arrays = out[0]
        outcome[0] = taken
        counts.num_accumulated = self._num_held = 0
        counts.taken += 1
        counts.global_step += 1
        self._room, self._cycle = self._space, cycle

    def discard(self) -> None:
        """Drops what was added since the last take."""
        if self._num_held:
            self.take([None], 1)

    @outside_jit
    def deliver(self, taken: Taken, *, trim: bool) -> tuple[list[IndexedSlices], list[jax.Array]]:
        """Returns what was taken of tables and dense leaves.

        Trimmed to the real rows, it waits for the device.
        """
        assert isinstance(taken, TakenSums)
        tables, dense = taken.arrays
        results, needed = [], []
        for spec, (indices, values, num_rows), largest in zip(
            self._spec.tables, tables, taken.largest, strict=True
        ):
            count = int(num_rows) if trim else indices.shape[0]
            needed.append(count + largest)
            if count < indices.shape[0]:
                indices, values = self._placement.trim(indices, values, count)
            results.append(IndexedSlices(indices, values, (spec.num_rows, *values.shape[1:])))
        self._needed.append(needed)
        return results, list(dense)

    def statistics(self) -> dict[str, Any]:
        """Returns the rows held, when the device has got there, and what they take."""
        states = self._sums().tables if self._box else ()
        rows = [int(state.num_rows) for state in states] or [0] * len(self._room)
        capacities = [
            c or least or 0 for c, least in zip(self._capacities, self._least, strict=True)
        ]
        sizes = [sorted(set(each)) for each in zip(*self._sizes, strict=True)]

        def by_name(numbers: list[Any]) -> dict[str, Any]:
            return dict(zip(self._spec.titles, numbers, strict=False))

        return {
            "grown": self._num_grown,
            "rows": by_name(rows),
            "capacity": by_name(capacities),
            "compiled_sizes": by_name(sizes or [[] for _ in rows]),
        }

    def save(self) -> dict[str, np.ndarray]:
        """Returns what is accumulated, as arrays of their own."""
        counts, num_held = self.counts, self._num_held
        saved = save_sums(self._spec, self._sums() if num_held else None)
        if self._spec.policy.carry_over:
            saved["num_carried"] = np.asarray(num_held - counts.num_accumulated)
        return saved | {
            name: np.asarray(getattr(counts, name)) for name in ("num_accumulated", "global_step")
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Replaces what is accumulated by what `save` returned."""
        counts, spec = self.counts, self._spec
        num_accumulated, step = int(saved["num_accumulated"]), int(saved["global_step"])
        num_held = num_accumulated + (int(saved["num_carried"]) if spec.policy.carry_over else 0)
        sums, rows = load_sums(spec, saved, num_held, self._capacities, self._placement)
        self._hold(sums, rows)
        # No calls from here on: see the module's docstring.
        counts.num_accumulated, counts.global_step = num_accumulated, step
        self._num_held = num_held

    def clear(self) -> None:
        """Frees the device's memory."""
        self._hold(None, [0] * len(self._room))

    def is_lost(self) -> bool:
        """Whether a dispatch failed after it had been given the buffers of the sums."""
        return bool(self._box) and self._box[0][0].is_deleted()

    def _sums(self) -> Sums:
        self._flush()
        sums: Sums = jax.tree.unflatten(self._kind.treedef, self._box[0])
        return sums

    def _hold(self, sums: Sums | None, rows: list[int]) -> None:
        """Replaces the present sums, and what is staged, by ``sums`` of so many rows, or none."""
        spec = self._spec
        leaves, treedef = jax.tree.flatten(sums)
        row_shapes: list[Shape] = []
        box, capacities = [], [0] * len(rows)
        if sums is not None:
            box = [tuple(leaves)]
            capacities = [state.capacity for state in sums.tables]
            row_shapes = [state.values.shape[1:] for state in sums.tables]
            row_shapes += [leaf.shape for leaf in sums.dense]
        dtypes = tuple(leaf.dtype for leaf in spec.dense)
        kind = Kind(treedef, spec.leaves[0].reduction, dtypes, spec.policy.staleness_weight)
        programs, compiled = make_programs(kind), set[_Key]()
        space = [
            _ENDLESS if capacity == table.num_rows else capacity
            for capacity, table in zip(capacities, spec.tables, strict=True)
        ]
        room = [*map(operator.sub, space, rows)]
        # No calls from here on: see the module's docstring.
        self._box[:], self._kind, self._programs, self._row_shapes = box, kind, programs, row_shapes
        self._capacities, self._space, self._room, self._stage = capacities, space, room, None
        self._compiled, self._last_key = compiled, None

    def _take_sizes(self, room: list[int]) -> tuple[int, ...]:
        """How many rows of each table may be held at most, rounded up."""
        return tuple(map(round_up, map(operator.sub, self._space, room), self._capacities))

    def _plan(self, key: _Key, program: Any, held: Any, *args: Any) -> Callable[[], object] | None:
        """Returns what compiles ``program`` for what is held, or ``None`` if that is done."""
        compiled = self._compiled
        if key in compiled:
            return None
        held = jax.tree.map(
            lambda leaf: _Struct(leaf.shape, leaf.dtype, sharding=leaf.sharding), held
        )

        @outside_jit
        def compile_ahead() -> None:
            with self._compiler:  # one compiles, others who want the same wait
                if key not in compiled:
                    # What jit has compiled ahead it finds when it is called.
                    program.lower(held, *args).compile()
                    compiled.add(key)

        return compile_ahead

    def _plan_apply(self, gradient: HostGradient) -> Callable[[], object] | None:
        """Returns what compiles the program that adds such gradients, if that is not done."""
        self._sizes.add(gradient.sizes)
        key: _Key = (gradient.is_small, gradient.sizes)
        leaves, programs = self._box[0], self._programs
        if key in self._compiled:
            return None
        if not gradient.is_small:
            return self._plan(key, programs.apply, leaves, *self._arguments(gradient, 0))
        stage = Stage(gradient, self._spec)
        return self._plan(key, programs.apply_staged, leaves, stage.arrays, np.int32(0))

    def _arguments(self, gradient: HostGradient, staleness: int) -> Any:
        """What `Programs.apply` is given beside the sums."""
        age = np.int32(min(staleness, 2**31 - 1))
        is_weighted = self._spec.policy.staleness_weight is not None
        return gradient.indices, gradient.values, gradient.dense, age if is_weighted else None

    def _begin_stage(self, gradient: HostGradient) -> Stage:
        """Sends what is staged, and makes a stage for such gradients."""
        stage = Stage(gradient, self._spec)
        self._flush()
        self._cycle.add(gradient.sizes)
        self._stage = stage
        return stage

    def _flush(self) -> None:
        """Dispatches what is staged; where that fails, it stays staged."""
        stage = self._stage
        if stage is None or not stage.num_staged:
            return
        box, count = self._box, np.int32(stage.num_staged)
        box[:] = map(self._programs.apply_staged, box, (stage.arrays,), (count,))
        # No calls from here on: see the module's docstring.
        self._stage = None

    def _fit(self, gradient: HostGradient) -> Callable[[], object] | None:
        """Makes sums, larger or smaller ones, or returns what has to be compiled for that."""
        least = [
            given or _guess_capacity(gradient, size)
            for given, size in zip(self._least, gradient.sizes, strict=True)
        ]
        if self._row_shapes != gradient.row_shapes:
            for i, (spec, shape) in enumerate(
                zip(self._spec.leaves, gradient.row_shapes, strict=True)
            ):
                spec.check_row(shape, self._row_shapes[i] if self._num_held else None)
            pairs = zip(self._capacities, least, strict=True)
            self._renew(gradient, [old or new for old, new in pairs])
        for i, num_slices in enumerate(gradient.num_slices):
            if self._room[i] < num_slices:
                compile_ahead = self._grow(i, num_slices)
                if compile_ahead is not None:
                    return compile_ahead
        if len(self._needed) == _WINDOW and not self._num_held:
            # A take costs what the capacity is: give back what the last ones did not need.
            needed = map(max, *self._needed, gradient.sizes)
            wanted = [max(a, round_up(2 * b)) for a, b in zip(least, needed, strict=True)]
            wanted = [*map(limit, self._spec.tables, wanted)]
            if any(_SLACK * w <= c for w, c in zip(wanted, self._capacities, strict=True)):
                self._needed.clear()
                self._renew(gradient, [*map(min, wanted, self._capacities)])
                logger.info("accumulator shrunk to %s rows", self._capacities)
        return None

    def _renew(self, gradient: HostGradient, capacities: list[int]) -> None:
        """Begins anew with empty sums for such gradients."""
        sums = make_empty(self._spec, gradient.row_shapes, capacities, self._placement)
        self._hold(sums, [0] * len(capacities))

    def _grow(self, i: int, num_slices: int) -> Callable[[], object] | None:
        """Makes the ``i``-th table grow, unless ``num_slices`` more turn out to fit.

        To find out, it waits for the device; so it grows too if more than half is full, lest the
        next gradient wait again.
        """
        capacity, sums = self._capacities[i], self._sums()
        state, rows = sums.tables[i], [*map(operator.sub, self._space, self._room)]
        held = rows[i] = int(state.num_rows)
        if max(held + num_slices, 2 * held) <= capacity:
            self._room = [*map(operator.sub, self._space, rows)]
            return None
        capacity = limit(self._spec.tables[i], round_up(max(held + num_slices, 2 * capacity)))
        compile_ahead = self._plan(("grow", i, capacity), grow, state, capacity)
        if compile_ahead is None:
            tables = [*sums.tables]
            tables[i] = self._placement.place(grow(state, capacity))
            self._needed.clear()
            self._hold(sums._replace(tables=tuple(tables)), rows)
            self._num_grown += 1
            logger.info("accumulator grown to %d rows", capacity)
        return compile_ahead


def _guess_capacity(gradient: HostGradient, size: int) -> int:
    """Returns a capacity for a table, going by one gradient."""
    if gradient.is_small:  # several stages must fit in, for being full means waiting
        size *= 2 * choose_depth(gradient.num_bytes)
    return max(SMALLEST_CAPACITY, 2 * size)
