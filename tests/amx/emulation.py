"""Builds of the kernels, and of single instructions, whose AMX tiles are those of tiles.cpp.

The kernels are built by CMakeLists.txt as they always are: only that tiles.h comes before each file, that the operators
carry a name of their own, and that GCC optimises less, to be done sooner.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safelora_kernels.backends import cpu
from safelora_kernels.schemas import SCHEMAS

from ..ops.truth import cpu_flags
from ..packaging.building import JOBS, ROOT, run, tool

HERE = Path(__file__).resolve().parent
NAMESPACE = "safelora_amx"
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c"}
HARDWARE = {"amx_tile", "amx_bf16"}
_definitions: list[torch.library.Library] = []  # the operators live as long as they do


def missing() -> str:
    """Why nothing can be emulated here, empty if it can: what surrounds the tiles is not emulated."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "AMX is part of x86-64; the tests read the CPU's features from Linux"
    lacking = sorted(NEEDED - cpu_flags())
    return f"the kernels around the tiles need {', '.join(lacking)}, which this CPU lacks" if lacking else ""


def compile_shared(out: Path, *arguments: object) -> Path:
    run(os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-fPIC", "-shared", *arguments, "-o", out)
    return out


class Tiles:
    """The emulated tiles of this process."""

    def __init__(self, folder: Path) -> None:
        self.path = compile_shared(folder / "tiles.so", "-O3", "-march=native", HERE / "tiles.cpp")
        self.library = ctypes.CDLL(str(self.path))
        self.library.emulated_fault.restype = ctypes.c_char_p
        self.library.emulated_products.restype = ctypes.c_long

    def fault(self) -> str:
        """The first misuse since the last call, empty if there was none."""
        return (self.library.emulated_fault() or b"").decode()

    def products(self) -> int:
        """Tile products since the last call."""
        return int(self.library.emulated_products())


def load_operators(tiles: Tiles, folder: Path) -> dict[str, Any]:
    """The operators of the CPU kernels by name, from a build whose best code path is AMX on emulated tiles."""
    torch_dir = Path(torch.__file__).parent
    settings = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "SAFELORA_TORCH_DIR": torch_dir,
        "CMAKE_CXX_FLAGS": f"-include {HERE / 'tiles.h'} -DSAFELORA_NAMESPACE={NAMESPACE}",
        "CMAKE_CXX_STANDARD_LIBRARIES": tiles.path,
        "CMAKE_CXX_COMPILE_OBJECT": "<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -O1 -o <OBJECT> -c <SOURCE>",
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    run(tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", *defined)
    run(tool("cmake"), "--build", folder, "--target", "_C", "--parallel", JOBS)
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        definitions.define(name + schema)
    _definitions.append(definitions)
    torch.ops.load_library(folder / "_C.abi3.so")
    operators = getattr(torch.ops, NAMESPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SAFELORA_CPU_ISA", raising=False)  # read at the first question
        assert cpu.PATHS[operators._cpu_path()] == "amx", "AMX is not the best path of this build"
    implemented = cpu.implemented(SCHEMAS)
    return {name: getattr(operators, name).default for name in implemented}
