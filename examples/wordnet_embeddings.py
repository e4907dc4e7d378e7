"""Trains ComplEx embeddings of all of WordNet 3.0 on gradients that never leave the rows touched.

The loss is a plain function of whole tables. Each step accumulates its gradients over several
micro-batches by row and runs optax's Adagrad on their mean and on the rows it holds, all in one
jitted, donated scan. --near asks the embeddings that an earlier run has saved.
"""

from __future__ import annotations

import running  # before JAX: from here on Ctrl-C ends in one line

# isort: split
import argparse
import dataclasses
import functools
import json
import pathlib
import resource
import sys
import tempfile
import time
import zipfile
import zlib
from typing import Any, NamedTuple

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
MARKS = {"train": "", "valid": "*", "test": "*", None: "?"}
NOT_IN_SETTINGS = ("data", "epochs", "near", "out", "plot", "resume", "save_every", "test_triples")
console = Console(highlight=False)


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


def make_parser() -> running.Parser:
    parser = running.Parser(__file__, __doc__)
    number, add = parser.number, parser.add_argument
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
    text = "train nothing: what the embeddings in --out say of dog.n.01 ..."
    add("--near", nargs="+", default=[], metavar="SYNSET", help=text)
    text = "folder for embeddings.npz and checkpoint.npz"
    parser.file("--out", pathlib.Path("runs/wordnet"), text, "FOLDER")
    parser.file("--plot", None, "draw loss and MRR (.png, .pdf or .svg)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, bit for bit")
    text = "differentiate and update whole tables with optax instead, to compare"
    add("--dense", action="store_true", help=text)
    parser.file("--data", model.DATA, "the graph, WordNet 3.0 by default")
    return parser


def parse(argv: list[str] | None) -> tuple[running.Parser, Args]:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.batch % args.micro_batches:
        parser.error(f"--batch {args.batch} is no multiple of --micro-batches {args.micro_batches}")
    return parser, args


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
        raise running.UserError(
            f"{len(triples)} triples are too few for {CHUNKS_PER_EPOCH} x {micro}"
        )
    start, before = time.perf_counter(), peak_memory()
    step = jax.jit(functools.partial(train_chunk, args, len(graph.entities)), donate_argnums=0)
    chunk = jax.ShapeDtypeStruct((*shape[1:], 3), jnp.int32)
    step = step.lower(state, chunk, key).compile()
    compile_s, batches, times, peak = time.perf_counter() - start, None, [], 0
    with progress_bar() as bar, running.interruption() as is_interrupted:
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
        raise running.UserError("the loss is no number any more: try a lower --learning-rate")
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


def save(args: Args, state: State, run: Run) -> None:
    """Writes the checkpoint: every leaf of the state, accumulators in mid-accumulation included."""
    settings = {name: v for name, v in vars(args).items() if name not in NOT_IN_SETTINGS}
    about = json.dumps({"settings": settings, "run": dataclasses.asdict(run)})
    leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    partial = args.out / "partial.npz"
    np.savez(partial, about=about, **leaves)
    partial.replace(args.out / "checkpoint.npz")  # so that a checkpoint is always a whole one
    epochs = run.chunk / CHUNKS_PER_EPOCH
    running.has_saved(
        f"{args.out / 'checkpoint.npz'}, after {epochs:g} epochs; go on with --resume"
    )


def load(args: Args, template: State) -> tuple[State, Run]:
    path = args.out / "checkpoint.npz"
    try:
        with path.open("rb") as file, np.load(file) as archive:
            arrays = dict(archive)
        about = json.loads(str(arrays.pop("about")))
        before, run = about["settings"], Run(**about["run"])
    except FileNotFoundError:
        raise running.UserError(f"nothing to resume: there is no {path}") from None
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, EOFError) as error:
        raise running.UserError(f"{path} is damaged or no checkpoint ({error})") from error
    for name, value in before.items():
        if vars(args).get(name) != value:
            raise running.UserError(
                f"{path} was made with {name} {value}, not {vars(args).get(name)}"
            )
    leaves, structure = jax.tree.flatten(template)
    found = [arrays.get(f"leaf_{i}", np.empty(0)) for i in range(len(leaves))]
    if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in leaves]:
        raise running.UserError(
            f"{path} holds tables of another graph or another version of jaxaccum"
        )
    return jax.tree.unflatten(structure, [jnp.asarray(x) for x in found]), run


