"""Trains WordNet embeddings on several devices at once, each on micro-batches of its own.

Every device accumulates the gradients of its micro-batches; all_take adds them up over the devices,
and every device makes the same update of its copy of the tables. The same step runs under
jax.shard_map and jax.pmap, and on one device, which sees the same micro-batches one after another.
The MRR comes out the same. Without devices of your own, --devices 8 makes the CPU pretend.
"""

from __future__ import annotations

import running  # before JAX: from here on Ctrl-C ends in one line

# isort: split
import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import complex_model as model
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxaccum

AXIS = "data"
SHARED, PER_DEVICE = PartitionSpec(), PartitionSpec(AXIS)
SETTINGS = {"negatives": 512, "learning_rate": 0.1, "n3": 0.01}
STEPS_PER_CALL = 16
WAYS = ("shard_map", "pmap", "both")


class Training(NamedTuple):
    """What the step carries: the tables and Adagrad's sums on every device; the accumulators."""

    params: model.Tables
    squares: model.Tables
    pending: model.Tables  # one a device: leading axis of devices


def init(mesh: Mesh, graph: model.Graph, args: argparse.Namespace) -> Training:
    params = model.init_params(jax.random.key(args.seed), graph, args.dims)
    # No step touches more rows than this, on all devices together.
    capacity = args.micro_batches * SETTINGS["negatives"] + 2 * args.batch
    shared = (params, jax.tree.map(jnp.zeros_like, params))
    shared = jaxaccum.shard_rows(shared, mesh, AXIS, tables=False)  # whole, on every device
    pending = model.init_accumulators(params, capacity)
    return Training(*shared, model.Tables(*(jaxaccum.replicate(p, mesh, AXIS) for p in pending)))


def device_step(
    num_entities: int, key: jax.Array, training: Training, triples: jax.Array, step: jax.Array
) -> tuple[Training, jax.Array]:
    """One update, on one device: int32 ``[micro-batches, B, 3]`` of its own."""
    first = (step * jax.lax.axis_size(AXIS) + jax.lax.axis_index(AXIS)) * triples.shape[0]

    def micro_step(pending: model.Tables, batch: Any) -> tuple[model.Tables, jax.Array]:
        triples, index = batch
        draw = jax.random.fold_in(key, index)
        lookups = model.sample_lookups(draw, triples, SETTINGS["negatives"], num_entities)
        value, grads = model.sparse_grads(training.params, lookups, SETTINGS["n3"])
        applied = [jaxaccum.apply(p, g)[0] for p, g in zip(pending, grads, strict=True)]
        return model.Tables(*applied), value

    index = first + jnp.arange(triples.shape[0], dtype=jnp.int32)
    pending, losses = jax.lax.scan(micro_step, training.pending, (triples, index))
    new = []
    for table, squares, state in zip(training.params, training.squares, pending, strict=True):
        # A device cannot hold more rows than its own micro-batches have touched.
        touched = triples.shape[0] * (2 * triples.shape[1] + SETTINGS["negatives"])
        most = min(state.capacity, touched)
        state, grad, _, _ = jaxaccum.all_take(state, AXIS, max_rows=most)
        updated = model.adagrad_rows(table, squares, grad, SETTINGS["learning_rate"])
        new.append((*updated, state))
    columns = zip(*new, strict=True)
    return Training(*(model.Tables(*c) for c in columns)), jax.lax.pmean(jnp.mean(losses), AXIS)


def compiled_step(mesh: Mesh, way: str, num_entities: int, key: jax.Array) -> Callable[..., Any]:
    """``step(training, triples [steps, devices, micro, B, 3], first)``: many steps in one scan."""
    step = functools.partial(device_step, num_entities, key)

    def steps(
        training: Training, triples: jax.Array, first: jax.Array
    ) -> tuple[Training, jax.Array]:
        numbers = first + jnp.arange(triples.shape[0], dtype=jnp.int32)
        return jax.lax.scan(lambda t, batch: step(t, *batch), training, (triples, numbers))

    if way == "pmap":
        shared = Training(None, None, 0)
        return jax.pmap(
            steps, AXIS, in_axes=(shared, 1, None), out_axes=(shared, None), donate_argnums=0
        )

    def one_device(training: Training, triples: jax.Array, first: jax.Array) -> Any:
        return steps(training, triples[:, 0], first)  # inside, the axis of devices has length 1

    specs = Training(SHARED, SHARED, PER_DEVICE)
    mapped = jax.shard_map(
        jaxaccum.drop_device_axis(one_device),
        mesh=mesh,
        in_specs=(specs, PartitionSpec(None, AXIS), SHARED),
        out_specs=(specs, SHARED),
    )
    return jax.jit(mapped, donate_argnums=0)


