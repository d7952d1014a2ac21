"""Choosing a backend, saying why, and importing where the native part is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import safelora_kernels as sk
from safelora_kernels.backends import OPS, cpu, reference, triton

ROOT = Path(sk.__file__).resolve().parent.parent
NATIVE = sk.backends()["cpu"].available


def python(code: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh interpreter that sees the package in ``cwd``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SAFELORA_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(cwd), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_backend_has_a_status_and_a_reason() -> None:
    statuses = sk.backends()
    assert list(statuses) == ["cuda", "triton", "cpu", "reference"]
    assert statuses["reference"].available
    assert all(status.reason for status in statuses.values())
    assert (cpu.LIBRARY.exists() and not os.environ.get("SAFELORA_DISABLE_NATIVE")) == NATIVE


def test_explain_names_the_backend_and_the_reasons() -> None:
    w, b = torch.randn(4, 6, device="cpu"), torch.randn(4, 2, device="cpu")
    best = sk.explain("project_lowrank", w, w, b)
    assert best.backend == ("cpu" if NATIVE else "reference")
    assert set(best.rejected) == {"cuda", "triton", "cpu", "reference"} - {best.backend}
    assert all(best.rejected.values())

    asked = sk.explain("project_layers", [sk.LayerFactors(w, w, b)], backend="reference")
    assert (asked.backend, asked.reason) == ("reference", "asked for by backend='reference'")
    if NATIVE:
        assert asked.rejected["cpu"] == "backend='reference' asks for reference"

    elsewhere = sk.explain("project_out", w.to("meta"), basis=b.to("meta"))
    assert elsewhere.backend == "reference"
    refused = sk.explain("project_out", w.to("meta"), basis=b.to("meta"), backend="cpu")
    assert refused.backend is None
    if NATIVE:
        assert "it runs on cpu tensors, found one on meta" in elsewhere.rejected["cpu"]
        assert "found one on meta" in refused.reason
    assert "project_out: no backend" in str(refused)
    assert "not reference: " in str(refused)


def test_explain_speaks_of_what_happens(backend: str) -> None:
    x, u = torch.randn(6, 2), torch.randn(6, 1)
    assert sk.explain("project_out", x, u, backend=backend).backend == backend
    assert sk.project_out(x, u, backend=backend).shape == x.shape


def test_unknown_names_are_refused() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="backend='gpu' names no backend: use one of cuda, triton, cpu, reference"):
        sk.project_out(x, x, backend="gpu")
    with pytest.raises(ValueError, match="backend='' names no backend"):
        sk.project_out(x, x, backend="")
    with pytest.raises(ValueError, match="no operator is called 'project'"):
        sk.explain("project", x)
    with pytest.raises(ValueError, match="names no backend"):
        sk.explain("project_out", x, backend="gpu")


def test_a_backend_that_cannot_take_the_tensors_raises() -> None:
    x = torch.randn(4, 2, device="meta")
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run project_out_layers: .*Leave the backend out"):
        sk.project_out(x, x, backend="cpu")


def test_the_native_library_serves_every_operator() -> None:
    if not NATIVE:
        pytest.skip(f"no native kernels: {sk.backends()['cpu'].reason}")
    assert cpu.implemented(OPS) == [op for op in OPS if op not in reference.COMPOSED]


def test_disabled_native_part() -> None:
    code = """
import json, logging, torch, safelora_kernels as sk
w, b = torch.randn(4, 6), torch.randn(4, 2)
try:
    sk.project_lowrank(w, w, b, backend="cpu")
except RuntimeError as error:
    message = str(error)
print(json.dumps([sk.backends()["cpu"], message, sk.explain("project_lowrank", w, w, b).backend]))
"""
    done = python(code, SAFELORA_DISABLE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    status, message, taken = json.loads(done.stdout)
    assert status == [False, "SAFELORA_DISABLE_NATIVE is set: unset it to load the native CPU kernels"]
    assert "unset it" in message
    assert taken == "reference"
    assert done.stderr == ""


@pytest.fixture
def copy_of_the_package(tmp_path: Path) -> Path:
    """The Python files alone, as a pure install has them."""
    shutil.copytree(
        ROOT / "safelora_kernels", tmp_path / "safelora_kernels", ignore=shutil.ignore_patterns("*.so", "_build*")
    )
    return tmp_path


USE = "import torch, safelora_kernels as sk; print(sk.project_out(torch.ones(3, 1), torch.zeros(3, 1)).sum().item())"


@pytest.mark.parametrize("case", ["never built", "build failed", "lost", "damaged"])
def test_import_survives_a_missing_native_part_and_says_so_once(copy_of_the_package: Path, case: str) -> None:
    package = copy_of_the_package / "safelora_kernels"
    if case == "build failed":
        (package / "_build_info.json").write_text(
            json.dumps({"native": False, "reason": "no C++17 compiler was found"})
        )
    elif case == "lost":
        (package / "_build_info.json").write_text(json.dumps({"native": True}))
    elif case == "damaged":
        (package / "_C.abi3.so").write_bytes(b"not a library")
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # which would be told about kernels of its own
    done = python(USE, copy_of_the_package, **no_gpu)
    assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    said = {
        "never built": "_C.abi3.so was not built",
        "build failed": "no C++17 compiler was found",
        "lost": "is gone",
        "damaged": "does not load",
    }
    assert said[case] in done.stderr
    assert "falls back to plain torch" in done.stderr
    assert "SAFELORA_BUILD=native" in done.stderr

    asked = python(USE, copy_of_the_package, SAFELORA_BACKEND="cpu", **no_gpu)
    assert asked.returncode != 0
    assert "RuntimeError: SAFELORA_BACKEND=cpu cannot run project_out_layers" in asked.stderr
    assert said[case] in asked.stderr.splitlines()[-1]


def test_environment_forces_a_backend() -> None:
    code = "import torch, safelora_kernels as sk; x = torch.ones(3, 1); print(sk.explain('project_out', x, x))"
    done = python(code, SAFELORA_BACKEND="reference")
    assert done.stdout.startswith("project_out: reference (asked for by SAFELORA_BACKEND=reference)"), done.stderr
    assert python(USE, SAFELORA_BACKEND="").returncode == 0
    unknown = python(USE, SAFELORA_BACKEND="fpga")
    assert unknown.stderr.splitlines()[-1].startswith("ValueError: SAFELORA_BACKEND=fpga names no backend: use one of")


def test_a_call_overrules_the_environment() -> None:
    code = USE.replace("zeros(3, 1)", "zeros(3, 1), backend='reference'")
    assert python(code, SAFELORA_BACKEND="cpu", SAFELORA_DISABLE_NATIVE="1").stdout == "3.0\n"


def test_import_stays_light() -> None:
    code = """
