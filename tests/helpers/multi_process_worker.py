"""One process of several: trains a replicated and a sharded table, saves after each step, resumes.

Run by `test_multi_process`: the one argument is JSON, with the address and the number of processes,
the rank, a folder, the steps, and at which step this process is to die.
"""

import json
import os
import pathlib
import signal
import sys

import numpy as np

ROWS, WIDTH, SIZE, MICRO_BATCHES, REQUIRED = 48, 2, 4, 8, 16


def micro_batch(step, index):
    """Ids and integer values of one gradient: sums of them are exact in any order."""
    rng = np.random.default_rng((step, index))
    ids = rng.integers(0, ROWS, SIZE).astype(np.int32)
    return ids, rng.integers(-9, 10, (SIZE, WIDTH)).astype(np.float32)


def main(task):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    import jaxaccum

    jax.distributed.initialize(
        task["address"],
        task["num_processes"],
        task["rank"],
        # How soon the others learn of a death, and how long any of them may wait.
        heartbeat_timeout_seconds=10,
        initialization_timeout=60,
        shutdown_timeout_seconds=20,
    )
    num_devices = jax.device_count()
    mesh = jax.make_mesh((num_devices,), ("data",))
    data, folder = PartitionSpec("data"), pathlib.Path(task["folder"])

    if task.get("capacity_by_rank"):
        state = jaxaccum.init((ROWS, WIDTH), capacity=ROWS + task["rank"])
        try:
            jaxaccum.replicate(state, mesh, "data")
        except ValueError as error:
            print(error)
            return 3

    def start():
        zeros = np.zeros((ROWS, WIDTH), np.float32)
        replicated = jaxaccum.shard_rows(zeros, mesh, "data", tables=False)
        options = {"capacity": ROWS, "reduction": "sum"}
        state = jaxaccum.init((ROWS, WIDTH), **options)
        return {
            "table": replicated,
            "shards": jaxaccum.shard_rows(zeros, mesh, "data", tables=True),
            "state": jaxaccum.replicate(state, mesh, "data"),
            "sharded": jaxaccum.shard_init((ROWS, WIDTH), mesh, "data", **options),
        }

    def step(train, ids, values):
        def micro_step(states, batch):
            # The gradient depends on the rows: so an error in one step shows in all that follow.
            rows, _ = jaxaccum.all_lookup(train["shards"], batch[0], "data")
            grad = jaxaccum.IndexedSlices(batch[0], batch[1] - rows, (ROWS, WIDTH))
            state, _ = jaxaccum.apply(states[0], grad)
            return (state, jaxaccum.all_apply(states[1], grad, "data")[0]), None

        states = (train["state"], train["sharded"])
        (state, sharded), _ = jax.lax.scan(micro_step, states, (ids[0], values[0]))
        state, whole, _, _ = jaxaccum.all_take(state, "data", REQUIRED)
        sharded, part, _ = jaxaccum.take(sharded, REQUIRED)
        return {
            "table": train["table"].at[whole.indices].add(whole.values, mode="drop"),
            "shards": train["shards"].at[part.indices].add(part.values, mode="drop"),
            "state": state,
            "sharded": sharded,
        }

    specs = {"table": PartitionSpec(), "shards": data, "state": data, "sharded": data}
    step = jaxaccum.drop_device_axis(step)
    step = jax.shard_map(step, mesh=mesh, in_specs=(specs, data, data), out_specs=specs)
    step = jax.jit(step, donate_argnums=0)

    def batch(number, part):
        all_of_it = np.stack([micro_batch(number, i)[part] for i in range(MICRO_BATCHES)])
        of_device = all_of_it.reshape(num_devices, -1, *all_of_it.shape[1:])
        sharding = NamedSharding(mesh, data)
        return jax.make_array_from_callback(of_device.shape, sharding, lambda i: of_device[i])

    train, first = restored(start(), folder, task)
    for number in range(first, task["steps"]):
        if number == task["dies_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        train = step(train, batch(number, 0), batch(number, 1))
        save(train, folder, task["rank"], number + 1)
    return 0


def save(train, folder, rank, step):
    """Each process saves what its devices hold; the name comes last, so a file is always whole."""
    import jax

    parts = {}
    for i, leaf in enumerate(jax.tree.leaves(train)):
        for j, shard in enumerate(leaf.addressable_shards):
            parts[f"{i}_{j}"] = np.asarray(shard.data)
    partial = folder / f"partial-{rank}.npz"
    np.savez(partial, **parts)
    partial.replace(folder / f"step-{step}-of-{rank}.npz")


def restored(train, folder, task):
    """The last step that all processes have saved, or the start."""
    import jax

    def is_whole(step):
        ranks = range(task["num_processes"])
        return all((folder / f"step-{step}-of-{rank}.npz").exists() for rank in ranks)

    last = max((s for s in range(1, task["steps"] + 1) if is_whole(s)), default=0)
    if last == 0:
        return train, 0
    leaves, structure = jax.tree.flatten(train)
    with np.load(folder / f"step-{last}-of-{task['rank']}.npz") as file:
        for i, leaf in enumerate(leaves):
            shards = leaf.addressable_shards
            parts = [jax.device_put(file[f"{i}_{j}"], s.device) for j, s in enumerate(shards)]
            leaves[i] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
    return jax.tree.unflatten(structure, leaves), last


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main(json.loads(sys.argv[1])))
