"""Runs some cases in a process of their own and tells the run, a line of JSON for each event.

A process a case: its flags are read once, before Python or XLA start, and what it held is given
back when it ends.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any, TextIO

import benchmarks.cases  # noqa: F401 (registers them)
from benchmarks import environment, peers
from benchmarks.harness import CASES, HASTE, Figures, LeftOutError


def main() -> None:
    """Reads what to run from the first argument, as the run has written it."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print: the pipe is for events alone
    told = json.loads(sys.argv[1])
    peers.PYTHONS.update(told["peers"])
    HASTE.quick = told["quick"]
    tell(events, "environment", environment=environment.describe())
    for name in told["cases"]:
        run_case(name, events)
    tell(events, "peers", versions=peers.VERSIONS, left_out=peers.LEFT_OUT)


def run_case(name: str, events: TextIO) -> None:
    case = CASES[name]
    for setting in case.quick if HASTE.quick else case.settings:
        point = case.point.format(**setting)
        tell(events, "start", case=name, point=point)
        try:
            figures = case.run(**setting)
        except LeftOutError as error:
            tell(events, "left out", case=name, point=point, why=str(error))
        except Exception as error:
            traceback.print_exc()
            tell(events, "failed", case=name, point=point, why=f"{type(error).__name__}: {error}")
        else:
            at = {key: each for key, each in setting.items() if not isinstance(each, list)}
            tell(events, "point", case=name, point=point, at=at, figures=rounded(figures))
        gc.collect()


def tell(events: TextIO, event: str, **what: Any) -> None:
    print(json.dumps({"event": event, **what}), file=events, flush=True)


def rounded(figures: Figures) -> Figures:
    """To four digits, which is more than any clock here is worth."""

    def digits(value: Any) -> Any:
        if isinstance(value, list):
            return [digits(each) for each in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {
        line: {metric: digits(value) for metric, value in metrics.items()}
        for line, metrics in figures.items()
    }


if __name__ == "__main__":
    main()
