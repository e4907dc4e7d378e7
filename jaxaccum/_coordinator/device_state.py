"""The accumulator's state on the device, and what the host knows of it without asking.

Not thread-safe: its owner holds a lock. Signals are another matter. Python runs signal handlers
only between bytecodes that call something, so a dispatch whose result C code stores in a list,
followed by assignments that call nothing, cannot be torn by Ctrl-C: the state has been donated and
replaced, and counted, or nothing has happened. That is why programs return tuples: to return an
`AccumulatorState` they would run its constructor, in Python. The first call of a program is
different, for jit runs Python code around it: there is a moment in it when an exception would cost
the state, which `DeviceState.is_lost` tells. A gradient that is staged instead is in the stage when
``num_staged`` says so, which changes with the other counters; until then its place is free.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.merge import grow, merge
from jaxaccum._accumulator.state import AccumulatorState, init
from jaxaccum._coordinator.errors import InvalidArgumentError
from jaxaccum._coordinator.host_gradient import HostGradient, padded_size
from jaxaccum._coordinator.placement import Placement, first_rows
from jaxaccum._coordinator.programs import Leaves, Programs, is_traced, programs
from jaxaccum._coordinator.spec import Spec
from jaxaccum._coordinator.staging import Stage, stage_depth
from jaxaccum._rows.indexed_slices import IndexedSlices, padding_index

logger = logging.getLogger("jaxaccum")

_SMALLEST_CAPACITY = 1024
_TRACED = "an accumulator lives outside jit: apply and take from ordinary Python code"


@dataclasses.dataclass(slots=True, eq=False)
class Taken:
    """A gradient on its way to a taker.

    Attributes:
      num_accumulated: how many gradients the host counts in it.
      num_slices: bound on its rows.
      global_step: before it was taken.
      is_tentative: whether the device may have refused, for a gradient nobody had checked.
      era: how often a state had been loaded; what was taken before then no longer counts.
      arrays: indices and values, padded to the capacity, and int32 ``[3]``: how many rows are
        real, how many gradients the device has rejected so far, and whether it did take.
    """

    num_accumulated: int
    num_slices: int
    global_step: int
    is_tentative: bool
    era: int
    arrays: tuple[jax.Array, jax.Array, jax.Array] | None = None


class DeviceState:
    """One `AccumulatorState`, made when the shape of its rows is known, and its counters.

    Attributes:
      global_step: gradients of an earlier step are stale.
      num_accumulated: gradients added since the last take.
      num_accepted, num_invalid, num_taken, num_grown: since the beginning.
      sizes: the padded sizes dispatched so far.
    """

    def __init__(self, spec: Spec, capacity: int | None, placement: Placement) -> None:
        self._spec = spec
        self._capacity = capacity
        self._placement = placement
        # The leaves of one state, or none yet, and what they are the leaves of.
        self._box: list[Leaves] = []
        self._programs: Programs
        self._row: tuple[int, ...] | None = None
        # Gradients counted but not dispatched yet; all else that dispatches sends them first.
        self._stage: Stage | None = None
        self._room = 0
        self._num_slices = 0  # since the last take: bound on the rows held
        self.global_step = 0
        self.num_accumulated = 0
        self.num_accepted = 0
        self.num_invalid = 0
        self.num_taken = 0
        self.num_grown = 0
        self.sizes: set[int] = set()
        # Gradients nobody has checked, and the takes that may fail for their sake.
        self._has_unchecked = False
        self._num_tentative = 0
        self._tentative_slices = 0
        self._num_rejected = 0
        self._era = 0

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return self._room or self._capacity or 0

    def num_rows(self) -> int:
        """Returns how many rows are held, when the device has got there."""
        return int(self._state().num_rows) if self._box else 0

    def add(self, gradient: HostGradient) -> None:
        """Adds a gradient; raises ``InvalidArgumentError`` where its rows have another shape."""
        if self._row != gradient.row:
            self._check_row(gradient.row)
            self._make(gradient)
        if self._num_slices + gradient.num_slices > self._room:
            self._make_room(gradient.num_slices, may_wait=gradient.is_checked)
        if gradient.size not in self.sizes:
            self.sizes.add(gradient.size)
        stage = None
        if gradient.is_small:
            stage = self._staged(gradient)
        else:
            self._flush()
            box, old = self._box, self._box[0]
            apply = self._programs.apply
            box[:] = map(apply, box, (gradient.indices,), (gradient.values,), (gradient.rows,))
            # No calls from here on: see the module's docstring.
            if box[0][0].__class__ is not old[0].__class__:
                box[0] = old
                raise RuntimeError(_TRACED)
        if stage is not None:
            stage.num_staged += 1
        self.num_accumulated += 1
        self.num_accepted += 1
        self._num_slices += gradient.num_slices
        if not gradient.is_checked:
            self._has_unchecked = True

    def take(self, taken: list[Any]) -> None:
        """Takes everything into ``taken[0]``; ``num_accumulated`` must be at least 1."""
        self._flush()
        is_tentative = self._has_unchecked or self._num_tentative > 0
        num_slices = self._num_slices - self._tentative_slices
        result = Taken(self.num_accumulated, num_slices, self.global_step, is_tentative, self._era)
        num_rejected = np.int32(self._num_rejected)
        box, old, out = self._box, self._box[0], list[Any]()
        size = min(padded_size(num_slices), self._room)
        out[:] = map(self._programs.take, box, (num_rejected,), (size,))
        # No calls from here on: see the module's docstring.
        new, arrays = out[0]
        if new[0].__class__ is not old[0].__class__:
            raise RuntimeError(_TRACED)
        box[0] = new
        result.arrays = arrays
        taken[0] = result
        self.num_accumulated = 0
        self.num_taken += 1
        self.global_step += 1
        self._has_unchecked = False
        if is_tentative:
            self._num_tentative += 1
            self._tentative_slices = self._num_slices
        else:
            self._num_slices = 0

    def settle(self, taken: Taken, facts: np.ndarray) -> None:
        """Settles a tentative take: done, or undone because a gradient in it was invalid.

        Raises:
          InvalidArgumentError: undone. What was valid is still there.
        """
        taken.is_tentative = False
        _, num_rejected, has_taken = facts.tolist()
        is_current = taken.era == self._era
        if is_current:
            self._num_tentative -= 1
            self._tentative_slices -= taken.num_slices
            self._num_slices -= taken.num_slices if has_taken else 0
        if has_taken:
            return
        if is_current:
            self._undo(taken, num_rejected)
        raise InvalidArgumentError(
            "gradients applied with validate=False had indices out of range; "
            "they were rejected, and the others are still there to be taken"
        )

    def _undo(self, taken: Taken, num_rejected: int) -> None:
        num_new = max(num_rejected - self._num_rejected, 0)
        self._num_rejected += num_new
        self.num_accumulated += taken.num_accumulated - num_new
        self.num_accepted -= num_new
        self.num_invalid += num_new
        self.num_taken -= 1
        if self.global_step == taken.global_step + 1:
            self.global_step -= 1

    def gradient(self, taken: Taken, *, trim: bool) -> IndexedSlices:
        """Returns what was taken; trimmed to the real rows, it waits for the device."""
        assert taken.arrays is not None
        indices, values, facts = taken.arrays
        shape = (self._spec.shape[0] if self._spec.shape else None, *values.shape[1:])
        num_rows = int(np.asarray(facts)[0]) if trim else indices.shape[0]
        if num_rows < indices.shape[0]:
            indices = self._placement.indices(first_rows(indices, num_rows))
            values = self._placement.values(first_rows(values, num_rows))
        return IndexedSlices(indices, values, shape)

    def save(self) -> dict[str, np.ndarray]:
        """Returns what is accumulated, as arrays of their own."""
        num_accumulated = 0
        arrays = {
            "indices": np.zeros(0, np.int32),
            "counts": np.zeros(0, np.int32),
            "values": np.zeros((0, *(d or 0 for d in self._spec.shape[1:])), self._spec.sum_dtype),
        }
        if self._box and self.num_accumulated:
            state = self._state()
            num_rows, num_accumulated = int(state.num_rows), int(state.num_accumulated)
            # Copied, for the next apply overwrites the buffers.
            arrays = {k: np.array(np.asarray(getattr(state, k))[:num_rows]) for k in arrays}
        return arrays | {
            "num_accumulated": np.asarray(num_accumulated),
            "global_step": np.asarray(self.global_step),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes over what `save` returned, in place of what is accumulated."""
        indices, values, counts = (np.asarray(saved[k]) for k in ("indices", "values", "counts"))
        if values.dtype.kind == "V":  # what npz files make of bfloat16
            values = values.view(self._spec.sum_dtype)
        num_rows, num_accumulated = indices.size, int(saved["num_accumulated"])
        self._check_saved(indices, values, counts)
        state = None
        if num_accumulated:
            row = values.shape[1:]
            padding = padding_index(self._spec.shape or None)
            empty = self._empty(row, max(self.capacity, padded_size(num_rows), _SMALLEST_CAPACITY))
            with jax.ensure_compile_time_eval():
                held = dataclasses.replace(
                    empty,
                    indices=_filled(indices, empty.indices, padding),
                    values=_filled(values, empty.values, 0),
                    counts=_filled(counts, empty.counts, 0),
                    num_rows=jnp.int32(num_rows),
                    num_accumulated=jnp.int32(num_accumulated),
                )
                state = self._placement.place(merge(empty, held)[0])
        global_step = int(saved["global_step"])
        self._keep(state, num_rows)
        self._era += 1
        self._has_unchecked = False
        self._num_tentative = self._tentative_slices = self._num_rejected = 0
        self.num_accumulated = num_accumulated
        self.global_step = global_step

    def clear(self) -> None:
        """Frees the device's memory."""
        self._keep(None, 0)

    def is_lost(self) -> bool:
        """Whether a dispatch failed after it had been given the state's buffers."""
        return bool(self._box) and self._box[0][0].is_deleted()

    def _state(self) -> AccumulatorState:
        self._flush()
        return jax.tree.unflatten(self._programs.treedef, self._box[0])

    def _staged(self, gradient: HostGradient) -> Stage:
        """Returns the stage with ``gradient`` in it, which does not count there yet."""
        if is_traced():
            raise RuntimeError(_TRACED)
        stage, size = self._stage, gradient.size
        if stage is None or stage.size != size or stage.num_staged == stage.depth:
            stage = Stage(size, gradient.row, self._spec.dtype, gradient.rows)
            self._flush()
            self._stage = stage
        stage.write(gradient.indices, gradient.values)
        return stage

    def _flush(self) -> None:
        """Dispatches what is staged; where that fails, it stays staged."""
        stage = self._stage
        if stage is None or not stage.num_staged:
            return
        box, old, count = self._box, self._box[0], np.int32(stage.num_staged)
        apply, arrays = self._programs.apply_staged, ((stage.indices,), (stage.values,))
        box[:] = map(apply, box, *arrays, (count,), (stage.rows,))
        # No calls from here on: see the module's docstring.
        if box[0][0].__class__ is not old[0].__class__:
            box[0] = old
            raise RuntimeError(_TRACED)
        self._stage = None

    def _keep(self, state: AccumulatorState | None, num_slices: int) -> None:
        """Puts a state, or none, in place of the present one and what is staged."""
        leaves, treedef = jax.tree.flatten(state)
        box = [] if state is None else [tuple(leaves)]
        row = None if state is None else state.values.shape[1:]
        room = 0 if state is None else state.capacity
        runs = programs(treedef)
        # No calls from here on: see the module's docstring.
        self._box[:], self._programs, self._row = box, runs, row
        self._room, self._num_slices, self._stage = room, num_slices, None

    def _check_saved(self, indices: np.ndarray, values: np.ndarray, counts: np.ndarray) -> None:
        if values.dtype != self._spec.sum_dtype:
            raise InvalidArgumentError(
                f"state must hold values of {self._spec.sum_dtype}, got {values.dtype}"
            )
        num_rows, end = indices.size, padding_index(self._spec.shape or None)
        if not indices.shape == counts.shape == values.shape[:1] == (num_rows,):
            raise InvalidArgumentError(
                "state must hold as many indices, values and counts, got shapes "
                f"{indices.shape}, {values.shape} and {counts.shape}"
            )
        row, expected = values.shape[1:], self._spec.shape[1:]
        if any(d not in (None, given) for d, given in zip_longest(expected, row[: len(expected)])):
            raise InvalidArgumentError(f"state must hold rows of shape {expected}, got {row}")
        if num_rows and not (0 <= indices.min() <= indices.max() < end):
            raise InvalidArgumentError(f"state must hold indices from 0 to below {end}")

    def _check_row(self, row: tuple[int, ...]) -> None:
        rank, accumulator = 1 + len(row), self._spec.shape
        pinned = self._row
        if pinned is not None and (self.num_accumulated or self._num_tentative):
            if len(pinned) != len(row):
                raise InvalidArgumentError(
                    f"Shape mismatch: expected values rank {1 + len(pinned)}, got {rank}"
                )
            expected: tuple[int | None, ...] = (None, *pinned)
        else:
            if len(accumulator) > rank:
                raise InvalidArgumentError(
                    f"Shape mismatch: expected values rank at least {len(accumulator)}, got {rank}"
                )
            expected = (None, *accumulator[1:])
        for i, (dim, given) in enumerate(zip(expected, (None, *row), strict=False)):
            if dim is not None and dim != given:
                raise InvalidArgumentError(
                    f"Shape mismatch: expected values dim {i} to be {dim}, got {given}"
                )

    def _empty(self, row: tuple[int, ...], capacity: int) -> AccumulatorState:
        spec = self._spec
        rows = spec.shape[0] if spec.shape else None
        with jax.ensure_compile_time_eval():  # a trace under way must not get at the state
            return self._placement.place(
                init(
                    (rows, *row),
                    spec.dtype,
                    capacity=self._bounded(capacity),
                    reduction=spec.reduction,
                    accumulator_dtype=spec.sum_dtype,
                )
            )

    def _make(self, gradient: HostGradient) -> None:
        """Begins anew with rows of another shape."""
        guess = max(_SMALLEST_CAPACITY, 2 * gradient.size)
        if gradient.is_small:  # several stages must fit in, for being full means waiting
            deep = stage_depth(gradient.size, gradient.row, self._spec.dtype)
            guess = max(guess, 4 * deep * gradient.size)
        state = self._empty(gradient.row, self._capacity or guess)
        self._keep(state, 0)
        self._num_rejected = 0

    def _make_room(self, num_slices: int, *, may_wait: bool) -> None:
        """Grows, unless there turns out to be room for ``num_slices`` more.

        To find out, it waits for the device; so it grows too if more than half is full, lest the
        next gradient wait again.
        """
        if self._room == self._bounded(self._room + 1):
            return  # as many as there are rows
        state = self._state()
        num_rows = self._num_slices
        if may_wait and not self._num_tentative:
            num_rows = int(state.num_rows)
            if max(num_rows + num_slices, 2 * num_rows) <= state.capacity:
                self._num_slices = num_rows
                return
        capacity = self._bounded(padded_size(max(num_rows + num_slices, 2 * state.capacity)))
        with jax.ensure_compile_time_eval():
            grown = self._placement.place(grow(state, capacity))
        self._keep(grown, num_rows)
        self._capacity = capacity
        self.num_grown += 1
        logger.info("accumulator grown from %d to %d rows", state.capacity, capacity)

    def _bounded(self, capacity: int) -> int:
        rows = self._spec.shape[0] if self._spec.shape else None
        return capacity if rows is None else max(min(capacity, rows), 1)


def _filled(host: np.ndarray, like: jax.Array, fill: int) -> jax.Array:
    array = np.full(like.shape, fill, like.dtype)
    array[: host.shape[0]] = host
    return jnp.asarray(array)
