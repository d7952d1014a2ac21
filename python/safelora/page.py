"""The report as one HTML page: no script, no outside resource, every string escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import chain
from typing import TYPE_CHECKING, Any

from .report import COSINE_ERROR, number

if TYPE_CHECKING:
    from .report import ModuleReport, Report, SafeLoraReport

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--cut:#d22}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1rem}
h1{margin:.2rem 0}h2{margin:2rem 0 .4rem}
.facts{display:flex;flex-wrap:wrap;gap:.6rem;padding:0;list-style:none}
.facts li{background:var(--soft);border-radius:.5rem;padding:.4rem .8rem;min-width:7rem}
.facts strong{display:block;font-size:1.3rem;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td.name,th.name{text-align:left;font-family:ui-monospace,monospace;font-size:.85em}
td.why{text-align:left;white-space:normal;min-width:12rem}
td.hash{text-align:left;font-family:ui-monospace,monospace;font-size:.8em;white-space:normal;overflow-wrap:anywhere}
.picture td{min-width:3.2rem;height:1.4rem;padding:0;border:2px solid Canvas;font-size:.75em;text-align:center}
.picture td.projected{box-shadow:inset 0 0 0 2px var(--cut);font-weight:bold}
.picture tbody th{position:sticky;left:0;background:Canvas}
tr.projected td{font-weight:600}
.scale{height:.8rem;width:10rem;display:inline-block;vertical-align:middle}
.warning{border-left:4px solid #d80;background:#d801;padding:.3rem .8rem}
figure{margin:0;overflow-x:auto}
figure svg{width:100%;height:auto;display:block}
svg text{font:11px system-ui,sans-serif;fill:CanvasText}
svg .grid{stroke:var(--line)}
svg .cut{stroke:var(--cut);stroke-dasharray:6 4}
svg .band{fill:var(--cut);opacity:.25}
svg .projected{stroke:var(--cut);stroke-width:2.5}
.legend span{display:inline-block;margin-right:1rem}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin-right:.3rem;vertical-align:-.05rem}
pre{overflow:auto;font-size:.85em}
@media (max-width:40rem){figure svg{min-width:36rem}svg text{font-size:17px}body{padding:.6rem}}
"""
# Viridis, sampled at equal steps: readable for colour-blind readers and in grey.
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
# Okabe and Ito's palette, without black: told apart by colour-blind readers.
_SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a900")
_COLUMNS = ("module", "rank", "cosine", "margin", "‖CB‖/‖B‖", "‖V‖_F", "decision")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 900, 300, 60, 34, 12


def render(report: SafeLoraReport) -> str:
    """The complete page of a projection."""
    values = [module.cosine for module in report.modules if module.cosine is not None] or [0.0]
    low, high = min(values), max(values)
    return document(
        "Safe LoRA report",
        report,
        f"{_facts(report)}{warnings(report)}"
        f"<h2>By depth</h2>{_legend(report)}{_cosine_figure(report)}{_shrinkage_figure(report)}"
        f"<h2>Layers</h2><p>Cosine of the update and its projection: {scale(low, high)}. Framed in red: projected.</p>"
        f"{picture(report, low, high, lambda module: module.cosine)}<h2>Modules</h2>{_table(report)}",
    )


