"""Evaluates a traced backward pass, keeping chosen cotangents as sums of a few slices."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util
from jax.extend.core import primitives

from jaxaccum._sparse_terms import (
    LINEAR_OPERANDS,
    RULES,
    Carry,
    NotSparseError,
    SparseSum,
    Term,
    joined,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["reason"])
@dataclasses.dataclass(frozen=True)
class Dense:
    """A cotangent that was to be a sum of slices and is none.

    Attributes:
      value: the whole array.
      reason: the operation that made it dense, and where that stands in the user's source. Static.
    """

    value: jax.Array
    reason: str


class _CarryReadError(Exception):
    """A loop does more to a running sum than add to it."""

    def __init__(self, carry: Carry, reason: str) -> None:
        super().__init__(carry, reason)
        self.carry, self.reason = carry, reason


def evaluate(jaxpr: Any, args: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """Evaluates ``jaxpr``; wanted results come as ``SparseSum`` where that can be, else ``Dense``.

    Equations that lead linearly to a wanted result are replaced by what they do to slices; all
    others are left as they are.

    Args:
      jaxpr: closed, or open without constants.
      args: an array for each input, or a ``SparseSum`` or ``Dense``.
      wanted: a bool for each result.
    """
    inner = _open(jaxpr)
    sparse = _leading_to(inner, wanted)
    env = dict(zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True))
    env.update(zip(inner.invars, args, strict=True))
    for is_sparse, eqns, needed in _schedule(inner, sparse):
        if not is_sparse:
            _run(inner, eqns, env, needed)
            continue
        for eqn in eqns:
            results = _apply(inner, eqn, env, [v in sparse for v in eqn.outvars])
            env.update(zip(eqn.outvars, results, strict=True))
    results = [_read(env, atom) for atom in inner.outvars]
    for k, (value, atom) in enumerate(zip(results, inner.outvars, strict=True)):
        if not wanted[k]:
            results[k] = whole(value, atom.aval, "its use as a result")
        elif not isinstance(value, SparseSum | Dense):
            results[k] = Dense(value, "a dense array that a derivative rule returns")
    return results


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else env[atom]


def whole(value: Any, aval: Any, reader: str) -> Any:
    """The array that ``value`` stands for."""
    if isinstance(value, SparseSum):
        dense = jnp.zeros(aval.shape, aval.dtype)
        for term in value.terms:
            if isinstance(term, Carry):
                raise _CarryReadError(term, reader)
            dense = term.add_to(dense)
        return dense
    return value.value if isinstance(value, Dense) else value


def where(eqn: core.JaxprEqn) -> str:
    """Names an equation and the line of the user's source it comes from."""
    own = str(pathlib.Path(__file__).parent)
    frames = source_info_util.summarize(eqn.source_info, num_frames=50).splitlines()[::-1]
    users = [f for f in frames if "site-packages" not in f and not f.startswith(own)]
    place = (users or frames or ["an unknown line"])[0]
    return f"`{eqn.primitive.name}` at {place}"


# What is evaluated when.


def _leading_to(jaxpr: Any, wanted: Iterable[bool]) -> set[Any]:
    """The variables from which the wanted results are made linearly."""
    found = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and _is_var(v)}
    for eqn in reversed(jaxpr.eqns):
        results = [v in found for v in eqn.outvars]
        if any(results):
            name = eqn.primitive.name
            if name in _CALLS:
                operands = _CALLS[name].linear_in(eqn, results)
            else:
                count = LINEAR_OPERANDS.get(name, 1) if name in RULES else 0
                operands = eqn.invars[:count]
            found.update(filter(_is_var, operands))
    return found


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def _schedule(jaxpr: Any, sparse: set[Any]) -> list[tuple[bool, list[Any], set[Any]]]:
    """Runs of equations: (whether they deal with slices, the equations, what is read later).

    All that needs no wanted cotangent goes first and in one piece.
    """
    late: set[Any] = set()
    first, rest = [], []
    for eqn in jaxpr.eqns:
        is_sparse = not sparse.isdisjoint(eqn.outvars)
        if is_sparse or any(_is_var(v) and v in late for v in eqn.invars):
            rest.append((is_sparse, eqn))
            late.update(eqn.outvars)
        else:
            first.append(eqn)
    runs = [(False, first)]
    for is_sparse, pairs in itertools.groupby(rest, key=lambda pair: pair[0]):
        runs.append((is_sparse, [eqn for _, eqn in pairs]))
    schedule, needed = [], set(filter(_is_var, jaxpr.outvars))
    for is_sparse, eqns in reversed(runs):
        schedule.append((is_sparse, eqns, set(needed)))
        needed.update(v for eqn in eqns for v in eqn.invars if _is_var(v))
    return schedule[::-1]


