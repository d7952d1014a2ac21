"""Builds the native part with CMake. Everything declarative stands in pyproject.toml.

SAFELORA_BUILD=auto (default): native where it can be, otherwise pure Python, with the reason recorded.
SAFELORA_BUILD=native: fail where the native part cannot be built. SAFELORA_BUILD=pure: do not try.
SAFELORA_CUDA=auto (default): the CUDA kernels too, where nvcc is found and torch is a CUDA build; a failure to build
them leaves the CPU kernels alone, with the reason recorded. SAFELORA_CUDA=on: build them for any torch, or fail.
SAFELORA_CUDA=off: do not try.
SAFELORA_TORCH_DIR: the installed torch package to build against, where it is not found by itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError as error:
    raise SystemExit("setuptools is too old to build this: pip install 'setuptools>=77', or build isolated") from error

ROOT = Path(__file__).resolve().parent
EXTENSION = Extension("safelora_kernels._C", sources=[], py_limited_api=True)
LIBRARY = "_C.abi3.so"
CUDA_LIBRARY = "_CUDA.abi3.so"
BUILD_INFO = "_build_info.json"
LOST = "the CPU kernels are left out, every op runs on its plain PyTorch reference (correct, but far slower)"
REMEDY = "install a C++17 compiler and torch>=2.10, then reinstall with SAFELORA_BUILD=native to see any error in full"
FIND_TORCH = """
import importlib.util, os
spec = importlib.util.find_spec("torch")
print(os.path.dirname(spec.origin) if spec and spec.origin else "")
"""


class NativeBuildError(Exception):
    """The native part cannot be built; the message is the reason, in one line."""


def build_mode() -> str:
    mode = os.environ.get("SAFELORA_BUILD", "auto")
    if mode not in ("auto", "native", "pure"):
        raise SystemExit(f"SAFELORA_BUILD is {mode!r}: expected auto, native or pure")
    return mode


def cuda_mode() -> str:
    mode = os.environ.get("SAFELORA_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"SAFELORA_CUDA is {mode!r}: expected auto, on or off")
    return mode


def cuda_missing(torch_dir: Path) -> str:
    """Why the CUDA kernels are not to be built, empty if they are."""
    mode = cuda_mode()
    if mode == "off":
        return "SAFELORA_CUDA=off asked for no CUDA kernels"
    if mode == "auto" and not re.search(r"^cuda\b.*= '", (torch_dir / "version.py").read_text(), re.MULTILINE):
        return "torch is no CUDA build (SAFELORA_CUDA=on builds the CUDA kernels all the same)"
    if find_tool(os.environ.get("CUDACXX", "nvcc")) is None:
        return "nvcc was not found on PATH (set CUDACXX to it)"
    return ""


def find_torch() -> Path:
    """The torch package of the target environment, located without importing it.

    An isolated build hides the environment's packages through PYTHONPATH; ``python -E`` looks past that.
    """
    override = os.environ.get("SAFELORA_TORCH_DIR")
    if override:
        if not Path(override, "include").is_dir():
            raise NativeBuildError(f"SAFELORA_TORCH_DIR={override} holds no torch package (no include folder)")
        return Path(override)
    spec = importlib.util.find_spec("torch")
    found = os.path.dirname(spec.origin) if spec and spec.origin else ""
    if not found:
        found = subprocess.run(
            [sys.executable, "-E", "-c", FIND_TORCH], capture_output=True, text=True, check=False
        ).stdout.strip()
    if not found:
        raise NativeBuildError("torch is not installed in this environment (install torch>=2.10 first)")
    return Path(found)


def find_tool(name: str) -> str | None:
    """A build tool that really starts: on PATH or beside this interpreter (an isolated build breaks script shims)."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    for folder in search.split(os.pathsep):
        tool = shutil.which(name, path=folder)
        if tool and subprocess.run([tool, "--version"], capture_output=True, check=False).returncode == 0:
            return tool
    return None


def missing_tools() -> list[str]:
    """CMake and ninja as build requirements, only where a native build is possible and the machine lacks them."""
    if build_mode() == "pure" or not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        return []
    requirements = {"cmake": "cmake>=3.18", "ninja": "ninja"}
    needed = ["cmake"] if find_tool("make") else ["cmake", "ninja"]
    wanted = [requirements[tool] for tool in needed if find_tool(tool) is None]
    try:
        return wanted if wanted and find_torch() else []
    except NativeBuildError:
        return []


