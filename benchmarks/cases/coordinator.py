"""The class with TensorFlow's methods beside TensorFlow's: applies from many threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxaccum
from benchmarks import workloads
from benchmarks.harness import Figures, case, jax_step, measure, peer_steps
from benchmarks.steps import by_threads

FUTURE = 1 << 40  # never stale
SMALL = {"ids": 32, "columns": 16, "applies": 1000}
MIDDLE = {"rows": 1_000_000, "ids": 4096, "columns": 64, "applies": 8}
LARGE = MIDDLE | {"ids": 65_536}
LARGEST = [LARGE | {"threads": threads} for threads in (1, 2, 4, 8)]


@case(
    "{ids:,} x {columns}, {threads}",
    settings=[
        *(SMALL | {"rows": 10_000, "threads": threads} for threads in (1, 2, 4, 8)),
        *(MIDDLE | {"threads": threads} for threads in (1, 2, 4, 8)),
        *LARGEST,
    ],
    quick=[SMALL | {"rows": 1000, "applies": 16, "threads": 2}],
)
def coordinator(rows: int | None, ids: int, columns: int, applies: int, threads: int) -> Figures:
    """SparseConditionalAccumulator: an apply, its share of the take included, by threads."""
    raw = workloads.gradients(8, ids, rows or 10_000, columns)
    dealt = {"given": len(raw), "applies": applies, "threads": threads}
    steps = {
        "jaxaccum": jax_step(by_threads(*accumulator(rows, raw), **dealt)),
        "jaxaccum, tree of one": jax_step(by_threads(*tree_of_one(rows, raw), **dealt)),
        **peer_steps(
            "tensorflow",
            "coordinator",
            rows=rows,
            ids=ids,
            columns=columns,
            applies=applies,
            threads=threads,
        ),
    }
    return measure(steps, in_a_row=2, per=applies)


@case(
    "{ids:,} x {columns}, unknown rows",
    settings=[SMALL | {"rows": None, "threads": 1}],
    quick=[SMALL | {"rows": None, "applies": 8, "threads": 1}],
)
def coordinator_unknown(**setting: Any) -> Figures:
    """The same where the number of rows is not known."""
    return coordinator(**setting)


@case(
    "{ids:,} x {columns}, {threads}",
    settings=LARGEST[:1],
    quick=[SMALL | {"rows": 1000, "applies": 8, "threads": 1}],
    environ={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
)
def coordinator_huge_pages(**setting: Any) -> Figures:
    """The same where malloc asks for huge pages."""
    return coordinator(**setting)


@case(
    "{leaves} of {side} x {side}",
    settings=[
        {"leaves": 20, "side": 8, "ids": 32, "kind": "numpy"},
        {"leaves": 20, "side": 64, "ids": 1024, "kind": "jax"},
        {"leaves": 2, "side": 1024, "ids": 1024, "kind": "jax"},
    ],
    quick=[{"leaves": 2, "side": 8, "ids": 32, "kind": "numpy"}],
)
def coordinator_models(leaves: int, side: int, ids: int, kind: str) -> Figures:
    """Two tables and some dense leaves: one TreeAccumulator, or an accumulator for each leaf."""
    as_array = {"numpy": np.asarray, "jax": jnp.asarray}[kind]
    tables = [
        jaxaccum.IndexedSlices(as_array(rows.astype(np.int32)), as_array(values), (100_000, 16))
        for rows, values in workloads.gradients(2, ids, 100_000, 16)
    ]
    dense = [as_array(np.ones((side, side), np.float32)) for _ in range(leaves)]
    dealt = {"given": 1, "applies": 32, "threads": 1}
    steps = {
        "one tree": jax_step(by_threads(*one_tree(tables, dense), **dealt)),
        "one each": jax_step(by_threads(*one_each(tables, dense), **dealt)),
    }
    return measure(steps, in_a_row=2, per=32)


def one_tree(
    tables: list[jaxaccum.IndexedSlices], dense: list[Any]
) -> tuple[Callable[[int], None], Callable[[], Any]]:
    held = jaxaccum.TreeAccumulator((tables, dense))

    def apply(_: int) -> None:
        held.apply_grad((tables, dense), FUTURE)

    return apply, lambda: held.take_grad(1)


def one_each(
    tables: list[jaxaccum.IndexedSlices], dense: list[Any]
) -> tuple[Callable[[int], None], Callable[[], Any]]:
    of_tables = [
        jaxaccum.SparseConditionalAccumulator(
            "float32", table.dense_shape, reduction_type="MEAN_PER_GRADIENT"
        )
        for table in tables
    ]
    of_dense = [jaxaccum.ConditionalAccumulator("float32", leaf.shape) for leaf in dense]

    def apply(_: int) -> None:
        for held, grad in zip(of_tables, tables, strict=True):
            held.apply_indexed_slices_grad(grad, FUTURE)
        for held, grad in zip(of_dense, dense, strict=True):
            held.apply_grad(grad, FUTURE)

    def take() -> Any:
        rows = [held.take_indexed_slices_grad(1, trim=False) for held in of_tables]
        return rows, [held.take_grad(1) for held in of_dense]

    return apply, take


def accumulator(
    rows: int | None, given: list[workloads.Gradient]
) -> tuple[Callable[[int], None], Callable[[], Any]]:
    held = jaxaccum.SparseConditionalAccumulator("float32", (rows, given[0][1].shape[1]))

    def apply(k: int) -> None:
        held.apply_grad(*given[k], local_step=FUTURE)

    return apply, lambda: held.take_indexed_slices_grad(1)


def tree_of_one(
    rows: int | None, given: list[workloads.Gradient]
) -> tuple[Callable[[int], None], Callable[[], Any]]:
    """The same table as the only leaf of a `TreeAccumulator`."""
    grads = [
        {"table": jaxaccum.IndexedSlices(ids, values, (rows, values.shape[1]))}
        for ids, values in given
    ]
    held = jaxaccum.TreeAccumulator(grads[0], reduction="mean_per_row")

    def apply(k: int) -> None:
        held.apply_grad(grads[k], FUTURE)

    return apply, lambda: held.take_grad(1, trim=True)
