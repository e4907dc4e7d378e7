"""What all devices along a mesh axis hold together, exchanged as rows or as a dense table.

Every device gets all devices' rows and sums them in the same order, so that all come to the same
bits on any backend. Letters: ``n`` devices along the axis, ``k`` rows sent by each, ``m`` rows of
the union at most.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._accumulator.counters import saturating_add, saturating_sum
from jaxaccum._accumulator.row_index import NOWHERE
from jaxaccum._accumulator.state import AccumulatorState, Verdict
from jaxaccum._rows.cpu_workarounds import add_in_turn, is_bitmap_faster
from jaxaccum._rows.prefix_sums import as_words, count_before, rank_in_words

AxisName = Hashable | tuple[Hashable, ...]
Exchange = Literal["rows", "dense"]


class UnionRows(NamedTuple):
    """The rows that devices hold, each device's own, and the distinct ones among them.

    Attributes:
      ids: int32 ``[m]``, the distinct rows, ascending, NOWHERE last.
      num_rows: int32 ``[]``, how many there are; those beyond ``m`` are missing.
      slot: int32 ``[n, k]``, which of the distinct rows each slice belongs to, or NOWHERE; distinct
        for each device.
      values: ``[n, k, *row]``, the sums of each device.
      counts: ``[n, k]``, how many of its gradients touched the row, or what these weigh.
    """

    ids: jax.Array
    num_rows: jax.Array
    slot: jax.Array
    values: jax.Array
    counts: jax.Array

    def write_sums(self, base: jax.Array, slices: jax.Array) -> jax.Array:
        """Writes the sums of ``slices [n, k, ...]`` over the first rows of ``base [>= m, ...]``.

        They add up in the order of devices, on every backend and every device.
        """
        # The first to bring a row overwrites what is there, which spares a pass to zero it.
        num_devices = self.slot.shape[0]
        device = jnp.arange(num_devices, dtype=jnp.int32)[:, None]
        first = jnp.full(self.ids.shape, num_devices, jnp.int32)
        first = first.at[self.slot].min(jnp.broadcast_to(device, self.slot.shape), mode="drop")
        is_first = first.at[self.slot].get(mode="fill", fill_value=num_devices) == device
        sums = base.at[jnp.where(is_first, self.slot, NOWHERE)].set(slices, mode="drop")
        rest = jnp.where(is_first, NOWHERE, self.slot)
        return add_in_turn(sums, rest, slices)


class Union(NamedTuple):
    """What all devices hold together.

    Attributes:
      rows: their rows, to be used where the verdict is ACCEPTED.
      num_accumulated: int32 ``[]``, gradients accepted by all.
      total_weight: ``[]``, what these weigh; ``None`` unless they are weighted.
      global_step: int32 ``[]``, the latest.
      tallies: int32 ``[t]``, of all, as `pack_tallies` packs them.
      verdict: int32 ``[]``, ACCEPTED, OVERFLOW or INVALID.
    """

    rows: UnionRows
    num_accumulated: jax.Array
    total_weight: jax.Array | None
    global_step: jax.Array
    tallies: jax.Array
    verdict: jax.Array


def pack_tallies(state: AccumulatorState) -> tuple[jax.Array, jax.Array]:
    """Gradients since `init` by verdict, then by age if ages are counted: int32 ``[t]``.

    Those of this device, and the part of them that all devices have in common.
    """
    own = (state.verdict_counts, state.staleness_counts)
    shared = (state.shared_verdicts, state.shared_staleness)
    packed = (jnp.concatenate([x for x in counts if x is not None]) for counts in (own, shared))
    return next(packed), next(packed)


def unpack_tallies(state: AccumulatorState, own: jax.Array, shared: jax.Array) -> AccumulatorState:
    """Returns ``state`` with these tallies."""
    (verdicts, ages), (shared_verdicts, shared_ages) = (
        jnp.split(packed, [len(Verdict)]) for packed in (own, shared)
    )
    state = dataclasses.replace(state, verdict_counts=verdicts, shared_verdicts=shared_verdicts)
    if state.staleness_counts is None:
        return state
    return dataclasses.replace(state, staleness_counts=ages, shared_staleness=shared_ages)


class _Tally(NamedTuple):
    """What every device has counted: int32 ``[n]``, and ``[n, t]`` as `pack_tallies` packs them."""

    num_rows: jax.Array
    num_accumulated: jax.Array
    num_shared: jax.Array
    global_step: jax.Array
    own: jax.Array
    shared: jax.Array
    weight: jax.Array  # [n], or [n, 0] unless gradients are weighted

    @classmethod
    def pack(cls, state: AccumulatorState) -> jax.Array:
        """One device's, as int32 that can be sent with its indices."""
        scalars = jnp.stack([getattr(state, name) for name in cls._fields[:4]])
        weight = state.total_weight
        words = [] if weight is None else [_as_words(weight[None])]
        return jnp.concatenate([scalars, *pack_tallies(state), *words])

    @classmethod
    def unpack(cls, packed: jax.Array, state: AccumulatorState) -> _Tally:
        """All devices', ``[n, ...]``."""
        size = pack_tallies(state)[0].shape[0]
        *scalars, own, shared, weight = jnp.split(
            packed, [1, 2, 3, 4, 4 + size, 4 + 2 * size], axis=1
        )
        if state.total_weight is not None:
            weight = _from_words(weight, state.total_weight.dtype)[:, 0]
        rows, accumulated, num_shared, step = (x[:, 0] for x in scalars)
        return cls(rows, accumulated, num_shared, step, own, shared, weight)


