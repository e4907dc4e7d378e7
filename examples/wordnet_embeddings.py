"""Trains ComplEx embeddings of all of WordNet 3.0 on gradients that never leave the rows touched.

The loss is a plain function of whole tables. Each step accumulates its gradients over several
micro-batches by row and runs optax's Adagrad on their mean and on the rows it holds, all in one
jitted, donated scan. Without arguments it reproduces the figures of the README; --help explains
the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import resource
import signal
import sys
import tempfile
import time
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import complex_model as model
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jaxaccum

Args = argparse.Namespace
ROWS = model.Tables(entities=True, relations=False)  # each step touches all relations
CHUNKS_PER_EPOCH = 8  # calls of the compiled scan, and looks at the progress bar, in an epoch
NOT_IN_SETTINGS = ("data", "epochs", "near", "out", "plot", "resume", "save_every", "test_triples")
console = Console(highlight=False)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        """Leaves out the usage, which --help prints."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class UserError(Exception):
    """Something only the user can put right."""


class State(NamedTuple):
    """All that training carries from one micro-batch to the next."""

    params: model.Tables
    optimizer: Any  # Adagrad's sums of squares, and the gradients accumulated so far
    micro_step: jax.Array


@dataclasses.dataclass
class Run:
    """How far training has come, and what it has seen on the way."""

    chunk: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    mrr: list[list[float]] = dataclasses.field(default_factory=list)  # (epoch, MRR) pairs


def parse(argv: list[str] | None) -> tuple[Parser, Args]:
    parser = Parser(pathlib.Path(__file__).name, description=__doc__)

    def number(flag: str, default: float | None, text: str, low: float = 1) -> None:
        kind = at_least(low, float if isinstance(default, float) else int)
        text += "" if default is None else f" (default: {default})"
        parser.add_argument(flag, default=default, type=kind, metavar="N", help=text)

    number("--epochs", 20, "passes over the triples, each seen from both ends")
    number("--batch", 4096, "triples an update of the tables is computed from")
    number("--micro-batches", 4, "gradients accumulated for an update")
    number("--negatives", 512, "random entities a micro-batch is told from")
    number("--dims", 50, "complex dimensions")
    number("--learning-rate", 0.1, "of Adagrad", low=0)
    number("--n3", 0.01, "weight of the N3 regulariser", low=0)
    number("--init-scale", 0.05, "standard deviation of the tables at first", low=0)
    number("--seed", 0, "of tables, order and negatives", low=0)
    number("--save-every", 5, "epochs between checkpoints")
    number("--train-triples", None, "train on the first N only, for a quick look")
    number("--test-triples", None, "rank the first N only, for a quick look")
    add = parser.add_argument
    add("--near", nargs="+", default=[], metavar="SYNSET", help="print the nearest: dog.n.01 ...")
    path, out = pathlib.Path, pathlib.Path("runs/wordnet")
    text = f"for embeddings.npz and checkpoint.npz (default: {out})"
    add("--out", type=path, default=out, metavar="FOLDER", help=text)
    add("--plot", type=path, metavar="FILE", help="draw loss and MRR (.png, .pdf or .svg)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, bit for bit")
    text = "differentiate and update whole tables with optax instead, to compare"
    add("--dense", action="store_true", help=text)
    text = "the graph (default: WordNet 3.0, which lies beside this file)"
    add("--data", type=path, default=model.DATA, metavar="FILE", help=text)
    args = parser.parse_args(argv)
    if args.batch % args.micro_batches:
        parser.error(f"--batch {args.batch} is no multiple of --micro-batches {args.micro_batches}")
    return parser, args


def at_least(low: float, kind: type) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value < 2**31:
            raise argparse.ArgumentTypeError(f"must be at least {low} and below 2**31, got {text}")
        return value

    return number


