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
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.merge import merge
from jaxaccum._accumulator.state import AccumulatorState, as_capacity, init
from jaxaccum._coordinator.accumulated import Counts, Taken
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._coordinator.host_gradient import GradientReader, HostGradient
from jaxaccum._coordinator.placement import Placement, first_rows, is_traced
from jaxaccum._coordinator.programs import Leaves, Programs, programs
from jaxaccum._coordinator.spec import Spec
from jaxaccum._coordinator.staging import Stage, padded_size, stage_depth
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
      capacity: rows there is room for at first and at least; by default a guess from the gradients.
      placement: where.
    """

    def __init__(self, spec: Spec, capacity: int | None, placement: Placement) -> None:
        self.counts = Counts()
        self.read = GradientReader(spec, placement.gradients).read
        self._spec = spec
        self._least_capacity = None if capacity is None else as_capacity(capacity)
        self._placement = placement
        # The leaves of one state, or none yet, and what they are the leaves of.
        self._box: list[Leaves] = []
        self._programs: Programs
        self._row: tuple[int, ...] | None = None
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
        """Makes room for a gradient; see `Accumulated.prepare`."""
        _check_untraced()
        num_slices = 0
        if gradient is not None:
            num_slices = gradient.num_slices
            if (
                self._row != gradient.row
                or self._max_rows + num_slices > self._capacity
                or not self.counts.num_accumulated
            ):
                compile_ahead = self._make_room(gradient)
                if compile_ahead is not None:
                    return compile_ahead
            key: _Key = (gradient.is_small, gradient.size)
            if key not in self._compiled:
                self._sizes.add(gradient.size)
                return self._compilation(key, *self._dispatch_of(gradient))
        if will_take:
            size = padded_size(self._max_rows + num_slices, self._capacity)
            key = ("take", size)
            if key not in self._compiled:
                return self._compilation(key, self._programs.take, size)
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
        counts.num_accepted += 1
        self._max_rows += gradient.num_slices
        if gradient.size > self._largest:
            self._largest = gradient.size

    def take(self, outcome: list[Any]) -> None:
        """Takes everything there is."""
        _check_untraced()
        self._flush()
        counts, box, out = self.counts, self._box, list[Any]()
        taken = TakenRows(counts.num_accumulated, None, self._largest)
        size = padded_size(self._max_rows, self._capacity)
        out[:] = map(self._programs.take, box, (size,))
        # No calls from here on: see the module's docstring.
        box[0], taken.arrays = out[0]
        outcome[0] = taken
        counts.num_accumulated = 0
        counts.num_taken += 1
        counts.global_step += 1
        self._max_rows = self._largest = 0

    def deliver(self, taken: Taken, *, trim: bool) -> IndexedSlices:
        """Returns what was taken; trimmed to the real rows, it waits for the device."""
        assert isinstance(taken, TakenRows)
        assert taken.arrays is not None
        indices, values, num_rows = taken.arrays
        count = int(num_rows) if trim else indices.shape[0]
        self._needed.append(count + taken.largest)
        if count < indices.shape[0]:
            indices = self._placement.indices(first_rows(indices, count))
            values = self._placement.values(first_rows(values, count))
        return IndexedSlices(indices, values, (self._spec.rows, *values.shape[1:]))

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
        arrays = {
            "indices": np.zeros(0, np.int32),
            "counts": np.zeros(0, np.int32),
            "values": np.zeros((0, *(d or 0 for d in self._spec.shape[1:])), self._spec.sum_dtype),
        }
        if self.counts.num_accumulated:
            state = self._state()
            # Copied, for the next apply overwrites the buffers.
            arrays = {
                k: np.array(np.asarray(getattr(state, k))[: int(state.num_rows)]) for k in arrays
            }
        return arrays | {
            "num_accumulated": np.asarray(self.counts.num_accumulated),
            "global_step": np.asarray(self.counts.global_step),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Puts what `save` returned in place of what is accumulated."""
        indices, values, touches = (np.asarray(saved[k]) for k in ("indices", "values", "counts"))
        if values.dtype.kind == "V":  # what npz files make of bfloat16
            values = values.view(self._spec.sum_dtype)
        self._spec.check_saved(indices, values, touches)
        num_accumulated, step = int(saved["num_accumulated"]), int(saved["global_step"])
        state, num_rows = None, indices.size
        if num_accumulated:
            capacity = max(self._capacity, padded_size(num_rows), _SMALLEST_CAPACITY)
            empty = self._make_empty(values.shape[1:], capacity)
            with jax.ensure_compile_time_eval():
                held = dataclasses.replace(
                    empty,
                    indices=_fill(indices, empty.indices, self._spec.padding),
                    values=_fill(values, empty.values, 0),
                    counts=_fill(touches, empty.counts, 0),
                    num_rows=jnp.int32(num_rows),
                    num_accumulated=jnp.int32(min(num_accumulated, 2**31 - 1)),
                )
                state = self._placement.place(merge(empty, held)[0])
        counts = self.counts
        self._keep(state, num_rows)
        # No calls from here on: see the module's docstring.
        counts.num_accumulated, counts.global_step = num_accumulated, step

    def clear(self) -> None:
        """Frees the device's memory."""
        self._keep(None, 0)

    def is_lost(self) -> bool:
        """Whether a dispatch failed after it had been given the state's buffers."""
        return bool(self._box) and self._box[0][0].is_deleted()

    def _state(self) -> AccumulatorState:
        self._flush()
        return jax.tree.unflatten(self._programs.treedef, self._box[0])

    def _dispatch_of(self, gradient: HostGradient) -> tuple[Any, ...]:
        """The program that adds a gradient, and arguments like those it will get."""
        if not gradient.is_small:
            return self._programs.apply, gradient.indices, gradient.values
        stage = self._make_stage(gradient)
        return self._programs.apply_staged, stage.indices, stage.values, np.int32(0)

    def _compilation(self, key: _Key, program: Any, *args: Any) -> Callable[[], object]:
        """What compiles ``program`` for the present state, to be called without the lock."""
        compiled = self._compiled
        leaves = jax.tree.map(
            lambda leaf: _Struct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            self._box[0],
        )

        def compile_ahead() -> None:
            with self._compiler:  # one compiles, others who want the same wait
                if key not in compiled:
                    # What jit has compiled ahead it finds when it is called.
                    program.lower(leaves, *args).compile()
                    compiled.add(key)

        return compile_ahead

    def _make_stage(self, gradient: HostGradient) -> Stage:
        return Stage(gradient.size, gradient.row, self._spec.dtype, self._spec.padding)

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
        _check_untraced()
        box, count = self._box, np.int32(stage.num_staged)
        box[:] = map(self._programs.apply_staged, box, (stage.indices,), (stage.values,), (count,))
        # No calls from here on: see the module's docstring.
        self._stage = None

    def _keep(self, state: AccumulatorState | None, max_rows: int) -> None:
        """Puts a state, or none, in place of the present one and what is staged."""
        leaves, treedef = jax.tree.flatten(state)
        box = [] if state is None else [tuple(leaves)]
        row = None if state is None else state.values.shape[1:]
        capacity = 0 if state is None else state.capacity
        runs, compiled = programs(treedef), set[_Key]()
        # No calls from here on: see the module's docstring.
        self._box[:], self._programs, self._row = box, runs, row
        self._capacity, self._max_rows, self._stage = capacity, max_rows, None
        self._compiled = compiled

    def _check_row(self, row: tuple[int, ...]) -> None:
        """Raises unless rows of shape ``row`` may be added to what is held."""
        rank, shape = 1 + len(row), self._spec.shape
        if self.counts.num_accumulated and self._row is not None:
            if len(self._row) != len(row):
                raise InvalidArgumentError(
                    f"Shape mismatch: expected values rank {1 + len(self._row)}, got {rank}"
                )
            shape = (None, *self._row)
        elif len(shape) > rank:
            raise InvalidArgumentError(
                f"Shape mismatch: expected values rank at least {len(shape)}, got {rank}"
            )
        for i, (dim, given) in enumerate(zip(shape[1:], row, strict=False), 1):
            if dim is not None and dim != given:
                raise InvalidArgumentError(
                    f"Shape mismatch: expected values dim {i} to be {dim}, got {given}"
                )

    def _make_empty(self, row: tuple[int, ...], capacity: int) -> AccumulatorState:
        spec = self._spec
        with jax.ensure_compile_time_eval():  # a trace under way must not get at the state
            return self._placement.place(
                init(
                    (spec.rows, *row),
                    spec.dtype,
                    capacity=self._limit(capacity),
                    reduction=spec.reduction,
                    accumulator_dtype=spec.sum_dtype,
                )
            )

    def _make_room(self, gradient: HostGradient) -> Callable[[], object] | None:
        """Sees to it that a gradient fits, or returns what has to be compiled for that."""
        if self._row != gradient.row:
            self._check_row(gradient.row)
            capacity = self._capacity or self._least_capacity or self._guess(gradient)
            self._keep(self._make_empty(gradient.row, capacity), 0)
        if self._max_rows + gradient.num_slices > self._capacity:
            return self._grow(gradient.num_slices)
        if len(self._needed) == _WINDOW and not self.counts.num_accumulated:
            return self._shrink(gradient)
        return None

    def _grow(self, num_slices: int) -> Callable[[], object] | None:
        """Grows, unless there turns out to be room for ``num_slices`` more.

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
        return self._resize(padded_size(max(held + num_slices, 2 * capacity)), held)

    def _shrink(self, gradient: HostGradient) -> Callable[[], object] | None:
        """Gives capacity back that the last takes did not need: a take costs what it is of."""
        needed = padded_size(2 * max(*self._needed, gradient.size))
        capacity = self._limit(max(self._least_capacity or self._guess(gradient), needed))
        if _SLACK * capacity > self._capacity:
            return None
        return self._resize(capacity, 0)

    def _resize(self, capacity: int, held: int) -> Callable[[], object] | None:
        old, capacity = self._capacity, self._limit(capacity)
        resize, key = self._programs.resize, ("resize", capacity)
        if key not in self._compiled:
            return self._compilation(key, resize, capacity)
        leaves = resize(self._box[0], capacity)
        state = self._placement.place(jax.tree.unflatten(self._programs.treedef, leaves))
        self._needed.clear()
        self._keep(state, held)
        self._num_grown += capacity > old
        logger.info("accumulator resized from %d to %d rows", old, capacity)
        return None

    def _guess(self, gradient: HostGradient) -> int:
        """How many rows to have room for, going by one gradient."""
        size = gradient.size
        if gradient.is_small:  # several stages must fit in, for being full means waiting
            size *= 2 * stage_depth(size, gradient.row, self._spec.dtype)
        return max(_SMALLEST_CAPACITY, 2 * size)

    def _limit(self, capacity: int) -> int:
        rows = self._spec.rows
        return capacity if rows is None else max(min(capacity, rows), 1)


def _check_untraced() -> None:
    if is_traced():
        raise RuntimeError(
            "an accumulator lives outside jit: apply and take from ordinary Python code"
        )


def _fill(host: np.ndarray, like: jax.Array, fill: int) -> jax.Array:
    array = np.full(like.shape, fill, like.dtype)
    array[: host.shape[0]] = host
    return jnp.asarray(array)
