"""Trains embeddings of all of WordNet by worker processes and a parameter server, on Ray.

The table of entities lies in shards, one process each, with its optimizer state. Workers pull the
rows of a batch, compute their gradient and push it; the server takes a step when enough are there.
--policy says which gradients count, --kill kills workers and processes of the server on the way:
the run goes on, and the table at the end shows what became of every gradient.

Needs pip install 'jaxaccum[examples,ray]'. Runs on this machine, or with --address on a cluster.
"""

from __future__ import annotations

import running  # before JAX: from here on Ctrl-C ends in one line

# isort: split
import argparse
import collections
import logging
import os
import pathlib
import signal
import tempfile
import time
from typing import Any

import complex_model as model
import jax
import numpy as np
import optax
import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jaxaccum
import jaxaccum.ray

Args = argparse.Namespace
TABLES = model.Tables(entities=True, relations=False)  # each step touches all relations
CHUNK = 10  # gradients a worker is asked for at a time: a look at it after each
POLICIES = {
    "sync": "a step waits for its gradients, and workers for the step: as the synchronous example",
    "bounded": "gradients up to --staleness steps old count",
    "weighted": "they count the less the older they are",
    "exactly": "a step uses no more gradients than it needs, the rest stay for the next",
    "carry-over": "older ones are added too, but no step waits for them",
}


