"""The accumulator's state: what it holds, what it promises, and how it begins."""

from __future__ import annotations

import dataclasses
import enum
import operator
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._accumulator.row_index import DirectMap, HashTable
from jaxaccum._rows.public import one_line, public, pytree
from jaxaccum._rows.row_arithmetic import sum_dtype
from jaxaccum._rows.shapes import canonical_shape, padding_index

Reduction = Literal["mean_per_row", "mean_per_gradient", "sum"]
"""What a row's sum is divided by when it is taken: the gradients that touched the row, all that
were accepted, or nothing."""


@public
class Verdict(enum.IntEnum):
    """What became of a gradient. Compare with ``==``; inside ``jit`` it is an int32 scalar.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> grad = jaxaccum.IndexedSlices(jnp.array([-1]), jnp.ones((1, 1)), (9, 1))
      >>> _, verdict = jaxaccum.apply(jaxaccum.init((9, 1), capacity=3), grad)
      >>> verdict == jaxaccum.Verdict.INVALID, jaxaccum.Verdict(verdict).name
      (Array(True, dtype=bool), 'INVALID')

    Source: of this package; TensorFlow drops what is stale without a word.
    """

    ACCEPTED = 0
    """Added to the accumulator."""
    STALE = 1
    """Computed before the current global step: dropped."""
    OVERFLOW = 2
    """More new rows than the capacity has left: nothing was added, `take` or `grow` and retry."""
    INVALID = 3
    """An index below zero or beyond the padding index: nothing was added."""
    SKIPPED = 4
    """Its values are not wanted: nothing was added. Only where `accumulate` is told to skip."""

    __str__ = enum.Enum.__str__  # the name; by itself an IntEnum prints the number

    @classmethod
    def _missing_(cls, value: object) -> Verdict | None:
        # What functions return: an int32 scalar, which no member is found by.
        return cls(int(value)) if isinstance(value, jax.Array) and value.ndim == 0 else None


def verdict_name(verdict: np.ndarray) -> str:
    """The name of a verdict, for one line of text; of many verdicts what they are."""
    return Verdict(int(verdict)).name if verdict.ndim == 0 else str(verdict.tolist())


def counts_by_name(counts: np.ndarray) -> str:
    """Counts of verdicts that are not zero, by name; of many devices what they are."""
    if counts.ndim != 1:
        return str(counts.tolist())
    shown = (f"{v.name}: {n}" for v, n in zip(Verdict, counts.tolist(), strict=True) if n)
    return f"{{{', '.join(shown)}}}"


@public
@pytree(
    data_fields=[
        "indices",
        "values",
        "counts",
        "num_rows",
        "num_accumulated",
        "global_step",
        "verdict_counts",
        "num_shared",
        "shared_verdicts",
        "row_index",
        "total_weight",
        "staleness_counts",
        "shared_staleness",
    ],
    meta_fields=["dense_shape", "dtype", "reduction"],
)
@dataclasses.dataclass(frozen=True)
class AccumulatorState:
    """Rows gathered so far. Made by `init`, never changed: functions return a new one.

    Slots fill from the first on, those of the new rows of one gradient in an order that depends on
    the platform. Slots from ``num_rows`` on are free; their values are whatever they were left
    with, and nothing reads them.

    Counters stay at ``2**31 - 1`` once they are there. ``"mean_per_row"`` and
    ``"mean_per_gradient"`` then divide by that, and ``global_step`` rises no further.

    Attributes:
      indices: int32 ``[capacity]``, the row each slot holds; padding in free slots.
      values: ``[capacity, *row]`` in the accumulator dtype, the sums.
      counts: int32 ``[capacity]``, how many gradients touched each row; where gradients are
        weighted, floats, the sum of their weights.
      num_rows: int32 ``[]``, slots in use.
      num_accumulated: int32 ``[]``, gradients accepted since the last `take`.
      global_step: int32 ``[]``; gradients computed at an earlier step are stale.
      verdict_counts: int32 ``[5]``, gradients by `Verdict` since `init`.
      num_shared: int32 ``[]``, how many of ``num_accumulated`` an `all_merge` gave to every device.
      shared_verdicts: int32 ``[5]``, the part of ``verdict_counts`` that every device has in common
        since an `all_merge`; the next one counts it once.
      row_index: where each row lives.
      total_weight: ``[]`` in the dtype of ``counts``, what the gradients weigh that were accepted
        since the last `take`; ``None`` unless they are weighted.
      staleness_counts: int32 ``[max_staleness + 2]``, gradients accepted since `init` by how many
        steps old they were, and last those refused as stale; ``None`` without ``max_staleness``.
      shared_staleness: the part of it that every device has in common, as ``shared_verdicts``.
      dense_shape: shape of the whole gradient, ``(rows or None, *row)``. Static.
      dtype: of the gradients that come in and go out. Static.
      reduction: ``"mean_per_row"``, ``"mean_per_gradient"`` or ``"sum"``. Static.

    Example:
      >>> import jaxaccum
      >>> jaxaccum.init((1_000_000, 64), capacity=4096).values.shape
      (4096, 64)

    Source: TensorFlow's ``ConditionalAccumulator``, which keeps such a state in a resource.
    """

    indices: jax.Array = dataclasses.field(repr=False)
    values: jax.Array
    counts: jax.Array = dataclasses.field(repr=False)
    num_rows: jax.Array
    num_accumulated: jax.Array
    global_step: jax.Array
    verdict_counts: jax.Array
    num_shared: jax.Array = dataclasses.field(repr=False)
    shared_verdicts: jax.Array = dataclasses.field(repr=False)
    row_index: DirectMap | HashTable = dataclasses.field(repr=False)
    total_weight: jax.Array | None
    staleness_counts: jax.Array | None
    shared_staleness: jax.Array | None = dataclasses.field(repr=False)
    dense_shape: tuple[int | None, ...]
    dtype: np.dtype = dataclasses.field(repr=False)
    reduction: Reduction

    def __repr__(self) -> str:
        return one_line(self, verdict_counts=counts_by_name)

    @property
    def capacity(self) -> int:
        """How many distinct rows it can hold."""
        return self.indices.shape[0]

    @property
    def max_staleness(self) -> int:
        """How many steps old a gradient may be."""
        return 0 if self.staleness_counts is None else self.staleness_counts.shape[0] - 2

    @property
    def is_weighted(self) -> bool:
        """Whether gradients may weigh less, or more, than one."""
        return self.total_weight is not None