def _run(jaxpr: Any, eqns: Sequence[Any], env: dict[Any, Any], needed: set[Any]) -> None:
    """Evaluates equations as they are."""
    made = {v for eqn in eqns for v in eqn.outvars}
    readers = {v: eqn for eqn in reversed(eqns) for v in eqn.invars if _is_var(v) and v not in made}
    results = [v for v in made if v in needed]
    part = jaxpr.replace(constvars=[], invars=list(readers), outvars=results, eqns=list(eqns))
    args = [whole(env[v], v.aval, where(eqn)) for v, eqn in readers.items()]
    env.update(zip(results, core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*args), strict=True))


def _apply(jaxpr: Any, eqn: Any, env: dict[Any, Any], wanted: list[bool]) -> list[Any]:
    """Evaluates one equation on slices, or as it is if it cannot keep them."""
    operands = [_read(env, atom) for atom in eqn.invars]
    name = eqn.primitive.name
    try:
        if name in _CALLS:
            return _CALLS[name].apply(eqn, operands, wanted)
        if name in RULES:
            return list(
                RULES[name](eqn, [o.value if isinstance(o, Dense) else o for o in operands])
            )
    except NotSparseError:
        pass
    reason = where(eqn)
    for operand in operands:
        # A cotangent of the table's own shape was dense before; here it only passes by.
        if isinstance(operand, Dense) and operand.value.shape == eqn.outvars[0].aval.shape:
            reason = operand.reason if name not in ("mul", "div") else reason
    try:
        _run(jaxpr, [eqn], env, set(eqn.outvars))
    except _CarryReadError as error:
        raise _CarryReadError(error.carry, reason) from None
    return [
        Dense(env[v], reason) if want else env[v]
        for v, want in zip(eqn.outvars, wanted, strict=True)
    ]


# Equations that hold equations.


@dataclasses.dataclass(frozen=True)
class _Call:
    """How to look into an equation that holds others.

    Attributes:
      linear_in: (equation, which results are wanted) -> the operands that lead to them linearly.
      apply: (equation, operands, which results are wanted) -> results.
    """

    linear_in: Callable[[Any, Sequence[bool]], Iterable[Any]]
    apply: Callable[[Any, Sequence[Any], Sequence[bool]], list[Any]]


def _linear_in_body(eqn: Any, wanted: Sequence[bool], body: Any = None, skip: int = 0) -> list[Any]:
    inner = _open(body or _body(eqn))
    found = _leading_to(inner, wanted)
    return [a for a, v in zip(eqn.invars[skip:], inner.invars, strict=True) if v in found]


