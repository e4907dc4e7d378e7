"""What every benchmark shares: honest clocks, versions beside figures, one table, one JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import rich.console
import rich.table

RESULTS = pathlib.Path(__file__).parent / "results"
PEERS = ("jax", "jaxlib", "optax", "tensorflow-cpu", "torch", "numpy")

# Everything runs once, on little, and nothing is written: so the gate sees that no benchmark rots.
TINY = os.environ.get("JAXACCUM_BENCHMARKS") == "tiny"


def scaled(size: int) -> int:
    """Returns ``size``, or about a thousandth of it where all is to be tiny."""
    return max(size // 1000, min(size, 32)) if TINY else size


def timed(step: Callable[[], Any]) -> tuple[Any, float]:
    """What ``step`` returns, and the seconds until it is there."""
    start = time.perf_counter()
    result = jax.block_until_ready(step())
    return result, time.perf_counter() - start


def interleaved_ms(
    steps: dict[str, Callable[[], Any]],
    *,
    repeats: int = 15,
    warmup: int = 3,
    in_a_row: int = 1,
    wait_each: bool = True,
) -> dict[str, float]:
    """Medians of several steps, taken in turns so that a noisy spell meets all of them alike.

    A step may carry a function ``prepare``, called before its clock starts. Those that are run
    over and over in life are timed ``in_a_row``, after one that finds the cache full of what the
    others have left there. Without ``wait_each`` only the last of a row is waited for, as a
    training loop does, and a time is its share of the row: on a CPU, JAX hands all but the least
    programs to another thread, and to be woken by it takes longer than a small program.
    """
    if TINY:
        repeats, warmup, in_a_row = 1, 0, 1
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warmup + repeats):
        for name, step in steps.items():
            prepare = getattr(step, "prepare", lambda: None)
            row = []
            if in_a_row > 1:
                prepare()
                timed(step)
            if wait_each:
                for _ in range(in_a_row):
                    prepare()
                    row.append(timed(step)[1])
            else:
                if hasattr(step, "prepare"):
                    raise ValueError(f"{name} must be prepared each time, and so waited for")
                _, seconds = timed(lambda step=step: [step() for _ in range(in_a_row)])
                row.append(seconds / in_a_row)
            if repeat >= warmup:
                times[name] += row
    return {name: statistics.median(ts) * 1e3 for name, ts in times.items()}


def is_installed(peer: str) -> bool:
    """Whether a peer can be measured here: TensorFlow has no package for some machines."""
    return importlib.util.find_spec(peer) is not None


def torch_device() -> str:
    """Where PyTorch should compute, to be compared with JAX."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def torch_wait() -> None:
    """Waits for what PyTorch has begun, as ``block_until_ready`` does for JAX."""
    import torch

    if torch_device() == "cuda":
        torch.cuda.synchronize()


def environment() -> dict[str, Any]:
    """The machine, the date and the versions a figure is worthless without."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
        "num_devices": jax.device_count(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "huge_pages": _has_huge_pages(),
        "versions": versions,
    }


def report(name: str, rows: Iterable[dict[str, Any]], *, note: str = "") -> None:
    """Prints ``rows`` as a table and writes them, with the environment, to ``results/``."""
    rows, env = list(rows), environment()
    table = rich.table.Table(title=f"{name} (jax {env['versions']['jax']}, {env['device']})")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(_format(row.get(column, "")) for column in columns))
    console = rich.console.Console()
    console.print(table)
    if note:
        console.print(note)
    if TINY:
        return
    RESULTS.mkdir(exist_ok=True)
    device = jax.default_backend() + ("-huge_pages" if env["huge_pages"] else "")
    path = RESULTS / f"{name}-{device}-jax{env['versions']['jax']}.json"
    path.write_text(json.dumps({"environment": env, "note": note, "rows": rows}, indent=1) + "\n")
    console.print(f"written: {path.relative_to(RESULTS.parent.parent)}")


def _has_huge_pages() -> bool:
    """Whether malloc asks for them, as docs/accumulator.md advises."""
    return "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")


def _format(value: object) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and value < 1000 else f"{value}"


def _cpu_name() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
