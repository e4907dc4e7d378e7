"""Detours round weak spots of XLA's CPU backend, for as long as they are worth it.

Each says the version of jax it was measured on and what it gained there, and stands aside on other
platforms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxaccum._rows.quotient import quotient


def compute_with(rows: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns ``rows``, just gathered from a table at ``indices`` of 0 and above.

    XLA's CPU backend moves rows more slowly than it computes with them: those it loads in wide
    registers. So they are divided by a one that it cannot see through; a division is not put off to
    whoever reads the result. No number changes but subnormals, which all arithmetic there takes for
    zero. Measured on jax 0.10.2 and 0.12.0: a lazy step of Adam on 16,384 rows of a million of 64
    float32 takes 5.8 and 5.0 ms in place of 7.5 and 6.3. A bare gather gains fourfold, one that
    other arithmetic is fused with loses a third: a large `take` gains nothing, so it goes without.
    """
    if indices.shape[0] == 0 or not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows

    def divide(rows: jax.Array, indices: jax.Array) -> jax.Array:
        one = jnp.where(indices[0] < 0, 2, 1).astype(rows.dtype)
        return quotient(rows, jnp.broadcast_to(one, rows.shape))

    result: jax.Array = jax.lax.platform_dependent(
        rows, indices, cpu=divide, default=lambda rows, indices: rows
    )
    return result


def is_bitmap_faster(rows: int, num_ids: int) -> bool:
    """Whether ``num_ids`` of so many rows are put in order by a bitmap rather than by a sort.

    On a CPU a sort takes about 30 ns an id, and a bitmap about 0.25 ns a row. Elsewhere each of its
    scatters and look-ups is dear.
    """
    return rows <= 128 * num_ids


def bound_indices(indices: jax.Array, rows: int) -> jax.Array:
    """Returns ``indices``, none of which is beyond ``rows``, as numbers of their own.

    Rows taken from an accumulator are looked up by the same buffer of indices that the take has
    made. Read through a comparison, XLA's CPU backend lays the look-ups out better; why has not
    been found out. Measured on jax 0.10.2 and 0.12.0: a step of Adam on four micro-batches of 4,096
    ids of a million rows of 64 float32 takes 5.7 ms in place of 7.1.
    """

    def compare(indices: jax.Array) -> jax.Array:
        return jnp.where(indices < rows, indices, rows)

    result: jax.Array = jax.lax.platform_dependent(
        indices, cpu=compare, default=lambda indices: indices
    )
    return result


_BLOCK = 128


def sum_by_blocks(counts: jax.Array) -> jax.Array:
    """Returns the sum of what comes before each of int32 ``[n]``, numbers from 0 to below 2**17.

    The steps of XLA's cumsum are slow on a CPU, and end up inside whatever reads the result. Blocks
    are summed by a triangular matrix, in float32, which is exact up to 2**24. Measured on jax
    0.10.2 and 0.12.0: a take of 65,536 rows of one float32, out of a million, takes 0.98 and 0.81
    ms in place of 1.06 and 0.91; rows of 64 gain 2 to 5 percent.
    """
    (size,) = counts.shape
    if size <= _BLOCK:
        return jnp.cumsum(counts, dtype=jnp.int32) - counts
    blocks = jnp.pad(counts, (0, -size % _BLOCK)).reshape(-1, _BLOCK)
    triangle = jnp.triu(jnp.ones((_BLOCK, _BLOCK), jnp.float32), 1)
    within = jax.lax.dot(blocks.astype(jnp.float32), triangle, precision="highest")
    totals = jnp.sum(blocks, axis=1, dtype=jnp.int32)
    before = within.astype(jnp.int32) + (jnp.cumsum(totals) - totals)[:, None]
    kept: jax.Array = jax.lax.optimization_barrier(before.reshape(-1)[:size])  # type: ignore[no-untyped-call]
    return kept


def count_by_words(words: jax.Array) -> jax.Array:
    """Returns how many bits are set before each of uint32 ``words [n]``: int32 ``[32 * n]``.

    A cumsum over the single bits is slower. Measured on jax 0.10.2 and 0.12.0: an apply of 65,536
    ids takes 0.44 and 0.37 ms in place of 0.51 and 0.45 with rows of one float32, 1.23 and 1.12 in
    place of 1.24 and 1.22 with rows of 64.
    """
    below = (jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)[None]) - 1
    within = jax.lax.population_count(words[:, None] & below).astype(jnp.int32)
    before = sum_by_blocks(jax.lax.population_count(words).astype(jnp.int32))
    return (before[:, None] + within).reshape(-1)


def add_in_turn(sums: jax.Array, slot: jax.Array, slices: jax.Array) -> jax.Array:
    """Returns ``sums [m, ...]`` with ``slices [n, k, ...]`` added, part after part of the ``n``.

    Slots repeat only between parts. A GPU takes the updates of a scatter in an order of its own,
    each time another, so there is one scatter a part, in which no slot repeats. XLA's CPU backend
    takes them one by one, and first copies each part out of ``slices``: there one scatter does.
    Measured on jax 0.10.2 and 0.12.0: eight parts of 4,096 rows of 64 float32 are added in 0.62 ms
    in place of 0.73 and 0.80; no gain was seen with a quarter of the rows, or with four parts.

    Args:
      sums: what is added to.
      slot: int32 ``[n, k]``, a position in ``sums``, or one beyond its end for what is dropped.
      slices: in the dtype of ``sums``.
    """

    def add_all(sums: jax.Array, slot: jax.Array, slices: jax.Array) -> jax.Array:
        return sums.at[slot].add(slices, mode="drop")

    result: jax.Array = jax.lax.platform_dependent(
        sums, slot, slices, cpu=add_all, default=add_part_after_part
    )
    return result


def add_part_after_part(sums: jax.Array, slot: jax.Array, slices: jax.Array) -> jax.Array:
    """The same on every platform, by one scatter a part."""

    def add(sums: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return sums.at[part[0]].add(part[1], mode="drop"), None

    return jax.lax.scan(add, sums, (slot, slices))[0]
