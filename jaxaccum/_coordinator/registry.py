"""Names of accumulators in this process: unique ones, and shared ones.

All references are weak: dropping the last handle frees an accumulator and its names.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from jaxaccum._coordinator.coordinator import Coordinator
from jaxaccum._coordinator.spec import TreeSpec

_lock = threading.RLock()
_named: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()
# The number last appended to a name: to try all of them from 1 on costs more the more there are.
_last_number: dict[str, int] = {}
_shared: weakref.WeakValueDictionary[str, Coordinator] = weakref.WeakValueDictionary()


def claim_name(name: str, owner: object) -> str:
    """Returns ``name``, with a number appended if another living object has it."""
    with _lock:
        unique = name
        while unique in _named:
            number = _last_number[name] = _last_number.get(name, 0) + 1
            unique = f"{name}_{number}"
        _named[unique] = owner
        return unique


def share(shared_name: str, spec: TreeSpec, make: Callable[[], Coordinator]) -> Coordinator:
    """Returns the open accumulator of that name, made if there is none."""
    with _lock:
        core = _shared.get(shared_name)
        if core is None or core.is_closed:
            core = _shared[shared_name] = make()
        elif core.spec != spec:
            raise ValueError(
                f"shared_name {shared_name!r} is that of an accumulator of {core.spec}, not {spec}"
            )
        return core
