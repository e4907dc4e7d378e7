"""Equations that hold equations: how a sum of slices gets out of calls, branches and loops."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives

from jaxaccum._sparse_grad.rules import LINEAR_OPERANDS, RULES, blame, is_var, open_jaxpr, place
from jaxaccum._sparse_grad.terms import (
    Carry,
    CarryReadError,
    Dense,
    SparseSum,
    Term,
    joined,
    whole,
)


@dataclasses.dataclass(frozen=True)
class Call:
    """How to look into an equation that holds others.

    Attributes:
      linear_in: (equation, which results are wanted) -> the operands that lead to them linearly.
      apply: (``evaluate`` of jaxaccum._sparse_walk, which works on what is inside; equation,
        operands, which results are wanted) -> results.
    """

    linear_in: Callable[[Any, Sequence[bool]], Iterable[Any]]
    apply: Callable[[Any, Any, Sequence[Any], Sequence[bool]], list[Any]]


def leading_to(jaxpr: Any, wanted: Iterable[bool]) -> set[Any]:
    """The variables from which the wanted results are made linearly."""
    found = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and is_var(v)}
    for eqn in reversed(jaxpr.eqns):
        results = [v in found for v in eqn.outvars]
        if any(results):
            name = eqn.primitive.name
            if name in CALLS:
                operands = CALLS[name].linear_in(eqn, results)
            else:
                count = LINEAR_OPERANDS.get(name, 1) if name in RULES else 0
                operands = eqn.invars[:count]
            found.update(filter(is_var, operands))
    return found


def _linear_in_body(eqn: Any, wanted: Sequence[bool], body: Any = None, skip: int = 0) -> list[Any]:
    inner = open_jaxpr(body or _body(eqn))
    found = leading_to(inner, wanted)
    return [a for a, v in zip(eqn.invars[skip:], inner.invars, strict=True) if v in found]


def _body(eqn: Any) -> Any:
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def _inline(evaluate: Any, eqn: Any, operands: Any, wanted: Any) -> list[Any]:
    return list(evaluate(_body(eqn), operands, wanted))


# jax.jit compiles once for each function object, so that a jitted loss called outside of jit needs
# one function for each of its (cached) jaxprs. Weak on both sides: nothing is kept alive by it.
_jitted: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _jit(evaluate: Any, eqn: Any, operands: Any, wanted: Any) -> list[Any]:
    jaxpr = eqn.params["jaxpr"]
    functions, key = _jitted.setdefault(jaxpr, {}), tuple(wanted)
    if key not in functions:
        weak = weakref.ref(jaxpr)

        def call(*args: Any) -> list[Any]:
            return list(evaluate(weak(), args, key))

        call.__name__ = call.__qualname__ = str(eqn.params.get("name", "call"))
        functions[key] = jax.jit(call)
    return list(functions[key](*operands))


def _remat(evaluate: Any, eqn: Any, operands: Any, wanted: Any) -> list[Any]:
    """Binds the primitive anew: with jax.checkpoint XLA would merge the recomputation away."""
    leaves, tree = jax.tree.flatten(list(operands))

    def call(*leaves: Any) -> list[Any]:
        return list(evaluate(_body(eqn), jax.tree.unflatten(tree, leaves), wanted))

    closed, shapes = jax.make_jaxpr(call, return_shape=True)(*leaves)
    inner = open_jaxpr(closed)
    body = inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars])
    barrier = eqn.params["prevent_cse"]  # a bool, or one for each operand
    if isinstance(barrier, bool):
        barrier = (barrier,) * len(operands)
    barrier = [True] * len(closed.consts) + [
        flag
        for operand, flag in zip(operands, barrier, strict=True)
        for _ in jax.tree.leaves(operand)
    ]
    params = {**eqn.params, "jaxpr": body, "prevent_cse": tuple(barrier)}
    results = eqn.primitive.bind(*closed.consts, *leaves, **params)
    return list(jax.tree.unflatten(jax.tree.structure(shapes), results))


def _linear_in_cond(eqn: Any, wanted: Sequence[bool]) -> list[Any]:
    return [v for b in eqn.params["branches"] for v in _linear_in_body(eqn, wanted, b, skip=1)]


def _cond(evaluate: Any, eqn: Any, operands: Any, wanted: Any) -> list[Any]:
    """Every branch returns the same slots, padded where it fills fewer than another."""
    index, *args = operands
    calls = [
        functools.partial(lambda branch, *a: evaluate(branch, a, wanted), branch)
        for branch in eqn.params["branches"]
    ]
    outcomes = list(zip(*(jax.eval_shape(call, *args) for call in calls), strict=True))
    slots = [
        _slots(values) if want else None for values, want in zip(outcomes, wanted, strict=True)
    ]
    reasons = [
        next((v.reason for v in values if isinstance(v, Dense)), blame(eqn)) for values in outcomes
    ]

    def fitted(call: Callable[..., list[Any]], *a: Any) -> list[Any]:
        return [
            whole(value, var.aval) if slot is None else _fit(value, slot, var.aval.dtype)
            for value, slot, var in zip(call(*a), slots, eqn.outvars, strict=True)
        ]

    results = jax.lax.switch(index, [functools.partial(fitted, call) for call in calls], *args)
    return [
        Dense(value, reason) if want and slot is None else value
        for value, want, slot, reason in zip(results, wanted, slots, reasons, strict=True)
    ]


def _slots(values: Sequence[Any]) -> dict[Any, int] | None:
    """How many slices of each kind (axes, shape) any branch has, ``None`` if one is dense."""
    slots: dict[Any, int] = {}
    for value in values:
        if not isinstance(value, SparseSum) or any(isinstance(t, Carry) for t in value.terms):
            return None
        for kind, terms in _kinds(value).items():
            slots[kind] = max(sum(len(t.values) for t in terms), slots.get(kind, 0))
    return slots


def _kinds(value: Any) -> dict[Any, list[Term]]:
    kinds: dict[Any, list[Term]] = {}
    for term in value.terms:
        kinds.setdefault((term.axes, term.shape), []).append(term)
    return kinds


def _fit(value: Any, slots: dict[Any, int], dtype: Any) -> SparseSum:
    """One term of each kind, with slices to be ignored in the slots that stay free."""
    kinds, fitted = _kinds(value), []
    for (axes, shape), count in slots.items():
        terms = kinds.get((axes, shape), [])
        free = count - sum(len(term.values) for term in terms)
        coords = tuple(jnp.full(free, shape[axis], jnp.int32) for axis in axes)
        sizes = [size for axis, size in enumerate(shape) if axis not in axes]
        filler = Term(coords, jnp.zeros((free, *sizes), dtype), axes, shape)
        fitted.append(joined([filler, *terms]))
    return SparseSum(tuple(fitted))


def _carries(eqn: Any) -> tuple[int, int]:
    """How many constants and carries a scan has: scanned arrays have one axis more outside."""
    inner = open_jaxpr(_body(eqn))
    inside, outside = inner.outvars, eqn.outvars
    carries = sum(a.aval.ndim == b.aval.ndim for a, b in zip(inside, outside, strict=True))
    scanned = sum(a.aval.ndim < b.aval.ndim for a, b in zip(inner.invars, eqn.invars, strict=True))
    return len(eqn.invars) - carries - scanned, carries


def _linear_in_scan(eqn: Any, wanted: Sequence[bool]) -> list[Any]:
    consts, carries = _carries(eqn)
    return [eqn.invars[consts + i] for i in range(carries) if wanted[i]]


def _scan(evaluate: Any, eqn: Any, operands: Any, wanted: Any) -> list[Any]:
    """A cotangent that steps do nothing to but add is taken out of the carry and stacked up."""
    consts, carries = _carries(eqn)
    inner = open_jaxpr(_body(eqn))
    summed = {
        i: Carry(inner.invars[consts + i])
        for i in range(carries)
        if wanted[i] and isinstance(operands[consts + i], SparseSum)
    }
    reasons = {}
    while True:
        try:
            results = _summing_scan(evaluate, eqn, operands, summed)
            break
        except CarryReadError as error:
            own = [i for i, carry in summed.items() if carry == error.carry]
            if not own:
                raise  # an outer loop's
            reasons[own[0]] = error.reason
            del summed[own[0]]
    return [
        Dense(value, reasons.get(i, blame(eqn))) if want and i not in summed else value
        for i, (value, want) in enumerate(zip(results, wanted, strict=True))
    ]


def _summing_scan(evaluate: Any, eqn: Any, operands: Any, summed: dict[int, Carry]) -> list[Any]:
    first, carries = _carries(eqn)
    plain = [
        operand if i < first or i - first in summed else whole(operand, atom.aval)
        for i, (operand, atom) in enumerate(zip(operands, eqn.invars, strict=True))
    ]
    consts, init, xs = plain[:first], plain[first : first + carries], plain[first + carries :]
    wanted = [i in summed for i in range(len(eqn.outvars))]

    def step(carry: dict[int, Any], x: Sequence[Any]) -> Any:
        full = [SparseSum((summed[i],)) if i in summed else carry[i] for i in range(carries)]
        results = evaluate(_body(eqn), [*consts, *full, *x], wanted)
        added = {i: _added_to(own, results[i], eqn) for i, own in summed.items()}
        return {i: results[i] for i in carry}, (results[carries:], added)

    dense = {i: value for i, value in enumerate(init) if i not in summed}
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    final, (ys, added) = jax.lax.scan(step, dense, xs, **options)
    for i, terms in added.items():
        final[i] = SparseSum((*init[i].terms, *map(_unstacked, terms)))
    return [*(final[i] for i in range(carries)), *ys]


def _added_to(own: Carry, result: Any, eqn: Any) -> tuple[Term, ...]:
    if isinstance(result, Dense):
        raise CarryReadError(own, result.reason)
    carried = [term for term in result.terms if isinstance(term, Carry)]
    if carried != [own]:
        raise CarryReadError(own, f"{place(eqn)} loops over it and changes more than rows of it")
    return tuple(term for term in result.terms if isinstance(term, Term))


def _unstacked(term: Term) -> Term:
    """The slices of all steps in a row."""
    values = term.values.reshape(-1, *term.values.shape[2:])
    return dataclasses.replace(
        term, coords=tuple(coord.reshape(-1) for coord in term.coords), values=values
    )


CALLS = {
    primitives.jit_p.name: Call(_linear_in_body, _jit),
    primitives.remat_p.name: Call(_linear_in_body, _remat),
    primitives.closed_call_p.name: Call(_linear_in_body, _inline),
    primitives.call_p.name: Call(_linear_in_body, _inline),
    primitives.cond_p.name: Call(_linear_in_cond, _cond),
    primitives.scan_p.name: Call(_linear_in_scan, _scan),
}
