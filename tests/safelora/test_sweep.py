"""Every threshold in one pass: the counts are those of the projections themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safelora import ModuleReport, SafeLoraError, SafeLoraReport
from safelora.sweep import DEFAULT_THRESHOLDS, sweep_thresholds


def report(*cosines: float | None) -> SafeLoraReport:
    modules = [
        ModuleReport(f"layers.{i}.q", "linear", 1, (2, 2), None, None, None, "kept", cosine=cosine)
        for i, cosine in enumerate(cosines)
    ]
    return SafeLoraReport(modules, {}, {}, {})


def test_counts_and_order() -> None:
    result = sweep_thresholds(report(0.5, None, 0.1, 0.300004, 0.3), [0.3, 0.05, 0.6])
    assert [(row.threshold, row.selected, row.undecided) for row in result.rows] == [
        (0.05, 0, 0),
        (0.3, 2, 2),
        (0.6, 4, 0),
    ]
    assert [name for name, _ in result.cosines] == ["layers.2.q", "layers.4.q", "layers.3.q", "layers.0.q"]
    assert sweep_thresholds(report(0.300004, 0.3), [0.3], rule="authors").rows[0].selected == 2
    json.dumps(result.to_dict())


def test_default_thresholds_reach_every_module() -> None:
    rows = sweep_thresholds(report(0.0, 0.42, 1.0)).rows
    assert [row.threshold for row in rows] == list(DEFAULT_THRESHOLDS)
    assert rows[-1].selected == 3
    assert [row.selected for row in rows] == sorted(row.selected for row in rows)


def test_reads_a_saved_report(tmp_path: Path) -> None:
    report(0.2, 0.8).save(tmp_path / "r.json")
    assert sweep_thresholds(tmp_path / "r.json", [0.5]).rows[0].selected == 1


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_refuses_what_is_no_cosine(threshold: float) -> None:
    with pytest.raises(SafeLoraError, match="from 0 to 1"):
        sweep_thresholds(report(0.5), [threshold])


def test_refuses_a_report_without_measurements() -> None:
    with pytest.raises(SafeLoraError, match="no measured module"):
        sweep_thresholds(report(None))
