"""Where a row lives: from row ids to slots of a fixed-capacity buffer, without sorting.

Two indexes behind one interface. `DirectMap` keeps one int32 for each row of a known vocabulary;
`HashTable` knows only the rows it holds. Both offer

* ``claim(ids, num_rows, capacity)``: the slot of each id, new ids getting the next free ones, in
  the two steps ``bid`` and ``settle``;
* ``enter(ids)``: an empty index filled anew;
* ``drain(indices, num_rows)``: the held slots in ascending order of row, and an empty index.

Ids are int32 and NOWHERE where a position is to be skipped. All or nothing: where the new rows do
not fit, the index comes back bit for bit as it was.

No buffer is read after it has been overwritten, for XLA would copy it whole to keep the old
contents. What is needed later is read from the new buffer instead.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._rows.cpu_workarounds import is_bitmap_faster
from jaxaccum._rows.prefix_sums import count_before, rank_in_words
from jaxaccum._rows.public import pytree
from jaxaccum._rows.varying import vary_like

# Past the end of every table: scatters drop it. Also the map entry of a row without a slot.
NOWHERE = 2**31 - 1


class Bid(NamedTuple):
    """What ids ask for, so that several tables can be asked before any of them is changed.

    Attributes:
      ids: int32 ``[n]``, positions in the map.
      held: int32 ``[n]``, the slot a row has; NOWHERE if it has none, and for skipped ids.
      rank: int32 ``[n]``, which of the new rows it is; NOWHERE for all other ids.
      is_first: bool ``[n]``, as in `Claim`.
      num_new: int32 ``[]``, how many rows are new.
    """

    ids: jax.Array
    held: jax.Array
    rank: jax.Array
    is_first: jax.Array
    num_new: jax.Array

    def fits(self, num_rows: jax.Array, capacity: int) -> jax.Array:
        """Whether the new rows can be held beside the ``num_rows`` that are."""
        return num_rows + self.num_new <= capacity


class Claim(NamedTuple):
    """What `claim` found out about ``n`` ids.

    Attributes:
      slot: int32 ``[n]``; NOWHERE for skipped ids and where the claim was refused.
      is_first: bool ``[n]``, true once for each row that is new: at its first occurrence.
      num_new: int32 ``[]``, how many rows are new.
      fits: bool ``[]``, whether the new rows fit; if not, nothing was claimed.
    """

    slot: jax.Array
    is_first: jax.Array
    num_new: jax.Array
    fits: jax.Array


@pytree(data_fields=["slots"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DirectMap:
    """Slot of each row, NOWHERE where it has none; int32 ``[rows]``."""

    slots: jax.Array

    @classmethod
    def empty(cls, rows: int) -> DirectMap:
        """Returns the map of a table of ``rows`` rows, none of them held."""
        return cls(jnp.full(max(rows, 1), NOWHERE, jnp.int32))

    @jax.named_scope("jaxaccum.claim")
    def bid(self, ids: jax.Array, capacity: int) -> tuple[DirectMap, Bid]:
        """Finds out which rows have a slot and which are new; `settle` must follow."""

        def bid_in_map(slots: jax.Array, ids: jax.Array) -> tuple[jax.Array, Bid]:
            return _bid_in_map(slots, ids, capacity)

        slots, bid = jax.lax.platform_dependent(
            self.slots, ids, tpu=_look_up_sorted, default=bid_in_map
        )
        return DirectMap(slots), bid

    @jax.named_scope("jaxaccum.claim")
    def settle(
        self, bid: Bid, num_rows: jax.Array, capacity: int, fits: jax.Array
    ) -> tuple[DirectMap, Claim]:
        """Gives new rows the next free slots, or leaves the map as it was if they do not fit."""
        # What bid in the map itself becomes a slot, or is vacated again if not all rows fit.
        new_slot = jnp.where(bid.rank == NOWHERE, NOWHERE, num_rows + bid.rank)
        first = jnp.where(bid.is_first, bid.ids, NOWHERE)
        slots = self.slots.at[first].set(jnp.where(fits, new_slot, NOWHERE), mode="drop")
        slot = jnp.where(fits, jnp.minimum(bid.held, new_slot), NOWHERE)
        return DirectMap(slots), Claim(slot, bid.is_first, bid.num_new, fits)

    def claim(self, ids: jax.Array, num_rows: jax.Array, capacity: int) -> tuple[DirectMap, Claim]:
        """Finds a slot for each id; see the module's docstring."""
        index, bid = self.bid(ids, capacity)
        return index.settle(bid, num_rows, capacity, bid.fits(num_rows, capacity))

    def enter(self, ids: jax.Array) -> DirectMap:
        """Returns an empty map filled: each of the distinct ``ids`` gets the slot it stands at."""
        slot = jnp.arange(ids.shape[0], dtype=jnp.int32)
        return DirectMap(self.slots.at[ids].set(slot, mode="drop"))

    def drain(self, indices: jax.Array, num_rows: jax.Array) -> tuple[DirectMap, jax.Array]:
        """Returns an empty map and int32 ``[capacity]``, slots ascending by row, then NOWHERE."""
        slot = jnp.arange(indices.shape[0], dtype=jnp.int32)
        held = jnp.where(slot < num_rows, indices, NOWHERE)
        held, order = jax.lax.platform_dependent(
            held, self.slots, cpu=_ascending_on_cpu, default=_ascending_by_sort
        )
        return self.release(held), order

    def release(self, ids: jax.Array) -> DirectMap:
        """Returns the map without the rows ``ids``, all of them held or NOWHERE."""
        return DirectMap(self.slots.at[ids].set(NOWHERE, mode="drop"))


