"""Modules as arguments: what Equinox and Flax nnx differentiate of theirs, and what they keep.

``eqx.filter_value_and_grad`` differentiates in the inexact arrays of a module, and has ``None``
for all else; ``nnx.value_and_grad`` in its parameters, and carries on the state that a call changes
(batch statistics, counts of random numbers). So does this.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._rows.modules import find_library, holds_equinox, is_nnx_module


@dataclasses.dataclass(frozen=True)
class SplitModule:
    """A module taken apart into arrays to differentiate in, and all else.

    Attributes:
      arrays: a tree of inexact arrays.
      rebuild: makes the module of such a tree.
      read_state: returns what a call may have changed in a module that was rebuilt.
      write_state: puts that into the module of the caller.
    """

    arrays: Any
    rebuild: Callable[[Any], Any]
    read_state: Callable[[Any], Any] = lambda module: None
    write_state: Callable[[Any], None] = lambda state: None


def argument_position(number: Any) -> int:
    """Returns the position that an entry of ``argnums`` names, an ``nnx.DiffState`` or a number."""
    return operator.index(getattr(number, "argnum", number))


def split_modules(args: Sequence[Any], numbers: Mapping[int, Any]) -> dict[int, SplitModule]:
    """Takes those arguments apart that are modules and hold more than inexact arrays.

    Args:
      args: all positional arguments.
      numbers: for each position that is differentiated in, its entry of ``argnums``.
    """
    split = {}
    for position, number in numbers.items():
        if is_nnx_module(args[position]):
            split[position] = _split_nnx(args[position], number)
        elif holds_equinox(args[position]) and not _is_inexact_tree(args[position]):
            split[position] = _split_equinox(args[position])
    return split


def call_with_modules(
    differentiate: Callable[..., Any],
    fun: Callable[..., Any],
    has_aux: bool,
    args: Sequence[Any],
    modules: Mapping[int, SplitModule],
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Calls ``differentiate`` of ``fun``, which sees modules, on the arrays these are made of.

    Args:
      differentiate: takes a function and ``has_aux``, as `jax.value_and_grad` does.
      fun: what the user wants differentiated.
      has_aux: whether ``fun`` returns ``(value, aux)``.
      args: all positional arguments.
      modules: those of them that are modules.
      **kwargs: for ``fun``.
    """

    def fun_of_arrays(*arrays: Any, **kwargs: Any) -> Any:
        full = list(arrays)
        for position, module in modules.items():
            full[position] = module.rebuild(arrays[position])
        result = fun(*full, **kwargs)
        value, aux = result if has_aux else (result, None)
        return value, (aux, {p: m.read_state(full[p]) for p, m in modules.items()})

    arrays = [modules[p].arrays if p in modules else arg for p, arg in enumerate(args)]
    (value, (aux, states)), grads = differentiate(fun_of_arrays, has_aux=True)(*arrays, **kwargs)
    for position, module in modules.items():
        module.write_state(states[position])
    return ((value, aux) if has_aux else value), grads


def _is_inexact_tree(tree: Any) -> bool:
    return all(map(_is_inexact_array, jax.tree.leaves(tree)))


def _is_inexact_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _split_equinox(module: Any) -> SplitModule:
    eqx: Any = find_library("equinox")
    arrays, others = eqx.partition(module, eqx.is_inexact_array)
    return SplitModule(arrays, lambda arrays: eqx.combine(arrays, others))


def _split_nnx(module: Any, number: Any) -> SplitModule:
    nnx: Any = find_library("flax.nnx")
    chosen = getattr(number, "filter", nnx.Param)
    graph, arrays, others = nnx.split(module, chosen, ...)
    return SplitModule(
        arrays,
        lambda arrays: nnx.merge(graph, arrays, others, copy=True),
        lambda module: nnx.state(module, nnx.Not(chosen)),
        lambda state: nnx.update(module, state),
    )
