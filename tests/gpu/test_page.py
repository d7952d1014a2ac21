"""docs/gpu.md: every operator of a GPU backend has its row, and every check that a cell names exists."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
_CHECK = re.compile(r"`(\w+): ([\w, ]+)`")


def rows() -> Iterator[tuple[str, str, list[str]]]:
    """Operator, backend and the cells of checks."""
    section = PAGE.split("## Op by op")[1].split("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            op, backend, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            yield op.strip("`"), backend, cells


@functools.cache
def defined_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / "gpu" / f"test_{file}.py").read_text(encoding="utf-8"))
    return {node.name.removeprefix("test_") for node in tree.body if isinstance(node, ast.FunctionDef)}


@functools.cache
def entries() -> set[str]:
    pytest.importorskip("triton")
    from safelora_kernels.triton import aot

    return {entry.name for entry in aot.MANIFEST}


def test_every_operator_with_a_kernel_has_a_row() -> None:
    listed = {(op, backend.split(",")[0]) for op, backend, _ in rows()}
    bindings = "".join(path.read_text() for path in (ROOT / "csrc" / "torch").glob("*"))
    from safelora_kernels.backends import triton

    in_cuda = set(re.findall(r'm\.impl\("(\w+)"', bindings)) - host_only()
    assert {op for op, backend in listed if backend == "CUDA"} == in_cuda
    assert {op for op, backend in listed if backend == "Triton"} == set(triton._MODULES)


def host_only() -> set[str]:
    """Registered for the CPU alone."""
    cpu = (ROOT / "csrc" / "torch" / "library.cpp").read_text()
    return set(re.findall(r'm\.impl\("(\w+)"', cpu))


@pytest.mark.parametrize(
    ("op", "backend", "cells"), list(rows()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_checks_of_a_row_exist(op: str, backend: str, cells: list[str]) -> None:
    named = [_CHECK.findall(cell) for cell in cells]
    assert len(cells) == 6
    # Triton has no source of its own to emulate; no cell but that is empty.
    assert [cell == "" for cell in cells] == [False, False, backend == "Triton", False, False, False]
    for file, checks in (check for cell in named for check in cell):
        names = set(checks.split(", "))
        if file == "manifest":
            missing = {name for name in names if not any(entry.startswith(name) for entry in entries())}
        else:
            missing = names - defined_in(file)
        assert missing == set(), f"{op}, {backend}: {file} has no {missing}"


def test_the_other_checks_that_the_page_names_exist() -> None:
    for file, names in _CHECK.findall(PAGE):
        if file != "manifest":
            assert set(names.split(", ")) <= defined_in(file), file
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