def init_state(key: jax.Array, graph: model.Graph, args: Args) -> State:
    params = model.init_params(key, graph, args.dims, args.init_scale)
    return State(params, optimizer(args, len(graph.entities)).init(params), jnp.int32(0))


def optimizer(args: Args, num_entities: int) -> Any:
    """Adagrad on the mean gradient of so many micro-batches, of rows or of whole tables."""
    adagrad = optax.adagrad(args.learning_rate, 0.0, eps=model.ADAGRAD_EPS)
    if args.dense:
        return optax.MultiSteps(adagrad, args.micro_batches)
    # No step can touch more rows than this, so that nothing is ever refused.
    touched = args.micro_batches * args.negatives + 2 * args.batch
    capacity = min(touched, num_entities)
    return jaxaccum.accumulate(adagrad, args.micro_batches, tables=ROWS, capacity=capacity)


def train_chunk(
    args: Args, num_entities: int, state: State, batches: jax.Array, key: jax.Array
) -> tuple[State, jax.Array]:
    """Scans over micro-batches, int32 ``[n, B, 3]``; returns the state and ``n`` losses."""
    tx = optimizer(args, num_entities)

    def micro_step(state: State, triples: jax.Array) -> tuple[State, jax.Array]:
        # The stream of negatives is a function of the micro-step: nothing else has to be resumed.
        draw = jax.random.fold_in(key, state.micro_step)
        lookups = model.sample_lookups(draw, triples, args.negatives, num_entities)

        def loss(params: model.Tables) -> jax.Array:
            return model.loss(model.gather(params, lookups), args.n3)

        sparse_grad = functools.partial(jaxaccum.value_and_sparse_grad, tables=ROWS)
        value_and_grad = jax.value_and_grad if args.dense else sparse_grad
        value, grads = value_and_grad(loss)(state.params)
        updates, opt_state = tx.update(grads, state.optimizer, state.params)
        # All change in place: XLA copies nothing through the optimizer's branches, nor the scan.
        params = jaxaccum.apply_updates(state.params, updates)
        return State(params, opt_state, state.micro_step + 1), value

    return jax.lax.scan(micro_step, state, batches)


