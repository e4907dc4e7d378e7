"""Division of floats that is exact to the last bit, whatever XLA would make of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxaccum._rows.on_mesh import match


def quotient(sums: jax.Array, counts: jax.Array) -> jax.Array:
    """Divides floats; both arrays are of one shape."""
    # XLA on the CPU turns a division by a broadcast into a product with the reciprocal, one ulp off
    # in a quarter of the cases. A selection keeps it from seeing the broadcast, and costs less than
    # a barrier, which would write the counts out; NaN stays NaN whatever it is divided by.
    counts = match(counts, sums)
    return sums / jnp.where(jnp.isnan(sums), jnp.ones_like(counts), counts)
