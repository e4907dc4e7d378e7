"""A two-tower recommender in Flax: for a word sense and a relation, which senses go with them?

Queries and candidates are rows of one table, of all WordNet senses. A step looks 1,024 of them up;
``jaxaccum.value_and_sparse_grad`` gives their gradient as rows, ``jaxaccum.lazy_rows`` runs optax's
Adagrad on these and touches no others. The few relations and the network stay dense.

    python examples/flax_recommender.py [--epochs 3] [--dim 64] [--batch 512]
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table

import jaxaccum

DATA = pathlib.Path(__file__).parent / "data" / "wordnet3.npz"


class TwoTowers(nn.Module):
    """Query: a sense, moved by a relation through a small network. Candidate: a sense."""

    senses: int
    relations: int
    dim: int

    def setup(self) -> None:
        """Makes the layers."""
        self.sense = nn.Embed(self.senses, self.dim)
        self.relation = nn.Embed(self.relations, self.dim)
        self.mix = nn.Dense(2 * self.dim)
        self.out = nn.Dense(self.dim)

    def query(self, senses: jax.Array, relations: jax.Array) -> jax.Array:
        """Vectors ``[b, dim]`` close to those of the answers."""
        found, how = self.sense(senses), self.relation(relations)
        mixed = nn.gelu(self.mix(jnp.concatenate([found, how, found * how], axis=-1)))
        return found + self.out(mixed)

    def __call__(self, batch: jax.Array) -> jax.Array:
        """Scores of every query of the batch against every candidate of it."""
        candidates = self.sense(batch[:, 2])
        return self.query(batch[:, 0], batch[:, 1]) @ candidates.T

    def scores(self, batch: jax.Array) -> jax.Array:
        """Scores of every query of the batch against all senses."""
        return self.sense.attend(self.query(batch[:, 0], batch[:, 1]))


def in_batch_loss(model: TwoTowers, params: Any, batch: jax.Array) -> jax.Array:
    """Softmax over the candidates of the batch; a candidate met twice is no negative of itself."""
    scores = model.apply(params, batch) / jnp.sqrt(jnp.float32(model.dim))
    target = batch[:, 2]
    again = (target[:, None] == target[None, :]) & ~jnp.eye(len(target), dtype=bool)
    scores = jnp.where(again, -jnp.inf, scores)
    return jnp.mean(jax.nn.logsumexp(scores, axis=-1) - jnp.diag(scores))


def is_table(path: Any, leaf: Any) -> bool:
    return jax.tree_util.keystr(path).endswith("['sense']['embedding']")


def make_step(model: TwoTowers, learning_rate: float) -> tuple[Any, Any]:
    """The optimizer, and a training step that changes parameters and state in place."""
    tx = jaxaccum.lazy_rows(optax.adagrad(learning_rate, 0.0))
    grad_fn = jaxaccum.value_and_sparse_grad(
        functools.partial(in_batch_loss, model), tables=is_table
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        loss, grads = grad_fn(params, batch)
        updates, state = tx.update(grads, state, params)
        return jaxaccum.apply_updates(params, updates), state, loss

    return tx, step


def recall(model: TwoTowers, params: Any, triples: np.ndarray, k: int = 10) -> float:
    """The share of queries whose answer is among the ``k`` best of all senses but their own."""
    parts = np.split(triples, range(500, len(triples), 500))
    return sum(int(hits(model, k, params, part)) for part in parts) / len(triples)


@functools.partial(jax.jit, static_argnums=(0, 1))
def hits(model: TwoTowers, k: int, params: Any, batch: jax.Array) -> jax.Array:
    scores = model.apply(params, batch, method="scores")
    scores = scores.at[jnp.arange(len(batch)), batch[:, 0]].set(-jnp.inf)
    answer = jnp.take_along_axis(scores, batch[:, 2:], axis=-1)
    return jnp.sum(jnp.sum(scores > answer, axis=-1) < k)


def train(options: argparse.Namespace, data: dict[str, np.ndarray]) -> None:
    console = rich.console.Console()
    senses, relations = (len(str(data[name]).split("\n")) for name in ("entities", "relations"))
    model = TwoTowers(senses, relations, options.dim)
    params = jax.jit(model.init)(jax.random.key(options.seed), data["train"][:2])
    tx, step = make_step(model, options.learning_rate)
    state = tx.init(params)
    rng = np.random.default_rng(options.seed)
    report = rich.table.Table("epoch", "loss", "recall@10", "ms a step")
    for epoch in range(1, options.epochs + 1):
        order = rng.permutation(len(data["train"]))
        batches = order[: len(order) // options.batch * options.batch].reshape(-1, options.batch)
        losses, start = [], time.perf_counter()
        for picked in rich.progress.track(batches, f"epoch {epoch}", console=console):
            params, state, loss = step(params, state, data["train"][picked])
            losses.append(loss)
        mean = float(jnp.mean(jnp.stack(losses)))
        speed = (time.perf_counter() - start) / len(batches) * 1e3
        found = recall(model, params, data["valid"][: options.queries])
        report.add_row(str(epoch), f"{mean:.3f}", f"{found:.3f}", f"{speed:.1f}")
    console.print(report)
    console.print(f"recall@10 on the test set: {recall(model, params, data['test']):.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=DATA)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--queries", type=int, default=2000, help="validation queries an epoch")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        with np.load(options.data) as file:
            data = {name: file[name] for name in file.files}
        if not 0 < options.batch <= len(data["train"]) or options.epochs < 1 or options.dim < 1:
            raise ValueError(
                "--batch, --epochs and --dim must be positive, --batch within the data"
            )
    except (OSError, ValueError, KeyError) as error:
        print(f"flax_recommender: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    train(options, data)


if __name__ == "__main__":
    main()
