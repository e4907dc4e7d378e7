"""`ConditionalAccumulator`: TensorFlow's class for dense gradients, over the same `Coordinator`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._coordinator.device_state import DeviceState
from jaxaccum._coordinator.handle import LeafHandle
from jaxaccum._coordinator.host_gradient import read_dense
from jaxaccum._coordinator.placement import Placement, outside_jit
from jaxaccum._coordinator.spec import DenseSpec, TreeSpec
from jaxaccum._rows.public import public

_DEFAULT_NAME = "conditional_accumulator"


@public
class ConditionalAccumulator(LeafHandle):
    """Gathers dense gradients from many threads until enough are there to be taken.

    As `SparseConditionalAccumulator`, of whole arrays. `TreeAccumulator` gathers those of a whole
    model under one verdict.

    Args:
      dtype: of the gradients; any numeric JAX dtype.
      shape: of the gradients. Dimensions may be ``None``, or all of it: the first gradient after a
        take fixes what is open until the next.
      shared_name: where not empty, accumulators made under it in this process are one.
      name: made unique among the living by appending a number.
      reduction_type: ``"MEAN"`` divides by the number of gradients, ``"SUM"`` by none.
      device: where to accumulate.
      accumulator_dtype: of the sums; by default ``dtype``, but float32 for 16-bit floats.

    Raises:
      ValueError: a bad shape or reduction; or ``shared_name`` is that of another accumulator.
      TypeError: ``dtype`` is no numeric dtype, or of 64 bits without ``jax_enable_x64``.

    Example:
      >>> import jaxaccum
      >>> acc = jaxaccum.ConditionalAccumulator("float32", shape=(2,))
      >>> acc.apply_grad([1.0, 2.0]), acc.apply_grad([3.0, 4.0])
      (True, True)
      >>> acc.take_grad(num_required=2)
      Array([2., 3.], dtype=float32)

    Source: TensorFlow's ``tf.compat.v1.ConditionalAccumulator``.
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
        device: jax.Device | None = None,
        accumulator_dtype: DTypeLike | None = None,
    ) -> None:
        leaf = DenseSpec.of(dtype, shape, reduction_type, accumulator_dtype)
        spec = TreeSpec((), (leaf,))
        super().__init__(
            name or _DEFAULT_NAME,
            shared_name,
            spec,
            lambda: DeviceState(spec, [], Placement(device), read_dense),
        )

    def apply_grad(
        self,
        grad: ArrayLike | Sequence[Any],
        local_step: ArrayLike = 0,
        name: str | None = None,
    ) -> bool:
        """Adds a gradient unless it is stale.

        Args:
          grad: numbers and lists of them are converted, arrays must be of the accumulator's dtype.
            NumPy arrays may be overwritten afterwards.
          local_step: the step at which the gradient was computed.
          name: ignored.

        Returns:
          True if it was accepted, False if it was stale. A stale gradient is not looked at.

        Raises:
          InvalidArgumentError: the gradient does not fit; nothing has changed.
          CancelledError: the accumulator is closed.

        Source: TensorFlow's ``ConditionalAccumulator.apply_grad``.
        """
        return self._core.apply(local_step, grad)

    def take_grad(
        self, num_required: int, name: str | None = None, *, timeout: float | None = None
    ) -> jax.Array:
        """Waits until ``num_required`` gradients have been accepted, and takes all there are.

        Args:
          num_required: at least 1.
          name: ignored.
          timeout: seconds to wait; 0 only looks, ``None`` waits for ever.

        Returns:
          Their mean, or their sum.

        Raises:
          InvalidArgumentError: ``num_required`` is less than 1.
          DeadlineExceededError: it took longer than ``timeout``; nothing is taken.
          CancelledError: the accumulator is closed, or was so meanwhile.

        Source: TensorFlow's ``ConditionalAccumulator.take_grad``.
        """
        grad: jax.Array = self._take(num_required, timeout)
        return grad

    async def take_grad_async(
        self, num_required: int, *, timeout: float | None = None
    ) -> jax.Array:
        """Does what `take_grad` does in asyncio code; cancelling the task leaves the queue."""
        grad: jax.Array = await self._take_async(num_required, timeout)
        return grad
