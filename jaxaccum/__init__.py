"""jaxaccum: sparse-gradient accumulation for JAX."""

from jaxaccum._accumulator import apply, grow, merge, num_accumulated, set_step, take
from jaxaccum._collectives import all_merge, all_take
from jaxaccum._placement import per_device, row_specs, shard_init, shard_rows
from jaxaccum._sharded import shard_apply, shard_lookup
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
    "per_device",
    "row_specs",
    "set_step",
    "shard_apply",
    "shard_init",
    "shard_lookup",
    "shard_rows",
    "take",
]