def train(
    args: Args, graph: model.Graph, state: State, run: Run, key: jax.Array
) -> tuple[State, str]:
    """Trains to the last epoch or until interrupted; returns the state and what it cost."""
    triples = graph.reciprocal(graph.train[: args.train_triples])
    micro = args.batch // args.micro_batches
    shape = (CHUNKS_PER_EPOCH, len(triples) // micro // CHUNKS_PER_EPOCH, micro)
    if shape[1] == 0:
        raise UserError(f"{len(triples)} triples are too few for {CHUNKS_PER_EPOCH} x {micro}")
    start, before = time.perf_counter(), peak_memory()
    step = jax.jit(functools.partial(train_chunk, args, len(graph.entities)), donate_argnums=0)
    chunk = jax.ShapeDtypeStruct((*shape[1:], 3), jnp.int32)
    step = step.lower(state, chunk, key).compile()
    compile_s, batches, times, peak = time.perf_counter() - start, None, [], 0
    with progress_bar() as bar, interruption() as is_interrupted:
        total = args.epochs * CHUNKS_PER_EPOCH
        task = bar.add_task("", total=total, completed=run.chunk, note="")
        while run.chunk < total and not (times and is_interrupted()):
            epoch, part = divmod(run.chunk, CHUNKS_PER_EPOCH)
            start = time.perf_counter()
            if batches is None or part == 0:
                batches = model.shuffled_batches(triples, args.seed, epoch, shape)
            state, losses = step(state, batches[part], key)
            run.losses.append(float(np.mean(losses)))
            times.append(time.perf_counter() - start)
            peak = peak or peak_memory()  # before the first ranking
            run.chunk += 1
            end_chunk(args, graph, state, run)
            mrr = f", MRR of 250 valid {run.mrr[-1][1]:.3f}" if run.mrr else ""
            note = f"epoch {epoch + 1}/{args.epochs}, loss {run.losses[-1]:.4f}{mrr}"
            bar.update(task, completed=run.chunk, note=note)
    ms = 1e3 * sum(times) / len(times) / shape[1] * args.micro_batches
    scratch = step.memory_analysis().temp_size_in_bytes
    return state, (
        f"[bold]{ms:.2f} ms a step[/bold]: trained {sum(times):.1f} s, compiled {compile_s:.1f} s\n"
        f"[bold]{peak / 1e6:.0f} MB peak memory[/bold]: {before / 1e6:.0f} MB before training, "
        f"{scratch / 1e6:.0f} MB scratch of the scan"
    )


def end_chunk(args: Args, graph: model.Graph, state: State, run: Run) -> None:
    """Looks at the loss; validates after each epoch, and saves after some."""
    if not np.isfinite(run.losses[-1]):
        raise UserError("the loss is no number any more: try a lower --learning-rate")
    epoch, part = divmod(run.chunk, CHUNKS_PER_EPOCH)
    if part == 0:
        ranks = model.filtered_ranks(state.params, graph, graph.valid[:250])
        run.mrr.append([epoch, model.ranking_metrics(ranks)["MRR"]])
        if epoch % args.save_every == 0:
            save(args, state, run)


def peak_memory() -> int:
    """Bytes, since the process began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux


def progress_bar() -> Progress:
    columns = (BarColumn(), TextColumn("{task.percentage:.0f}%  {task.fields[note]}, left"))
    return Progress(*columns, TimeRemainingColumn(), console=console)


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Lets the chunk in progress end on Ctrl-C, for its state is lost half-way; twice kills."""
    seen: list[int] = []

    def note(signum: int, frame: types.FrameType | None) -> None:
        seen.append(signum)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def save(args: Args, state: State, run: Run) -> None:
    """Writes the checkpoint: every leaf of the state, accumulators in mid-accumulation included."""
    settings = {name: v for name, v in vars(args).items() if name not in NOT_IN_SETTINGS}
    about = json.dumps({"settings": settings, "run": dataclasses.asdict(run)})
    leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    partial = args.out / "partial.npz"
    np.savez(partial, about=about, **leaves)
    partial.replace(args.out / "checkpoint.npz")  # so that a checkpoint is always a whole one


def load(args: Args, template: State) -> tuple[State, Run]:
    path = args.out / "checkpoint.npz"
    try:
        with path.open("rb") as file, np.load(file) as archive:
            arrays = dict(archive)
        about = json.loads(str(arrays.pop("about")))
        before, run = about["settings"], Run(**about["run"])
    except FileNotFoundError:
        raise UserError(f"nothing to resume: there is no {path}") from None
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged or no checkpoint ({error})") from error
    for name, value in before.items():
        if vars(args).get(name) != value:
            raise UserError(f"{path} was made with {name} {value}, not {vars(args).get(name)}")
    leaves, structure = jax.tree.flatten(template)
    found = [arrays.get(f"leaf_{i}", np.empty(0)) for i in range(len(leaves))]
    if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in leaves]:
        raise UserError(f"{path} holds tables of another graph or another version of jaxaccum")
    return jax.tree.unflatten(structure, [jnp.asarray(x) for x in found]), run


