"""jaxaccum: sparse-gradient accumulation for JAX."""

from jaxaccum import raw_ops
from jaxaccum._accumulator.apply import apply
from jaxaccum._accumulator.merge import grow, merge
from jaxaccum._accumulator.state import AccumulatorState, Reduction, Verdict, init, set_step
from jaxaccum._accumulator.take import take
from jaxaccum._coordinator.errors import CancelledError, DeadlineExceededError, InvalidArgumentError
from jaxaccum._coordinator.tree_accumulator import Applied, TreeAccumulator
from jaxaccum._distributed.all_merge import all_merge, all_take
from jaxaccum._distributed.all_sum import all_sum
from jaxaccum._distributed.mesh import (
    drop_device_axis,
    replicate,
    shard_init,
    shard_rows,
    shard_specs,
)
from jaxaccum._distributed.sharded_table import all_apply, all_lookup
from jaxaccum._optimizers.accumulate import accumulate
from jaxaccum._optimizers.apply_updates import apply_updates, count_invalid
from jaxaccum._optimizers.catch_up import CatchUpState
from jaxaccum._optimizers.freeze_rows import freeze_rows
from jaxaccum._optimizers.grow_tables import grow_tables
from jaxaccum._optimizers.lazy_rows import lazy_rows
from jaxaccum._optimizers.micro_batch_state import MicroBatchState
from jaxaccum._optimizers.rowwise_adagrad import (
    RowwiseAdagradState,
    StochasticRoundingState,
    rowwise_adagrad,
)
from jaxaccum._optimizers.suggest_capacity import suggest_capacity
from jaxaccum._rows.embedding_bag import embedding_bag
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.map_values import global_norm, map_values
from jaxaccum._rows.row_major import row_major
from jaxaccum._rows.unique_rows import sum_duplicates
from jaxaccum._sparse_grad.value_and_sparse_grad import value_and_sparse_grad
from jaxaccum._sparse_ops.ops import sparse_add, sparse_add_jvp, sparse_slice, sparse_slice_jvp
from jaxaccum._sparse_ops.raw_grads import sparse_add_grad, sparse_slice_grad
from jaxaccum._tensorflow.conditional_accumulator import SparseConditionalAccumulator
from jaxaccum._tensorflow.dense_accumulator import ConditionalAccumulator
from jaxaccum._tensorflow.sparse_gradient import SparseGradient

__version__ = "0.1.0"
__all__ = [
    "AccumulatorState",
    "Applied",
    "CancelledError",
    "CatchUpState",
    "ConditionalAccumulator",
    "DeadlineExceededError",
    "IndexedSlices",
    "InvalidArgumentError",
    "MicroBatchState",
    "Reduction",
    "RowwiseAdagradState",
    "SparseConditionalAccumulator",
    "SparseGradient",
    "StochasticRoundingState",
    "TreeAccumulator",
    "Verdict",
    "accumulate",
    "all_apply",
    "all_lookup",
    "all_merge",
    "all_sum",
    "all_take",
    "apply",
    "apply_updates",
    "count_invalid",
    "drop_device_axis",
    "embedding_bag",
    "freeze_rows",
    "global_norm",
    "grow",
    "grow_tables",
    "init",
    "lazy_rows",
    "map_values",
    "merge",
    "raw_ops",
    "replicate",
    "row_major",
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
