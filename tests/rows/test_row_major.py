import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxaccum

ONE = SingleDeviceSharding(jax.devices()[0])
TABLES = {"table": True, "step": False}
BY_COLUMNS = Format(Layout((1, 0)), ONE)


def order(leaf):
    return leaf.format.layout.major_to_minor


def by_columns(rows):
    return jax.device_put(jnp.zeros((rows, 4)), BY_COLUMNS)


@pytest.mark.usefixtures("as_it_comes")
def test_params_and_state_stay_row_major_through_donated_steps():
    tx = jaxaccum.lazy_rows(optax.adam(0.1))
    grad_fn = jaxaccum.value_and_sparse_grad(
        lambda p, ids: jnp.sum(p["table"][ids] ** 2), tables=TABLES
    )

    def step(params, state, ids):
        value, grads = grad_fn(params, ids)
        updates, state = tx.update(grads, state, params)
        return jaxaccum.apply_updates(params, updates), state, value

    params = {"table": by_columns(64) + 1, "step": jnp.float32(0)}
    params["table"] = jax.device_put(params["table"], BY_COLUMNS)
    formats = jaxaccum.row_major(params), jaxaccum.row_major(jax.eval_shape(tx.init, params))
    state = jax.jit(tx.init, out_shardings=formats[1])(params)
    params = jax.device_put(params, formats[0])
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*formats, None))
    before = params["table"]
    for _ in range(2):
        params, state, _ = step(params, state, jnp.array([3, 5, 3]))
    assert before.is_deleted()
    assert {order(x) for x in jax.tree.leaves((params, state)) if x.ndim == 2} == {(0, 1)}
    assert float(params["table"][3, 0]) == pytest.approx(0.8, abs=1e-3)


def test_one_sharding_for_all_or_one_a_subtree():
    mesh = jax.make_mesh((8,), ("rows",))
    by_rows = NamedSharding(mesh, PartitionSpec("rows"))
    tree = {"table": jnp.zeros((16, 4)), "vector": jnp.zeros(16), "narrow": jnp.zeros((16, 1))}
    formats = jaxaccum.row_major(tree, by_rows)
    assert formats["table"] == Format(Layout((0, 1)), by_rows)
    assert formats["vector"] is formats["narrow"] is by_rows
    placed = jax.device_put(tree, formats)
    assert placed["table"].sharding.is_equivalent_to(by_rows, 2)
    assert jaxaccum.row_major(placed)["table"] == formats["table"]
    mixed = jaxaccum.row_major((tree, tree), (by_rows, ONE))
    assert mixed[0] == formats
    assert mixed[1]["table"].sharding == ONE
    with pytest.raises(ValueError, match="sharding must be one"):
        jaxaccum.row_major(tree, (by_rows,))


def test_a_large_table_stored_by_columns_is_warned_of():
    tx = jaxaccum.lazy_rows(optax.sgd(0.1))
    with pytest.warns(
        UserWarning, match=r"params\['table'\] of shape \(262144, 4\) is stored by c"
    ):
        tx.init({"table": by_columns(2**18)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.init({"table": jnp.zeros((2**18, 4))})
        tx.init({"table": by_columns(8)})
        jax.jit(tx.init)({"table": by_columns(2**18)})
