"""pip install with and without a compiler, and what each kind of install can do."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

from .building import copy_checkout, make_environment, pip, run

pytestmark = pytest.mark.packaging
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}

NATIVE_OPS = """
import torch, safelora_kernels as sk
torch.manual_seed(0)
base, delta = torch.randn(48, 40), torch.randn(48, 40)
b, a = torch.randn(48, 5), torch.randn(5, 40)
got = sk.project_lowrank(base + delta, base, b, a, backend="cpu")
want = sk.project_lowrank((base + delta).double(), base.double(), b.double(), a.double(), backend="reference")
error = (got.lora_B - want.lora_B).norm() / want.lora_B.norm()
assert error < 1e-5, error
assert abs(got.cosine - want.cosine) < 1e-6, (got, want)
status = sk.backends()["cpu"]
assert status.available, status
print(sk.__file__)
"""

PURE_OPS = """
import json, torch, safelora_kernels as sk
status = sk.backends()["cpu"]
x, basis = torch.randn(8, 2), torch.linalg.qr(torch.randn(8, 3)).Q
assert torch.allclose(basis.T @ sk.project_out(x, basis), torch.zeros(3, 2), atol=1e-5)
try:
    sk.project_out(x, basis, backend="cpu")
except RuntimeError as error:
    print(json.dumps([status.available, status.reason, str(error)]))
"""


def load_setup(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> ModuleType:
    """setup.py as a module; nothing is set up."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_script", checkout / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wheel_is_tagged_for_every_python(wheel: Path) -> None:
    assert wheel.name.startswith("safelora_kernels-")
    assert "-cp310-abi3-linux_" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "safelora_kernels/_C.abi3.so",
        "safelora_kernels/_build_info.json",
        "safelora_kernels/py.typed",
        "safelora/py.typed",
    } <= names
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"safelora", "safelora_kernels"}


def test_native_install_runs_the_kernels(installed: Path) -> None:
    outside = installed.parent
    where = run(installed, "-c", NATIVE_OPS, cwd=outside, env={"PYTHONPATH": ""}).stdout
    assert str(installed.parents[1]) in where
    assert "usage" in run(outside / "safelora", "--help", cwd=outside, env={"PYTHONPATH": ""}).stdout.lower()


@pytest.mark.parametrize("lacking", ["compiler", "cmake"])
def test_pure_install_names_what_is_lost(tmp_path: Path, lacking: str) -> None:
    python = make_environment(tmp_path / "environment")
    env = NO_COMPILER if lacking == "compiler" else {"PATH": str(python.parent)}
    checkout = copy_checkout(tmp_path / "source")
    log = pip(python, "install", "--ignore-installed", checkout, cwd=tmp_path, env={"SAFELORA_BUILD": "auto", **env})
    assert "every op runs on its plain PyTorch reference" in log
    assert "py3-none-any" in log

    done = run(python, "-c", PURE_OPS, cwd=tmp_path, env={"PYTHONPATH": ""})
    available, reason, refusal = json.loads(done.stdout)
    assert not available
    assert lacking in reason
    assert lacking in refusal
    assert "safelora_kernels" in done.stderr, "the import says that the kernels are missing"
    assert done.stderr.count("\n") == 1, "in one line"


def test_native_install_asked_for_fails_without_a_compiler(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment")
    checkout = copy_checkout(tmp_path / "source")
    log = pip(python, "install", checkout, cwd=tmp_path, env={"SAFELORA_BUILD": "native", **NO_COMPILER}, fails=True)
    assert "SAFELORA_BUILD=native, but" in log
    assert "compiler" in log


def test_a_failing_compile_leaves_no_library_behind(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment")
    checkout = copy_checkout(tmp_path / "source")
    for source in (checkout / "csrc" / "cpu").glob("*.cpp"):
        source.write_text('#error "broken on purpose"\n')
    stale = checkout / "safelora_kernels" / "_C.abi3.so"
    stale.write_text("from an earlier build")
    pip(python, "install", "--ignore-installed", "-e", checkout, cwd=tmp_path, env={"SAFELORA_BUILD": "auto"})
    assert not stale.exists()
    info = json.loads((checkout / "safelora_kernels" / "_build_info.json").read_text())
    assert info["native"] is False
    assert "broken on purpose" in info["reason"]


def test_torch_is_found_from_an_isolated_build(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup(monkeypatch, checkout)
    here = setup.find_torch()
    monkeypatch.setenv("PYTHONPATH", "/nonexistent")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert setup.find_torch() == here


def test_unknown_build_mode_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup(monkeypatch, checkout)
    monkeypatch.setenv("SAFELORA_BUILD", "fast")
    with pytest.raises(SystemExit, match="'fast': expected auto, native or pure"):
        setup.build_mode()


def test_source_distribution_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "source")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, checkout, cwd=tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    for folder in ("cmake", "csrc", "python", "safelora_kernels", "tests"):
        files = {str(path.relative_to(checkout)) for path in (checkout / folder).rglob("*") if path.is_file()}
        assert files - packed == set()
    assert {"CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py"} <= packed
