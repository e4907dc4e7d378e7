"""Sparse add, slice and their gradients beside jax.experimental.sparse and TensorFlow.

Two random matrices of 10,000 x 10,000 with the same number of sorted entries. The slice cuts the
middle quarter. jaxaccum's gradients are timed twice: as the pullback of the op ("vjp", which has
the places the forward pass found) and as the raw function on bare indices, which is what
TensorFlow's op is. Every call has other matrices than the one before, several in turn: of a single
pair a processor learns which branches it takes, and what branches by entry seems up to seven times
as fast as it is.

    python benchmarks/sparse_ops.py [nse ...]
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify, sparse

import jaxaccum
from jaxaccum._rows.prefix_sums import count_before

SIDE = 10_000
START, SIZE = (2500, 2500), (5000, 5000)
Step = Callable[[], Any]
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None


def in_turn(step: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Step:
    for args in inputs:
        jax.block_until_ready(step(*args))
    turn = itertools.cycle(inputs)
    return lambda: step(*next(turn))


def matrices(rng: np.random.Generator, nse: int) -> tuple[sparse.BCOO, sparse.BCOO]:
    """Two with as many entries inside the slice, and in common, as random ones have on average."""
    cells: tuple[list[Any], list[Any]] = [], []
    for inside, count in ((True, nse // 4), (False, nse - nse // 4)):
        shared = round(count * nse / SIDE**2)
        drawn = np.unique(rng.integers(0, SIDE * SIDE, 9 * count + 100))
        drawn = rng.permutation(drawn[is_inside(drawn) == inside])
        cells[0].append(drawn[:count])
        cells[1].append(drawn[count - shared : 2 * count - shared])
    a, b = (with_entries(rng, np.sort(np.concatenate(part))) for part in cells)
    return a, b


def is_inside(cells: np.ndarray) -> np.ndarray:
    places = np.stack(np.divmod(cells, SIDE), axis=1) - START
    return ((places >= 0) & (places < SIZE)).all(axis=1)


def with_entries(rng: np.random.Generator, cells: np.ndarray) -> sparse.BCOO:
    indices = np.stack(np.divmod(cells, SIDE), axis=1).astype(np.int32)
    values = rng.standard_normal(len(cells)).astype(np.float32)
    return bcoo(jnp.asarray(values), jnp.asarray(indices), flags=True)


def bcoo(data: jax.Array, indices: jax.Array, *, flags: bool) -> sparse.BCOO:
    return sparse.BCOO(
        (data, indices), shape=(SIDE, SIDE), indices_sorted=flags, unique_indices=flags
    )


def pullback(fn: Callable[..., jax.Array], inputs: list[tuple[Any, ...]]) -> Step:
    """The compiled pullback alone; its residuals are inputs, not constants."""
    pulls = [jax.vjp(fn, *args) for args in inputs]
    tree = jax.tree.structure(pulls[0][1])
    step = jax.jit(lambda leaves, ct: jax.tree.unflatten(tree, leaves)(ct)[: len(inputs[0]) // 2])
    return in_turn(step, [(jax.tree.leaves(pull), out) for out, pull in pulls])


def shuffled(rng: np.random.Generator, x: sparse.BCOO) -> sparse.BCOO:
    order = jnp.asarray(rng.permutation(x.nse))
    return bcoo(x.data[order], x.indices[order], flags=False)


Pairs = list[tuple[sparse.BCOO, sparse.BCOO]]


def jaxaccum_steps(pairs: Pairs, mixed: Pairs) -> dict[str, Step]:
    add = jax.jit(jaxaccum.sparse_add)
    cut = jax.jit(lambda x, _: jaxaccum.sparse_slice(x, START, SIZE))
    add_grad, slice_grad = jax.jit(jaxaccum.sparse_add_grad), jax.jit(jaxaccum.sparse_slice_grad)
    start = jnp.asarray(START, jnp.int32)
    sums = [(trim(add(a, b)), a, b) for a, b in pairs]
    parts = [(trim(cut(a, b)), a) for a, b in pairs]

    def add_values(x: jax.Array, y: jax.Array, rows: jax.Array, others: jax.Array) -> jax.Array:
        ends = bcoo(x, rows, flags=True), bcoo(y, others, flags=True)
        return jaxaccum.sparse_add(*ends).data

    def cut_values(x: jax.Array, rows: jax.Array) -> jax.Array:
        return jaxaccum.sparse_slice(bcoo(x, rows, flags=True), START, SIZE).data

    return {
        "add": in_turn(add, pairs),
        "add, shuffled": in_turn(add, mixed),
        "add gradient (vjp)": pullback(add_values, of_add(pairs)),
        "add gradient (raw)": in_turn(
            add_grad, [(total.data, a.indices, b.indices, total.indices) for total, a, b in sums]
        ),
        "slice": in_turn(cut, pairs),
        "slice, shuffled": in_turn(cut, mixed),
        "slice gradient (vjp)": pullback(cut_values, of_slice(pairs)),
        "slice gradient (raw)": in_turn(
            slice_grad, [(part.data, a.indices, start, part.indices) for part, a in parts]
        ),
    }


def of_add(pairs: Pairs) -> list[tuple[Any, ...]]:
    return [(a.data, b.data, a.indices, b.indices) for a, b in pairs]


def of_slice(pairs: Pairs) -> list[tuple[Any, ...]]:
    return [(a.data, a.indices) for a, _ in pairs]


def trim(mat: sparse.BCOO) -> sparse.BCOO:
    """Without padding, as TensorFlow has it."""
    real = int((mat.indices[:, 0] < mat.shape[0]).sum())
    return sparse.BCOO((mat.data[:real], mat.indices[:real]), shape=mat.shape)


def jax_steps(pairs: Pairs, mixed: Pairs) -> dict[str, Step]:
    def plain_add(x: sparse.BCOO, y: sparse.BCOO) -> sparse.BCOO:
        return sparse.bcoo_sum_duplicates(x + y, nse=x.nse + y.nse)

    def plain_slice(x: sparse.BCOO) -> sparse.BCOO:
        ends = [s + e for s, e in zip(START, SIZE, strict=True)]
        return sparse.bcoo_slice(x, start_indices=START, limit_indices=ends)

    add, cut = jax.jit(plain_add), jax.jit(lambda x, _: plain_slice(x))
    tidy = jax.jit(lambda x, _: sparse.bcoo_sum_duplicates(plain_slice(x), nse=x.nse))

    def add_values(x: jax.Array, y: jax.Array, rows: jax.Array, others: jax.Array) -> jax.Array:
        return plain_add(bcoo(x, rows, flags=True), bcoo(y, others, flags=True)).data

    def cut_values(x: jax.Array, rows: jax.Array) -> jax.Array:
        return plain_slice(bcoo(x, rows, flags=True)).data

    return {
        "add": in_turn(add, pairs),
        "add, shuffled": in_turn(add, mixed),
        "add gradient (vjp)": pullback(add_values, of_add(pairs)),
        "slice": in_turn(tidy, pairs),
        "slice, unsorted result": in_turn(cut, pairs),
        "slice, shuffled": in_turn(tidy, mixed),
        "slice gradient (vjp)": pullback(cut_values, of_slice(pairs)),
    }


def tensorflow_steps(pairs: Pairs) -> dict[str, Step]:
    import tensorflow as tf

    ops = tf.raw_ops
    shape, thresh = tf.constant([SIDE, SIDE], tf.int64), tf.constant(0.0)
    start, size = tf.constant(START, tf.int64), tf.constant(SIZE, tf.int64)

    def add(ia: Any, va: Any, ib: Any, vb: Any) -> Any:
        return ops.SparseAdd(
            a_indices=ia, a_values=va, a_shape=shape,
            b_indices=ib, b_values=vb, b_shape=shape, thresh=thresh,
        )  # fmt: skip

    def cut(indices: Any, values: Any, *_: Any) -> Any:
        return ops.SparseSlice(indices=indices, values=values, shape=shape, start=start, size=size)

    def add_grad(values: Any, ia: Any, ib: Any, indices: Any) -> Any:
        return ops.SparseAddGrad(
            backprop_val_grad=values, a_indices=ia, b_indices=ib, sum_indices=indices
        )

    def slice_grad(values: Any, rows: Any, indices: Any) -> Any:
        return ops.SparseSliceGrad(
            backprop_val_grad=values, input_indices=rows, input_start=start, output_indices=indices
        )

    inputs = [
        tuple(
            part
            for m in pair
            for part in (tf.constant(np.asarray(m.indices), tf.int64), tf.constant(m.data))
        )
        for pair in pairs
    ]
    sums, parts = [add(*args) for args in inputs], [cut(*args) for args in inputs]
    add_gradient = in_turn(
        add_grad,
        [(s[1], args[0], args[2], s[0]) for s, args in zip(sums, inputs, strict=True)],
    )
    slice_gradient = in_turn(
        slice_grad, [(p[1], args[0], p[0]) for p, args in zip(parts, inputs, strict=True)]
    )
    return {
        "add": in_turn(add, inputs),
        "add gradient (vjp)": add_gradient,
        "add gradient (raw)": add_gradient,
        "slice": in_turn(cut, inputs),
        "slice gradient (vjp)": slice_gradient,
        "slice gradient (raw)": slice_gradient,
    }


def least_steps(pairs: Pairs) -> dict[str, dict[str, Step]]:
    """The raw gradient of a slice, taking on trust that the output holds what lies inside."""
    low, high = jnp.asarray([START], jnp.int32), jnp.asarray([START], jnp.int32) + SIZE[0]

    @jax.jit
    def unmatched(grad: jax.Array, rows: jax.Array) -> jax.Array:
        inside = jnp.all((rows >= low) & (rows < high), axis=1)
        before = count_before(inside)
        checkify.debug_check(before[-1] == len(grad), "gradients without a row")
        return jnp.where(inside, grad.at[before[:-1]].get(mode="clip"), 0)

    inputs = [(a.data[: a.nse // 4], a.indices) for a, _ in pairs]
    return {"unmatched": {"slice gradient (raw)": in_turn(unmatched, inputs)}}


def measure(nse: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    pairs = [matrices(rng, nse) for _ in range(max(3, min(64, 2**20 // nse)))]
    mixed = [(shuffled(rng, a), shuffled(rng, b)) for a, b in pairs]
    peers = {
        "jaxaccum": jaxaccum_steps(pairs, mixed),
        "jax.experimental.sparse": jax_steps(pairs, mixed),
        **least_steps(pairs),
    }
    if HAS_TENSORFLOW:
        peers["tensorflow"] = tensorflow_steps(pairs)
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
    sizes = [int(arg) for arg in sys.argv[1:]] or [*map(harness.scaled, (1024, 65_536))]
    sizes += [] if sys.argv[1:] or harness.TINY else [1_000_000]
    harness.report(
        "sparse_ops",
        [row for nse in sizes for row in measure(nse)],
        note="Medians of one process, peers in turns. jax.experimental.sparse 'slice' includes "
        "bcoo_sum_duplicates, without which its result is neither sorted nor unique. 'In a row': "
        "ten calls (three of the largest) one after the other and a single wait for the last. The "
        "peer 'unmatched' is a floor of the raw slice gradient: it compares no row of the output."
        + ("" if HAS_TENSORFLOW else " TensorFlow is not installed here and was left out."),
    )
