"""The accumulator against TensorFlow, PyTorch and a dense buffer, and against what is possible.

Run it with the `benchmarks` extra installed: ``python benchmarks/accumulator.py [part ...]``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

import jaxaccum

apply = jax.jit(jaxaccum.apply, donate_argnums=0)
take = jax.jit(jaxaccum.take, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Workload:
    """``applies`` gradients of ``num_ids`` ids of a table, and a take."""

    name: str
    applies: int
    num_ids: int
    rows: int
    columns: int
    capacity: int
    zipf: float | None = None

    def gradients(self, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Raw ids, repeated and unsorted, and their values."""
        rng = np.random.default_rng(seed)
        return [
            (
                draw_ids(rng, self.num_ids, self.rows, self.zipf),
                rng.standard_normal((self.num_ids, self.columns), np.float32),
            )
            for _ in range(self.applies)
        ]


def draw_ids(rng: np.random.Generator, n: int, rows: int, zipf: float | None) -> np.ndarray:
    if zipf is None:
        return rng.integers(0, rows, n).astype(np.int32)
    ids = rng.zipf(zipf, 8 * n)
    return (ids[ids <= rows][:n] - 1).astype(np.int32)


CYCLES = (
    Workload("8 x 65,536 uniform of 1M x 64", 8, 65_536, 1_000_000, 64, 425_984),
    Workload("8 x 65,536 Zipf(1.2) of 1M x 64", 8, 65_536, 1_000_000, 64, 57_344, zipf=1.2),
    Workload("16 x 4,096 uniform of 1M x 64", 16, 4_096, 1_000_000, 64, 65_536),
    Workload("16 x 32 uniform of 1,000 x 16", 16, 32, 1_000, 16, 512),
)


if harness.TINY:
    CYCLES = tuple(
        dataclasses.replace(
            work,
            num_ids=harness.scaled(work.num_ids),
            rows=harness.scaled(work.rows),
            capacity=2 * work.applies * harness.scaled(work.num_ids),
        )
        for work in CYCLES
    )
PEERS = ("tensorflow", "tf at once", "torch", "dense")

# The same cycle in each library: a function that runs it once and returns what to wait for.


def jaxaccum_cycle(work: Workload, rows: int | None, *, at_once: bool = False) -> Callable[[], Any]:
    """One call a gradient, or the whole cycle in one program, as in a jitted training step."""
    shape = (rows, work.columns)
    grads = [
        jaxaccum.IndexedSlices(jnp.asarray(i), jnp.asarray(v), shape) for i, v in work.gradients()
    ]
    box = [jaxaccum.init(shape, capacity=work.capacity)]

    def apply_and_take(
        state: jaxaccum.AccumulatorState, grads: list[jaxaccum.IndexedSlices]
    ) -> tuple[jaxaccum.AccumulatorState, jaxaccum.IndexedSlices, jax.Array]:
        for grad in grads:
            state, _ = apply(state, grad)
        return take(state)

    run = jax.jit(apply_and_take, donate_argnums=0) if at_once else apply_and_take

    def cycle() -> Any:
        box[0], taken, ready = run(box[0], grads)
        return box[0], taken, ready

    _, _, ready = cycle()
    assert ready
    assert box[0].verdict_counts[jaxaccum.Verdict.ACCEPTED] == work.applies
    return cycle


