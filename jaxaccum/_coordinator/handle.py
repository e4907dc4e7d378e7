"""What all accumulators of this room have in common: a name, and a `Coordinator` to share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

import numpy as np
from jax.typing import ArrayLike

from jaxaccum._coordinator.accumulated import Accumulated
from jaxaccum._coordinator.coordinator import Coordinator
from jaxaccum._coordinator.registry import claim_name, share
from jaxaccum._coordinator.spec import TreeSpec


class Handle:
    """A handle of an accumulator; those made under one ``shared_name`` share it.

    Args:
      name: made unique among the living by appending a number.
      shared_name: where not empty, accumulators made under it in this process are one.
      spec: what is accumulated.
      make: makes what is guarded, if it is not there yet.
    """

    def __init__(
        self, name: str, shared_name: str | None, spec: TreeSpec, make: Callable[[], Accumulated]
    ) -> None:
        self._name = claim_name(name, self)

        def make_core() -> Coordinator:
            return Coordinator(spec, self.name, make())

        self._core = share(shared_name, spec, make_core) if shared_name else make_core()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._core.spec}, name={self._name!r})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled or copied."""
        self._core.__reduce_ex__(protocol)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The last component of the unique name."""
        return self._name.rsplit("/", 1)[-1]

    def num_accumulated(self, name: str | None = None) -> int:
        """Returns how many gradients were accepted since the last take, and count."""
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


class LeafHandle(Handle):
    """A handle of an accumulator of a single leaf, as TensorFlow's are."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the gradients."""
        return self._core.spec.leaves[0].dtype

    @property
    def accumulator_ref(self) -> Coordinator:
        """The handle, for `jaxaccum.raw_ops`; those of a shared name have the same."""
        return self._core

    def statistics(self) -> dict[str, Any]:
        """Returns counts of what happened and of what is held; it waits for the device.

        Gradients ``accepted``, ``stale`` and ``invalid`` (those whose call raised, too), ``taken``
        takes and how often it has ``grown``, since the beginning; ``staleness``, how many gradients
        were how many steps old; ``waiting`` takers, ``unclaimed`` gradients whose takers went away,
        ``num_accumulated``, ``global_step``; and of sparse gradients the ``rows`` held, the
        ``capacity``, and the ``compiled_sizes`` they were padded to.

        Example:
          >>> import jaxaccum
          >>> acc = jaxaccum.SparseConditionalAccumulator("float32", capacity=64)
          >>> acc.apply_grad([5, 2], [[1.0], [2.0]])
          True
          >>> stats = acc.statistics()
          >>> stats["accepted"], stats["rows"], stats["capacity"], stats["compiled_sizes"]
          (1, 2, 64, [32])
        """
        stats = self._core.statistics()
        del stats["carried"], stats["workers"]  # which are TreeAccumulator's
        for key in ("rows", "capacity", "compiled_sizes"):
            of_tables = stats.pop(key)
            if of_tables:
                (stats[key],) = of_tables.values()
        return stats

    def _take(self, num_required: Any, timeout: float | None, *, trim: bool = True) -> Any:
        tables, dense = self._core.take(num_required, timeout, trim=trim)
        return [*tables, *dense][0]

    async def _take_async(
        self, num_required: Any, timeout: float | None, *, trim: bool = True
    ) -> Any:
        tables, dense = await self._core.take_async(num_required, timeout, trim=trim)
        return [*tables, *dense][0]
