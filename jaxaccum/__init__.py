"""jaxaccum: sparse-gradient accumulation for JAX."""

from jaxaccum import raw_ops
from jaxaccum._accumulator.apply import apply
from jaxaccum._accumulator.merge import grow, merge
from jaxaccum._accumulator.state import AccumulatorState, Verdict, init, set_step
from jaxaccum._accumulator.take import take
from jaxaccum._coordinator.errors import CancelledError, DeadlineExceededError, InvalidArgumentError
from jaxaccum._distributed.all_merge import all_merge, all_take
from jaxaccum._distributed.mesh import replicate, shard_init, shard_rows, shard_specs
from jaxaccum._distributed.sharded_table import all_apply, all_lookup
from jaxaccum._optimizers.accumulate import accumulate
from jaxaccum._optimizers.apply_updates import apply_updates, count_invalid
from jaxaccum._optimizers.freeze_rows import freeze_rows
from jaxaccum._optimizers.lazy_rows import lazy_rows
from jaxaccum._optimizers.micro_batch_state import MicroBatchState
from jaxaccum._optimizers.rowwise_adagrad import rowwise_adagrad
from jaxaccum._optimizers.suggest_capacity import suggest_capacity
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.unique_rows import sum_duplicates
from jaxaccum._sparse_grad.value_and_sparse_grad import value_and_sparse_grad
from jaxaccum._sparse_ops.ops import (
    sparse_add,
    sparse_add_grad,
    sparse_add_jvp,
    sparse_slice,
    sparse_slice_grad,
    sparse_slice_jvp,
)
from jaxaccum._tensorflow.conditional_accumulator import SparseConditionalAccumulator

__all__ = [
    "AccumulatorState",
    "CancelledError",
    "DeadlineExceededError",
    "IndexedSlices",
    "InvalidArgumentError",
    "MicroBatchState",
    "SparseConditionalAccumulator",
    "Verdict",
    "accumulate",
    "all_apply",
    "all_lookup",
    "all_merge",
    "all_take",
    "apply",
    "apply_updates",
    "count_invalid",
    "freeze_rows",
    "grow",
    "init",
    "lazy_rows",
    "merge",
    "raw_ops",
    "replicate",
    "rowwise_adagrad",
    "set_step",
    "shard_init",
    "shard_rows",
    "shard_specs",
    "sparse_add",
    "sparse_add_grad",
    "sparse_add_jvp",
    "sparse_slice",
    "sparse_slice_grad",
    "sparse_slice_jvp",
    "suggest_capacity",
    "sum_duplicates",
    "take",
    "value_and_sparse_grad",
]