def tensorflow_cycle(work: Workload, *, at_once: bool) -> Callable[[], Any]:
    """Its accumulator needs sorted unique rows: unique and segment-sum, then apply, then take.

    Operands are variables, so that nothing is folded away and nothing fed, and no result is
    fetched. Gradients come one by one, a call each, as in the other libraries; or ``at_once``, all
    in one call, which lets TensorFlow prepare several of them in parallel.
    """
    import tensorflow as tf

    tf1 = tf.compat.v1
    graph = tf.Graph()
    with graph.as_default():
        shape = tf.TensorShape((work.rows, work.columns))
        accumulator = tf1.SparseConditionalAccumulator(tf.float32, shape)
        step = tf1.Variable(0, dtype=tf.int64)
        applies = []
        for ids, values in work.gradients():
            unique, position = tf.unique(tf1.Variable(ids.astype(np.int64)))
            order = tf.argsort(unique)
            slot = tf.gather(tf.math.invert_permutation(order), position)
            sums = tf.math.unsorted_segment_sum(tf1.Variable(values), slot, tf.size(unique))
            rows = tf.gather(unique, order)
            applies.append(accumulator.apply_grad(rows, sums, local_step=step))
        taken = accumulator.take_grad(1)
        advance = tf1.assign_add(step, 1)
        session = tf1.Session(graph=graph)
        session.run(tf1.global_variables_initializer())
        calls = [applies] if at_once else [[op] for op in applies]
        run_applies = [session.make_callable(ops) for ops in calls]
        run_take = session.make_callable([taken.values.op, advance.op])
        count = session.make_callable(accumulator.num_accumulated())

    def apply_all() -> None:
        for run in run_applies:
            run()

    def cycle() -> None:
        apply_all()
        run_take()

    apply_all()
    assert count() == work.applies
    run_take()
    return cycle


def torch_cycle(work: Workload) -> Callable[[], Any]:
    """Sum of sparse tensors, then coalesce; without the division by row counts, which it lacks."""
    import torch

    device = harness.torch_device()
    grads = [
        (
            torch.from_numpy(ids.astype(np.int64))[None].to(device),
            torch.from_numpy(values).to(device),
        )
        for ids, values in work.gradients()
    ]
    shape = (work.rows, work.columns)

    def cycle() -> None:
        total = torch.sparse_coo_tensor(*grads[0], shape, check_invariants=False)
        for ids, values in grads[1:]:
            total = total + torch.sparse_coo_tensor(ids, values, shape, check_invariants=False)
        total.coalesce()
        harness.torch_wait()

    return cycle


def dense_cycle(work: Workload) -> Callable[[], Any]:
    """A donated buffer of the table's size; its take divides it all and starts from zeros."""
    grads = [(jnp.asarray(i), jnp.asarray(v)) for i, v in work.gradients()]
    add = jax.jit(lambda table, ids, values: table.at[ids].add(values), donate_argnums=0)
    reset = jax.jit(lambda table: (jnp.zeros_like(table), table / work.applies), donate_argnums=0)
    box = [jnp.zeros((work.rows, work.columns))]

    def cycle() -> Any:
        table = box[0]
        for ids, values in grads:
            table = add(table, ids, values)
        box[0], mean = reset(table)
        return box[0], mean

    return cycle


def cycles() -> None:
    rows = []
    for work in CYCLES:
        steps = {
            "jaxaccum": jaxaccum_cycle(work, work.rows),
            "jaxaccum at once": jaxaccum_cycle(work, work.rows, at_once=True),
            "unknown rows": jaxaccum_cycle(work, None),
            "dense": dense_cycle(work),
        }
        if harness.is_installed("torch"):
            steps["torch"] = torch_cycle(work)
        if harness.is_installed("tensorflow"):
            steps["tensorflow"] = tensorflow_cycle(work, at_once=False)
            steps["tf at once"] = tensorflow_cycle(work, at_once=True)
        repeats = 40 if work.num_ids < 1000 else 7
        times = harness.interleaved_ms(steps, repeats=repeats, in_a_row=3)
        ours, at_once = times["jaxaccum"], times["jaxaccum at once"]
        rows.append(
            {"cycle": work.name, "ours ms": ours, "unknown ms": times["unknown rows"]}
            | {f"{name} / ours": times[name] / ours for name in PEERS if name in times}
            | {"at once ms": at_once}
            | {f"{name} / at once": times[name] / at_once for name in PEERS[:2] if name in times}
        )
    note = (
        "M applies and a take; medians of whole cycles. One call a gradient, or all in one: a "
        "program compiled by jax.jit, a run of TensorFlow's session."
    )
    harness.report("accumulator-cycle", rows, note=note)


