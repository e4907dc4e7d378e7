"""Gradients whose fate can be read off the parameters, and workers that push them and may die.

Gradient ``i`` is one in column ``i`` of the rows it touches, on every shard, and of the dense leaf;
gradients are summed. ``table`` and ``bias`` learn at a rate of one more than the steps before:
column ``i`` shows in which step the gradient was, the same number in all its rows, or it was torn.
``few`` learns at a rate of one: it shows how often the gradient was counted. All are integers.
"""

import dataclasses
import json
import os
import pathlib

import numpy as np

import jaxaccum
import jaxaccum.ray

ROWS, FEW = 13, 2


def params(num_gradients):
    return {
        "bias": np.zeros(num_gradients, np.float32),
        "few": np.zeros((FEW, num_gradients), np.float32),
        "table": np.zeros((ROWS, num_gradients), np.float32),
    }


TABLES = {"bias": False, "few": True, "table": True}
ALL = {"bias": None, "few": np.arange(FEW), "table": np.arange(ROWS)}


def optimizer():
    import optax

    by_step = optax.sgd(lambda count: -(count + 1.0))
    labels = {"bias": "step", "few": "once", "table": "step"}
    return optax.partition({"step": by_step, "once": optax.sgd(-1.0)}, labels)


def rows_of(number):
    """The rows gradient ``number`` touches: of every shard some, unsorted."""
    rng = np.random.default_rng(number)
    return rng.permutation(np.unique(np.r_[0, ROWS // 2, ROWS - 1, rng.integers(0, ROWS, 4)]))


def gradient(number, num_gradients):
    """One in column ``number``; a row that is repeated has its one in two parts, 3 and -2."""
    rows, one = rows_of(number), np.eye(num_gradients, dtype=np.float32)[number]
    ids = np.r_[rows, rows[0], ROWS].astype(np.int32)  # the last is padding
    factors = np.r_[3, np.ones(len(rows) - 1), -2, 7].astype(np.float32)
    few = jaxaccum.IndexedSlices(np.arange(FEW), np.tile(one, (FEW, 1)), (FEW, num_gradients))
    table = jaxaccum.IndexedSlices(ids, factors[:, None] * one, (ROWS, num_gradients))
    return {"bias": one, "few": few, "table": table}


@dataclasses.dataclass
class Worker:
    """An actor that pushes gradients, and writes down each answer as soon as it has it."""

    server: jaxaccum.ray.ParameterServer
    log: pathlib.Path
    num_gradients: int

    def pid(self):
        return os.getpid()

    def run(self, numbers):
        with self.log.open("a") as log:
            for number in numbers:
                print(json.dumps(["tried", number]), file=log, flush=True)
                _, step = self.server.pull(ALL)
                grads = gradient(number, self.num_gradients)
                answer = self.server.push(grads, step, worker=self.log.stem, key=str(number))
                print(json.dumps([answer.verdict.name, number]), file=log, flush=True)


def read_logs(folder):
    """The gradients by what their workers last wrote of them."""
    fates = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            fate, number = json.loads(line)
            fates[number] = fate
    return fates


def check_conservation(values, fates, lost):
    """Every accepted gradient is whole, once, in one step, or was reported lost; none else is."""
    counted = set()
    for number in range(values["bias"].size):
        rows = rows_of(number)
        step, column = values["bias"][number], values["table"][:, number]
        times = values["few"][:, number]
        assert np.array_equal(column[rows], np.full(len(rows), step)), f"{number} is torn: {column}"
        assert column.sum() == step * len(rows), f"{number} is where it should not be"
        assert np.array_equal(times, np.full(FEW, step > 0)), f"{number} counts {times} times"
        counted |= {number} if step else set()
    accepted = {number for number, fate in fates.items() if fate == "ACCEPTED"}
    stale = {number for number, fate in fates.items() if fate == "STALE"}
    lost = set(map(int, lost))
    assert accepted - lost <= counted, f"gone: {accepted - lost - counted}"
    assert not counted & (lost | stale), f"back from the dead: {counted & (lost | stale)}"
    return counted
