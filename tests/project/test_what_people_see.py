"""Names in checkpoints, in traces of a profiler and in what is printed; the version."""

import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum


def gradient(ids):
    return jaxaccum.IndexedSlices(jnp.asarray(ids), jnp.ones((len(ids), 2), jnp.float32), (100, 2))


def test_the_version_is_that_of_the_installed_package():
    assert jaxaccum.__version__ == importlib.metadata.version("jaxaccum")


def test_a_state_is_one_line_with_verdicts_by_name():
    state = jaxaccum.init((100, 2), capacity=8)
    for ids in ([7, 31, 7], [-1], [5]):
        state, _ = jaxaccum.apply(state, gradient(ids))
    assert repr(state) == (
        "AccumulatorState(values=float32[8,2], num_rows=3, num_accumulated=2, global_step=0, "
        "verdict_counts={ACCEPTED: 2, INVALID: 1}, dense_shape=(100, 2), reduction='mean_per_row')"
    )
    assert repr(gradient([7, 31, 7])) == (
        "IndexedSlices(indices=[7, 31, 7], values=[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], "
        "dense_shape=(100, 2))"
    )
    assert "values=float32[9,2]" in repr(gradient(range(9)))


@pytest.mark.usefixtures("optax_promotes")
def test_states_of_optimizers_are_one_line():
    params = {"table": jnp.zeros((100, 2)), "w": jnp.zeros(3)}
    inner = jaxaccum.rowwise_adagrad(0.1, stochastic_rounding=True)
    tx = jaxaccum.accumulate(inner, 2, tables={"table": True, "w": False}, capacity=8)
    state = tx.init(params)
    grads = {"table": gradient([5]), "w": jnp.ones(3)}
    _, state = tx.update(grads, state, params)
    text = repr(state)
    assert "\n" not in text
    assert "verdict=ACCEPTED, verdict_counts={ACCEPTED: 1}" in text
    assert (
        "RowwiseAdagradState(sum_of_squares={'table': float32[100], 'w': [0.0, 0.0, 0.0]})" in text
    )
    assert "StochasticRoundingState(num_steps=0)" in text
    assert "None" not in text
    lazy = jaxaccum.lazy_rows(optax.sgd(1.0), catch_up=True).init(params)
    assert repr(lazy).endswith("num_steps=0, last_step={'table': int32[100], 'w': [0, 0, 0]})")


@pytest.mark.parametrize("count", [lambda x: x, lambda x: jnp.stack([x, x])])
def test_what_is_traced_batched_or_abstract_is_printed_too(count):
    state = jax.tree.map(count, jaxaccum.init((100, 2), capacity=8))
    texts = [repr(jax.eval_shape(lambda: state)), repr(jax.tree.map(lambda _: "spec", state))]
    jax.jit(lambda state: texts.append(repr(state)))(state)
    texts.append(repr(state))
    assert all(text.startswith("AccumulatorState(values=") and "\n" not in text for text in texts)
    assert f"num_rows={np.asarray(state.num_rows).tolist()}" in texts[-1]
    assert "num_rows=int32[" in texts[-2]


def test_verdicts_are_printed_and_found_by_name():
    _, verdict = jaxaccum.apply(jaxaccum.init((100, 2), capacity=8), gradient([-1]))
    assert str(jaxaccum.Verdict(verdict)) == f"{jaxaccum.Verdict.INVALID}" == "Verdict.INVALID"
    with pytest.raises(ValueError, match="not a valid Verdict"):
        jaxaccum.Verdict(jnp.int32(7))


def test_leaves_of_states_have_names_in_checkpoints():
    tx = jaxaccum.accumulate(optax.sgd(1.0), 2, tables=True, capacity=8)
    trees = {
        "open": jaxaccum.init((None, 2), capacity=8),
        "accumulate": tx.init(jnp.zeros((100, 2))),
        "grad": gradient([3]),
    }
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trees)}
    assert paths >= {
        "['open'].indices",
        "['open'].row_index.keys",
        "['open'].row_index.places.slots",
        "['accumulate'].sums.values",
        "['accumulate'].verdict_counts",
        "['grad'].indices",
        "['grad'].values",
    }
    assert not [path for path in paths if "flat_index" in path or "<" in path]


@pytest.fixture
def names_matter():
    """The cache of compiled programs tells those apart that differ in names alone."""
    option = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, option)
    jax.config.update(option, True)
    yield
    jax.config.update(option, before)


def scopes_of(function, *args):
    """The names of this package's parts in what XLA compiles, as a profiler shows them."""
    text = jax.jit(function).lower(*args).compile().as_text()
    names = re.findall(r'op_name="([^"]*)"', text)
    return {scope for name in names for scope in re.findall(r"jaxaccum\.(\w+)", name)}


@pytest.mark.usefixtures("names_matter")
@pytest.mark.parametrize("known", [True, False])
def test_a_profiler_shows_the_parts_of_the_accumulator(known):
    state = jaxaccum.init((100 if known else None, 2), capacity=8)
    grad = jaxaccum.IndexedSlices(jnp.arange(4), jnp.ones((4, 2), jnp.float32), state.dense_shape)
    assert scopes_of(jaxaccum.apply, state, grad) == {"apply", "claim"}
    assert scopes_of(jaxaccum.take, state) == {"take"}
    assert scopes_of(jaxaccum.merge, state, state) == {"merge", "claim"}


@pytest.mark.usefixtures("optax_promotes", "names_matter")
def test_a_profiler_shows_the_parts_of_an_optimizer():
    table, tx = jnp.zeros((100, 2)), jaxaccum.lazy_rows(optax.adam(0.1))

    def step(table, state, grad):
        updates, state = tx.update(grad, state, table)
        return jaxaccum.apply_updates(table, updates), state

    assert scopes_of(step, table, tx.init(table), gradient([3, 5])) == {"gather", "scatter"}


@pytest.mark.usefixtures("names_matter")
def test_a_profiler_shows_what_devices_exchange():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), auto, devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("data")
    states = jaxaccum.replicate(jaxaccum.init((100, 2), capacity=8), mesh, "data")
    taken = jax.shard_map(
        jaxaccum.drop_device_axis(lambda state: jaxaccum.all_take(state, "data")[0]),
        mesh=mesh, in_specs=spec, out_specs=spec,
    )  # fmt: skip
    assert scopes_of(taken, states) >= {"exchange", "take"}
    found = jax.shard_map(
        lambda table, ids: jaxaccum.all_lookup(table, ids, "data")[0],
        mesh=mesh, in_specs=(spec, spec), out_specs=spec,
    )  # fmt: skip
    assert scopes_of(found, jnp.ones((100, 2)), jnp.arange(8)) == {"exchange"}