def _as_words(numbers: jax.Array) -> jax.Array:
    """The bits of ``[k]`` numbers as int32 ``[k]``, or ``[2 * k]`` where they take 64."""
    return jax.lax.bitcast_convert_type(numbers, jnp.int32).reshape(-1)


def _from_words(words: jax.Array, dtype: Any) -> jax.Array:
    """The numbers ``[n, k]`` that `_as_words` has made ``n`` rows of."""
    if dtype.itemsize > words.dtype.itemsize:
        words = words.reshape(words.shape[0], -1, 2)
    return jax.lax.bitcast_convert_type(words, dtype)


@jax.named_scope("jaxaccum.exchange")
def exchange_union(
    state: AccumulatorState,
    axis_name: AxisName,
    max_rows: int | None,
    exchange: Exchange | None,
    capacity: int | None = None,
) -> Union:
    """Exchanges what all devices hold; where this raises, nothing has been exchanged.

    The distinct rows of all devices may be ``capacity`` many, by default that of ``state``.
    """
    capacity = state.capacity if capacity is None else capacity
    num_devices = axis_size(axis_name)
    max_rows = _read_max_rows(state, max_rows)
    if _choose_exchange(state, num_devices, max_rows, exchange) == "dense":
        tally, rows = _exchange_dense(state, axis_name, num_devices, capacity)
        too_many = jnp.bool_(False)
    else:
        tally, rows = _exchange_rows(state, axis_name, max_rows, capacity)
        too_many = jnp.any(tally.num_rows > max_rows)
    verdict = jnp.select(
        [
            jnp.any(tally.num_shared > 0),
            too_many | (rows.num_rows > capacity),
        ],
        [jnp.int32(Verdict.INVALID), jnp.int32(Verdict.OVERFLOW)],
        jnp.int32(Verdict.ACCEPTED),
    )
    news = saturating_sum(tally.own - tally.shared)
    return Union(
        rows=rows,
        num_accumulated=saturating_sum(tally.num_accumulated),
        total_weight=None if state.total_weight is None else jnp.sum(tally.weight),
        global_step=jnp.max(tally.global_step),
        tallies=saturating_add(jnp.max(tally.shared, axis=0), news),
        verdict=verdict,
    )


def _exchange_rows(
    state: AccumulatorState, axis_name: AxisName, max_rows: int, capacity: int
) -> tuple[_Tally, UnionRows]:
    """Every device gets the first ``max_rows`` rows of all devices and sums them."""
    words = _as_words(state.counts[:max_rows])
    held = [state.indices[:max_rows], words, _Tally.pack(state)]
    indices, words, packed = jnp.split(
        all_gather(jnp.concatenate(held), axis_name), [max_rows, max_rows + words.size], axis=1
    )
    counts = _from_words(words, state.counts.dtype)
    values = all_gather(state.values[:max_rows], axis_name)
    tally = _Tally.unpack(packed, state)
    is_held = jnp.arange(max_rows, dtype=jnp.int32)[None, :] < tally.num_rows[:, None]
    ids = jnp.where(is_held, indices, NOWHERE)
    size, length = min(capacity, ids.size), state.dense_shape[0]
    if length is not None and is_bitmap_faster(length, ids.size):
        slot, num_distinct = _rank_in_bitmap(ids, length)
        slot = jnp.where(slot < size, slot, NOWHERE)
        distinct = jnp.full(size, NOWHERE, jnp.int32).at[slot].set(ids, mode="drop")
    else:
        distinct, num_distinct = find_distinct(ids.reshape(-1), size)
        slot = jnp.searchsorted(distinct, ids).astype(jnp.int32)
        is_in = is_held & (distinct.at[slot].get(mode="fill", fill_value=NOWHERE) == ids)
        slot = jnp.where(is_in, slot, NOWHERE)
    return tally, UnionRows(distinct, num_distinct, slot, values, counts)