import sys, safelora_kernels as sk
sk.backends(), sk.explain("select_layers")
print([m for m in ('transformers', 'peft', 'safetensors', 'triton') if m in sys.modules])
"""
    assert python(code).stdout == "[]\n"


HAS_GPU_TORCH = torch.version.cuda is not None or torch.version.hip is not None


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_gpu_backend_that_cannot_run_says_why_and_what_to_do(name: str) -> None:
    if sk.backends()[name].available:
        pytest.skip(f"{name} runs here")
    x = torch.ones(3, 1, device="cpu")
    reason = sk.backends()[name].reason
    assert sk.explain("project_out", x, x).rejected[name] == reason
    asked = sk.explain("project_out", x, x, backend=name)
    assert (asked.backend, asked.reason) == (None, f"backend={name!r} cannot run: {reason}")
    with pytest.raises(RuntimeError) as error:
        sk.project_out(x, x, backend=name)
    assert f"backend={name!r} cannot run project_out_layers: {reason}. Leave the backend out" in str(error.value)
    forced = python(USE, SAFELORA_BACKEND=name)
    assert forced.returncode != 0
    assert f"RuntimeError: SAFELORA_BACKEND={name} cannot run project_out_layers: {reason}" in forced.stderr
    if not HAS_GPU_TORCH:
        assert "torch" in reason if name == "triton" and triton.INSTALLED else reason


def test_triton_that_is_not_installed_is_named_and_changes_nothing_else() -> None:
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch, safelora_kernels as sk
print(sk.backends()["triton"].reason)
print(torch._C._dispatch_has_kernel_for_dispatch_key("safelora::project_layers", "CUDA"))
print(sk.project_out(torch.ones(3, 1), torch.zeros(3, 1)).sum().item())
"""
    done = python(code)
    native = str(sk.backends()["cuda"].available)
    assert done.stdout.splitlines() == ["triton is not installed: pip install triton", native, "3.0"], done.stderr


def test_every_operator_has_a_gpu_kernel_where_triton_is_installed() -> None:
    if not triton.INSTALLED:
        pytest.skip("triton is not installed")
    assert set(triton.LAUNCHERS) == set(OPS)
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"safelora::{op}", "CUDA") for op in OPS)


def test_the_interpreter_takes_cpu_tensors_when_asked() -> None:
    if not triton.INSTALLED:
        pytest.skip("triton is not installed")
    code = """
import sys, torch, safelora_kernels as sk
print(sk.backends()["triton"].available, sk.explain("select_layers", torch.rand(4), num_layers=2).backend)
before = "triton" in sys.modules
print(before, sk.select_layers(torch.tensor([0.5, 0.1, 0.3]), num_layers=2, backend="triton").tolist())
"""
    done = python(code, TRITON_INTERPRET="1")
    best = "cpu" if NATIVE else "reference"
    assert done.stdout.splitlines() == [f"True {best}", "False [False, True, True]"], done.stderr


def test_a_gpu_call_with_fp64_is_said_to_go_to_the_reference() -> None:
    double, single = torch.ones(4, 3, dtype=torch.float64), torch.ones(4, 3)
    assert "fp64" in triton.unsupported("project_layers", [single, double], None)
    assert "fp64" in triton.unsupported("project_selected_layers", [single], torch.float64)
    assert triton.unsupported("project_layers", [single], None) == ""
    assert triton.unsupported("update_cosine", [double], None) == ""
    assert "at most" in triton.unsupported("select_layers", [torch.empty(40000)], None)


def test_the_public_names_are_those_of_the_reference() -> None:
    import inspect

    for name in sk.reference.__all__:
        public, plain = inspect.signature(getattr(sk, name)), inspect.signature(getattr(sk.reference, name))
        assert [p for p in public.parameters if p != "backend"] == list(plain.parameters)
        assert public.parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
