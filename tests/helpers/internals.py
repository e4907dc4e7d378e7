"""The inner parts that tests look into, named in this file alone: moves of them end here.

A test should rather go by what users have. These are parts whose promises are finer than what shows
outside, parts of which there are two that must agree, and lists that must be complete.
"""

from jaxaccum._accumulator import pooled_rows
from jaxaccum._accumulator.counters import saturating_add, saturating_sum
from jaxaccum._coordinator.coordinator import Coordinator
from jaxaccum._coordinator.policy import Policy
from jaxaccum._ray import takes as ray_takes
from jaxaccum._ray.checkpoints import Folder, load_arrays, save_arrays
from jaxaccum._ray.errors import RolledBackError
from jaxaccum._ray.layout import Layout
from jaxaccum._ray.parcels import pack, unpack
from jaxaccum._ray.part_sum import join_parts, sum_rows
from jaxaccum._ray.tickets import Tickets
from jaxaccum._ray.tree_accumulator import OwningAccumulator, TreeAccumulatorActor
from jaxaccum._rows.prefix_sums import as_words, count_before, rank_in_words, sum_before
from jaxaccum._rows.row_arithmetic import _add_in_order as add_in_order
from jaxaccum._rows.row_arithmetic import _add_where_they_lie as add_where_they_lie
from jaxaccum._rows.tables import select_tables
from jaxaccum._sparse_grad.rules import RULES
from jaxaccum._sparse_grad.terms import SparseSum
from jaxaccum._sparse_ops import keys, match

__all__ = [
    "RULES",
    "Coordinator",
    "Folder",
    "Layout",
    "OwningAccumulator",
    "Policy",
    "RolledBackError",
    "SparseSum",
    "Tickets",
    "TreeAccumulatorActor",
    "add_in_order",
    "add_where_they_lie",
    "as_words",
    "count_before",
    "join_parts",
    "keys",
    "load_arrays",
    "match",
    "pack",
    "pooled_rows",
    "rank_in_words",
    "ray_takes",
    "saturating_add",
    "saturating_sum",
    "save_arrays",
    "select_tables",
    "sum_before",
    "sum_rows",
    "unpack",
]
