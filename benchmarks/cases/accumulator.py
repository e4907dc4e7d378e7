"""The accumulator against TensorFlow, PyTorch and a dense buffer, and against what is possible."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxaccum
from benchmarks import workloads
from benchmarks.harness import Figures, Step, case, jax_step, measure, peer_steps

apply = jax.jit(jaxaccum.apply, donate_argnums=0)
take = jax.jit(jaxaccum.take, donate_argnums=0)
add = jax.jit(lambda table, ids, values: table.at[ids].add(values), donate_argnums=0)

LARGE = {"applies": 8, "ids": 65_536, "rows": 1_000_000, "columns": 64}
QUICK = {"applies": 4, "ids": 16, "rows": 1000, "columns": 16, "capacity": 128, "zipf": None}


def on_device(
    ids: int, rows: int, columns: int, zipf: float | None, count: int
) -> list[jaxaccum.IndexedSlices]:
    return [
        jaxaccum.IndexedSlices(jnp.asarray(i), jnp.asarray(v), (rows, columns))
        for i, v in workloads.gradients(count, ids, rows, columns, zipf)
    ]


@case(
    "{applies} x {ids:,}, {name}",
    settings=[
        LARGE | {"capacity": 425_984, "zipf": None, "name": "uniform"},
        LARGE | {"capacity": 57_344, "zipf": 1.2, "name": "Zipf"},
        LARGE | {"applies": 16, "ids": 4096, "capacity": 65_536, "zipf": None, "name": "uniform"},
        {"applies": 16, "ids": 32, "rows": 1000, "columns": 16, "capacity": 512, "zipf": None}
        | {"name": "of a small table"},
    ],
    quick=[QUICK | {"name": "uniform"}],
)
def cycle(name: str, **work: Any) -> Figures:
    """Gradients of a million rows of 64 floats, accumulated, and their mean: whole cycles."""
    del name
    capacity = work.pop("capacity")
    grads = on_device(work["ids"], work["rows"], work["columns"], work["zipf"], work["applies"])
    steps = {
        "jaxaccum": cycle_step(grads, capacity),
        "jaxaccum, one program": cycle_step(grads, capacity, at_once=True),
        "jaxaccum, unknown rows": cycle_step(
            [dataclasses.replace(grad, dense_shape=(None, work["columns"])) for grad in grads],
            capacity,
        ),
        "dense buffer": dense_cycle(grads),
        **peer_steps("tensorflow", "cycle", **work),
        **peer_steps("torch", "cycle", **work),
    }
    return measure(steps, seconds=12.0, in_a_row=3)


@case(
    "{applies} x {ids:,}, {name}",
    settings=[LARGE | {"capacity": 425_984, "zipf": None, "name": "uniform"}],
    quick=[QUICK | {"name": "uniform"}],
    environ={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
)
def cycle_huge_pages(**work: Any) -> Figures:
    """The same where malloc asks for huge pages."""
    return cycle(**work)


def cycle_step(
    grads: list[jaxaccum.IndexedSlices], capacity: int, *, at_once: bool = False
) -> Step:
    """One call a gradient, or the whole cycle in one program, as in a jitted training step."""

    def apply_and_take(
        state: jaxaccum.AccumulatorState, grads: list[jaxaccum.IndexedSlices]
    ) -> tuple[jaxaccum.AccumulatorState, jaxaccum.IndexedSlices, jax.Array]:
        for grad in grads:
            state, _ = apply(state, grad)
        return take(state)

    run = jax.jit(apply_and_take, donate_argnums=0) if at_once else apply_and_take
    box = [jaxaccum.init(grads[0].dense_shape, capacity=capacity)]

    def call() -> Any:
        box[0], taken, ready = run(box[0], grads)
        return box[0], taken, ready

    _, _, ready = call()
    assert ready
    assert box[0].verdict_counts[jaxaccum.Verdict.ACCEPTED] == len(grads)
    return jax_step(call)


def dense_cycle(grads: list[jaxaccum.IndexedSlices]) -> Step:
    """A donated buffer of the table's size; its take divides it all and starts from zeros."""
    reset = jax.jit(lambda table: (jnp.zeros_like(table), table / len(grads)), donate_argnums=0)
    box = [jnp.zeros(grads[0].dense_shape)]

    def call() -> Any:
        table = box[0]
        for grad in grads:
            table = add(table, grad.indices, grad.values)
        box[0], mean = reset(table)
        return box[0], mean

    return jax_step(call)


