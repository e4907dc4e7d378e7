"""The parameter server as workers see it: what it computes, refuses, waits for, saves."""

import asyncio
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'jaxaccum[ray]'")

import ray
from internals import RolledBackError, pack

import jaxaccum
import jaxaccum.ray

pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import it

SECONDS = 60
ROWS, FEW, WIDTH = 10, 2, 3
TABLES = {"bias": False, "few": True, "table": True}
ALL = {"bias": None, "few": np.arange(FEW), "table": np.arange(ROWS)}


def first_params():
    rng = np.random.default_rng(0)
    shapes = {"bias": (WIDTH,), "few": (FEW, WIDTH), "table": (ROWS, WIDTH)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gradient(seed):
    rng = np.random.default_rng(seed)

    def rows(num_rows, num):
        ids = rng.integers(0, num_rows, num).astype(np.int32)
        values = rng.normal(size=(num, WIDTH)).astype(np.float32)
        return jaxaccum.IndexedSlices(ids, values, (num_rows, WIDTH))

    bias = rng.normal(size=WIDTH).astype(np.float32)
    return {"bias": bias, "few": rows(FEW, 2), "table": rows(ROWS, 7)}


def trained(params, tx, steps):
    """On one machine, dense: each step the mean of some gradients, weighted."""
    state = tx.init(params)
    for gradients in steps:
        total = sum(weight for _, weight in gradients)
        mean = jax.tree.map(lambda x: np.zeros_like(x), params)
        for seed, weight in gradients:
            for name, leaf in gradient(seed).items():
                dense = leaf.to_dense() if isinstance(leaf, jaxaccum.IndexedSlices) else leaf
                mean[name] = mean[name] + weight / total * np.asarray(dense)
        updates, state = tx.update(mean, state, params)
        params = optax.apply_updates(params, updates)
    return params


def check_params(server, expected, at_least):
    values, step = server.pull(ALL, at_least=at_least)
    assert step == at_least
    for name, value in values.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def server(cluster):
    """Momentum: its state is of every row."""
    server = jaxaccum.ray.ParameterServer(
        first_params(), optax.adagrad(0.3), tables=TABLES, num_shards=3, num_required=2,
        max_staleness=1, staleness_weight=lambda old: 1 / (1.0 + old), shared_name="few rows",
        timeout=SECONDS,
    )  # fmt: skip
    yield server
    server.close()


def test_it_trains_as_one_machine_does(server):
    """Adagrad leaves rows alone that have no gradient, so that lazy and dense are the same."""
    assert server.pull(ALL).global_step == 0
    verdicts = [server.push(gradient(seed), step).verdict for seed, step in [
        (1, 0), (2, 0), (3, 1), (4, 0), (5, 0), (6, 2), (7, 1),
    ]]  # fmt: skip
    stale = jaxaccum.Verdict.STALE
    assert [verdict == stale for verdict in verdicts] == [False] * 4 + [True] + [False] * 2
    steps = [[(1, 1), (2, 1)], [(3, 1), (4, 0.5)], [(6, 1), (7, 0.5)]]
    expected = trained(first_params(), optax.adagrad(0.3), steps)
    check_params(server, expected, at_least=3)
    statistics = server.statistics()
    assert (statistics["accepted"], statistics["stale"]) == (6, 1)
    assert statistics["staleness"] == {0: 4, 1: 2, 2: 1}


def test_rows_are_pulled_by_number_in_any_order(server):
    whole = server.pull(ALL).values["table"]
    ids = np.array([9, 0, 4, 9, ROWS, 3])
    rows = server.pull(ALL | {"table": ids}).values["table"]
    np.testing.assert_array_equal(rows, np.concatenate([whole, np.zeros((1, WIDTH))])[ids])
    assert server.pull(ALL | {"table": []}).values["table"].shape == (0, WIDTH)


def push_and_wait(server, seed):
    step = server.pull(ALL).global_step
    answer = server.push(gradient(seed), step, worker=f"worker {seed}")
    return server.pull(ALL, at_least=step + 1).global_step, answer.verdict


def test_workers_that_wait_for_the_next_step_train_synchronously(server, cluster):
    step = server.pull(ALL).global_step
    push = cluster.remote(num_cpus=0)(push_and_wait)
    answers = ray.get([push.remote(server, seed) for seed in (1, 2)], timeout=SECONDS)
    assert answers == [(step + 1, jaxaccum.Verdict.ACCEPTED)] * 2
    assert {"worker 1", "worker 2"} <= server.statistics()["workers"].keys()


def test_a_push_that_is_repeated_counts_once(server):
    before, step = server.statistics()["accepted"], server.pull(ALL).global_step
    for _ in range(3):
        assert server.push(gradient(8), step, key="mine") == (jaxaccum.Verdict.ACCEPTED, step)
    assert server.statistics()["accepted"] == before + 1
    assert server.push(gradient(9), step).global_step == step + 1
    again = server.push(gradient(8), step, key="mine")  # its answer, and the step that is now
    assert again == (jaxaccum.Verdict.ACCEPTED, step + 1)


def test_a_commit_counts_only_of_parts_that_are_there(server):
    """Parts of before the server went back are gone, and so are those staged long ago."""

    def commit(epoch, *staged_at):
        push = (epoch, f"{epoch} {staged_at}", step, None, {})
        return ray.get(server._actor.commit.remote(*staged_at, *pack(push)), timeout=SECONDS)

    before, step = server.statistics(), server.pull(ALL).global_step
    with pytest.raises(RolledBackError, match="not one of before"):
        commit("one of before", step, step)
    assert server.statistics() == before
    for staged_at in ((step - 100, step), (step, step - 100)):
        assert commit(server._view.epoch, *staged_at) == (jaxaccum.Verdict.STALE, step)
    assert server.statistics()["accepted"] == before["accepted"]


def test_asyncio(server):
    async def work():
        step = server.pull(ALL).global_step
        await asyncio.gather(*(server.push_async(gradient(seed), step) for seed in (3, 4)))
        return (await server.pull_async(ALL, at_least=step + 1)).global_step - step

    assert asyncio.run(work()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": np.ones(4, np.float32)}, r"grads\['bias'\] must be float32\[3\]"),
        ({"bias": np.ones(3, np.float16)}, r"grads\['bias'\] must be float32\[3\]"),
        ({"more": np.ones(3, np.float32)}, "grads must be a tree as params"),
    ],
)
def test_bad_gradients_are_told_and_the_server_lives(server, change, message):
    before = server.statistics()
    with pytest.raises(jaxaccum.InvalidArgumentError, match=message):
        server.push(gradient(0) | change, 0)
    with pytest.raises(jaxaccum.InvalidArgumentError, match="local_step must be scalar"):
        server.push(gradient(0), np.array([1, 2]))
    with pytest.raises(jaxaccum.InvalidArgumentError, match=r"ids\['table'\] has row 11 of"):
        server.pull(ALL | {"table": [11]})
    with pytest.raises(jaxaccum.InvalidArgumentError, match="ids must be a tree as params"):
        server.pull({"table": [1]})
    assert server.statistics() == before


