"""Eight devices, and one program on all of them: under `jax.pmap` or `jax.shard_map`."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

NUM_DEVICES = 8
MESHES = {
    "data": jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
    ("host", "core"): jax.make_mesh((2, 4), ("host", "core"), axis_types=(AxisType.Auto,) * 2),
}
EXPLICIT = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
# How the same program is run: by which means, over which axis or axes.
WAYS = {
    "pmap": ("pmap", "data"),
    "shard_map": ("shard_map", "data"),
    "two_axes": ("shard_map", ("host", "core")),
}


def on_devices(program, way, donate=()):
    """Runs ``program(axis_name, *args)`` on eight devices, all args with a leading axis of them."""
    means, axis_name = WAYS[way]

    def bound(*args):
        return program(axis_name, *args)

    if means == "pmap":
        return jax.pmap(bound, axis_name=axis_name, donate_argnums=donate)

    def one_device(*args):
        results = bound(*jax.tree.map(lambda leaf: leaf[0], args))
        return jax.tree.map(lambda leaf: leaf[None], results)

    spec = PartitionSpec(axis_name)
    mesh = MESHES[axis_name]
    mapped = jax.shard_map(one_device, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped, donate_argnums=donate)


def spread(tree, way):
    """Puts arrays of a leading axis of eight where ``way`` wants them."""
    _, axis_name = WAYS[way]
    mesh = MESHES[axis_name]
    sharding = NamedSharding(mesh, PartitionSpec(axis_name))
    return jax.device_put(jax.tree.map(np.asarray, tree), sharding)


def copies(tree):
    """Eight copies of each leaf, stacked, on the host."""
    return jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * NUM_DEVICES), tree)


def device(tree, index):
    """What one device holds of stacked leaves."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def bits(tree):
    """Names, dtypes and bytes of all leaves, to be compared exactly."""
    return {
        jax.tree_util.keystr(path): (np.asarray(leaf).dtype, np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