class Held:
    """A state to which eight gradients are applied in turn, and which is then emptied."""

    def __init__(self, grads: list[jaxaccum.IndexedSlices], capacity: int) -> None:
        self.grads, self.turn = grads, itertools.count()
        self.state = jaxaccum.init(grads[0].dense_shape, capacity=capacity)

    def apply(self) -> Any:
        self.state, verdict = apply(self.state, self.grads[next(self.turn) % len(self.grads)])
        return self.state, verdict

    def empty_when_full(self) -> None:
        if self.state.num_accumulated == len(self.grads):
            self.take()

    def refill(self) -> None:
        self.take()
        for _ in self.grads:
            jax.block_until_ready(self.apply())

    def take(self) -> Any:
        self.state, *taken = jax.block_until_ready(take(self.state))
        return self.state, taken


@case(
    "{name}",
    settings=[
        *({"ids": n, "zipf": None, "name": f"{n:,}"} for n in (64, 512, 4096, 65_536, 262_144)),
        {"ids": 65_536, "zipf": 1.2, "name": "65,536 Zipf"},
    ],
    quick=[{"ids": 16, "zipf": None, "name": "16", "rows": 1000}],
)
def apply_one(name: str, ids: int, zipf: float | None, rows: int = 1_000_000) -> Figures:
    """One gradient into what is held of a table of a million rows of 64 floats, by its ids."""
    del name
    shape = {"ids": ids, "rows": rows, "columns": workloads.WIDTH, "zipf": zipf}
    grads, capacity = on_device(**shape, count=8), min(8 * ids, rows)
    known = Held(grads, capacity)
    loose = [dataclasses.replace(each, dense_shape=(None, workloads.WIDTH)) for each in grads]
    unknown = Held(loose, capacity)
    turn, table = itertools.cycle(grads), [jnp.zeros(grads[0].dense_shape)]

    def bare() -> jax.Array:
        grad = next(turn)
        table[0] = add(table[0], grad.indices, grad.values)
        return table[0]

    steps = {
        "jaxaccum": jax_step(known.apply, known.empty_when_full),
        "jaxaccum, unknown rows": jax_step(unknown.apply, unknown.empty_when_full),
        "bare scatter-add": jax_step(bare),
        **peer_steps("tensorflow", "apply", **shape),
    }
    return measure(steps, in_a_row=8)


@case(
    "8 x {ids:,}, {name}",
    settings=[
        {"ids": 65_536, "zipf": None, "name": "uniform", "capacity": 425_984},
        {"ids": 65_536, "zipf": 1.2, "name": "Zipf", "capacity": 57_344},
    ],
    quick=[{"ids": 16, "zipf": None, "name": "uniform", "capacity": 128, "rows": 1000}],
)
def take_one(
    ids: int, zipf: float | None, capacity: int, name: str, rows: int = 1_000_000
) -> Figures:
    """A take of what eight gradients have left, against the bare copy of its sums."""
    del name
    grads = on_device(ids, rows, workloads.WIDTH, zipf, count=8)
    known = Held(grads, capacity)
    loose = [dataclasses.replace(each, dense_shape=(None, workloads.WIDTH)) for each in grads]
    unknown = Held(loose, capacity)
    known.refill(), unknown.refill()
    copy = jax.jit(lambda values: values * 0.5)
    gather = jax.jit(lambda values, slots: values[slots] * 0.5)
    shuffled = jnp.asarray(np.random.default_rng(1).permutation(capacity), jnp.int32)
    # All read what the applies have just written, whatever the cache still holds of it.
    steps = {
        "jaxaccum": jax_step(known.take, known.refill),
        "jaxaccum, unknown rows": jax_step(unknown.take, unknown.refill),
        "copy": jax_step(lambda: copy(known.state.values), known.refill),
        "copy in random order": jax_step(
            lambda: gather(known.state.values, shuffled), known.refill
        ),
    }
    return measure(steps, in_a_row=2)


