"""Sparse add, slice and their gradients beside jax.experimental.sparse and TensorFlow.

Two random matrices of 10,000 x 10,000 with the same number of sorted entries. The slice cuts the
middle quarter. jaxaccum's gradients are timed twice: as the pullback of the op, which has the
places the forward pass found, and as the raw function on bare indices, which is what TensorFlow's
op is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify, sparse

import jaxaccum
from benchmarks import workloads
from benchmarks.harness import Figures, Step, case, jax_step, measure, peer_steps, with_metric
from jaxaccum._rows.prefix_sums import count_before

SHAPE = (workloads.SIDE, workloads.SIDE)
START, SIZE = (workloads.START,) * 2, (workloads.SIZE,) * 2
OPS = (
    "add",
    "add, pullback",
    "add, gradient",
    "add, shuffled",
    "slice",
    "slice, pullback",
    "slice, gradient",
    "slice, shuffled",
)
# TensorFlow's gradients are functions of bare indices, whatever they are compared with.
THEIRS = {"add, pullback": "add gradient", "add, gradient": "add gradient"} | {
    "slice, pullback": "slice gradient",
    "slice, gradient": "slice gradient",
}
Pairs = list[tuple[sparse.BCOO, sparse.BCOO]]


@case(
    "{entries:,}, {op}",
    settings=[{"entries": n, "op": op} for n in (1024, 65_536, 1_000_000) for op in OPS],
    quick=[{"entries": 64, "op": op} for op in ("add", "slice, gradient")],
)
def sparse_ops(entries: int, op: str) -> Figures:
    """Milliseconds of a call among ten in a row, waited for once; "awaited ms" of one by one.

    What jax.experimental.sparse slices is summed and sorted, else it would be neither sorted nor
    unique; the line that is left as it comes says so. "unmatched" is a floor of the raw slice
    gradient: it compares no row of the output.
    """
    lines: dict[str, Any] = {"jaxaccum": own_steps(entries)[op]}
    lines |= {line: ops[op] for line, ops in jax_steps(entries).items() if op in ops}
    if op == "slice, gradient":
        lines["unmatched"] = unmatched_gradient(entries)
    theirs = their_steps(entries)
    if (name := THEIRS.get(op, op)) in theirs:
        lines["TensorFlow"] = theirs[name]
    in_a_row = 3 if entries > 100_000 else 10
    options = {"in_a_row": in_a_row, "seconds": 1.5, "turns": (5, 21)}
    awaited = measure(lines, **options)
    figures = measure(lines, wait_each=False, **options)
    return with_metric(figures, "awaited ms", {line: m["ms"] for line, m in awaited.items()})


@functools.lru_cache(maxsize=1)
def their_steps(entries: int) -> Mapping[str, Any]:
    return peer_steps("tensorflow", "sparse_ops", entries=entries)


@functools.lru_cache(maxsize=1)
def matrices(entries: int) -> tuple[Pairs, Pairs]:
    """Pairs, and the same in random order."""
    rng = np.random.default_rng(1)
    pairs = [
        tuple(bcoo(jnp.asarray(values), jnp.asarray(indices)) for indices, values in pair)
        for pair in workloads.sparse_pairs(entries)
    ]
    return pairs, [(shuffled(rng, a), shuffled(rng, b)) for a, b in pairs]


def bcoo(data: jax.Array, indices: jax.Array, *, flags: bool = True) -> sparse.BCOO:
    return sparse.BCOO((data, indices), shape=SHAPE, indices_sorted=flags, unique_indices=flags)


def shuffled(rng: np.random.Generator, x: sparse.BCOO) -> sparse.BCOO:
    order = jnp.asarray(rng.permutation(x.nse))
    return bcoo(x.data[order], x.indices[order], flags=False)


def trim(mat: sparse.BCOO) -> sparse.BCOO:
    """Without padding, as TensorFlow has it."""
    real = int((mat.indices[:, 0] < mat.shape[0]).sum())
    return sparse.BCOO((mat.data[:real], mat.indices[:real]), shape=mat.shape)


def in_turn(call: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Step:
    for args in inputs:
        jax.block_until_ready(call(*args))
    turn = itertools.cycle(inputs)
    return jax_step(lambda: call(*next(turn)))


def pullback(fn: Callable[..., jax.Array], inputs: list[tuple[Any, ...]]) -> Step:
    """The compiled pullback alone; its residuals are inputs, not constants."""
    pulls = [jax.vjp(fn, *args) for args in inputs]
    tree = jax.tree.structure(pulls[0][1])
    call = jax.jit(lambda leaves, ct: jax.tree.unflatten(tree, leaves)(ct)[: len(inputs[0]) // 2])
    return in_turn(call, [(jax.tree.leaves(pull), out) for out, pull in pulls])


def of_add(pairs: Pairs) -> list[tuple[Any, ...]]:
    return [(a.data, b.data, a.indices, b.indices) for a, b in pairs]


def of_slice(pairs: Pairs) -> list[tuple[Any, ...]]:
    return [(a.data, a.indices) for a, _ in pairs]


@functools.lru_cache(maxsize=1)
def own_steps(entries: int) -> dict[str, Step]:
    pairs, mixed = matrices(entries)
    add = jax.jit(jaxaccum.sparse_add)
    cut = jax.jit(lambda x, _: jaxaccum.sparse_slice(x, START, SIZE))
    add_grad, slice_grad = jax.jit(jaxaccum.sparse_add_grad), jax.jit(jaxaccum.sparse_slice_grad)
    start = jnp.asarray(START, jnp.int32)
    sums = [(trim(add(a, b)), a, b) for a, b in pairs]
    parts = [(trim(cut(a, b)), a) for a, b in pairs]

    def add_values(x: jax.Array, y: jax.Array, rows: jax.Array, others: jax.Array) -> jax.Array:
        return jaxaccum.sparse_add(bcoo(x, rows), bcoo(y, others)).data

    def cut_values(x: jax.Array, rows: jax.Array) -> jax.Array:
        return jaxaccum.sparse_slice(bcoo(x, rows), START, SIZE).data

    of_sums = [(total.data, a.indices, b.indices, total.indices) for total, a, b in sums]
    of_parts = [(part.data, a.indices, start, part.indices) for part, a in parts]
    return {
        "add": in_turn(add, pairs),
        "add, shuffled": in_turn(add, mixed),
        "add, pullback": pullback(add_values, of_add(pairs)),
        "add, gradient": in_turn(add_grad, of_sums),
        "slice": in_turn(cut, pairs),
        "slice, shuffled": in_turn(cut, mixed),
        "slice, pullback": pullback(cut_values, of_slice(pairs)),
        "slice, gradient": in_turn(slice_grad, of_parts),
    }


@functools.lru_cache(maxsize=1)
def jax_steps(entries: int) -> dict[str, dict[str, Step]]:
    pairs, mixed = matrices(entries)

    def plain_add(x: sparse.BCOO, y: sparse.BCOO) -> sparse.BCOO:
        return sparse.bcoo_sum_duplicates(x + y, nse=x.nse + y.nse)

    def plain_slice(x: sparse.BCOO) -> sparse.BCOO:
        ends = [s + e for s, e in zip(START, SIZE, strict=True)]
        return sparse.bcoo_slice(x, start_indices=START, limit_indices=ends)

    add, cut = jax.jit(plain_add), jax.jit(lambda x, _: plain_slice(x))
    tidy = jax.jit(lambda x, _: sparse.bcoo_sum_duplicates(plain_slice(x), nse=x.nse))

    def add_values(x: jax.Array, y: jax.Array, rows: jax.Array, others: jax.Array) -> jax.Array:
        return plain_add(bcoo(x, rows), bcoo(y, others)).data

    def cut_values(x: jax.Array, rows: jax.Array) -> jax.Array:
        return plain_slice(bcoo(x, rows)).data

    ordered = {
        "add": in_turn(add, pairs),
        "add, shuffled": in_turn(add, mixed),
        "add, pullback": pullback(add_values, of_add(pairs)),
        "slice": in_turn(tidy, pairs),
        "slice, shuffled": in_turn(tidy, mixed),
    }
    as_it_comes = {
        "slice": in_turn(cut, pairs),
        "slice, pullback": pullback(cut_values, of_slice(pairs)),
    }
    return {"jax.experimental.sparse": ordered, "the same, unsorted": as_it_comes}


def unmatched_gradient(entries: int) -> Step:
    """The raw gradient of a slice, taking on trust that the output holds what lies inside."""
    low = jnp.asarray([START], jnp.int32)

    @jax.jit
    def unmatched(grad: jax.Array, rows: jax.Array) -> jax.Array:
        inside = jnp.all((rows >= low) & (rows < low + SIZE[0]), axis=1)
        before = count_before(inside)
        checkify.debug_check(before[-1] == len(grad), "gradients without a row")
        return jnp.where(inside, grad.at[before[:-1]].get(mode="clip"), 0)

    pairs, _ = matrices(entries)
    return in_turn(unmatched, [(a.data[: a.nse // 4], a.indices) for a, _ in pairs])
