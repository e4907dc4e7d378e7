"""From sums to what `take` hands out: true quotients, and what XLA makes of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxaccum._accumulator.state import Reduction
from jaxaccum._rows.quotient import quotient


def reduce_sums(
    sums: jax.Array, counts: jax.Array, total: jax.Array, reduction: Reduction
) -> jax.Array:
    """Divides ``sums`` of rows as the reduction says.

    ``counts`` is how many gradients touched each row, ``total`` how many there were; or what they
    weighed, as floats. Where that is nothing, sums are zero and stay so.
    """
    if reduction == "sum":
        return sums
    if reduction == "mean_per_gradient":
        counts = jnp.broadcast_to(jnp.where(total > 0, total, jnp.ones_like(total)), counts.shape)
    elif jnp.issubdtype(counts.dtype, jnp.floating):  # a weight may be 0, a number of gradients not
        counts = jnp.where(counts > 0, counts, jnp.ones_like(counts))
    counts = jnp.broadcast_to(counts.reshape(-1, *[1] * (sums.ndim - 1)), sums.shape)
    if jnp.issubdtype(sums.dtype, jnp.integer):
        # In 32 bits at least, for a count need not fit a short integer; div truncates toward zero.
        wide = jnp.int32 if sums.dtype.itemsize < 4 else sums.dtype
        return jax.lax.div(sums.astype(wide), counts.astype(wide))
    if jnp.issubdtype(sums.dtype, jnp.complexfloating):
        counts = counts.astype(sums.real.dtype)
        return jax.lax.complex(quotient(sums.real, counts), quotient(sums.imag, counts))
    return quotient(sums, counts.astype(sums.dtype))