def _body(eqn: Any) -> Any:
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def _inline(eqn: Any, operands: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    return evaluate(_body(eqn), operands, wanted)


# jax.jit compiles once for each function object, so that a jitted loss called outside of jit needs
# one function for each of its (cached) jaxprs. Weak on both sides: nothing is kept alive by it.
_jitted: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _jit(eqn: Any, operands: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    jaxpr = eqn.params["jaxpr"]
    functions, key = _jitted.setdefault(jaxpr, {}), tuple(wanted)
    if key not in functions:
        weak = weakref.ref(jaxpr)

        def call(*args: Any) -> list[Any]:
            return evaluate(weak(), args, key)

        call.__name__ = call.__qualname__ = str(eqn.params.get("name", "call"))
        functions[key] = jax.jit(call)
    return list(functions[key](*operands))


def _remat(eqn: Any, operands: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """Binds the primitive anew: jax.checkpoint would not keep the recomputation from being merged."""
    leaves, tree = jax.tree.flatten(list(operands))

    def call(*leaves: Any) -> list[Any]:
        return evaluate(eqn.params["jaxpr"], jax.tree.unflatten(tree, leaves), wanted)

    closed, shapes = jax.make_jaxpr(call, return_shape=True)(*leaves)
    inner = _open(closed)
    inputs = [*inner.constvars, *inner.invars]
    body = inner.replace(constvars=[], invars=inputs)
    results = eqn.primitive.bind(*closed.consts, *leaves, **{**eqn.params, "jaxpr": body})
    return list(jax.tree.unflatten(jax.tree.structure(shapes), results))


def _linear_in_cond(eqn: Any, wanted: Sequence[bool]) -> list[Any]:
    return [v for b in eqn.params["branches"] for v in _linear_in_body(eqn, wanted, b, skip=1)]


def _cond(eqn: Any, operands: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
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
        next((v.reason for v in values if isinstance(v, Dense)), where(eqn)) for values in outcomes
    ]

    def fitted(call: Callable[..., list[Any]], *a: Any) -> list[Any]:
        return [
            whole(value, var.aval, where(eqn))
            if slot is None
            else _fit(value, slot, var.aval.dtype)
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
        whole = [size for axis, size in enumerate(shape) if axis not in axes]
        filler = Term(coords, jnp.zeros((free, *whole), dtype), axes, shape)
        fitted.append(joined([*terms, filler]))
    return SparseSum(tuple(fitted))


def _carries(eqn: Any) -> tuple[int, int]:
    """How many constants and carries a scan has: scanned arrays have one axis more outside."""
    inner = _open(_body(eqn))
    inside, outside = inner.outvars, eqn.outvars
    carries = sum(a.aval.ndim == b.aval.ndim for a, b in zip(inside, outside, strict=True))
    scanned = sum(a.aval.ndim < b.aval.ndim for a, b in zip(inner.invars, eqn.invars, strict=True))
    return len(eqn.invars) - carries - scanned, carries


def _linear_in_scan(eqn: Any, wanted: Sequence[bool]) -> list[Any]:
    consts, carries = _carries(eqn)
    return [eqn.invars[consts + i] for i in range(carries) if wanted[i]]


def _scan(eqn: Any, operands: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """A cotangent that steps do nothing to but add is taken out of the carry and stacked up."""
    consts, carries = _carries(eqn)
    inner = _open(_body(eqn))
    summed = {
        i: Carry(inner.invars[consts + i])
        for i in range(carries)
        if wanted[i] and isinstance(operands[consts + i], SparseSum)
    }
    reasons = {}
    while True:
        try:
            results = _summing_scan(eqn, operands, summed)
            break
        except _CarryReadError as error:
            (index,) = [i for i, carry in summed.items() if carry == error.carry] or [None]
            if index is None:
                raise  # an outer loop's
            reasons[index] = error.reason
            del summed[index]
    return [
        Dense(value, reasons.get(i, where(eqn))) if want and i not in summed else value
        for i, (value, want) in enumerate(zip(results, wanted, strict=True))
    ]


def _summing_scan(eqn: Any, operands: Sequence[Any], summed: dict[int, Carry]) -> list[Any]:
    first, carries = _carries(eqn)
    plain = [
        operand if i - first in summed else whole(operand, atom.aval, where(eqn))
        for i, (operand, atom) in enumerate(zip(operands, eqn.invars, strict=True))
    ]
    consts, init, xs = plain[:first], plain[first : first + carries], plain[first + carries :]
    wanted = [i in summed for i in range(len(eqn.outvars))]

    def step(carry: dict[int, Any], x: Sequence[Any]) -> Any:
        full = [SparseSum((summed[i],)) if i in summed else carry[i] for i in range(carries)]
        results = evaluate(_body(eqn), [*consts, *full, *x], wanted)
        added = {i: _added_to(own, results[i]) for i, own in summed.items()}
        return {i: results[i] for i in carry}, (results[carries:], added)

    dense = {i: value for i, value in enumerate(init) if i not in summed}
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    final, (ys, added) = jax.lax.scan(step, dense, xs, **options)
    for i, terms in added.items():
        final[i] = SparseSum((*init[i].terms, *map(_unstacked, terms)))
    return [*(final[i] for i in range(carries)), *ys]


def _added_to(own: Carry, result: Any) -> tuple[Term, ...]:
    if isinstance(result, Dense):
        raise _CarryReadError(own, result.reason)
    carried = [term for term in result.terms if isinstance(term, Carry)]
    if carried != [own]:
        raise _CarryReadError(own, "a loop that does not add up")
    return tuple(term for term in result.terms if isinstance(term, Term))


def _unstacked(term: Term) -> Term:
    """The slices of all steps in a row."""
    values = term.values.reshape(-1, *term.values.shape[2:])
    return dataclasses.replace(
        term, coords=tuple(coord.reshape(-1) for coord in term.coords), values=values
    )


_CALLS = {
    primitives.jit_p.name: _Call(_linear_in_body, _jit),
    primitives.remat_p.name: _Call(_linear_in_body, _remat),
    primitives.closed_call_p.name: _Call(_linear_in_body, _inline),
    primitives.call_p.name: _Call(_linear_in_body, _inline),
    primitives.cond_p.name: _Call(_linear_in_cond, _cond),
    primitives.scan_p.name: _Call(_linear_in_scan, _scan),
}
