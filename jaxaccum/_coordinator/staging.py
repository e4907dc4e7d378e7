"""Where small gradients wait in host memory, to be added by one dispatch.

A stage that has been dispatched is thrown away, and the next one new: see `host_memory`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxaccum._coordinator.host_gradient import HostGradient
from jaxaccum._coordinator.host_memory import allocate
from jaxaccum._coordinator.spec import TreeSpec

_STAGE = 1 << 18
_DEEPEST = 32


class Stage:
    """Small gradients alike in size, in order.

    Args:
      gradient: one of them.
      spec: what is accumulated.

    Attributes:
      depth: how many there is room for.
      sizes: slices of each table, the last ones padding.
      indices: of each table, int32 ``[depth, size]``.
      values: of each table, ``[depth, size, *row]``.
      dense: of each dense leaf, ``[depth, *shape]``.
      staleness: int32 ``[depth]``; ``None`` where gradients weigh the same.
      num_staged: how many there are.
    """

    __slots__ = (
        "_tables",
        "dense",
        "depth",
        "indices",
        "num_staged",
        "sizes",
        "staleness",
        "values",
    )

    def __init__(self, gradient: HostGradient, spec: TreeSpec) -> None:
        sizes, shapes, num = gradient.sizes, gradient.row_shapes, len(gradient.sizes)
        depth, int32 = choose_depth(gradient.num_bytes), np.dtype(np.int32)
        self.depth, self.sizes, self.num_staged = depth, sizes, 0
        self.indices = tuple(allocate((depth, size), int32) for size in sizes)
        self.values = tuple(
            allocate((depth, size, *row), table.dtype)
            for size, row, table in zip(sizes, shapes[:num], spec.tables, strict=True)
        )
        paddings = [table.padding for table in spec.tables]
        self._tables = list(zip(self.indices, self.values, sizes, paddings, strict=True))
        self.dense = tuple(
            allocate((depth, *shape), leaf.dtype)
            for shape, leaf in zip(shapes[num:], spec.dense, strict=True)
        )
        is_weighted = spec.policy.staleness_weight is not None
        self.staleness = allocate((depth,), int32) if is_weighted else None

    @property
    def arrays(self) -> Any:
        """What a program is given."""
        return self.indices, self.values, self.dense, self.staleness

    def write(self, gradient: HostGradient, staleness: int) -> None:
        """Copies a gradient in behind the others; it counts when ``num_staged`` does."""
        k, i = self.num_staged, 0
        all_indices, all_values = gradient.indices, gradient.values
        for ids, rows, size, padding in self._tables:
            indices = all_indices[i]
            num_slices = len(indices)
            if num_slices == size:
                ids[k] = indices
                rows[k] = all_values[i]
            else:
                ids[k, :num_slices] = indices
                ids[k, num_slices:] = padding
                rows[k, :num_slices] = all_values[i]
            i += 1  # noqa: SIM113  (in a fifth of the time that enumerate takes for one table)
        if self.dense:
            for leaf, value in zip(self.dense, gradient.dense, strict=True):
                leaf[k] = value
        if self.staleness is not None:
            self.staleness[k] = staleness


def choose_depth(num_bytes: int) -> int:
    """Returns how many gradients of so many bytes a stage holds."""
    return max(1, min(_DEEPEST, _STAGE // max(num_bytes, 1)))