def print_metrics(args: Args, graph: model.Graph, params: model.Tables) -> None:
    triples = graph.test[: args.test_triples]
    start = time.perf_counter()
    with console.status(f"ranking all entities for {2 * len(triples):,} questions"):
        tails, heads = np.split(model.filtered_ranks(params, graph, triples), 2)
    seconds, is_linked = time.perf_counter() - start, graph.is_linked(triples)
    table = Table(title=f"Filtered ranks among {len(graph.entities):,} entities")
    for name in ("test triples", "questions", "MRR", "Hits@1", "Hits@3", "Hits@10"):
        table.add_column(name, justify="left" if name == "test triples" else "right")
    rows = {
        "all": np.concatenate([tails, heads]),
        "(head, relation, ?)": tails,
        "(?, relation, tail)": heads,
        "pair not linked in train": np.concatenate([tails[~is_linked], heads[~is_linked]]),
    }
    for name, ranks in rows.items():
        figures = model.ranking_metrics(ranks).values() if len(ranks) else []
        table.add_row(name, f"{len(ranks):,}", *(f"{x:.4f}" for x in figures))
    console.print(table)
    console.print(
        f"Ties count against the model. As in WN18, {np.mean(is_linked):.1%} of the pairs stand in "
        "train with another relation, mostly the inverse: this tests whether the relations were "
        f"learnt, not the guessing of new facts. Ranking took {seconds:.1f} s."
    )


def print_nearest(graph: model.Graph, params: model.Tables, rows: list[int]) -> None:
    entities = np.asarray(params.entities)
    relation = {(h, t): graph.relations[r] for h, r, t in graph.train.tolist()}
    for row in rows:
        title = f"Nearest to {graph.entities[row]}"
        table = Table("synset", "cosine", "its relation in WordNet", title=title)
        for other, cosine in model.nearest(entities, row):
            table.add_row(graph.entities[other], f"{cosine:.3f}", relation.get((row, other), ""))
        console.print(table)
    if rows:
        noise = np.random.default_rng(0).normal(size=(1, entities.shape[1])).astype(np.float32)
        _, chance = model.nearest(np.concatenate([noise, entities]), 0, 1)[0]
        console.print(f"By chance: a random row has a neighbour of cosine {chance:.2f}.")


def plot(path: pathlib.Path, run: Run) -> None:
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    epochs = np.arange(1, len(run.losses) + 1) / CHUNKS_PER_EPOCH
    left.semilogy(epochs, run.losses, color="tab:blue", label="training loss")
    left.set(xlabel="epoch", ylabel="training loss", title="ComplEx on WordNet 3.0")
    right = left.twinx()
    right.plot(*np.reshape(run.mrr, (-1, 2)).T, "o-", color="tab:orange", label="MRR")
    right.set(ylabel="filtered MRR of 250 validation triples", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def check_writable(args: Args) -> None:
    """Now, not after a minute of training."""
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot must end in .png, .pdf or .svg, got {args.plot}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for folder in (args.out, args.plot.parent if args.plot else args.out):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write there: {error}") from error


def work(args: Args) -> int:
    check_writable(args)
    try:
        graph = model.load_graph(args.data)
        near = graph.rows(args.near)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    init_key, key = jax.random.split(jax.random.key(args.seed))
    fresh = functools.partial(init_state, init_key, graph, args)
    state, run = load(args, jax.eval_shape(fresh)) if args.resume else (fresh(), Run())
    console.print(
        f"{len(graph.entities):,} entities, {len(graph.relations)} relations, "
        f"{len(graph.train):,} triples; jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        + ("whole tables, optax" if args.dense else "rows touched, jaxaccum")
    )
    total = args.epochs * CHUNKS_PER_EPOCH
    if run.chunk < total:
        state, costs = train(args, graph, state, run, key)
        save(args, state, run)
        console.print(costs)
    if args.plot:
        plot(args.plot, run)
    if run.chunk < total:
        console.print(f"interrupted, and saved in {args.out}: go on with --resume")
        return 130
    names = {name: "\n".join(getattr(graph, name)) for name in model.Tables._fields}
    tables = {f"{name}_table": np.asarray(t) for name, t in state.params._asdict().items()}
    np.savez(args.out / "embeddings.npz", **names, **tables)
    print_metrics(args, graph, state.params)
    print_nearest(graph, state.params, near)
    console.print(f"embeddings and checkpoint: {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser, args = parse(argv)
    try:
        return work(args)
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