def _bid_in_map(slots: jax.Array, ids: jax.Array, capacity: int) -> tuple[jax.Array, Bid]:
    """Enters into the map where each new id stands; ranks are in order of first occurrence."""
    # Each id bids for its row with its position, put above every slot in use: a row that has a
    # slot keeps it, a free one goes to its first bidder. Scatter-min makes that the same whatever
    # the order of execution.
    bid = capacity + jnp.arange(ids.shape[0], dtype=jnp.int32)
    slots = slots.at[ids].min(bid, mode="drop")
    winner = slots.at[ids].get(mode="fill", fill_value=NOWHERE)
    is_first = winner == bid
    before = count_before(is_first)
    # A repetition finds its rank through the position that won; reading it off the small array
    # spares a second look into the map.
    is_held = winner < capacity
    position = jnp.where(is_held, NOWHERE, winner - capacity)
    rank = before[:-1].at[position].get(mode="fill", fill_value=NOWHERE)
    return slots, Bid(ids, jnp.where(is_held, winner, NOWHERE), rank, is_first, before[-1])


def _look_up_sorted(slots: jax.Array, ids: jax.Array) -> tuple[jax.Array, Bid]:
    """The same without writing; ranks are in ascending order of row.

    A TPU scatters and gathers entry by entry, in about eight cycles each for numbers and 65 for
    rows in HBM, and sorts pairs in less than one. So ids are sorted to find the first of each row.
    """
    position = jnp.arange(ids.shape[0], dtype=jnp.int32)
    row, order = jax.lax.sort((ids, position), num_keys=1, is_stable=True)
    held = slots.at[row].get(mode="fill", fill_value=NOWHERE)
    starts = jnp.concatenate([jnp.ones(1, bool), row[1:] != row[:-1]])
    is_new = (held == NOWHERE) & (row != NOWHERE)
    is_first = is_new & starts
    num_new = jnp.cumsum(is_first, dtype=jnp.int32)
    rank = jnp.where(is_new, num_new - 1, NOWHERE)
    _, held, rank, first = jax.lax.sort((order, held, rank, is_first.astype(jnp.int32)), num_keys=1)
    return vary_like(slots, along=ids), Bid(ids, held, rank, first == 1, num_new[-1])


