"""all_merge of 8 devices x 4,096 rows x 64 columns of a million against psum of dense gradients.

Also: the ways of merging against each other, bytes moved as the compiled programs say, sharded
tables with and without buckets, and weak scaling. All devices here are threads of one machine's
cores, and what they move is copied in memory: so times are those of the work, not of a network.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import functools
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxaccum

ROWS, WIDTH, TOUCHED, NUM_DEVICES = 1_000_000, 64, 4096, 8
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


def on_mesh(mesh: Mesh, function: Callable[..., Any], donate: Any = ()) -> Callable[..., Any]:
    """Runs ``function`` on each device, on arguments and results with a leading axis of devices."""

    def one_device(*args: Any) -> Any:
        results = function(*jax.tree.map(lambda leaf: leaf[0], args))
        return jax.tree.map(lambda leaf: leaf[None], results)

    spec = PartitionSpec("data")
    mapped = jax.shard_map(one_device, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped, donate_argnums=donate)


def bytes_received(compiled: Any, num_devices: int) -> int:
    """What each device gets from the others, summed over the collectives of a compiled program."""
    total = 0
    pattern = r"= \(?(\w+)\[([\d,]*)\].* (all-gather|all-to-all|all-reduce|reduce-scatter)\("
    for line in compiled.as_text().splitlines():
        if match := re.search(pattern, line):
            dtype, shape, kind = match.groups()
            size = ITEM_BYTES[dtype] * math.prod(int(d) for d in shape.split(",") if d)
            if kind == "all-to-all" and "= (" in line:
                size *= line.split(" all-to-all")[0].count(f"{dtype}[")
            # An all-reduce is a reduce-scatter and an all-gather.
            share = {"all-reduce": 2 / num_devices, "reduce-scatter": 1}.get(kind, 1 / num_devices)
            total += round(size * share * (num_devices - 1))
    return total


def gradients(num_devices: int, mesh: Mesh, seed: int = 0, rows: int = ROWS) -> Any:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rows, (num_devices, TOUCHED)).astype(np.int32)
    values = rng.standard_normal((num_devices, TOUCHED, WIDTH)).astype(np.float32)
    return jax.device_put((ids, values), NamedSharding(mesh, PartitionSpec("data")))


def time_on_fresh_states(
    peers: dict[str, Callable[[Any], Any]], fresh: Callable[[], Any], repeats: int
) -> dict[str, float]:
    """Medians in milliseconds, in turns; making the donated argument is not timed."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for repeat in range(repeats + 2):
        for name, peer in peers.items():
            argument = jax.block_until_ready(fresh() if "psum" not in name else None)
            start = time.perf_counter()
            result = jax.block_until_ready(peer(argument))
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
            del result, argument
    return {name: statistics.median(ts) * 1e3 for name, ts in times.items()}


def accumulate(capacity: int, rows: int, ids: jax.Array, values: jax.Array) -> Any:
    state = jaxaccum.init((rows, WIDTH), capacity=capacity)
    grad = jaxaccum.IndexedSlices(ids, values, (rows, WIDTH))
    return jaxaccum.apply(state, grad)[0]


def merge_and_take(state: Any, **options: Any) -> Any:
    state, _ = jaxaccum.all_merge(state, "data", **options)
    return jaxaccum.take(state)[:2]


def merge_by_owner(state: Any, num_devices: int) -> Any:
    """Reduce-scatter of rows to owners by range, then all-gather: what all_merge does not do.

    Buckets of twice the even share, and no verdict: the best case for this way.
    """
    share, bucket = ROWS // num_devices, 2 * TOUCHED // num_devices
    shard = jaxaccum.init((share, WIDTH), capacity=TOUCHED * 2, reduction="sum")
    grad = jaxaccum.IndexedSlices(state.indices[:TOUCHED], state.values[:TOUCHED], (ROWS, WIDTH))
    shard, _ = jaxaccum.all_apply(shard, grad, "data", bucket=bucket)
    _, part, _ = jaxaccum.take(shard)
    first = jax.lax.axis_index("data").astype(jnp.int32) * share
    ids = jnp.where(part.row_mask, part.indices + first, ROWS)
    # Even with ids spread evenly, an owner may hold more rows than each device brought.
    gather = functools.partial(jax.lax.all_gather, axis_name="data", tiled=True)
    return gather(ids[: TOUCHED + 512]), gather(part.values[: TOUCHED + 512])


