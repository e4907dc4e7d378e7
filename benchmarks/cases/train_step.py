"""A whole training step, from losses to updated rows: four micro-batches, one step of Adam.

A small model looks its ids up in a table of 64 floats a row, four times, and takes one step. Each
is one jitted function of donated parameters and state, on ids that none of the fifteen steps before
has seen.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxaccum
from benchmarks import workloads
from benchmarks.harness import (
    Figures,
    Step,
    case,
    held_mb,
    jax_step,
    measure,
    peer_steps,
    with_metric,
)
from benchmarks.workloads import MICRO_BATCHES, WIDTH

TABLES = {"hidden": False, "table": True}
LINES = ["jaxaccum", "with catch_up", "by hand", "MultiSteps", "dense", "PyTorch", "bare adds"]
SPARSE = ["jaxaccum", "by hand", "PyTorch"]  # the lines whose memory a large table leaves room for


@case(
    "{rows:,}",
    settings=[
        *({"rows": 2**k, "lines": LINES} for k in range(11, 19)),
        {"rows": 1_000_000, "lines": LINES},
        {"rows": 4_000_000, "lines": SPARSE},
    ],
    quick=[{"rows": 1000, "ids": 32, "lines": LINES}],
)
def train_step(rows: int, lines: list[str], ids: int = 4096) -> Figures:
    """A step of Adam from 4 micro-batches of 4,096 ids, by rows of a table of 64 floats."""
    return compare(rows, ids, lines)


@case(
    "{ids:,}",
    settings=[{"ids": 4**k, "lines": LINES} for k in range(2, 9)],
    quick=[{"ids": 8, "rows": 1000, "lines": LINES}],
)
def touched(ids: int, lines: list[str], rows: int = 1_000_000) -> Figures:
    """The same step of a table of a million rows, by ids a micro-batch."""
    return compare(rows, ids, lines)


def compare(rows: int, ids: int, lines: list[str]) -> Figures:
    batches = [jnp.asarray(batch) for batch in workloads.batches(rows, ids)]
    makers: dict[str, Callable[[], Any]] = {
        "jaxaccum": functools.partial(lazy, ids),
        "with catch_up": functools.partial(lazy, ids, catch_up=True),
        "by hand": by_hand,
        "MultiSteps": multi_steps,
        "dense": dense,
        "bare adds": bare,
    }
    steps, held = {}, {}
    for line in lines:
        if line in makers:
            steps[line], held[line] = compiled_step(*makers[line](), rows, batches)
        else:
            steps |= peer_steps("torch", "train_step", rows=rows, ids=ids)
    return with_metric(measure(steps), "MB", held)


def compiled_step(tx_init: Any, step: Any, rows: int, batches: list[jax.Array]) -> Any:
    """The step, run on one batch after the other, and what it holds in MB."""
    params = init(rows)
    carry = [params, jax.jit(tx_init)(params)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, batches[0]).compile()
    turn = itertools.cycle(batches)

    def call() -> Any:
        carry[:] = compiled(*carry, next(turn))
        return carry

    return jax_step(call), held_mb(compiled)


def loss(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
    return of_rows(params["table"][ids], params["hidden"])


def of_rows(rows: jax.Array, hidden: jax.Array) -> jax.Array:
    return jnp.mean((rows @ hidden - 1.0) ** 2)


def init(rows: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "hidden": jax.random.normal(keys[0], (WIDTH,)) / 8,
        "table": jax.random.normal(keys[1], (rows, WIDTH)),
    }


def scanned(tx: Any, grad_fn: Callable[..., Any], apply_updates: Callable[..., Any]) -> Any:
    def step(params: Any, state: Any, ids: jax.Array) -> Any:
        def micro_step(carry: Any, ids: jax.Array) -> Any:
            value, grads = grad_fn(carry[0], ids)
            updates, state = tx.update(grads, carry[1], carry[0])
            return (apply_updates(carry[0], updates), state), value

        return jax.lax.scan(micro_step, (params, state), ids)[0]

    return tx.init, step


def lazy(ids: int, catch_up: bool = False) -> Any:
    """``value_and_sparse_grad``, ``accumulate``, ``apply_updates``."""
    tx = jaxaccum.accumulate(
        jaxaccum.lazy_rows(optax.adam(1e-3), catch_up=catch_up),
        MICRO_BATCHES,
        tables=TABLES,
        capacity=MICRO_BATCHES * ids,
    )
    grad_fn = jaxaccum.value_and_sparse_grad(loss, tables=TABLES)
    return scanned(tx, grad_fn, jaxaccum.apply_updates)


def multi_steps() -> Any:
    """``jax.value_and_grad`` and ``optax.MultiSteps(optax.adam)``."""
    tx = optax.MultiSteps(optax.adam(1e-3), MICRO_BATCHES)
    return scanned(tx, jax.value_and_grad(loss), optax.apply_updates)


def dense() -> Any:
    """``jax.grad`` summed over the micro-batches by hand, then ``optax.adam``."""
    tx = optax.adam(1e-3)

    def step(params: Any, state: Any, ids: jax.Array) -> Any:
        def add(total: Any, ids: jax.Array) -> Any:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, ids)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), ids)
        mean = jax.tree.map(lambda g: g / MICRO_BATCHES, total)
        updates, state = tx.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def by_hand() -> Any:
    """Lazy Adam as one writes it for one model: look up, differentiate the rows, sum, scatter."""
    dense_tx = optax.adam(1e-3)

    def init(params: dict[str, jax.Array]) -> Any:
        moments = [jnp.zeros_like(params["table"]) for _ in range(2)]
        return moments, dense_tx.init(params["hidden"])

    def step(params: dict[str, jax.Array], state: Any, ids: jax.Array) -> Any:
        (mean, square), dense_state = state
        table, hidden = params["table"], params["hidden"]

        def micro_step(total: jax.Array, ids: jax.Array) -> Any:
            of_looked_up, of_hidden = jax.grad(of_rows, (0, 1))(table[ids], hidden)
            return total + of_hidden, of_looked_up

        total, slices = jax.lax.scan(micro_step, jnp.zeros_like(hidden), ids)
        updates, dense_state = dense_tx.update(total / MICRO_BATCHES, dense_state)
        rows, position = jnp.unique(
            ids, return_inverse=True, size=ids.size, fill_value=table.shape[0]
        )
        sums = jax.ops.segment_sum(slices.reshape(-1, WIDTH), position.ravel(), ids.size)
        grad, count = sums / MICRO_BATCHES, dense_state[0].count
        new_mean = 0.9 * mean[rows] + 0.1 * grad
        new_square = 0.999 * square[rows] + 0.001 * grad**2
        size = jnp.sqrt(new_square / (1 - 0.999**count)) + 1e-8
        change = -1e-3 * (new_mean / (1 - 0.9**count)) / size
        moments = [
            mean.at[rows].set(new_mean, mode="drop"),
            square.at[rows].set(new_square, mode="drop"),
        ]
        params = {"hidden": hidden + updates, "table": table.at[rows].add(change, mode="drop")}
        return params, (moments, dense_state)

    return init, step


def bare() -> Any:
    """No model at all: the rows of the table and of both moments, each read and added to once."""

    def init(params: dict[str, jax.Array]) -> Any:
        return [jnp.zeros_like(params["table"]) for _ in range(2)]

    def step(params: dict[str, jax.Array], moments: Any, ids: jax.Array) -> Any:
        add = lambda table: table.at[ids.reshape(-1)].add(1.0)  # noqa: E731
        return params | {"table": add(params["table"])}, [add(m) for m in moments]

    return init, step


@case(
    "{tables}",
    settings=[{"tables": 1}, {"tables": 26}],
    quick=[{"tables": 2}],
    # What an earlier run has compiled would be read from its files.
    environ={"JAX_ENABLE_COMPILATION_CACHE": "false"},
)
def compiling(tables: int) -> Figures:
    """The time to trace and compile such a step of 4,096 ids, once, by the number of tables."""
    table = jax.ShapeDtypeStruct((100_000, WIDTH), jnp.float32)
    params = {f"table {k:02}": table for k in range(tables)}
    ids = jax.ShapeDtypeStruct((MICRO_BATCHES, tables, 4096), jnp.int32)

    def loss(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
        found = [table[rows] for table, rows in zip(params.values(), ids, strict=True)]
        return jnp.mean((sum(found) - 1.0) ** 2)

    tx = jaxaccum.accumulate(
        jaxaccum.lazy_rows(optax.adam(1e-3)), MICRO_BATCHES, tables=True, capacity=4 * 4096
    )
    dense_tx = optax.MultiSteps(optax.adam(1e-3), MICRO_BATCHES)
    grad_fn = jaxaccum.value_and_sparse_grad(loss, tables=True)
    lines = {
        "jaxaccum": scanned(tx, grad_fn, jaxaccum.apply_updates),
        "MultiSteps": scanned(dense_tx, jax.value_and_grad(loss), optax.apply_updates),
    }
    return measure(
        {line: compiles(*made, params, ids) for line, made in lines.items()},
        turns=(2, 2),
        in_a_row=1,
    )


def compiles(tx_init: Any, step: Any, params: Any, ids: jax.Array) -> Step:
    state = jax.eval_shape(tx_init, params)

    def call() -> None:
        # A function that JAX has not met, else it would remember the program.
        jax.jit(lambda *args: step(*args), donate_argnums=(0, 1)).lower(
            params, state, ids
        ).compile()

    return Step(call, prepare=jax.clear_caches)
