"""Counters that stay at the top: past ``2**31 - 1`` a wrapped one would turn negative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_TOP = 2**31 - 1


def saturating_add(count: jax.Array, more: ArrayLike) -> jax.Array:
    """Adds ``more >= 0`` to an int32 ``count``; both of any one shape."""
    total = count + jnp.asarray(more, jnp.int32)
    return jnp.where(total < count, jnp.int32(_TOP), total)  # less only where it has wrapped


def saturating_sum(counts: jax.Array) -> jax.Array:
    """Adds up int32 ``counts >= 0`` over their first axis."""
    return jax.lax.reduce(counts, jnp.int32(0), saturating_add, (0,))
