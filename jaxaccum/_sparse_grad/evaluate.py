"""Evaluates a traced backward pass, keeping chosen cotangents as sums of a few slices."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from jaxaccum._sparse_grad.control_flow import CALLS, leading_to
from jaxaccum._sparse_grad.rules import RULES, NotSparseError, blame, is_var, open_jaxpr
from jaxaccum._sparse_grad.terms import CarryReadError, Dense, SparseSum, Table, whole

_LOOKUPS = (primitives.gather_p.name, primitives.dynamic_slice_p.name)


def evaluate(jaxpr: Any, args: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """Evaluates ``jaxpr``; wanted results come as ``SparseSum`` where that can be, else ``Dense``.

    Equations that lead linearly to a wanted result are replaced by what they do to slices; all
    others are left as they are.

    Args:
      jaxpr: closed, or open without constants.
      args: an array for each input, or a ``SparseSum``, ``Dense`` or ``Table``.
      wanted: a bool for each result.
    """
    inner = open_jaxpr(jaxpr)
    sparse = leading_to(inner, wanted)
    env = dict(zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True))
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
            results[k] = whole(value, atom.aval)
        elif not isinstance(value, SparseSum | Dense):
            results[k] = Dense(whole(value, atom.aval), "a derivative rule returns a dense array")
    return results


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return env[atom] if is_var(atom) else atom.val


def _postpone_casts(jaxpr: Any, env: dict[Any, Any]) -> None:
    """Leaves the first cast of a table to those who read it.

    XLA merges a cast with the lookup that reads it, but not across the border of a loop, a branch
    or a recomputation: there it would cast the whole table.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive is primitives.convert_element_type_p and is_var(eqn.invars[0]):
            table, aval = env.get(eqn.invars[0]), eqn.outvars[0].aval
            is_plain = jnp.issubdtype(aval.dtype, jnp.inexact) and not aval.weak_type
            if isinstance(table, Table) and not _is_cast(table) and is_plain:
                env[eqn.outvars[0]] = Table(table.value, aval.dtype)


def _schedule(jaxpr: Any, sparse: set[Any], env: dict[Any, Any]) -> list[tuple[bool, Any, Any]]:
    """Runs of equations: (whether they are looked into, the equations, what is read later).

    All that needs no wanted cotangent goes first and in one piece.
    """
    late: set[Any] = set()
    first, rest = [], []
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


def _is_cast(value: Any) -> bool:
    return isinstance(value, Table) and value.dtype != value.value.dtype


def _run(jaxpr: Any, eqns: Sequence[Any], env: dict[Any, Any], needed: set[Any]) -> None:
    """Evaluates equations as they are."""
    made = {v for eqn in eqns for v in eqn.outvars}
    readers = {v: eqn for eqn in reversed(eqns) for v in eqn.invars if is_var(v) and v not in made}
    args = []
    for v, eqn in readers.items():
        try:
            args.append(whole(env[v], v.aval))
        except CarryReadError as error:
            raise CarryReadError(error.carry, blame(eqn)) from None
    results = [v for eqn in eqns for v in eqn.outvars if v in needed]
    part = jaxpr.replace(constvars=[], invars=list(readers), outvars=results, eqns=list(eqns))
    env.update(zip(results, core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*args), strict=True))


def _mesh_of(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """Where JAX has made the axes of an explicit mesh Auto for an equation, they are so again."""
    mesh, current = eqn.outvars[0].aval.sharding.mesh, jax.sharding.get_abstract_mesh()
    is_other = not current.empty and mesh != current
    return jax.sharding.use_abstract_mesh(mesh) if is_other else contextlib.nullcontext()


def _apply(jaxpr: Any, eqn: Any, env: dict[Any, Any], wanted: list[bool]) -> list[Any]:
    """Evaluates one equation on slices, or as it is if it cannot keep them."""
    operands = [_read(env, atom) for atom in eqn.invars]
    name = eqn.primitive.name
    if name in CALLS:
        return CALLS[name].apply(evaluate, eqn, operands, wanted)
    if name in _LOOKUPS and _is_cast(operands[0]):
        rows = eqn.primitive.bind(operands[0].value, *operands[1:], **eqn.params)
        return [jax.lax.convert_element_type(rows, operands[0].dtype)]
    if name in RULES:
        arrays = [
            value if isinstance(value, SparseSum) else whole(value, atom.aval)
            for value, atom in zip(operands, eqn.invars, strict=True)
        ]
        with contextlib.suppress(NotSparseError), _mesh_of(eqn):
            return list(RULES[name](eqn, arrays))
    reason = blame(eqn)
    for operand in operands:
        # A cotangent of the table's own shape was dense before; here it only passes by.
        if isinstance(operand, Dense) and operand.value.shape == eqn.outvars[0].aval.shape:
            reason = operand.reason if name not in ("mul", "div") else reason
    try:
        _run(jaxpr, [eqn], env, set(eqn.outvars))
    except CarryReadError as error:
        raise CarryReadError(error.carry, reason) from None
    return [
        Dense(env[v], reason) if want else env[v]
        for v, want in zip(eqn.outvars, wanted, strict=True)
    ]