def init(
    dense_shape: tuple[int | None, ...],
    dtype: DTypeLike = jnp.float32,
    *,
    capacity: int,
    reduction: Reduction = "mean_per_row",
    accumulator_dtype: DTypeLike | None = None,
    global_step: int = 0,
    max_staleness: int = 0,
    weighted: bool = False,
) -> AccumulatorState:
    """Makes an empty accumulator.

    Memory: ``capacity * (row bytes + 8)`` bytes, and 4 bytes for each of a known number of rows,
    or 16 bytes for each slot of the capacity where the number of rows is unknown.

    Args:
      dense_shape: shape of the gradients as a whole, ``(rows, *row)``; ``rows`` may be ``None``
        where the vocabulary is unknown. Then any id from 0 to ``2**31 - 2`` is a row.
      dtype: of the gradients; any numeric JAX dtype.
      capacity: how many distinct rows can be held at a time, at least 1.
      reduction: what `take` makes of the sums. ``"mean_per_row"`` divides each row by the number of
        gradients that touched *that row* (TensorFlow's rule), ``"mean_per_gradient"`` by the
        number of all gradients accumulated (the mean of data-parallel training), ``"sum"`` by none.
      accumulator_dtype: of the sums; by default ``dtype``, but float32 for 16-bit floats.
      global_step: the step gradients must be computed at, or later, to be accepted.
      max_staleness: how many steps earlier than that they may be computed all the same. If it is
        not 0, ``staleness_counts`` of the state is a histogram.
      weighted: whether `apply` may be given a ``staleness_weight``. Sums are then weighted sums,
        which means divide by sums of weights.

    Returns:
      An `AccumulatorState`.

    Raises:
      ValueError: a bad shape, capacity, reduction, step or staleness.
      TypeError: ``dtype`` is bool, quantized or no number, or an integer and ``weighted``.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> state = jaxaccum.init((1_000_000, 64), capacity=4096)
      >>> state.values.shape
      (4096, 64)

    Source: TensorFlow's ``SparseConditionalAccumulator``.
    """
    shape = canonical_shape(dense_shape)
    dtype = _numeric_dtype(dtype, "dtype")
    if accumulator_dtype is None:
        accumulator_dtype = sum_dtype(dtype)
    held_dtype = _numeric_dtype(accumulator_dtype, "accumulator_dtype")
    if not np.can_cast(dtype, held_dtype):
        raise ValueError(f"accumulator_dtype {held_dtype} cannot hold sums of dtype {dtype}")
    capacity = as_capacity(capacity)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    max_staleness = as_max_staleness(max_staleness)
    counts_dtype = np.dtype(np.int32)
    if weighted:
        if not jnp.issubdtype(held_dtype, jnp.inexact):
            raise TypeError(f"weighted must be False for integers, got dtype {held_dtype}")
        counts_dtype = weight_dtype()
    rows, *row = shape
    return AccumulatorState(
        indices=jnp.full(capacity, padding_index(shape), jnp.int32),
        values=jnp.zeros((capacity, *row), held_dtype),
        counts=jnp.zeros(capacity, counts_dtype),
        num_rows=jnp.int32(0),
        num_accumulated=jnp.int32(0),
        global_step=jnp.asarray(as_int32(global_step, "global_step")),
        verdict_counts=jnp.zeros(len(Verdict), jnp.int32),
        num_shared=jnp.int32(0),
        shared_verdicts=jnp.zeros(len(Verdict), jnp.int32),
        row_index=HashTable.empty(capacity) if rows is None else DirectMap.empty(rows),
        total_weight=jnp.zeros((), counts_dtype) if weighted else None,
        staleness_counts=new_histogram(max_staleness),
        shared_staleness=new_histogram(max_staleness),
        dense_shape=shape,
        dtype=dtype,
        reduction=reduction,
    )


