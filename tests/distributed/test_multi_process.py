"""Several processes of two CPU devices each on the loopback: training, a death, a restart."""

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import multi_process_worker as worker
import numpy as np
import pytest
from breadth import in_breadth

import jaxaccum

pytestmark = pytest.mark.slow

STEPS = 6
HERE = pathlib.Path(__file__).parents[1] / "helpers"


@contextlib.contextmanager
def processes(folder, number, **options):
    """Starts ``number`` processes; when this is over, none of them is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    try:
        for rank in range(number):
            task = {
                "address": address, "num_processes": number, "rank": rank,
                "folder": str(folder), "steps": STEPS, "dies_at": None,
            }  # fmt: skip
            task |= options.get(f"rank_{rank}", {}) | options.get("every_rank", {})
            command = [sys.executable, "-u", HERE / "multi_process_worker.py", json.dumps(task)]
            with open(folder / f"log-{rank}.txt", "w") as log:
                package = pathlib.Path(jaxaccum.__file__).parent.parent
                environment = {"PYTHONPATH": str(package)}
                environment["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "cache")
                environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                )
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def exit_codes(started, seconds):
    end = time.monotonic() + seconds
    return [process.wait(timeout=max(end - time.monotonic(), 0.1)) for process in started]


def logs(folder, number):
    return [(folder / f"log-{rank}.txt").read_text() for rank in range(number)]


def expected_table():
    """The same training in NumPy: one device, dense."""
    table, pending, taken_from = np.zeros((worker.ROWS, worker.WIDTH)), 0, 0
    for step in range(STEPS):
        grad = np.zeros_like(table)
        for index in range(worker.MICRO_BATCHES):
            ids, values = worker.micro_batch(step, index)
            np.add.at(grad, ids, values - table[ids])
        pending, taken_from = pending + grad, taken_from + worker.MICRO_BATCHES
        if taken_from >= worker.REQUIRED:
            table, pending, taken_from = table + pending, 0, 0
    return table


def check_results(folder, number):
    """Every process has the whole replicated table and its part of the sharded one."""
    table, shards = expected_table(), []
    for rank in range(number):
        with np.load(folder / f"step-{STEPS}-of-{rank}.npz") as file:
            arrays = [file[name] for name in file.files]
        shards += [a for a in arrays if a.shape == (table.shape[0] // (2 * number), 2)]
        whole = [a for a in arrays if a.shape == table.shape]
        assert len(whole) == 2
        assert all(np.array_equal(a, table) for a in whole)
    assert np.array_equal(np.concatenate(shards), table)


@pytest.mark.parametrize("number", in_breadth([2, 4], [2]))
def test_processes_train_as_one_device(tmp_path, number):
    with processes(tmp_path, number) as started:
        assert exit_codes(started, 120) == [0] * number, logs(tmp_path, number)
    check_results(tmp_path, number)


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_ends_the_others_and_a_restart_goes_on(tmp_path, victim):
    """The death comes between a take and the next, in mid-accumulation."""
    with processes(tmp_path, 2, **{f"rank_{victim}": {"dies_at": 3}}) as started:
        codes = exit_codes(started, 90)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] not in (0, None)
    survivor = logs(tmp_path, 2)[1 - victim]
    assert "another task died" in survivor
    saved = sorted(path.name for path in tmp_path.glob("step-*"))
    assert saved == [f"step-{s}-of-{r}.npz" for s in (1, 2, 3) for r in (0, 1)]
    with processes(tmp_path, 2) as started:
        assert exit_codes(started, 120) == [0, 0], logs(tmp_path, 2)
    check_results(tmp_path, 2)


def test_capacities_that_differ_are_told_to_every_process(tmp_path):
    with processes(tmp_path, 2, every_rank={"capacity_by_rank": True}) as started:
        assert exit_codes(started, 90) == [3, 3], logs(tmp_path, 2)
    for log in logs(tmp_path, 2):
        assert "got process 0: state of capacity 48" in log
        assert "process 1: state of capacity 49" in log
