"""A whole training step, from losses to updated rows: four micro-batches, one step of Adam.

A small model looks 4,096 ids up in a table of 64 floats a row, four times, and takes one step. Each
is one jitted function of donated parameters and state, in one process and in turns of five steps,
each on ids that none of the fifteen steps before has seen:

* ``lazy``: ``value_and_sparse_grad``, ``accumulate(optax.adam)``, ``apply_updates``
* ``catch_up``: the same with ``lazy_rows(optax.adam, catch_up=True)``
* ``multi_steps``: ``jax.value_and_grad`` and ``optax.MultiSteps(optax.adam)``
* ``dense``: ``jax.value_and_grad`` summed over the micro-batches by hand, then ``optax.adam``
* ``torch``: ``nn.Embedding(sparse=True)`` and ``SparseAdam``, where PyTorch is installed
* ``bare``: no model at all: the rows of the table and of both moments, each read and added to once

``held_mb`` is what the compiled step holds at its peak, inputs and outputs included.

    python benchmarks/train_step.py [--rows 100000 1000000] [--peers lazy multi_steps torch]
    python benchmarks/train_step.py --crossing
    python benchmarks/train_step.py --tables 26   # seconds to compile, and a step, of so many
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum

WIDTH, BATCH, MICRO_BATCHES = 64, harness.scaled(4096), 4
TABLES = {"hidden": False, "table": True}


def loss(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
    return jnp.mean((params["table"][ids] @ params["hidden"] - 1.0) ** 2)


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


def lazy(catch_up: bool = False) -> Any:
    tx = jaxaccum.accumulate(
        jaxaccum.lazy_rows(optax.adam(1e-3), catch_up=catch_up),
        MICRO_BATCHES,
        tables=TABLES,
        capacity=MICRO_BATCHES * BATCH,
    )
    grad_fn = jaxaccum.value_and_sparse_grad(loss, tables=TABLES)
    return scanned(tx, grad_fn, jaxaccum.apply_updates)


def multi_steps() -> Any:
    tx = optax.MultiSteps(optax.adam(1e-3), MICRO_BATCHES)
    return scanned(tx, jax.value_and_grad(loss), optax.apply_updates)


def dense() -> Any:
    tx = optax.adam(1e-3)

    def step(params: Any, state: Any, ids: jax.Array) -> Any:
        def add(total: Any, ids: jax.Array) -> Any:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, ids)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), ids)
        mean = jax.tree.map(lambda g: g / MICRO_BATCHES, total)
        updates, state = tx.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def bare() -> Any:
    def init(params: dict[str, jax.Array]) -> Any:
        return [jnp.zeros_like(params["table"]) for _ in range(2)]

    def step(params: dict[str, jax.Array], moments: Any, ids: jax.Array) -> Any:
        add = lambda table: table.at[ids.reshape(-1)].add(1.0)  # noqa: E731
        return params | {"table": add(params["table"])}, [add(m) for m in moments]

    return init, step


JAX_PEERS: dict[str, Callable[[], Any]] = {
    "lazy": lazy,
    "catch_up": functools.partial(lazy, catch_up=True),
    "multi_steps": multi_steps,
    "dense": dense,
    "bare": bare,
}


def jax_stepper(peer: str, rows: int, batches: list[np.ndarray]) -> tuple[Callable[[], Any], float]:
    """The compiled step, run on one batch after the other, and what it holds in MB."""
    tx_init, step = JAX_PEERS[peer]()
    params = init(rows)
    carry = [params, jax.jit(tx_init)(params)]
    ids = [jnp.asarray(batch) for batch in batches]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, ids[0]).compile()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    turn = iter(range(1 << 30))

    def run() -> Any:
        carry[:] = compiled(*carry, ids[next(turn) % len(ids)])
        return carry

    return run, held / 1e6


def torch_stepper(rows: int, batches: list[np.ndarray]) -> Callable[[], Any]:
    import torch

    device = harness.torch_device()
    table = torch.nn.Embedding(rows, WIDTH, sparse=True, device=device)
    hidden = torch.nn.Parameter(torch.randn(WIDTH, device=device) / 8)
    optimizers = [
        torch.optim.SparseAdam(list(table.parameters()), lr=1e-3),
        torch.optim.Adam([hidden], lr=1e-3),
    ]
    ids = [torch.from_numpy(batch.astype(np.int64)).to(device) for batch in batches]
    turn = iter(range(1 << 30))

    def run() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro_batch in ids[next(turn) % len(ids)]:
            value = ((table(micro_batch) @ hidden - 1.0) ** 2).mean() / MICRO_BATCHES
            value.backward()
        for optimizer in optimizers:
            optimizer.step()
        harness.torch_wait()

    return run


def compare(rows: int, peers: list[str], repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, rows, (MICRO_BATCHES, BATCH)).astype(np.int32) for _ in range(16)]
    steps, held = {}, {}
    for peer in peers:
        if peer == "torch":
            steps[peer] = torch_stepper(rows, batches)
        else:
            steps[peer], held[peer] = jax_stepper(peer, rows, batches)
    times = harness.interleaved_ms(steps, repeats=repeats, warmup=1, in_a_row=5)
    row: dict[str, Any] = {"rows": rows}
    row.update({f"{peer}_ms": round(value, 3) for peer, value in times.items()})
    row.update({f"{peer}_held_mb": round(value, 1) for peer, value in held.items()})
    for peer in peers:
        if peer != "lazy":
            row[f"{peer}_over_lazy"] = round(times[peer] / times["lazy"], 2)
    return row


def many_loss(params: Any, ids: Any) -> jax.Array:
    rows = jnp.concatenate([params[name][ids[name]] for name in params], axis=1)
    return jnp.mean((rows @ jnp.full(rows.shape[1], 0.1) - 1.0) ** 2)


def many(peer: str) -> Any:
    """Peers on a dict of tables; ``alone`` is `lazy_rows` on all micro-batches' ids at once."""
    if peer == "multi_steps":
        tx = optax.MultiSteps(optax.adam(1e-3), MICRO_BATCHES)
        return scanned(tx, jax.value_and_grad(many_loss), optax.apply_updates)
    lazy_adam = jaxaccum.lazy_rows(optax.adam(1e-3))
    grad_fn = jaxaccum.value_and_sparse_grad(many_loss, tables=True)
    if peer == "lazy":
        capacity = MICRO_BATCHES * BATCH
        tx = jaxaccum.accumulate(lazy_adam, MICRO_BATCHES, tables=True, capacity=capacity)
        return scanned(tx, grad_fn, jaxaccum.apply_updates)

    def step(params: Any, state: Any, ids: Any) -> Any:
        _, grads = grad_fn(params, {name: i.reshape(-1) for name, i in ids.items()})
        updates, state = lazy_adam.update(grads, state, params)
        return jaxaccum.apply_updates(params, updates), state

    return lazy_adam.init, step


