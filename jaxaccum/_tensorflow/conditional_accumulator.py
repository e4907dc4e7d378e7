"""`SparseConditionalAccumulator`: TensorFlow's class, over a `Coordinator` in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._coordinator.coordinator import Coordinator
from jaxaccum._coordinator.device_state import DeviceState
from jaxaccum._coordinator.placement import Placement, outside_jit
from jaxaccum._coordinator.spec import Spec
from jaxaccum._rows.indexed_slices import IndexedSlices
from jaxaccum._rows.public import public
from jaxaccum._tensorflow.registry import claim_name, share
from jaxaccum._tensorflow.sparse_gradient import SparseGradient, as_tuple

_DEFAULT_NAME = "sparse_conditional_accumulator"


@public
class SparseConditionalAccumulator:
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
        spec = Spec.of(dtype, shape, reduction_type, accumulator_dtype)
        self._name = claim_name(name or _DEFAULT_NAME, self)

        def make() -> Coordinator:
            return Coordinator(spec, self.name, DeviceState(spec, capacity, Placement(device)))

        self._core = share(shared_name, spec, make) if shared_name else make()

    def __repr__(self) -> str:
        return f"SparseConditionalAccumulator({self._core.spec}, name={self._name!r})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled or copied."""
        self._core.__reduce_ex__(protocol)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the gradients."""
        return self._core.spec.dtype

    @property
    def name(self) -> str:
        """The last component of the unique name."""
        return self._name.rsplit("/", 1)[-1]

    @property
    def accumulator_ref(self) -> Coordinator:
        """The handle, for `jaxaccum.raw_ops`; those of a shared name have the same."""
        return self._core

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
        return as_tuple(self._core.take(num_required, timeout, trim=True))

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
        return self._core.take(num_required, timeout, trim=trim)

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
        return as_tuple(await self._core.take_async(num_required, timeout, trim=True))

    async def take_indexed_slices_grad_async(
        self, num_required: int, *, timeout: float | None = None, trim: bool = True
    ) -> IndexedSlices:
        """Does what `take_indexed_slices_grad` does in asyncio code."""
        return await self._core.take_async(num_required, timeout, trim=trim)

    def num_accumulated(self, name: str | None = None) -> int:
        """Returns how many gradients were accepted since the last take."""
        return self._core.num_accumulated()

    def set_global_step(self, new_global_step: ArrayLike, name: str | None = None) -> None:
        """Sets the step; what is accumulated stays and counts, and nobody is served.

        A lower step than the present one is logged as a warning, and set.

        Example:
          >>> import jaxaccum
          >>> acc = jaxaccum.SparseConditionalAccumulator("float32")
          >>> acc.set_global_step(3)
          >>> acc.apply_grad([0], [[1.0]], local_step=2)
          False
        """
        self._core.set_global_step(new_global_step)

    def statistics(self) -> dict[str, Any]:
        """Returns counts of what happened and of what is held; it waits for the device.

        Gradients ``accepted``, ``stale`` and ``invalid`` (those whose call raised, too), ``taken``
        takes and how often it has ``grown``, since the beginning; ``waiting`` takers, ``unclaimed``
        gradients whose takers went away, ``num_accumulated``, ``global_step``, ``rows`` held,
        ``capacity``, and the ``compiled_sizes`` gradients were padded to.

        Example:
          >>> import jaxaccum
          >>> acc = jaxaccum.SparseConditionalAccumulator("float32", capacity=64)
          >>> acc.apply_grad([5, 2], [[1.0], [2.0]])
          True
          >>> stats = acc.statistics()
          >>> stats["accepted"], stats["rows"], stats["capacity"], stats["compiled_sizes"]
          (1, 2, 64, [32])
        """
        return self._core.statistics()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns what is accumulated and the step, as NumPy arrays to be saved.

        Example:
          >>> import jaxaccum
          >>> acc = jaxaccum.SparseConditionalAccumulator("float32")
          >>> acc.apply_grad([5, 2], [[1.0], [2.0]])
          True
          >>> saved = acc.state_dict()
          >>> resumed = jaxaccum.SparseConditionalAccumulator("float32")
          >>> resumed.load_state_dict(saved)
          >>> resumed.num_accumulated(), resumed.take_grad(1).indices
          (1, Array([2, 5], dtype=int32))
        """
        return self._core.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces what is accumulated, and the step, by what `state_dict` returned.

        Raises:
          InvalidArgumentError: it is of another dtype or shape; nothing has changed.
        """
        self._core.load_state_dict(state)

    def close(self) -> None:
        """Cancels all who wait and frees the memory; whatever is called afterwards raises.

        Leaving a ``with`` block does the same. It closes for all who share the name.

        Example:
          >>> import jaxaccum
          >>> with jaxaccum.SparseConditionalAccumulator("float32") as acc:
          ...     acc.apply_grad([5], [[1.0]])
          True
        """
        self._core.close()
