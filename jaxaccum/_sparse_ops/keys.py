"""Rows of indices as integer keys: folding and sorted search.

Everything here is integer structure, through which no gradient flows. ``n`` rows of ``d``
columns become *words*: a tuple of unsigned vectors ``[n]`` that compare, word by word, as the rows
compare column by column. One word does wherever the shape has fewer than ``2**32`` cells.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Words = tuple[jax.Array, ...]
DType = np.dtype[Any]  # NumPy leaves open of what kind
# Where searches start, and how many rows further on they end at most.
_Stretch = tuple[jax.Array, jax.Array]

# Shorter tables are searched without a directory, which would cost more than it saves.
_DIRECTORY_FROM = 4096
# Entries a directory bucket holds on average; 8 was the best of 4, 8, 16 and 32 at 65,536 and 1M.
_PER_BUCKET = 8
# Rows that the bounds of a directory are compared with first: five rounds in one pass.
_PIVOTS = 32


@dataclasses.dataclass(frozen=True)
class KeyLayout:
    """How the rows of indices into an array of one static shape fold into words.

    Every column has ``dim + 1`` values, the last being padding, so the padding row is the largest
    key and folding and unfolding need no case for it.

    Attributes:
      dims: the shape indexed.
      dtype: of the indices, int32 or int64.
    """

    dims: tuple[int, ...]
    dtype: DType

    @property
    def word(self) -> DType:
        """The unsigned type of a word: uint64 only for int64 indices that uint32 cannot fold."""
        wide = math.prod(d + 1 for d in self.dims) > 2**32 and self.dtype.itemsize == 8
        return np.dtype(np.uint64 if wide else np.uint32)

    @property
    def groups(self) -> list[list[int]]:
        """Adjacent dimensions that share a word; a rank of zero has one empty group."""
        limit = 2 ** (8 * self.word.itemsize)
        groups: list[list[int]] = [[]]
        for dim in self.dims:
            if math.prod(d + 1 for d in groups[-1]) * (dim + 1) > limit:
                groups.append([])
            groups[-1].append(dim)
        return groups

    @property
    def padding(self) -> list[int]:
        """The words of the padding row, which are also the largest of all words."""
        # Without columns there is no index past the end; 1 is a key that no real row has.
        return [math.prod(d + 1 for d in group) - 1 if group else 1 for group in self.groups]

    def fold(self, indices: jax.Array) -> tuple[Words, jax.Array]:
        """Returns the words of ``indices`` ``[n, d]`` and which rows lie within the shape.

        A row outside the shape is padding from its first offending column on, which keeps sorted
        rows sorted: (2, 9) of a 5 x 5 array becomes (2, 5), between the rows 2 and 3.
        """
        words, column = [], 0
        outside = jnp.zeros(indices.shape[:1], bool)
        for group in self.groups:
            key = jnp.zeros(indices.shape[:1], self.word)
            for dim in group:
                col = indices[:, column]
                outside = outside | (col < 0) | (col >= dim)
                col = jnp.where(outside, jnp.asarray(dim, self.dtype), col)
                key = key * jnp.asarray(dim + 1, self.word) + col.astype(self.word)
                column += 1
            words.append(key)
        return tuple(words), ~outside

    def unfold(self, words: Words) -> jax.Array:
        """Returns the rows ``[n, d]`` that fold into ``words``."""
        columns: list[jax.Array] = []
        for group, key in zip(reversed(self.groups), reversed(words), strict=True):
            for dim in reversed(group[1:]):
                base = jnp.asarray(dim + 1, self.word)
                columns.append(lax.rem(key, jnp.broadcast_to(base, key.shape)))
                key = lax.div(key, jnp.broadcast_to(base, key.shape))
            columns.extend([key] * bool(group))
        if not columns:
            return jnp.zeros((*words[0].shape, 0), self.dtype)
        return jnp.stack([col.astype(self.dtype) for col in reversed(columns)], axis=1)

    def pad(self, words: Words, live: jax.Array) -> Words:
        """Returns ``words`` with the padding row wherever ``live`` is false."""
        return tuple(
            jnp.where(live, w, jnp.asarray(p, self.word))
            for w, p in zip(words, self.padding, strict=True)
        )

    def is_padding(self, words: Words) -> jax.Array:
        """Which of ``words`` are the padding row."""
        return is_equal(words, tuple(jnp.asarray(p, self.word) for p in self.padding))


def is_less(a: Words, b: Words) -> jax.Array:
    """Whether the rows ``a`` come before the rows ``b``."""
    before = jnp.asarray(False)
    for x, y in zip(reversed(a), reversed(b), strict=True):
        before = (x < y) | ((x == y) & before)
    return before


def is_equal(a: Words, b: Words) -> jax.Array:
    """Whether the rows ``a`` are the rows ``b``."""
    same = jnp.asarray(True)
    for x, y in zip(a, b, strict=True):
        same = same & (x == y)
    return same


def take_rows(words: Words, positions: jax.Array) -> Words:
    """Returns the rows at ``positions``, the last one for positions past the end."""
    return tuple(take(w, jnp.minimum(positions, w.shape[0] - 1)) for w in words)


def take(vector: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns ``vector[positions]``; the caller vouches for the bounds."""
    return vector.at[positions].get(mode="promise_in_bounds", wrap_negative_indices=False)


