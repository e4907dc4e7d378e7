"""Programs for GPUs and TPUs that are not there: in place, no copies, sorts or loops to spare.

``pytest -m aot`` with ``JAX_PLATFORMS=cpu``, in an environment of `.ci/run`'s that has libtpu or
the plugin for CUDA. A copy of any table, map or buffer of sums is several times the bounds.
"""

import dataclasses

import jax.numpy as jnp
import public_programs as programs
import pytest
import targets

import jaxaccum

HERE = targets.targets_here()
pytestmark = [
    pytest.mark.aot,
    pytest.mark.usefixtures("as_it_comes"),
    pytest.mark.skipif(not HERE, reason="left out: neither libtpu nor jax-cuda12-plugin is here"),
]

NARROW, MIDDLE, WIDE = 16, 64, 128
MB, SCALARS = 10**6, 100
TABLES = programs.Size(rows=1_000_000, ids=512, capacity=8192)  # 32 MB in bfloat16 of 16
STATES = dataclasses.replace(TABLES, rows=10_000_000)  # a map of 40 MB
SMALL = dataclasses.replace(TABLES, rows=20_000, capacity=2048)  # for what is exchanged whole

# For each path: its size, bytes of temporaries at most, and the sorts and loops that it is made of.
PATHS = {
    "apply": (dataclasses.replace(TABLES, capacity=65_536), 2 * MB, 0, 0),
    "take": (STATES, 16 * MB, 1, 0),
    "merge": (STATES, 16 * MB, 0, 0),
    "sum_duplicates": (TABLES, 2 * MB, 1, 1),
    "value_and_sparse_grad": (TABLES, 2 * MB, 0, 0),
    "lazy_adam": (TABLES, 4 * MB, 1, 1),
    "accumulated_adam": (TABLES, 30 * MB, 1, 1),  # a second round where rows overflow
    "rowwise_adagrad": (TABLES, 4 * MB, 2, 2),
    "accumulated_adagrad": (TABLES, 30 * MB, 2, 2),
}
FIRST, SECOND = HERE[:1], HERE[1:]  # the second target is asked for less
CASES = [
    *((target, path, MIDDLE, jnp.float32, True) for target in HERE for path in PATHS),
    *((target, path, width, jnp.float32, True) for target in FIRST for path in PATHS
      for width in (NARROW, WIDE) if "adagrad" not in path),
    *((target, path, MIDDLE, jnp.bfloat16, True) for target in FIRST for path in PATHS),
    *((target, path, MIDDLE, jnp.int32, True) for target in FIRST
      for path in ("apply", "take", "merge", "sum_duplicates")),
    *((target, path, MIDDLE, jnp.float32, False) for target in HERE
      for path in ("apply", "take", "merge")),
]  # fmt: skip


def compiled(target, path, columns, dtype, known):
    size = dataclasses.replace(PATHS[path][0], columns=columns, dtype=dtype, known=known)
    program = programs.ONE_DEVICE[path](size)
    place = jaxaccum.row_major if target in targets.TPUS else None
    return targets.compile_for(
        target, program.function, *program.shapes, donate=program.donate, place=place
    )


@pytest.mark.parametrize(("target", "path", "columns", "dtype", "known"), CASES)
def test_one_device(target, path, columns, dtype, known):
    program = compiled(target, path, columns, dtype, known)
    _, temp, sorts, loops = PATHS[path]
    assert program.reused > program.donated - SCALARS
    assert program.temp < temp
    assert not program.copies_of(20 * MB)
    # XLA for TPUs sorts the updates of a scatter, or puts a loop round it, where it sees fit.
    if target in targets.GPUS:
        # Rows of 16 bits are summed once more before they are rounded into the table.
        again = dtype == jnp.bfloat16 and path.endswith("adam")
        assert program.opcodes["sort"] <= sorts + again
        # Whether an id of an unknown vocabulary has found its place is asked in a loop.
        probes = not known and path in ("apply", "merge")
        assert program.opcodes["while"] <= loops + again + probes


# Of a gradient as it comes rows may repeat. A lazy step has its rows once each, and ends by adding
# them to the table as `apply_updates` adds any.
UNORDERED = {
    "apply": 1,
    "lazy_adam": 1,
    "rowwise_adagrad": 1,
    "take": 0,
    "sum_duplicates": 0,
    "value_and_sparse_grad": 0,
}


@pytest.mark.parametrize("target", [t for t in HERE if t in targets.GPUS][:1])
@pytest.mark.parametrize("path", UNORDERED)
def test_floats_are_added_in_an_order_of_our_own(target, path):
    program = compiled(target, path, MIDDLE, jnp.float32, True)
    assert len(program.unordered_adds) == UNORDERED[path]


@pytest.mark.parametrize("target", [t for t in HERE if t != "v6e"])  # which writes them down
def test_slices_of_bags_are_never_written_down(target):
    program = programs.bags_by_hand(TABLES)
    place = jaxaccum.row_major if target in targets.TPUS else None
    compiled = targets.compile_for(
        target, program.function, *program.shapes, donate=program.donate, place=place
    )
    assert compiled.temp < MB  # 512 bags of 20 ids make slices of 2.6 MB


@pytest.mark.parametrize("target", FIRST)
@pytest.mark.parametrize("path", ["sparse_add", "sparse_slice", "sparse_add_grad"])
def test_sparse_ops(target, path):
    program = programs.ONE_DEVICE[path](TABLES)
    compiled = targets.compile_for(target, program.function, *program.shapes)
    assert compiled.temp < 2 * MB
    assert target in targets.TPUS or not compiled.opcodes["while"]  # the host would drive it


# The bounds count what is exchanged: rows of four devices, or a table and its sums.
SPREAD = {
    "all_merge_rows": (dataclasses.replace(SMALL, rows=1_000_000), 12 * MB),
    "all_merge_dense": (SMALL, 60 * MB),
    "all_take": (dataclasses.replace(SMALL, rows=1_000_000), 12 * MB),
    "all_apply": (dataclasses.replace(SMALL, rows=1_000_000), 4 * MB),
    "all_lookup": (TABLES, 4 * MB),
}


@pytest.mark.parametrize("target", FIRST)
@pytest.mark.parametrize("path", SPREAD)
def test_four_devices(target, path):
    size, temp = SPREAD[path]
    mesh = targets.mesh(target, programs.AXIS)
    function, shapes, where = programs.FOUR_DEVICES[path](size).on(mesh)
    donate = programs.FOUR_DEVICES[path](size).donate
    options = {}
    if target in targets.TPUS:
        where = jaxaccum.row_major(shapes, where)
        options = targets.kept_formats(function, shapes, where, donate)
    program = targets.compile_placed(function, shapes, where, donate=donate, **options)
    assert program.reused > program.donated / mesh.size - SCALARS
    assert program.temp < temp
