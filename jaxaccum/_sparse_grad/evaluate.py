"""Evaluates a traced backward pass, keeping chosen cotangents as sums of a few slices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from jaxaccum._sparse_grad.control_flow import CALLS, find_leading
from jaxaccum._sparse_grad.jaxpr import (
    AnyJaxpr,
    Atom,
    Cause,
    Equation,
    Jaxpr,
    bind,
    blame,
    find_source_line,
    get_type,
    is_var,
    open_jaxpr,
    replace,
)
from jaxaccum._sparse_grad.rules import RULES, count_linear_operands
from jaxaccum._sparse_grad.terms import (
    Carry,
    CarryReadError,
    Dense,
    Operand,
    SparseSum,
    Table,
    Term,
    Value,
    make_whole,
)
from jaxaccum._sparse_grad.windows import NotSparseError

# What each variable holds.
Environment: TypeAlias = dict[Atom, Value]

_LOOKUPS = (primitives.gather_p.name, primitives.dynamic_slice_p.name)


def evaluate(jaxpr: AnyJaxpr, args: Sequence[Value], wanted: Sequence[bool]) -> list[Value]:
    """Evaluates ``jaxpr``; wanted results come as ``SparseSum`` where that can be, else ``Dense``.

    Equations that lead linearly to a wanted result are replaced by what they do to slices; all
    others are left as they are.

    Args:
      jaxpr: closed, or open without constants.
      args: an array for each input, or a ``SparseSum``, ``Dense`` or ``Table``.
      wanted: a bool for each result.
    """
    inner = open_jaxpr(jaxpr)
    sparse = find_leading(inner, wanted)
    env: Environment = dict(zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True))
    env.update(zip(inner.invars, args, strict=True))
    _postpone_casts(inner, env)
    for is_looked_into, eqns, needed in _schedule(inner, sparse, env):
        if not is_looked_into:
            _run(inner, eqns, env, needed)
            continue
        for eqn in eqns:
            results = _apply(inner, eqn, env, [v in sparse for v in eqn.outvars])
            env.update(zip(eqn.outvars, results, strict=True))
    results = [_read(env, atom) for atom in inner.outvars]
    for k, (value, atom) in enumerate(zip(results, inner.outvars, strict=True)):
        if not wanted[k]:
            results[k] = make_whole(value, get_type(atom))
        elif not isinstance(value, SparseSum | Dense):
            cause = Cause("a derivative rule", "returns a dense array")
            results[k] = Dense(make_whole(value, get_type(atom)), cause)
    return results


def _read(env: Environment, atom: Atom) -> Value:
    return atom.val if isinstance(atom, core.Literal) else env[atom]


def _postpone_casts(jaxpr: Jaxpr, env: Environment) -> None:
    """Leaves the first cast of a table to those who read it.

    XLA merges a cast with the lookup that reads it, but not across the border of a loop, a branch
    or a recomputation: there it would cast the whole table.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive is primitives.convert_element_type_p and is_var(eqn.invars[0]):
            table, cast = env.get(eqn.invars[0]), get_type(eqn.outvars[0])
            is_plain = jnp.issubdtype(cast.dtype, jnp.inexact) and not cast.weak_type
            if isinstance(table, Table) and not table.is_cast and is_plain:
                env[eqn.outvars[0]] = Table(table.value, cast.dtype)


def _schedule(
    jaxpr: Jaxpr, sparse: set[Atom], env: Environment
) -> list[tuple[bool, list[Equation], set[Atom]]]:
    """Returns runs of equations: (whether they are looked into, they, what is read later).

    All that needs no wanted cotangent goes first and in one piece.
    """
    late: set[Atom] = set()
    first: list[Equation] = []
    rest: list[tuple[bool, Equation]] = []
    for eqn in jaxpr.eqns:
        if eqn.outvars and eqn.outvars[0] in env:
            continue  # a postponed cast
        reads = [v for v in eqn.invars if is_var(v)]
        looked_into = not sparse.isdisjoint(eqn.outvars) or (
            eqn.primitive.name in {*CALLS, *_LOOKUPS} and any(_is_cast(env.get(v)) for v in reads)
        )
        if looked_into or not late.isdisjoint(reads):
            rest.append((looked_into, eqn))
            late.update(eqn.outvars)
        else:
            first.append(eqn)
    runs = [(False, first)]
    for looked_into, pairs in itertools.groupby(rest, key=lambda pair: pair[0]):
        runs.append((looked_into, [eqn for _, eqn in pairs]))
    schedule, needed = [], set(filter(is_var, jaxpr.outvars))
    for looked_into, eqns in reversed(runs):
        schedule.append((looked_into, eqns, set(needed)))
        needed.update(v for eqn in eqns for v in eqn.invars if is_var(v))
    return schedule[::-1]


