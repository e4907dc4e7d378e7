"""What a user writes, read by ``mypy --strict`` in the gate with the package as it is installed."""

from typing import assert_type

import jax
import jax.numpy as jnp

import jaxaccum


def accumulate_by_hand(ids: jax.Array, values: jax.Array) -> jaxaccum.IndexedSlices:
    state = jaxaccum.init((1_000, 4), capacity=16, reduction="mean_per_gradient")
    assert_type(state, jaxaccum.AccumulatorState)
    grad = jaxaccum.IndexedSlices(ids, values, (1_000, 4))
    state, verdict = jaxaccum.apply(state, 0.5 * grad)
    assert_type(verdict, jax.Array)
    assert_type(jaxaccum.Verdict(int(verdict)), jaxaccum.Verdict)
    state, mean, ready = jaxaccum.take(state, num_required=1)
    assert_type(mean, jaxaccum.IndexedSlices)
    assert_type(ready, jax.Array)
    assert_type(state.capacity, int)
    assert_type(mean.dense_shape, tuple[int | None, ...] | None)
    return mean


def loss(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
    return jnp.mean(params["table"][ids] @ params["w"])


def is_table(path: tuple[object, ...], leaf: object) -> bool:
    return "table" in jax.tree_util.keystr(path)


def train(params: dict[str, jax.Array], ids: jax.Array) -> dict[str, jax.Array]:
    _, grads = jaxaccum.value_and_sparse_grad(loss, tables=is_table)(params, ids)
    norm: jax.Array = jaxaccum.global_norm(grads)
    half = jaxaccum.map_values(lambda values: values / norm, grads)
    tx = jaxaccum.accumulate(jaxaccum.rowwise_adagrad(0.1), 1, tables=is_table, capacity=16)
    updates, _ = tx.update(half, tx.init(params), params)
    new: dict[str, jax.Array] = jaxaccum.apply_updates(params, updates)
    return new


def block(ids: list[int]) -> tuple[jax.Array, jax.Array]:
    with jaxaccum.SparseConditionalAccumulator("float32", (10, 1), reduction_type="SUM") as acc:
        accepted = acc.apply_grad(ids, [[1.0]] * len(ids), local_step=0)
        assert_type(accepted, bool)
        taken = acc.take_grad(1, timeout=1.0)
    return taken.indices, taken.values


version: str = jaxaccum.__version__
