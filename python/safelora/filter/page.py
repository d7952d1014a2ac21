"""The report of the input filter as one HTML page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ..page import document, facts, figure, legend, picture, scale, warnings
from .report import COLUMNS, cells

if TYPE_CHECKING:
    from .report import FilteredModule, FilterReport


def render(report: FilterReport) -> str:
    """The complete page."""
    panels = (
        ("left of the update on safety inputs", [module.safety_kept for module in report.modules]),
        ("left of the update on task inputs", [module.task_kept for module in report.modules]),
    )
    values = {
        title: dict(zip((module.name for module in report.modules), column, strict=True)) for title, column in panels
    }
    high = max([1.0, *(value for column in values.values() for value in column.values() if value is not None)])
    figures = "".join(
        figure(report, title, lambda m, t=title: values[t][m.name], 0.0, high, numbers=_numbers)  # type: ignore[misc]
        for title in values
    )
    pictures = "".join(
        f"<p>{escape(title[0].upper() + title[1:])}: {scale(0.0, high)}</p>"
        + picture(report, 0.0, high, lambda m, t=title: values[t][m.name])  # type: ignore[misc]
        for title in values
    )
    return document(
        "Input filter report",
        report,
        f"{_facts(report)}{warnings(report)}<h2>By depth</h2>{legend(report)}{figures}"
        f"<h2>Layers</h2>{pictures}<h2>Modules</h2>{_table(report)}",
    )


def _facts(report: FilterReport) -> str:
    found = {
        "would filter" if report.dry_run else "filtered": f"{len(report.filtered)} of {len(report.modules)}",
        "skipped": str(sum(module.decision == "skipped" for module in report.modules)),
    }
    for label, median in (
        ("left on safety inputs", report.median(lambda m: m.safety_kept)),
        ("left on task inputs", report.median(lambda m: m.task_kept)),
    ):
        if median is not None:
            found[label] = f"{median:.1%}"
    if report.separability:
        found["held out: safety / task"] = f"{report.separability['selectivity']:.2f}"
    return facts(found)


def _numbers(module: FilteredModule) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(COLUMNS[2:-1], cells(module), strict=True))


def _table(report: FilterReport) -> str:
    head = "".join(f'<th class="{"name" if column == "module" else ""}">{escape(column)}</th>' for column in COLUMNS)
    rows = "".join(
        f'<tr class="{escape(module.decision)}"><td class="name">{escape(module.name)}</td><td>{module.rank}</td>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(module))
        + f'<td>{escape(module.decision)}</td><td class="why">{escape(module.reason or "")}</td></tr>'
        for module in report.modules
    )
    return f'<div class="wide"><table><tr>{head}<th class="name">why</th></tr>{rows}</table></div>'
