"""How the examples are run: options, what is wrong in one line, Ctrl-C in one line, plots.

Imported before JAX, so that Ctrl-C ends a program in one line from its first moment on.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import signal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

PLOTS = (".png", ".pdf", ".svg")
_saved: list[str] = []


class UserError(Exception):
    """Something only the user can put right."""


class Parser(argparse.ArgumentParser):
    """Options that all have a text and a default in --help; what is wrong is told in one line."""

    def __init__(self, file: str, doc: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(pathlib.Path(file).name, description=doc, formatter_class=raw)

    def number(self, flag: str, default: float | None, text: str, low: float = 1) -> None:
        """Adds an option: an integer if its default is one or ``None``, at least ``low``."""
        kind = float if isinstance(default, float) else int

        def convert(given: str) -> float:
            value = kind(given)
            if not low <= value < 2**31:
                raise argparse.ArgumentTypeError(
                    f"must be at least {low} and below 2**31, got {given}"
                )
            return value

        convert.__name__ = "number"  # "invalid number value: 'many'"
        text += "" if default is None else f" (default: {default})"
        self.add_argument(flag, default=default, type=convert, metavar="N", help=text)

    def file(self, flag: str, default: pathlib.Path | None, text: str, name: str = "FILE") -> None:
        """Adds an option that names a file or folder."""
        known = "" if default is None else f" (default: {_short(default)})"
        self.add_argument(flag, default=default, type=pathlib.Path, metavar=name, help=text + known)

    def error(self, message: str) -> NoReturn:
        """Leaves out the usage, which --help prints."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def run(self, work: Callable[[], int | None]) -> int:
        """Runs ``work``; what only the user can put right is told in one line, code 2."""
        try:
            return work() or 0
        except (UserError, OSError) as error:
            self.error(str(error))


def _short(path: pathlib.Path) -> pathlib.Path:
    here = pathlib.Path(__file__).parents[1]
    return path.relative_to(here) if path.is_relative_to(here) else path


def count(number: int, thing: str) -> str:
    """``1 device``, ``8 devices``, ``2 processes``."""
    ending = "" if number == 1 else "es" if thing.endswith("s") else "s"
    return f"{number:,} {thing}{ending}"


def has_saved(what: str) -> None:
    """Remembers what is safe on disk, for the line that ends an interrupted run."""
    _saved[:] = [what]


def interrupted() -> int:
    """Says so in one line, and what is saved; returns the exit code."""
    print(f"\ninterrupted; saved: {_saved[0] if _saved else 'nothing'}", file=sys.stderr)
    return 130


def _end_in_a_line(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        interrupted()


sys.excepthook = _end_in_a_line


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Lets the step in progress end on Ctrl-C, for its state is lost half-way; twice ends at once.

    Yields a function that tells whether Ctrl-C was pressed.
    """
    seen: list[int] = []

    def note(signum: int, frame: types.FrameType | None) -> None:
        seen.append(signum)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def check_plot(path: pathlib.Path | None) -> None:
    """Refuses a plot that could not be written, before anything is computed."""
    if path is None:
        return
    if path.suffix not in PLOTS:
        raise UserError(f"--plot must end in .png, .pdf or .svg, got {path}")
    if not path.parent.is_dir():
        raise UserError(f"cannot write there: no folder {path.parent}")


def save_plot(figure: Any, path: pathlib.Path) -> None:
    """Writes a matplotlib figure, and says where."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"plot: {path}")


def readable_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, ...; written as numbers, not as powers."""
    import matplotlib.ticker as ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())
