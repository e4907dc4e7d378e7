"""Where the coordinator's arrays live, whatever mesh the caller works under."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxaccum._accumulator.state import AccumulatorState
from jaxaccum._coordinator.host_memory import round_up

_partition: Callable[..., PartitionSpec] = PartitionSpec  # jax leaves both untyped
_trace_state: Callable[[], object] = get_opaque_trace_state
_get_mesh = jax.sharding.get_abstract_mesh
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def outside_jit(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Decorates what uses devices: it refuses to be traced, and runs as if no mesh were set.

    The arrays here have devices of their own, which need not be those of `jax.set_mesh`.
    """

    @functools.wraps(function)
    def call(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        if not is_at_home():
            if is_traced():
                raise RuntimeError("an accumulator lives outside jit: use it in ordinary Python")
            if not _get_mesh().empty:
                with jax.set_mesh(Mesh(np.empty((), object), ())):
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def is_at_home() -> bool:
    """Whether nothing is known to be traced, and no mesh is set: then devices may be used."""
    return _trace_state() in _OUTSIDE and _get_mesh().empty


def is_traced() -> bool:
    """Whether a trace is under way in this thread, which would record what is dispatched."""
    now = _trace_state()
    if now in _OUTSIDE:
        return False
    if isinstance(jnp.zeros((), jnp.int32), jax.core.Tracer):
        return True
    _OUTSIDE[:] = [now]
    return False


# What the state of tracing was when last found to be none: to look costs 0.2 us, to find out 20.
_OUTSIDE: list[object] = []


def is_in_host_memory(array: jax.Array) -> bool:
    """Whether NumPy can look at ``array`` without a transfer."""
    return next(iter(array.devices())).platform == "cpu"


class Placement:
    """Where states, gradients and results go.

    Args:
      device: a device; or a `NamedSharding` of the values, the rest being on each of its devices;
        or ``None`` for the default device, from which results are free to move.

    Attributes:
      gradients: where gradients go, one copy on each device.
    """

    def __init__(self, device: jax.Device | NamedSharding | None) -> None:
        is_default = device is None
        if device is None:
            (device,) = jnp.zeros((), jnp.int32).devices()
        if isinstance(device, NamedSharding):
            # Explicit axes would ask every scatter for the sharding of its result.
            mesh = Mesh(device.mesh.devices, device.mesh.axis_names)
            self._values: Sharding = NamedSharding(mesh, device.spec)
            self.gradients: Sharding = NamedSharding(mesh, _partition())
            # Of any number of rows, so they cannot be sharded along those.
            values: Sharding = NamedSharding(mesh, _partition(None, *device.spec[1:]))
        elif isinstance(device, jax.Device):
            self._values = self.gradients = values = SingleDeviceSharding(device)
        else:
            raise TypeError(f"device must be a device or a NamedSharding, got {device!r}")
        self._results = (None, None) if is_default else (self.gradients, values)

    def place(self, state: AccumulatorState) -> AccumulatorState:
        """Moves ``state`` where it belongs."""
        placed = jax.device_put(state, self.gradients)
        return dataclasses.replace(placed, values=jax.device_put(state.values, self._values))

    def place_dense(self, total: jax.Array) -> jax.Array:
        """Moves the sum of a dense leaf where it belongs."""
        return jax.device_put(total, self.gradients)

    def trim(
        self, indices: jax.Array, values: jax.Array, num_rows: int
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the first ``num_rows`` of what was taken."""
        of_indices, of_values = self._results
        return (
            jax.device_put(_fetch(indices, num_rows), of_indices),
            jax.device_put(_fetch(values, num_rows), of_values),
        )


def _fetch(array: jax.Array, num_rows: int) -> np.ndarray:
    """The first rows, in host memory: cut off on the device, each number would take a program."""
    if not is_in_host_memory(array):
        array = _cut(array, round_up(num_rows, array.shape[0]))
    host = np.asarray(array)[:num_rows]
    # JAX reads host memory in place where it can. A few rows must not keep many alive.
    return host if 2 * num_rows > array.shape[0] else host.copy()


@functools.partial(jax.jit, static_argnums=1)
def _cut(array: jax.Array, size: int) -> jax.Array:
    return array[:size]
