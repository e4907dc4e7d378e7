"""Cases and their clock: a case is a function from a setting to figures, line by line.

    @case("{rows:,}", settings=[{"rows": 1000}, {"rows": 1_000_000}], quick=[{"rows": 10}])
    def train_step(rows):
        '''One line that heads the table.'''
        return measure({"jaxaccum": jax_step(...), **peer_steps("torch", "train_step", rows=rows)})

A setting makes a point of the case (here "1,000" and "1,000,000"), each step a line, and the first
line is the one that the others are compared with. A new line is a new entry of the dictionary.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from benchmarks import peers
from benchmarks.steps import Step

# Metrics by line: {"jaxaccum": {"ms": 8.0, "MB": 798}}.
Figures = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A function that measures, and the settings it is called with.

    Attributes:
      point: names what a setting measures, by `str.format`.
      quick: settings so small that all cases together take a minute; their times mean nothing.
      needs: packages without which the case is left out.
      environ: what must stand in the environment before Python starts.
      by_default: whether a run without ``--only`` has it.
    """

    run: Callable[..., Figures]
    point: str
    settings: list[dict[str, Any]]
    quick: list[dict[str, Any]]
    needs: tuple[str, ...] = ()
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
    by_default: bool = True

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def about(self) -> str:
        return (self.run.__doc__ or "").strip().splitlines()[0]


CASES: dict[str, Case] = {}


def case(
    point: str, *, settings: list[dict[str, Any]], quick: list[dict[str, Any]], **options: Any
) -> Callable[[Callable[..., Figures]], Callable[..., Figures]]:
    """Registers a function as a case of its name; options are those of `Case`."""

    def register(run: Callable[..., Figures]) -> Callable[..., Figures]:
        CASES[run.__name__] = Case(run, point, settings, quick, **options)
        return run

    return register


class LeftOutError(Exception):
    """What cannot be measured here; its text says why."""


class Timed(Protocol):
    """A `Step`, here or in a peer's process."""

    def seconds(self, in_a_row: int = 1, wait_each: bool = True) -> list[float]: ...


@dataclasses.dataclass
class Haste:
    """Whether all is to be run once only, to see that it runs."""

    quick: bool = False


HASTE = Haste()
# A row of slow calls is short: what others have left in the cache is then soon forgotten.
ROW_SECONDS = 0.4


def measure(
    steps: Mapping[str, Timed],
    *,
    seconds: float = 4.0,
    turns: tuple[int, int] = (5, 60),
    in_a_row: int = 5,
    wait_each: bool = True,
    per: int = 1,
) -> Figures:
    """Medians of steps that are run in turns, so that a noisy spell meets all of them alike.

    Args:
      steps: by line; the first is what ``times`` compares the others with.
      seconds: for how long turns are taken.
      turns: how many at least, and at most.
      in_a_row: calls a turn, fewer of slow steps.
      wait_each: whether each call is waited for and timed, or the row as a whole.
      per: how often a call does what the figures are of.

    Returns:
      ``ms`` and ``times`` (the others' time over the first line's) by line.
    """
    if HASTE.quick:
        seconds, turns, in_a_row = 0.0, (1, 1), 1
    taken: dict[str, list[float]] = {line: [] for line in steps}
    in_row = {line: calls_in_a_row(step, in_a_row) for line, step in steps.items()}
    start = time.perf_counter()
    for turn in range(turns[1]):
        if turn >= turns[0] and time.perf_counter() - start > seconds:
            break
        for line, step in steps.items():
            taken[line] += step.seconds(in_row[line], wait_each)
    ms = {line: statistics.median(each) / per * 1e3 for line, each in taken.items()}
    first = next(iter(ms.values()))
    return {line: {"ms": value, "times": value / first} for line, value in ms.items()}


def calls_in_a_row(step: Timed, most: int) -> int:
    """As many as fit into a fraction of a second, once the step has been run and is warm."""
    step.seconds()
    (once,) = step.seconds()
    return max(1, min(most, int(ROW_SECONDS / max(once, 1e-9))))


def jax_step(call: Callable[[], Any], prepare: Callable[[], None] | None = None) -> Step:
    return Step(call, jax.block_until_ready, prepare)


def donated(function: Callable[..., Any], carry: Any, *args: Any) -> Step:
    """A compiled step that gives its first argument away and gets it back."""
    compiled = jax.jit(function, donate_argnums=0).lower(carry, *args).compile()
    box = [carry]

    def call() -> Any:
        box[0] = compiled(box[0], *args)
        return box[0]

    return jax_step(call)


def peer_steps(peer: str, make: str, **arguments: Any) -> Mapping[str, Timed]:
    """Steps by line in the process of another library; none where it is not installed."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    process = peers.process_of(peer)
    return process.make(make, device=device, **arguments) if process else {}


def held_mb(compiled: Any) -> float:
    """What a compiled step holds at its peak, inputs and outputs included."""
    memory = getattr(compiled, "compiled", compiled).memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return (held + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e6


def with_metric(figures: Figures, metric: str, values: Mapping[str, float]) -> Figures:
    """``figures`` with one more metric, by line."""
    return {
        line: metrics | ({metric: values[line]} if line in values else {})
        for line, metrics in figures.items()
    }
