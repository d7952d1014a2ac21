"""Runs as text: tables, curves, and one run beside another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..text import markdown_table
from .case import MOVING, OURS
from .run import Curve, Row, Run

_CHANGED = 0.1


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def size(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


HEAD = ("variant", "ms", "20–80 %", "GB/s", "GFLOP/s", "of bandwidth", "of torch.mm", "peak MiB", "error", "× ours")


def cells(row: Row) -> tuple[str, ...]:
    flops = "" if row.variant == MOVING else f"{row.gflop_per_s:.3g}"
    note = "" if row.share == 1 else " *"
    return (
        row.variant + note, milliseconds(row.median), f"{milliseconds(row.low)}–{milliseconds(row.high)}",
        f"{row.gb_per_s:.3g}", flops, _percent(row.bandwidth_share), _percent(row.matmul_share), size(row.peak_bytes),
        "" if row.error is None else f"{row.error:.1e}", "" if row.over_ours is None else f"{row.over_ours:.2f}",
    )  # fmt: skip


def case_table(rows: Sequence[Row]) -> str:
    """The variants of one case."""
    first = rows[0]
    return f"{first.op}: {first.case}\n\n" + markdown_table(HEAD, map(cells, rows))


def curve_table(curves: Iterable[Curve]) -> str:
    """Each curve with its straight line."""
    head = ("against", "fixed", "points", "ms", "peak MiB", "line, ms", "worst deviation")
    rows = [
        (
            curve.axis,
            curve.fixed,
            ", ".join(f"{x:g}" for x in curve.at),
            ", ".join(map(milliseconds, curve.seconds)),
            ", ".join(map(size, curve.peak_bytes)),
            f"{curve.intercept * 1e3:.2g} + {curve.slope * 1e3:.2g}·x",
            _percent(curve.worst),
        )
        for curve in curves
    ]
    return markdown_table(head, rows)


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.op, row.case), []).append(row)
    return grouped


def endings(run: Run) -> str:
    """What a reader needs beside the tables: ceilings, what was left out and why."""
    lines = [f"{name}: {value:.1f}" for name, value in run.ceilings.items()]
    if any(row.share != 1 for row in run.rows):
        lines.append("* did part of the layers; time scaled to all of them")
    lines += [f"left out {key}: {reason}" for key, reason in run.skipped.items()]
    lines += [f"WRONG {key}: {reason}" for key, reason in run.failed.items()]
    lines.append(f"{len(by_case(run.rows))} cases and {len(run.curves)} curves in {run.elapsed:.0f} s")
    return "\n".join(lines)


def comparison(new: Run, old: Run) -> str:
    """Times of a run beside those of an earlier one.

    `at equal bandwidth` divides the times by those of moving the operands, which takes out most of what another load
    or another memory does. Changes over 10 % there are marked.
    """
    before = {(row.op, row.case, row.variant): row for row in old.rows}
    rows = []
    for row in new.rows:
        was = before.get((row.op, row.case, row.variant))
        if was is None or row.variant == MOVING:
            continue
        plain = row.median / was.median
        fair = plain
        if row.bandwidth_share and was.bandwidth_share:
            fair = was.bandwidth_share / row.bandwidth_share
        mark = "slower" if fair > 1 + _CHANGED else "faster" if fair < 1 - _CHANGED else ""
        rows.append(
            (f"{row.op}: {row.case}", row.variant, milliseconds(was.median), milliseconds(row.median), f"{plain:.2f}",
             f"{fair:.2f}", mark if row.variant == OURS else "")
        )  # fmt: skip
    if not rows:
        return "no case is in both runs"
    note = "" if new.environment.get("processor") == old.environment.get("processor") else "other processor; "
    title = f"{note}earlier run of {old.started}"
    return f"{title}\n\n" + markdown_table(
        ("case", "variant", "was ms", "is ms", "ratio", "at equal bandwidth", ""), rows
    )
