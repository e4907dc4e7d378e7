"""Counting what comes before: prefix sums over masks and over words of bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxaccum._rows.cpu_workarounds import count_by_words, sum_by_blocks

_WORD = 32
# XLA for TPUs takes 18 s to compile a cumsum of a million numbers, and less than one for this many.
_LONGEST_CUMSUM = 2**16


def count_before(mask: jax.Array) -> jax.Array:
    """How many of bool ``[n]`` are true before each position, and in all: int32 ``[n + 1]``."""

    def count_bits(mask: jax.Array) -> jax.Array:
        (size,) = mask.shape
        return count_by_words(as_words(jnp.pad(mask, (0, _WORD - size % _WORD))))[: size + 1]

    def add_up(mask: jax.Array) -> jax.Array:
        return jnp.pad(jnp.cumsum(mask, dtype=jnp.int32), (1, 0))

    if mask.shape[0] > _LONGEST_CUMSUM:
        return count_bits(mask)
    # 4,096 positions are two kernels on an H100 in place of six, seven on a v5e in place of twelve.
    result: jax.Array = jax.lax.platform_dependent(mask, cpu=count_bits, default=add_up)
    return result


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
    """The sum of what comes before each of int32 ``[n]``, numbers from 0 to below 2**17."""

    def add_up(counts: jax.Array) -> jax.Array:
        return jnp.cumsum(counts, dtype=jnp.int32) - counts

    if counts.shape[0] > _LONGEST_CUMSUM:
        return sum_by_blocks(counts)
    result: jax.Array = jax.lax.platform_dependent(counts, cpu=sum_by_blocks, default=add_up)
    return result
