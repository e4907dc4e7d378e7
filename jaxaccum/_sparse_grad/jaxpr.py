"""What this room reads of a traced program: its types, and the user's lines it comes from."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend import core, source_info_util

Equation: TypeAlias = core.JaxprEqn
Jaxpr: TypeAlias = core.Jaxpr
AnyJaxpr: TypeAlias = core.Jaxpr | core.ClosedJaxpr
Var: TypeAlias = core.Var
Atom: TypeAlias = core.Var | core.Literal


def open_jaxpr(jaxpr: AnyJaxpr) -> Jaxpr:
    """Returns the jaxpr itself, closed or not."""
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def is_var(atom: Atom) -> bool:
    """Whether an operand or result is a variable and no literal."""
    return not isinstance(atom, core.Literal)


def is_zero(atom: Atom) -> bool:
    """Whether an operand of an equation is the literal number 0."""
    return isinstance(atom, core.Literal) and np.ndim(atom.val) == 0 and not atom.val


def replace(jaxpr: Jaxpr, **changes: object) -> Jaxpr:
    """Returns a copy of ``jaxpr`` with other variables or equations."""
    return jaxpr.replace(**changes)  # type: ignore[no-untyped-call]


def bind(eqn: Equation, operands: Sequence[object], **changes: object) -> Any:
    """Does what an equation does to other operands, with other parameters."""
    params = {**eqn.params, **changes}
    return eqn.primitive.bind(*operands, **params)  # type: ignore[no-untyped-call]


def get_type(atom: Atom) -> ShapedArray:
    """Returns shape, dtype and the like of an operand or result."""
    return atom.aval  # type: ignore[return-value]  # there are arrays alone on a gradient's way


def is_inexact(atom: Atom) -> bool:
    """Whether an operand or result can be a cotangent: floating-point or complex."""
    return jnp.issubdtype(getattr(atom.aval, "dtype", bool), jnp.inexact)


def get_varying_axes(array_type: object) -> frozenset[str]:
    """Returns the axes of an enclosing shard_map along which an array of this type varies."""
    kind = getattr(array_type, "manual_axis_type", None)
    return getattr(kind, "varying", frozenset())


def find_source_line(eqn: Equation) -> str:
    """Returns the line of the user's source that an equation comes from.

    Empty if JAX has kept none: equations of a jitted function of ``jax.numpy`` know just the lines
    in it, and the equation that calls it knows the user's.
    """
    own = str(pathlib.Path(__file__).parent)
    frames = source_info_util.summarize(eqn.source_info, num_frames=50).splitlines()[::-1]
    users = [f for f in frames if "site-packages" not in f and not f.startswith(own)]
    return users[0] if users else ""


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why a gradient is dense.

    Attributes:
      source_line: of the user's source; empty if unknown.
      action: what is done there, as the rest of a sentence.
    """

    source_line: str
    action: str

    def __str__(self) -> str:
        return f"{self.source_line or 'an unknown line'} {self.action}"


def blame(eqn: Equation) -> Cause:
    """Says that an equation makes a gradient dense."""
    name = eqn.primitive.name
    return Cause(
        find_source_line(eqn), f"does more than look up rows of it (`{name}` going backward)"
    )