def train(
    mesh: Mesh,
    graph: model.Graph,
    args: argparse.Namespace,
    training: Training,
    first_epoch: int = 0,
    after_epoch: Callable[[int, Training, float], None] = lambda *_: None,
) -> tuple[Training, str]:
    """Trains to the last epoch; returns the state and what a step took, "" if that is unknown.

    In a run of several processes, each calls this with the same arguments.
    """
    triples = graph.reciprocal(graph.train[: args.train_triples])
    num_devices, micro = mesh.shape[AXIS], args.batch // args.micro_batches
    num_steps = len(triples) // args.batch // STEPS_PER_CALL * STEPS_PER_CALL
    shape = (num_steps, num_devices, args.micro_batches // num_devices, micro)
    step = compiled_step(mesh, args.way, len(graph.entities), jax.random.key(args.seed + 1))
    sharding = NamedSharding(mesh, PartitionSpec(None, AXIS))
    times = []
    for epoch in range(first_epoch, args.epochs):
        batches = model.shuffled_batches(triples, args.seed, epoch, shape)
        for i in range(0, num_steps, STEPS_PER_CALL):
            part, number = batches[i : i + STEPS_PER_CALL], np.int32(epoch * num_steps + i)
            start = time.perf_counter()
            on_mesh = jax.make_array_from_callback(
                part.shape, sharding, lambda index, part=part: part[index]
            )
            training, losses = step(training, on_mesh, number)
            loss = float(np.mean(losses))
            times.append(time.perf_counter() - start)
        after_epoch(epoch + 1, training, loss)
    if len(times) < 2:  # the first compiles
        return training, ""
    return training, f", {1e3 * float(np.mean(times[1:])) / STEPS_PER_CALL:.1f} ms a step"


def evaluate(graph: model.Graph, training: Training, args: argparse.Namespace) -> float:
    """The MRR on the test triples, computed on one device."""
    params = model.Tables(*(np.asarray(table) for table in training.params))
    ranks = model.filtered_ranks(params, graph, graph.test[: args.test_triples])
    return model.ranking_metrics(ranks)["MRR"]


def make_parser(file: str, doc: str | None) -> running.Parser:
    """The options that this example and multi_process.py share."""
    parser = running.Parser(file, doc)
    parser.number("--epochs", 10, "passes over the triples")
    parser.number("--batch", 4096, "triples of an update, all devices together")
    parser.number("--micro-batches", 8, "gradients of an update, all devices together")
    parser.number("--dims", 50, "complex dimensions")
    parser.number("--seed", 0, "of tables, order and negatives", low=0)
    parser.number("--train-triples", None, "train on the first N only, for a quick look")
    parser.number("--test-triples", 1000, "rank the first N only")
    return parser


def check(args: argparse.Namespace, num_devices: int) -> None:
    if args.micro_batches % num_devices or args.batch % args.micro_batches:
        raise running.UserError(
            f"{running.count(num_devices, 'device')}, --micro-batches {args.micro_batches} and "
            f"--batch {args.batch} must each divide the next"
        )
    if 2 * (args.train_triples or np.inf) < STEPS_PER_CALL * args.batch:
        raise running.UserError(f"--train-triples must fill {STEPS_PER_CALL} batches at least")


def work(args: argparse.Namespace) -> None:
    check(args, args.devices)
    # Read once, when the first device is asked for; of no effect on other devices than CPUs.
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={args.devices}")
    if len(jax.devices()) < args.devices:
        there = running.count(len(jax.devices()), "device")
        raise running.UserError(f"--devices {args.devices}: there is only {there}")
    graph = model.load_graph()
    runs = [(1, "shard_map")]
    runs += [(args.devices, way) for way in WAYS[:2] if args.way in (way, "both")]
    for num_devices, args.way in runs:
        mesh = jax.make_mesh((num_devices,), (AXIS,), axis_types=(AxisType.Auto,),
                             devices=jax.devices()[:num_devices])  # fmt: skip
        training, speed = train(mesh, graph, args, init(mesh, graph, args))
        name = f"{running.count(num_devices, 'device')}, {args.way}:"
        print(f"{name:21} MRR {evaluate(graph, training, args):.4f}{speed}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__file__, __doc__)
    parser.number("--devices", 8, "devices to use")
    text = "how: by jax.shard_map, jax.pmap or one after the other (default: both)"
    parser.add_argument("--way", choices=WAYS, default="both", help=text)
    args = parser.parse_args(argv)
    return parser.run(lambda: work(args))


if __name__ == "__main__":
    raise SystemExit(main())
