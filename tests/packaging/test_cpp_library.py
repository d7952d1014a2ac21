"""The C++ library as its users meet it: installed, found by CMake, linked without Python or torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import safelora_kernels as sk

from .building import ROOT, run, tool

pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def program(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("example")
    ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(tool("cmake"), "-S", ROOT / "examples" / "cpp", "-B", tree, *ninja, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(tool("cmake"), "--build", tree)
    return tree / "project_adapter"


def test_example_projects_as_the_reference_does(program: Path) -> None:
    """The same small layer as in the example, by the same formulas, in fp64."""
    d_out, d_in, rank = 6, 5, 2
    i, j = torch.meshgrid(torch.arange(d_out), torch.arange(d_in), indexing="ij")
    base = ((3 * i + 5 * j) % 7) / 8
    aligned = base + ((i + 2 * j) % 5) / 16
    row, column = torch.meshgrid(torch.arange(d_out), torch.arange(rank), indexing="ij")
    lora_b = (row - 2 * column) / 4
    row, column = torch.meshgrid(torch.arange(rank), torch.arange(d_in), indexing="ij")
    lora_a = (row + column + 1) / 8
    truth = sk.reference.project_lowrank(*(x.double() for x in (aligned, base, lora_b, lora_a)))

    output = run(program).stdout
    scalars = dict(re.findall(r"^(v_norm|cosine) (\S+)$", output, re.MULTILINE))
    rows = [[float(x) for x in line.split()] for line in output.split("B'\n")[1].splitlines()]
    assert float(scalars["v_norm"]) == pytest.approx(truth.v_norm.item(), rel=1e-6)
    assert float(scalars["cosine"]) == pytest.approx(truth.cosine.item(), rel=1e-6)
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), truth.lora_B, rtol=1e-5, atol=1e-7)


def test_library_needs_neither_python_nor_torch(program: Path) -> None:
    dynamic = run("readelf", "-d", "-W", program).stdout
    assert not re.search(r"NEEDED.*(torch|python|gomp)", dynamic)


def test_another_minor_version_is_refused(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(probe CXX)\nfind_package(safelora_kernels 0.2 REQUIRED)\n"
    )
    command = [tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    assert "0.1.0" in run(*command, fails=True).stderr
