"""The CUDA library as it is shipped: one file for all architectures, compiled under strict flags, gated on its content.

No GPU is needed: nvcc compiles, and cuobjdump (Triton brings one) reads the machine code.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safelora_kernels.backends import cuda as backend

from ..packaging.building import JOBS, ROOT, run, tool
from ..packaging.test_install import load_setup
from .emulated import CACHE, CUDA, need

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
MOST_REGISTERS = 255
# Those that the sources register for CUDA.
OPS = sorted(
    op
    for name in ("operators.h", "cuda_library.cpp")
    for op in re.findall(r'm\.impl\("(\w+)"', (ROOT / "csrc" / "torch" / name).read_text())
)


@pytest.fixture(scope="session")
def library() -> Path:
    """_CUDA.abi3.so for all architectures. Warnings, register spills and local memory fail the build."""
    need("nvcc")
    tree = CACHE / "cmake"
    options = ["-DSAFELORA_CUDA=ON", "-DSAFELORA_CUDA_STRICT=ON", f"-DSAFELORA_TORCH_DIR={Path(torch.__file__).parent}"]
    ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(tool("cmake"), "-S", ROOT, "-B", tree, *ninja, *options)
    run(tool("cmake"), "--build", tree, "--target", "_CUDA", "--parallel", JOBS)
    return tree / "_CUDA.abi3.so"


def kernels() -> list[str]:
    texts = [path.read_text() for path in CUDA.glob("*.def")]
    return sorted(name for text in texts for name in re.findall(r"^KERNEL\((\w+)\)", text, re.MULTILINE))


@functools.cache
def cuobjdump() -> str:
    """Triton's, or the toolkit's."""
    spec = importlib.util.find_spec("triton")
    own = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()
    found = shutil.which("cuobjdump", path=os.pathsep.join([str(own), os.environ["PATH"]]))
    if found is None:
        pytest.skip("no cuobjdump: install triton, which brings one, or the toolkit's")
    return found


def test_every_kernel_of_the_sources_is_listed_once() -> None:
    """The list is what the library's launches look names up in."""
    sources = "".join(path.read_text() for path in CUDA.glob("*.cu"))
    expanded = set(re.findall(r"SAFELORA_KERNEL\((\w+),", sources))
    macros = re.findall(r"#define \w+\([^)]*\)[^\n]*(?:\\\n[^\n]*)*", sources)
    assert len(kernels()) == len(set(kernels()))
    assert macros or expanded == set(kernels())


def test_undefined_symbols_are_the_stable_shim_and_the_system(library: Path) -> None:
    lines = run("nm", "-D", "--undefined-only", library).stdout.splitlines()
    names = [line.split()[-1] for line in lines if line.split()[0] == "U"]
    system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$")
    shim = re.compile(r"^(aoti_torch|torch)_\w+$")
    assert [name for name in names if not (system.search(name) or shim.match(name))] == []
    assert any(map(shim.match, names))


def test_library_needs_neither_cuda_nor_libtorch_cuda(library: Path) -> None:
    dynamic = run("readelf", "-d", "-W", library).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"cuda|c10|nv|python|gomp", name)]
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    assert "safelora" not in run("nm", "-D", "-C", "--defined-only", library).stdout


def test_library_loads_without_a_gpu_and_registers_every_operator(library: Path) -> None:
    code = f"""
import torch, safelora_kernels.schemas
torch.ops.load_library({str(library)!r})
has = torch._C._dispatch_has_kernel_for_dispatch_key
print([op for op in {OPS!r} if not has("safelora::" + op, "CUDA")])
"""
    done = run(sys.executable, "-c", code, env={"SAFELORA_DISABLE_NATIVE": "1", "TRITON_INTERPRET": "0"})
    assert done.stdout.strip() == "[]"


