"""Figures in README and docs: each is marked with its path in the results of one committed run.

A mark is a comment behind the figure, which Markdown does not show:

    a step takes 8.0 ms<!--= train_step/1,000,000/jaxaccum --> and holds 798 MB<!--= / -->;
    PyTorch takes 1.9 times<!--= train_step/1,000,000/PyTorch --> as long

The unit before a mark is its metric (``ms``, ``us``, ``MB``, ``times``), unless the path ends in
one. A path that begins with ``/`` goes on from the case and the point of the mark before it on the
line, and ``/`` alone from its line of the case too.

A table with a figure in most cells is marked once, by the line above it: one path for each cell,
the row's cells put in for ``{0}``, ``{1}``, and ``-`` for a cell that is not measured; a cell with
a mark of its own goes by that:

    <!--table: - | train_step/{0}/jaxaccum | train_step/{0}/dense -->
    | rows | lazy, ms | dense, ms |
    |---|---|---|
    | 2,048 | 2.1 | 0.55 |

What stands between ``<!--counts-->`` and ``<!--end-->`` is the table of compiled programs, after
``<!--origin-->`` what the results were measured on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import pathlib
import re
import sys
from collections.abc import Iterator

from benchmarks import plots
from benchmarks.results import FOLDER, Results, shown

ROOT = pathlib.Path(__file__).parents[1]
# The run that is quoted, and where its plots are shown.
QUOTED = FOLDER / "cpu-jax0.12.0.1.json"
PLOTS = ROOT / "docs" / "plots"
COUNTS = FOLDER / "compiled-before.json", FOLDER / "compiled-after.json"

NUMBER = r"\d[\d,]*(?:\.\d+)?"
UNIT = r"(?:ms|us|s|MB|GB|times)\b"
MARK = re.compile(rf"({NUMBER})( ?{UNIT})?<!--= *(.*?) *-->")
TABLE = re.compile(r"<!--table: *(.*?) *-->")
BLOCK = re.compile(r"<!--(counts|origin)-->(\n?).*?<!--end-->", re.DOTALL)
# What tells of a measurement wherever it stands.
QUOTES = re.compile(rf"{NUMBER} ?(?:ms|us|µs|ns)\b|{NUMBER} times (?:as (?:fast|long)|faster)\b")


@dataclasses.dataclass
class Page:
    """A page of Markdown, its figures as the results have them, and what is wrong with it."""

    text: str
    problems: list[str]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks figures", description=__doc__.splitlines()[0]
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--check", action="store_true", help="fail if a page shows anything else")
    how.add_argument("--write", action="store_true", help="renew the pages and the plots")
    options = parser.parse_args(arguments)
    if not QUOTED.exists():
        print(f"no results: {QUOTED.relative_to(ROOT)} comes from python -m benchmarks")
        return 1
    results, problems = Results.read(QUOTED), []
    for path in pages():
        page = renewed(path.read_text(), results)
        name = path.relative_to(ROOT)
        problems += [f"{name}:{problem}" for problem in page.problems]
        if page.text != path.read_text():
            if options.write:
                path.write_text(page.text)
                print(f"renewed: {name}")
            else:
                problems += differences(str(name), path.read_text(), page.text)
    if options.write:
        for path in plots.draw_all(results, PLOTS, mark=digest()):
            print(f"drawn: {path.relative_to(ROOT)}")
    problems += old_plots()
    print(*problems, sep="\n", file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


def pages() -> list[pathlib.Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str, results: Results) -> Page:
    """``text`` with each marked figure as it is in ``results``."""
    problems: list[str] = []
    made = {"counts": counts_table, "origin": lambda: plots.origin(results)}
    text = BLOCK.sub(lambda m: f"<!--{m[1]}-->{m[2]}{made[m[1]]()}{m[2]}<!--end-->", text)
    lines, is_code, columns = text.split("\n"), False, None
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        if is_code:
            continue
        try:
            lines[number - 1] = renewed_line(line, columns, results)
        except (KeyError, ValueError) as error:
            problems.append(f"{number}: {error.args[0]}")
            continue
        is_of_table = columns is not None and line.startswith("|")
        problems += [] if is_of_table else unmarked(line, number)
        if match := TABLE.fullmatch(line.strip()):
            columns = [path.strip() for path in match[1].split("|")]
        elif not line.startswith("|"):
            columns = None
    return Page("\n".join(lines), problems)


def renewed_line(line: str, columns: list[str] | None, results: Results) -> str:
    before: list[str] = []

    def figure(match: re.Match[str]) -> str:
        unit, path = match[2] or "", match[3]
        if path.startswith("/"):
            if not before:
                raise ValueError(f"{path!r} has no mark before it on its line")
            case, point, last = before
            path = f"{case}/{point}/{path[1:] or last}"
        before[:] = path.split("/")[:3]
        value = shown(results.figure(path, unit.strip() or "ms"))
        return f"{value}{unit}<!--= {match[3]} -->"

    line = MARK.sub(figure, line)
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    is_row = columns is not None and line.startswith("|") and set(line) - set("|-: ")
    if not is_row or not any(re.search(r"\d", cell) for cell in cells[1:]):
        return line
    if len(cells) != len(columns):
        raise ValueError(f"a row of {len(cells)} cells under {len(columns)} paths")
    names = [cell.replace("`", "") for cell in cells]
    for place, (cell, path) in enumerate(zip(cells, columns, strict=True)):
        if path == "-" or not cell or MARK.search(cell):
            continue
        match = re.fullmatch(rf"({NUMBER})( ?{UNIT})?(.*)", cell)
        if match is None:
            raise ValueError(f"{cell!r} is no figure, for which {path!r} stands above")
        value = results.figure(path.format(*names), (match[2] or "").strip() or "ms")
        cells[place] = f"{shown(value)}{match[2] or ''}{match[3]}"
    return f"| {' | '.join(cells)} |"


def unmarked(line: str, number: int) -> Iterator[str]:
    """What in a line seems to be measured and has no mark."""
    bare = re.sub(r"`[^`]*`", "", MARK.sub("", line))
    for match in QUOTES.finditer(bare):
        yield f"{number}: '{match[0]}' has no mark: which figure of the results is it?"


def differences(name: str, old: str, new: str) -> Iterator[str]:
    pairs = zip(old.split("\n"), new.split("\n"), strict=False)
    for number, (was, would) in enumerate(pairs, 1):
        if was != would:
            yield f"{name}:{number}: the results say otherwise:\n  {was}\n  {would}"


def digest() -> str:
    """Tells from which results a plot was drawn."""
    return f"{QUOTED.name} {hashlib.sha256(QUOTED.read_bytes()).hexdigest()[:16]}"


def old_plots() -> Iterator[str]:
    for path in sorted(PLOTS.glob("*.svg")):
        if digest() not in path.read_text():
            yield f"{path.relative_to(ROOT)} is not of {QUOTED.name}: figures --write draws it"


def counts_table() -> str:
    """Programs for GPUs and TPUs, before and after the choices docs/accelerators.md tells of."""
    before, after = (Results.read(path) for path in COUNTS)
    old = {point["point"]: point["figures"] for point in before.points}
    changing = ["kernels", "sorts", "scatters", "loops", "temp MB", "accessed MB"]
    fixed = ["must move MB", "least us"]
    rows = ["| target | path | " + " | ".join(changing + fixed) + " |"]
    rows.append("|---" * (2 + len(changing + fixed)) + "|")
    for point in after.points:
        for path, now in point["figures"].items():
            if point["point"] not in old:
                continue
            was = old[point["point"]].get(path, now)  # some paths were not asked for before
            cells = [
                str(now[key]) if was[key] == now[key] else f"{was[key]} → {now[key]}"
                for key in changing
            ]
            if not was["accessed MB"]:  # nor was this
                cells[-1] = str(now["accessed MB"])
            cells += [str(now[key]) for key in fixed]
            rows.append(f"| {point['point']} | `{path}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)
