"""What a run prints: a table a case, a row a point, a column a line."""

from __future__ import annotations

import math
from typing import Any

import rich.box
import rich.markup
import rich.table

from benchmarks.results import shown


def table_of(points: list[dict[str, Any]]) -> rich.table.Table:
    """Times, how many times the first line's they are, and what else was counted."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    lines = list(dict.fromkeys(line for point in points for line in point["figures"]))
    table.add_column("")
    for line in lines:
        table.add_column(line, justify="right")
    for point in points:
        cells = [cell(point["figures"].get(line, {})) for line in lines]
        table.add_row(rich.markup.escape(point["point"]), *cells)
    return table


def cell(metrics: dict[str, Any]) -> str:
    said = []
    for metric, value in metrics.items():
        if metric == "ms":
            said.append(time_of(value))
        elif metric == "times":
            said[-1] += f" ({shown(value)}x)" if not math.isclose(value, 1) else ""
        elif not isinstance(value, list):
            said.append(f"{shown(value)} {metric}")
    return "\n".join(said)


def time_of(ms: float) -> str:
    """In the unit that needs the fewest digits."""
    for unit, factor in (("s", 1e-3), ("ms", 1.0)):
        if ms * factor >= 1:
            return f"{shown(ms * factor)} {unit}"
    return f"{shown(ms * 1e3)} us"
