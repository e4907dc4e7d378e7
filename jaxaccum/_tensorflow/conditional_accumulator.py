"""`SparseConditionalAccumulator`: TensorFlow's class, over a `Coordinator` in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._coordinator.device_state import DeviceState
from jaxaccum._coordinator.handle import LeafHandle
from jaxaccum._coordinator.host_gradient import read_rows
from jaxaccum._coordinator.placement import Placement, outside_jit
from jaxaccum._coordinator.spec import Spec, TreeSpec
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.public import public
from jaxaccum._tensorflow.sparse_gradient import SparseGradient, as_tuple

_DEFAULT_NAME = "sparse_conditional_accumulator"


@public
class SparseConditionalAccumulator(LeafHandle):
    """Gathers row-sparse gradients from many threads until enough are there to be taken.

    A gradient computed before the accumulator's global step is stale and dropped. Taking blocks
    until ``num_required`` gradients have been accepted; it takes all there are, reduces them,
    raises the step by one and begins anew. Takers are served first come, first served, and only
    the first in the queue is looked at: one who waits for much holds up those behind who want
    little. Calls may come from any number of threads; each is done whole or not at all.

    Capacity grows by itself, and shrinks when eight takes in a row have needed little of it.
    Gradients are padded to powers of two, so that a program is compiled for each of a few sizes
    only; while one thread waits for the compiler the others go on. An apply does not wait for the
    device, and what it adds stays there until it is taken. Small gradients from host memory go
    there several at a time.

    A ``RuntimeError`` refuses what is called, or made, inside ``jit``; and what a signal handler
    calls while its own thread is in the middle of a call, unless it closes the accumulator.

    Args:
      dtype: of the gradients; any numeric JAX dtype.
      shape: of the gradients, ``(rows, *row)``. Dimensions may be ``None``; ``None`` and ``()``
        alone claim nothing. The first gradient after a take fixes what is open until the next.
      shared_name: where not empty, accumulators made under it in this process are one.
      name: made unique among the living by appending a number.
      reduction_type: ``"MEAN"`` divides each row by the number of gradients that touched *that
        row* (TensorFlow's rule), ``"MEAN_PER_GRADIENT"`` by the number of all, ``"SUM"`` by none.
      capacity: how many rows fit at first and at least; by default a guess from the gradients.
      device: where to accumulate; or a `jax.sharding.NamedSharding` for the values.
      accumulator_dtype: of the sums; by default ``dtype``, but float32 for 16-bit floats.

    Raises:
      ValueError: a bad shape, reduction or capacity; or ``shared_name`` is that of an accumulator
        of another dtype, shape, reduction or accumulator dtype.
      TypeError: ``dtype`` is no numeric dtype, or of 64 bits without ``jax_enable_x64``.

    Example:
      >>> import jaxaccum
      >>> acc = jaxaccum.SparseConditionalAccumulator("float32", shape=(3, 2))
      >>> acc.apply_grad([1, 2], [[0.0, 1.0], [2.0, 3.0]]), acc.apply_grad([2], [[4.0, 5.0]])
      (True, True)
      >>> indices, values, shape = acc.take_grad(num_required=2)
      >>> values
      Array([[0., 1.],
             [3., 4.]], dtype=float32)
      >>> acc.apply_grad([0], [[1.0, 1.0]], local_step=0)  # before the step, which is 1 now
      False

    Source: TensorFlow's ``tf.compat.v1.SparseConditionalAccumulator``; ``docs`` list what differs.
    """

    @outside_jit
    def __init__(
        self,
        dtype: DTypeLike,
        shape: Sequence[int | None] | int | None = None,
        shared_name: str | None = None,
        name: str | None = _DEFAULT_NAME,
        reduction_type: str | None = "MEAN",
        *,
        capacity: int | None = None,
        device: jax.Device | jax.sharding.NamedSharding | None = None,
        accumulator_dtype: DTypeLike | None = None,
    ) -> None:
        spec = TreeSpec((Spec.of(dtype, shape, reduction_type, accumulator_dtype),))
        super().__init__(
            name or _DEFAULT_NAME,
            shared_name,
            spec,
            lambda: DeviceState(spec, [capacity], Placement(device), read_rows),
        )

    def apply_grad(
        self,
        grad_indices: ArrayLike | Sequence[Any],
        grad_values: ArrayLike | Sequence[Any],
        grad_shape: ArrayLike | Sequence[Any] | None = None,
        local_step: ArrayLike = 0,
        name: str | None = None,
    ) -> bool:
        """Adds a gradient unless it is stale.

        Args:
          grad_indices: int ``[n]``, in any order and with repetitions, which mean their sum. A list
            or an array; one on an accelerator is fetched to be looked at.
          grad_values: ``[n, *row]``. Numbers and lists of them are converted, arrays must be of the
            accumulator's dtype. NumPy arrays are copied and may be overwritten afterwards.
          grad_shape: the gradient's shape; checked against the accumulator's if that is known.
          local_step: the step at which the gradient was computed.
          name: ignored.

        Returns:
          True if it was accepted, False if it was stale. A stale gradient is not looked at.

        Raises:
          InvalidArgumentError: the gradient does not fit; nothing has changed.
          CancelledError: the accumulator is closed.

        Example:
          >>> import jaxaccum, numpy as np
          >>> acc = jaxaccum.SparseConditionalAccumulator("float32")
          >>> acc.apply_grad(np.array([7, 3]), np.ones((2, 4), np.float32))
          True

        Source: TensorFlow's ``SparseConditionalAccumulator.apply_grad``.
        """
        return self._core.apply(local_step, grad_indices, grad_values, grad_shape)

    def apply_indexed_slices_grad(
        self,
        grad: Any,
        local_step: ArrayLike = 0,
        name: str | None = None,
    ) -> bool:
        """Adds a gradient unless it is stale, and returns and raises what `apply_grad` does.

        Args:
          grad: an `IndexedSlices`, whose padding is skipped; or anything else with ``indices``,
            ``values`` and ``dense_shape``, which has no padding.
          local_step: the step at which the gradient was computed.
          name: ignored.

        Example:
          >>> import jaxaccum, numpy as np
          >>> acc = jaxaccum.SparseConditionalAccumulator("float32", shape=(4, 1))
          >>> values = np.ones((2, 1), np.float32)
          >>> grad = jaxaccum.IndexedSlices(np.array([2, 4]), values, (4, 1))
          >>> acc.apply_indexed_slices_grad(grad), acc.take_grad(1).indices  # 4 is padding
          (True, Array([2], dtype=int32))

        Source: TensorFlow's ``SparseConditionalAccumulator.apply_indexed_slices_grad``.
        """
        return self._core.apply(
            local_step,
            grad.indices,
            grad.values,
            grad.dense_shape,
            grad.padding_index if isinstance(grad, IndexedSlices) else None,
        )

    def take_grad(
        self, num_required: int, name: str | None = None, *, timeout: float | None = None
    ) -> SparseGradient:
        """Waits until ``num_required`` gradients have been accepted, and takes all there are.

        What a taker was served and could not collect, because of Ctrl-C at that moment, goes to the
        next taker who asks for no more gradients than are in it.

        Args:
          num_required: at least 1.
          name: ignored.
          timeout: seconds to wait; 0 only looks, ``None`` waits for ever.

        Returns:
          A named tuple ``(indices, values, shape)`` of the rows touched, ascending.

        Raises:
          InvalidArgumentError: ``num_required`` is less than 1.
          DeadlineExceededError: it took longer than ``timeout``; nothing is taken.
          CancelledError: the accumulator is closed, or was so meanwhile.

        Example:
          >>> import jaxaccum
          >>> acc = jaxaccum.SparseConditionalAccumulator("float32", [None, 1])
          >>> acc.apply_grad([5, 2, 5], [[1.0], [2.0], [3.0]])
          True
          >>> indices, values, shape = acc.take_grad(1)
          >>> indices, shape
          (Array([2, 5], dtype=int32), array([-1,  1]))

        Source: TensorFlow's ``SparseConditionalAccumulator.take_grad``.
        """
        return as_tuple(self._take(num_required, timeout))

    def take_indexed_slices_grad(
        self,
        num_required: int,
        name: str | None = None,
        *,
        timeout: float | None = None,
        trim: bool = True,
    ) -> IndexedSlices:
        """Does what `take_grad` does, but returns an `IndexedSlices`.

        Args:
          num_required: at least 1.
          name: ignored.
          timeout: seconds to wait, or ``None``.
          trim: whether to cut the padding off, which waits for the device. Padded to the capacity
            the gradient does not change its size, so that what consumes it compiles once.

        Returns:
          The reduced gradient, rows ascending; its row count is ``None`` where unknown.

        Example:
          >>> import jaxaccum
          >>> acc = jaxaccum.SparseConditionalAccumulator("float32", (9, 1), capacity=4)
          >>> acc.apply_grad([5], [[1.0]])
          True
          >>> acc.take_indexed_slices_grad(1, trim=False).indices
          Array([5, 9, 9, 9], dtype=int32)

        Source: TensorFlow's ``SparseConditionalAccumulator.take_indexed_slices_grad``.
        """
        return self._take(num_required, timeout, trim=trim)

    async def take_grad_async(
        self, num_required: int, *, timeout: float | None = None
    ) -> SparseGradient:
        """Does what `take_grad` does in asyncio code; cancelling the task leaves the queue.

        Example:
          >>> import asyncio, jaxaccum
          >>> acc = jaxaccum.SparseConditionalAccumulator("float32")
          >>> acc.apply_grad([5], [[1.0]])
          True
          >>> asyncio.run(acc.take_grad_async(1)).indices
          Array([5], dtype=int32)
        """
        return as_tuple(await self._take_async(num_required, timeout))

    async def take_indexed_slices_grad_async(
        self, num_required: int, *, timeout: float | None = None, trim: bool = True
    ) -> IndexedSlices:
        """Does what `take_indexed_slices_grad` does in asyncio code."""
        return await self._take_async(num_required, timeout, trim=trim)
