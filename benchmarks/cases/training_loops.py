"""One step of other libraries' training loops, sparse by two changed lines, beside the same dense.

A table of 64 floats a row and a linear layer, Adam, all donated.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum
from benchmarks.harness import Figures, Step, case, held_mb, jax_step, measure, with_metric
from benchmarks.workloads import WIDTH

SPARSE = functools.partial(
    jaxaccum.value_and_sparse_grad,
    tables=lambda path, leaf: "embed" in jax.tree_util.keystr(path),
)
# A loop gives its step, what the step is first called with, and what takes the results up.
Loop = tuple[Any, list[Any], Callable[[list[Any], Any], Any]]
LOOPS = (
    "Flax TrainState.apply_gradients",
    "Flax nnx.Optimizer.update, nnx.jit",
    "Equinox eqx.apply_updates, eqx.filter_jit",
    "Haiku, optax.apply_updates",
    "optax, optax.apply_updates",
)


@case(
    "{loop}",
    settings=[{"loop": loop} for loop in LOOPS],
    quick=[{"loop": loop, "rows": 1000, "ids": 32} for loop in LOOPS[1:3]],
    needs=("flax", "equinox", "haiku"),
)
def training_loops(loop: str, rows: int = 1_000_000, ids: int = 4096) -> Figures:
    """One step of 4,096 ids of a million rows in other libraries' loops, two lines changed."""
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(rng.integers(0, rows, ids), jnp.int32) for _ in range(16)]
    make, value_and_grad = loops()[loop]
    tx = optax.adam(1e-3)
    lines = {"jaxaccum": (SPARSE, jaxaccum.lazy_rows(tx)), "dense": (value_and_grad, tx)}
    steps, held = {}, {}
    for line, two_lines in lines.items():
        steps[line], held[line] = stepper(make(*two_lines, rows, batches[0]), batches)
    return with_metric(measure(steps), "MB", held)


def loops() -> dict[str, tuple[Callable[..., Loop], Any]]:
    import equinox as eqx
    from flax import nnx

    makers = (flax, nnx_loop, equinox, haiku, optax_loop)
    dense = (jax.value_and_grad, nnx.value_and_grad, eqx.filter_value_and_grad) + (
        jax.value_and_grad,
    ) * 2
    return dict(zip(LOOPS, zip(makers, dense, strict=True), strict=True))


def stepper(loop: Loop, batches: list[jax.Array]) -> tuple[Step, float]:
    """The step, run on one batch after the other, and what it holds in MB."""
    step, carry, take_up = loop
    compiled = step.lower(*carry, batches[0]).compile()
    turn = itertools.cycle(batches)

    def run() -> Any:
        result = step(*carry, next(turn))
        carry[:] = take_up(carry, result)
        return result

    return jax_step(run), held_mb(compiled)


def square_error(predictions: jax.Array) -> jax.Array:
    return jnp.mean((predictions - 1.0) ** 2)


def flax(value_and_grad: Any, tx: Any, rows: int, ids: jax.Array) -> Loop:
    import flax.linen as nn
    from flax.training.train_state import TrainState

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids: jax.Array) -> jax.Array:
            return nn.Dense(1)(nn.Embed(rows, WIDTH, name="embed")(ids))

    model = Model()
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, ids: jax.Array) -> Any:
        def loss_fn(params: Any) -> jax.Array:
            return square_error(state.apply_fn({"params": params}, ids))

        _, grads = value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads)

    return step, [state], lambda carry, result: [result]


def nnx_loop(value_and_grad: Any, tx: Any, rows: int, ids: jax.Array) -> Loop:
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.embed = nnx.Embed(rows, WIDTH, rngs=rngs)
            self.linear = nnx.Linear(WIDTH, 1, rngs=rngs)

    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model: Any, optimizer: Any, ids: jax.Array) -> jax.Array:
        def loss_fn(model: Any) -> jax.Array:
            return square_error(model.linear(model.embed(ids)))

        loss, grads = value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    return step, [model, optimizer], lambda carry, result: carry


def equinox(value_and_grad: Any, tx: Any, rows: int, ids: jax.Array) -> Loop:
    import equinox as eqx

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        linear: eqx.nn.Linear

    keys = jax.random.split(jax.random.key(0))
    layers = eqx.nn.Embedding(rows, WIDTH, key=keys[0]), eqx.nn.Linear(WIDTH, 1, key=keys[1])
    model = Model(*layers)

    def loss_fn(model: Any, ids: jax.Array) -> jax.Array:
        return square_error(jax.vmap(lambda i: model.linear(model.embed(i)))(ids))

    # The ids are numbers to keep.
    @eqx.filter_jit(donate="all-except-first")
    def make_step(ids: jax.Array, model: Any, state: Any) -> Any:
        _, grads = value_and_grad(loss_fn)(model, ids)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    class Step:
        """``make_step`` with its arguments in the order of the others'."""

        def __call__(self, model: Any, state: Any, ids: jax.Array) -> Any:
            return make_step(ids, model, state)

        def lower(self, model: Any, state: Any, ids: jax.Array) -> Any:
            return make_step.lower(ids, model, state)

    carry = [model, tx.init(eqx.filter(model, eqx.is_array))]
    return Step(), carry, lambda carry, result: list(result)


def haiku(value_and_grad: Any, tx: Any, rows: int, ids: jax.Array) -> Loop:
    import haiku as hk

    def forward(ids: jax.Array) -> jax.Array:
        return hk.Linear(1)(hk.Embed(rows, WIDTH, name="embed")(ids))

    network = hk.without_apply_rng(hk.transform(forward))
    params = jax.jit(network.init)(jax.random.key(0), ids)
    loss_fn = lambda params, ids: square_error(network.apply(params, ids))  # noqa: E731
    return functional(value_and_grad, tx, params, loss_fn)


def optax_loop(value_and_grad: Any, tx: Any, rows: int, ids: jax.Array) -> Loop:
    keys = jax.random.split(jax.random.key(0))
    params = {
        "embed": jax.random.normal(keys[0], (rows, WIDTH)),
        "kernel": jax.random.normal(keys[1], (WIDTH,)),
    }
    loss_fn = lambda p, ids: square_error(p["embed"][ids] @ p["kernel"])  # noqa: E731
    return functional(value_and_grad, tx, params, loss_fn)


def functional(value_and_grad: Any, tx: Any, params: Any, loss_fn: Any) -> Loop:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, ids: jax.Array) -> Any:
        _, grads = value_and_grad(loss_fn)(params, ids)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, [params, tx.init(params)], lambda carry, result: list(result)