def print_metrics(args: Args, graph: model.Graph, params: model.Tables) -> None:
    triples = graph.test[: args.test_triples]
    start = time.perf_counter()
    with console.status(f"ranking all entities for {2 * len(triples):,} questions"):
        tails, heads = np.split(model.filtered_ranks(params, graph, triples), 2)
    seconds, is_linked = time.perf_counter() - start, graph.is_linked(triples)
    whole = "all" if len(triples) == len(graph.test) else "the first"
    title = (
        f"Filtered ranks among {len(graph.entities):,} entities: {whole} {len(triples):,} triples"
    )
    table = Table(title=f"{title} of the test split")
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
        f"Ties count against the model. For {np.mean(is_linked):.1%} of these triples train holds "
        "another relation of the same two synsets, mostly the inverse one: high figures say that "
        "relations were learnt, not that new facts were guessed. The split is this project's own, "
        f"so no published figure compares. Ranking took {seconds:.1f} s."
    )


def answer(args: Args) -> int:
    """What the saved embeddings say of some synsets, without training anything."""
    graph = model.load_graph(args.data)
    rows, path = graph.rows(args.near), args.out / "embeddings.npz"
    if not path.exists():
        raise running.UserError(f"there is no {path} yet: train first, without --near")
    with np.load(path) as file:
        tables = model.Tables(file["entities_table"], file["relations_table"])
        if str(file["entities"]).split("\n") != graph.entities:
            raise running.UserError(f"{path} holds embeddings of another graph")
    for row in rows:
        table = Table("relation", "best answers", title=graph.entities[row], title_justify="left")
        for relation, found in model.best_answers(tables, graph, row):
            told = (f"{graph.entities[other]}{MARKS[split]}" for other, split in found)
            table.add_row(graph.relations[relation], ", ".join(told))
        console.print(table)
    console.print("As many answers as are true, three at most; * kept back from training; ? wrong")
    return 0


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
    running.readable_ticks(left.yaxis)
    left.xaxis.get_major_locator().set_params(integer=True)
    running.save_plot(figure, path)


def check_writable(args: Args) -> None:
    """Now, not after a minute of training."""
    running.check_plot(args.plot)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise running.UserError(f"cannot write there: {error}") from error


def work(args: Args) -> int:
    try:
        if args.near:
            return answer(args)
        check_writable(args)
        graph = model.load_graph(args.data)
    except ValueError as error:
        raise running.UserError(str(error)) from error
    init_key, key = jax.random.split(jax.random.key(args.seed))
    fresh = functools.partial(init_state, init_key, graph, args)
    state, run = load(args, jax.eval_shape(fresh)) if args.resume else (fresh(), Run())
    console.print(
        f"{len(graph.entities):,} entities, {len(graph.relations)} relations, "
        f"{len(graph.train):,} triples; jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        + ("whole tables, optax" if args.dense else "rows touched, jaxaccum")
    )
    total = args.epochs * CHUNKS_PER_EPOCH
    if args.resume and run.chunk >= total:
        done = run.chunk // CHUNKS_PER_EPOCH
        console.print(
            f"nothing to train: {done} epochs are done, and --epochs asks for {args.epochs}"
        )
    if run.chunk < total:
        state, costs = train(args, graph, state, run, key)
        save(args, state, run)
        console.print(costs)
    if args.plot:
        plot(args.plot, run)
    if run.chunk < total:
        return running.interrupted()
    names = {name: "\n".join(getattr(graph, name)) for name in model.Tables._fields}
    tables = {f"{name}_table": np.asarray(t) for name, t in state.params._asdict().items()}
    np.savez(args.out / "embeddings.npz", **names, **tables)
    print_metrics(args, graph, state.params)
    console.print(f"embeddings and checkpoint: {args.out}; ask them with --near dog.n.01")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser, args = parse(argv)
    return parser.run(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
