"""The picture of a frontier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .suite import HEADINGS, SAFETY, UTILITY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .frontier import Frontier, Point

# Okabe and Ito's palette: told apart by colour-blind readers. Controls are grey and dashed.
_COLOURS = ("#0072b2", "#56b4e9", "#cc79a7", "#d55e00", "#009e73", "#e69f00", "#000000")
_GREYS, _MARKERS = ("#8a8a8a", "#b5b5b5", "#5f5f5f"), "osD^vPX"


def draw(frontier: Frontier) -> Figure:
    """One panel per adapter: forbidden prompts answered against task answers that are right, with 95 % intervals.

    Raises RuntimeError when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("the picture needs matplotlib, which is not installed: pip install matplotlib.") from error
    count = len(frontier.adapters)
    columns = min(count, 2)
    lines = -(-count // columns)
    figure = Figure(figsize=(1.5 + 5.5 * columns, 1.8 + 4.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    names = {"x": UTILITY, "y": SAFETY}
    shown = {axis: next(n for n in keys if n in frontier.reference.outcome.metrics) for axis, keys in names.items()}
    for axes, adapter in zip(panels, frontier.adapters, strict=False):
        _panel(axes, frontier, adapter)
        axes.set_title(adapter, fontsize=11, loc="left")
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[max(0, count - columns) : count]:
        axes.set_xlabel(f"{HEADINGS[shown['x']]} (%), more is better")
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in panels[::columns]:
        axes.set_ylabel(f"{HEADINGS[shown['y']]} (%), less is safer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _panel(axes: Any, frontier: Frontier, adapter: str) -> None:
    rules: dict[str, list[Point]] = {}
    for point in frontier.pooled(adapter):
        rules.setdefault(point.rule, []).append(point)
    start = rules.pop("none")[0]
    colours, greys, markers = iter(_COLOURS * 4), iter(_GREYS * 4), iter(_MARKERS * 6)
    least = 100 * (start.utility.value - frontier.tolerance)
    axes.axvspan(least, 103, color="#000000", alpha=0.04, linewidth=0)
    for points in rules.values():
        control = points[0].control
        colour, marker = next(greys if control else colours), next(markers)
        path = sorted([start, *points], key=lambda point: _strength(point, points))
        axes.plot(
            *_centres(path), color=colour, linewidth=1.2 if control else 1.6, linestyle="--" if control else "-",
            alpha=0.8, zorder=2,
        )  # fmt: skip
        _bars(axes, points, colour)
        axes.plot(
            *_centres(points), marker, color=colour, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6,
            label=points[0].title, zorder=4,
        )  # fmt: skip
    for point, marker, label in ((start, "*", start.title), (frontier.reference, "h", frontier.reference.title)):
        _bars(axes, [point], "#000000")
        axes.plot(*_centres([point]), marker, color="#000000", markersize=11, label=label, zorder=5)
    axes.set(xlim=(-3, 103), ylim=(-3, 103))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _strength(point: Point, points: Sequence[Point]) -> float:
    """Order along the sweep, the unchanged adapter first: a factor weakens as it falls, all else as it rises."""
    if point.rule == "none":
        return float("-inf")
    return -point.value if points[0].parameter == "factor" else point.value


def _centres(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [100 * point.utility.value for point in points], [100 * point.safety.value for point in points]


def _bars(axes: Any, points: Sequence[Point], colour: str) -> None:
    for point in points:
        (low, high), (left, right) = point.safety.interval, point.utility.interval
        x, y = 100 * point.utility.value, 100 * point.safety.value
        axes.plot([x, x], [100 * low, 100 * high], color=colour, linewidth=0.8, alpha=0.35, zorder=1)
        axes.plot([100 * left, 100 * right], [y, y], color=colour, linewidth=0.8, alpha=0.35, zorder=1)
