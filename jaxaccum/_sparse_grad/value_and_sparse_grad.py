"""Gradients of an unchanged function whose tables come back as the rows that were looked up."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxaccum._rows.indexed_slices import IndexedSlices, is_slices
from jaxaccum._rows.tables import KeyPath, Tables, select_tables
from jaxaccum._rows.tree import Leaf, PyTree
from jaxaccum._sparse_grad.evaluate import evaluate
from jaxaccum._sparse_grad.jaxpr import AnyJaxpr, Cause, get_varying_axes, open_jaxpr
from jaxaccum._sparse_grad.module_arguments import (
    argument_position,
    call_with_modules,
    split_modules,
)
from jaxaccum._sparse_grad.terms import Dense, SparseSum, Table, Term, Value, join, make_whole

# Lookups of single entries of rows become whole rows below this many entries, whatever they cost.
_SMALL = 2**20


def value_and_sparse_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    tables: Tables,
    allow_dense: bool = False,
) -> Callable[..., Any]:
    """Makes a function that evaluates ``fun`` and its gradient, the tables' as rows.

    Like ``jax.value_and_grad``, but the gradient of each leaf that ``tables`` selects is an
    ``IndexedSlices`` with a slice for every lookup, and no array of the table's size is made.
    ``fun`` stays as it is: it may look rows up with ``table[ids]``, ``jnp.take``, ``flax`` or
    ``equinox`` embeddings, as often as it likes, cast to another dtype, inside ``jit``, ``vmap``,
    ``jax.checkpoint``, ``cond``, ``scan`` and functions with rules of their own.

    An Equinox module is differentiated as by ``eqx.filter_value_and_grad``: in its inexact arrays,
    with ``None`` for all else. A module of Flax's ``nnx`` is as by ``nnx.value_and_grad``: in its
    ``nnx.Param`` (or what an ``nnx.DiffState`` in ``argnums`` says), the gradients an
    ``nnx.State``, and what a call changes in the module is changed.

    The backward pass is traced, the scatters into zeros at its end are taken for the rows they
    are, and it is evaluated without them. ``fun`` is traced at every call: call the result under
    ``jax.jit``. The values it is differentiated in are abstract, as they are under ``jax.jit``.

    Args:
      fun: as for ``jax.value_and_grad``: returns a scalar, or a scalar and auxiliary data.
      argnums: the positional argument to differentiate in, or several.
      has_aux: whether ``fun`` returns ``(value, aux)``.
      tables: which leaves of the differentiated argument are tables: a predicate
        ``(path, leaf) -> bool`` with the path as in ``jax.tree_util.tree_map_with_path``, or a tree
        of bools that matches the argument or is a prefix of it. If ``argnums`` is a sequence, of
        the tuple of those arguments.
      allow_dense: returns the gradient of a table that is used otherwise than by lookups (a tied
        softmax, a norm of all rows) as a dense array, rather than raise.

    Returns:
      A function of the arguments of ``fun`` that returns ``(value, grads)`` or
      ``((value, aux), grads)``. The slices of a table are in no particular order and may repeat
      rows; ids for which ``jax.grad`` drops the gradient have the padding index. An empty lookup
      gives a gradient of no slices.

    Raises:
      ValueError: ``tables`` selects nothing, or a leaf that is never looked up, that is used
        otherwise than by lookups (the message names the line), or that has no rows;
        ``argnums`` names an argument twice; ``tables`` does not fit the argument.
      TypeError: ``tables`` selects an array of integers; or what ``jax.value_and_grad`` raises.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> params = {"table": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
      >>> def loss(params, ids):
      ...     return jnp.sum(params["table"][ids] * 3.0 + params["bias"])
      >>> grad_fn = jaxaccum.value_and_sparse_grad(loss, tables={"table": True, "bias": False})
      >>> value, grads = grad_fn(params, jnp.array([2, 0, -2]))
      >>> grads["table"].indices
      Array([2, 0, 2], dtype=int32)
      >>> grads["table"].values
      Array([[3., 3.],
             [3., 3.],
             [3., 3.]], dtype=float32)
      >>> grads["bias"]
      Array([3., 3.], dtype=float32)

    Source: ``jax.value_and_grad``; that lookups have gradients in rows, ``tf.IndexedSlices``.
    """
    is_single = not isinstance(argnums, Sequence)
    numbers = list(argnums) if isinstance(argnums, Sequence) else [argnums]
    given = [argument_position(n) for n in numbers]

    @functools.wraps(fun)
    def value_and_grads(*args: Any, **kwargs: Any) -> tuple[PyTree, PyTree]:
        positions = _count_from_front(given, len(args))
        modules = split_modules(args, dict(zip(positions, numbers, strict=True)))
        if modules:
            again = functools.partial(value_and_sparse_grad, tables=tables, allow_dense=allow_dense)
            of_arrays = functools.partial(again, argnums=positions[0] if is_single else positions)
            return call_with_modules(of_arrays, fun, has_aux, args, modules, **kwargs)
        target = args[positions[0]] if is_single else tuple(args[k] for k in positions)
        selected = _select_some(tables, target)
        outputs: list[PyTree] = []

        def differentiate(target: PyTree) -> tuple[list[jax.Array], PyTree]:
            full = list(args)
            for position, value in zip(positions, [target] if is_single else target, strict=True):
                full[position] = value
            outcome, grads = jax.value_and_grad(fun, argnums, has_aux)(*full, **kwargs)
            # Auxiliary data may be of any kind; what is not computed here needs no evaluation.
            outputs.append(outcome)
            return [leaf for leaf in jax.tree.leaves(outcome) if _is_traced(leaf)], grads

        jaxpr, shapes = jax.make_jaxpr(differentiate, return_shape=True)(target)
        chosen, leaves = jax.tree.leaves(selected), jax.tree.leaves(target)
        inputs = [
            Table(leaf, leaf.dtype) if choice else leaf
            for leaf, choice in zip(leaves, chosen, strict=True)
        ]
        results = evaluate(jaxpr, inputs, [False] * (len(jaxpr.out_avals) - len(leaves)) + chosen)
        computed, grads = jax.tree.unflatten(jax.tree.structure(shapes), results)
        rest = iter(computed)
        outcome = jax.tree.map(lambda leaf: next(rest) if _is_traced(leaf) else leaf, outputs[0])
        finish = functools.partial(_finish, jaxpr, allow_dense)
        grads = jax.tree_util.tree_map_with_path(finish, target, grads)
        return outcome, _tie_to_loss(outcome[0] if has_aux else outcome, grads)

    return value_and_grads


def _select_some(tables: Tables, target: PyTree) -> PyTree:
    selected = select_tables(tables, target)
    if not any(jax.tree.leaves(selected)):
        raise ValueError("tables selects no leaf; use jax.value_and_grad where there is none")
    return selected


def _is_traced(leaf: object) -> bool:
    return isinstance(leaf, jax.core.Tracer)


def _count_from_front(argnums: Sequence[int], count: int) -> list[int]:
    """Returns the positions that ``argnums`` name among ``count`` arguments."""
    if not all(-count <= n < count for n in argnums):
        raise ValueError(f"argnums must lie within the {count} positional arguments, got {argnums}")
    positions = [n % count for n in argnums]
    if len(set(positions)) < len(positions):
        raise ValueError(f"argnums must name each argument once, got {argnums}")
    return positions


def _finish(
    jaxpr: AnyJaxpr, allow_dense: bool, path: KeyPath, leaf: jax.Array, grad: Value
) -> jax.Array | IndexedSlices:
    """Turns what was evaluated for a leaf into what the caller gets."""
    if not isinstance(grad, SparseSum | Dense):
        return make_whole(grad, jax.typeof(leaf))
    name = f"leaf {jax.tree_util.keystr(path)}" if path else "the argument"
    if isinstance(grad, SparseSum) and not grad.terms and not _holds_empty_arrays(jaxpr):
        raise ValueError(
            f"tables selects {name} of shape {leaf.shape}, which is never looked up, or nothing "
            "that is looked up in it reaches the loss; leave it out of tables"
        )
    cause = _find_misfit(grad, leaf.shape) if isinstance(grad, SparseSum) else grad.cause
    if isinstance(grad, SparseSum) and not cause:
        return _join_rows(grad, leaf)
    dense = make_whole(grad, jax.typeof(leaf))
    if leaf.shape[0] == 1:  # the only row, however it was come by
        return IndexedSlices(jnp.zeros(1, jnp.int32), dense, leaf.shape)
    if not allow_dense:
        raise ValueError(
            f"tables selects {name} of shape {leaf.shape}, whose gradient is dense: {cause}. If "
            "the table is meant to be used as a whole (as an output layer too, in a norm of all "
            "rows), pass allow_dense=True: its gradient is then one dense array, rows looked up "
            "included, for a dense optimizer; or leave the leaf out of tables. If it is not, look "
            "up rows alone there (table[ids])"
        )
    return dense


def _holds_empty_arrays(jaxpr: AnyJaxpr) -> bool:
    """Whether a lookup may be missing because JAX makes none of no ids."""
    inner = open_jaxpr(jaxpr)
    atoms = itertools.chain(*([*eqn.invars, *eqn.outvars] for eqn in inner.eqns))
    return any(0 in getattr(atom.aval, "shape", ()) for atom in atoms) or any(
        map(_holds_empty_arrays, core.subjaxprs(inner))
    )


def _get_terms(grad: SparseSum) -> list[Term]:
    return [term for term in grad.terms if isinstance(term, Term)]  # no loop is left


def _find_misfit(grad: SparseSum, shape: tuple[int, ...]) -> Cause | None:
    """Says why the terms of ``grad`` make no rows, if they do not."""
    for term in _get_terms(grad):
        if 0 not in term.axes:
            return Cause(term.source_line, "looks up slices along another axis than the first")
        size = len(term.values) * math.prod(shape[1:])
        if len(term.axes) > 1 and size > max(_SMALL, math.prod(shape)):
            action = f"looks up single entries, whose whole rows take {size} numbers"
            return Cause(term.source_line, action)
    return None


def _join_rows(grad: SparseSum, leaf: jax.Array) -> IndexedSlices:
    shape, dtype = leaf.shape, leaf.dtype
    filler = Term((jnp.zeros(0, jnp.int32),), jnp.zeros((0, *shape[1:]), dtype), (0,), shape)
    total = join([_make_whole_rows(term) for term in _get_terms(grad)] or [filler])
    return IndexedSlices(total.coords[0], total.values, shape)


def _make_whole_rows(term: Term) -> Term:
    """Returns slices of whole rows that hold those of ``term``, and zeros beside them."""
    if len(term.axes) == 1:
        return term
    row, *others = term.coords
    count = len(row)
    shape = (count, *term.shape[1:])
    each = Term((jnp.arange(count, dtype=jnp.int32), *others), term.values, term.axes, shape)
    values = each.add_to(jnp.zeros(shape, term.values.dtype))
    return Term((row,), values, (0,), term.shape)


def _tie_to_loss(value: jax.Array, grads: PyTree) -> PyTree:
    """Makes the indices of the gradients depend on the loss, which they equal without it.

    Rows that are read for the loss alone could otherwise be read after the update that uses the
    gradients, and XLA would copy a donated table to keep what it held: 80 ms for 256 MB (measured).
    A barrier does not outlive XLA's early passes (0.10.2). min(i, max(i, v)) is i, unknown to XLA.
    """
    varying = get_varying_axes(jax.typeof(value))

    def tie(grad: Leaf) -> Leaf:
        # What is alike on all devices must not come to depend on a loss that is not.
        if not is_slices(grad):
            return grad
        if not varying <= get_varying_axes(jax.typeof(grad.indices)):
            return grad
        last = jnp.maximum(grad.indices, value.astype(jnp.int32))
        return dataclasses.replace(grad, indices=jnp.minimum(grad.indices, last))

    return jax.tree.map(tie, grads, is_leaf=is_slices)