def run_tool(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode:
        first_error = re.search(r"^CMake Error.*?:\n((?:.*\n)*?)\n\n|^(.*\berror: .*)$", done.stdout, re.MULTILINE)
        detail = " ".join((first_error.group(1) or first_error.group(2)).split()) if first_error else ""
        raise NativeBuildError(f"{' '.join(command[:2])} failed: {detail or done.stdout.strip()[-300:]}")


def build_native(destination: Path) -> dict[str, object]:
    """Configure, compile and put the libraries into ``destination``; returns what was built, and with what."""
    torch_dir = find_torch()
    version = re.search(r"__version__ = '(.+)'", (torch_dir / "version.py").read_text())
    info: dict[str, object] = {"torch": version.group(1) if version else "unknown", "cuda": False}
    reason = cuda_missing(torch_dir)
    if not reason:
        try:
            run_cmake(torch_dir, destination, cuda=True)
        except NativeBuildError as error:
            reason = str(error)
        else:
            return {**info, "cuda": True}
    if cuda_mode() == "on":
        raise NativeBuildError(reason)
    print(f"safelora-kernels: no CUDA kernels: {reason}", file=sys.stderr, flush=True)
    (destination / CUDA_LIBRARY).unlink(missing_ok=True)
    run_cmake(torch_dir, destination, cuda=False)
    return {**info, "cuda_reason": reason}


def run_cmake(torch_dir: Path, destination: Path, *, cuda: bool) -> None:
    cmake = find_tool("cmake")
    if cmake is None:
        raise NativeBuildError("cmake (>= 3.18) was not found")
    tree = ROOT / "build" / "cmake"
    ninja = find_tool("ninja")
    configure = [cmake, "-S", str(ROOT), "-B", str(tree), f"-DSAFELORA_TORCH_DIR={torch_dir}"]
    configure.append(f"-DSAFELORA_CUDA={'ON' if cuda else 'OFF'}")
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    try:
        run_tool(configure)
    except NativeBuildError:
        if not (tree / "CMakeCache.txt").exists():
            raise
        shutil.rmtree(tree)  # a cache of another checkout, generator or compiler is the usual reason
        run_tool(configure)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    run_tool([cmake, "--build", str(tree), "--parallel", jobs])
    run_tool([cmake, "--install", str(tree), "--component", "python", "--strip", "--prefix", str(destination)])


class BuildNative(build_ext):
    """Runs CMake in place of the compiler, and makes the distribution pure where that cannot work."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "safelora_kernels"
        package.mkdir(parents=True, exist_ok=True)
        mode = build_mode()
        try:
            if mode == "pure":
                raise NativeBuildError("SAFELORA_BUILD=pure asked for a pure-Python install")
            info: dict[str, object] = {"native": True, **build_native(package)}
        except NativeBuildError as error:
            asked = "SAFELORA_BUILD=native" if mode == "native" else "SAFELORA_CUDA=on" if cuda_mode() == "on" else ""
            if asked:
                raise SystemExit(f"{asked}, but {error}") from error
            print(f"safelora-kernels: {error}; {LOST}. To get them: {REMEDY}.", file=sys.stderr, flush=True)
            info = {"native": False, "reason": str(error)}
            for library in (LIBRARY, CUDA_LIBRARY):
                (package / library).unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []
        (package / BUILD_INFO).write_text(json.dumps(info, indent=1) + "\n")


class TaggedWheel(bdist_wheel):
    """py3-none-any without the library, cp310-abi3 with it: it needs no Python symbol newer than 3.10's."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.ext_modules
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if self.root_is_pure or sysconfig.get_config_var("Py_GIL_DISABLED"):
            return python, abi, platform
        return "cp310", "abi3", platform


setup(
    packages=[*find_packages(".", include=["safelora_kernels*"]), *find_packages("python", include=["safelora*"])],
    package_dir={"safelora_kernels": "safelora_kernels", "safelora": "python/safelora"},
    ext_modules=[EXTENSION],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": TaggedWheel},
    setup_requires=missing_tools(),
)
