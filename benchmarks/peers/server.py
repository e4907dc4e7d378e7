"""A peer's side of the pipe: makes steps, runs them, answers with seconds."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.steps import Step


def serve(version: str, makers: Mapping[str, Callable[..., dict[str, Step]]]) -> None:
    """Answers requests, a line of JSON each, until there are no more."""
    # Libraries print: the pipe is for answers alone, all else goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Else what they print is written when the process ends, and stands last, for its error.
    sys.stdout.reconfigure(line_buffering=True)
    steps: dict[str, Step] = {}
    print(json.dumps(version), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            steps.clear()
            steps |= makers[request["make"]](**request["arguments"])
            answer: Any = list(steps)
        else:
            step = steps[request["run"]]
            answer = step.seconds(request["in_a_row"], request["wait_each"])
        print(json.dumps(answer), file=answers, flush=True)
