"""Detours round weak spots of XLA's CPU backend, for as long as they are worth it.

Each says the version of jax it was measured on and what it gained there, and stands aside on other
platforms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def all_true(mask: jax.Array) -> jax.Array:
    """Returns whether all of a bool array are true.

    XLA's CPU backend takes the least of bytes in half the time it takes to "and" bools, which it
    does one by one. Measured on jax 0.10.2 and 65,536 rows.
    """

    def take_least(mask: jax.Array) -> jax.Array:
        return jnp.min(mask.astype(jnp.int8), initial=1) == 1

    result: jax.Array = jax.lax.platform_dependent(mask, cpu=take_least, default=jnp.all)
    return result