def take_or_zero(array: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns ``array[positions]``, zeros for positions past the end."""
    if array.shape[0] == 0:  # XLA gathers nothing from nothing
        return jnp.zeros((*positions.shape, *array.shape[1:]), array.dtype)
    return array.at[positions].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def number_rows(words: Words) -> jax.Array:
    """Returns int32 ``[n]``, 0, 1, 2..., which to `jax.shard_map` differ by device if rows do."""
    return jnp.arange(len(words[0]), dtype=jnp.int32) + (words[0] & 0).astype(jnp.int32)


def starts_group(words: Words) -> jax.Array:
    """Which rows of sorted ``words`` differ from the row before them."""
    differs = ~is_equal(tuple(w[1:] for w in words), tuple(w[:-1] for w in words))
    return jnp.concatenate([jnp.ones(min(1, words[0].shape[0]), bool), differs])


def find_lower_bound(table: Words, queries: Words, largest: int | jax.Array) -> jax.Array:
    """Returns how many rows of ``table`` come before each query; see ``find_lower_bounds``."""
    return find_lower_bounds(table, largest, queries)[0]


def find_lower_bounds(
    table: Words, largest: int | jax.Array, *queries: Words
) -> tuple[jax.Array, ...]:
    """Returns for each of ``queries`` how many rows of ``table`` come before each of its rows.

    A directory over the high bits of the first word narrows each search to one bucket, and the
    fullest bucket decides how many rounds all of them take: about 6 instead of 17 for 65,536 rows
    spread evenly, never more than plain binary search needs for rows crowded into one bucket. On a
    GPU, whose host drives a loop, all rounds are written out instead, as one kernel a search.

    Args:
      table: ``[n]``, sorted; repetitions are allowed.
      largest: an upper bound of the first word in ``table``.
      *queries: ``[m]`` each, in any order.

    Returns:
      int32 ``[m]`` for each. The searches are apart: XLA runs them side by side.
    """
    (num_rows,) = table[0].shape
    if num_rows == 0:
        return tuple(jnp.zeros(asked[0].shape, jnp.int32) for asked in queries)

    def narrow(table: Words, largest: jax.Array, *queries: Words) -> tuple[jax.Array, ...]:
        if num_rows < _DIRECTORY_FROM:
            return tuple(_halve_all(table, q) for q in queries)
        bucket_of = _make_directory(table[0], largest)
        return tuple(_halve_from(table, q, *bucket_of(q[0])) for q in queries)

    def write_out(table: Words, largest: jax.Array, *queries: Words) -> tuple[jax.Array, ...]:
        return tuple(_halve_all(table, q, unroll=True) for q in queries)

    return lax.platform_dependent(
        table, jnp.asarray(largest, table[0].dtype), *queries,
        cuda=write_out, rocm=write_out, default=narrow,
    )  # fmt: skip


def _halve_all(table: Words, queries: Words, *, unroll: bool = False) -> jax.Array:
    """Binary search in the whole of a small table: rounds known in advance cost less to start."""
    (num_rows,) = table[0].shape
    levels = num_rows.bit_length()

    def halve(level: int, found: jax.Array) -> jax.Array:
        return _halve(table, queries, found, jnp.int32(1 << (levels - 1)) >> level)

    # The first round stands before the loop, whose carry must differ by device (`jax.shard_map`)
    # from the start if it ever does.
    first = halve(0, jnp.zeros(queries[0].shape, jnp.int32))
    return jnp.minimum(lax.fori_loop(1, levels, halve, first, unroll=unroll), num_rows)


def _halve_from(table: Words, queries: Words, first: jax.Array, widest: jax.Array) -> jax.Array:
    """Binary search in the ``widest`` rows from ``first`` on; before ``first`` all are smaller."""
    step = jnp.int32(1) << (31 - lax.clz(jnp.maximum(widest, 1)))
    found, _ = lax.while_loop(
        lambda carry: carry[1] > 0,
        lambda carry: (_halve(table, queries, *carry), carry[1] >> 1),
        (first, step),
    )
    return jnp.minimum(found, table[0].shape[0])


def _halve(table: Words, queries: Words, found: jax.Array, step: jax.Array) -> jax.Array:
    """One round of binary search: ``step`` rows on, where the row before still is too small.

    Rows past the end are taken for the last one, so that what is found may lie past the end.
    """
    return jnp.where(is_less(take_rows(table, found + (step - 1)), queries), found + step, found)


def _find_stretches(table: Words, queries: Words) -> _Stretch:
    """Returns which of ``_PIVOTS`` equal stretches each query falls into, and their length."""
    (num_rows,) = table[0].shape
    stride = -(-num_rows // _PIVOTS)
    pivots = tuple(w[stride::stride, None] for w in table)
    passed = is_less(pivots, tuple(q[None] for q in queries))
    first = jnp.sum(passed, axis=0, dtype=jnp.int32) * stride
    return first, jnp.int32(stride)


def _make_directory(table: jax.Array, largest: int | jax.Array) -> Callable[[jax.Array], _Stretch]:
    """Returns what maps queries to the start of their buckets and the size of the fullest."""
    num_rows, word = table.shape[0], table.dtype
    bits = (num_rows // _PER_BUCKET).bit_length() - 1
    used = 8 * word.itemsize - lax.clz(jnp.asarray(largest, word)).astype(jnp.int32)
    shift = jnp.maximum(used - bits, 0).astype(word)
    bounds = jnp.arange(2**bits, dtype=word) << shift
    starts = _halve_from((table,), (bounds,), *_find_stretches((table,), (bounds,)))
    widest = jnp.max(jnp.diff(starts, append=jnp.int32(num_rows)))

    def bucket_of(queries: jax.Array) -> _Stretch:
        bucket = jnp.minimum(queries >> shift, 2**bits - 1).astype(jnp.int32)
        return take(starts, bucket), widest

    return bucket_of


def sort_rows(words: Words, largest: int | jax.Array) -> tuple[Words, jax.Array]:
    """Returns the rows sorted, and the position of each in them: that of the first of its equals.

    Keys alone are sorted and then searched: a sort that carries positions along takes six times
    as long on the CPU (11 ms against 1.9 for 65,536 keys) as keys and search together.
    """
    ranked = tuple(lax.sort(words, num_keys=len(words)))
    return ranked, find_lower_bound(ranked, words, largest)


def ascends(words: Words) -> jax.Array:
    """Whether no row comes before the one in front of it."""
    return jnp.all(~is_less(tuple(w[1:] for w in words), tuple(w[:-1] for w in words)))


def is_in_order(words: Words, live: jax.Array) -> jax.Array:
    """Whether the live rows ascend without repetition and all others follow them."""
    rises = is_less(tuple(w[:-1] for w in words), tuple(w[1:] for w in words))
    return jnp.all((rises & live[:-1]) | ~live[1:])


def choose_dtype(*indices: jax.Array) -> DType:
    """The dtype that holds all of ``indices``: int64 as soon as one of them has 64 bits."""
    wide = any(i.dtype.itemsize == 8 for i in indices)
    return np.dtype(np.int64 if wide else np.int32)