def test_it_is_found_by_its_name(server):
    found = jaxaccum.ray.ParameterServer.attach("few rows")
    assert found.pull(ALL).global_step == server.pull(ALL).global_step
    with pytest.raises(jaxaccum.ray.UnavailableError, match="there is no parameter server 'none'"):
        jaxaccum.ray.ParameterServer.attach("none")
    with pytest.raises(ValueError, match=r"shared_name 'few rows' is that of a server of"):
        jaxaccum.ray.ParameterServer(
            {"table": np.zeros((3, 2), np.float32)},
            optax.sgd(1.0),
            tables=True,
            shared_name="few rows",
        )
    with pytest.raises(
        ValueError, match=r"of a server of .* num_required 2.*, not .* num_requ.* 1"
    ):
        jaxaccum.ray.ParameterServer(
            first_params(), optax.adagrad(0.3), tables=TABLES, num_shards=3, shared_name="few rows"
        )


def test_another_version_is_told(server, monkeypatch):
    found = jaxaccum.ray.ParameterServer.attach("few rows")
    monkeypatch.setattr("jaxaccum._ray.parameter_server.version", lambda: "0.0.1")
    with pytest.raises(jaxaccum.ray.VersionMismatchError, match=r"worker runs jaxaccum 0\.0\.1"):
        found.push(gradient(0), 0)


def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path):
    make = jaxaccum.ray.ParameterServer
    with pytest.raises(ValueError, match="num_shards must be at least 1, got 0"):
        make(first_params(), optax.sgd(1.0), tables=TABLES, num_shards=0)
    with pytest.raises(ValueError, match="max_staleness must not be negative, got -1"):
        make(first_params(), optax.sgd(1.0), tables=TABLES, max_staleness=-1)
    with pytest.raises(ValueError, match=r"reduction must be one of .*, got 'max'"):
        make(first_params(), optax.sgd(1.0), tables=TABLES, reduction="max")


def test_an_optimizer_that_couples_rows_is_refused_at_once(cluster):
    with pytest.raises(ValueError, match="tx must be row-separable"):
        jaxaccum.ray.ParameterServer(
            first_params(), optax.lamb(0.1), tables=TABLES, timeout=SECONDS
        )


