"""Sparse add, slice and their gradients beside jax.experimental.sparse and TensorFlow.

Two random matrices of 10,000 x 10,000 with the same number of sorted entries. The slice cuts the
middle quarter. jaxaccum's gradients are timed twice: as the pullback of the op ("vjp", which has
the places the forward pass found) and as the raw function on bare indices, which is what
TensorFlow's op is.

    python benchmarks/sparse_ops.py [nse ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import harness
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from jax.experimental import checkify, sparse

import jaxaccum

SIDE = 10_000
START, SIZE = (2500, 2500), (5000, 5000)
Step = Callable[[], Any]


def matrix(rng: np.random.Generator, nse: int) -> sparse.BCOO:
    cells = np.unique(rng.integers(0, SIDE * SIDE, nse + nse // 50 + 100))
    cells = np.sort(rng.permutation(cells)[:nse])
    indices = np.stack(np.divmod(cells, SIDE), axis=1).astype(np.int32)
    values = rng.standard_normal(nse).astype(np.float32)
    return bcoo(jnp.asarray(values), jnp.asarray(indices), flags=True)


def bcoo(data: jax.Array, indices: jax.Array, *, flags: bool) -> sparse.BCOO:
    return sparse.BCOO(
        (data, indices), shape=(SIDE, SIDE), indices_sorted=flags, unique_indices=flags
    )


def pullback(fn: Callable[..., jax.Array], *args: jax.Array) -> Step:
    """The compiled pullback alone; its residuals are inputs, not constants."""
    out, pull = jax.vjp(fn, *args)
    leaves, tree = jax.tree.flatten(pull)
    step = jax.jit(lambda leaves, ct: jax.tree.unflatten(tree, leaves)(ct))
    return lambda: step(leaves, out)


def jaxaccum_steps(a: sparse.BCOO, b: sparse.BCOO, rng: np.random.Generator) -> dict[str, Step]:
    add = jax.jit(jaxaccum.sparse_add)
    cut = jax.jit(lambda x: jaxaccum.sparse_slice(x, START, SIZE))
    total, part = trim(add(a, b)), trim(cut(a))
    add_grad, slice_grad = jax.jit(jaxaccum.sparse_add_grad), jax.jit(jaxaccum.sparse_slice_grad)
    start = jnp.asarray(START, jnp.int32)
    order = jnp.asarray(rng.permutation(a.nse))
    mixed = [bcoo(m.data[order], m.indices[order], flags=False) for m in (a, b)]

    def add_values(x: jax.Array, y: jax.Array) -> jax.Array:
        ends = bcoo(x, a.indices, flags=True), bcoo(y, b.indices, flags=True)
        return jaxaccum.sparse_add(*ends).data

    def cut_values(x: jax.Array) -> jax.Array:
        return jaxaccum.sparse_slice(bcoo(x, a.indices, flags=True), START, SIZE).data

    return {
        "add": lambda: add(a, b),
        "add, shuffled": lambda: add(*mixed),
        "add gradient (vjp)": pullback(add_values, a.data, b.data),
        "add gradient (raw)": lambda: add_grad(total.data, a.indices, b.indices, total.indices),
        "slice": lambda: cut(a),
        "slice, shuffled": lambda: cut(mixed[0]),
        "slice gradient (vjp)": pullback(cut_values, a.data),
        "slice gradient (raw)": lambda: slice_grad(part.data, a.indices, start, part.indices),
    }


def trim(mat: sparse.BCOO) -> sparse.BCOO:
    """Without padding, as TensorFlow has it."""
    real = int((mat.indices[:, 0] < mat.shape[0]).sum())
    return sparse.BCOO((mat.data[:real], mat.indices[:real]), shape=mat.shape)


def jax_steps(a: sparse.BCOO, b: sparse.BCOO, rng: np.random.Generator) -> dict[str, Step]:
    def plain_add(x: sparse.BCOO, y: sparse.BCOO) -> sparse.BCOO:
        return sparse.bcoo_sum_duplicates(x + y, nse=x.nse + y.nse)

    def plain_slice(x: sparse.BCOO) -> sparse.BCOO:
        ends = [s + e for s, e in zip(START, SIZE, strict=True)]
        return sparse.bcoo_slice(x, start_indices=START, limit_indices=ends)

    add, cut = jax.jit(plain_add), jax.jit(plain_slice)
    tidy = jax.jit(lambda x: sparse.bcoo_sum_duplicates(plain_slice(x), nse=x.nse))
    order = jnp.asarray(rng.permutation(a.nse))
    mixed = [bcoo(m.data[order], m.indices[order], flags=False) for m in (a, b)]

    def add_values(x: jax.Array, y: jax.Array) -> jax.Array:
        ends = bcoo(x, a.indices, flags=True), bcoo(y, b.indices, flags=True)
        return plain_add(*ends).data

    def cut_values(x: jax.Array) -> jax.Array:
        return plain_slice(bcoo(x, a.indices, flags=True)).data

    return {
        "add": lambda: add(a, b),
        "add, shuffled": lambda: add(*mixed),
        "add gradient (vjp)": pullback(add_values, a.data, b.data),
        "slice": lambda: tidy(a),
        "slice, unsorted result": lambda: cut(a),
        "slice, shuffled": lambda: tidy(mixed[0]),
        "slice gradient (vjp)": pullback(cut_values, a.data),
    }


def tensorflow_steps(a: sparse.BCOO, b: sparse.BCOO) -> dict[str, Step]:
    ops = tf.raw_ops
    (ia, va), (ib, vb) = (
        (tf.constant(np.asarray(m.indices), tf.int64), tf.constant(np.asarray(m.data)))
        for m in (a, b)
    )
    shape, thresh = tf.constant([SIDE, SIDE], tf.int64), tf.constant(0.0)
    start, size = tf.constant(START, tf.int64), tf.constant(SIZE, tf.int64)

    def add() -> Any:
        return ops.SparseAdd(
            a_indices=ia, a_values=va, a_shape=shape,
            b_indices=ib, b_values=vb, b_shape=shape, thresh=thresh,
        )  # fmt: skip

    def cut() -> Any:
        return ops.SparseSlice(indices=ia, values=va, shape=shape, start=start, size=size)

    total, part = add(), cut()
    add_gradient = lambda: ops.SparseAddGrad(  # noqa: E731
        backprop_val_grad=total[1], a_indices=ia, b_indices=ib, sum_indices=total[0]
    )
    slice_gradient = lambda: ops.SparseSliceGrad(  # noqa: E731
        backprop_val_grad=part[1], input_indices=ia, input_start=start, output_indices=part[0]
    )
    return {
        "add": add,
        "add gradient (vjp)": add_gradient,
        "add gradient (raw)": add_gradient,
        "slice": cut,
        "slice gradient (vjp)": slice_gradient,
        "slice gradient (raw)": slice_gradient,
    }


def least_steps(a: sparse.BCOO) -> dict[str, dict[str, Step]]:
    """What no raw gradient of a slice can do without: to compare rows, and under jit to check."""
    low, high = jnp.asarray([START], jnp.int32), jnp.asarray([START], jnp.int32) + SIZE[0]
    compare = jax.jit(lambda rows: jnp.all((rows >= low) & (rows < high), axis=1))

    @jax.jit
    def check(rows: jax.Array) -> jax.Array:
        checkify.debug_check(rows[0, 0] >= 0, "a negative index")
        return rows

    op = "slice gradient (raw)"
    return {
        "comparison alone": {op: lambda: compare(a.indices)},
        "debug_check alone": {op: lambda: check(a.indices)},
    }


def measure(nse: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    a, b = matrix(rng, nse), matrix(rng, nse)
    peers = {
        "jaxaccum": jaxaccum_steps(a, b, rng),
        "jax.experimental.sparse": jax_steps(a, b, rng),
        "tensorflow": tensorflow_steps(a, b),
        **least_steps(a),
    }
    is_long = nse > 100_000
    turns = {"repeats": 3 if is_long else 21, "in_a_row": 3 if is_long else 10}
    rows = []
    for op in dict.fromkeys(op for steps in peers.values() for op in steps):
        steps = {name: known[op] for name, known in peers.items() if op in known}
        row: dict[str, Any] = {"nse": nse, "op": op}
        for wait_each, ending in [(True, ""), (False, ", in a row")]:
            times = harness.interleaved_ms(steps, warmup=1, wait_each=wait_each, **turns)
            own = times.get("jaxaccum")
            row |= {f"{name} ms{ending}": round(ms, 4) for name, ms in times.items()}
            row |= {
                f"{n} / own{ending}": round(ms / own, 2)
                for n, ms in times.items()
                if own and n != "jaxaccum"
            }
        rows.append(row)
    return rows


if __name__ == "__main__":
    sizes = [int(arg) for arg in sys.argv[1:]] or [1024, 65_536, 1_000_000]
    harness.report(
        "sparse_ops",
        [row for nse in sizes for row in measure(nse)],
        note="Medians of one process, peers in turns. jax.experimental.sparse 'slice' includes "
        "bcoo_sum_duplicates, without which its result is neither sorted nor unique. 'In a row': "
        "ten calls (three of the largest) one after the other and a single wait for the last. The "
        "peers 'alone' are floors of the raw slice gradient.",
    )