@case(
    "{name}",
    settings=[
        *(
            {"rows": n, "capacity": 65_536, "name": f"{n:,} rows"}
            for n in (1_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
        ),
        *(
            {"rows": 1_000_000, "capacity": n, "name": f"capacity {n:,}"}
            for n in (4_096, 65_536, 1_000_000, 4_000_000)
        ),
    ],
    quick=[{"rows": 1000, "capacity": 64, "name": "1,000 rows", "ids": 32}],
)
def sizes(rows: int, capacity: int, name: str, ids: int = 4096) -> Figures:
    """An apply of 4,096 ids, by the rows of the table and by the capacity.

    4,096 ids of a thousand rows are mostly repetitions, and all sit in the cache.
    """
    del name
    calls = {"rows held": False, "rows new": True}
    steps = {line: repeated_apply(rows, capacity, ids, new) for line, new in calls.items()}
    return measure(steps, turns=(5, 40))


def repeated_apply(rows: int, capacity: int, ids: int, new: bool) -> Step:
    """An apply over and over: of rows that are held already, or of new ones, to an empty state."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(rows, ids, replace=rows < ids)
    shape = (rows, workloads.WIDTH)
    grads = [
        jaxaccum.IndexedSlices(
            jnp.asarray(rng.permutation(drawn), jnp.int32),
            jnp.asarray(rng.standard_normal((ids, workloads.WIDTH), np.float32)),
            shape,
        )
        for _ in range(4)
    ]
    # What a take leaves, without the gradient, which would take longer than the apply.
    clear = jax.jit(lambda state: jaxaccum.take(state)[0], donate_argnums=0)
    box, turn = [jaxaccum.init(shape, capacity=capacity)], itertools.cycle(grads)

    def call() -> Any:
        box[0], verdict = apply(box[0], next(turn))
        return box[0], verdict

    def prepare() -> None:
        box[0] = jax.block_until_ready(clear(box[0]))

    _, verdict = call()
    assert verdict == jaxaccum.Verdict.ACCEPTED
    return jax_step(call, prepare if new else None)


@case(
    "{name}",
    settings=[
        {"rows": 1000, "name": "1,000 rows", "calls": 1000},
        {"rows": None, "name": "unknown rows", "calls": 1000},
    ],
    quick=[{"rows": 1000, "name": "1,000 rows", "calls": 10}],
)
def small(rows: int | None, name: str, calls: int) -> Figures:
    """An apply of 32 ids of 16 columns: what a call costs from Python, and in a compiled loop."""
    del name
    ids = np.random.default_rng(0).integers(0, 1_000, 32).astype(np.int32)
    grad = jaxaccum.IndexedSlices(jnp.asarray(ids), jnp.ones((32, 16)), (rows, 16))

    def body(i: jax.Array, state: jaxaccum.AccumulatorState) -> jaxaccum.AccumulatorState:
        moved = dataclasses.replace(grad, indices=(grad.indices + i) % 1_000)
        return jaxaccum.apply(state, moved)[0]

    loop = functools.partial(jax.lax.fori_loop, 0, calls, body)

    def from_python(state: jaxaccum.AccumulatorState) -> jaxaccum.AccumulatorState:
        for _ in range(calls):
            state, _ = apply(state, grad)
        return state

    ways = {"from Python": from_python, "in fori_loop": jax.jit(loop, donate_argnums=0)}
    steps = {
        line: carried(run, jaxaccum.init((rows, 16), capacity=1_024)) for line, run in ways.items()
    }
    return measure(steps, per=calls)


def carried(run: Callable[[Any], Any], carry: Any) -> Step:
    """A step that goes on from what the last one returned."""
    box = [carry]

    def call() -> Any:
        box[0] = run(box[0])
        return box[0]

    return jax_step(call)
