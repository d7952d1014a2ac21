"""The report as one HTML page: no script, no outside resource, every string escaped."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import ModuleReport, SafeLoraReport

_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #8884}
th{position:sticky;top:0;background:Canvas}
td.name,th.name{text-align:left;font-family:ui-monospace,monospace;font-size:.85em}
.picture td{width:3.2rem;height:1.4rem;padding:0;border:2px solid Canvas;font-size:.75em;text-align:center}
.picture td.projected{border-color:#d22;font-weight:bold}
.projected td{font-weight:600}
.bar{height:.8rem;width:16rem;display:inline-block;vertical-align:middle}
.warning{border-left:4px solid #d80;padding-left:.8rem}
pre{overflow:auto;font-size:.85em}
"""
# Viridis, sampled at equal steps: readable for colour-blind readers and in grey.
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_COLUMNS = ("module", "rank", "cosine", "margin", "‖CB‖/‖B‖", "‖V‖_F", "decision", "why")


def render(report: SafeLoraReport) -> str:
    """The complete page."""
    values = [module.cosine for module in report.modules if module.cosine is not None] or [0.0]
    low, high = min(values), max(values)
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in report.warnings)
    facts = {"options": report.options, "inputs": report.inputs, "versions": report.versions}
    gradient = ",".join(f"rgb{colour}" for colour in _COLOURS)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Safe LoRA report</title>'
        f"<style>{_STYLE}</style><h1>Safe LoRA report</h1><p>{escape(report.summary())}</p>{warnings}"
        f'<h2>Layers</h2><p>Cosine of the update and its projection: {low:.4f} <span class="bar" '
        f'style="background:linear-gradient(90deg,{gradient})"></span> {high:.4f}. Framed in red: projected.</p>'
        f"{_picture(report, low, high)}<h2>Modules</h2>{_table(report)}"
        f"<h2>Options and inputs</h2><pre>{escape(json.dumps(facts, indent=1))}</pre></html>\n"
    )


def _picture(report: SafeLoraReport, low: float, high: float) -> str:
    rows, columns, cells = report.grid()
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f'<tr><th class="name">{escape(row)}</th>'
        + "".join(_cell(cells.get((row, column)), low, high) for column in columns)
        + "</tr>"
        for row in rows
    )
    return f'<table class="picture"><tr><th></th>{head}</tr>{body}</table>'


def _cell(module: ModuleReport | None, low: float, high: float) -> str:
    if module is None:
        return "<td></td>"
    title = escape(f"{module.name}: {module.decision}{f', {module.reason}' if module.reason else ''}", quote=True)
    if module.cosine is None:
        return f'<td title="{title}">–</td>'
    colour, ink = _colour((module.cosine - low) / (high - low) if high > low else 0.5)
    mark = ' class="projected"' if module.decision == "projected" else ""
    return f'<td{mark} title="{title}" style="background:{colour};color:{ink}">{module.cosine:.3f}</td>'


def _colour(position: float) -> tuple[str, str]:
    """Background at `position` in [0, 1] of the scale, and black or white ink, whichever is legible on it."""
    scaled = min(max(position, 0.0), 1.0) * (len(_COLOURS) - 1)
    index = min(int(scaled), len(_COLOURS) - 2)
    part = scaled - index
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_COLOURS[index], _COLOURS[index + 1], strict=True))
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return f"rgb({red},{green},{blue})", "#000" if light else "#fff"


def _table(report: SafeLoraReport) -> str:
    head = "".join(f'<th class="{"name" if column == "module" else ""}">{escape(column)}</th>' for column in _COLUMNS)
    return f"<table><tr>{head}</tr>{''.join(_row(module) for module in report.modules)}</table>"


def _row(module: ModuleReport) -> str:
    numbers = zip(
        (module.cosine, module.margin, module.shrinkage, module.v_norm), (".5f", "+.5f", ".3e", ".4g"), strict=True
    )
    cells = "".join(f"<td>{'–' if value is None else format(value, spec)}</td>" for value, spec in numbers)
    why = module.reason or ("within the numerical error of the cut" if module.near_threshold else "")
    return (
        f'<tr class="{escape(module.decision)}"><td class="name">{escape(module.name)}</td><td>{module.rank}</td>'
        f'{cells}<td>{escape(module.decision)}</td><td class="name">{escape(why)}</td></tr>'
    )
