"""Gradients kept one by one until it is known which step uses them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxaccum._coordinator.accumulated import Counts, Taken
from jaxaccum._coordinator.device_state import DeviceState
from jaxaccum._coordinator.host_gradient import (
    HostGradient,
    assemble,
    check_dense,
    check_rows,
    make_own,
)
from jaxaccum._coordinator.placement import Placement, outside_jit
from jaxaccum._coordinator.spec import TreeSpec, as_dtype
from jaxaccum._rows.indexed_slices import IndexedSlices


class Kept:
    """What is taken from where a take uses exactly so many gradients; see `Accumulated`.

    Sums could not be told apart again. So gradients are kept as they came, and the taker adds them
    up after it was served, outside the lock: under the lock a take moves a few references.

    Args:
      spec: what is accumulated; all shapes are known.
      capacities, placement, read: as `DeviceState` has them.
    """

    def __init__(
        self,
        spec: TreeSpec,
        capacities: Sequence[int | None],
        placement: Placement,
        read: Callable[..., HostGradient],
    ) -> None:
        self.counts = Counts()
        self._spec = spec
        self._sharding = placement.gradients
        self._read = read
        self._make_sums = functools.partial(DeviceState, spec, capacities, placement, read)
        # Sums that nobody is using, with what a taker left in them who was interrupted.
        self._idle = [self._make_sums()]
        self._kept: list[tuple[HostGradient, int]] = []

    def read(self, *gradient: Any) -> HostGradient:
        """Checks a gradient, and makes it our own."""
        return make_own(self._read(self._spec, self._sharding, *gradient))

    def prepare(self, gradient: HostGradient | None, will_take: bool) -> None:
        """Nothing is compiled until a taker has been served."""

    def add(self, gradient: HostGradient, staleness: int) -> None:
        """Keeps a gradient."""
        counts, kept, entry = self.counts, self._kept, [(gradient, staleness)]
        most = self._spec.policy.max_staleness
        # No calls from here on: see `device_state`.
        kept += entry
        if staleness > most:
            counts.carried += 1
        else:
            counts.num_accumulated += 1
        counts.accepted += 1

    def take(self, outcome: list[Any], num_required: int) -> None:
        """Takes the first gradients, up to the last one that is required."""
        counts, kept, most = self.counts, self._kept, self._spec.policy.max_staleness
        counted = [i for i, (_, staleness) in enumerate(kept) if staleness <= most]
        end = counted[num_required - 1] + 1
        taken, rest = Taken(num_required, kept[:end]), kept[end:]
        # No calls from here on: see `device_state`.
        outcome[0] = taken
        self._kept = rest
        counts.num_accumulated -= num_required
        counts.taken += 1
        counts.global_step += 1

    @outside_jit
    def deliver(self, taken: Taken, *, trim: bool) -> tuple[list[IndexedSlices], list[jax.Array]]:
        """Adds up what was taken, and returns what `DeviceState.deliver` does."""
        idle = self._idle  # `clear` puts another list in its place
        try:
            sums = idle.pop()
        except IndexError:
            sums = self._make_sums()
        outcome: list[Any] = [None]
        try:
            sums.discard()
            for gradient, staleness in taken.arrays:
                while (compile_ahead := sums.prepare(gradient, will_take=False)) is not None:
                    compile_ahead()
                sums.add(gradient, staleness)
            sums.take(outcome, 1)
        finally:
            if not sums.is_lost():
                idle.append(sums)
        return sums.deliver(outcome[0], trim=trim)

    def statistics(self) -> dict[str, Any]:
        """Returns how much is kept."""
        return {"kept_bytes": sum(gradient.num_bytes for gradient, _ in self._kept)}

    def save(self) -> dict[str, np.ndarray]:
        """Returns what is kept, gradient by gradient."""
        spec, num = self._spec, len(self._spec.tables)
        saved = {
            "staleness": np.array([staleness for _, staleness in self._kept], np.int64),
            "global_step": np.asarray(self.counts.global_step),
        }
        for k, (gradient, _) in enumerate(self._kept):
            for i, name in enumerate(spec.names[:num]):
                size = gradient.num_slices[i]
                saved[f"{k}/{name}indices"] = np.array(gradient.indices[i][:size], np.int32)
                saved[f"{k}/{name}values"] = np.array(np.asarray(gradient.values[i])[:size])
            for name, leaf in zip(spec.names[num:], gradient.dense, strict=True):
                saved[f"{k}/{name}values"] = np.array(leaf)
        return saved

    def load(self, saved: Mapping[str, Any]) -> None:
        """Replaces what is kept by what `save` returned."""
        spec, counts, most = self._spec, self.counts, self._spec.policy.max_staleness
        step, ages = int(saved["global_step"]), np.asarray(saved["staleness"]).tolist()
        names, kept = spec.names, []
        for k, staleness in enumerate(ages):
            values = [
                as_dtype(saved[f"{k}/{name}values"], leaf.dtype)
                for name, leaf in zip(names, spec.leaves, strict=True)
            ]
            tables = []
            for name, leaf, rows in zip(names, spec.tables, values, strict=False):
                leaf.check_row(rows.shape[1:], leaf.row_shape)
                tables.append(check_rows(leaf, saved[f"{k}/{name}indices"], rows, None))
            dense = [*map(check_dense, spec.dense, values[len(tables) :])]
            kept.append((make_own(assemble(spec, self._sharding, tables, dense)), staleness))
        num_accumulated = sum(staleness <= most for staleness in ages)
        # No calls from here on: see `device_state`.
        self._kept = kept
        counts.num_accumulated, counts.global_step = num_accumulated, step

    def clear(self) -> None:
        """Frees the memory."""
        self._kept, self._idle = [], []

    def is_lost(self) -> bool:
        """Nothing is ever given away."""
        return False
