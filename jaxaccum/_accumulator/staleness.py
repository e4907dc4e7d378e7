"""How old a gradient is, what it weighs for that, and what is counted of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxaccum._accumulator.counters import saturating_add
from jaxaccum._accumulator.state import Verdict
from jaxaccum._rows.row_arithmetic import promote_dtypes

# What a gradient weighs that is so many steps old, an int32 scalar.
StalenessWeight = Callable[[jax.Array], ArrayLike]


class Counted(Protocol):
    """A dataclass that counts gradients; see `AccumulatorState` for the fields."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def num_accumulated(self) -> jax.Array: ...
    @property
    def verdict_counts(self) -> jax.Array: ...
    @property
    def total_weight(self) -> jax.Array | None: ...
    @property
    def staleness_counts(self) -> jax.Array | None: ...


_Counted = TypeVar("_Counted", bound=Counted)


def find_staleness(
    global_step: jax.Array, local_step: ArrayLike | None, max_staleness: int
) -> jax.Array:
    """How many steps ago a gradient was computed, int32: from 0 to one more than the bound."""
    if local_step is None:
        return jnp.int32(0)
    # Clipped first: the difference of two steps may exceed int32, and is not wanted beyond these.
    oldest = jnp.maximum(global_step, -(2**31) + max_staleness + 1) - max_staleness - 1
    return global_step - jnp.clip(local_step, oldest, global_step)


def find_weight(
    staleness_weight: StalenessWeight | None, staleness: jax.Array, dtype: Any
) -> jax.Array | None:
    """What a gradient weighs, a scalar of ``dtype``; ``None`` where all count in full.

    Raises:
      ValueError: the function returns no scalar.
    """
    if staleness_weight is None:
        return None
    weight = jnp.asarray(staleness_weight(staleness))
    if weight.ndim != 0:
        raise ValueError(f"staleness_weight must return a scalar, got shape {weight.shape}")
    return weight.astype(dtype)


def weigh(values: jax.Array, weight: jax.Array | None, dtype: Any) -> jax.Array:
    """Returns ``weight`` times ``values`` in ``dtype``, rounded to it once."""
    if weight is None:
        return values
    if jnp.issubdtype(dtype, jnp.complexfloating):  # a complex weight would turn inf into NaN
        values = values.astype(dtype)
        return jax.lax.complex(*(weigh(x, weight, x.dtype) for x in (values.real, values.imag)))
    wide = promote_dtypes(dtype, weight.dtype)
    return (values.astype(wide) * weight.astype(wide)).astype(dtype)


def count_gradient(
    state: _Counted, verdict: jax.Array, staleness: jax.Array, weight: jax.Array | None
) -> _Counted:
    """Counts a gradient by its verdict, and by its age if it is accepted or stale.

    A verdict that is none, such as -1, changes nothing.
    """
    is_accepted = verdict == Verdict.ACCEPTED
    state = dataclasses.replace(
        state,
        num_accumulated=saturating_add(state.num_accumulated, is_accepted),
        verdict_counts=count_verdict(state.verdict_counts, verdict),
    )
    if state.total_weight is not None:
        weight = jnp.ones_like(state.total_weight) if weight is None else weight
        total = state.total_weight + jnp.where(is_accepted, weight, jnp.zeros_like(weight))
        state = dataclasses.replace(state, total_weight=total)
    if state.staleness_counts is not None:
        ages = jnp.arange(state.staleness_counts.shape[0], dtype=jnp.int32)
        is_counted = (is_accepted | (verdict == Verdict.STALE)) & (ages == staleness)
        counts = saturating_add(state.staleness_counts, is_counted)
        state = dataclasses.replace(state, staleness_counts=counts)
    return state


def count_verdict(counts: jax.Array, verdict: ArrayLike) -> jax.Array:
    """``counts``, which begin with those of verdicts, with one more of ``verdict``."""
    kinds = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return saturating_add(counts, kinds == verdict)
