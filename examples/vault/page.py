"""The demo's report: one self-contained HTML page and one PNG."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from results import DemoResult, ModelResult, reading

from safelora import ModuleReport, SafeLoraReport
from safelora.rates import Rate

COLUMNS = (
    ("answered", "Forbidden answered", "lower is safer"),
    ("records", "Records right", "higher is better"),
    ("over_refusal", "Ordinary refused", "lower is better"),
)
COLOURS = ("#b4431f", "#1f6f6b", "#7a8699")
PAGE = Path(__file__).with_suffix(".html")


def save_html(result: DemoResult, path: Path, example_prompts: Sequence[str] = ()) -> None:
    """Write the report as one HTML file without outside references, with all answers to ``example_prompts``."""
    path.write_text(
        Template(PAGE.read_text()).substitute(
            style=PAGE.with_suffix(".css").read_text(),
            headings="".join(f"<div>{title}<br>{hint}</div>" for _, title, hint in COLUMNS),
            rows="\n".join(map(_row, result.models)),
            grids=_grid(result.report, wide=True) + _grid(result.report, wide=False) + _legend(result.report),
            examples="\n".join(_example(prompt, result.models) for prompt in example_prompts),
            reading="\n".join(f"<p>{escape(sentence)}</p>" for sentence in reading(result)),
            facts="".join(_entry(name, str(value)) for name, value in result.facts.items()),
        ),
        encoding="utf-8",
    )


def save_png(result: DemoResult, path: Path) -> None:
    """Write the table as a chart of dots and intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.62 * len(result.models)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = range(len(result.models))
    for offset, (field, title, _), colour in zip((-0.22, 0, 0.22), COLUMNS, COLOURS, strict=True):
        rates: list[Rate] = [getattr(model.outcome, field) for model in result.models]
        heights = [row + offset for row in rows]
        low, high = zip(*([100 * bound for bound in rate.interval] for rate in rates), strict=True)
        axes.hlines(heights, low, high, color=colour, linewidth=2, alpha=0.6)
        axes.plot([100 * rate.value for rate in rates], heights, "o", color=colour, label=title)
    axes.set(yticks=list(rows), yticklabels=[model.label for model in result.models])
    axes.set(xlim=(-3, 103), xlabel="% of held-out questions (bar: 95 % Wilson interval)")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _row(model: ModelResult) -> str:
    cells = "".join(_cell(getattr(model.outcome, field), title) for field, title, _ in COLUMNS)
    mark = " key" if model.key == "projected" else ""
    name = f'<div><b>{escape(model.label)}</b><span class="soft">{escape(model.note)}</span></div>'
    return f'<div class="row{mark}">{name}{cells}</div>'


def _cell(rate: Rate, title: str) -> str:
    low, high = (100 * bound for bound in rate.interval)
    line = '<line x1="{}%" x2="{}%" y1="9" y2="9" stroke="var(--{})" stroke-width="{}" stroke-linecap="round"/>'
    text = f"<b>{rate.value:.0%}</b> [{low:.0f}–{high:.0f}] of {rate.total}"
    return (
        f'<div class="cell"><p><i>{title}</i><span>{text}</span></p>'
        f'<svg role="img" aria-label="{rate.hits} of {rate.total}">{line.format(0, 100, "line", 1)}'
        f"{line.format(round(low, 1), round(high, 1), 'soft', 4)}"
        f'<circle cx="{100 * rate.value:.1f}%" cy="9" r="6" fill="var(--ink)"/></svg></div>'
    )


def _grid(report: SafeLoraReport, *, wide: bool) -> str:
    """Layers across on a wide screen, layers down on a phone."""
    layers, kinds, cells = report.grid()
    highest = _highest(report)
    table = [[_square(cells.get((layer, kind)), highest) for kind in kinds] for layer in layers]
    across, down = [kind.rpartition(".")[2].removesuffix("_proj") for kind in kinds], layers
    if wide:
        across, down, table = down, across, [list(column) for column in zip(*table, strict=True)]
    html = ["<div></div>", *(f"<div>{escape(name)}</div>" for name in across)]
    for name, squares in zip(down, table, strict=True):
        html += [f"<div>{escape(name)}</div>", *squares]
    style = f"grid-template-columns:2.6rem repeat({len(across)},1fr)"
    return f'<div class="grid {"wide" if wide else "tall"}" style="{style}">{"".join(html)}</div>'


def _square(module: ModuleReport | None, highest: float) -> str:
    if module is None or module.cosine is None or module.shrinkage is None:
        return "<div></div>"
    share = 100 * module.cosine / highest if highest > 0 else 0
    mark = " p" if module.decision == "projected" else ""
    title = f"{module.name}: cosine {module.cosine:.3f}, ‖CB‖/‖B‖ {module.shrinkage:.2g}, {module.decision}"
    colour = f"background:color-mix(in oklab,var(--high) {share:.0f}%,var(--low))"
    return f'<div class="m{mark}" title="{escape(title)}" style="{colour}"></div>'


def _highest(report: SafeLoraReport) -> float:
    return max((module.cosine for module in report.modules if module.cosine is not None), default=1.0)


def _legend(report: SafeLoraReport) -> str:
    return (
        f'<div class="legend"><span>cosine of the update with its projection: 0</span><span class="ramp"></span>'
        f'<span>{_highest(report):.2f}</span><span class="mark"></span>'
        f"<span>projected: {len(report.projected)} of {len(report.modules)} modules</span></div>"
    )


def _example(prompt: str, models: Sequence[ModelResult]) -> str:
    answers = "".join(_entry(model.label, model.outcome.examples[prompt]) for model in models)
    return f'<div class="card"><b>{escape(prompt)}</b><dl>{answers}</dl></div>'


def _entry(name: str, value: str) -> str:
    return f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
