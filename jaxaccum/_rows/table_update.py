"""Rows of an update added to a table: what ``apply_updates`` and ``table + update`` both do."""

from __future__ import annotations

import dataclasses

import jax

from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.unique_rows import (
    add_rows,
    fit_to_table,
    gather_rows,
    promote_dtypes,
    scatter_rows,
    sum_dtype,
    unique_rows,
)


def add_to_table(table: jax.Array, update: IndexedSlices, name: str) -> jax.Array:
    """Returns ``table`` with the rows of ``update`` added, in place where it is donated.

    Raises:
      ValueError: ``update``, called ``name``, does not fit, or has invalid indices (outside jit).
    """
    update = fit_to_table(update, table.shape, name)
    wide = sum_dtype(promote_dtypes(table.dtype, update.values.dtype))
    update = dataclasses.replace(update, values=update.values.astype(wide))
    if wide == table.dtype:
        return add_rows(table, update.indices, update.values)
    # Rounded once a row, so that narrow tables neither lose duplicates nor round twice.
    update = unique_rows(update)
    rows = gather_rows(table, update.indices).astype(wide) + update.values
    return scatter_rows(table, update.indices, rows)