def compare_many(tables: int, rows: int, repeats: int) -> dict[str, Any]:
    """Compiling in turns, from the traced function to the program; then steps, in turns too."""
    rng = np.random.default_rng(0)
    names = [f"table{k:02d}" for k in range(tables)]
    params = dict.fromkeys(names, jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32))
    ids = dict.fromkeys(names, jax.ShapeDtypeStruct((MICRO_BATCHES, BATCH), jnp.int32))
    row: dict[str, Any] = {"tables": tables, "rows": rows}
    programs, seconds = {}, dict[str, list[float]]()
    for peer in ("multi_steps", "lazy", "alone") * 3:
        tx_init, step = many(peer)
        state = jax.eval_shape(tx_init, params)
        start = time.perf_counter()
        step = jax.jit(step, donate_argnums=(0, 1))
        programs[peer] = tx_init, step.lower(params, state, ids).compile()
        seconds.setdefault(peer, []).append(time.perf_counter() - start)
    row |= {f"{peer}_compile_s": round(min(times), 2) for peer, times in seconds.items()}
    row["lazy_over_multi_steps"] = round(min(seconds["lazy"]) / min(seconds["multi_steps"]), 2)
    batches = [
        {
            name: jnp.asarray(rng.integers(0, rows, (MICRO_BATCHES, BATCH)), jnp.int32)
            for name in ids
        }
        for _ in range(4)
    ]

    def stepper(peer: str) -> Callable[[], Any]:
        tx_init, compiled = programs[peer]
        full = {name: jnp.ones((rows, WIDTH)) for name in names}
        carry, turn = [full, jax.jit(tx_init)(full)], iter(range(1 << 30))

        def run() -> Any:
            carry[:] = compiled(*carry, batches[next(turn) % len(batches)])
            return carry

        return run

    steps = {peer: stepper(peer) for peer in ("lazy", "alone")}
    times = harness.interleaved_ms(steps, repeats=repeats, warmup=1, in_a_row=2)
    row |= {f"{peer}_ms": round(value, 1) for peer, value in times.items()}
    return row | {"lazy_over_alone": round(times["lazy"] / times["alone"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows = [harness.scaled(100_000), harness.scaled(1_000_000)]
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    peers = [*JAX_PEERS, *(["torch"] if harness.is_installed("torch") else [])]
    parser.add_argument("--peers", nargs="+", default=peers)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", default="train_step")
    parser.add_argument("--crossing", action="store_true", help="where the dense step wins")
    parser.add_argument("--tables", type=int, help="compile and step so many tables")
    args = parser.parse_args()
    note = f"{MICRO_BATCHES} micro-batches of {BATCH} uniform ids, rows of {WIDTH} float32, Adam"
    if args.tables:
        jax.config.update("jax_enable_compilation_cache", False)
        row = compare_many(args.tables, harness.scaled(100_000), args.repeats)
        harness.report("train_step_tables", [row], note=note)
        return
    if args.crossing:
        args.rows, args.peers = [2**k for k in range(11, 19)], ["lazy", "multi_steps", "dense"]
        args.name, args.repeats = "train_step_crossing", 21
    rows = [compare(rows, args.peers, args.repeats) for rows in args.rows]
    harness.report(args.name, rows, note=note)


if __name__ == "__main__":
    main()
