"""Programs written to a file by `jax.export`: run again elsewhere, lowered for what is not here."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public_programs as programs
import pytest
from jax.sharding import AxisType

import jaxaccum

pytestmark = pytest.mark.usefixtures("as_it_comes")  # optax promotes
PLATFORMS = ["cpu", "cuda", "rocm", "tpu"]
SIZE = programs.Size(rows=1000, columns=4, ids=16, capacity=32)
# In another process, what is in the file is all there is: neither loss nor optimizer.
RUN = """
import pathlib, sys, jax, jaxaccum, jax.numpy as jnp
steps = jax.export.deserialize(pathlib.Path(sys.argv[1]).read_bytes())
state = jaxaccum.init((1000, 4), jnp.bfloat16, capacity=32, reduction="sum")
ids, values = jnp.array([7, 3, 7], jnp.int32), jnp.ones((3, 4), jnp.bfloat16)
grad = jaxaccum.IndexedSlices(ids, values, (1000, 4))
state, taken = steps.call(state, grad)
print(type(taken).__name__, taken.indices[:3].tolist(), taken.values[:2, 0].tolist(), state.dtype)
"""


def test_states_and_gradients_are_read_in_another_process(tmp_path):
    def steps(state, grad):
        state, _ = jaxaccum.apply(state, grad)
        state, taken, _ = jaxaccum.take(state)
        return state, taken

    state = jaxaccum.init((1000, 4), jnp.bfloat16, capacity=32, reduction="sum")
    grad = jaxaccum.IndexedSlices(
        jnp.zeros(3, jnp.int32), jnp.zeros((3, 4), jnp.bfloat16), (1000, 4)
    )
    file = tmp_path / "steps"
    file.write_bytes(jax.export.export(jax.jit(steps))(state, grad).serialize())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, file], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "IndexedSlices [3, 7, 1000] [1.0, 2.0] bfloat16", done.stderr


@pytest.mark.parametrize("rows", [1000, None])
def test_structures_come_back_as_they_were(rows):
    state = jaxaccum.init((rows, 4), capacity=8)
    adagrad = jaxaccum.rowwise_adagrad(0.1, stochastic_rounding=True)
    tx = jaxaccum.accumulate(jaxaccum.lazy_rows(adagrad), 4, tables=True, capacity=8)
    caught_up = jaxaccum.lazy_rows(optax.sgd(0.1), catch_up=True)
    table = jnp.zeros((1000, 4))
    # optax registers none of its own states, which stand within ours.
    sums, rounding = adagrad.init(table)[0], adagrad.init(table)[-1]
    micro = dataclasses.replace(tx.init(table), inner_state=sums)
    tree = (state, micro, rounding, caught_up.init(table)._replace(inner_state=()))
    exported = jax.export.export(jax.jit(lambda tree: tree))(tree)
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree
    result = again.call(tree)
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    assert result[0].dense_shape == (rows, 4)
    assert result[0].dtype == np.dtype(np.float32)


@pytest.mark.parametrize(
    ("name", "known"),
    [(name, True) for name in programs.ONE_DEVICE]
    + [(name, False) for name in ("apply", "take", "merge")],
)
def test_every_function_is_lowered_for_every_platform(name, known):
    size = dataclasses.replace(SIZE, known=known)
    program = programs.ONE_DEVICE[name](size)
    exported = jax.export.export(jax.jit(program.function), platforms=PLATFORMS)(*program.shapes)
    assert exported.platforms == tuple(PLATFORMS)


@pytest.mark.parametrize("name", programs.FOUR_DEVICES)
def test_every_exchange_is_lowered_for_every_platform(name):
    mesh = jax.make_mesh((4,), (programs.AXIS,), axis_types=(AxisType.Auto,))
    function, shapes, _ = programs.FOUR_DEVICES[name](SIZE).on(mesh)
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)
    assert exported.platforms == tuple(PLATFORMS)
    assert exported.nr_devices == 4


@pytest.mark.parametrize("name", ["take", "sum_duplicates", "value_and_sparse_grad"])
def test_no_floats_are_added_in_an_order_of_the_devices_own(name):
    program = programs.ONE_DEVICE[name](SIZE)
    exported = jax.export.export(jax.jit(program.function), platforms=["cuda"])(*program.shapes)
    scatters = exported.mlir_module().split('"stablehlo.scatter"')[1:]
    bodies = [text[: text.index("stablehlo.return")] for text in scatters]
    assert not [body for body in bodies if re.search(r"stablehlo.add .*tensor<f32>", body)]


def test_a_repeated_row_is_added_as_the_device_likes_unless_summed_before():
    program = programs.apply(SIZE)
    exported = jax.export.export(jax.jit(program.function), platforms=["cuda"])(*program.shapes)
    assert len(re.findall(r"stablehlo.add .*tensor<f32>", exported.mlir_module())) == 1
