"""Losses of dense Adam, lazy Adam and lazy Adam that catches up, on one problem; plots them.

A matrix is factorised from noisy entries whose rows and columns are drawn by Zipf's law, so that
most of both tables sleeps most of the time. Everything but the optimizer is the same.

    python benchmarks/lazy_losses.py  # writes docs/lazy_losses.png
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jaxaccum

ROWS, RANK, BATCH, STEPS, EVERY = 3000, 8, 128, 60 if harness.TINY else 3000, 30
PLOT = pathlib.Path(__file__).parent.parent / "docs" / "lazy_losses.png"


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


def train(tx: Any, grad_fn: Callable[..., Any], seed: int) -> np.ndarray:
    """Trains from scratch; returns the loss on entries not trained on, every few steps."""
    rng = np.random.default_rng(seed)
    batches = jax.tree.map(jnp.asarray, draw(rng, (STEPS // EVERY, EVERY, BATCH)))
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

    _, losses = jax.jit(lambda carry: jax.lax.scan(steps, carry, batches))(
        (params, tx.init(params))
    )
    return np.asarray(losses)


def main() -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sparse = jaxaccum.value_and_sparse_grad(loss, tables=True)
    dense = jax.value_and_grad(loss)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    cases = {
        "Adam": optax.adam(0.01),
        "AdamW, weight decay 0.3": optax.adamw(0.01, weight_decay=0.3),
    }
    for axis, (name, tx) in zip(axes, cases.items(), strict=True):
        variants = {
            "dense": (tx, dense, "black"),
            "lazy_rows": (jaxaccum.lazy_rows(tx), sparse, "tab:red"),
            "lazy_rows, catch_up": (jaxaccum.lazy_rows(tx, catch_up=True), sparse, "tab:blue"),
        }
        for label, (variant, grad_fn, colour) in variants.items():
            runs = np.stack([train(variant, grad_fn, seed) for seed in range(3)])
            mean = runs.mean(axis=0)
            width = {"dense": 3.0}.get(label, 1.2)
            axis.plot(
                np.arange(1, len(mean) + 1) * EVERY, mean, color=colour, lw=width, label=label
            )
            print(f"{name}, {label}: best {mean.min():.4f}, last {mean[-1]:.4f}")
        axis.set(title=name, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss on unseen entries")
    axes[0].legend()
    figure.tight_layout()
    if not harness.TINY:
        figure.savefig(PLOT, dpi=80)


if __name__ == "__main__":
    main()
