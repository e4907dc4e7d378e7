"""Equations that hold equations: how a sum of slices gets out of calls, branches and loops."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

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
    is_inexact,
    is_var,
    open_jaxpr,
    replace,
)
from jaxaccum._sparse_grad.rules import RULES, count_linear_operands
from jaxaccum._sparse_grad.terms import (
    Carry,
    CarryReadError,
    Dense,
    SparseSum,
    Term,
    Value,
    join,
    make_whole,
)

# ``evaluate`` of evaluate.py: (jaxpr, arguments, which results are wanted) -> results.
Evaluate: TypeAlias = Callable[[AnyJaxpr, Sequence[Value], Sequence[bool]], list[Value]]


@dataclasses.dataclass(frozen=True)
class Call:
    """How to look into an equation that holds others.

    Attributes:
      find_linear: (equation, which results are wanted) -> the operands that lead to them linearly.
      apply: (``evaluate``, which works on what is inside; equation, operands, which results are
        wanted) -> results.
    """

    find_linear: Callable[[Equation, Sequence[bool]], list[Atom]]
    apply: Callable[[Evaluate, Equation, Sequence[Value], Sequence[bool]], list[Value]]


def find_leading(jaxpr: Jaxpr, wanted: Iterable[bool]) -> set[Atom]:
    """Returns the variables from which the wanted results are made linearly.

    Variables of integers are none: a cast to them is not linear, nor is what is done with them.
    """
    found: set[Atom] = set()

    def add(atoms: Iterable[Atom]) -> None:
        found.update(atom for atom in atoms if is_var(atom) and is_inexact(atom))

    add(v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want)
    for eqn in reversed(jaxpr.eqns):
        results = [v in found for v in eqn.outvars]
        if any(results):
            name = eqn.primitive.name
            if name in CALLS:
                add(CALLS[name].find_linear(eqn, results))
            elif name in RULES:
                add(eqn.invars[: count_linear_operands(eqn)])
    return found


def _find_in_body(
    eqn: Equation, wanted: Sequence[bool], body: AnyJaxpr | None = None, skip: int = 0
) -> list[Atom]:
    inner = open_jaxpr(body or _get_body(eqn))
    found = find_leading(inner, wanted)
    return [a for a, v in zip(eqn.invars[skip:], inner.invars, strict=True) if v in found]


def _get_body(eqn: Equation) -> AnyJaxpr:
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def _inline(
    evaluate: Evaluate, eqn: Equation, operands: Sequence[Value], wanted: Sequence[bool]
) -> list[Value]:
    return evaluate(_get_body(eqn), operands, wanted)


# jax.jit compiles once for each function object, so that a jitted loss called outside of jit needs
# one function for each of its (cached) jaxprs. Weak on both sides: nothing is kept alive by it.
_Jitted: TypeAlias = dict[tuple[bool, ...], Callable[..., list[Value]]]
_jitted: weakref.WeakKeyDictionary[core.ClosedJaxpr, _Jitted] = weakref.WeakKeyDictionary()


def _jit(
    evaluate: Evaluate, eqn: Equation, operands: Sequence[Value], wanted: Sequence[bool]
) -> list[Value]:
    jaxpr = eqn.params["jaxpr"]
    functions, key = _jitted.setdefault(jaxpr, {}), tuple(wanted)
    if key not in functions:
        weak = weakref.ref(jaxpr)

        def call(*args: Value) -> list[Value]:
            body = weak()
            assert body is not None  # this function lives in its entry
            return evaluate(body, args, key)

        call.__name__ = call.__qualname__ = str(eqn.params.get("name", "call"))
        functions[key] = jax.jit(call)
    return functions[key](*operands)


def _remat(
    evaluate: Evaluate, eqn: Equation, operands: Sequence[Value], wanted: Sequence[bool]
) -> list[Value]:
    """Binds the primitive anew: with jax.checkpoint XLA would merge the recomputation away."""
    leaves, tree = jax.tree.flatten(list(operands))

    def call(*leaves: jax.Array) -> list[Value]:
        return evaluate(_get_body(eqn), jax.tree.unflatten(tree, leaves), wanted)

    closed, shapes = jax.make_jaxpr(call, return_shape=True)(*leaves)
    inner = open_jaxpr(closed)
    body = replace(inner, constvars=[], invars=[*inner.constvars, *inner.invars])
    barrier = eqn.params["prevent_cse"]  # a bool, or one for each operand
    if isinstance(barrier, bool):
        barrier = (barrier,) * len(operands)
    barrier = [True] * len(closed.consts) + [
        flag
        for operand, flag in zip(operands, barrier, strict=True)
        for _ in jax.tree.leaves(operand)
    ]
    operands = [*closed.consts, *leaves]
    results = bind(eqn, operands, jaxpr=body, prevent_cse=tuple(barrier))
    return list(jax.tree.unflatten(jax.tree.structure(shapes), results))


def _find_in_cond(eqn: Equation, wanted: Sequence[bool]) -> list[Atom]:
    return [v for b in eqn.params["branches"] for v in _find_in_body(eqn, wanted, b, skip=1)]


def _cond(
    evaluate: Evaluate, eqn: Equation, operands: Sequence[Value], wanted: Sequence[bool]
) -> list[Value]:
    """Makes every branch return as many slices as any, padded where it has fewer."""
    index, *args = operands
    calls = [
        functools.partial(lambda branch, *a: evaluate(branch, a, wanted), branch)
        for branch in eqn.params["branches"]
    ]
    outcomes = list(zip(*(jax.eval_shape(call, *args) for call in calls), strict=True))
    needs = [
        _count_slices(values) if want else None
        for values, want in zip(outcomes, wanted, strict=True)
    ]

    def fit(call: Callable[..., list[Value]], *a: Value) -> list[Value]:
        return [
            make_whole(value, get_type(var))
            if need is None
            else _pad_slices(value, need, get_type(var).dtype)
            for value, need, var in zip(call(*a), needs, eqn.outvars, strict=True)
        ]

    results = jax.lax.switch(index, [functools.partial(fit, call) for call in calls], *args)
    return [
        Dense(value, next((v.cause for v in values if isinstance(v, Dense)), blame(eqn)))
        if want and need is None
        else value
        for value, want, need, values in zip(results, wanted, needs, outcomes, strict=True)
    ]


@dataclasses.dataclass
class _Need:
    """How many slices of a kind the largest branch has, and a line that looks some up."""

    count: int
    source_line: str


# Which axes of a term have coordinates, and its shape.
_Kind: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def _count_slices(values: Sequence[Value]) -> dict[_Kind, _Need] | None:
    """Returns how many slices of each kind any branch has, ``None`` if one is dense."""
    needs: dict[_Kind, _Need] = {}
    for value in values:
        if not isinstance(value, SparseSum) or any(isinstance(t, Carry) for t in value.terms):
            return None
        for kind, terms in _group_by_kind(value).items():
            need = needs.setdefault(kind, _Need(0, terms[0].source_line))
            need.count = max(sum(len(t.values) for t in terms), need.count)
    return needs


def _group_by_kind(value: SparseSum) -> dict[_Kind, list[Term]]:
    kinds: dict[_Kind, list[Term]] = {}
    for term in value.terms:
        if isinstance(term, Term):
            kinds.setdefault((term.axes, term.shape), []).append(term)
    return kinds


def _pad_slices(value: Value, needs: dict[_Kind, _Need], dtype: np.dtype) -> SparseSum:
    """Returns one term of each kind, filled up with slices that are to be ignored."""
    kinds, fitted = _group_by_kind(value) if isinstance(value, SparseSum) else {}, []
    for (axes, shape), need in needs.items():
        terms = kinds.get((axes, shape), [])
        free = need.count - sum(len(term.values) for term in terms)
        coords = tuple(jnp.full(free, shape[axis], jnp.int32) for axis in axes)
        sizes = [size for axis, size in enumerate(shape) if axis not in axes]
        filler = Term(coords, jnp.zeros((free, *sizes), dtype), axes, shape, need.source_line)
        fitted.append(join([filler, *terms]))
    return SparseSum(tuple(fitted))


def _count_carries(eqn: Equation) -> tuple[int, int]:
    """Returns how many constants and carries a scan has.

    Scanned arrays have one axis more outside than inside. (What says so in the equation's
    parameters is not the same in all versions of JAX.)
    """
    inner = open_jaxpr(_get_body(eqn))

    def count_of_rank(inside: Sequence[Atom], outside: Sequence[Atom], more: int) -> int:
        pairs = zip(inside, outside, strict=True)
        return sum(get_type(a).ndim + more == get_type(b).ndim for a, b in pairs)

    carries = count_of_rank(inner.outvars, eqn.outvars, 0)
    scanned = count_of_rank(inner.invars, eqn.invars, 1)
    return len(eqn.invars) - carries - scanned, carries


def _find_in_scan(eqn: Equation, wanted: Sequence[bool]) -> list[Atom]:
    consts, carries = _count_carries(eqn)
    return [eqn.invars[consts + i] for i in range(carries) if wanted[i]]


def _scan(
    evaluate: Evaluate, eqn: Equation, operands: Sequence[Value], wanted: Sequence[bool]
) -> list[Value]:
    """Takes cotangents that steps do nothing to but add out of the carry, and stacks the terms.

    ::

        carry    0 -> +term -> +term -> +term            carry    (none)
                      step 1   step 2   step 3    --->            step 1   step 2   step 3
                                                         stacked   term     term     term

    Whether a step does more is found by trying it: those of which it does stay in the carry, as
    dense arrays.
    """
    consts, carries = _count_carries(eqn)
    inner = open_jaxpr(_get_body(eqn))
    summed = {
        i: Carry(inner.invars[consts + i])
        for i in range(carries)
        if wanted[i] and isinstance(operands[consts + i], SparseSum)
    }
    causes: dict[int, Cause] = {}
    while True:
        try:
            results = _scan_summing(evaluate, eqn, operands, summed)
            break
        except CarryReadError as error:
            own = [i for i, carry in summed.items() if carry == error.carry]
            if not own:
                raise  # an outer loop's
            causes[own[0]] = error.cause or blame(eqn)
            del summed[own[0]]
    return [
        Dense(make_whole(value, get_type(var)), causes.get(i, blame(eqn)))
        if want and i not in summed
        else value
        for i, (value, want, var) in enumerate(zip(results, wanted, eqn.outvars, strict=True))
    ]


def _scan_summing(
    evaluate: Evaluate, eqn: Equation, operands: Sequence[Value], summed: dict[int, Carry]
) -> list[Value]:
    """Evaluates a scan with the carries ``summed`` taken out of it."""
    first, carries = _count_carries(eqn)
    plain = [
        operand if i < first or i - first in summed else make_whole(operand, get_type(atom))
        for i, (operand, atom) in enumerate(zip(operands, eqn.invars, strict=True))
    ]
    consts, init, xs = plain[:first], plain[first : first + carries], plain[first + carries :]
    wanted = [i in summed for i in range(len(eqn.outvars))]

    def step(
        carry: dict[int, Value], x: Sequence[Value]
    ) -> tuple[dict[int, Value], tuple[list[Value], dict[int, tuple[Term, ...]]]]:
        full = [SparseSum((summed[i],)) if i in summed else carry[i] for i in range(carries)]
        results = evaluate(_get_body(eqn), [*consts, *full, *x], wanted)
        added = {i: _get_added(own, results[i], eqn) for i, own in summed.items()}
        return {i: results[i] for i in carry}, (results[carries:], added)

    dense = {i: value for i, value in enumerate(init) if i not in summed}
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    final, (ys, added) = jax.lax.scan(step, dense, xs, **options)
    for i, terms in added.items():
        before = init[i]
        assert isinstance(before, SparseSum)
        final[i] = SparseSum((*before.terms, *map(_unstack, terms)))
    return [*(final[i] for i in range(carries)), *ys]


def _get_added(own: Carry, result: Value, eqn: Equation) -> tuple[Term, ...]:
    """Returns the terms that a step has added to what it carries."""
    if isinstance(result, Dense):
        raise CarryReadError(own, result.cause)
    terms = result.terms if isinstance(result, SparseSum) else ()
    if [term for term in terms if isinstance(term, Carry)] != [own]:
        cause = Cause(find_source_line(eqn), "loops over it and changes more than rows of it")
        raise CarryReadError(own, cause)
    return tuple(term for term in terms if isinstance(term, Term))


def _unstack(term: Term) -> Term:
    """Returns the slices of all steps in a row."""
    values = term.values.reshape(-1, *term.values.shape[2:])
    return dataclasses.replace(
        term, coords=tuple(coord.reshape(-1) for coord in term.coords), values=values
    )


CALLS = {
    primitives.jit_p.name: Call(_find_in_body, _jit),
    primitives.remat_p.name: Call(_find_in_body, _remat),
    primitives.closed_call_p.name: Call(_find_in_body, _inline),
    primitives.call_p.name: Call(_find_in_body, _inline),
    primitives.cond_p.name: Call(_find_in_cond, _cond),
    primitives.scan_p.name: Call(_find_in_scan, _scan),
}
