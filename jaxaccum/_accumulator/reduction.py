"""From sums to what `take` hands out: true quotients, and what XLA makes of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxaccum._accumulator.state import Reduction
from jaxaccum._rows.quotient import quotient


def reduce_sums(
    sums: jax.Array, counts: jax.Array, num_accumulated: jax.Array, reduction: Reduction
) -> jax.Array:
    """Divides ``sums`` of rows touched ``counts >= 1`` times as the reduction says.

    Both counts may be sums of positive weights instead, floats.
    """
    if reduction == "mean_per_gradient":
        counts = jnp.broadcast_to(jnp.where(num_accumulated > 0, num_accumulated, 1), counts.shape)
    elif reduction == "sum":
        return sums
    counts = jnp.broadcast_to(counts.reshape(-1, *[1] * (sums.ndim - 1)), sums.shape)
    if jnp.issubdtype(sums.dtype, jnp.integer):
        # In 32 bits at least, for a count need not fit a short integer; div truncates toward zero.
        wide = jnp.int32 if sums.dtype.itemsize < 4 else sums.dtype
        return jax.lax.div(sums.astype(wide), counts.astype(wide))
    if jnp.issubdtype(sums.dtype, jnp.complexfloating):
        counts = counts.astype(sums.real.dtype)
        return jax.lax.complex(quotient(sums.real, counts), quotient(sums.imag, counts))
    return quotient(sums, counts.astype(sums.dtype))
