"""jaxaccum: sparse-gradient accumulation for JAX."""

from jaxaccum._accumulator import apply, grow, merge, num_accumulated, set_step, take
from jaxaccum._collectives import all_merge, all_take
from jaxaccum._slices import IndexedSlices
from jaxaccum._state import AccumulatorState, Verdict, init

__all__ = [
    "AccumulatorState",
    "IndexedSlices",
    "Verdict",
    "all_merge",
    "all_take",
    "apply",
    "grow",
    "init",
    "merge",
    "num_accumulated",
    "set_step",
    "take",
]
