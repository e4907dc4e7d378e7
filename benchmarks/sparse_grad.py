"""A gradient as rows against a dense one: time, memory, what is left of it in tracing.

A two-layer model looks 4,096 ids up in a table of 64 floats a row. Three functions, each compiled
alone: the gradient; the gradient and plain SGD on donated parameters; the same with the table cast
to bfloat16 and the lookup rematerialised.

    python benchmarks/sparse_grad.py [--rows 100000 1000000] [--batch 4096]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp

import jaxaccum

WIDTH = 64


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


def compare(name: str, rows: int, ids: jax.Array, make: Callable[..., Any], fun: Any) -> dict:
    donate = make is sgd
    row: dict[str, Any] = {"what": name, "rows": rows}
    steps = {}
    for label, grad_fn in (("rows", as_rows(fun)), ("dense", jax.value_and_grad(fun))):
        jitted = jax.jit(make(grad_fn), donate_argnums=0 if donate else ())
        params = init(rows)
        compiled = jitted.lower(params, ids).compile()
        memory = compiled.memory_analysis()
        held = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        row[f"{label}_new_mb"] = round(held / 1e6, 1)
        steps[label] = stepper(compiled, params, ids, donate)
    times = harness.interleaved_ms(steps)
    row.update({f"{label}_ms": round(value, 3) for label, value in times.items()})
    return {**row, "times_faster": round(times["dense"] / times["rows"], 1)}


def stepper(compiled: Any, params: Any, ids: jax.Array, donate: bool) -> Callable[[], Any]:
    state = [params]

    def step() -> Any:
        result = compiled(state[0], ids)
        if donate:
            state[0] = result[0]
        return result

    return step


def tracing(rows: int, ids: jax.Array) -> dict:
    """Seconds to trace and lower, which is what the method costs, once."""
    params = jax.eval_shape(lambda: init(rows))
    row: dict[str, Any] = {"what": "trace and lower", "rows": rows}
    for label, grad_fn in (
        ("rows", as_rows(mixed_loss)),
        ("dense", jax.value_and_grad(mixed_loss)),
    ):
        times = []
        for _ in range(5):
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(lambda *args, f=grad_fn: f(*args)).lower(params, ids)
            times.append(time.perf_counter() - start)
        row[f"{label}_ms"] = round(sorted(times)[2] * 1e3, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows = [harness.scaled(100_000), harness.scaled(1_000_000)]
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument("--batch", type=int, default=harness.scaled(4096))
    options = parser.parse_args()
    table = []
    for rows in options.rows:
        ids = jax.random.randint(jax.random.key(1), (options.batch,), 0, rows)
        table.append(compare("gradient", rows, ids, lambda f: f, loss))
        table.append(compare("gradient and SGD, donated", rows, ids, sgd, loss))
        table.append(compare("bf16, checkpoint, SGD", rows, ids, sgd, mixed_loss))
    table.append(tracing(options.rows[-1], ids))
    harness.report(
        "sparse_grad",
        table,
        note=f"{options.batch} ids a step, rows of {WIDTH} float32; new_mb is what a step holds "
        "beside its arguments",
    )


if __name__ == "__main__":
    main()
