"""One copy of the checkout, one build tree and one wheel for all packaging tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from .building import JOBS, copy_checkout, make_environment, pip, run, tool


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("source") / "safelora")


@pytest.fixture(scope="session")
def prefix(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ library, configured without torch, built and installed. The wheel goes on in the same build tree."""
    prefix = tmp_path_factory.mktemp("prefix")
    tree = checkout / "build" / "cmake"
    run(tool("cmake"), "-S", checkout, "-B", tree, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    run(tool("cmake"), "--build", tree, "--parallel", JOBS)
    run(tool("cmake"), "--install", tree, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="session")
def wheel(checkout: Path, prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native wheel, built by pip; failing to build the native part fails the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    python = make_environment(folder / "build-environment")
    env = {"SAFELORA_BUILD": "native", "CMAKE_BUILD_PARALLEL_LEVEL": JOBS}
    pip(python, "wheel", checkout, "--wheel-dir", folder, cwd=folder, env=env)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment into which the native wheel was installed."""
    python = make_environment(tmp_path_factory.mktemp("native") / "environment")
    pip(python, "install", "--ignore-installed", wheel, cwd=wheel.parent)
    return python


@pytest.fixture(scope="session")
def library(installed: Path) -> Path:
    code = "import importlib.util as u; print(u.find_spec('safelora_kernels').origin)"
    origin = run(installed, "-c", code, cwd=installed.parent, env={"PYTHONPATH": ""}).stdout.strip()
    return Path(origin).parent / "_C.abi3.so"