def _rank_in_bitmap(ids: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """How many distinct ids lie below each, NOWHERE for NOWHERE; and how many there are in all."""
    num_words = max(-(-length // 32), 1)
    is_held = jnp.zeros(32 * num_words, bool).at[ids].set(True, mode="drop")
    words = as_words(is_held)
    num_held = jnp.sum(jax.lax.population_count(words), dtype=jnp.int32)
    return jnp.where(ids == NOWHERE, NOWHERE, rank_in_words(words, ids)), num_held


def find_distinct(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The lowest ``size`` distinct ids, ascending, NOWHERE last; and how many there are in all."""
    ids = jnp.sort(ids)
    is_first = (ids != NOWHERE) & jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    before = count_before(is_first)
    rank, num_distinct = before[:-1], before[-1]
    empty = jnp.full(size, NOWHERE, jnp.int32)
    slot = jnp.where(is_first, rank, NOWHERE)
    return empty.at[slot].set(ids, mode="drop"), num_distinct


def _exchange_dense(
    state: AccumulatorState, axis_name: AxisName, num_devices: int, capacity: int
) -> tuple[_Tally, UnionRows]:
    """Every device sums its share of the table over all devices, and gathers all shares."""
    tally = _Tally.unpack(all_gather(_Tally.pack(state), axis_name), state)
    slot = jnp.arange(state.capacity, dtype=jnp.int32)
    ids = jnp.where(slot < state.num_rows, state.indices, NOWHERE)
    length = state.dense_shape[0] or 0  # of the table
    share = -(-length // num_devices)

    def sum_over_devices(held: jax.Array) -> jax.Array:
        row = held.shape[1:]
        dense = jnp.zeros((num_devices * share, *row), held.dtype)
        dense = dense.at[ids].set(held, mode="drop").reshape(num_devices, share, *row)
        parts = all_to_all(dense, axis_name)
        sums = jax.lax.reduce(parts, np.zeros((), held.dtype), jax.lax.add, (0,))
        return all_gather(sums, axis_name).reshape(num_devices * share, *row)

    values, counts = sum_over_devices(state.values), sum_over_devices(state.counts)
    is_row = counts > 0
    before = count_before(is_row)
    slot, num_rows = before[:-1], before[-1]
    size = min(capacity, length)
    slot = jnp.where(is_row & (slot < size), slot, NOWHERE)
    every_row = jnp.arange(num_devices * share, dtype=jnp.int32)
    distinct = jnp.full(size, NOWHERE, jnp.int32).at[slot].set(every_row, mode="drop")
    # Of the whole table the rows that are held are gathered: as many are scattered later.
    slot = jnp.where(distinct == NOWHERE, NOWHERE, jnp.arange(size, dtype=jnp.int32))
    values, counts = (x.at[distinct].get(mode="fill", fill_value=0) for x in (values, counts))
    return tally, UnionRows(distinct, num_rows, slot[None], values[None], counts[None])


def as_names(axis_name: AxisName) -> tuple[Hashable, ...]:
    """Returns the axes that ``axis_name`` names, one or several."""
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def axis_size(axis_name: AxisName) -> int:
    """How many devices there are along the axis, or axes.

    Raises:
      ValueError: one of them is not mapped over here.
    """
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        bound = jax.sharding.get_abstract_mesh().manual_axes
        raise ValueError(
            f"axis_name must be an axis that jax.shard_map or jax.pmap maps over here, which are "
            f"{bound or 'none'}, got {axis_name!r}"
        ) from None


def all_gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """``x`` of all devices along the axis, ``[n, *x.shape]``, known to be alike on all of them."""
    is_manual = set(as_names(axis_name)) <= set(jax.sharding.get_abstract_mesh().manual_axes)
    # A vmapped axis knows nothing of what varies over a mesh.
    return jax.lax.all_gather(x, axis_name, to="invarying" if is_manual else "varying")


def all_to_all(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Sends ``x[i]`` to device ``i``; returns what all devices sent here, ``[n, ...]`` likewise."""
    return jax.lax.all_to_all(x, axis_name, 0, 0)  # type: ignore[no-untyped-call]


def _read_max_rows(state: AccumulatorState, max_rows: int | None) -> int:
    if max_rows is None:
        return state.capacity
    max_rows = operator.index(max_rows)
    if not 1 <= max_rows <= state.capacity:
        raise ValueError(
            f"max_rows must be from 1 to the capacity {state.capacity}, got {max_rows}"
        )
    return max_rows


def _choose_exchange(
    state: AccumulatorState, num_devices: int, max_rows: int, exchange: Exchange | None
) -> Exchange:
    """``exchange``, or what moves fewer bytes."""
    length = state.dense_shape[0]
    if exchange not in (None, *get_args(Exchange)):
        raise ValueError(f"exchange must be one of {get_args(Exchange)} or None, got {exchange!r}")
    if exchange == "dense" and length is None:
        raise ValueError(
            f"exchange must be 'rows' where the row count is unknown, got 'dense' for dense_shape "
            f"{state.dense_shape}"
        )
    if exchange is not None or length is None:
        return exchange or "rows"
    # Received by each device, in units of (n - 1) / n: all rows of the others; or its share of
    # the table from each of them, and the sums of all their shares.
    row_bytes = state.values.dtype.itemsize * math.prod(state.values.shape[1:])
    sent_as_rows = num_devices * max_rows * (row_bytes + 8)
    sent_dense = 2 * length * (row_bytes + 4)
    return "dense" if sent_dense < sent_as_rows else "rows"