def document(title: str, report: Any, body: str) -> str:
    """A page with summary and provenance around its body."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1><p>{escape(report.summary())}</p>{body}{_skips(report)}"
        f"{_serving(report)}<h2>Provenance</h2>{_provenance(report)}</html>\n"
    )


def warnings(report: Any) -> str:
    """A paragraph for each warning."""
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in report.warnings)


def scale(low: float, high: float) -> str:
    """The colour scale of the picture between its bounds."""
    gradient = ",".join(f"rgb{colour}" for colour in _COLOURS)
    return f'{low:.4f} <span class="scale" style="background:linear-gradient(90deg,{gradient})"></span> {high:.4f}'


def facts(items: dict[str, str]) -> str:
    """Short facts as tiles."""
    tiles = "".join(f"<li><strong>{escape(value)}</strong>{escape(name)}</li>" for name, value in items.items())
    return f'<ul class="facts">{tiles}</ul>'


def _facts(report: SafeLoraReport) -> str:
    measured = [module for module in report.modules if module.cosine is not None]
    found = {
        "would project" if report.dry_run else "projected": f"{len(report.projected)} of {len(report.modules)}",
        "skipped": str(sum(module.decision == "skipped" for module in report.modules)),
        "undecided": str(len(report.near_threshold)),
    }
    if measured:
        found["cosines"] = "{:.3f} to {:.3f}".format(*_range(measured, lambda module: module.cosine))
    cut = _cut(report)
    if cut is not None:
        found["cut"] = f"{cut:.4g}"
    return facts(found)


def _range(modules: Sequence[ModuleReport], value: Callable[[ModuleReport], float | None]) -> tuple[float, float]:
    values = [v for module in modules if (v := value(module)) is not None]
    return min(values), max(values)


def _cut(report: SafeLoraReport) -> float | None:
    """Where the decision changes: the threshold, or half way between the modules on both sides of a fixed number."""
    threshold = report.options.get("threshold")
    if threshold is not None:
        return float(threshold)
    projected = [m.cosine for m in report.projected if m.cosine is not None]
    kept = [m.cosine for m in report.modules if m.decision == "kept" and m.cosine is not None]
    return (max(projected) + min(kept)) / 2 if projected and kept else None


def legend(report: Report) -> str:
    """The colours of the module kinds."""
    return f'<p class="legend">{_kinds(report)}</p>'


def _legend(report: SafeLoraReport) -> str:
    framed = '<span><i style="border:2.5px solid var(--cut)"></i>projected</span>'
    return f'<p class="legend">{_kinds(report)}{framed}</p>'


def _kinds(report: Report) -> str:
    entries = "".join(
        f'<span><i style="background:{_series_colour(index)}"></i>{escape(column)}</span>'
        for index, column in enumerate(report.grid()[1])
    )
    return entries


def _series_colour(index: int) -> str:
    return _SERIES[index % len(_SERIES)]


def _cosine_figure(report: SafeLoraReport) -> str:
    cut = _cut(report)
    values = [module.cosine for module in report.modules if module.cosine is not None]
    if not values:
        return ""
    reach = [*values, *([cut] if cut is not None and 0 <= cut <= 1 else [])]
    pad = max((max(reach) - min(reach)) * 0.08, 1e-4)
    low, high = max(min(reach) - pad, 0.0), min(max(reach) + pad, 1.0)
    return figure(report, "cosine of the update and its projection", lambda m: m.cosine, low, high, cut)


def _shrinkage_figure(report: SafeLoraReport) -> str:
    logs = [math.log10(module.shrinkage) for module in report.modules if module.shrinkage]
    if not logs:
        return ""

    def value(module: ModuleReport) -> float | None:
        return math.log10(module.shrinkage) if module.shrinkage else None

    title = "what the projection leaves, ‖CB‖/‖B‖"
    return figure(report, title, value, math.floor(min(logs)), math.floor(max(logs)) + 1, None, power_of_ten=True)


def figure(
    report: Report,
    title: str,
    value: Callable[[Any], float | None],
    low: float,
    high: float,
    cut: float | None = None,
    power_of_ten: bool = False,
    numbers: Callable[[Any], str] | None = None,
) -> str:
    """One line per module kind over the depth of the model; `value` is drawn between `low` and `high`.

    numbers: what the tip of a dot says about its module.
    """
    rows, columns, cells = report.grid()

    def x(index: int) -> float:
        return _LEFT + (index + 0.5) * (_WIDTH - _LEFT - 10) / len(rows)

    def y(height: float) -> float:
        return _TOP + (high - height) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    ticks = [float(t) for t in range(int(low), int(high) + 1)] if power_of_ten else _ticks(low, high)
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{10**t if power_of_ten else t:.4g}</text>'
        for t in ticks
    ]
    step = max(1, math.ceil(len(rows) / 16))
    parts += [
        f'<text x="{x(i):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(rows[i])}</text>'
        for i in range(0, len(rows), step)
    ]
    if cut is not None and low <= cut <= high:
        top, bottom = y(min(cut + COSINE_ERROR, high)), y(max(cut - COSINE_ERROR, low))
        height = max(bottom - top, 1)
        parts.append(
            f'<rect class="band" x="{_LEFT}" width="{_WIDTH - _LEFT}" y="{top:.2f}" height="{height:.2f}">'
            f"<title>undecidable: within {COSINE_ERROR:g} of the cut</title></rect>"
            f'<line class="cut" x1="{_LEFT}" x2="{_WIDTH}" y1="{y(cut):.2f}" y2="{y(cut):.2f}"/>'
        )
    for index, column in enumerate(columns):
        found = [(i, cells[row, column]) for i, row in enumerate(rows) if (row, column) in cells]
        dots = [(x(i), y(v), module) for i, module in found if (v := value(module)) is not None]
        colour = _series_colour(index)
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in dots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-opacity=".45"/>')
        parts += [_dot(px, py, module, colour, numbers or _numbers) for px, py, module in dots]
    label = escape(title, quote=True)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _dot(px: float, py: float, module: Any, colour: str, numbers: Callable[[Any], str]) -> str:
    mark = ' class="projected"' if module.decision == "projected" else ""
    return (
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4"{mark} fill="{colour}">'
        f"<title>{escape(f'{module.name}: {module.decision}, {numbers(module)}')}</title></circle>"
    )


def _numbers(module: ModuleReport) -> str:
    return f"cosine {number(module.cosine, '.5f')}, ‖CB‖/‖B‖ {number(module.shrinkage, '.3e')}"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between `low` and `high`."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - raw))
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def picture(report: Report, low: float, high: float, value: Callable[[Any], float | None]) -> str:
    """Layers × module kinds, coloured by `value` between `low` and `high`."""
    rows, columns, cells = report.grid()
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f'<tr><th class="name">{escape(row)}</th>'
        + "".join(_cell(cells.get((row, column)), low, high, value) for column in columns)
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="picture"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(module: Any, low: float, high: float, value: Callable[[Any], float | None]) -> str:
    if module is None:
        return "<td></td>"
    title = escape(f"{module.name}: {module.decision}{f', {module.reason}' if module.reason else ''}", quote=True)
    number = value(module)
    if number is None:
        return f'<td title="{title}">–</td>'
    colour, ink = _colour((number - low) / (high - low) if high > low else 0.5)
    mark = ' class="projected"' if module.decision == "projected" else ""
    return f'<td{mark} title="{title}" style="background:{colour};color:{ink}">{number:.3f}</td>'


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
    rows = "".join(_row(module) for module in report.modules)
    return f'<div class="wide"><table><tr>{head}<th class="name">why</th></tr>{rows}</table></div>'


def _row(module: ModuleReport) -> str:
    numbers = zip(
        (module.cosine, module.margin, module.shrinkage, module.v_norm), (".5f", "+.5f", ".3e", ".4g"), strict=True
    )
    cells = "".join(f"<td>{number(value, spec)}</td>" for value, spec in numbers)
    why = module.reason or ("within the numerical error of the cut" if module.near_threshold else "")
    return (
        f'<tr class="{escape(module.decision)}"><td class="name">{escape(module.name)}</td><td>{module.rank}</td>'
        f'{cells}<td>{escape(module.decision)}</td><td class="why">{escape(why)}</td></tr>'
    )


def _skips(report: Any) -> str:
    if not report.passed_through:
        return ""
    names = "".join(f"<li><code>{escape(name)}</code></li>" for name in report.passed_through)
    summary = f"{len(report.passed_through)} tensors passed through unchanged"
    return f"<details><summary>{summary}</summary><ul>{names}</ul></details>"


def _serving(report: Any) -> str:
    notes = getattr(report, "serving", ())
    items = "".join(f"<li>{escape(text)}</li>" for text in notes)
    return f"<h2>Serving</h2><p>Of this adapter, with or without the projection:</p><ul>{items}</ul>" if notes else ""


def _provenance(report: Any) -> str:
    groups = chain(report.inputs.items(), (("options", report.options), ("versions", report.versions)))
    rows = "".join(
        f'<tr><td class="name">{escape(name)}</td><td class="hash">{escape(value)}</td></tr>'
        for group, content in groups
        for name, value in _flat(content, group)
    )
    return f'<div class="wide"><table>{rows}</table></div>'


def _flat(content: Any, name: str) -> list[tuple[str, str]]:
    """Leaves of nested dictionaries as dotted names and printable values."""
    if isinstance(content, dict):
        return [leaf for key, value in content.items() for leaf in _flat(value, f"{name}.{key}")]
    return [(name, content if isinstance(content, str) else json.dumps(content))]