def test_a_worker_is_never_given_what_is_older_than_a_step_it_knows_of(cluster):
    """Shards are asked for a step after its last gradient is answered; its worker is faster."""
    server = jaxaccum.ray.ParameterServer(
        first_params(), optax.sgd(1.0), tables=TABLES, num_shards=3, timeout=SECONDS
    )

    def ask_late(coordinator):
        ask = coordinator._ask_all

        async def late(*arguments, **options):
            await asyncio.sleep(0.2)
            return await ask(*arguments, **options)

        coordinator._ask_all = late

    ray.get(server._actor.__ray_call__.remote(ask_late), timeout=SECONDS)
    for step in range(3):
        assert server.pull(ALL).global_step == step
        assert server.push(gradient(step), step) == (jaxaccum.Verdict.ACCEPTED, step + 1)
    server.close()


def test_a_step_that_fails_is_told_to_all_who_wait_for_it(cluster):
    def refuse_ones(update):
        if (update == 1).any():
            raise ValueError("a one")
        return update

    tx = optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda u: jax.pure_callback(refuse_ones, jax.ShapeDtypeStruct(u.shape, u.dtype), u),
            updates,
        )
    )
    params, ids = {"table": np.zeros((100, 1), np.float32)}, {"table": np.array([99])}
    server = jaxaccum.ray.ParameterServer(params, tx, tables=True, num_shards=2, timeout=SECONDS)

    def push(value, step):
        values = np.full((1, 1), value, np.float32)
        grads = {"table": jaxaccum.IndexedSlices(ids["table"], values, (100, 1))}
        return server.push(grads, step)

    assert push(2, 0).global_step == 1
    assert push(1, 1).global_step == 2
    for call in (lambda: server.pull(ids), lambda: server.pull(ids), lambda: push(2, 2)):
        with pytest.raises(jaxaccum.ray.UnavailableError, match=r"step 2 failed: .*Error"):
            call()
    server.close()


def test_a_table_is_made_in_its_shards_saved_and_gone_on_from(cluster, tmp_path):
    init = lambda start, stop: jnp.arange(start, stop, dtype=jnp.float32)[:, None]  # noqa: E731
    params = {"table": jaxaccum.ray.TableInit((100, 1), np.dtype(np.float32), init)}
    options = {"tables": True, "num_shards": 2, "checkpoint_dir": tmp_path, "timeout": SECONDS}
    tx = optax.adam(0.1)
    server = jaxaccum.ray.ParameterServer(params, tx, num_required=2, **options)
    ids = np.array([2, 51, 99])
    grads = {"table": jaxaccum.IndexedSlices(ids, np.ones((3, 1), np.float32), (100, 1))}
    np.testing.assert_array_equal(server.pull({"table": ids}).values["table"][:, 0], ids)
    for _ in range(3):  # one is left over, and waits for the next step
        server.push(grads, server.pull({"table": ids}).global_step, worker="me")
    assert server.checkpoint() == 1
    server.push(grads, 1)
    expected = server.pull({"table": np.arange(100)}, at_least=2).values["table"]
    server.close()
    with pytest.raises(ValueError, match="holds step 1 already: pass resume=True"):
        jaxaccum.ray.ParameterServer(params, tx, **options)
    server = jaxaccum.ray.ParameterServer(params, tx, num_required=2, resume=True, **options)
    statistics, step = server.statistics(), server.pull({"table": ids}).global_step
    assert (statistics["num_steps"], statistics["num_accumulated"]) == (1, 1)
    assert statistics["workers"]["me"]["accepted"] == 3
    assert statistics["lost"] == 1  # the last one: accepted after the checkpoint, and not in it
    server.push(grads, step)
    resumed = server.pull({"table": np.arange(100)}, at_least=step + 1).values["table"]
    np.testing.assert_array_equal(resumed, expected)
    server.close()


def test_without_checkpoints_a_server_that_dies_is_gone_and_says_so(cluster):
    server = jaxaccum.ray.ParameterServer(
        first_params(), optax.sgd(1.0), tables=TABLES, num_shards=2, timeout=SECONDS
    )
    with pytest.raises(ValueError, match="checkpoint needs a server with a checkpoint_dir"):
        server.checkpoint()
    statistics = server.statistics()
    first, shard = statistics["shards"]
    assert first["pid"] == statistics["pid"] != shard["pid"]
    os.kill(shard["pid"], signal.SIGSTOP)
    with pytest.raises(jaxaccum.ray.UnavailableError, match=r"has not answered within 0\.3 s"):
        server.pull(ALL, timeout=0.3)
    os.kill(shard["pid"], signal.SIGKILL)
    with pytest.raises(jaxaccum.ray.UnavailableError, match="has lost a shard, and has no check"):
        server.push(gradient(0), 0)
    os.kill(ray.get(server._actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
    with pytest.raises(jaxaccum.ray.UnavailableError, match="cannot be reached"):
        server.push(gradient(0), 0)
