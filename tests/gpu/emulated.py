"""The CUDA code without a GPU: its host code as it is, its kernels on an emulator or as PTX in an interpreter.

    from .emulated import ORDERS, Device, run, run_all

    new, v_norm, cosine = run("project_layers", [w], [w0], [b], [a], [0], driver="simt")    # any operator of schemas.py
    new, v_norm, cosine = run_all("project_layers", [w], [w0], [b], [a], [0], device=Device(arch=90, sm_count=5))

Drivers: ``simt`` compiles the kernels with g++ (tests/simt), ``ptx`` with nvcc for compute_80 or compute_90a, which the
device's ``arch`` chooses, and interprets the PTX; ``asan`` (memory and undefined behaviour) and ``tsan`` (races, within
blocks and between them) are the emulator under sanitizers, in a process of their own. A bug that they find raises
RuntimeError with its text. An ``Order`` says what runs first and when copies land: results must not depend on it, and
``run_all`` insists on that, bit by bit, for a driver's every order. `launch` runs one kernel.

A build that fails is a failed test; without nvcc, an x86-64 g++ or the interpreter, `need` skips and says why.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import hashlib
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from safelora_kernels.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
SIMT = ROOT / "tests" / "simt"
CACHE = ROOT / "build" / "emulated"
INCLUDES = [CUDA, ROOT / "csrc" / "include", ROOT / "csrc" / "torch", ROOT / "csrc", ROOT / "tests"]
PROJECT_WORKSPACE = 4 << 20
TARGET_VERSION = "0x020a000000000000ULL"
STRICT = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
SANITIZE = {
    "simt": ["-O2", "-ftrivial-auto-var-init=pattern"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "tsan": ["-O1"],
    "ptx": ["-O2"],
}


class Copies:
    """When asynchronous copies take effect: when they are waited for, at once, or one or the other."""

    LAZY, EAGER, RANDOM = range(3)


@dataclass(frozen=True)
class Device:
    """The emulated device. ``resident`` blocks are what the host code is told can run at once (0: sm_count)."""

    arch: int = 80
    sm_count: int = 2
    l2_bytes: int = 40 << 20
    shared_bytes: int = 163 << 10
    resident: int = 0


@dataclass(frozen=True)
class Order:
    """Which thread runs next, when copies land, and how many blocks (clusters) do run at the same time."""

    name: str = "forward"  # forward, reverse, random, greedy, greedy_reverse; the PTX interpreter has no greedy
    copies: int = Copies.LAZY
    concurrent: int = 1
    seed: int = 0
    truncating: bool = True  # tensor cores cut sums off as an A100 does; the PTX interpreter rounds


ORDER_NAMES = ("forward", "reverse", "random", "greedy", "greedy_reverse")
ORDERS: dict[str, tuple[Order, ...]] = {
    "simt": (
        Order("forward"),
        Order("reverse", Copies.EAGER, 3),
        Order("greedy", Copies.LAZY, 2),
        Order("greedy_reverse", Copies.RANDOM, 4, 1),
        Order("random", Copies.RANDOM, 3, 2),
        Order("random", Copies.LAZY, 2, 3),
    ),
    "ptx": (
        Order("forward"),
        Order("reverse", Copies.EAGER, 2),
        Order("random", Copies.RANDOM, 3, 1),
        Order("random", Copies.RANDOM, 2, 2),
        Order("random", Copies.RANDOM, 1, 3),
    ),
    "asan": (Order("forward"), Order("greedy_reverse", Copies.EAGER, 3)),
    "tsan": (Order("forward"), Order("greedy", Copies.EAGER, 3), Order("random", Copies.RANDOM, 3, 1)),
}


# ---- what is there


@functools.cache
def nvcc() -> str | None:
    return shutil.which("nvcc")


@functools.cache
def cuda_include() -> list[str]:
    """The toolkit's header folders, as nvcc itself has them."""
    assert nvcc()
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.touch()
        done = subprocess.run(
            [str(nvcc()), "--dryrun", "-c", str(probe)], capture_output=True, text=True, check=True, cwd=folder
        )
    lines = [line for line in done.stderr.splitlines() if "INCLUDES=" in line]
    folders = re.findall(r'(?:-I|-isystem" ")([^"\s]+)', " ".join(lines))
    return [flag for folder in folders for flag in ("-isystem", folder)]


