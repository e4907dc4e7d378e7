"""What all libraries are given: drawn by NumPy from fixed seeds, so alike in every process."""

from __future__ import annotations

import numpy as np

Gradient = tuple[np.ndarray, np.ndarray]
SIDE, START, SIZE = 10_000, 2500, 5000  # of sparse matrices, and what is cut out of them
MICRO_BATCHES, WIDTH = 4, 64  # of a training step, and the columns of its table


def draw_ids(rng: np.random.Generator, n: int, rows: int, zipf: float | None = None) -> np.ndarray:
    if zipf is None:
        return rng.integers(0, rows, n).astype(np.int32)
    ids = rng.zipf(zipf, 8 * n)
    return (ids[ids <= rows][:n] - 1).astype(np.int32)


def gradients(
    count: int, ids: int, rows: int, columns: int, zipf: float | None = None, *, seed: int = 0
) -> list[Gradient]:
    """Raw ids, repeated and unsorted, and their values."""
    rng = np.random.default_rng(seed)
    return [
        (draw_ids(rng, ids, rows, zipf), rng.standard_normal((ids, columns), np.float32))
        for _ in range(count)
    ]


def deduplicated(raw: list[Gradient]) -> list[Gradient]:
    """Sorted and summed, as TensorFlow wants it; the time this takes is not counted."""
    result = []
    for ids, values in raw:
        unique, inverse = np.unique(ids, return_inverse=True)
        sums = np.zeros((len(unique), values.shape[1]), values.dtype)
        np.add.at(sums, inverse, values)
        result.append((unique.astype(np.int64), sums))
    return result


def batches(rows: int, ids: int) -> list[np.ndarray]:
    """Micro-batches of ids for sixteen training steps: a processor would learn those of one."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, rows, (MICRO_BATCHES, ids)).astype(np.int32) for _ in range(16)]


def sparse_pairs(entries: int) -> list[tuple[Gradient, Gradient]]:
    """Pairs of sorted sparse matrices, a quarter of each inside the slice, several in turn.

    They have as many entries inside, and in common, as random ones have on average. Of a single
    pair a processor learns which branches it takes, and what branches by entry seems up to seven
    times as fast as it is.
    """
    rng = np.random.default_rng(0)
    return [_sparse_pair(rng, entries) for _ in range(max(3, min(64, 2**20 // entries)))]


def _sparse_pair(rng: np.random.Generator, entries: int) -> tuple[Gradient, Gradient]:
    cells: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    # Of the cells drawn, a quarter is inside; two matrices need twice the entries of one.
    for inside, count, enough in ((True, entries // 4, 9), (False, entries - entries // 4, 3)):
        shared = round(count * entries / SIDE**2)
        drawn = np.unique(rng.integers(0, SIDE * SIDE, enough * count + 100))
        drawn = rng.permutation(drawn[_is_inside(drawn) == inside])
        cells[0].append(drawn[:count])
        cells[1].append(drawn[count - shared : 2 * count - shared])
    a, b = (_with_values(rng, np.sort(np.concatenate(part))) for part in cells)
    return a, b


def _is_inside(cells: np.ndarray) -> np.ndarray:
    places = np.stack(np.divmod(cells, SIDE), axis=1) - START
    return ((places >= 0) & (places < SIZE)).all(axis=1)


def _with_values(rng: np.random.Generator, cells: np.ndarray) -> Gradient:
    indices = np.stack(np.divmod(cells, SIDE), axis=1).astype(np.int32)
    return indices, rng.standard_normal(len(cells)).astype(np.float32)
