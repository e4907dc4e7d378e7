"""``suggest_capacity``: how many distinct rows a step touches, from ids seen on the host."""

from __future__ import annotations

import contextlib
import importlib
import math
import operator
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized

import numpy as np
from numpy.typing import ArrayLike

# A run over the ids that takes longer than this shows how far it is, in seconds.
_LONG = 2.0


def suggest_capacity(
    batches: Iterable[ArrayLike],
    num_required: int,
    *,
    quantile: float = 1.0,
    margin: float = 0.05,
) -> int:
    """Suggests a ``capacity`` for `accumulate` from the ids of some batches. Runs on the host.

    Counts the distinct ids of each ``num_required`` batches in turn, takes ``quantile`` of these
    counts and adds ``margin``, and six times the square root of it besides. For ids drawn at
    random, whatever their distribution, the variance of the number of distinct ones is at most its
    mean (whether one id occurs tells against others occurring); so batches that were not seen need
    more in about one step of ``10**7`` at most, if they are drawn alike. It is never less than one
    gradient may touch, nor more than ``num_required`` gradients may.

    Shows a progress bar in a terminal if it takes more than two seconds and rich is installed.

    Args:
      batches: the ids of each batch, an integer array of any shape, without padding; at least
        ``num_required`` batches. An array ``[batches, n]`` will do.
      num_required: gradients per step; where it is a function of the step, its largest value.
      quantile: of the counts, from 0 to 1: how many of the steps are not to come early. Below 1,
        only ``margin`` is added.
      margin: what to add, as a share.

    Returns:
      The capacity, for one table.

    Raises:
      TypeError: ids are no integers.
      ValueError: there are fewer than ``num_required`` batches, or an option is out of range.

    Example:
      >>> import jaxaccum, numpy as np
      >>> ids = np.random.default_rng(0).zipf(1.2, (100, 512)) % 1_000_000
      >>> capacity = jaxaccum.suggest_capacity(ids, num_required=4)
      >>> 700 < capacity < 1100
      True

    Source: of this package.
    """
    num_required = operator.index(num_required)
    if num_required < 1:
        raise ValueError(f"num_required must be positive, got {num_required}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be from 0 to 1, got {quantile}")
    if not margin >= 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    counts, sizes, window = [], [], list[np.ndarray]()
    for position, batch in enumerate(_shown(batches)):
        window.append(_checked(batch, position))
        sizes.append(window[-1].size)
        if len(window) == num_required:
            counts.append(np.unique(np.concatenate(window)).size)
            window = []
    if not counts:
        raise ValueError(f"batches must be at least num_required={num_required}, got {len(sizes)}")
    seen = float(np.quantile(counts, quantile, method="higher"))
    capacity = add_margin(seen, margin) if quantile == 1 else math.ceil(seen * (1 + margin))
    return max(min(capacity, num_required * max(sizes)), *sizes, 1)


def add_margin(seen: float, margin: float) -> int:
    """Returns a capacity for windows like those of which the largest touched ``seen`` rows."""
    return math.ceil(seen * (1 + margin) + 6 * math.sqrt(seen))


def _checked(batch: ArrayLike, position: int) -> np.ndarray:
    ids = np.asarray(batch)
    if ids.ndim == 0:
        raise ValueError(f"batches must be arrays of ids, got the number {ids} at {position}")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"batches[{position}] must be integers, got {ids.dtype}")
    return ids.ravel()


def _shown(batches: Iterable[ArrayLike]) -> Iterator[ArrayLike]:
    """Hands batches on; after a while in a terminal, with a progress bar if rich is installed."""
    total = len(batches) if isinstance(batches, Sized) else None
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        advance = None
        for position, batch in enumerate(batches):
            if advance is None and time.monotonic() - started > _LONG and sys.stderr.isatty():
                advance = _progress_bar(stack, position, total)
            yield batch
            if advance is not None:
                advance()


def _progress_bar(
    stack: contextlib.ExitStack, done: int, total: int | None
) -> Callable[[], object]:
    try:
        console = importlib.import_module("rich.console").Console(stderr=True)
        progress = importlib.import_module("rich.progress").Progress(
            console=console, transient=True
        )
    except ImportError:
        return lambda: None
    stack.enter_context(progress)
    task = progress.add_task("distinct ids", total=total, completed=done)
    return lambda: progress.advance(task)
