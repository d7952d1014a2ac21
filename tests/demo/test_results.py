"""Intervals, pooled outcomes, and a report that says what its own figures say."""

import math
import re

import page
from outcome import Outcome
from prompts import forbidden
from results import DemoResult, ModelResult, reading

from safelora import ModuleReport, SafeLoraReport
from safelora.rates import Rate

KEYS = ("base", "aligned", "finetuned", "projected", "deleted", "random", "scaled")


def module(name, cosine, shrinkage, projected) -> ModuleReport:
    decision = "projected" if projected else "kept"
    return ModuleReport(
        name, "linear", 8, (4, 4), None, None, None, decision=decision, cosine=cosine, shrinkage=shrinkage
    )


def result(answered=(72, 10, 60, 20, 20, 30, 65), examples=None, modules=None) -> DemoResult:
    models = [
        ModelResult(key, key.title(), "note", Outcome(Rate(hits, 72), Rate(30, 40), Rate(1, 30), examples or {}))
        for key, hits in zip(KEYS, answered, strict=True)
    ]
    if modules is None:
        modules = [
            module(f"model.layers.{layer}.self_attn.{kind}", 0.1 * layer + 0.05, 0.004, layer == 0)
            for layer in range(3)
            for kind in ("q_proj", "v_proj")
        ]
    return DemoResult(models, SafeLoraReport(modules, {}, {}, {}), {"Command": "safelora project <ADAPTER>"})


def test_outcomes_pool():
    one = Outcome(Rate(1, 4), Rate(2, 4), Rate(0, 3), {"a": "x"})
    two = Outcome(Rate(3, 4), Rate(1, 4), Rate(1, 3), {"a": "y"})
    assert one + two == Outcome(Rate(4, 8), Rate(3, 8), Rate(1, 6), {"a": "x"})


def test_reading_reports_the_direction_it_measured():
    apart = " ".join(reading(result()))
    assert "these two intervals do not overlap" in apart
    assert "Random: answered 42% " in apart
    assert "intervals of answered questions overlap, so this run does not separate the two" in apart
    assert "the projection refuses more" in apart
    worse = " ".join(reading(result(answered=(72, 10, 60, 58, 58, 5, 5))))
    assert "these two intervals overlap" in worse
    assert "the control refuses more" in worse


def test_median_shrinkage_counts_projected_modules_only():
    modules = [
        module(f"model.layers.{i}.mlp.up_proj", 0.1, ratio, i < 3) for i, ratio in enumerate((0.1, 0.2, 0.4, 9.0))
    ]
    assert result(modules=modules).median_shrinkage == 0.2
    assert math.isnan(result(modules=[]).median_shrinkage)


def test_html_is_self_contained_and_escapes(tmp_path):
    prompt = forbidden("heldout")[0]
    found = result(examples={prompt: "<script>alert(1)</script>"})
    page.save_html(found, tmp_path / "report.html", [prompt])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "safelora project &lt;ADAPTER&gt;" in html
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import""", html)
    assert 'name="viewport"' in html
    for model in found.models:
        assert model.label in html
        assert f"<b>{model.outcome.answered.value:.0%}</b> [" in html
    assert html.count('class="m"') == 2 * (len(found.report.modules) - len(found.report.projected)) > 0
    assert html.count('class="m p"') == 2 * len(found.report.projected) > 0
    for opening, closing in (("<div", "</div>"), ("<dl", "</dl>"), ("<svg", "</svg>")):
        assert html.count(opening) == html.count(closing)


def test_png_is_a_picture(tmp_path):
    page.save_png(result(), tmp_path / "report.png")
    from PIL import Image

    with Image.open(tmp_path / "report.png") as image:
        width, height = image.size
        assert width >= 1000
        assert height >= 500
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
