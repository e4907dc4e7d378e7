"""The file of a run, and the way to a figure in it: ``case/point/line/metric``."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).parent / "results"
# A metric that is another one in other units: what it is made of, and how many make one of it.
UNITS = {"us": ("ms", 1e-3), "s": ("ms", 1e3), "GB": ("MB", 1e3)}


@dataclasses.dataclass
class Results:
    """What one run measured.

    Attributes:
      environment: the machine, the date, the versions.
      points: each with its ``case``, its ``point``, the setting it was measured ``at`` and its
        ``figures``, metrics by line; a later one replaces an earlier one of the same name.
      left_out: what could not be measured, and why.
    """

    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    points: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: pathlib.Path) -> Results:
        return cls(**json.loads(path.read_text()))

    def write(self, path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        points = ",\n".join("  " + json.dumps(point) for point in self.points)
        head = json.dumps({"environment": self.environment, "left_out": self.left_out}, indent=1)
        path.write_text(f'{head[:-2]},\n "points": [\n{points}\n ]\n}}\n')

    def add(self, point: dict[str, Any]) -> None:
        name = point["case"], point["point"]
        self.points = [each for each in self.points if (each["case"], each["point"]) != name]
        self.points.append(point)

    def of_case(self, case: str) -> list[dict[str, Any]]:
        return [point for point in self.points if point["case"] == case]

    def figure(self, path: str, metric: str = "ms") -> float:
        """The figure at ``case/point/line`` or ``case/point/line/metric``.

        Raises:
          KeyError: the run has no such figure; the message says what it has there.
        """
        case, point, line, *given = path.split("/")
        metric = given[0] if given else metric
        made_of, many = UNITS.get(metric, (metric, 1.0))
        points = {each["point"]: each["figures"] for each in self.of_case(case)}
        if not points:
            raise KeyError(f"no case {case!r}, only {sorted({p['case'] for p in self.points})}")
        if point not in points:
            raise KeyError(f"no point {point!r} in {case}, only {list(points)}")
        if line not in points[point]:
            raise KeyError(f"no line {line!r} in {case}/{point}, only {list(points[point])}")
        if made_of not in points[point][line]:
            raise KeyError(f"no {metric!r} in {case}/{point}/{line}")
        return points[point][line][made_of] / many


def shown(value: float) -> str:
    """A figure as prose shows it: two digits, or all before the point."""
    value = float(f"{value:.2g}") if value < 100 else value
    if value == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
