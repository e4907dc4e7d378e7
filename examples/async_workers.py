"""Trains embeddings of WordNet with worker threads that need not wait for each other.

Workers compute gradients of the tables as they last saw them and hand them to one accumulator,
which takes a gradient of both tables or of none. The chief takes the mean as soon as enough are
there, updates the rows touched and publishes new tables. A gradient more than --staleness updates
old is dropped and counted.

With --staleness 0 that is synchronous training. --backup starts more workers than the chief waits
for, so that a slow one holds up nobody: its gradients come too late and are dropped (Chen et al.
2016, Revisiting Distributed Synchronous SGD). Try --workers 3 --backup 1 --slow 0.5.
"""

from __future__ import annotations

import running  # before JAX: from here on Ctrl-C ends in one line

# isort: split
import argparse
import functools
import threading
import time

import complex_model as model
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

import jaxaccum


class Published:
    """The tables every worker reads, and the update they are of."""

    def __init__(self, params: model.Tables) -> None:
        self._changed = threading.Condition()
        self._now = (params, 0)
        self._is_over = False

    def put(self, params: model.Tables, step: int) -> None:
        """Publishes tables."""
        with self._changed:
            self._now = (params, step)
            self._changed.notify_all()

    def end(self) -> None:
        """Tells every worker to stop."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def get(self, after: int) -> tuple[model.Tables, int] | None:
        """The latest tables, once they are newer than update ``after``; ``None`` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._now[1] > after)
            return None if self._is_over else self._now


class Worker(threading.Thread):
    """Computes gradients until told to stop, and counts what became of them."""

    def __init__(self, number: int, run: Training) -> None:
        super().__init__(name=f"worker {number}", daemon=True)
        self.accepted = self.stale = 0
        self.loss = float("nan")
        self._number, self._run = number, run

    def run(self) -> None:
        """Works until the end."""
        run, args = self._run, self._run.args
        try:
            rng = np.random.default_rng((args.seed, self._number))
            step = -1
            # Synchronous workers give one gradient an update, the others as many as they can.
            while (now := run.published.get(-1 if args.staleness else step)) is not None:
                params, step = now
                triples = rng.choice(run.triples, args.batch)
                loss, grads = gradient(
                    params, triples, int(rng.integers(2**31)), args.negatives, args.n3
                )
                if args.slow and self._number == 0:
                    time.sleep(args.slow)
                self._hand_over(grads, step)
                self.loss = float(loss)
        except jaxaccum.CancelledError:
            pass  # the chief has all it wanted
        except BaseException as error:
            run.fail(error)

    def _hand_over(self, grads: model.Tables, step: int) -> None:
        verdict, _ = self._run.accumulator.apply_grad(grads, step, worker=self.name)
        self.accepted += verdict == jaxaccum.Verdict.ACCEPTED
        self.stale += verdict == jaxaccum.Verdict.STALE


class Training:
    """The chief: takes, updates, publishes."""

    def __init__(self, args: argparse.Namespace, graph: model.Graph) -> None:
        self.args, self.graph = args, graph
        self.triples = graph.reciprocal(graph.train)
        self.params = model.init_params(jax.random.key(args.seed), graph, args.dims)
        self.squares = jax.tree.map(jnp.zeros_like, self.params)
        self.published = Published(self.params)
        self.accumulator = jaxaccum.TreeAccumulator(
            self.params, tables=True, max_staleness=args.staleness
        )
        self.workers = [Worker(number, self) for number in range(args.workers + args.backup)]
        self.step, self.error = 0, None

    def fail(self, error: BaseException) -> None:
        """Ends the run from a worker: the chief's take raises at once."""
        self.error = error
        self.close()

    def close(self) -> None:
        """Stops the workers, and whoever waits for them."""
        self.published.end()
        self.accumulator.close()

    def run(self, console: Console) -> None:
        """Trains, with a live table of what the workers do."""
        start = time.monotonic()
        for worker in self.workers:
            worker.start()
        try:
            with Live(
                console=console, get_renderable=lambda: self.table(start), refresh_per_second=4
            ):
                try:
                    while self.step < self.args.updates:
                        self.update()
                finally:  # before the last table, which then counts all they did
                    self.close()
                    for worker in self.workers:
                        worker.join()
        except jaxaccum.CancelledError:
            raise SystemExit(f"a worker failed: {self.error!r}") from self.error

    def update(self) -> None:
        """Takes the mean gradient, updates the rows touched, publishes."""
        mean = self.accumulator.take_grad(self.args.workers)
        self.params, self.squares = adagrad(
            self.params, self.squares, mean, self.args.learning_rate
        )
        self.step += 1
        self.published.put(self.params, self.step)

    def table(self, start: float) -> Table:
        """What each worker has done so far."""
        seconds = time.monotonic() - start
        title = f"update {self.step} of {self.args.updates}, {self.step / max(seconds, 1e-9):.1f}/s"
        table = Table("thread", "accepted", "stale", "loss", title=title)
        for w in self.workers:
            table.add_row(w.name, f"{w.accepted}", f"{w.stale}", f"{w.loss:.3f}")
        accepted, stale = (sum(getattr(w, x) for w in self.workers) for x in ("accepted", "stale"))
        table.add_row("all", f"{accepted}", f"{stale}", "", style="bold")
        return table


