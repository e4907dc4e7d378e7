"""Where each stored entry of the operands lands in the result of a sparse add or slice.

Pure structure over plain arrays, compiled once a layout. *Places* are positions in the result;
an entry that has none gets one past its end, which scatters drop and gathers fill with zero.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaccum._rows.prefix_sums import count_before
from jaxaccum._sparse_ops import keys
from jaxaccum._sparse_ops.keys import DType


class Flags(NamedTuple):
    """What a BCOO promises of its indices; both are taken at their word."""

    is_sorted: bool
    is_unique: bool


class AddSpec(NamedTuple):
    """The static part of an addition."""

    layout: keys.KeyLayout
    a: Flags
    b: Flags
    nse: int


class SliceSpec(NamedTuple):
    """The static part of a slice.

    Sorted, unique rows are cut without folding any, and ``layouts``, that of the operand and that
    of the result, is None: so one program serves slices of all shapes.
    """

    layouts: tuple[keys.KeyLayout, keys.KeyLayout] | None
    flags: Flags
    nse: int


class Limit(NamedTuple):
    """The magnitude below which a sum of two present entries is dropped.

    ``exceeds`` says that no magnitude of the type reaches it, ``smallest`` is the limit otherwise.
    """

    smallest: jax.Array
    exceeds: jax.Array


class Window(NamedTuple):
    """The rows a slice keeps, ``low <= row < low + reach``, moved by ``-shift``; each ``[d]``.

    ``past_end`` is the shape of the result, which is its padding row.
    """

    low: jax.Array
    reach: jax.Array
    shift: jax.Array
    past_end: jax.Array


class Placed(NamedTuple):
    """A result and how its entries came there."""

    data: jax.Array
    indices: jax.Array
    num_entries: jax.Array
    places: tuple[jax.Array, ...]


class _Operand(NamedTuple):
    """Sorted rows with the sum of equal ones at the first of them; ``slot``: where each went."""

    words: keys.Words
    live: jax.Array
    values: jax.Array
    slot: jax.Array | None


@functools.partial(jax.jit, static_argnums=0)
def place_add(
    spec: AddSpec,
    a_data: jax.Array,
    b_data: jax.Array,
    a_indices: jax.Array,
    b_indices: jax.Array,
    limit: Limit | None,
) -> Placed:
    """Merges two operands: an entry's place is the number of kept ones before it in both of them.

    The keys of the rows, with 4 in both operands; what is kept before an entry of a is counted in
    a and, up to where the entry would stand there, in b::

        a           1   4       9       b            2   4   7
        before in a 0   1       2       before in b  0   -   1
        found in b  0   1       3       found in a   1   1   2   (kept entries of a: 1, 4, 9)
        before in b 0   1       2       before in a  1   -   2
        place       0   2       4       place        1   2   3

    The 4 of b is not kept by itself: its value is in the sum that a's 4 carries, and its own place
    is that of a's. Where ``limit`` drops the sum, neither is kept and both places lie past the end.
    """
    a = _prepare(spec.layout, spec.a, a_data, a_indices)
    b = _prepare(spec.layout, spec.b, b_data, b_indices)
    a_in_b, a_matched = _search(spec.layout, b, a)
    b_in_a, b_matched = _search(spec.layout, a, b)
    total = jnp.where(a_matched, a.values + keys.take_or_zero(b.values, a_in_b), a.values)
    keep_a = a.live if limit is None else a.live & ~(a_matched & ~_reaches(total, limit))
    keep_b = b.live & ~b_matched
    before_a, before_b = count_before(keep_a), count_before(keep_b)
    place_a = jnp.where(keep_a, before_a[:-1] + keys.take(before_b, a_in_b), spec.nse)
    place_b = jnp.where(keep_b, before_b[:-1] + keys.take(before_a, b_in_a), spec.nse)
    data = jnp.zeros(spec.nse, total.dtype)
    data = data.at[place_a].set(total, mode="drop").at[place_b].set(b.values, mode="drop")
    words = [
        jnp.full(spec.nse, pad, spec.layout.word)
        .at[place_a].set(wa, mode="drop")
        .at[place_b].set(wb, mode="drop")
        for pad, wa, wb in zip(spec.layout.padding, a.words, b.words, strict=True)
    ]  # fmt: skip
    # An entry of b that a has too lies where a's does, or nowhere if their sum was dropped.
    goes_b = jnp.where(b_matched, keys.take_or_zero(place_a, b_in_a), place_b)
    places = _from_slots(place_a, a.slot), _from_slots(goes_b, b.slot)
    indices = spec.layout.unfold(tuple(words))
    num_entries = before_a[-1] + before_b[-1]
    return Placed(data, indices, num_entries, places)


def _prepare(layout: keys.KeyLayout, flags: Flags, data: jax.Array, indices: jax.Array) -> _Operand:
    words, live = layout.fold(indices)
    largest = layout.padding[0]
    if flags.is_sorted and flags.is_unique:
        return _Operand(words, live, data, None)
    if flags.is_sorted:
        slot = keys.find_lower_bound(words, words, largest)
        return _Operand(words, live & keys.starts_group(words), sum_at(slot, data, len(data)), slot)
    padded = layout.pad(words, live)

    def rank() -> tuple[keys.Words, jax.Array, jax.Array]:
        ranked, slot = keys.sort_rows(padded, largest)
        return ranked, slot, sum_at(slot, data, len(data))

    # Most indices without the flags are in order all the same, and looking costs next to nothing.
    ranked, slot, values = lax.cond(
        keys.is_in_order(padded, live),
        lambda: (padded, keys.number_rows(padded), data),
        rank,
    )
    return _Operand(ranked, keys.starts_group(ranked) & ~layout.is_padding(ranked), values, slot)


def _search(
    layout: keys.KeyLayout, table: _Operand, asked: _Operand
) -> tuple[jax.Array, jax.Array]:
    """Returns how many rows of ``table`` come before each asked one, and whether it is there."""
    found = keys.find_lower_bound(table.words, asked.words, layout.padding[0])
    if len(table.values) == 0:
        return found, jnp.zeros(found.shape, bool)
    is_equal = keys.is_equal(keys.take_rows(table.words, found), asked.words)
    return found, (found < len(table.values)) & is_equal & asked.live


def _reaches(total: jax.Array, limit: Limit) -> jax.Array:
    """Whether sums are kept: no less than the limit, or NaN, which must not vanish unseen."""
    size = measure(total)
    kept = (limit.smallest <= size) & ~limit.exceeds
    return kept | jnp.isnan(size) if jnp.issubdtype(size.dtype, jnp.inexact) else kept


def measure(values: jax.Array) -> jax.Array:
    """Returns ``|values|``, unsigned for integers: the least of them has no signed opposite."""
    if jnp.issubdtype(values.dtype, jnp.inexact):
        return jnp.abs(values)
    word = choose_magnitude_dtype(values.dtype)
    wide = values.astype(word)
    if jnp.issubdtype(values.dtype, jnp.signedinteger):
        wide = jnp.where(values < 0, jnp.zeros((), word) - wide, wide)
    return wide


def choose_magnitude_dtype(dtype: DType) -> DType:
    """Returns the dtype of ``|values|``: real for complex, unsigned for integers."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(f"float{4 * dtype.itemsize}")
    if jnp.issubdtype(dtype, jnp.inexact):
        return dtype
    return np.dtype(np.uint64 if dtype.itemsize == 8 else np.uint32)