def dense_psum(grads: Any, _: Any) -> Any:
    """What data-parallel training does without jaxaccum: the sum of whole tables."""
    return grads[0](*grads[1])


def against_psum() -> tuple[list[dict[str, Any]], str]:
    mesh = jax.make_mesh((NUM_DEVICES,), ("data",))
    ids, values = gradients(NUM_DEVICES, mesh)
    capacity = NUM_DEVICES * TOUCHED
    fresh_state = on_mesh(mesh, functools.partial(accumulate, capacity, ROWS))
    options = {"max_rows": TOUCHED}
    sum_dense = on_mesh(mesh, lambda grad: jax.lax.psum(grad, "data"), donate=0)
    scatter = on_mesh(mesh, lambda i, v: jnp.zeros((ROWS, WIDTH)).at[i].add(v))
    functions = {
        "all_merge": lambda s: jaxaccum.all_merge(s, "data", **options),
        "all_merge and take": lambda s: merge_and_take(s, **options),
        "all_take": lambda s: jaxaccum.all_take(s, "data", **options)[:2],
        "by owner: reduce-scatter, all-gather": lambda s: merge_by_owner(s, NUM_DEVICES),
    }
    state = fresh_state(ids, values)
    compiled = {n: on_mesh(mesh, f, donate=0).lower(state).compile() for n, f in functions.items()}
    received = {name: bytes_received(c, NUM_DEVICES) for name, c in compiled.items()}
    ms = time_on_fresh_states(compiled, lambda: fresh_state(ids, values), repeats=11)
    dense = scatter(ids, values)
    sum_dense = sum_dense.lower(dense).compile()
    received["psum of dense gradients"] = bytes_received(sum_dense, NUM_DEVICES)
    # In turns with all_merge again, each psum on a table of its own making.
    merge, sums, merges = compiled["all_merge"], [], []
    for _ in range(5):
        state = jax.block_until_ready(fresh_state(ids, values))
        start = time.perf_counter()
        jax.block_until_ready(merge(state))
        merges.append(time.perf_counter() - start)
        start = time.perf_counter()
        dense = jax.block_until_ready(sum_dense(dense))
        sums.append(time.perf_counter() - start)
    ms["psum of dense gradients"] = statistics.median(sums) * 1e3
    ratio = statistics.median(sums) / statistics.median(merges)
    rows = [
        {"8 devices": name, "ms": ms[name], "MB received by each": received[name] / 1e6}
        for name in ms
    ]
    return rows, f"all_merge is {ratio:.0f} times as fast as psum of the dense gradient, in turns."


