"""jaxaccum: sparse-gradient accumulation for JAX."""

from jaxaccum._accumulator import apply, grow, merge, num_accumulated, set_step, take
from jaxaccum._slices import IndexedSlices
from jaxaccum._sparse_grad import value_and_sparse_grad
from jaxaccum._state import AccumulatorState, Verdict, init

__all__ = [
    "AccumulatorState",
    "IndexedSlices",
    "Verdict",
    "apply",
    "grow",
    "init",
    "merge",
    "num_accumulated",
    "set_step",
    "take",
    "value_and_sparse_grad",
]
