"""The class with TensorFlow's methods beside TensorFlow's: applies from many threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
