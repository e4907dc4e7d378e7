"""Whether the detours of ``_rows/cpu_workarounds.py`` are still worth it, each where it is used.

Each program is compiled with the detour and without. Where "without" takes no more time, the detour
may go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum
from benchmarks.harness import Figures, Step, case, donated, measure
from benchmarks.workloads import WIDTH
from jaxaccum._distributed import exchange
from jaxaccum._rows import cpu_workarounds, prefix_sums, row_arithmetic


def lazy_step(optimizer: optax.GradientTransformation, rows: int, ids: int) -> Step:
    tx = jaxaccum.lazy_rows(optimizer)
    table = jnp.zeros((rows, WIDTH))
    rng = np.random.default_rng(0)
    drawn = jnp.asarray(rng.choice(rows, ids, replace=False), jnp.int32)
    values = jnp.asarray(rng.standard_normal((ids, WIDTH), np.float32))

    def train(carry: Any, grad: jaxaccum.IndexedSlices) -> Any:
        updates, state = tx.update(grad, carry[1], carry[0])
        return jaxaccum.apply_updates(carry[0], updates), state

    state = (table, tx.init(table))
    return donated(train, state, jaxaccum.IndexedSlices(drawn, values, table.shape))


def adam(rows: int, ids: int) -> Step:
    return lazy_step(optax.adam(1e-3), rows, ids)


def momentum(rows: int, ids: int) -> Step:
    return lazy_step(optax.sgd(1e-3, momentum=0.9), rows, ids)


def add_parts(rows: int, ids: int) -> Step:
    """The sums of eight devices, as `all_merge` writes them."""
    del rows
    rng = np.random.default_rng(0)
    sent = ids // 4
    slots = np.stack([rng.choice(ids, sent, replace=False) for _ in range(8)])
    slices = jnp.asarray(rng.standard_normal((8, sent, WIDTH), np.float32))
    # Looked up in its module when it is traced, so that it can be replaced.
    add = lambda *args: exchange.add_in_turn(*args)  # noqa: E731
    return donated(add, jnp.zeros((ids, WIDTH)), jnp.asarray(slots, jnp.int32), slices)


def accumulate_rows(rows: int, ids: int, takes: bool) -> Step:
    """An apply of narrow rows, in which counting what comes before weighs most; or with a take."""
    rng = np.random.default_rng(0)
    drawn = jnp.asarray(rng.choice(rows, min(4 * ids, rows), replace=False), jnp.int32)
    grad = jaxaccum.IndexedSlices(drawn, jnp.ones((len(drawn), 1)), (rows, 1))

    def run(carry: Any, grad: jaxaccum.IndexedSlices) -> Any:
        state, result = jaxaccum.apply(carry[0], grad, local_step=0)
        if takes:
            state, result, _ = jaxaccum.take(state)
        return state, result

    state = jaxaccum.init((rows, 1), capacity=len(drawn))
    return donated(run, run((state, None), grad), grad)


def add_up(counts: jax.Array) -> jax.Array:
    return jnp.cumsum(counts, dtype=jnp.int32) - counts


def count_bits(words: jax.Array) -> jax.Array:
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return add_up(bits.reshape(-1).astype(jnp.int32))


def leave(rows: jax.Array, indices: jax.Array) -> jax.Array:
    del indices
    return rows


# What is run, where the detour is looked up, its name, and what stands in its place without it.
DETOURS: dict[str, tuple[Callable[[int, int], Step], Any, str, Callable[..., jax.Array]]] = {
    "lazy_rows(adam)": (adam, row_arithmetic, "compute_with", leave),
    "lazy_rows(sgd), momentum": (momentum, row_arithmetic, "compute_with", leave),
    "apply of 65,536 ids": (
        functools.partial(accumulate_rows, takes=False),
        prefix_sums,
        "count_by_words",
        count_bits,
    ),
    "apply and take of 65,536 ids": (
        functools.partial(accumulate_rows, takes=True),
        prefix_sums,
        "sum_by_blocks",
        add_up,
    ),
    "sums of all_merge": (
        add_parts,
        exchange,
        "add_in_turn",
        cpu_workarounds.add_part_after_part,
    ),
}


@case(
    "{program}",
    settings=[{"program": program} for program in DETOURS],
    quick=[{"program": program, "rows": 1024, "ids": 32} for program in DETOURS],
)
def workarounds(program: str, rows: int = 1_000_000, ids: int = 16_384) -> Figures:
    """Detours for XLA on a CPU, with and without, of 16,384 ids of a million rows of 64 floats."""
    make, module, detour, plain = DETOURS[program]
    with mock.patch.object(module, detour, plain):
        jax.clear_caches()
        without = make(rows, ids)
    jax.clear_caches()
    return measure({"with": make(rows, ids), "without": without})
