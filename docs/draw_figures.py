"""Draws the pictures of "How it works": SVG of the theme's colours, numbers computed as shown.

python docs/draw_figures.py      # writes docs/figures/*.svg; building the site does it as well
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable

FOLDER = pathlib.Path(__file__).parent / "figures"
# Colours of the site, which has a light and a dark side; what stands alone is light.
STYLE = """
.drawing { background: var(--color-background-primary, #fff); font: 13px system-ui, sans-serif; }
.drawing text { fill: var(--color-foreground-primary, #222); }
.drawing .note { fill: var(--color-foreground-secondary, #5a5c63); font-size: 12px; }
.drawing .code { font-family: ui-monospace, monospace; font-size: 12px; }
.drawing .head { font-weight: 600; }
.drawing rect { fill: var(--color-background-secondary, #f6f7f9);
  stroke: var(--color-foreground-muted, #8a8d96); }
.drawing rect.hot { fill: #3b82f6; fill-opacity: .28; stroke: #3b82f6; }
.drawing rect.warm { fill: #f59e0b; fill-opacity: .30; stroke: #d97706; }
.drawing path { stroke: var(--color-foreground-secondary, #5a5c63); fill: none; stroke-width: 1.5; }
.drawing path.tip { fill: var(--color-foreground-secondary, #5a5c63); stroke: none; }
.drawing path.hot { stroke: #3b82f6; stroke-width: 2; }
.drawing path.warm { stroke: #d97706; stroke-width: 2; stroke-dasharray: 6 4; }
"""


class Picture:
    """An SVG of so many units; 480 across is readable on a telephone."""

    def __init__(self, height: int, width: int = 480) -> None:
        self._size, self._parts = (width, height), list[str]()

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, kind: str = "") -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" class="{kind}"/>'
        )

    def cells(
        self, x: float, y: float, values: Iterable[object], hot: Iterable[int] = (),
        warm: Iterable[int] = (), w: float = 36,
    ) -> None:  # fmt: skip
        """An array: a box for each value."""
        hot, warm = set(hot), set(warm)
        for i, value in enumerate(values):
            kind = "hot" if i in hot else "warm" if i in warm else ""
            self.box(x + i * w, y, w, 24, kind)
            self.text(x + (i + 0.5) * w, y + 16.5, str(value), "code", "middle")

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a tip at the last, along an axis."""
        (a, b), (x, y) = points[-2:]
        self.line(points)
        dx, dy = (x > a) - (x < a), (y > b) - (y < b)
        tip = [(x, y), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx),
               (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx)]  # fmt: skip
        self._parts.append(f'<path class="tip" d="M{_path(tip)}Z"/>')

    def line(self, points: Iterable[tuple[float, float]], kind: str = "") -> None:
        self._parts.append(f'<path class="{kind}" d="M{_path(points)}"/>')

    def save(self, name: str) -> None:
        width, height = self._size
        FOLDER.mkdir(exist_ok=True)
        path, text = FOLDER / f"{name}.svg", "\n".join(self._parts)
        text = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width * 1.2:g}" class="drawing"><style>{STYLE}</style>\n{text}\n</svg>\n'
        )
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def way_of_a_gradient() -> Picture:
    picture = Picture(430)
    picture.text(60, 20, "table", "head", "middle")
    picture.text(60, 36, "1,000,000 rows", "note", "middle")
    for i in range(33):
        picture.box(20, 46 + 11 * i, 80, 8, "hot" if i in (3, 4, 17) else "")
    steps = [
        ("table[ids]", "n rows are read"),
        ("your loss", "as it is"),
        ("value_and_sparse_grad", "n slices: indices [n], values [n, 64]"),
        ("accumulate", "k different rows: sums and counts"),
        ("your optax transform", "on these k rows and their state"),
        ("apply_updates", "k rows are written, in place"),
    ]
    for i, (name, what) in enumerate(steps):
        top = 46 + 62 * i
        picture.box(170, top, 290, 46, "warm" if i in (1, 4) else "hot")
        picture.text(184, top + 19, name, "code head")
        picture.text(184, top + 36, what, "note")
        if i:
            picture.arrow((315, top - 16), (315, top - 2))
    picture.arrow((102, 69), (168, 69))
    picture.arrow((168, 379), (104, 379))
    picture.text(
        20, 426, "yours is orange; everything right of the table has the size of a batch", "note"
    )
    return picture


def gradient_to_rows() -> Picture:
    picture = Picture(300)
    picture.text(115, 22, "what JAX traces", "head", "middle")
    picture.text(355, 22, "what is evaluated", "head", "middle")
    rows = [
        ("zeros[1000000, 64]", "", "nothing", ""),
        ("scatter-add at ids", "one for each lookup", "(ids, slices)", "a list with one entry"),
        ("add", "several lookups", "one list after the other", "no arithmetic"),
        ("cast, scale, reshape", "on the way to the table", "the same, on the slices", ""),
        ("gradient [1000000, 64]", "", "IndexedSlices, n rows", ""),
    ]
    for i, (left, left_note, right, right_note) in enumerate(rows):
        top = 34 + 52 * i
        for x, name, note, kind in ((10, left, left_note, ""), (250, right, right_note, "hot")):
            picture.box(x, top, 210, 40, kind)
            picture.text(x + 105, top + (17 if note else 25), name, "code", "middle")
            picture.text(x + 105, top + 33, note, "note", "middle")
            if i:
                picture.arrow((x + 105, top - 12), (x + 105, top - 1))
        picture.arrow((222, top + 20), (247, top + 20))
    return picture


def bid_settle_claim() -> Picture:
    """Row 3 has slot 0 already; a gradient of rows 7, 3, 7, 9 comes. There is room for four."""
    ids, capacity, held = [7, 3, 7, 9], 4, {3: 0}
    bids = [capacity + i for i in range(len(ids))]
    after = {row: min([held.get(row, 99)] + [b for b, i in zip(bids, ids, strict=True) if i == row])
             for row in (3, 7, 9)}  # fmt: skip
    winner = [after[i] for i in ids]
    is_first = [w == b for w, b in zip(winner, bids, strict=True)]
    rank = [sum(is_first[:i]) for i in range(len(ids))]
    new_slot = {i: len(held) + r for i, r, f in zip(ids, rank, is_first, strict=True) if f}
    settled = {**held, **new_slot}
    first = [i for i, f in enumerate(is_first) if f]

    picture, x = Picture(436), 300
    yes_no = ["yes" if f else "no" for f in is_first]
    before = [str(held.get(row, "-")) for row in after]
    new, slots = [settled[row] for row in after], [settled[i] for i in ids]
    lines: list[tuple[str, str, list[int] | list[str], list[int], str]] = [
        ("the gradient's rows", "unsorted, 7 twice", ids, [], ""),
        ("map, at rows 3, 7, 9", "row 3 lives in slot 0", before, [], ""),
        ("bid: 4 + position", "above every slot", bids, [], "1  bid"),
        ("map, after a scatter-min", "the lowest bid wins", [*after.values()], [1, 2], ""),
        ("read back", "the map entry of each row now", winner, [], ""),
        ("is it mine? then I am first", "4 = 4 and 7 = 7", yes_no, first, ""),
        ("new rows before me", "a prefix sum; in all: 2", rank, [], "2  settle"),
        ("map, winners made slots", "rows held + new rows before", new, [1, 2], ""),
        ("slot of each slice", "", slots, first, "3  claim"),
    ]
    for i, (name, note, values, hot, step) in enumerate(lines):
        top = 10 + 44 * i + 6 * (i > 1) + 6 * (i > 5) + 6 * (i > 7)
        if step:
            picture.line([(10, top - 8), (470, top - 8)])
        picture.text(10, top + 16, step, "head")
        picture.text(74, top + 12, name)
        picture.text(74, top + 27, note, "note")
        is_last = i == len(lines) - 1
        picture.cells(x, top, values, *((), hot) if is_last else (hot,))
    picture.text(
        74, 427, "orange slices overwrite what a slot was left with; the others add", "note"
    )
    return picture


def take_without_a_sort() -> Picture:
    """Rows 9, 3, 7 live in slots 0, 1, 2, of a table of twelve rows."""
    held, rows, capacity = [9, 3, 7], 12, 4
    bits = [int(row in held) for row in range(rows)]
    rank = [sum(bits[:row]) for row in held]
    order = [rank.index(i) for i in range(len(held))]
    picture, w = Picture(330), 30
    picture.text(10, 24, "slots, in order of first touch")
    picture.cells(300, 8, [*held, "-"], range(3))
    picture.text(10, 66, "1  one bit for each row of the table: set those held", "head")
    picture.cells(60, 76, bits, [i for i, b in enumerate(bits) if b], w=w)
    for row in range(rows):
        picture.text(60 + (row + 0.5) * w, 114, str(row), "note", "middle")
    picture.text(10, 144, "2  rank of a row: how many bits are set below it", "head")
    picture.text(10, 160, "a count of bits in a word, and a running sum over words of 32", "note")
    picture.cells(300, 170, [*rank, "-"], range(3))
    picture.text(10, 187, "of rows 9, 3, 7")
    picture.text(10, 226, "3  each slot goes to the place that its rank says", "head")
    picture.text(10, 253, "slots in order")
    picture.cells(300, 236, [*order, "-"], range(3))
    picture.text(10, 287, "rows that come out: ascending, padding last")
    picture.cells(300, 270, [*(held[i] for i in order), rows], range(capacity - 1))
    picture.text(10, 320, "nothing is compared with anything: no sort", "note")
    return picture


def what_all_take_sends() -> Picture:
    devices = [{3: 2, 7: 1}, {7: 5, 9: 4}, {3: 1}]
    union = sorted(set().union(*devices))
    sums = ["+".join(str(d[row]) for d in devices if row in d) for row in union]
    picture = Picture(344)
    for i, held in enumerate(devices):
        x = 20 + 155 * i
        picture.text(x + 65, 20, f"device {i}", "head", "middle")
        picture.text(x - 6, 47, "", "note")
        picture.cells(x, 30, [*held, *["-"] * (2 - len(held))], range(len(held)), w=65)
        values = [f"sum {v}" for v in held.values()]
        picture.cells(x, 54, values + ["-"] * (2 - len(held)), range(len(held)), w=65)
        picture.arrow((x + 65, 80), (x + 65, 112))
        picture.arrow((x + 65, 176), (x + 65, 206))
    picture.box(20, 114, 440, 60)
    picture.text(240, 136, "one all-gather of max_rows rows from each device", "", "middle")
    picture.text(
        240, 156, "3 x 2 x (row bytes + 8), never the 1,000,000 rows of the table", "note", "middle"
    )
    picture.text(240, 224, "on every device, bit for bit the same:", "head", "middle")
    picture.cells(105, 236, union, range(3), w=90)
    picture.cells(105, 260, sums, range(3), w=90)
    picture.text(
        240,
        306,
        "rows ascending, added in the order of the devices, then divided",
        "note",
        "middle",
    )
    picture.text(
        240,
        326,
        "fewer gradients than num_required? every device keeps what it has",
        "note",
        "middle",
    )
    return picture


def verdicts() -> Picture:
    picture = Picture(324)
    asked = [
        ("from before the current step?", "STALE", "drop it, or compute it anew"),
        ("an index outside of the table?", "INVALID", "look for the bug"),
        ("values you told it to skip?", "SKIPPED", "lower a loss scale"),
        ("more new rows than room?", "OVERFLOW", "take or grow, and apply again"),
    ]
    for i, (question, verdict, remedy) in enumerate(asked):
        top = 10 + 64 * i
        picture.box(10, top, 215, 36)
        picture.text(117, top + 22, question, "", "middle")
        picture.arrow((227, top + 18), (283, top + 18))
        picture.text(254, top + 12, "yes", "note", "middle")
        picture.box(285, top, 185, 36, "warm")
        picture.text(377, top + 16, verdict, "code head", "middle")
        picture.text(377, top + 31, remedy, "note", "middle")
        picture.arrow((117, top + 37), (117, top + 62))
        picture.text(124, top + 54, "no", "note")
    picture.box(10, 266, 215, 36, "hot")
    picture.text(117, 288, "ACCEPTED: added", "code head", "middle")
    picture.text(285, 280, "orange: nothing changes", "note")
    picture.text(285, 297, "but a count of the verdict", "note")
    return picture


def catching_up() -> Picture:
    """One number under momentum, touched at steps 1 to 4 and at step 16; nothing in between."""
    touched = {1, 2, 3, 4, 16}

    def path(sleeps: bool) -> list[float]:
        value, velocity, values = 0.0, 0.0, [0.0]
        for step in range(1, 21):
            if step in touched or not sleeps:
                velocity = 0.9 * velocity + (step in touched)
                value += velocity
            values.append(value)
        return values

    dense, lazy = path(sleeps=False), path(sleeps=True)
    caught = [dense[step if step <= 4 else 4 if step < 16 else 16] for step in range(21)]
    picture = Picture(262)

    def points(values: list[float]) -> list[tuple[float, float]]:
        return [(30 + 17 * step, 200 - 4.2 * v) for step, v in enumerate(values)]

    def stairs(values: list[float]) -> list[tuple[float, float]]:
        at = points(values)
        return [q for (x, y), (x2, _) in zip(at, [*at[1:], at[-1]], strict=True)
                for q in ((x, y), (x2, y))]  # fmt: skip

    picture.line([(30, 10), (30, 200), (385, 200)])
    for step in sorted(touched):
        picture.text(30 + 17 * step, 216, str(step), "note", "middle")
        picture.line([(30 + 17 * step, 200), (30 + 17 * step, 204)])
    picture.text(207, 234, "steps in which the row has a gradient", "note", "middle")
    picture.line(points(dense))
    picture.line(stairs(caught), "hot")
    picture.line(stairs(lazy), "warm")
    picture.text(392, points(dense)[-1][1] - 2, "dense", "")
    picture.text(392, points(dense)[-1][1] + 13, "catch_up", "")
    picture.text(392, points(lazy)[-1][1] + 4, "lazy", "")
    picture.text(30, 254, "grey: dense; blue: lazy_rows with catch_up; dashed: lazy_rows", "note")
    return picture


DRAWN: list[Callable[[], Picture]] = [
    way_of_a_gradient, gradient_to_rows, bid_settle_claim, take_without_a_sort,
    what_all_take_sends, verdicts, catching_up,
]  # fmt: skip


def main() -> None:
    for draw in DRAWN:
        draw().save(draw.__name__)


if __name__ == "__main__":
    main()