def _is_cast(value: Value | None) -> bool:
    return isinstance(value, Table) and value.is_cast


def _run(jaxpr: Jaxpr, eqns: Sequence[Equation], env: Environment, needed: set[Atom]) -> None:
    """Evaluates equations as they are."""
    made = {v for eqn in eqns for v in eqn.outvars}
    readers = {v: eqn for eqn in reversed(eqns) for v in eqn.invars if is_var(v) and v not in made}
    args = []
    for v, eqn in readers.items():
        try:
            args.append(make_whole(env[v], get_type(v)))
        except CarryReadError as error:
            raise CarryReadError(error.carry, blame(eqn)) from None
    results = [v for eqn in eqns for v in eqn.outvars if v in needed]
    part = replace(jaxpr, constvars=[], invars=list(readers), outvars=results, eqns=list(eqns))
    env.update(zip(results, core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*args), strict=True))


def _apply(jaxpr: Jaxpr, eqn: Equation, env: Environment, wanted: Sequence[bool]) -> list[Value]:
    """Evaluates one equation on slices, or as it is if it cannot keep them."""
    operands = [_read(env, atom) for atom in eqn.invars]
    name, table = eqn.primitive.name, operands[0] if operands else None
    if name in CALLS:
        return _call(eqn, operands, wanted)
    if name in _LOOKUPS and isinstance(table, Table) and table.is_cast:
        rows = bind(eqn, [table.value, *operands[1:]])
        return [jax.lax.convert_element_type(rows, table.dtype)]
    try:
        try:
            results = _apply_rule(eqn, operands)
        except NotSparseError:
            _run(jaxpr, [eqn], env, set(eqn.outvars))
            results = [env[v] for v in eqn.outvars]
    except CarryReadError as error:
        raise CarryReadError(error.carry, _blame(eqn, operands)) from None
    return [
        Dense(value, _blame(eqn, operands)) if want and isinstance(value, jax.Array) else value
        for value, want in zip(results, wanted, strict=True)
    ]


def _apply_rule(eqn: Equation, operands: Sequence[Value]) -> Sequence[Value]:
    if eqn.primitive.name not in RULES:
        raise NotSparseError
    count = count_linear_operands(eqn)
    types = [get_type(atom) for atom in eqn.invars]
    sums: list[Operand] = [
        value if isinstance(value, SparseSum) else make_whole(value, array_type)
        for value, array_type in zip(operands[:count], types[:count], strict=True)
    ]
    arrays = list(map(make_whole, operands[count:], types[count:]))
    with _mesh_of(eqn):
        return RULES[eqn.primitive.name](eqn, sums, arrays)


def _mesh_of(eqn: Equation) -> AbstractContextManager[object]:
    """Where JAX has made the axes of an explicit mesh Auto for an equation, they are so again."""
    mesh, current = get_type(eqn.outvars[0]).sharding.mesh, jax.sharding.get_abstract_mesh()
    is_other = not current.empty and mesh != current
    return jax.sharding.use_abstract_mesh(mesh) if is_other else nullcontext()


def _blame(eqn: Equation, operands: Sequence[Value]) -> Cause:
    """Says what makes the results dense: the equation, or what has made its operand dense."""
    for operand in operands:
        # A cotangent of the table's own shape was dense before; here it only passes by.
        if (
            isinstance(operand, Dense)
            and operand.value.shape == get_type(eqn.outvars[0]).shape
            and eqn.primitive.name not in ("mul", "div")
        ):
            return operand.cause
    return blame(eqn)


def _call(eqn: Equation, operands: Sequence[Value], wanted: Sequence[bool]) -> list[Value]:
    """Looks into an equation that holds others, and names its line where they know none."""

    def locate(value: Value) -> Value:
        if isinstance(value, Dense) and not value.cause.source_line:
            return dataclasses.replace(value, cause=_name_line(value.cause, eqn))
        if isinstance(value, SparseSum) and any(map(_lacks_line, value.terms)):
            line = find_source_line(eqn)
            terms = (
                dataclasses.replace(term, source_line=term.source_line or line)
                if isinstance(term, Term)
                else term
                for term in value.terms
            )
            return SparseSum(tuple(terms))
        return value

    try:
        return [
            locate(value)
            for value in CALLS[eqn.primitive.name].apply(evaluate, eqn, operands, wanted)
        ]
    except CarryReadError as error:
        if error.cause and not error.cause.source_line:
            raise CarryReadError(error.carry, _name_line(error.cause, eqn)) from None
        raise


def _lacks_line(term: Term | Carry) -> bool:
    return isinstance(term, Term) and not term.source_line


def _name_line(cause: Cause, eqn: Equation) -> Cause:
    return dataclasses.replace(cause, source_line=find_source_line(eqn))