@functools.partial(jax.jit, static_argnums=3)
def gradient(
    params: model.Tables, triples: jax.Array, seed: int, negatives: int, n3: float
) -> tuple[jax.Array, model.Tables]:
    """The loss of a batch, and its gradient: only the rows looked up."""
    key = jax.random.key(seed)
    lookups = model.sample_lookups(key, triples, negatives, params.entities.shape[0])
    return model.sparse_grads(params, lookups, n3)


@functools.partial(jax.jit, donate_argnums=1)
def adagrad(
    params: model.Tables, squares: model.Tables, grads: model.Tables, learning_rate: float
) -> tuple[model.Tables, model.Tables]:
    """Updates the rows of ``grads``. Workers still read ``params``, so those are copied."""
    new = [
        model.adagrad_rows(table, sums, grad, learning_rate)
        for table, sums, grad in zip(params, squares, grads, strict=True)
    ]
    tables, sums = (model.Tables(*column) for column in zip(*new, strict=True))
    return tables, sums


def make_parser() -> running.Parser:
    parser = running.Parser(__file__, __doc__)
    options = [
        ("--workers", 4, 1, "gradients the chief waits for, and workers"),
        ("--backup", 0, 0, "workers beyond those the chief waits for"),
        ("--staleness", 2, 0, "updates a gradient may be old; 0 is synchronous"),
        ("--updates", 1000, 1, "of the tables"),
        ("--batch", 1024, 1, "triples a gradient is computed from"),
        ("--negatives", 512, 1, "random entities a batch is told from"),
        ("--dims", 50, 1, "complex dimensions"),
        ("--learning-rate", 0.1, 0, "of Adagrad"),
        ("--n3", 0.01, 0, "weight of the N3 regulariser"),
        ("--slow", 0.0, 0, "seconds the first worker loses at each gradient"),
        ("--test-triples", 500, 1, "test triples to rank at the end"),
        ("--seed", 0, 0, "of tables, batches and negatives"),
    ]
    for flag, default, low, text in options:
        parser.number(flag, default, text, low)
    parser.file("--data", model.DATA, "the graph, WordNet 3.0 by default")
    return parser


def work(args: argparse.Namespace) -> None:
    console = Console()
    try:
        graph = model.load_graph(args.data)
    except ValueError as error:
        raise running.UserError(str(error)) from error
    training = Training(args, graph)
    training.run(console)
    if not console.is_terminal:
        console.line()
    ranks = model.filtered_ranks(training.params, graph, graph.test[: args.test_triples])
    metrics = model.ranking_metrics(ranks)
    stale = sum(worker.stale for worker in training.workers)
    updates, dropped = (
        running.count(n, thing)
        for n, thing in ((training.step, "update"), (stale, "stale gradient"))
    )
    console.print(f"{updates}, {dropped} dropped")
    console.print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    return parser.run(lambda: work(args))


if __name__ == "__main__":
    raise SystemExit(main())