def resources(library: Path, architecture: str) -> dict[str, dict[str, int]]:
    """Registers, stack and static shared memory of each kernel."""
    done = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", "-arch", architecture, str(library)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"Function safelora_(\w+):\s+(REG:.*)", done.stdout)
    return {name: {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", use)} for name, use in found}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources(library: Path, architecture: str, record_property: pytest.RecordProperty) -> None:
    """No spills and no local memory on any architecture; what each kernel takes is in the report's properties."""
    table = resources(library, architecture)
    assert sorted(table) == kernels()
    for name, use in table.items():
        record_property(f"{architecture} {name}", str(use))
        assert use["STACK"] == use["LOCAL"] == 0, (name, use)
        assert use["REG"] <= MOST_REGISTERS, (name, use)
        # A block's first kilobyte is the system's from sm_90 on; the rest is dynamic.
        assert use["SHARED"] <= 1024, (name, use)


# What the last kernel whose name matches must contain: tensor cores, 16-byte copies and loads, TMA where there is one.
LOADS = r"LDG\.E\.128"
OPCODES = {
    r"project_(bf16|f16)_\d+": (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.\S*128", r"LDSM", LOADS),
    r"project_f32_\d+": (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.\S*128", LOADS),
    r"(project_out_\w+|reduce\d+|expand)_f32(_t)?": (r"HMMA\.1688\.F32\.TF32", LOADS),
    r"(project_out_\w+|reduce\d+|expand)_f64(_t)?": (r"DFMA|DMMA", LOADS),
    r"gram_apply\d+_f32": (r"HMMA\.1688\.F32\.TF32", LOADS),
    r"gram_apply\d+_f64": (r"DFMA|DMMA", LOADS),
    r"gram_cosine": (r"DFMA|DMMA", LOADS),
}
CLUSTER_OPCODES = {r"project_cluster_[a-z0-9]+_\d+": (r"HMMA\.16816\.F32\.BF16", r"UTMALDG\.2D", r"SYNCS", r"UCGABAR")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_opcodes(library: Path, architecture: str) -> None:
    expected = OPCODES | (CLUSTER_OPCODES if architecture in ("sm_90a", "sm_100a") else {})
    chosen = {names: [kernel for kernel in kernels() if re.fullmatch(names, kernel)][-1] for names in expected}
    listed = ",".join(f"safelora_{kernel}" for kernel in chosen.values())
    command = [cuobjdump(), "-sass", "-arch", architecture, "-fun", listed, str(library)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = dict(re.findall(r"Function : safelora_(\w+)\n(.*?)(?=\n\s*\.{10}|\Z)", dump, re.DOTALL))
    for names, patterns in expected.items():
        missing = [pattern for pattern in patterns if not re.search(pattern, code[chosen[names]])]
        assert missing == [], chosen[names]


def test_oldest_and_newest_architectures_are_there_as_ptx(library: Path) -> None:
    listed = subprocess.run([cuobjdump(), "-lptx", str(library)], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listed)) == {"sm_80", "sm_120"}


CONSUMER = """
#include <safelora/cuda.h>
#include <cstdio>
#include <exception>

int main() {
  safelora::cuda::update_cosine({}, nullptr, {});
  try {
    std::printf("sm_%d\\n", safelora::cuda::device(0).arch);
  } catch (const std::exception& error) {
    std::printf("%s\\n", error.what());
  }
}
"""


def test_cpp_component(library: Path, tmp_path: Path) -> None:
    """find_package(safelora_kernels COMPONENTS cuda), linked without torch; without a GPU the error is CUDA's own."""
    run(tool("cmake"), "--install", library.parent, "--component", "cuda", "--prefix", tmp_path / "prefix")
    (tmp_path / "main.cpp").write_text(CONSUMER)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(consumer CXX)\n"
        "find_package(safelora_kernels REQUIRED COMPONENTS cuda)\nadd_executable(consumer main.cpp)\n"
        "target_link_libraries(consumer safelora_kernels::cuda)\n"
    )
    tree = tmp_path / "tree"
    ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(tool("cmake"), "-S", tmp_path, "-B", tree, *ninja, f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    run(tool("cmake"), "--build", tree)
    assert re.match(r"sm_\d+|cudaDeviceGetAttribute: cudaError", run(tree / "consumer").stdout)
    assert not re.search(r"NEEDED.*(torch|libcuda)", run("readelf", "-d", "-W", tree / "consumer").stdout)
    # The CPU library is a component of its own, which is not here.
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(consumer CXX)\nfind_package(safelora_kernels REQUIRED)\n"
    )
    assert "ask for COMPONENTS cuda" in run(tool("cmake"), tree, fails=True).stderr


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """What the backend loads from here on: a library that is there, but is only noted."""
    loaded: list[Path] = []
    present = tmp_path / "_CUDA.abi3.so"
    present.touch()
    monkeypatch.setattr(backend, "LIBRARY", present)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.delenv("SAFELORA_DISABLE_NATIVE", raising=False)
    return loaded


def test_backend_loads_where_there_is_a_device(loads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert backend._load() == (True, "native kernels from _CUDA.abi3.so")
    assert loads == [backend.LIBRARY]


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "this torch is a CPU build"), ("13.0", "no CUDA device is visible: check nvidia-smi")]
)
def test_backend_without_a_device_says_so(
    loads: list[Path], monkeypatch: pytest.MonkeyPatch, cuda: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    available, found = backend._load()
    assert not available and found.startswith(reason)


def test_backend_leaves_rocm_alone(loads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    available, reason = backend._load()
    assert not available and "ROCm" in reason and loads == []


def test_backend_names_the_remedy(loads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    backend.LIBRARY.unlink()
    available, reason = backend._load()
    assert not available and "SAFELORA_CUDA=on" in reason and loads == []
    monkeypatch.setenv("SAFELORA_DISABLE_NATIVE", "1")
    assert "unset it" in backend._load()[1]


@pytest.mark.parametrize(
    ("mode", "cuda", "tools", "reason"),
    [
        ("auto", "'12.8'", True, ""),
        ("auto", "None", True, "torch is no CUDA build"),
        ("auto", "'12.8'", False, "nvcc was not found"),
        ("on", "None", True, ""),
        ("on", "None", False, "nvcc was not found"),
        ("off", "'12.8'", True, "SAFELORA_CUDA=off"),
    ],
)
def test_setup_builds_cuda_where_it_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, cuda: str, tools: bool, reason: str
) -> None:
    setup = load_setup(monkeypatch, ROOT)
    monkeypatch.setenv("SAFELORA_CUDA", mode)
    monkeypatch.setattr(setup, "find_tool", lambda name: name if tools else None)
    (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {cuda}\n")
    found = setup.cuda_missing(tmp_path)
    assert found.startswith(reason) and bool(found) is bool(reason)


def test_setup_refuses_an_unknown_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup(monkeypatch, ROOT)
    monkeypatch.setenv("SAFELORA_CUDA", "maybe")
    with pytest.raises(SystemExit, match="'maybe': expected auto, on or off"):
        setup.cuda_mode()
