"""jaxaccum: sparse-gradient accumulation for JAX."""

from jaxaccum._slices import IndexedSlices

__all__ = ["IndexedSlices"]
