"""Trains WordNet embeddings in several processes, as on several hosts, over the loopback.

Starts its own processes, each with two CPU devices, which find each other by jax.distributed and
train as data_parallel.py does. Every process holds the whole tables; rank 0 saves them after each
epoch. When a process dies, the others end within --heartbeat seconds; --resume starts all again
from the last epoch. On real hosts each runs one process, and the address is that of rank 0's host.
"""

from __future__ import annotations

import running  # before JAX: from here on Ctrl-C ends in one line

# isort: split
import argparse
import os
import pathlib
import socket
import subprocess
import sys

DEVICES_PER_PROCESS = 2


def worker(args: argparse.Namespace) -> None:
    import complex_model as model
    import data_parallel
    import jax
    import numpy as np
    from jax.sharding import AxisType

    import jaxaccum

    jax.distributed.initialize(
        args.address, args.processes, args.rank, heartbeat_timeout_seconds=args.heartbeat
    )
    graph = model.load_graph()
    mesh = jax.make_mesh((jax.device_count(),), (data_parallel.AXIS,), (AxisType.Auto,))
    training, first_epoch = data_parallel.init(mesh, graph, args), 0
    checkpoint = args.out / "checkpoint.npz"
    if args.resume:
        # After an epoch the accumulators are empty: the tables and their squares are all there is.
        with np.load(checkpoint) as file:
            first_epoch = int(file["epoch"])
            tables = [model.Tables(file[f"{n}_0"], file[f"{n}_1"]) for n in ("params", "squares")]
        shared = jaxaccum.shard_rows(tuple(tables), mesh, data_parallel.AXIS, tables=False)
        training = data_parallel.Training(*shared, training.pending)

    def after_epoch(epoch: int, training: data_parallel.Training, loss: float) -> None:
        if args.rank == 0:
            arrays = {
                f"{name}_{i}": np.asarray(table)
                for name in ("params", "squares")
                for i, table in enumerate(getattr(training, name))
            }
            np.savez(args.out / "partial.npz", epoch=epoch, **arrays)
            (args.out / "partial.npz").replace(checkpoint)  # so that it is always a whole one
            print(f"epoch {epoch}: loss {loss:.4f}", flush=True)

    training, speed = data_parallel.train(mesh, graph, args, training, first_epoch, after_epoch)
    if args.rank == 0:
        mrr = data_parallel.evaluate(graph, training, args)
        processes = running.count(args.processes, "process")
        devices = running.count(jax.device_count(), "device")
        print(f"{processes}, {devices}: MRR {mrr:.4f}{speed}")


def start(args: argparse.Namespace) -> int:
    """Starts the processes, and waits for the first to fail or all to end; leaves none behind."""
    args.out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES_PER_PROCESS}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    workers = []
    try:
        for rank in range(args.processes):
            command = [sys.executable, __file__, *sys.argv[1:]]
            command += [f"--rank={rank}", f"--address={address}"]
            # Ctrl-C is for the process that started them, which ends them.
            workers.append(subprocess.Popen(command, env=environment, start_new_session=True))
        # The others learn of a death from the heartbeats, and end by themselves.
        codes = [process.wait() for process in workers]
    except KeyboardInterrupt:
        if (args.out / "checkpoint.npz").exists():
            running.has_saved(f"{args.out / 'checkpoint.npz'}; go on with --resume")
        raise
    finally:
        for process in workers:
            process.kill()
            process.wait()
    failed = [rank for rank, code in enumerate(codes) if code != 0]
    if failed:
        print(f"processes {failed} failed; go on from the last epoch with --resume")
    return int(bool(failed))


def work(args: argparse.Namespace) -> int:
    import data_parallel

    args.way = "shard_map"
    data_parallel.check(args, args.processes * DEVICES_PER_PROCESS)
    checkpoint = args.out / "checkpoint.npz"
    if args.resume and not checkpoint.exists():
        raise running.UserError(f"nothing to resume: there is no {checkpoint}")
    if args.rank is None:
        return start(args)
    worker(args)
    return 0


def main() -> int:
    import data_parallel

    parser = data_parallel.make_parser(__file__, __doc__)
    parser.number("--processes", 2, "processes to start")
    parser.number("--heartbeat", 10, "seconds until a death is noticed")
    parser.file("--out", pathlib.Path("runs/multi_process"), "for checkpoint.npz", "FOLDER")
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--rank", type=int, help=argparse.SUPPRESS)
    add("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    return parser.run(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