def set_step(state: AccumulatorState, new_step: ArrayLike) -> AccumulatorState:
    """Sets the global step; what is accumulated stays, and stays counted.

    Args:
      state: the accumulator.
      new_step: int scalar. A lower step than the current one is set all the same: gradients of
        older steps then become acceptable again.

    Returns:
      The new state.

    Raises:
      TypeError: ``new_step`` is no integer.
      ValueError: ``new_step`` is no scalar or does not fit int32.

    Example:
      >>> import jaxaccum
      >>> state = jaxaccum.set_step(jaxaccum.init((100, 1), capacity=3), 5)
      >>> state.global_step
      Array(5, dtype=int32)

    Source: TensorFlow's ``AccumulatorSetGlobalStep``.
    """
    return _set_step(state, as_int32(new_step, "new_step"))


@jax.jit
def _set_step(state: AccumulatorState, new_step: jax.Array) -> AccumulatorState:
    return dataclasses.replace(state, global_step=jnp.asarray(new_step))


def as_capacity(capacity: int) -> int:
    """Returns how many rows are to be held at most, or raises ``ValueError``."""
    capacity = operator.index(capacity)
    if not 1 <= capacity <= 2**30:
        raise ValueError(f"capacity must be from 1 to 2**30, got {capacity}")
    return capacity


def as_max_staleness(max_staleness: int) -> int:
    """Returns how many steps old gradients may be, or raises ``ValueError``."""
    max_staleness = operator.index(max_staleness)
    if max_staleness < 0:
        raise ValueError(f"max_staleness must not be negative, got {max_staleness}")
    return max_staleness


def new_histogram(max_staleness: int) -> jax.Array | None:
    """Returns zero gradients of each age, and zero that were older; ``None`` where none may be."""
    return jnp.zeros(max_staleness + 2, jnp.int32) if max_staleness else None


def as_int32(value: ArrayLike, name: str) -> jax.Array | np.int32:
    """An int32 scalar: of one dtype, so that Python numbers and arrays share a compilation."""
    if not isinstance(value, jax.Array):
        host = np.asarray(value)
        if host.dtype.kind not in "iu":
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if host.ndim != 0:
            raise ValueError(f"{name} must be a scalar, got shape {host.shape}")
        if not -(2**31) <= host < 2**31:
            raise ValueError(f"{name} must fit int32, got {value}")
        return np.int32(host)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer, got {value.dtype}")
    if value.ndim != 0:
        raise ValueError(f"{name} must be a scalar, got shape {value.shape}")
    if value.dtype.itemsize >= 4 and value.dtype != jnp.int32:  # saturate rather than wrap
        value = jnp.minimum(value, 2**31 - 1)
        if jnp.issubdtype(value.dtype, jnp.signedinteger):
            value = jnp.maximum(value, -(2**31))
    return value.astype(jnp.int32)


def weight_dtype() -> np.dtype:
    """What weights are summed in: the widest float there is."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def _numeric_dtype(dtype: DTypeLike, name: str) -> np.dtype:
    if "qint" in str(dtype) or "quint" in str(dtype):
        raise TypeError(f"{name} {dtype} is quantized, and JAX has no quantized dtypes")
    result = jnp.dtype(dtype)
    if not jnp.issubdtype(result, jnp.number):
        raise TypeError(f"{name} must be numeric, got {result}")
    if jax.dtypes.canonicalize_dtype(result) != result:
        raise TypeError(f"{name} {result} needs jax_enable_x64")
    return result
