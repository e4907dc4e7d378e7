"""Tables in shards: gradients go to the devices that own their rows, and rows to those who ask.

Of ``rows`` rows and ``n`` devices, device ``i`` owns ``rows / n`` from row ``i * rows / n`` on. Ids
are global outside the shards and local, counted from the shard's first row, inside. Letters: ``b``
ids a device brings, ``k`` of them it can send to each owner.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxaccum._accumulator.apply import add_claimed, check_matches, table_rows
from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._accumulator.row_index import NOWHERE, Claim, DirectMap
from jaxaccum._accumulator.state import AccumulatorState, Verdict, as_int32
from jaxaccum._distributed.exchange import (
    AxisName,
    all_gather,
    all_to_all,
    axis_size,
    find_distinct,
)
from jaxaccum._rows.indexed_slices import IndexedSlices, as_device_slices
from jaxaccum._rows.prefix_sums import count_before
from jaxaccum._rows.row_arithmetic import expand_to_rows
from jaxaccum._rows.shapes import padding_index
from jaxaccum._rows.unique_rows import unique_rows


def all_apply(
    state: AccumulatorState,
    grad: IndexedSlices,
    axis_name: AxisName,
    local_step: ArrayLike | None = None,
    *,
    bucket: int | None = None,
) -> tuple[AccumulatorState, jax.Array]:
    """Applies one gradient from each device, every row at the device that owns it.

    To the shards together it is as if `apply` had seen the gradients of all devices one after the
    other. All shards count the same gradients and verdicts; `take` is then ready on all or none,
    and gives each the rows it owns, by local ids. A gradient that is STALE or INVALID is refused by
    itself. OVERFLOW, however, refuses the gradients of all devices: a shard has too few slots
    left for its part of them, or a device has more than ``bucket`` distinct rows for one owner.

    Args:
      state: the accumulator of this device's shard, of ``[rows / n, *row]``, from `shard_init`.
      grad: this device's gradient of the whole table, ``[rows, *row]``, by global ids.
      axis_name: the mesh or `jax.pmap` axis, or axes, the table is sharded over.
      local_step: as in `apply`.
      bucket: how many rows a device can send to each owner; by default all its slices, which cannot
        overflow. Bytes and time follow it: with rows spread evenly, twice the slices divided by
        the devices is ample. Where the slices do not fit, those of each row are summed before they
        are sent, in the accumulator's dtype, so that only distinct rows count.

    Returns:
      The new state, and the `Verdict` of this device's gradient as an int32 scalar.

    Raises:
      TypeError: as `apply`.
      ValueError: as `apply`; called outside ``axis_name``; or a bad ``bucket``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> n = jax.local_device_count()
      >>> def step(ids):
      ...     state = jaxaccum.init((100, 1), capacity=4)  # of n * 100 rows
      ...     grad = jaxaccum.IndexedSlices(ids, jnp.ones((2, 1)), (n * 100, 1))
      ...     state, verdict = jaxaccum.all_apply(state, grad, "rows")
      ...     return state.num_accumulated, verdict
      >>> count, verdict = jax.pmap(step, axis_name="rows")(jnp.tile(jnp.array([7, 3]), (n, 1)))
      >>> count[0] == n
      Array(True, dtype=bool)

    Source: the row-wise sharding of TorchRec, whose devices exchange rows by an all-to-all.
    """
    num_devices = axis_size(axis_name)
    shard_length = _get_length(state)
    rows = shard_length * num_devices
    whole = (rows, *state.dense_shape[1:])
    grad = as_device_slices(grad)
    check_matches(dataclasses.replace(state, dense_shape=whole), grad)
    step = None if local_step is None else as_int32(local_step, "local_step")
    is_stale = jnp.bool_(False) if step is None else step < state.global_step
    ids, is_bad = table_rows(grad, rows)
    is_invalid = jnp.any(is_bad)
    ids = jnp.where(is_stale | is_invalid, NOWHERE, ids)
    verdict = jnp.where(is_invalid, jnp.int32(Verdict.INVALID), jnp.int32(Verdict.ACCEPTED))
    verdict = jnp.where(is_stale, jnp.int32(Verdict.STALE), verdict)

    route_ids = _make_router(shard_length, num_devices, bucket, ids.shape[0])
    route, values = route_ids(ids), grad.values
    if route.source.shape[1] < ids.shape[0]:
        # Where nothing can overflow, nobody waits for a sort, and 16 bits travel as 16 bits.
        values = values.astype(state.values.dtype)
        route, values = jax.lax.cond(
            route.fits, lambda: (route, values), lambda: _route_sums(route_ids, ids, values, whole)
        )
    ids = _deliver(route, route.local_ids, NOWHERE, axis_name)
    values = _deliver(route, values, 0, axis_name)
    state, all_fit = _add_parts(state, ids, values, route.fits, axis_name)

    refused = jnp.where(all_fit, jnp.int32(Verdict.ACCEPTED), jnp.int32(Verdict.OVERFLOW))
    verdict = jnp.where(verdict == Verdict.ACCEPTED, refused, verdict)
    kinds = jnp.arange(len(Verdict), dtype=jnp.int32)
    tally = jnp.sum(
        all_gather(verdict, axis_name)[:, None] == kinds[None, :], axis=0, dtype=jnp.int32
    )
    return dataclasses.replace(
        state,
        num_accumulated=saturating_add(state.num_accumulated, tally[Verdict.ACCEPTED]),
        verdict_counts=saturating_add(state.verdict_counts, tally),
    ), verdict


def all_lookup(
    shard: jax.Array, ids: jax.Array, axis_name: AxisName, *, bucket: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Looks rows of a sharded table up, wherever they are.

    Args:
      shard: ``[rows / n, *row]``, the rows this device owns.
      ids: int ``[b]``, the rows this device asks for, by global ids; the padding index ``rows``
        gives a row of zeros.
      axis_name: the mesh or `jax.pmap` axis, or axes, the table is sharded over.
      bucket: how many distinct ids a device can send to each owner; by default all it has, which
        cannot overflow.

    Returns:
      Rows ``[b, *row]``; and a `Verdict` as an int32 scalar: INVALID if one of this device's ids is
      out of range, else OVERFLOW if one of its buckets is, else ACCEPTED. An id that is out of
      range, or one too many for its bucket, gets a row of NaN (of the lowest number in a table of
      integers), so that a loss shows it even to those who drop the verdict.

    Raises:
      TypeError: ``ids`` are no integers.
      ValueError: called outside ``axis_name``, or a bad ``bucket``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> table = jnp.arange(8.0 * jax.local_device_count()).reshape(-1, 4, 2)
      >>> find = jax.pmap(lambda shard, ids: jaxaccum.all_lookup(shard, ids, "rows")[0],
      ...                 axis_name="rows")
      >>> find(table, jnp.full((len(table), 1), 3))[-1]
      Array([[6., 7.]], dtype=float32)

    Source: the row-wise sharding of TorchRec, whose devices exchange rows by an all-to-all.
    """
    num_devices = axis_size(axis_name)
    rows = shard.shape[0] * num_devices
    # A gradient without columns: its ids are checked and read as those of any other.
    asked = IndexedSlices(ids, jnp.zeros((jnp.shape(ids)[0], 0), jnp.float32), (rows, 0))
    asked = as_device_slices(asked)
    wanted, is_bad = table_rows(asked, rows)
    is_invalid = jnp.any(is_bad)
    route_ids = _make_router(shard.shape[0], num_devices, bucket, wanted.shape[0])
    route = route_ids(wanted)
    if route.source.shape[1] < wanted.shape[0]:
        route = jax.lax.cond(route.fits, lambda: route, lambda: _route_distinct(route_ids, wanted))
    found = shard.at[_deliver(route, route.local_ids, NOWHERE, axis_name)].get(
        mode="fill", fill_value=0
    )
    found = all_to_all(found, axis_name).reshape(-1, *shard.shape[1:])
    found = found.at[route.position].get(mode="fill")  # with NaN
    is_padding = expand_to_rows(asked.indices == rows, found)
    verdict = jnp.where(route.fits, jnp.int32(Verdict.ACCEPTED), jnp.int32(Verdict.OVERFLOW))
    return (
        jnp.where(is_padding, jnp.zeros((), found.dtype), found),
        jnp.where(is_invalid, jnp.int32(Verdict.INVALID), verdict),
    )


