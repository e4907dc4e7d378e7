"""One step of Adam on a mesh, by each road that `docs/distributed.md` tells, beside a dense one.

Four devices share 4,096 ids of a million rows of 64 floats. On a CPU devices are threads of the
same cores. MB is what each device holds at its peak, tables and moments included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from benchmarks.harness import (
    Figures,
    LeftOutError,
    Step,
    case,
    held_mb,
    jax_step,
    measure,
    with_metric,
)
from benchmarks.workloads import WIDTH

NUM_DEVICES = 4
FOUR = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={NUM_DEVICES}"}
# A road gives its step, what it first takes and gives back, and where ids lie.
Road = tuple[Any, list[Any]]


@case(
    "{road}",
    settings=[{"road": road} for road in ("copies", "in shards", "axis_name", "all_lookup")]
    + [{"road": "plain jit"}],
    quick=[{"road": road, "rows": 64, "ids": 16} for road in ("axis_name", "all_lookup")],
    environ=FOUR,
)
def mesh_roads(road: str, rows: int = 1_000_000, ids: int = 4096) -> Figures:
    """One step of Adam on a mesh of four devices, by road, beside a dense one; MB by device."""
    if jax.device_count() < NUM_DEVICES:
        raise LeftOutError(f"{jax.device_count()} device here")
    mesh = jax.make_mesh(
        (NUM_DEVICES,), ("data",), devices=jax.devices()[:NUM_DEVICES], axis_types=(AxisType.Auto,)
    )
    rng = np.random.default_rng(0)
    batches = [
        jax.device_put(rng.integers(0, rows, ids).astype(np.int32), NamedSharding(mesh, P("data")))
        for _ in range(16)
    ]
    lines = ROADS[road](mesh, rows, ids)
    steps, held = {}, {}
    for line, (function, carry) in lines.items():
        steps[line], held[line] = stepper(function, carry, batches)
    return with_metric(measure(steps), "MB", held)


def stepper(function: Any, carry: list[Any], batches: list[jax.Array]) -> tuple[Step, float]:
    compiled = function.lower(*carry, batches[0]).compile()
    turn = itertools.cycle(batches)

    def run() -> Any:
        *carry[:], value = compiled(*carry, next(turn))
        return value, carry

    return jax_step(run), held_mb(compiled)


def loss(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(jnp.sum(table[ids], axis=1) - 1.0))


def mean_loss(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.lax.pmean(loss(table, ids), "data")


ADAM = optax.adam(1e-3)


def make_step(value_and_grad: Callable[..., Any], tx: Any, loss: Any) -> Callable[..., Any]:
    def step(table: jax.Array, state: Any, ids: jax.Array) -> Any:
        value, grads = value_and_grad(loss)(table, ids)
        updates, state = tx.update(grads, state, table)
        return jaxaccum.apply_updates(table, updates), state, value

    return step


def sparse(loss: Any) -> Any:
    return jaxaccum.value_and_sparse_grad(loss, tables=True)


def placed(tree: Any, mesh: Mesh, specs: Any) -> Any:
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def mapped(mesh: Mesh, step: Any, tx: Any, rows: int) -> Road:
    """Inside shard_map, everything alike on all devices but the ids."""
    function = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    table = jnp.ones((rows, WIDTH))
    carry = [
        placed(tree, mesh, jax.tree.map(lambda _: P(), tree)) for tree in (table, tx.init(table))
    ]
    return jax.jit(function, donate_argnums=(0, 1)), carry


def by_jit(mesh: Mesh, step: Any, tx: Any, rows: int, tables: bool) -> Road:
    """Plain jit: the table in shards, or copies of it."""
    table = jnp.ones((rows, WIDTH))
    train = (table, tx.init(table))
    train = jaxaccum.shard_rows(train, mesh, "data", tables=tables, params=table)
    kept = jax.tree.map(lambda leaf: leaf.sharding, train)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*kept, None)), list(train)


def copies(mesh: Mesh, rows: int, ids: int) -> dict[str, Road]:
    lazy = jaxaccum.lazy_rows(ADAM)
    return {
        "jaxaccum": mapped(mesh, make_step(sparse, lazy, mean_loss), lazy, rows),
        "dense": mapped(mesh, make_step(jax.value_and_grad, ADAM, mean_loss), ADAM, rows),
    }


def plain_jit(mesh: Mesh, rows: int, ids: int, tables: bool = False) -> dict[str, Road]:
    lazy = jaxaccum.lazy_rows(ADAM)
    return {
        "jaxaccum": by_jit(mesh, make_step(sparse, lazy, loss), lazy, rows, tables),
        "dense": by_jit(mesh, make_step(jax.value_and_grad, ADAM, loss), ADAM, rows, tables),
    }


def in_shards(mesh: Mesh, rows: int, ids: int) -> dict[str, Road]:
    return plain_jit(mesh, rows, ids, tables=True)


def exchanged(mesh: Mesh, rows: int, ids: int) -> dict[str, Road]:
    """Each device accumulates its own gradient; a step exchanges the rows."""
    tx = jaxaccum.accumulate(
        jaxaccum.lazy_rows(ADAM), NUM_DEVICES, tables=True,
        capacity=ids // NUM_DEVICES, axis_name="data",
    )  # fmt: skip
    table = jnp.ones((rows, WIDTH))
    state = tx.init(table).map_own(lambda leaf: jnp.stack([leaf] * NUM_DEVICES))
    specs = jax.tree.map(lambda _: P(), state).map_own(lambda _: P("data"))

    def step(table: jax.Array, state: Any, ids: jax.Array) -> Any:
        state = state.map_own(lambda leaf: leaf[0])
        own = jax.lax.pcast(table, "data", to="varying")
        value, grads = sparse(loss)(own, ids)
        updates, state = tx.update(grads, state, table)
        table = jaxaccum.apply_updates(table, updates)
        return table, state.map_own(lambda leaf: leaf[None]), jax.lax.pmean(value, "data")

    function = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs, P())
    )
    carry = [placed(table, mesh, P()), placed(state, mesh, specs)]
    ours = jax.jit(function, donate_argnums=(0, 1)), carry
    return {"jaxaccum": ours, "dense": copies(mesh, rows, ids)["dense"]}


def looked_up(mesh: Mesh, rows: int, ids: int) -> dict[str, Road]:
    """A table in shards, whose owners are asked for rows."""
    lazy = jaxaccum.lazy_rows(ADAM)

    def found_loss(table: jax.Array, ids: jax.Array) -> jax.Array:
        found, _ = jaxaccum.all_lookup(table, ids, "data")
        return jax.lax.pmean(jnp.mean(jnp.square(jnp.sum(found, axis=1) - 1.0)), "data")

    table = jnp.ones((rows, WIDTH))
    train = (table, lazy.init(table))
    selection: dict[str, Any] = {"tables": True, "params": table}
    specs = jaxaccum.shard_specs(train, "data", **selection)
    train = jaxaccum.shard_rows(train, mesh, "data", **selection)
    function = jax.shard_map(
        make_step(sparse, lazy, found_loss),
        mesh=mesh,
        in_specs=(*specs, P("data")),
        out_specs=(*specs, P()),
    )
    ours = jax.jit(function, donate_argnums=(0, 1)), list(train)
    return {"jaxaccum": ours, "dense": in_shards(mesh, rows, ids)["dense"]}


ROADS: dict[str, Callable[[Mesh, int, int], dict[str, Road]]] = {
    "copies": copies,
    "plain jit": plain_jit,
    "in shards": in_shards,
    "axis_name": exchanged,
    "all_lookup": looked_up,
}
