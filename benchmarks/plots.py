"""Plots of a run, in a style of their own: marker and dash tell lines apart without colour."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from benchmarks.results import UNITS, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#1a1a1a", "#8a8a8a"
# Colour, dashes, marker. Colours differ in lightness too: dark for ours, light for the others.
OURS = (INK, (0, ()), "o")
STYLES = {
    "jaxaccum": OURS,
    "all_take": OURS,
    "accumulator": OURS,
    "server": (INK, (0, (4, 2)), "D"),
    "server, 2 shards": (INK, (0, (1, 1)), "s"),
    "Ray alone": (FAINT, (0, (1, 2)), "."),
    "lazy_rows": OURS,
    "jaxaccum, tree of one": (INK, (0, (4, 2)), "D"),
    "with catch_up": (INK, (0, (1, 1)), "D"),
    "lazy_rows, catch_up": (INK, (0, (4, 2)), "D"),
    "jaxaccum, unknown rows": (INK, (0, (4, 2)), "D"),
    "by hand": ("#5f6f2f", (0, (6, 2)), "s"),
    "MultiSteps": ("#1f5a94", (0, (5, 1, 1, 1)), "^"),
    "dense": ("#4a90c2", (0, (3, 1)), "v"),
    "psum of dense gradients": ("#4a90c2", (0, (3, 1)), "v"),
    "PyTorch": ("#c0512f", (0, (7, 2, 2, 2)), "P"),
    "TensorFlow": ("#d98a29", (0, (2, 2)), "X"),
    "TensorFlow, fed": ("#d98a29", (0, (2, 2)), "X"),
    "TensorFlow, constant": ("#a8661b", (0, (5, 2)), "P"),
    "bare adds": (FAINT, (0, (1, 2)), "."),
    "bare scatter-add": (FAINT, (0, (1, 2)), "."),
}
OTHERS = [
    ("#6b4c9a", (0, (4, 1, 1, 1)), "p"),
    ("#3f8f7a", (0, (8, 2)), "h"),
    ("#9a6b4c", (0, (1, 1)), "*"),
    ("#5a5a5a", (0, (3, 3)), "d"),
]
RC = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlepad": 12,
    "axes.grid": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "svg.hashsalt": "jaxaccum",  # the same file from the same figures
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """A case drawn against one entry of its settings, both axes logarithmic.

    Attributes:
      panels: an entry of the settings; each of its values gets axes of its own.
      where: what entries of a setting must be.
    """

    name: str
    case: str
    x: str
    xlabel: str
    title: str
    metric: str = "ms"
    panels: str | None = None
    where: dict[str, Any] = dataclasses.field(default_factory=dict)


PLOTS = (
    Plot(
        "vocabulary",
        "train_step",
        "rows",
        "rows of the table",
        "A training step, by the rows of its table",
    ),
    Plot(
        "memory",
        "train_step",
        "rows",
        "rows of the table",
        "What a training step holds at its peak",
        metric="MB",
    ),
    Plot(
        "touched",
        "touched",
        "ids",
        "ids a micro-batch, of a million rows",
        "A training step, by the rows it touches",
    ),
    Plot(
        "gradient",
        "apply_one",
        "ids",
        "ids of the gradient",
        "Accumulating one gradient",
        where={"zipf": None},
    ),
    Plot(
        "threads",
        "coordinator",
        "threads",
        "threads",
        "An apply of {ids:,} x {columns}",
        panels="ids",
    ),
    Plot(
        "workers",
        "parameter_server",
        "workers",
        "worker processes",
        "A push of {ids:,} rows",
        panels="ids",
    ),
    Plot(
        "devices",
        "weak_scaling",
        "devices",
        "devices, as threads on the same cores",
        "A sum over devices of 4,096 rows each",
    ),
)


def draw_all(results: Results, folder: pathlib.Path, mark: str = "") -> list[pathlib.Path]:
    """Draws each plot whose case was measured, as PNG and SVG; ``mark`` goes into the SVG."""
    if not {point["case"] for point in results.points} & {"losses", *(p.case for p in PLOTS)}:
        return []
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(RC):
        for name, figure in figures_of(results):
            figure.text(0.005, 0.005, origin(results), size=7, color=FAINT)
            for ending in ("png", "svg"):
                path = folder / f"{name}.{ending}"
                known = {"Date": None, "Source": mark} if ending == "svg" else {}
                figure.savefig(path, dpi=144, metadata=known)
                written.append(path)
            matplotlib.pyplot.close(figure)
    return written


def figures_of(results: Results) -> Iterable[tuple[str, Figure]]:
    for plot in PLOTS:
        points = [
            point
            for point in results.of_case(plot.case)
            if all(point["at"].get(key) == value for key, value in plot.where.items())
            and any(plot.metric in metrics for metrics in point["figures"].values())
        ]
        if points:
            yield plot.name, draw(plot, points)
    if curves := results.of_case("losses"):
        yield "lazy_losses", draw_losses(curves)


def origin(results: Results) -> str:
    known = results.environment
    if not known:
        return ""
    versions = ", ".join(
        f"{name} {known['versions'][key].split('+')[0]}"
        for key, name in {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}.items()
        if key in known["versions"]
    )
    return f"{known['processor']}, {known['cores']} cores; {versions}; {known['date']}"


def draw(plot: Plot, points: list[dict[str, Any]]) -> Figure:
    import matplotlib.pyplot as plt

    values = list(dict.fromkeys(p["at"][plot.panels] for p in points)) if plot.panels else [None]
    figure, row = plt.subplots(
        1, len(values), figsize=(8 if len(values) == 1 else 3.6 * len(values), 4.6), squeeze=False
    )
    for value, axes in zip(values, row[0], strict=True):
        shown = [p for p in points if value is None or p["at"][plot.panels] == value]
        curves = curves_of(plot, shown)
        for line, style in zip(curves, styles_of(curves), strict=True):
            plot_line(axes, *curves[line], line, style)
        axes.set(xscale="log", yscale="log", xlabel=plot.xlabel)
        axes.set_title(plot.title.format(**shown[0]["at"]))
        at = sorted({x for xs, _ in curves.values() for x in xs})
        set_ticks(axes.xaxis, at if len(at) <= 4 else ticks(*axes.get_xlim()), count)
        axes.set_ylim(*at_least_a_decade(*axes.get_ylim()))
        set_ticks(axes.yaxis, ticks(*axes.get_ylim()), amount(plot.metric))
        if len(values) == 1:
            label_lines(axes, curves)
    if len(values) > 1:
        figure.legend(
            *row[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False,
            bbox_to_anchor=(0.5, 0.03), handlelength=4,
        )  # fmt: skip
    figure.tight_layout(rect=(0, 0.1 if len(values) > 1 else 0.03, 1, 1))
    return figure


def curves_of(
    plot: Plot, points: list[dict[str, Any]]
) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for point in sorted(points, key=lambda each: each["at"][plot.x]):
        for line, metrics in point["figures"].items():
            if plot.metric in metrics:
                xs, ys = curves.setdefault(line, ([], []))
                xs.append(point["at"][plot.x])
                ys.append(metrics[plot.metric])
    return curves


def styles_of(lines: Iterable[str]) -> list[Any]:
    others = iter(OTHERS * 4)
    return [STYLES[line] if line in STYLES else next(others) for line in lines]


def plot_line(axes: Axes, xs: list[float], ys: list[float], label: str, style: Any) -> None:
    colour, dashes, marker = style
    width = 2.4 if style == OURS else 1.4
    axes.plot(
        xs, ys, color=colour, linestyle=dashes, marker=marker, linewidth=width, markersize=6,
        markerfacecolor=colour if style == OURS else "white", markeredgecolor=colour, label=label,
        clip_on=False, zorder=3 if style == OURS else 2,
    )  # fmt: skip


def label_lines(axes: Axes, curves: dict[str, tuple[list[float], list[float]]]) -> None:
    """Names beside the ends of the lines, pushed apart where they would overlap."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    left, right = (math.log(limit) for limit in axes.get_xlim())
    ends = {
        line: ((math.log(xs[-1]) - left) / (right - left), (math.log(ys[-1]) - low) / (high - low))
        for line, (xs, ys) in curves.items()
    }
    heights = spread([height for _, height in ends.values()], apart=0.062)
    styles = styles_of(curves)
    for (line, (across, end)), height, (colour, *_) in zip(
        ends.items(), heights, styles, strict=True
    ):
        axes.annotate(
            line, xy=(across, end), xytext=(1.04, height), xycoords="axes fraction", va="center",
            color=colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def spread(heights: list[float], apart: float) -> list[float]:
    """The nearest heights in the same order that are ``apart`` from each other."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for _ in range(100):
        for below, above in itertools.pairwise(order):
            overlap = apart - (moved[above] - moved[below])
            if overlap > 1e-6:
                moved[below] -= overlap / 2
                moved[above] += overlap / 2
    return moved


def at_least_a_decade(low: float, high: float) -> tuple[float, float]:
    """Limits between which a small difference looks small."""
    widen = max(1.0, math.sqrt(10 * low / high))
    return low / widen, high * widen


def ticks(low: float, high: float, most: int = 12) -> list[float]:
    """Numbers people read: 1, 2, 5 of each decade, or 1 of each, or of some, if there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for subs, step in (((1, 2, 5), 1), ((1,), 1), ((1,), 3)):
        found = [sub * 10.0**k for k in decades if k % step == 0 for sub in subs]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most:
            break
    return found


def set_ticks(axis: Any, at: list[float], label: Any) -> None:
    axis.set_ticks(at, labels=[label(value) for value in at])
    axis.set_ticks([], minor=True)


def count(value: float) -> str:
    """Labels of a number of things: 500, 2k, 1M."""
    many, unit = next((each for each in ((1e6, "M"), (1e3, "k")) if value >= each[0]), (1, ""))
    return f"{value / many:,g}{unit}"


def amount(metric: str) -> Any:
    """Labels in the unit that needs the fewest digits: "500 us", "2 ms", "1 s"."""
    units = {unit: many for unit, (made_of, many) in UNITS.items() if made_of == metric}
    sizes = sorted({metric: 1.0, **units}.items(), key=lambda each: each[1])

    def label(value: float) -> str:
        unit, many = next((each for each in reversed(sizes) if value >= each[1] * 0.999), sizes[0])
        return f"{value / many:,.10g} {unit}"

    return label


def draw_losses(points: list[dict[str, Any]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, row = plt.subplots(1, len(points), figsize=(4.5 * len(points), 4), sharey=True)
    for point, axes in zip(points, row if len(points) > 1 else [row], strict=True):
        for line, metrics in point["figures"].items():
            curve = metrics["curve"]
            colour, dashes, _ = STYLES[line]
            steps = [30 * (k + 1) for k in range(len(curve))]
            axes.plot(steps, curve, color=colour, linestyle=dashes, linewidth=1.8, label=line)
        axes.set(xlabel="step", ylim=(0, None))
        axes.set_title(point["point"])
    first = figure.axes[0]
    first.set_ylabel("loss on unseen entries")
    first.legend(frameon=False, handlelength=4)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure
