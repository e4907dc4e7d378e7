"""Whether the detours of ``_rows/cpu_workarounds.py`` are still worth it, each where it is used.

Each program is compiled with the detour and without, and the two run in turns. "Gain" is the time
without over the time with it: what stays near 1 or below may go.

    python benchmarks/cpu_workarounds.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum
from jaxaccum._distributed import exchange
from jaxaccum._rows import cpu_workarounds, prefix_sums, row_arithmetic

ROWS, WIDTH = harness.scaled(1_000_000), 64
IDS = harness.scaled(16_384)
Step = Callable[[], Any]


def gradient(num_ids: int) -> jaxaccum.IndexedSlices:
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.choice(ROWS, min(num_ids, ROWS), replace=False), jnp.int32)
    values = jnp.asarray(rng.standard_normal((len(ids), WIDTH), np.float32))
    return jaxaccum.IndexedSlices(ids, values, (ROWS, WIDTH))


def donated(function: Callable[..., Any], carry: Any, *args: Any) -> Step:
    """A step that gives its first argument away and gets it back."""
    compiled = jax.jit(function, donate_argnums=0).lower(carry, *args).compile()
    box = [jax.tree.map(jnp.copy, carry)]

    def step() -> Any:
        box[0] = compiled(box[0], *args)
        return box[0]

    return step


def lazy_step(optimizer: optax.GradientTransformation) -> Callable[[], Step]:
    def make() -> Step:
        tx = jaxaccum.lazy_rows(optimizer)
        table = jnp.zeros((ROWS, WIDTH))

        def train(carry: Any, grad: jaxaccum.IndexedSlices) -> Any:
            updates, state = tx.update(grad, carry[1], carry[0])
            return jaxaccum.apply_updates(carry[0], updates), state

        return donated(train, (table, tx.init(table)), gradient(IDS))

    return make


def add_parts() -> Step:
    """The sums of eight devices, as `all_merge` writes them."""
    rng = np.random.default_rng(0)
    sent, held = IDS // 4, IDS
    slots = [rng.choice(held, sent, replace=False) for _ in range(8)]
    slices = jnp.asarray(rng.standard_normal((8, sent, WIDTH), np.float32))
    # Looked up in its module when it is traced, so that it can be replaced.
    return donated(
        lambda *args: exchange.add_in_turn(*args),
        jnp.zeros((held, WIDTH)),
        jnp.asarray(np.stack(slots), jnp.int32),
        slices,
    )


def accumulate_rows(takes: bool) -> Callable[[], Step]:
    """An apply of narrow rows, in which counting what comes before weighs most; or with a take."""

    def make() -> Step:
        ids = gradient(4 * IDS).indices
        grad = jaxaccum.IndexedSlices(ids, jnp.ones((len(ids), 1)), (ROWS, 1))

        def run(carry: Any, grad: jaxaccum.IndexedSlices) -> Any:
            state, result = jaxaccum.apply(carry[0], grad, local_step=0)
            if takes:
                state, result, _ = jaxaccum.take(state)
            return state, result

        state = jaxaccum.init((ROWS, 1), capacity=len(ids))
        return donated(run, run((state, None), grad), grad)

    return make


def add_up(counts: jax.Array) -> jax.Array:
    return jnp.cumsum(counts, dtype=jnp.int32) - counts


def count_bits(words: jax.Array) -> jax.Array:
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return add_up(bits.reshape(-1).astype(jnp.int32))


def leave(rows: jax.Array, indices: jax.Array) -> jax.Array:
    del indices
    return rows


# What is run, where the detour is looked up, its name, and what stands in its place without it.
CASES: dict[str, tuple[Callable[[], Step], Any, str, Callable[..., jax.Array]]] = {
    f"lazy_rows(adam), {IDS:,} ids": (
        lazy_step(optax.adam(1e-3)),
        row_arithmetic,
        "compute_with",
        leave,
    ),
    f"lazy_rows(sgd with momentum), {IDS:,} ids": (
        lazy_step(optax.sgd(1e-3, momentum=0.9)),
        row_arithmetic,
        "compute_with",
        leave,
    ),
    f"apply, {4 * IDS:,} ids": (accumulate_rows(False), prefix_sums, "count_by_words", count_bits),
    f"apply and take, {4 * IDS:,} ids": (
        accumulate_rows(True),
        prefix_sums,
        "sum_by_blocks",
        add_up,
    ),
    f"all_merge's sums of 8 x {IDS // 4:,} rows": (
        add_parts,
        exchange,
        "add_in_turn",
        cpu_workarounds.add_part_after_part,
    ),
}


def main() -> None:
    rows = []
    for name, (make, module, detour, plain) in CASES.items():
        with mock.patch.object(module, detour, plain):
            jax.clear_caches()
            without = make()
        jax.clear_caches()
        steps = {"with": make(), "without": without}
        ms = harness.interleaved_ms(steps, repeats=15, in_a_row=3)
        rows.append(
            {
                "detour": detour,
                "in": name,
                "with ms": ms["with"],
                "without ms": ms["without"],
                "gain": ms["without"] / ms["with"],
            }
        )
    harness.report("cpu_workarounds", rows, note=f"Of a table of {ROWS:,} x {WIDTH} float32.")


if __name__ == "__main__":
    main()
