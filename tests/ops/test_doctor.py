"""The doctor finds a healthy installation healthy, and a sick one sick."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import safelora_kernels as sk
from safelora_kernels import doctor, functional
from safelora_kernels.backends import cpu, cuda, library
from safelora_kernels.schemas import SCHEMAS

from .test_backends import NATIVE, python
from .truth import cpu_flags


@pytest.fixture(autouse=True)
def without_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend is enough here; the slow reference only confirms itself."""
    best = next(iter(doctor._available()))
    monkeypatch.setattr(doctor, "_available", lambda: iter([best]))


def test_a_healthy_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--no-speed"]) == 0
    text = capsys.readouterr().out
    assert "all passed" in text and torch.__version__ in text
    for op in set(SCHEMAS) - {"salora_linear_backward"}:
        assert f"| {op} " in text, op
    for name in (cpu.LIBRARY.name, cuda.LIBRARY.name):
        assert f"| {name} " in text
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


def test_an_operator_that_raises_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(functional, "gram_apply_layers", broken)
    examination = doctor.examine()
    failed = [check for check in examination.checks if not check.passed]
    assert {check.op for check in failed} == {"gram_apply_layers", "all"}
    assert "RuntimeError: broken on purpose" in {check.detail for check in failed}
    assert not examination.speeds, "no speed of what is wrong"


@pytest.mark.skipif(not NATIVE, reason=f"no native kernels: {sk.backends()['cpu'].reason}")
@pytest.mark.parametrize("path", ["scalar", "avx2", "avx512", "avx512_bf16", "amx"])
def test_the_code_path_is_that_of_the_kernels(path: str) -> None:
    """Forced to a path the doctor names it, or reports why this CPU cannot take it, and is not healthy."""
    code = "from safelora_kernels import doctor; print(doctor.environment()['cpu code path'])"
    found = python(code, SAFELORA_CPU_ISA=path).stdout.strip()
    needed = {
        "scalar": set(),
        "avx2": {"avx2"},
        "avx512": {"avx512f", "avx512dq"},
        "avx512_bf16": {"avx512_bf16", "avx512_vnni"},
        "amx": {"avx512f", "amx_bf16"},
    }
    if needed[path] <= cpu_flags():
        assert found == path
    else:
        assert found.startswith(f"none: SAFELORA_CPU_ISA={path}")


def test_features_are_those_of_the_processor() -> None:
    features = set(doctor.environment()["cpu features"].split())
    assert features <= cpu_flags() or not cpu_flags()
    assert features >= cpu_flags() & {"avx2", "avx512f", "amx_tile"}


def test_a_missing_library_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(library, "BUILD_INFO", tmp_path / "none.json")
    assert doctor.libraries()["_C.abi3.so"] == "not loaded: _C.abi3.so was not built"
    (tmp_path / "_C.abi3.so").write_text("no library")
    monkeypatch.setattr(cpu, "STATUS", (False, "it does not load"))
    assert doctor.libraries()["_C.abi3.so"] == "not loaded: it does not load"


def test_speeds_are_set_against_the_ceilings() -> None:
    speeds = {s.what.split(",")[0]: s for s in doctor.examine().speeds}
    assert {s.backend for s in speeds.values()} <= {n for n, status in sk.backends().items() if status.available}
    moving, matmul = speeds["moving the operands"], speeds["torch.mm"]
    assert moving.share_of_bandwidth == 1.0 and matmul.share_of_matmul == 1.0
    assert {"project_layers", "project_out_layers_", "salora_linear", "gram_apply"} < set(speeds)
    for s in speeds.values():
        assert s.seconds > 0
        assert s.share_of_bandwidth == pytest.approx(s.gigabytes_per_second / moving.gigabytes_per_second)
        assert s.share_of_matmul == pytest.approx(s.gigaflop_per_second / matmul.gigaflop_per_second)


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "safelora_kernels", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "--json" in done.stdout
