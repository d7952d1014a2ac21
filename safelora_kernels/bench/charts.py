"""Pictures of a run: the roofline, the speed-ups, the cost curves. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from .case import MOVING, OURS
from .run import Curve, Run
from .show import by_case, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _GRID, _OURS, _THEIRS, _MEMORY = "#1c2733", "#dde3e8", "#0b6e4f", "#c77d2e", "#5b7fa6"


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=_INK, labelsize=8)
    return figure, axes


def roofline(run: Run) -> Figure:
    """Attained GFLOP/s of ours against arithmetic intensity, under the ceilings of the run; the stock chains beside."""
    figure, (axis,) = _figure(7.5, 4.6)
    rows = [row for row in run.rows if row.flops and row.variant != MOVING]
    bandwidth = run.ceilings.get("moving operands, GB/s", 0.0)
    peaks = {name: value for name, value in run.ceilings.items() if "torch.mm" in name}
    intensities = [row.flops / row.bytes for row in rows]
    left, right = min(intensities) / 4, max(intensities) * 2
    for name, peak in peaks.items():
        ridge = peak / bandwidth if bandwidth else left
        start = min(max(left, ridge), right)
        if start < right:
            axis.plot([start, right], [peak, peak], color=_INK, lw=1)
            label = name.replace(", GFLOP/s", f"  {peak:.0f} GFLOP/s")
            axis.annotate(label, (right, peak), ha="right", va="bottom", fontsize=7.5, color=_INK)
    if bandwidth:
        top = max([*peaks.values(), bandwidth * left])
        end = min(right, top / bandwidth)
        label = f"moving the operands, {bandwidth:.1f} GB/s"
        axis.plot([left, end], [bandwidth * left, bandwidth * end], color=_INK, lw=1, label=label)
    best = {}
    for key, group in by_case(rows).items():
        others = [row for row in group if row.variant != OURS and row.error is not None]
        if others:
            best[key] = min(others, key=lambda row: row.median)
    ours = [row for row in rows if row.variant == OURS]
    markers = dict(zip(dict.fromkeys(row.op for row in rows), cycle("osD^vPX*<>pHd"), strict=False))
    for row in ours:
        other = best.get((row.op, row.case))
        x = row.flops / row.bytes
        if other is not None:
            axis.plot([x, x], [other.gflop_per_s, row.gflop_per_s], color=_GRID, lw=1.5, zorder=1)
            axis.plot(x, other.gflop_per_s, markers[row.op], ms=5, mfc="white", mec=_THEIRS, zorder=2)
        axis.plot(x, row.gflop_per_s, markers[row.op], ms=6, color=_OURS, zorder=3)
    for op, marker in markers.items():
        axis.plot([], [], marker, color=_OURS, ms=6, label=op)
    axis.plot([], [], "o", mfc="white", mec=_THEIRS, ms=5, label="best of stock torch, same case")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_xlabel("FLOP per byte that has to be moved", color=_INK, fontsize=9)
    axis.set_ylabel("GFLOP/s of the formula", color=_INK, fontsize=9)
    axis.grid(color=_GRID, lw=0.5)
    axis.legend(fontsize=7, frameon=False, loc="lower right")
    axis.set_title(_machine(run), fontsize=8, color=_INK, loc="left")
    return figure


def speedups(run: Run, cases: Sequence[tuple[str, str]] | None = None) -> Figure:
    """How many times longer each variant takes than ours; a tick shows what moving the operands takes. Logarithmic."""
    groups = {
        key: sorted((row for row in rows if row.variant not in (OURS, MOVING)), key=lambda row: row.over_ours or 0)
        for key, rows in by_case(run.rows).items()
        if cases is None or key in cases
    }
    groups = {key: rows for key, rows in groups.items() if rows}
    found = {(row.op, row.case, row.variant): row for row in run.rows}
    lines = sum(max(3, len(rows)) for rows in groups.values()) + len(groups)
    figure, (axis,) = _figure(8.6, 0.155 * lines + 0.8)
    y, ticks, labels = 0.0, [], []
    for (op, case), rows in groups.items():
        labels.append(f"{op}\n{case}\nours {milliseconds(found[op, case, OURS].median)} ms")
        height = max(3, len(rows)) / len(rows)
        top = y + 0.5
        for row in rows:
            center = y + 0.5 - height / 2
            value = row.over_ours or 0
            axis.barh(center, value - 1, height=0.8 * min(height, 1.2), left=1, color=_THEIRS, zorder=2)
            axis.annotate(f" {value:.3g}×  {row.variant}", (max(1.0, value), center), va="center", fontsize=7,
                          color=_INK, zorder=4)  # fmt: skip
            y -= height
        moving = found.get((op, case, MOVING))
        if moving is not None and moving.over_ours:
            axis.plot([moving.over_ours] * 2, [y + 0.6, top - 0.1], color=_INK, lw=1.5, zorder=3)
        ticks.append((top + y + 0.5) / 2)
        y -= 1
    axis.axvline(1, color=_OURS, lw=1.5, zorder=3)
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.tick_params(axis="y", length=0)
    axis.set_xscale("log")
    ratios = [row.over_ours for row in run.rows if row.over_ours]
    axis.set_xlim(min(0.05, *ratios), max(ratios) * 8)
    axis.set_ylim(y + 0.5, 1)
    label = "time over ours, logarithmic: green line = safelora_kernels, black tick = moving the operands once"
    axis.set_xlabel(label, fontsize=8, color=_INK)
    axis.set_title(_machine(run), fontsize=8, color=_INK, loc="left")
    return figure


def curves(run: Run) -> Figure:
    """Time and peak memory along each axis, with the straight line."""
    figure, axes = _figure(3.2 * max(1, len(run.curves)), 5.2, columns=max(1, len(run.curves)), rows=2)
    count = max(1, len(run.curves))
    for column, curve in enumerate(run.curves):
        _time(axes[column], curve)
        memory = axes[count + column]
        known = [(x, p / 2**20) for x, p in zip(curve.at, curve.peak_bytes, strict=True) if p is not None]
        if known:
            memory.plot(*zip(*known, strict=True), "s-", color=_MEMORY, ms=4, lw=1)
            memory.set_xlim(0)
            memory.set_ylim(0, 1.15 * max(peak for _, peak in known))
        memory.set_ylabel("peak beyond inputs, MiB", fontsize=8, color=_INK)
        memory.set_xlabel(curve.axis, fontsize=8, color=_INK)
    return figure


def _time(axis: Axes, curve: Curve) -> None:
    line = [1e3 * (curve.intercept + curve.slope * x) for x in curve.at]
    errors = [
        [max(0.0, 1e3 * (t - low)) for t, low in zip(curve.seconds, curve.low, strict=True)],
        [max(0.0, 1e3 * (high - t)) for t, high in zip(curve.seconds, curve.high, strict=True)],
    ]
    axis.plot(curve.at, line, color=_GRID, lw=2)
    axis.errorbar(curve.at, [1e3 * t for t in curve.seconds], errors, fmt="o", color=_OURS, ms=4, lw=1)
    axis.set_ylim(0, 1150 * max(curve.high))
    axis.set_xlim(0)
    axis.set_xlabel(curve.axis, fontsize=8, color=_INK)
    axis.set_ylabel("ms", fontsize=8, color=_INK)
    axis.set_title(curve.fixed, fontsize=7.5, color=_INK)


def _machine(run: Run) -> str:
    return f"{run.environment.get('device', '')}, torch {run.environment.get('torch', '')}, {run.started[:10]}"


def save(run: Run, folder: str | os.PathLike[str]) -> list[Path]:
    """Write roofline.png, speedups.png and curves.png, as far as the run holds what they show."""
    written = []
    for name, draw, present in (
        ("roofline", roofline, any(row.flops for row in run.rows)),
        ("speedups", speedups, bool(run.rows)),
        ("curves", curves, bool(run.curves)),
    ):
        if present:
            path = Path(folder) / f"{name}.png"
            draw(run).savefig(path, dpi=110, metadata={"Software": None})
            written.append(path)
    return written