@functools.cache
def ptxsim() -> ModuleType | None:
    """The PTX interpreter, a tool outside of the tree: PTXSIM names the folder that holds its package."""
    folder = os.environ.get("PTXSIM") or str(ROOT.parent / "shared")
    if not Path(folder, "ptxsim", "__init__.py").is_file():
        return None
    os.environ.setdefault("PTXSIM_BUILD", str(CACHE / "ptxsim"))
    sys.path.append(folder)
    try:
        return importlib.import_module("ptxsim")
    finally:
        sys.path.remove(folder)


def missing(driver: str) -> str:
    """Why a driver cannot run here, empty if it can."""
    if nvcc() is None:
        return "nvcc is not on PATH: the CUDA code is neither compiled nor emulated"
    if driver == "nvcc":
        return ""
    if driver == "ptx":
        found = ptxsim() is not None
        return "" if found else "no PTX interpreter: set PTXSIM to the folder that holds its package"
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        return "the emulator needs g++ on x86-64"
    return ""


def need(driver: str) -> None:
    reason = missing(driver)
    if reason:
        pytest.skip(reason)


# ---- building: objects named after the hash of all that goes into them, so that an unchanged one is never made twice


def _local_headers(source: Path, seen: set[Path]) -> None:
    for name in re.findall(r'^\s*#\s*include "([^"]+)"', source.read_text(), re.MULTILINE):
        for folder in (source.parent, *INCLUDES):
            header = (folder / name).resolve()
            if header.is_file():
                if header not in seen:
                    seen.add(header)
                    _local_headers(header, seen)
                break


def _made(name: str, key: Sequence[str], make: Callable[[Path], list[str]]) -> Path:
    """The file ``name`` in the cache, made by the command ``make(temporary)`` unless its key is known."""
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:20]
    stem, suffix = os.path.splitext(name)
    made = CACHE / f"{stem}-{digest}{suffix}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            os.utime(made)
            return made
        temporary = CACHE / f".{os.getpid()}-{name}"
        command = make(temporary)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        temporary.rename(made)
        older = sorted(CACHE.glob(f"{stem}-{'?' * 20}{suffix}"), key=lambda path: path.stat().st_mtime)
        for stale in older[:-4]:
            stale.unlink(missing_ok=True)
    return made


@functools.cache
def _version(tool: str) -> str:
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout


def _compiled(tool: str, source: Path, flags: Sequence[str], name: str) -> Path:
    headers: set[Path] = set()
    _local_headers(source, headers)
    texts = [path.read_text() for path in (source, *sorted(headers))]
    key = [_version(tool), *flags, str(source.relative_to(ROOT)), *texts]
    return _made(name, key, lambda out: [tool, *flags, str(source), "-o", str(out)])


def _folders() -> list[str]:
    return [f"-I{folder}" for folder in INCLUDES]


