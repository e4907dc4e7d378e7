"""jaxaccum: sparse-gradient accumulation for JAX."""

from jaxaccum._slices import IndexedSlices
from jaxaccum._sparse_grad import value_and_sparse_grad

__all__ = ["IndexedSlices", "value_and_sparse_grad"]