def floors() -> None:
    """Apply against a bare scatter-add into the table; take against a multiply-and-copy."""
    rows = []
    for work in CYCLES[:2]:
        grads = [
            jaxaccum.IndexedSlices(jnp.asarray(i), jnp.asarray(v), (work.rows, work.columns))
            for i, v in work.gradients()
        ]
        add = jax.jit(lambda table, ids, values: table.at[ids].add(values), donate_argnums=0)
        copy = jax.jit(lambda values: values * 0.5)
        gather = jax.jit(lambda values, slots: values[slots] * 0.5)
        shuffled = jnp.asarray(np.random.default_rng(1).permutation(work.capacity), jnp.int32)
        table = jnp.zeros((work.rows, work.columns))
        known = jaxaccum.init((work.rows, work.columns), capacity=work.capacity)
        unknown = jaxaccum.init((None, work.columns), capacity=work.capacity)
        times: dict[str, list[float]] = {}

        def timed(name: str, call: Callable[[], Any], times: dict[str, list[float]] = times) -> Any:
            result, seconds = harness.timed(call)
            times.setdefault(name, []).append(seconds * 1e3)
            return result

        for turn in range(3 if harness.TINY else 24):
            for grad in grads:
                known, _ = timed("apply", lambda s=known, g=grad: apply(s, g))
                loose = dataclasses.replace(grad, dense_shape=None)
                unknown, _ = timed("unknown", lambda s=unknown, g=loose: apply(s, g))
                table = timed("bare", lambda t=table, g=grad, add=add: add(t, g.indices, g.values))
            # All read what the applies have written, whatever the cache still holds of it: so
            # each has rounds of its own.
            if turn % 3 == 0:
                timed("copy", lambda v=known.values, copy=copy: copy(v))
            if turn % 3 == 1:
                timed("gather", lambda v=known.values, f=gather, i=shuffled: f(v, i))
            known, grad, ready = timed("take" if turn % 3 == 2 else "", lambda s=known: take(s))
            assert ready
            unknown, _, _ = timed("unknown take", lambda s=unknown: take(s))
            del grad
        ms = {name: float(np.median(ts[len(ts) // 4 :])) for name, ts in times.items()}
        rows.append(
            {
                "ids": work.name,
                "apply ms": ms["apply"],
                "bare add ms": ms["bare"],
                "apply / bare": ms["apply"] / ms["bare"],
                "unknown / known": ms["unknown"] / ms["apply"],
                "take ms": ms["take"],
                "copy ms": ms["copy"],
                "take / copy": ms["take"] / ms["copy"],
                "gather / copy": ms["gather"] / ms["copy"],
                "unknown take / copy": ms["unknown take"] / ms["copy"],
            }
        )
    note = "Copy and gather: multiplied by a number, of the sums as they lie and in random order."
    harness.report("accumulator-floors", rows, note=note)


def scaling() -> None:
    """Apply of 4,096 ids against the size of the vocabulary and of the capacity."""
    groups = {
        "rows": [(n, 65_536) for n in (1_000, 100_000, 1_000_000, 10_000_000, 100_000_000)],
        "capacity": [(1_000_000, n) for n in (4_096, 65_536, 1_000_000, 4_000_000)],
    }
    rows = []
    for full in groups.values():
        sizes = [tuple(map(harness.scaled, size)) for size in full]
        labels = [f"{num_rows:,} rows, capacity {capacity:,}" for num_rows, capacity in sizes]
        held = dict(zip(labels, (repeated_apply(*size, held=True) for size in sizes), strict=True))
        new = dict(zip(labels, (repeated_apply(*size, held=False) for size in sizes), strict=True))
        held_ms = harness.interleaved_ms(held, repeats=200, warmup=20)
        new_ms = harness.interleaved_ms(new, repeats=200, warmup=20)
        rows += [
            {
                "table": label,
                "rows held: ms": held_ms[label],
                "/ least": held_ms[label] / min(held_ms.values()),
                "rows new: ms": new_ms[label],
                " / least": new_ms[label] / min(new_ms.values()),
            }
            for label in labels
        ]
    harness.report(
        "accumulator-scaling",
        rows,
        note="The first five vary the vocabulary, the rest the capacity. 4,096 ids of a thousand "
        "rows are mostly repetitions, and all sit in the cache.",
    )


def repeated_apply(num_rows: int, capacity: int, *, held: bool) -> Callable[[], Any]:
    """An apply of 4,096 ids, over and over: of rows that are held already, or of new ones.

    For new rows each call works on a fresh state, whose making is not timed: the state of a call is
    made by the one before, after its clock has stopped.
    """
    rng = np.random.default_rng(0)
    shape = (num_rows, 64)
    num_ids = harness.scaled(4096)
    ids = rng.choice(num_rows, num_ids, replace=num_rows < num_ids)
    grads = [
        jaxaccum.IndexedSlices(
            jnp.asarray(rng.permutation(ids), jnp.int32),
            jnp.asarray(rng.standard_normal((num_ids, 64), np.float32)),
            shape,
        )
        for _ in range(4)
    ]
    clear = jax.jit(clear_rows, donate_argnums=0)
    box, turn = [jaxaccum.init(shape, capacity=capacity)], [0]

    def step() -> Any:
        turn[0] += 1
        box[0], verdict = apply(box[0], grads[turn[0] % 4])
        return box[0], verdict

    def prepare() -> None:
        if not held:
            box[0] = jax.block_until_ready(clear(box[0]))

    _, verdict = step()
    assert verdict == jaxaccum.Verdict.ACCEPTED
    step.prepare = prepare
    return step


def clear_rows(state: jaxaccum.AccumulatorState) -> jaxaccum.AccumulatorState:
    """What a take leaves behind, without the gradient, which would take longer than the apply."""
    _, _, ready = taken = jaxaccum.take(state)
    del ready
    return taken[0]


def small() -> None:
    """32 ids of 16 columns: what a call costs from Python, and inside a compiled loop."""
    rows = []
    for name, num_rows in (("1,000 rows", 1_000), ("unknown rows", None)):
        ids = np.random.default_rng(0).integers(0, 1_000, 32).astype(np.int32)
        grad = jaxaccum.IndexedSlices(jnp.asarray(ids), jnp.ones((32, 16)), (num_rows, 16))
        box = [jaxaccum.init((num_rows, 16), capacity=1_024)] * 2

        def calls(box: list[Any] = box, grad: jaxaccum.IndexedSlices = grad) -> Any:
            state = box[0]
            for _ in range(1_000):
                state, _ = apply(state, grad)
            box[0] = state
            return state

        def body(i: jax.Array, carry: Any, grad: jaxaccum.IndexedSlices = grad) -> Any:
            moved = dataclasses.replace(grad, indices=(grad.indices + i) % 1_000)
            return jaxaccum.apply(carry, moved)[0]

        looped = jax.jit(lambda s: jax.lax.fori_loop(0, 1_000, body, s), donate_argnums=0)

        def loop(box: list[Any] = box, looped: Any = looped) -> Any:
            box[1] = looped(box[1])
            return box[1]

        box[1] = jax.tree.map(jnp.copy, box[0])
        times = harness.interleaved_ms({"call": calls, "loop": loop})
        rows.append(
            {"apply of 32 x 16": name, "call us": times["call"], "in fori_loop us": times["loop"]}
        )
    harness.report("accumulator-small", rows, note="Microseconds an apply.")


PARTS = {"cycles": cycles, "floors": floors, "scaling": scaling, "small": small}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them by default")
    for part in parser.parse_args().parts or PARTS:
        PARTS[part]()