class _Route(NamedTuple):
    """Where ``b`` ids go: into buckets of ``k``, one for each owner.

    Attributes:
      local_ids: int32 ``[b]``, counted from the first row of the owner's shard.
      position: int32 ``[b]``, of each among ``[n * k]``; NOWHERE if skipped or one too many.
      source: int32 ``[n, k]``, which of the ids stands there; NOWHERE if none.
      fits: bool ``[]``, whether no owner has more than ``k``.
    """

    local_ids: jax.Array
    position: jax.Array
    source: jax.Array
    fits: jax.Array


_Router = Callable[[jax.Array], _Route]


def _make_router(shard_length: int, num_devices: int, bucket: int | None, num_ids: int) -> _Router:
    """Makes the function that sends ids to the owners of their rows."""
    bucket = max(num_ids, 1) if bucket is None else operator.index(bucket)
    if bucket < 1:
        raise ValueError(f"bucket must be at least 1, got {bucket}")
    return functools.partial(_route, shard_length, num_devices, bucket)


def _route(shard_length: int, num_devices: int, bucket: int, ids: jax.Array) -> _Route:
    owner = ids // max(shard_length, 1)
    is_owner = owner[None, :] == jnp.arange(num_devices, dtype=jnp.int32)[:, None]
    before = jax.vmap(count_before)(is_owner & (ids != NOWHERE)[None, :])
    rank = jnp.sum(jnp.where(is_owner, before[:, :-1], 0), axis=0, dtype=jnp.int32)
    position = jnp.where((ids != NOWHERE) & (rank < bucket), owner * bucket + rank, NOWHERE)
    order = jnp.arange(ids.shape[0], dtype=jnp.int32)
    source = jnp.full(num_devices * bucket, NOWHERE, jnp.int32).at[position].set(order, mode="drop")
    return _Route(
        local_ids=ids - owner * shard_length,
        position=position,
        source=source.reshape(num_devices, bucket),
        fits=jnp.all(before[:, -1] <= bucket),
    )