class Worker:
    """An actor that pulls, differentiates and pushes.

    Args:
      server: what it talks to.
      name: under which the server counts its gradients.
      triples: int32 ``[n, 3]`` to learn.
      args: the options.
      life: how many have had this name before it died.
    """

    def __init__(
        self,
        server: jaxaccum.ray.ParameterServer,
        name: str,
        triples: np.ndarray,
        args: Args,
        life: int,
    ) -> None:
        self._server, self._name, self._triples, self._args = server, name, triples, args
        self._rng = np.random.default_rng([args.seed, life, *name.encode()])
        self._order, self._number, self._step = np.empty(0, np.int64), 0, 0
        self._prefix = f"{name}/{life}"
        self._gradient = jax.jit(self._loss_and_gradient)

    def pid(self) -> int:
        """The process, for those who want to kill it."""
        return os.getpid()

    def run(self, number: int) -> float:
        """Hands over so many gradients, returns their mean loss; their fate the server knows."""
        return float(np.mean([self._push_one() for _ in range(number)]))

    def _push_one(self) -> float:
        ids, relations = self._next_batch()
        # Synchronously, a worker waits for the step after the one it has given a gradient to.
        wanted = model.Tables(ids, None)
        rows, step = self._server.pull(wanted, at_least=self._step)
        loss, (values, dense) = self._gradient(rows, relations)
        shape = (self._args.num_entities, values.shape[1])
        grads = model.Tables(jaxaccum.IndexedSlices(ids, np.asarray(values), shape), dense)
        key = f"{self._prefix}/{self._number}"
        self._server.push(grads, step, worker=self._name, key=key)
        self._number += 1
        if self._args.policy == "sync":
            self._step = step + 1
        return float(loss)

    def _next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows a batch looks up, and its relations; all triples in an order of its own."""
        args = self._args
        if len(self._order) < args.batch:
            self._order = self._rng.permutation(len(self._triples))
        chosen, self._order = self._order[: args.batch], self._order[args.batch :]
        heads, relations, tails = self._triples[chosen].T
        negatives = self._rng.integers(0, args.num_entities, args.negatives, dtype=np.int32)
        return np.concatenate([heads, tails, negatives]), relations

    def _loss_and_gradient(
        self, rows: model.Tables, relations: jax.Array
    ) -> tuple[jax.Array, model.Tables]:
        def loss(rows: model.Tables) -> jax.Array:
            return model.loss(model.Tables(rows.entities, rows.relations[relations]), self._args.n3)

        return jax.value_and_grad(loss)(rows)


class Training:
    """The driver: starts workers, kills some, and looks at how far the server is."""

    def __init__(self, args: Args, graph: model.Graph, folder: str) -> None:
        self.args, self.graph = args, graph
        args.num_entities = len(graph.entities)
        params = model.init_params(jax.random.key(args.seed), graph, args.dims)
        self.server = jaxaccum.ray.ParameterServer(
            params,
            optax.adagrad(args.learning_rate, 0.0, eps=model.ADAGRAD_EPS),
            tables=TABLES,
            num_required=args.required,
            num_shards=args.shards,
            shared_name=f"wordnet {os.getpid()}",
            checkpoint_dir=folder,
            checkpoint_every=args.checkpoint_every,
            timeout=args.timeout,
            **policy_options(args),
        )
        self._triples = ray.put(graph.reciprocal(graph.train[: args.train_triples]))
        self._rng = np.random.default_rng(args.seed)
        self._running: dict[Any, tuple[int, Any]] = {}
        self._lives: collections.Counter[int] = collections.Counter()
        self.died: collections.Counter[int] = collections.Counter()
        self.loss = float("nan")

    def run(self, console: Console) -> None:
        """Trains until the server has taken its steps."""
        args = self.args
        for k in range(args.workers):
            self._start_worker(k)
        kills = list(np.linspace(0, args.updates, args.kill + 2)[1:-1])
        with progress_bar(console) as bar:
            task = bar.add_task("", total=args.updates, note="")
            while (steps := self._look(bar, task)) < args.updates:
                while kills and steps >= kills[0]:
                    kills.pop(0)
                    self._kill(args.kill - len(kills), console)
                self._wait_for_workers()
        # What is on its way may arrive or not; nothing more is counted after this.
        for _, worker in self._running.values():
            ray.kill(worker)

    def _look(self, bar: Progress, task: Any) -> int:
        self.statistics = self.server.statistics()
        steps = self.statistics["num_steps"]
        counts = f"{self.statistics['accepted']} accepted, {self.statistics['stale']} stale"
        note = f"loss {self.loss:.4f}, {counts}, {self.statistics['lost']} lost"
        bar.update(task, completed=min(steps, self.args.updates), note=note)
        return steps

    def _start_worker(self, k: int) -> None:
        name = f"worker {k} of {os.getpid()}, life {self._lives[k]}"
        actor = ray.remote(Worker).options(name=name, num_cpus=self.args.cpus_per_worker)
        worker = actor.remote(self.server, f"worker {k}", self._triples, self.args, self._lives[k])
        self._lives[k] += 1
        self._running[worker.run.remote(CHUNK)] = (k, worker)

    def _wait_for_workers(self) -> None:
        """Gives more to those that have done what they were asked, and replaces the dead."""
        done, _ = ray.wait(list(self._running), timeout=1.0)
        for call in done:
            k, worker = self._running.pop(call)
            try:
                loss = ray.get(call)
            except ray.exceptions.RayActorError:
                self.died[k] += 1
                self._start_worker(k)
                continue
            self.loss = loss if np.isnan(self.loss) else 0.9 * self.loss + 0.1 * loss
            self._running[worker.run.remote(CHUNK)] = (k, worker)

    def _kill(self, number: int, console: Console) -> None:
        """Kills two workers, then a shard, two workers, then the coordinator, and again."""
        if number % 3:
            k, worker = list(self._running.values())[self._rng.integers(len(self._running))]
            ray.kill(worker)
            console.print(f"killed worker {k}")
            return
        shards = [shard["pid"] for shard in self.statistics["shards"] if shard]
        others = shards[1:] or shards  # the first is the coordinator
        victim = self._rng.choice(others) if number % 2 else self.statistics["pid"]
        os.kill(int(victim), signal.SIGKILL)
        console.print(f"killed {'a shard' if number % 2 else 'the coordinator'}, process {victim}")


def policy_options(args: Args) -> dict[str, Any]:
    """The server's arguments of a policy."""
    options: dict[str, Any] = {"max_staleness": 0 if args.policy == "sync" else args.staleness}
    if args.policy == "weighted":
        options["staleness_weight"] = lambda staleness: 1 / (1.0 + staleness)
    return options | {
        "exactly": args.policy == "exactly",
        "carry_over": args.policy == "carry-over",
    }


def progress_bar(console: Console) -> Progress:
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} steps, {task.fields[note]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console)


