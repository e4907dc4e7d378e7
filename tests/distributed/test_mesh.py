"""What lies where on a mesh: specs of tables and of all that goes by their rows."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import NUM_DEVICES
from jax.sharding import PartitionSpec

import jaxaccum

P = PartitionSpec
ROWS = 5 * NUM_DEVICES
# A vector and a matrix that have as many rows as the table, and are none; tables of one name.
PARAMS = {
    "table": jnp.zeros((ROWS, 2), jnp.float32),
    "bias": jnp.zeros(ROWS, jnp.float32),
    "tower": {
        "table": jnp.zeros((ROWS, 3), jnp.float32),
        "small": {"table": jnp.zeros((ROWS, 4), jnp.float32)},
    },
}
TABLES = {"table": True, "bias": False, "tower": {"table": False, "small": True}}


def is_table(path, leaf):
    return jax.tree_util.keystr(path) in ("['table']", "['tower']['small']['table']")


def by_row(tree, **options):
    """The paths of the leaves that are sharded."""
    options = {"tables": TABLES, "params": PARAMS} | options
    specs = jaxaccum.shard_specs(tree, "rows", **options)
    assert jax.tree.structure(specs) == jax.tree.structure(tree)
    leaves = jax.tree_util.tree_leaves_with_path(specs)
    assert {spec for _, spec in leaves} <= {P(), P("rows")}
    return {jax.tree_util.keystr(path) for path, spec in leaves if spec == P("rows")}


def like_tables(*prefixes):
    return {p + t for p in prefixes for t in ("['table']", "['tower']['small']['table']")}


@pytest.mark.parametrize("tables", [TABLES, is_table])
def test_tables_are_selected_as_everywhere(tables):
    assert by_row(PARAMS, tables=tables, params=None) == like_tables("")
    shapes = jax.eval_shape(lambda: PARAMS)
    assert by_row(shapes, tables=tables, params=None) == like_tables("")


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.adam(0.1), like_tables("[0].mu", "[0].nu")),
        (jaxaccum.rowwise_adagrad(0.1), like_tables("[0].sum_of_squares")),
        (
            jaxaccum.lazy_rows(optax.sgd(0.1, momentum=0.9), catch_up=True),
            like_tables(".inner_state[0].trace", ".last_step"),
        ),
        (
            optax.partition(
                {"a": optax.adagrad(0.1), "b": optax.sgd(0.1)},
                {"table": "a", "bias": "b", "tower": "a"},
            ),
            like_tables(".inner_states['a'].inner_state[0].sum_of_squares"),
        ),
        (
            jaxaccum.accumulate(optax.adam(0.1), 2, tables=TABLES, capacity=4),
            like_tables(".inner_state[0].mu", ".inner_state[0].nu"),
        ),
    ],
    ids=["adam", "rowwise_adagrad", "catch_up", "partition", "accumulate"],
)
def test_an_optimizers_rows_go_with_their_table(tx, expected):
    state = tx.init(PARAMS)
    assert by_row(state) == expected
    both = {"params": PARAMS, "optimizer": state}
    whole = {"['optimizer']" + path for path in expected} | like_tables("['params']")
    assert by_row(both) == whole


def test_a_table_that_is_the_whole_tree():
    """Its path is empty, and the end of every path: then only what has its rows goes with it."""
    table = PARAMS["table"]
    tx = jaxaccum.accumulate(optax.adam(0.1), 2, tables=True, capacity=ROWS)
    paths = by_row(tx.init(table), tables=True, params=table)
    assert paths == {".inner_state[0].mu", ".inner_state[0].nu"}


def test_accumulators_of_devices_go_by_device():
    mesh = devices.MESHES["data"]
    states = {
        "copies": jaxaccum.replicate(jaxaccum.init((ROWS, 2), capacity=4), mesh, "data"),
        "shards": jaxaccum.shard_init((ROWS, 2), mesh, "data", capacity=4),
        "one": jaxaccum.init((ROWS, 2), capacity=4),
    }
    leaves = jax.tree_util.tree_leaves_with_path(states)
    paths = {jax.tree_util.keystr(path) for path, _ in leaves}
    assert by_row(states) == {path for path in paths if not path.startswith("['one']")}


@pytest.mark.parametrize("axis_name", ["core", ("host", "core")])
def test_shards_hold_their_ranges(axis_name):
    mesh = devices.MESHES[("host", "core")]
    rows = np.arange(ROWS * 2, dtype=np.float32).reshape(ROWS, 2)
    tree = jaxaccum.shard_rows(
        {"table": rows, "bias": rows[:, 0]}, mesh, axis_name, tables={"table": True, "bias": False}
    )
    assert (tree["table"].sharding.spec, tree["bias"].sharding.spec) == (P(axis_name), P())
    length = ROWS // (4 if axis_name == "core" else 8)
    for shard in tree["table"].addressable_shards:
        start = shard.index[0].start or 0
        assert np.array_equal(shard.data, rows[start : start + length])
    assert all(np.array_equal(s.data, rows[:, 0]) for s in tree["bias"].addressable_shards)


def test_the_axis_of_devices_is_dropped_and_put_back():
    mesh, seen = devices.MESHES["data"], []

    def step(train, ids):
        seen.append((train["state"].values.shape, ids.shape))
        fresh = jaxaccum.init((ROWS, 1), capacity=3)
        return {**train, "state": train["state"]}, [fresh], ids

    states = jaxaccum.replicate(jaxaccum.init((ROWS, 1), capacity=4), mesh, "data")
    mapped = jax.shard_map(
        jaxaccum.drop_device_axis(step),
        mesh=mesh,
        in_specs=({"state": P("data"), "w": P()}, P("data")),
        out_specs=({"state": P("data"), "w": P()}, P("data"), P("data")),
        check_vma=False,
    )
    train, [fresh], ids = mapped(
        {"state": states, "w": jnp.zeros(3)}, jnp.arange(16, dtype=jnp.int32)
    )
    assert seen == [((4, 1), (2,))]
    assert train["state"].values.shape == (NUM_DEVICES, 4, 1)
    assert fresh.values.shape == (NUM_DEVICES, 3, 1)
    assert train["w"].shape == (3,)
    assert ids.shape == (16,)
    one_device = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    wrong = jax.shard_map(
        jaxaccum.drop_device_axis(lambda s: s), mesh=one_device, in_specs=P(), out_specs=P()
    )
    for state, shape in ((states, r"\(8,\)"), (jaxaccum.init((ROWS, 1), capacity=4), r"\(\)")):
        host = jax.tree.map(np.asarray, state)
        with pytest.raises(ValueError, match=rf"axis of devices of length 1 .* shape {shape}"):
            wrong(host)
