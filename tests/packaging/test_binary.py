"""What the compiled library may need, and what it may not show."""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

from .building import ROOT, run

pytestmark = pytest.mark.packaging
SYSTEM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$")
TORCH_SHIM = re.compile(r"^(aoti_torch|torch)_\w+$")
TOOLCHAIN = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


def test_only_the_binding_includes_torch() -> None:
    including = {
        path.relative_to(ROOT).parts[1]
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", path.read_text())
    }
    assert including == {"torch"}


def test_undefined_symbols_are_the_stable_shim_and_the_system(library: Path) -> None:
    symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).stdout.splitlines()]
    assert any(map(TORCH_SHIM.match, symbols))
    strange = [s for s in symbols if not (SYSTEM.search(s) or TORCH_SHIM.match(s) or s in TOOLCHAIN)]
    assert strange == []


def test_library_needs_torch_cpu_only_and_no_search_path(library: Path) -> None:
    dynamic = run("readelf", "-d", "-W", library).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"python|c10|cuda|gomp", name)]
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


def test_library_exports_nothing_of_its_own(library: Path) -> None:
    exported = run("nm", "-D", "-C", "--defined-only", library).stdout
    assert "safelora" not in exported


def test_library_carries_no_path_of_the_build(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("safelora_kernels/_C.abi3.so")
    assert str(checkout).encode() not in content
    assert b"site-packages" not in content


def test_instruction_sets_share_no_inline_function(prefix: Path) -> None:
    """A function that several objects hold is kept once by the linker, perhaps in the form an older CPU cannot run."""
    (archive,) = prefix.rglob("libsafelora_kernels.a")
    holders: dict[str, set[str]] = defaultdict(set)
    for line in run("nm", "-A", "-C", "--defined-only", archive).stdout.splitlines():
        where, kind, name = re.fullmatch(r".*:(\S+?):\S* +(\S) (.*)", line).groups()
        if kind in "WVu" and not name.startswith("DW.ref."):  # a pointer for exception tables, the same in every object
            holders[name].add(where)
    shared = {
        name: sorted(objects)
        for name, objects in holders.items()
        if len(objects) > 1 and any(re.match(r"isa_(?!scalar)", where) for where in objects)
    }
    assert shared == {}