def _route_sums(
    route_ids: _Router, ids: jax.Array, values: jax.Array, whole: tuple[int | None, ...]
) -> tuple[_Route, jax.Array]:
    """Sums the slices of each row, and sends it once."""
    padding = padding_index(whole)
    unique = unique_rows(IndexedSlices(jnp.where(ids == NOWHERE, padding, ids), values, whole))
    ids = jnp.where(unique.indices == padding, NOWHERE, unique.indices)
    return route_ids(ids), unique.values


def _route_distinct(route_ids: _Router, ids: jax.Array) -> _Route:
    """Asks for each row once; all its repetitions find the same answer."""
    distinct, _ = find_distinct(ids, ids.shape[0])
    route = route_ids(distinct)
    position = route.position.at[jnp.searchsorted(distinct, ids)].get(
        mode="fill", fill_value=NOWHERE
    )
    return route._replace(position=position)


@jax.named_scope("jaxaccum.exchange")
def _deliver(route: _Route, x: jax.Array, fill: int, axis_name: AxisName) -> jax.Array:
    """What all devices send here of their ``x [b, ...]``: ``[n, k, ...]``."""
    if x.shape[0] == 0:  # nothing to gather from an empty array
        return jnp.full((*route.source.shape, *x.shape[1:]), fill, x.dtype)
    return all_to_all(x.at[route.source].get(mode="fill", fill_value=fill), axis_name)


def _add_parts(
    state: AccumulatorState,
    ids: jax.Array,
    values: jax.Array,
    is_routed: jax.Array,
    axis_name: AxisName,
) -> tuple[AccumulatorState, jax.Array]:
    """Adds what each device has sent, ``[n, k]`` slices; on all shards or on none."""
    row_index = cast(DirectMap, state.row_index)  # as its row count is known
    row_index, claim = row_index.claim(ids.reshape(-1), state.num_rows, state.capacity)
    refusals = all_gather(~(claim.fits & is_routed), axis_name)
    all_fit = ~jnp.any(refusals)
    # Where another shard overflows, this one gives its new slots back.
    new_ids = jnp.where(claim.is_first & ~all_fit, ids.reshape(-1), NOWHERE)
    state = dataclasses.replace(state, row_index=row_index.release(new_ids))
    slot = jnp.where(all_fit, claim.slot, NOWHERE).reshape(ids.shape)
    is_first = claim.is_first.reshape(ids.shape)

    def add(state: AccumulatorState, part: tuple[jax.Array, ...]) -> tuple[AccumulatorState, None]:
        slot, is_first, ids, values = part
        num_new = jnp.sum(is_first, dtype=jnp.int32)
        part_claim = Claim(slot, is_first, num_new, all_fit)
        return add_claimed(state, part_claim, ids, values, jnp.int32(1), is_whole=False), None

    parts = (slot, is_first, ids, values)
    state, _ = add(state, jax.tree.map(lambda x: x[0], parts))
    return jax.lax.scan(add, state, jax.tree.map(lambda x: x[1:], parts))[0], all_fit


def _get_length(state: AccumulatorState) -> int:
    rows = state.dense_shape[0]
    if rows is None:
        raise ValueError(
            f"state must have a known row count to be sharded, got dense_shape {state.dense_shape}"
        )
    if state.is_weighted or state.max_staleness:
        raise ValueError(
            "state must be made without max_staleness and weighted, which all_apply knows nothing "
            f"of, got {state.max_staleness} and {state.is_weighted}"
        )
    return rows
