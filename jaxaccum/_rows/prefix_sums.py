"""Counting what comes before: prefix sums over words of bits.

On a CPU the steps of XLA's cumsum are slow, and end up inside whatever reads the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_WORD, _BLOCK = 32, 128


def count_before(mask: jax.Array) -> jax.Array:
    """How many of bool ``[n]`` are true before each position, and in all: int32 ``[n + 1]``."""
    (size,) = mask.shape
    words = as_words(jnp.pad(mask, (0, _WORD - size % _WORD)))
    below = (jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)[None]) - 1
    within = jax.lax.population_count(words[:, None] & below).astype(jnp.int32)
    before = sum_before(jax.lax.population_count(words).astype(jnp.int32))
    return (before[:, None] + within).reshape(-1)[: size + 1]


def as_words(mask: jax.Array) -> jax.Array:
    """Bool ``[32 * n]`` as the bits of uint32 ``[n]``, the lowest first."""
    bit = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)[None]
    return jnp.sum(jnp.where(mask.reshape(-1, _WORD), bit, 0), axis=1, dtype=jnp.uint32)


def rank_in_words(words: jax.Array, positions: jax.Array) -> jax.Array:
    """How many bits of ``words`` are set before each of the int32 ``positions`` within them."""
    word, bit = positions >> 5, (positions & 31).astype(jnp.uint32)
    before = sum_before(jax.lax.population_count(words).astype(jnp.int32))
    below = words.at[word].get(mode="fill", fill_value=0) & ((jnp.uint32(1) << bit) - 1)
    within = jax.lax.population_count(below).astype(jnp.int32)
    return before.at[word].get(mode="fill", fill_value=0) + within


def sum_before(counts: jax.Array) -> jax.Array:
    """The sum of what comes before each of int32 ``[n]``, numbers from 0 to below 2**17.

    Blocks are summed by a triangular matrix, in float32, which is exact up to 2**24.
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
