"""The HTML report: complete by itself, true to the numbers, and readable on a phone in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from safelora import ModuleReport, SafeLoraReport

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KINDS = ("self_attn.q_proj", "mlp.down_proj")
VOID = {"meta", "i", "br"}


def module(layer: int, kind: str, cosine: float | None, decision: str, **more: object) -> ModuleReport:
    name = f"model.layers.{layer}.{kind}"
    numbers = {} if cosine is None else {"cosine": cosine, "shrinkage": cosine**4, "v_norm": 2.0}
    return ModuleReport(name, "linear", 16, (64, 64), "w", "w", "exact", decision, **numbers, **more)  # type: ignore[arg-type]


@pytest.fixture
def report() -> SafeLoraReport:
    modules = [
        module(layer, kind, cosine := 0.2 + 0.02 * (2 * layer + i), "projected" if cosine <= 0.4 else "kept")
        for layer in range(12)
        for i, kind in enumerate(KINDS)
    ]
    modules[5] = module(2, KINDS[1], None, "skipped", reason="the vocabularies differ")
    return SafeLoraReport(
        modules, {"threshold": 0.4}, {"base": {"files": {"model.safetensors": "ab" * 32}}}, {"torch": "2"},
        passed_through=["lm_head.bias"],
    )  # fmt: skip


class Balance(HTMLParser):
    """Every element closed in order, nothing loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1


def saved(report: SafeLoraReport, tmp_path: Path) -> str:
    report.save(tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_is_well_formed_and_self_contained(report: SafeLoraReport, tmp_path: Path) -> None:
    text = saved(report, tmp_path)
    checker = Balance()
    checker.feed(text)
    assert checker.open == []
    assert "url(" not in text and "@import" not in text
    assert 'name="viewport"' in text


def test_shows_every_measured_module_in_both_figures(report: SafeLoraReport, tmp_path: Path) -> None:
    text = saved(report, tmp_path)
    measured = [m for m in report.modules if m.cosine is not None]
    assert text.count("<circle ") == 2 * len(measured)
    assert text.count('<circle cx="') == text.count('r="4"')
    assert len(re.findall(r'<circle [^>]*class="projected"', text)) == 2 * len(report.projected)
    for wanted in ("the vocabularies differ", "ab" * 32, "lm_head.bias", *(m.name for m in report.modules)):
        assert wanted in text


def test_the_line_lies_between_projected_and_kept(report: SafeLoraReport, tmp_path: Path) -> None:
    """Checked where it is drawn: projected dots lie below the line, kept ones above."""
    for options in ({"threshold": 0.4}, {"num_layers": len(report.projected)}):
        text = saved(SafeLoraReport(report.modules, options, {}, {}), tmp_path)
        figure = text.split("</figure>")[0]
        line = float(re.search(r'class="cut"[^>]*y1="([\d.]+)"', figure)[1])  # type: ignore[index]
        dots = re.findall(r'cy="([\d.]+)" r="4"( class="projected")?', figure)
        assert len(dots) == len([m for m in report.modules if m.cosine is not None])
        # The page rounds dots to a tenth of a unit.
        assert all(float(y) >= line - 0.1 if mark else float(y) < line + 0.1 for y, mark in dots)
        assert 'class="band"' in figure


def test_a_report_without_measurements_still_renders(tmp_path: Path) -> None:
    skipped = module(0, KINDS[0], None, "skipped", reason="aligned and base are equal")
    text = saved(SafeLoraReport([skipped], {}, {}, {}), tmp_path)
    assert "aligned and base are equal" in text
    assert "<svg" not in text
    one = saved(SafeLoraReport([module(0, KINDS[0], 1.0, "kept")], {"threshold": 0.4}, {}, {}), tmp_path)
    assert one.count("<circle ") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH to lay the page out with")
@pytest.mark.parametrize("width", [360, 1280])
def test_fits_the_screen_in_a_browser(report: SafeLoraReport, tmp_path: Path, width: int) -> None:
    """Only tables and figures scroll sideways, so that what is written on them stays legible; the page never does."""
    saved(report, tmp_path)
    (tmp_path / "probe.html").write_text(
        f'<iframe id="f" src="page.html" style="width:{width}px;height:800px;border:0"></iframe><p id="r"></p>'
        '<script>f.onload=()=>{const d=f.contentDocument;const s=[...d.querySelectorAll("svg")].map(e=>'
        'Math.round(e.getBoundingClientRect().width));r.textContent="scroll="+d.documentElement.scrollWidth+" svg="+s}'
        "</script>"
    )
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1600,900", "--virtual-time-budget=3000",
        "--dump-dom", (tmp_path / "probe.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"scroll=(\d+) svg=(\d+),(\d+)", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    assert int(found[1]) <= width
    legible = 36 * 16  # 17 units of 900 are then 11 pixels
    assert min(int(found[2]), int(found[3])) >= (legible if width < 1000 else 800)