def fates(training: Training) -> Table:
    """What became of every gradient that reached the server, and how many did not."""
    server, num_workers = training.server, training.args.workers
    statistics, lost = server.statistics(), server.lost()
    lost_of = collections.Counter(key.split("/")[0] for key in lost)
    table = Table(title="What became of every gradient")
    for name in ("", "accepted", "stale", "lost with a server", "lost with their worker"):
        table.add_column(name, justify="left" if name == "" else "right")
    for k in range(num_workers):
        name = f"worker {k}"
        of_it = statistics["workers"].get(name, {"accepted": 0, "stale": 0})
        row = (of_it["accepted"], of_it["stale"], lost_of[name], training.died[k])
        table.add_row(name, *map(str, row))
    total = (statistics["accepted"], statistics["stale"], len(lost), sum(training.died.values()))
    table.add_row("all", *map(str, total), style="bold")
    ages = ", ".join(
        f"{count} were {age}" for age, count in sorted(statistics["staleness"].items())
    )
    waiting = statistics["num_accumulated"]
    table.caption = (
        f"{statistics['accepted'] - waiting} of those accepted are in {statistics['num_steps']} "
        f"steps, {waiting} wait for the next. Steps old: {ages}. With its worker dies one at most, "
        "that it had not handed over."
    )
    return table


def parse(argv: list[str] | None) -> tuple[running.Parser, Args]:
    parser = running.Parser(__file__, __doc__)
    options = [
        ("--workers", 4, 1, "processes that compute gradients"),
        ("--shards", 2, 1, "processes the table of entities lies on"),
        ("--required", 4, 1, "gradients a step is made of"),
        ("--staleness", 4, 0, "steps a gradient may be old, but for --policy sync"),
        ("--updates", 3460, 1, "steps; the default is 20 times all triples from both ends"),
        ("--kill", 0, 0, "kills on the way: workers, and every third one of the server's"),
        ("--checkpoint-every", 50, 1, "steps between checkpoints"),
        ("--batch", 1024, 1, "triples a gradient is computed from"),
        ("--negatives", 512, 1, "random entities a batch is told from"),
        ("--dims", 50, 1, "complex dimensions"),
        ("--learning-rate", 0.1, 0, "of Adagrad"),
        ("--n3", 0.01, 0, "weight of the N3 regulariser"),
        ("--cpus-per-worker", 0.0, 0, "what Ray reserves for each"),
        ("--timeout", 120.0, 0, "seconds a call of the server may take"),
        ("--train-triples", 2**31 - 1, 1, "train on the first so many only"),
        ("--test-triples", 5000, 1, "test triples to rank at the end"),
        ("--seed", 0, 0, "of tables, batches and negatives"),
    ]
    for flag, default, low, text in options:
        parser.number(flag, default, text, low)
    policies = "; ".join(f"{name}: {text}" for name, text in POLICIES.items())
    parser.add_argument("--policy", choices=POLICIES, default="bounded", help=policies)
    parser.file("--data", model.DATA, "the graph, WordNet 3.0 by default")
    parser.file("--out", None, "for checkpoints; without it none is kept", "FOLDER")
    parser.add_argument("--address", default="local", help="of a Ray cluster; --kill is for none")
    args = parser.parse_args(argv)
    if args.policy == "sync" and args.required > args.workers:
        parser.error("--policy sync needs as many --workers as gradients --required")
    return parser, args


def work(args: Args) -> None:
    console = Console()
    try:
        graph = model.load_graph(args.data)
    except ValueError as error:
        raise running.UserError(str(error)) from error
    if not ray.is_initialized():
        here = str(pathlib.Path(__file__).parent)
        # The actors import the model from beside this file.
        ray.init(
            args.address,
            runtime_env={"env_vars": {"PYTHONPATH": here}},
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=False if args.address == "local" else None,
        )
    with tempfile.TemporaryDirectory() as scratch:
        training = Training(args, graph, str(args.out or scratch))
        start = time.monotonic()
        training.run(console)
        seconds = time.monotonic() - start
        console.print(fates(training))
        statistics = training.server.statistics()
        every = model.Tables(np.arange(args.num_entities, dtype=np.int32), None)
        params = training.server.pull(every).values
        training.server.close()
    console.print(
        f"{statistics['num_steps']} steps in {seconds:.1f} s, {statistics['restarts']} restarts of "
        "the server"
    )
    ranks = model.filtered_ranks(params, graph, graph.test[: args.test_triples])
    metrics = model.ranking_metrics(ranks)
    console.print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def main(argv: list[str] | None = None) -> int:
    parser, args = parse(argv)
    return parser.run(lambda: work(args))


if __name__ == "__main__":
    raise SystemExit(main())