def _object(variant: str, source: Path, extra: Sequence[str] = ()) -> Path:
    torch_include = ["-isystem", str(Path(torch.__file__).parent / "include")]
    kernel = source.suffix == ".cu"
    flags = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", *STRICT, *SANITIZE[variant]]
    # The machine keeps its own memory from the race detector; the CUDA code is what it looks at.
    if variant == "tsan":
        flags += ["-fsanitize=thread"] if kernel else ["-DSIMT_TSAN"]
    if kernel:
        flags += ["-Wno-unknown-pragmas", "-fno-strict-aliasing", "-x", "c++"]
    flags += [*_folders(), *cuda_include(), *torch_include, f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", *extra, "-c"]
    return _compiled("g++", source, flags, f"{variant}-{source.parent.name}-{source.name}.o")


def host_sources() -> list[Path]:
    """The host side of the ops, whatever runs the kernels."""
    return [path for path in sorted(CUDA.glob("*.cpp")) if path.name != "driver.cpp"]


def kernel_sources() -> list[Path]:
    return sorted(CUDA.glob("*.cu"))


@functools.cache
def library(variant: str, sources: tuple[Path, ...] | None = None) -> Path:
    """The shared object with host code, binding and driver; ``sources``: these kernels in place of the project's."""
    namespace = f"safelora_{variant}" + ("_probes" if sources else "")
    host: list[Path] = []
    kernels = list(sources or kernel_sources())
    common = [SIMT / "emulated.cpp", SIMT / ("driver_ptx.cpp" if variant == "ptx" else "driver_simt.cpp")]
    if variant != "ptx":
        common += [SIMT / "machine.cpp", SIMT / "copies.cpp", SIMT / "warp.cpp"]
    if not sources:
        host = [
            *host_sources(),
            ROOT / "csrc" / "torch" / "cuda_library.cpp",
            ROOT / "csrc" / "cpu" / "debug.cpp",
        ]
    # With so little room that a test can have more layers than go at a time.
    defines = {
        "project_layers.cpp": [f"-DSAFELORA_PROJECT_WORKSPACE={PROJECT_WORKSPACE}"],
        "cuda_library.cpp": [f"-DSAFELORA_NAMESPACE={namespace}", "-DSAFELORA_KEY=CPU"],
    }
    jobs = [(variant, path, []) for path in common]
    if variant != "ptx":
        jobs = [*((variant, path, []) for path in kernels), *jobs]
    # The host code is no subject of the race detector, nor does it know who runs the kernels.
    plain = "asan" if variant == "asan" else "simt"
    variants = {"cuda_library.cpp": variant}
    jobs += [(variants.get(path.name, plain), path, defines.get(path.name, [])) for path in host]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _object(*job), jobs))
    sanitize = {"asan": ["-fsanitize=address,undefined"], "tsan": ["-fsanitize=thread"]}.get(variant, [])
    torch_lib = str(Path(torch.__file__).parent / "lib")
    link = ["-shared", *sanitize, *map(str, objects), "-Wl,--no-undefined", "-lstdc++", f"-L{torch_lib}", "-ltorch_cpu"]
    return _made(f"{namespace}.so", [*link, _version("g++")], lambda out: ["g++", "-o", str(out), *link])


def ptx_sources(arch: int, sources: Sequence[Path]) -> list[Path]:
    """The kernels' PTX, a file for each source."""
    target = "compute_90a" if arch >= 90 else "compute_80"
    flags = ["-std=c++17", "-O3", "-ptx", "-lineinfo", *_folders(), "-gencode", f"arch={target},code={target}"]
    flags += ["-Werror", "all-warnings"]
    with ThreadPoolExecutor(2) as pool:
        tool = str(nvcc())
        return list(pool.map(lambda s: _compiled(tool, s, flags, f"{target}-{s.parent.name}-{s.name}.ptx"), sources))


# ---- running


class _Settings(ctypes.Structure):
    """simt::Settings."""

    _fields_ = (
        ("arch", ctypes.c_int),
        ("sm_count", ctypes.c_int),
        ("l2_bytes", ctypes.c_int64),
        ("shared_bytes", ctypes.c_int64),
        ("resident", ctypes.c_int),
        ("concurrent", ctypes.c_int),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_int),
        ("copies", ctypes.c_int),
        ("adder", ctypes.c_int),
    )


