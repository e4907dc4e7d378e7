"""What lazy Adam does to the loss: no clock, but dense Adam on the same problem.

A matrix is factorised from noisy entries whose rows and columns are drawn by Zipf's law, so that
most of both tables sleeps most of the time. Everything but the optimizer is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum
from benchmarks.harness import Figures, case

ROWS, RANK, BATCH, EVERY = 3000, 8, 128, 30
OPTIMIZERS = {
    "Adam": optax.adam(0.01),
    "AdamW, weight decay 0.3": optax.adamw(0.01, weight_decay=0.3),
}


@case(
    "{optimizer}",
    settings=[{"optimizer": name, "steps": 3000, "seeds": 3} for name in OPTIMIZERS],
    quick=[{"optimizer": "Adam", "steps": 60, "seeds": 1}],
)
def losses(optimizer: str, steps: int, seeds: int) -> Figures:
    """The loss on unseen entries after 3,000 steps, mean of three seeds."""
    tx = OPTIMIZERS[optimizer]
    sparse = jaxaccum.value_and_sparse_grad(loss, tables=True)
    variants = {
        "dense": (tx, jax.value_and_grad(loss)),
        "lazy_rows": (jaxaccum.lazy_rows(tx), sparse),
        "lazy_rows, catch_up": (jaxaccum.lazy_rows(tx, catch_up=True), sparse),
    }
    figures = {}
    for line, variant in variants.items():
        curve = np.mean([train(*variant, steps, seed) for seed in range(seeds)], axis=0)
        figures[line] = {"loss": float(curve[-1]), "curve": curve.tolist()}
    return figures


def draw(rng: np.random.Generator, size: tuple[int, ...]) -> dict[str, np.ndarray]:
    odds = 1.0 / np.arange(1, ROWS + 1)
    users, items = (rng.choice(ROWS, size, p=odds / odds.sum()).astype(np.int32) for _ in range(2))
    truth = np.random.default_rng(0).normal(size=(2, ROWS, RANK)) / RANK**0.25
    exact = np.sum(truth[0][users] * truth[1][items], axis=-1)
    return {
        "users": users,
        "items": items,
        "entry": (exact + 0.1 * rng.normal(size=size)).astype(np.float32),
    }


def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    guess = jnp.sum(params["users"][batch["users"]] * params["items"][batch["items"]], axis=-1)
    return jnp.mean((guess - batch["entry"]) ** 2)


def train(tx: Any, grad_fn: Callable[..., Any], num_steps: int, seed: int) -> np.ndarray:
    """Trains from scratch; returns the loss on entries not trained on, every few steps."""
    rng = np.random.default_rng(seed)
    batches = jax.tree.map(jnp.asarray, draw(rng, (num_steps // EVERY, EVERY, BATCH)))
    unseen = jax.tree.map(jnp.asarray, draw(rng, (20_000,)))
    params = {
        name: jnp.asarray(0.3 * rng.normal(size=(ROWS, RANK)), jnp.float32)
        for name in ("items", "users")
    }

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        _, grads = grad_fn(params, batch)
        updates, state = tx.update(grads, state, params)
        return (jaxaccum.apply_updates(params, updates), state), None

    def steps(carry: Any, batches: Any) -> Any:
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, loss(carry[0], unseen)

    _, curve = jax.jit(lambda carry: jax.lax.scan(steps, carry, batches))((params, tx.init(params)))
    return np.asarray(curve)