def _ascending_on_cpu(held: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows in any order and their slots in ascending order of row; NOWHERE for no row."""
    capacity, rows = held.shape[0], slots.shape[0]
    if is_bitmap_faster(rows, capacity):
        rank, slot = _rank_in_bitmap(held, rows), jnp.arange(capacity, dtype=jnp.int32)
        return held, jnp.full(capacity, NOWHERE, jnp.int32).at[rank].set(slot, mode="drop")
    # Sorting ids alone and looking their slots up beats sorting pairs threefold.
    held = jnp.sort(held)
    order = slots.at[held].get(mode="fill", fill_value=NOWHERE)
    # Every row held has a slot. Reading this off the slots lets the look-up feed the scatter that
    # follows; otherwise XLA copies the map where the two stand in a conditional.
    return jnp.where(order == NOWHERE, NOWHERE, held), order


def _ascending_by_sort(held: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same where a sort is cheap and each scatter or look-up by entry is dear."""
    del slots
    slot = jnp.arange(held.shape[0], dtype=jnp.int32)
    held, order = jax.lax.sort((held, slot), num_keys=1)
    return held, jnp.where(held == NOWHERE, NOWHERE, order)


def _rank_in_bitmap(ids: jax.Array, rows: int) -> jax.Array:
    """How many of the distinct ``ids`` lie below each; NOWHERE for ids past the last row."""
    word, bit = ids >> 5, (ids & 31).astype(jnp.uint32)
    num_words = -(-rows // 32)
    words = jnp.zeros(num_words, jnp.uint32).at[word].add(jnp.uint32(1) << bit, mode="drop")
    return jnp.where(ids < rows, rank_in_words(words, ids), NOWHERE)


@pytree(data_fields=["keys", "places"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class HashTable:
    """Open addressing with double hashing: ``keys`` hold the row of each place, int32 ``[places]``.

    ``places`` maps places to slots, as a `DirectMap` maps rows: once each id has found its place,
    a hash table is a direct map of its places.
    """

    keys: jax.Array
    places: DirectMap

    @classmethod
    def empty(cls, capacity: int) -> HashTable:
        """Returns a table that never gets fuller than about a half with ``capacity`` rows."""
        num_places = _prime_up_to(2 * capacity)
        return cls(jnp.full(num_places, NOWHERE, jnp.int32), DirectMap.empty(num_places))

    def bid(self, ids: jax.Array, capacity: int) -> tuple[HashTable, Bid]:
        """Enters ids, and tells how many rows are new; `settle` must follow."""
        keys, place = _insert(self.keys, ids, capacity)
        places, bid = self.places.bid(place, capacity)
        return HashTable(keys, places), bid

    def settle(
        self, bid: Bid, num_rows: jax.Array, capacity: int, fits: jax.Array
    ) -> tuple[HashTable, Claim]:
        """Gives new rows the next free slots, or restores the table if they do not fit."""
        places, claim = self.places.settle(bid, num_rows, capacity, fits)
        refused = jnp.where(claim.is_first & ~fits, bid.ids, NOWHERE)
        return HashTable(self.keys.at[refused].set(NOWHERE, mode="drop"), places), claim

    def claim(self, ids: jax.Array, num_rows: jax.Array, capacity: int) -> tuple[HashTable, Claim]:
        """Finds a slot for each id; see the module's docstring."""
        index, bid = self.bid(ids, capacity)
        return index.settle(bid, num_rows, capacity, bid.fits(num_rows, capacity))

    def enter(self, ids: jax.Array) -> HashTable:
        """Returns an empty table filled: each of the distinct ``ids`` gets the slot it stands at.

        There are no more ids than the table was made for.
        """
        keys, place = _insert(self.keys, ids, ids.shape[0])
        return HashTable(keys, self.places.enter(place))

    def drain(self, indices: jax.Array, num_rows: jax.Array) -> tuple[HashTable, jax.Array]:
        """Returns an empty table and int32 ``[capacity]``, slots ascending by row, then NOWHERE."""
        slot = jnp.arange(indices.shape[0], dtype=jnp.int32)
        held = jnp.where(slot < num_rows, indices, NOWHERE)
        return jax.lax.platform_dependent(
            self, held, cpu=HashTable._drain_by_place, default=HashTable._drain_whole
        )

    def _drain_by_place(self, held: jax.Array) -> tuple[HashTable, jax.Array]:
        ids = jnp.sort(held)
        # Sorting ids alone and looking their slots up beats sorting pairs threefold.
        place = _find(self.keys, ids)
        order = self.places.slots.at[place].get(mode="fill", fill_value=NOWHERE)
        keys = self.keys.at[place].set(NOWHERE, mode="drop")
        places = self.places.slots.at[place].set(NOWHERE, mode="drop")
        return HashTable(keys, DirectMap(places)), order

    def _drain_whole(self, held: jax.Array) -> tuple[HashTable, jax.Array]:
        # Sixteen bytes a slot are written in one stroke, where looking places up is a loop and
        # vacating them two scatters. Slots fill from the first: it tells whether any is in use.
        _, order = _ascending_by_sort(held, self.places.slots)
        is_empty = held[0] == NOWHERE
        return jax.tree.map(lambda leaf: jnp.where(is_empty, leaf, NOWHERE), self), order


def _prime_up_to(bound: int) -> int:
    """The largest prime up to ``bound >= 2``: any step of a probe then visits every place."""
    candidate = bound
    while any(candidate % d == 0 for d in range(2, int(candidate**0.5) + 1)):
        candidate -= 1
    return candidate


def _probe_sequence(ids: jax.Array, num_places: int) -> tuple[jax.Array, jax.Array]:
    """First place and step of each id (double hashing), int32 ``[n]`` each."""

    def mix(x: jax.Array) -> jax.Array:  # the finaliser of MurmurHash3 (Appleby)
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    first = mix(ids.astype(jnp.uint32))
    step = mix(first + jnp.uint32(0x9E3779B9)) % jnp.uint32(max(num_places - 1, 1)) + 1
    return (first % jnp.uint32(num_places)).astype(jnp.int32), step.astype(jnp.int32)


def _advance(place: jax.Array, step: jax.Array, num_places: int) -> jax.Array:
    # place + step may exceed int32, num_places - step cannot.
    gap = num_places - step
    return jnp.where(place >= gap, place - gap, place + step)


_Probe = tuple[jax.Array, jax.Array, jax.Array]  # keys; place and "still probing" of each id
# On a GPU the host asks before every round of a loop whether it is the last. A table a quarter full
# leaves one id in 4**8 = 65,536 without a place after eight, one half full one in 256.
_ROUNDS_AHEAD = 8


@jax.named_scope("jaxaccum.claim")
def _insert(keys: jax.Array, ids: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Enters ids into the table: new keys, and the place of each id.

    A gradient with more rows than the table has places would fill it and probe on for ever; where
    the shapes do not rule that out, probing stops once more than ``capacity`` keys are in. Ids may
    then be without a place, but those that have one are too many already.
    """
    num_places = keys.shape[0]
    first, step = _probe_sequence(ids, num_places)

    def unfinished(carry: _Probe) -> jax.Array:
        keys, _, active = carry
        if ids.shape[0] <= num_places - capacity:
            return jnp.any(active)
        return jnp.any(active) & (jnp.sum(keys != NOWHERE) <= capacity)

    def probe(carry: _Probe) -> _Probe:
        keys, place, active = carry
        # Those who find their place free compete for it, and the lowest id wins; only free places
        # are written, so no row that is held can be ousted.
        candidate = jnp.where(active, place, NOWHERE)
        is_free = keys.at[candidate].get(mode="fill", fill_value=0) == NOWHERE
        keys = keys.at[jnp.where(is_free, place, NOWHERE)].min(ids, mode="drop")
        active &= keys.at[candidate].get(mode="fill", fill_value=NOWHERE) != ids
        return keys, jnp.where(active, _advance(place, step, num_places), place), active

    # Rounds before the loop: at least one, for what it returns varies over the mesh axes of keys
    # and ids both, as the carry of a loop under `jax.shard_map` must from the start.
    def probe_times(rounds: int) -> Callable[[_Probe], _Probe]:
        # The barrier keeps the reads of a round before the writes of the next.
        def next_round(carry: _Probe, _: int) -> _Probe:
            return probe(jax.lax.optimization_barrier(carry))  # type: ignore[no-untyped-call]

        return lambda carry: functools.reduce(next_round, range(rounds - 1), probe(carry))

    start = jax.lax.platform_dependent(
        (keys, first, ids != NOWHERE),
        cuda=probe_times(_ROUNDS_AHEAD),
        rocm=probe_times(_ROUNDS_AHEAD),
        default=probe_times(1),
    )
    keys, place, active = jax.lax.while_loop(unfinished, probe, start)
    return keys, jnp.where((ids == NOWHERE) | active, NOWHERE, place)


def _find(keys: jax.Array, ids: jax.Array) -> jax.Array:
    """Place of each id, all of them held; NOWHERE for NOWHERE."""
    first, step = _probe_sequence(ids, keys.shape[0])

    def probe(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        place, active = carry
        active &= keys.at[jnp.where(active, place, NOWHERE)].get(mode="fill", fill_value=0) != ids
        return jnp.where(active, _advance(place, step, keys.shape[0]), place), active

    start = probe((first, ids != NOWHERE))  # see _insert
    place, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), probe, start)
    return jnp.where(ids == NOWHERE, NOWHERE, place)
