"""jaxaccum: sparse-gradient accumulation for JAX."""

from jaxaccum import raw_ops
from jaxaccum._accumulator import apply, grow, merge, num_accumulated, set_step, take
from jaxaccum._conditional_accumulator import SparseConditionalAccumulator
from jaxaccum._errors import CancelledError, DeadlineExceededError, InvalidArgumentError
from jaxaccum._slices import IndexedSlices
from jaxaccum._sparse_ops import (
    sparse_add,
    sparse_add_grad,
    sparse_add_jvp,
    sparse_slice,
    sparse_slice_grad,
    sparse_slice_jvp,
)
from jaxaccum._state import AccumulatorState, Verdict, init

__all__ = [
    "AccumulatorState",
    "CancelledError",
    "DeadlineExceededError",
    "IndexedSlices",
    "InvalidArgumentError",
    "SparseConditionalAccumulator",
    "Verdict",
    "apply",
    "grow",
    "init",
    "merge",
    "num_accumulated",
    "raw_ops",
    "set_step",
    "sparse_add",
    "sparse_add_grad",
    "sparse_add_jvp",
    "sparse_slice",
    "sparse_slice_grad",
    "sparse_slice_jvp",
    "take",
]
