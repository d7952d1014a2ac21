"""The doctor finds a healthy installation healthy, and a sick one sick."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import safelora_kernels as sk
from safelora_kernels import doctor, functional

from ..conftest import AVAILABLE


@pytest.fixture(autouse=True)
def without_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend is enough here; the slow reference only confirms itself."""
    best = next(iter(doctor._available()))
    monkeypatch.setattr(doctor, "_available", lambda: iter([best]))


def test_a_healthy_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--no-speed"]) == 0
    text = capsys.readouterr().out
    assert "all passed" in text and torch.__version__ in text
    for op in ("project_layers", "update_cosine", "project_out_layers_", "salora_linear", "select_layers"):
        assert f"| {op} " in text
    for name, status in sk.backends().items():
        assert f"| {name} " in text and status.reason in text


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--no-speed", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["healthy"] is True and content["format"] == "safelora-doctor/1"
    assert content["environment"]["torch"] == torch.__version__
    assert {check["op"] for check in content["checks"]} >= {"project_layers", "salora_linear", "all"}
    assert all(check["error"] <= check["bound"] for check in content["checks"] if check["error"] is not None)


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_a_wrong_result_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    honest = functional.project_out_layers
    monkeypatch.setattr(functional, "project_out_layers", lambda *a, **k: [y * factor for y in honest(*a, **k)])
    assert doctor.main(["--no-speed"]) == 1
    text = capsys.readouterr().out
    assert "FAILED" in next(line for line in text.splitlines() if "left, float32" in line)


def test_a_wandering_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = functional.project_out_layers, []

    def wandering(*args: object, **options: object) -> list[torch.Tensor]:
        calls.append(None)
        return [y + 1e-8 * len(calls) for y in honest(*args, **options)]  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "project_out_layers", wandering)
    failed = {check.what for check in doctor.examine(speed=False).checks if not check.passed}
    assert "same bits twice" in failed and not any("float" in what for what in failed)


def test_speeds_are_set_against_the_bandwidth() -> None:
    speeds = doctor.examine().speeds
    assert {s.backend for s in speeds} <= set(AVAILABLE)
    for s in speeds:
        assert s.seconds > 0
        assert s.gigabytes_per_second > 0
    assert speeds[0].share_of_bandwidth == 1.0


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "safelora_kernels", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "--json" in done.stdout
