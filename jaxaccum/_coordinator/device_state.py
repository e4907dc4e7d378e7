"""One table's accumulator on the device, and what the host knows of it without asking.

Signals: Python runs their handlers only between bytecodes that call something, so a dispatch whose
result C code stores in a list, followed by assignments that call nothing, cannot be torn by Ctrl-C:
the state has been donated and replaced, and counted, or nothing has happened. That is why programs
return tuples: to return an `AccumulatorState` they would run its constructor, in Python. The first
call of a program is different, for jit runs Python code around it: there is a moment in it when an
exception would cost the state, which `DeviceState.is_lost` tells. A gradient that is staged instead
is in the stage when ``num_staged`` says so, which changes with the other counters.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxaccum._accumulator.merge import merge
from jaxaccum._accumulator.state import AccumulatorState, as_capacity, init
from jaxaccum._coordinator.accumulated import Counts, Taken
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._coordinator.host_gradient import HostGradient, read_gradient
from jaxaccum._coordinator.placement import Placement, outside_jit
from jaxaccum._coordinator.programs import Leaves, Programs, make_programs
from jaxaccum._coordinator.spec import Shape, Spec, check_shape
from jaxaccum._coordinator.staging import Stage, choose_depth, pad, round_up
from jaxaccum._rows.indexed_slices import IndexedSlices

logger = logging.getLogger("jaxaccum")

_SMALLEST_CAPACITY = 1024
# So many takes in a row must have needed a fourth of the capacity at most before it shrinks.
_WINDOW, _SLACK = 8, 4
_Struct: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct  # jax leaves it untyped
_Key = tuple[object, int]


@dataclasses.dataclass(slots=True, eq=False)
class TakenRows(Taken):
    """Indices, values and the number of real rows; and the size of the largest gradient."""

    largest: int = 0


class DeviceState:
    """One `AccumulatorState`, made when the shape of its rows is known; see `Accumulated`.

    Args:
      spec: what is accumulated.
      capacity: of how many rows at first and at least; by default a guess from the gradients.
      placement: where.
    """

    def __init__(self, spec: Spec, capacity: int | None, placement: Placement) -> None:
        self.counts = Counts()
        self.read: Callable[..., Any] = functools.partial(read_gradient, spec, placement.gradients)
        self._spec = spec
        self._least_capacity = None if capacity is None else as_capacity(capacity)
        self._placement = placement
        # The leaves of one state, or none yet, and what they are the leaves of.
        self._box: list[Leaves] = []
        self._programs: Programs
        self._row_shape: tuple[int, ...] | None = None
        self._capacity = 0
        # Gradients counted but not dispatched yet; all else that dispatches sends them first.
        self._stage: Stage | None = None
        self._max_rows = 0  # bound on the rows held: the slices since the last take
        self._largest = 0  # padded size of the largest gradient since the last take
        self._num_grown = 0
        # What the last takes needed: their rows and one more gradient.
        self._needed: collections.deque[int] = collections.deque(maxlen=_WINDOW)
        # What has been compiled for states like the present one: a kind of program, and a size.
        self._compiled: set[_Key] = set()
        self._sizes: set[int] = set()
        self._compiler = threading.RLock()

    def prepare(
        self, gradient: HostGradient | None, will_take: bool
    ) -> Callable[[], object] | None:
        """Sees to the capacity for a gradient; see `Accumulated.prepare`."""
        num_slices = 0
        if gradient is not None:
            num_slices = gradient.num_slices
            if (
                self._row_shape != gradient.row_shape
                or self._max_rows + num_slices > self._capacity
                or not self.counts.num_accumulated
            ):
                compile_ahead = self._fit(gradient)
                if compile_ahead is not None:
                    return compile_ahead
            key: _Key = (gradient.is_small, gradient.size)
            if key not in self._compiled:
                self._sizes.add(gradient.size)
                if not gradient.is_small:
                    given = gradient.indices, gradient.values
                    return self._plan(key, self._programs.apply, *given)
                stage = self._make_stage(gradient)
                given = stage.indices, stage.values
                return self._plan(key, self._programs.apply_staged, *given, np.int32(0))
        if will_take:
            size = round_up(self._max_rows + num_slices, self._capacity)
            return self._plan(("take", size), self._programs.take, size)
        return None

    def add(self, gradient: HostGradient) -> None:
        """Adds a gradient, or stages it."""
        counts, stage = self.counts, None
        if gradient.is_small:
            stage = self._write_staged(gradient)
        else:
            self._flush()
            box, apply = self._box, self._programs.apply
            box[:] = map(apply, box, (gradient.indices,), (gradient.values,))
            # No calls from here on: see the module's docstring.
        if stage is not None:
            stage.num_staged += 1
        counts.num_accumulated += 1
        counts.accepted += 1
        self._max_rows += gradient.num_slices
        if gradient.size > self._largest:
            self._largest = gradient.size

    def take(self, outcome: list[Any]) -> None:
        """Takes everything there is."""
        self._flush()
        counts, box, out = self.counts, self._box, list[Any]()
        taken = TakenRows(counts.num_accumulated, None, self._largest)
        size = round_up(self._max_rows, self._capacity)
        out[:] = map(self._programs.take, box, (size,))
        # No calls from here on: see the module's docstring.
        box[0], taken.arrays = out[0]
        outcome[0] = taken
        counts.num_accumulated = 0
        counts.taken += 1
        counts.global_step += 1
        self._max_rows = self._largest = 0

    @outside_jit
    def deliver(self, taken: Taken, *, trim: bool) -> IndexedSlices:
        """Returns what was taken; trimmed to the real rows, it waits for the device."""
        assert isinstance(taken, TakenRows)
        assert taken.arrays is not None
        indices, values, num_rows = taken.arrays
        count = int(num_rows) if trim else indices.shape[0]
        self._needed.append(count + taken.largest)
        if count < indices.shape[0]:
            indices, values = self._placement.trim(indices, values, count)
        return IndexedSlices(indices, values, (self._spec.num_rows, *values.shape[1:]))

    def statistics(self) -> dict[str, Any]:
        """Returns the rows held, when the device has got there, and what they take."""
        return {
            "grown": self._num_grown,
            "rows": int(self._state().num_rows) if self._box else 0,
            "capacity": self._capacity or self._least_capacity or 0,
            "compiled_sizes": sorted(self._sizes),
        }

    def save(self) -> dict[str, np.ndarray]:
        """Returns what is accumulated, as arrays of their own."""
        spec, counts = self._spec, self.counts
        arrays = {
            "indices": np.zeros(0, np.int32),
            "counts": np.zeros(0, np.int32),
            "values": np.zeros((0, *(d or 0 for d in spec.shape[1:])), spec.sum_dtype),
        }
        if counts.num_accumulated:
            state = self._state()
            num_rows = int(state.num_rows)
            # Copied, for the next apply overwrites the buffers.
            arrays = {k: np.array(np.asarray(getattr(state, k))[:num_rows]) for k in arrays}
        scalars = {k: np.asarray(getattr(counts, k)) for k in ("num_accumulated", "global_step")}
        return arrays | scalars

    def load(self, saved: Mapping[str, Any]) -> None:
        """Replaces what is accumulated by what `save` returned."""
        spec, counts = self._spec, self.counts
        indices, values, touches = (np.asarray(saved[k]) for k in ("indices", "values", "counts"))
        if values.dtype.kind == "V":  # what npz files make of bfloat16
            values = values.view(spec.sum_dtype)
        spec.check_saved(indices, values, touches)
        num_accumulated, step = int(saved["num_accumulated"]), int(saved["global_step"])
        state, num_rows = None, indices.size
        if num_accumulated:
            capacity = max(self._capacity, round_up(num_rows), _SMALLEST_CAPACITY)
            empty = self._make_empty(values.shape[1:], capacity)
            size, int32 = empty.capacity, np.dtype(np.int32)
            arrays: dict[str, Any] = {
                "indices": pad(indices, size, spec.padding, int32),
                "values": pad(values, size, 0, spec.sum_dtype),
                "counts": pad(touches, size, 0, int32),
                "num_rows": np.int32(num_rows),
                "num_accumulated": np.int32(min(num_accumulated, 2**31 - 1)),
            }
            held = dataclasses.replace(empty, **arrays)
            state = self._placement.place(merge(empty, held)[0])
        self._hold(state, num_rows)
        # No calls from here on: see the module's docstring.
        counts.num_accumulated, counts.global_step = num_accumulated, step

    def clear(self) -> None:
        """Frees the device's memory."""
        self._hold(None, 0)

    def is_lost(self) -> bool:
        """Whether a dispatch failed after it had been given the state's buffers."""
        return bool(self._box) and self._box[0][0].is_deleted()

    def _state(self) -> AccumulatorState:
        self._flush()
        return jax.tree.unflatten(self._programs.treedef, self._box[0])

    def _hold(self, state: AccumulatorState | None, max_rows: int) -> None:
        """Replaces the present state, and what is staged, by ``state``, or by none."""
        leaves, treedef = jax.tree.flatten(state)
        box = [] if state is None else [tuple(leaves)]
        row_shape = None if state is None else state.values.shape[1:]
        capacity = 0 if state is None else state.capacity
        programs, compiled = make_programs(treedef), set[_Key]()
        # No calls from here on: see the module's docstring.
        self._box[:], self._programs, self._row_shape = box, programs, row_shape
        self._capacity, self._max_rows, self._stage = capacity, max_rows, None
        self._compiled = compiled

    def _plan(self, key: _Key, program: Any, *args: Any) -> Callable[[], object] | None:
        """Returns what compiles ``program`` for the present state, or ``None`` if that is done."""
        compiled = self._compiled
        if key in compiled:
            return None
        leaves = jax.tree.map(
            lambda leaf: _Struct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self._box[0]
        )

        @outside_jit
        def compile_ahead() -> None:
            with self._compiler:  # one compiles, others who want the same wait
                if key not in compiled:
                    # What jit has compiled ahead it finds when it is called.
                    program.lower(leaves, *args).compile()
                    compiled.add(key)

        return compile_ahead

    def _make_stage(self, gradient: HostGradient) -> Stage:
        return Stage(gradient.size, gradient.row_shape, self._spec.dtype, self._spec.padding)

    def _write_staged(self, gradient: HostGradient) -> Stage:
        """Returns the stage with ``gradient`` in it, which does not count there yet."""
        stage = self._stage
        if stage is None or stage.size != gradient.size or stage.num_staged == stage.depth:
            stage = self._make_stage(gradient)
            self._flush()
            self._stage = stage
        stage.write(gradient.indices, gradient.values)
        return stage

    def _flush(self) -> None:
        """Dispatches what is staged; where that fails, it stays staged."""
        stage = self._stage
        if stage is None or not stage.num_staged:
            return
        box, count = self._box, np.int32(stage.num_staged)
        box[:] = map(self._programs.apply_staged, box, (stage.indices,), (stage.values,), (count,))
        # No calls from here on: see the module's docstring.
        self._stage = None

    def _check_row(self, row_shape: tuple[int, ...]) -> None:
        """Raises unless rows of this shape may be added to what is held."""
        shape: Shape = self._spec.shape
        if self.counts.num_accumulated and self._row_shape is not None:
            shape = (None, *self._row_shape)
            if len(row_shape) != len(self._row_shape):
                raise InvalidArgumentError(
                    f"Shape mismatch: expected values rank {len(shape)}, got {1 + len(row_shape)}"
                )
        check_shape("values", shape, (None, *row_shape))

    def _make_empty(self, row_shape: tuple[int, ...], capacity: int) -> AccumulatorState:
        spec = self._spec
        return self._placement.place(
            init(
                (spec.num_rows, *row_shape),
                spec.dtype,
                capacity=self._limit(capacity),
                reduction=spec.reduction,
                accumulator_dtype=spec.sum_dtype,
            )
        )

    def _fit(self, gradient: HostGradient) -> Callable[[], object] | None:
        """Makes a state, a larger or a smaller one, or returns what has to be compiled for that."""
        guess = self._least_capacity or self._guess_capacity(gradient)
        if self._row_shape != gradient.row_shape:
            self._check_row(gradient.row_shape)
            self._hold(self._make_empty(gradient.row_shape, self._capacity or guess), 0)
        if self._max_rows + gradient.num_slices > self._capacity:
            return self._grow(gradient.num_slices)
        if len(self._needed) == _WINDOW and not self.counts.num_accumulated:
            # A take costs what the capacity is: give back what the last ones did not need.
            needed = round_up(2 * max(*self._needed, gradient.size))
            if _SLACK * self._limit(max(guess, needed)) <= self._capacity:
                self._needed.clear()
                self._hold(self._make_empty(gradient.row_shape, max(guess, needed)), 0)
                logger.info("accumulator shrunk to %d rows", self._capacity)
        return None

    def _grow(self, num_slices: int) -> Callable[[], object] | None:
        """Grows, unless ``num_slices`` more turn out to fit.

        To find out, it waits for the device; so it grows too if more than half is full, lest the
        next gradient wait again.
        """
        capacity = self._capacity
        if capacity == self._limit(capacity + 1):
            return None  # as many as there are rows
        held = int(self._state().num_rows)
        if max(held + num_slices, 2 * held) <= capacity:
            self._max_rows = held
            return None
        capacity = self._limit(round_up(max(held + num_slices, 2 * capacity)))
        grow = self._programs.grow
        compile_ahead = self._plan(("grow", capacity), grow, capacity)
        if compile_ahead is None:
            state = jax.tree.unflatten(self._programs.treedef, grow(self._box[0], capacity))
            self._needed.clear()
            self._hold(self._placement.place(state), held)
            self._num_grown += 1
            logger.info("accumulator grown to %d rows", capacity)
        return compile_ahead

    def _guess_capacity(self, gradient: HostGradient) -> int:
        """Returns a capacity, going by one gradient."""
        size = gradient.size
        if gradient.is_small:  # several stages must fit in, for being full means waiting
            size *= 2 * choose_depth(size, gradient.row_shape, self._spec.dtype)
        return max(_SMALLEST_CAPACITY, 2 * size)

    def _limit(self, capacity: int) -> int:
        rows = self._spec.num_rows
        return capacity if rows is None else max(min(capacity, rows), 1)
