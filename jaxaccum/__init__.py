"""jaxaccum: sparse-gradient accumulation for JAX."""

from jaxaccum._slices import IndexedSlices
from jaxaccum._sparse_ops import (
    sparse_add,
    sparse_add_grad,
    sparse_add_jvp,
    sparse_slice,
    sparse_slice_grad,
    sparse_slice_jvp,
)

__all__ = [
    "IndexedSlices",
    "sparse_add",
    "sparse_add_grad",
    "sparse_add_jvp",
    "sparse_slice",
    "sparse_slice_grad",
    "sparse_slice_jvp",
]