def sharded() -> list[dict[str, Any]]:
    """One gradient from each device to the owners of its rows, and rows looked up, two ways."""
    mesh = jax.make_mesh((NUM_DEVICES,), ("data",))
    ids, values = gradients(NUM_DEVICES, mesh)
    share = ROWS // NUM_DEVICES

    def fresh() -> Any:
        return jaxaccum.shard_init((ROWS, WIDTH), mesh, "data", capacity=2 * TOUCHED)

    def apply(bucket: int | None, state: Any, ids: jax.Array, values: jax.Array) -> Any:
        grad = jaxaccum.IndexedSlices(ids, values, (ROWS, WIDTH))
        return jaxaccum.all_apply(state, grad, "data", bucket=bucket)

    def gather_and_filter(state: Any, ids: jax.Array, values: jax.Array) -> Any:
        first = jax.lax.axis_index("data").astype(jnp.int32) * share
        local = jax.lax.all_gather(ids, "data") - first
        local = jnp.where((local >= 0) & (local < share), local, share)
        values = jax.lax.all_gather(values, "data")
        for device in range(NUM_DEVICES):
            grad = jaxaccum.IndexedSlices(local[device], values[device], (share, WIDTH))
            state, _ = jaxaccum.apply(state, grad)
        return state

    even = 2 * TOUCHED // NUM_DEVICES
    functions = {
        "all_apply": functools.partial(apply, None),
        f"all_apply, bucket={even}": functools.partial(apply, even),
        "gather all, filter own": gather_and_filter,
    }
    rows = measured_sharded(mesh, functions, fresh, (ids, values))
    table = jax.device_put(
        np.zeros((NUM_DEVICES, share, WIDTH), np.float32),
        NamedSharding(mesh, PartitionSpec("data")),
    )
    lookups = {
        "all_lookup": lambda t, i: jaxaccum.all_lookup(t, i, "data"),
        f"all_lookup, bucket={even}": lambda t, i: jaxaccum.all_lookup(t, i, "data", bucket=even),
    }
    compiled = {n: on_mesh(mesh, f).lower(table, ids).compile() for n, f in lookups.items()}
    steps = {n: functools.partial(c, table, ids) for n, c in compiled.items()}
    ms = harness.interleaved_ms(steps, repeats=9)
    return rows + [
        {
            "8 devices": name,
            "ms": ms[name],
            "MB received by each": bytes_received(compiled[name], NUM_DEVICES) / 1e6,
        }
        for name in lookups
    ]


def measured_sharded(
    mesh: Mesh, functions: dict[str, Any], fresh: Callable[[], Any], grads: Any
) -> list[dict[str, Any]]:
    compiled = {
        name: on_mesh(mesh, f, donate=0).lower(fresh(), *grads).compile()
        for name, f in functions.items()
    }
    peers = {name: (lambda state, c=c: c(state, *grads)) for name, c in compiled.items()}
    ms = time_on_fresh_states(peers, fresh, repeats=9)
    return [
        {
            "8 devices": name,
            "ms": ms[name],
            "MB received by each": bytes_received(compiled[name], NUM_DEVICES) / 1e6,
        }
        for name in functions
    ]


def weak_scaling() -> list[dict[str, Any]]:
    """Each device brings as many rows, however many devices there are."""
    rows = []
    for number in (1, 2, 4, 8):
        mesh = jax.make_mesh((number,), ("data",), devices=jax.devices()[:number])
        grads = gradients(number, mesh)
        fresh_state = on_mesh(mesh, functools.partial(accumulate, number * TOUCHED, ROWS))
        merge = on_mesh(
            mesh, lambda s: jaxaccum.all_take(s, "data", max_rows=TOUCHED)[:2], donate=0
        )
        peers = {"merge": merge}
        ms = time_on_fresh_states(peers, functools.partial(fresh_state, *grads), repeats=9)
        compiled = merge.lower(fresh_state(*grads)).compile()
        rows.append(
            {
                "weak scaling": f"all_take on {number} devices",
                "ms": ms["merge"],
                "ms a device": ms["merge"] / number,
                "MB received by each": bytes_received(compiled, number) / 1e6,
            }
        )
    return rows


def main() -> None:
    rows, ratio = against_psum()
    harness.report("all_merge", rows, note=ratio + f" {TOUCHED:,} rows x {WIDTH} of {ROWS:,}.")
    harness.report("sharded", sharded(), note="One gradient of 4,096 rows from each device.")
    cores = len(os.sched_getaffinity(0))
    note = f"Devices share {cores} cores, and each merges what all bring: n devices do n x n work."
    harness.report("all_merge-scaling", weak_scaling(), note=note)


if __name__ == "__main__":
    main()