class _Launch(ctypes.Structure):
    """emulated::Launch."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("shared", ctypes.c_size_t),
        ("params", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
    )


_LAUNCHER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Launch))
_VISITOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Emulator:
    """One loaded library of emulated CUDA code: operators, or the kernels in ``sources``."""

    def __init__(self, variant: str, sources: tuple[Path, ...] | None = None) -> None:
        path = library(variant, sources)
        if sources is None:
            # Registered at load: the namespace must have its schemas by then.
            self.definitions = torch.library.Library(f"safelora_{variant}", "DEF")
            for name, schema in SCHEMAS.items():
                self.definitions.define(name + schema)
            torch.ops.load_library(path)
            self.ops = getattr(torch.ops, f"safelora_{variant}")
        self.variant = variant
        self.sources = sources or tuple(kernel_sources())
        self.library = ctypes.CDLL(str(path))
        self.library.emulated_settings.restype = ctypes.POINTER(_Settings)
        self.library.emulated_launch.restype = ctypes.c_char_p
        self.settings = self.library.emulated_settings().contents
        self.order = Order()
        self.launches: list[str] = []
        self._error = b""
        self._modules: dict[str, list[Any]] = {}
        if variant == "ptx":
            self._callback = _LAUNCHER(self._launch_ptx)
            self.library.emulated_set_launcher(self._callback)

    def configure(self, device: Device, order: Order) -> None:
        self.order = order
        self.launches.clear()
        values = {**asdict(device), "concurrent": order.concurrent, "order": ORDER_NAMES.index(order.name)}
        values |= {"seed": order.seed, "copies": order.copies, "adder": int(order.truncating)}
        for name, value in values.items():
            setattr(self.settings, name, value)

    def _module(self, kernel: str) -> Any:
        tool = ptxsim()
        assert tool
        target = "90" if self.settings.arch >= 90 else "80"
        if target not in self._modules:
            paths = ptx_sources(self.settings.arch, self.sources)
            self._modules[target] = [tool.Module(path.read_text()) for path in paths]
        for module in self._modules[target]:
            if f"safelora_{kernel}" in module.kernels():
                return module
        raise RuntimeError(f"no kernel is called {kernel}")

    def _pieces(self) -> list[Any]:
        import numpy

        pieces: list[Any] = []

        def visit(data: int, size: int, _: int) -> None:
            pieces.append(numpy.frombuffer((ctypes.c_uint8 * size).from_address(data), dtype=numpy.uint8))

        self.library.emulated_for_each_piece(_VISITOR(visit), None)
        return pieces

    def _launch_ptx(self, pointer: Any) -> int | None:
        launch = pointer.contents
        kernel = launch.kernel.decode()
        self.launches.append(kernel)
        order = self.order
        try:
            if launch.shared > self.settings.shared_bytes:
                raise RuntimeError(f"{kernel}: more shared memory than a block can have")
            self._module(kernel).launch(
                f"safelora_{kernel}",
                tuple(launch.grid),
                launch.block,
                [ctypes.string_at(launch.params, launch.bytes)],
                shared_bytes=launch.shared,
                cluster=(launch.cluster, 1, 1) if launch.cluster > 1 else None,
                order={"forward": "fwd", "reverse": "rev"}.get(order.name, "random"),
                async_mode=("lazy", "eager", "random")[order.copies],
                seed=order.seed,
                race=True,
                resident=order.concurrent,
                extra=self._pieces(),
            )
        except Exception as error:
            self._error = f"{kernel}: {error}".encode()
            return ctypes.cast(ctypes.c_char_p(self._error), ctypes.c_void_p).value
        return None

    def launch(
        self,
        kernel: str,
        params: ctypes.Structure | bytes,
        *,
        grid: Sequence[int] = (1,),
        block: int = 32,
        shared: int = 0,
        cluster: int = 1,
        memory: Sequence[Tensor] = (),
        device: Device,
        order: Order,
    ) -> None:
        """Runs one kernel over tensors whose addresses stand in ``params``. Raises RuntimeError for what is found."""
        self.configure(device, order)
        self.library.emulated_forget_all()
        for tensor in memory:
            size = tensor.untyped_storage().nbytes()
            self.library.emulated_remember(ctypes.c_void_p(tensor.untyped_storage().data_ptr()), ctypes.c_size_t(size))
        raw = bytes(params)
        extents = (ctypes.c_uint * 3)(*(*grid, 1, 1)[:3])
        buffer = ctypes.create_string_buffer(raw, len(raw))
        address = ctypes.cast(buffer, ctypes.c_void_p)
        launch = _Launch(kernel.encode(), extents, block, cluster, shared, address, len(raw))
        error = self.library.emulated_launch(ctypes.byref(launch))
        if error is not None:
            raise RuntimeError(error.decode())

    def tensor_map(self, tensor: Tensor, box: tuple[int, int], swizzle: int = 0) -> bytes:
        out = ctypes.create_string_buffer(128)
        size = tensor.element_size()
        self.library.emulated_tensor_map(
            out,
            ctypes.c_void_p(tensor.data_ptr()),
            *(ctypes.c_int64(n) for n in (*tensor.shape, tensor.stride(0))),
            size,
            *box,
            swizzle,
        )
        return out.raw


@functools.cache
def emulator(variant: str, sources: tuple[Path, ...] | None = None) -> Emulator:
    return Emulator(variant, sources)


def run(
    op: str, *args: Any, driver: str = "simt", device: Device | None = None, order: Order | None = None, **options: Any
) -> Any:
    """One operator of schemas.py on CPU tensors; ``options`` are its keyword arguments."""
    need(driver)
    chosen = order or ORDERS[driver][0]
    if driver in ("asan", "tsan"):
        return sanitized(driver, [(op, args, options, device or Device(), chosen)])[0]
    machine = emulator(driver)
    machine.configure(device or Device(), chosen)
    return getattr(machine.ops, op)(*args, **options)


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [tensor for item in value for tensor in _flat(item)]


def run_all(
    op: str,
    *args: Any,
    drivers: Sequence[str] = ("simt",),
    device: Device | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The operator in every order of every driver; the results by driver, which must not depend on the order."""
    results: dict[str, Any] = {}
    for driver in drivers:
        need(driver)
        if driver in ("asan", "tsan"):
            calls = [(op, args, options, device or Device(), order) for order in ORDERS[driver]]
            outcomes = sanitized(driver, calls)
        else:
            outcomes = [run(op, *args, driver=driver, device=device, order=o, **options) for o in ORDERS[driver]]
        first = _flat(outcomes[0])
        for order, outcome in zip(ORDERS[driver], outcomes, strict=True):
            for i, (expected, found) in enumerate(zip(first, _flat(outcome), strict=True)):
                same = torch.equal(expected.contiguous().view(torch.uint8), found.contiguous().view(torch.uint8))
                assert same, f"{driver}: result {i} of {op} differs between {ORDERS[driver][0]} and {order}"
        results[driver] = outcomes[0]
    return results