@functools.partial(jax.jit, static_argnums=0)
def place_slice(spec: SliceSpec, data: jax.Array, indices: jax.Array, window: Window) -> Placed:
    """Moves the rows inside the window up to the front of the result."""
    low, reach, shift, past_end = (w[None] for w in window)
    inside = jnp.all((indices >= low) & (indices - low < reach), axis=1)

    def in_line(starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        before = count_before(starts)
        return jnp.where(inside, before[1:] - 1, spec.nse), before[-1]

    def rank(out: keys.KeyLayout) -> tuple[jax.Array, jax.Array]:
        words, _ = out.fold(jnp.where(inside[:, None], indices - shift, past_end))
        ranked, slot = keys.sort_rows(words, out.padding[0])
        before = count_before(keys.starts_group(ranked) & ~out.is_padding(ranked))
        return jnp.where(inside, keys.take(before, slot), spec.nse), before[-1]

    if spec.layouts is None:
        place, num_entries = in_line(inside)
    else:
        layout, out = spec.layouts
        whole, _ = layout.fold(indices)
        starts = inside & keys.starts_group(whole)
        if spec.flags.is_sorted:
            place, num_entries = in_line(starts)
        else:
            is_sorted = keys.ascends(whole)
            place, num_entries = lax.cond(is_sorted, lambda: in_line(starts), lambda: rank(out))
    # What came to a place is scattered once and everything else gathered: XLA's gathers on the CPU
    # are cheaper than its scatters, dropped elements included.
    source = jnp.full(spec.nse, len(data), jnp.int32)
    source = source.at[place].set(jnp.arange(len(data), dtype=jnp.int32), mode="drop")
    rows = keys.take_or_zero(indices, source) - shift
    rows = jnp.where((source < len(data))[:, None], rows, past_end)
    if spec.flags.is_unique:
        return Placed(keys.take_or_zero(data, source), rows, num_entries, (place,))
    is_real = jnp.arange(spec.nse, dtype=jnp.int32) < num_entries
    summed = sum_at(place, data, spec.nse)
    return Placed(jnp.where(is_real, summed, jnp.zeros_like(summed)), rows, num_entries, (place,))


def sum_at(places: jax.Array, values: jax.Array, size: int) -> jax.Array:
    """Returns ``[size]`` with the sums of ``values`` at their places, and zeros of either sign."""
    if values.dtype == bool:
        return sum_at(places, values.astype(jnp.int32), size) > 0
    # Negative zero is the neutral element: sums that start from it keep the sign of a lone -0.
    return (-jnp.zeros(size, values.dtype)).at[places].add(values, mode="drop")


def _from_slots(places: jax.Array, slot: jax.Array | None) -> jax.Array:
    return places if slot is None else keys.take(places, slot)
