"""A gradient as rows against a dense one: time, memory, what the method costs in tracing.

A two-layer model looks 4,096 ids up in a table of 64 floats a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxaccum
from benchmarks.harness import Figures, Step, case, jax_step, measure, with_metric
from benchmarks.workloads import WIDTH

WHAT = ("gradient", "gradient and SGD, donated", "the same in bfloat16 under jax.checkpoint")


@case(
    "{what}, {rows:,} rows",
    settings=[{"what": what, "rows": rows} for rows in (100_000, 1_000_000) for what in WHAT],
    quick=[{"what": WHAT[2], "rows": 1000, "ids": 32}],
)
def gradient(what: str, rows: int, ids: int = 4096) -> Figures:
    """The gradient of a loss over 4,096 rows; MB is what is allocated beside the arguments."""
    fun = mixed_loss if "bfloat16" in what else loss
    batch = jax.random.randint(jax.random.key(1), (ids,), 0, rows)
    is_donated = what != "gradient"
    steps, new_mb = {}, {}
    for line, grad_fn in {"jaxaccum": as_rows(fun), "jax.grad": jax.value_and_grad(fun)}.items():
        params = init(rows)
        step = sgd(grad_fn) if is_donated else grad_fn
        lowered = jax.jit(step, donate_argnums=0 if is_donated else ()).lower(params, batch)
        steps[line], memory = stepper(lowered.compile(), params, batch, is_donated)
        new = memory.temp_size_in_bytes + memory.output_size_in_bytes
        new_mb[line] = (new - memory.alias_size_in_bytes) / 1e6
    return with_metric(measure(steps, seconds=3.0), "MB", new_mb)


def stepper(compiled: Any, params: Any, ids: jax.Array, is_donated: bool) -> tuple[Step, Any]:
    box = [params]

    def call() -> Any:
        result = compiled(box[0], ids)
        if is_donated:
            box[0] = result[0]
        return result

    return jax_step(call), compiled.memory_analysis()


@case(
    "{what}",
    settings=[{"what": "two layers", "rows": 1_000_000}],
    quick=[{"what": "two layers", "rows": 1000}],
)
def tracing(what: str, rows: int) -> Figures:
    """The time to trace and lower, which is what the method costs, once."""
    del what
    params = jax.eval_shape(lambda: init(rows))
    ids = jax.ShapeDtypeStruct((4096,), jnp.int32)
    lines = {"jaxaccum": as_rows(mixed_loss), "jax.grad": jax.value_and_grad(mixed_loss)}
    steps = {line: traced(grad_fn, params, ids) for line, grad_fn in lines.items()}
    return measure(steps, turns=(5, 5), in_a_row=1)


def traced(grad_fn: Callable[..., Any], *shapes: Any) -> Step:
    def trace() -> None:
        # A function that JAX has not met, else it would remember the trace.
        jax.jit(lambda *args: grad_fn(*args)).lower(*shapes)

    return Step(trace, prepare=jax.clear_caches)


def init(rows: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "table": jax.random.normal(keys[0], (rows, WIDTH)),
        "hidden": jax.random.normal(keys[1], (WIDTH, WIDTH)) / 8,
        "out": jax.random.normal(keys[2], (WIDTH,)) / 8,
    }


def loss(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
    hidden = jnp.tanh(params["table"][ids] @ params["hidden"])
    return jnp.mean((hidden @ params["out"] - 1.0) ** 2)


def mixed_loss(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    return jax.checkpoint(loss)(half, ids).astype(jnp.float32)


def as_rows(fun: Callable[..., Any]) -> Callable[..., Any]:
    return jaxaccum.value_and_sparse_grad(fun, tables=lambda path, _: path[0].key == "table")


def sgd(grad_fn: Callable[..., Any]) -> Callable[..., Any]:
    def update(leaf: jax.Array, grad: Any) -> jax.Array:
        if isinstance(grad, jaxaccum.IndexedSlices):
            return leaf.at[grad.indices].add(-0.01 * grad.values, mode="drop")
        return leaf - 0.01 * grad

    def step(params: Any, ids: jax.Array) -> Any:
        value, grads = grad_fn(params, ids)
        return jax.tree.map(update, params, grads), value

    return step