def launch(
    kernel: str,
    params: Callable[[Emulator, Sequence[Tensor]], bytes],
    memory: Sequence[Tensor],
    *,
    driver: str,
    sources: tuple[Path, ...],
    **options: Any,
) -> list[Tensor]:
    """One kernel of ``sources`` over the tensors in ``memory``, which come back as it left them; see `Emulator.launch`.

    ``params`` makes the kernel's parameters from where the tensors lie, which may be in another process.
    """
    need(driver)
    options = {"device": Device(), "order": Order(), **options}
    if driver in ("asan", "tsan"):
        return sanitized(driver, [(kernel, params, list(memory), options)], sources)[0]
    machine = emulator(driver, sources)
    machine.configure(options["device"], options["order"])
    machine.launch(kernel, params(machine, memory), memory=memory, **options)
    return list(memory)


# ---- sanitizers, in a process that starts with their runtime, and lives as long as it finds nothing


class _Sanitized:
    """``tests.gpu.sanitized`` as a child: paths of calls go in by a line each, and come back as ``done`` when it is."""

    def __init__(self, variant: str, path: Path, sources: tuple[Path, ...] | None) -> None:
        runtime = {"asan": "libasan.so", "tsan": "libtsan.so"}[variant]
        preload = [
            subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
            for name in (runtime, "libstdc++.so.6")
        ]
        self.variant = variant
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the child
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.sanitized", variant, str(path), *map(str, sources or ())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "LD_PRELOAD": " ".join(preload).replace("\n", ""),
                "ASAN_OPTIONS": "detect_leaks=0",
                "UBSAN_OPTIONS": "print_stacktrace=1",
                "TSAN_OPTIONS": "suppress_equal_stacks=0:report_signal_unsafe=0",
                "SAFELORA_DISABLE_NATIVE": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
            },
        )

    def ask(self, calls: list[Any]) -> list[Any]:
        assert self.child.stdin and self.child.stdout
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "calls.pt")
            torch.save(calls, path)
            before = self.log.seek(0, os.SEEK_END)
            try:
                self.child.stdin.write(f"{path}\n")
                self.child.stdin.flush()
                answer = self.child.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if answer.strip() != "done":
                self.child.wait()
            self.log.seek(before)
            report = self.log.read()
            if answer.strip() != "done" or "WARNING: ThreadSanitizer" in report:
                raise RuntimeError(f"{self.variant} (exit status {self.child.returncode})\n{report[:8000]}")
            kind, value = torch.load(path, weights_only=False)
        if kind == "fault":
            raise RuntimeError(value)
        return value


_sanitized: dict[Any, _Sanitized] = {}


def sanitized(variant: str, calls: Sequence[Any], sources: tuple[Path, ...] | None = None) -> list[Any]:
    """The results of calls under a sanitizer: operators, or kernels of ``sources``. RuntimeError with what it finds."""
    key = variant, sources
    if key not in _sanitized or _sanitized[key].child.poll() is not None:
        _sanitized[key] = _Sanitized(variant, library(variant, sources), sources)
        atexit.register(_sanitized[key].child.kill)
    return _sanitized[key].ask(list(calls))
