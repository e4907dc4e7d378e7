"""Rows of an update added to a table: what ``apply_updates`` and ``table + update`` both do."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.unique_rows import (
    fit_to_table,
    gather_rows,
    promote_dtypes,
    scatter_rows,
    unique_rows,
)


def add_to_table(table: jax.Array, update: IndexedSlices, name: str) -> jax.Array:
    """Returns ``table`` with the rows of ``update`` added, in place where it is donated.

    Raises:
      ValueError: ``update``, called ``name``, does not fit, or has invalid indices (outside jit).
    """
    fitted, values = fit_to_table(update, table.shape, name), jnp.asarray(update.values)
    wide = promote_dtypes(table.dtype, values.dtype)
    if wide == table.dtype:
        # Padding is dropped whatever its values are: nothing to be gained by zeroing those first.
        return table.at[fitted.indices].add(values.astype(wide), mode="drop")
    # Rounded once a row, so that narrow tables neither lose duplicates nor round twice.
    fitted = unique_rows(fitted)
    rows = gather_rows(table, fitted.indices).astype(wide) + fitted.values.astype(wide)
    return scatter_rows(table, fitted.indices, rows)
