"""A two-tower recommender in Flax: for a word sense and a relation, which senses go with them?

Queries and candidates are rows of one table, of all WordNet senses. A step looks 1,024 of them up;
``jaxaccum.value_and_sparse_grad`` gives their gradient as rows, ``jaxaccum.lazy_rows`` runs optax's
Adagrad on these and touches no others. The few relations and the network stay dense.
"""

from __future__ import annotations

import running  # before JAX: from here on Ctrl-C ends in one line

# isort: split
import argparse
import functools
import pathlib
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
        losses, start = [], 0.0
        for picked in rich.progress.track(batches, f"epoch {epoch}", console=console):
            params, state, loss = step(params, state, data["train"][picked])
            losses.append(loss)
            if len(losses) == 1:  # the first step compiles
                loss.block_until_ready()
                start = time.perf_counter()
        mean = float(jnp.mean(jnp.stack(losses)))
        speed = 1e3 * (time.perf_counter() - start) / max(len(batches) - 1, 1)
        found = recall(model, params, data["valid"][: options.queries])
        told = f"{speed:.1f}" if len(batches) > 1 else ""
        report.add_row(str(epoch), f"{mean:.3f}", f"{found:.3f}", told)
    console.print(report)
    console.print(f"recall@10 on the test set: {recall(model, params, data['test']):.3f}")


def make_parser() -> running.Parser:
    parser = running.Parser(__file__, __doc__)
    parser.number("--epochs", 3, "passes over the links")
    parser.number("--batch", 512, "links an update is computed from")
    parser.number("--dim", 64, "numbers a sense")
    parser.number("--queries", 2000, "links of the validation set to rank after each epoch")
    parser.number("--learning-rate", 0.1, "of Adagrad", low=0)
    parser.number("--seed", 0, "of parameters and order", low=0)
    parser.file("--data", DATA, "the graph, WordNet 3.0 by default")
    return parser


def work(options: argparse.Namespace) -> None:
    try:
        with np.load(options.data) as file:
            data = {name: file[name] for name in file.files}
        num_links = len(data["train"])
    except (ValueError, KeyError) as error:
        raise running.UserError(f"{options.data} is no knowledge graph ({error})") from error
    if options.batch > num_links:
        raise running.UserError(f"--batch {options.batch} is more than the {num_links} links")
    train(options, data)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    return parser.run(lambda: work(options))


if __name__ == "__main__":
    raise SystemExit(main())
