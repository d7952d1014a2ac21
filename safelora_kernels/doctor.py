"""``python -m safelora_kernels``: what is installed, whether it is right, and how fast it is on this machine.

Every operator is run on every backend that is available and compared with :mod:`safelora_kernels.reference` in fp64;
gradients, determinism and ``torch.compile`` are checked, and speeds are set against the ceilings measured beside them.
The exit status is 0 when every check passed and 1 when one failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional, reference
from .backends import backends, explain
from .text import markdown_table
from .types import LayerFactors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The relative errors, in the Frobenius norm, that docs/numerics.md promises before the result is rounded.
_BOUNDS = {
    "project_layers": 1e-5,
    "update_cosine": 1e-12,
    "project_out_layers": 1e-6,
    "gram_apply_layers": 1e-5,
    "salora_linear": 1e-5,
}
_SMALLEST_SAMPLE = 5


@dataclass(frozen=True)
class Check:
    """One property of one operator on one backend; ``error`` and ``bound`` where it is a number."""

    backend: str
    op: str
    what: str
    passed: bool
    error: float | None = None
    bound: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Speed:
    """One measurement: median seconds, bytes that must be moved, and its share of the bandwidth measured beside it."""

    backend: str
    what: str
    seconds: float
    gigabytes_per_second: float
    share_of_bandwidth: float


@dataclass(frozen=True)
class Examination:
    """All of it, as printed by ``python -m safelora_kernels``."""

    environment: dict[str, str]
    backends: dict[str, dict[str, Any]]
    checks: list[Check]
    speeds: list[Speed]

    @property
    def healthy(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """Everything, indented."""
        return json.dumps({"format": "safelora-doctor/1", "healthy": self.healthy, **asdict(self)}, indent=1)

    def __str__(self) -> str:
        sections = [
            markdown_table(("environment", ""), self.environment.items()),
            markdown_table(
                ("backend", "runs", "reason"),
                ((name, "yes" if b["available"] else "no", b["reason"]) for name, b in self.backends.items()),
            ),
            markdown_table(("backend", "operator", "check", "", "error", "bound"), map(_cells, self.checks)),
        ]
        if self.speeds:
            rows = (
                (s.backend, s.what, f"{s.seconds * 1e3:.3g} ms", f"{s.gigabytes_per_second:.1f}",
                 f"{s.share_of_bandwidth:.0%}")
                for s in self.speeds
            )  # fmt: skip
            sections.append(markdown_table(("backend", "speed", "median", "GB/s", "of bandwidth"), rows))
        failed = sum(not check.passed for check in self.checks)
        verdict = f"{len(self.checks)} checks, " + ("all passed" if self.healthy else f"{failed} FAILED")
        return "\n\n".join([*sections, verdict])


def _cells(check: Check) -> tuple[str, ...]:
    numbers = ("" if value is None else f"{value:.1e}" for value in (check.error, check.bound))
    outcome = "ok" if check.passed else f"FAILED {check.detail}".rstrip()
    return (check.backend, check.op, check.what, outcome, *numbers)


def environment() -> dict[str, str]:
    """Versions, processor and GPUs, and the environment variables that change what runs."""
    found = {"safelora-kernels": _version("safelora-kernels"), "torch": torch.__version__}
    found["triton"] = _version("triton")
    found["cuda / rocm of torch"] = f"{torch.version.cuda or '–'} / {torch.version.hip or '–'}"
    found["python"] = platform.python_version()
    found["system"] = platform.platform()
    found["processor"] = f"{_processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            found[f"gpu {index}"] = f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 30} GiB"
    else:
        found["gpu"] = "none that torch can use"
    found |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("SAFELORA_")}
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _available() -> Iterator[tuple[str, str]]:
    """Every backend that runs here, with the device that its checks use."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name in backends():
        for device in devices:
            probe = torch.zeros(1, device=device)
            if explain("select_layers", probe, threshold=0.0, backend=name).backend:
                yield name, device


def _relative(value: Tensor, truth: Tensor) -> float:
    truth = truth.double().cpu()
    scale = float(truth.norm())
    error = float((value.double().cpu() - truth).norm())
    return error / scale if scale else error


def _judge(backend: str, op: str, what: str, pairs: Iterable[tuple[Tensor, Tensor]], bound: float) -> Check:
    """The worst relative error of results beside their truths; the results' own rounding comes on top of ``bound``."""
    worst, allowed, passed = 0.0, bound, True
    for value, truth in pairs:
        limit = bound + torch.finfo(value.dtype).eps / 2
        error = _relative(value, truth)
        passed &= error <= limit  # NaN fails
        if not error / limit <= worst / allowed:
            worst, allowed = error, limit
    return Check(backend, op, what, passed, worst, allowed)


def _wide(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().double().cpu() for t in tensors]


class _Layer(NamedTuple):
    aligned: Tensor
    base: Tensor
    lora_B: Tensor
    lora_A: Tensor


class _Inputs:
    """Random operands of every operator, drawn from one seed."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

        def place(t: Tensor) -> Tensor:
            return t.to(device, dtype)

        self.layers = []
        for d_out, d_in, rank in ((256, 384, 16), (130, 77, 5), (192, 512, 33)):
            base = normal(d_out, d_in, scale=0.02)
            aligned = base + normal(d_out, d_in, scale=0.004)
            factors = normal(d_out, rank, scale=0.01), normal(rank, d_in, scale=0.1)
            self.layers.append(_Layer(*map(place, (aligned, base, *factors))))
        self.xs = [place(normal(d, m)) for d, m in ((300, 16), (64, 33))]
        self.bases = [torch.linalg.qr(normal(x.shape[0], 9))[0].float().to(device) for x in self.xs]
        self.gram = [[place(normal(*s)) for s in shapes] for shapes in (((700, 96), (130, 41)), ((96, 16), (41, 5)))]
        self.weights: list[Tensor | None] = [normal(700).square().float().to(device), None]
        self.salora = [place(normal(*shape)) for shape in ((70, 96), (70, 130), (8, 96), (130, 8))]
        self.salora.append(torch.linalg.qr(normal(130, 9))[0].float().to(device))


def _project(layers: Sequence[_Layer], backend: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """B', ‖V‖_F and the cosine of every layer."""
    results = functional.project_layers([LayerFactors(*layer) for layer in layers], backend=backend)
    return [(r.lora_B, r.v_norm, r.cosine) for r in results]  # type: ignore[misc]


def _accuracy(backend: str, device: str, dtype: torch.dtype) -> Iterator[Check]:
    given = _Inputs(device, dtype)
    kind = str(dtype).removeprefix("torch.")
    results = _project(given.layers, backend)
    truths = [reference.project_lowrank(*_wide(layer)) for layer in given.layers]
    pairs = [(r[0], t.lora_B) for r, t in zip(results, truths, strict=True)]
    yield _judge(backend, "project_layers", f"B', {kind}", pairs, _BOUNDS["project_layers"])  # type: ignore[arg-type]
    scalars = [pair for r, t in zip(results, truths, strict=True) for pair in ((r[1], t.v_norm), (r[2], t.cosine))]
    yield _judge(backend, "project_layers", f"norm and cosine, {kind}", scalars, 1e-6)  # type: ignore[arg-type]
    new, old = [r[0] for r in results], [layer.lora_B for layer in given.layers]
    a = [layer.lora_A for layer in given.layers]
    cosines = functional.update_cosine(new, old, a, backend=backend)
    truth = reference.update_cosine(_wide(new), _wide(old), _wide(a))
    yield _judge(backend, "update_cosine", kind, [(cosines, truth)], _BOUNDS["update_cosine"])
    for side in ("left", "right"):
        xs = [x if side == "left" else x.mT for x in given.xs]
        outs = functional.project_out_layers(xs, given.bases, side=side, backend=backend)
        wide = reference.project_out_layers(_wide(xs), _wide(given.bases), side=side)
        yield _judge(
            backend,
            "project_out_layers",
            f"{side}, {kind}",
            zip(outs, wide, strict=True),
            _BOUNDS["project_out_layers"],
        )
    copies = [x.clone() for x in given.xs]
    functional.project_out_layers_(copies, given.bases, backend=backend)
    wide = reference.project_out_layers(_wide(given.xs), _wide(given.bases))
    yield _judge(
        backend,
        "project_out_layers_",
        f"in place, {kind}",
        zip(copies, wide, strict=True),
        _BOUNDS["project_out_layers"],
    )
    xs, zs = given.gram
    applied = functional.gram_apply_layers(xs, zs, given.weights, backend=backend)
    weights = [None if w is None else w.double().cpu() for w in given.weights]
    wide = reference.gram_apply_layers(_wide(xs), _wide(zs), weights)
    yield _judge(backend, "gram_apply_layers", kind, zip(applied, wide, strict=True), _BOUNDS["gram_apply_layers"])
    yield from _salora(backend, given.salora, kind)


def _salora(backend: str, operands: list[Tensor], kind: str) -> Iterator[Check]:
    leaves = [t.detach().requires_grad_() for t in operands]
    x, base_output, lora_A, lora_B, basis = leaves
    y = functional.salora_linear(x, base_output, lora_A, lora_B, basis, 0.5, backend=backend)
    dy = torch.ones_like(y) + y.detach().sign() / 2
    grads = torch.autograd.grad(y, leaves, dy)
    wide = [t.requires_grad_() for t in _wide(operands)]
    x, base_output, lora_A, lora_B, basis = wide
    truth = reference.salora_linear(x, base_output, lora_A, lora_B, basis, 0.5)
    wide_grads = torch.autograd.grad(truth, wide, dy.double().cpu())
    bound = _BOUNDS["salora_linear"]
    yield _judge(backend, "salora_linear", f"forward, {kind}", [(y.detach(), truth.detach())], bound)
    yield _judge(backend, "salora_linear", f"gradients, {kind}", zip(grads, wide_grads, strict=True), bound)


def _selection(backend: str, device: str) -> Check:
    cosines = torch.tensor([0.5, math.nan, 0.2, 0.35, 0.35, 0.349999], dtype=torch.float64, device=device)
    criteria: list[dict[str, Any]] = [{"threshold": 0.35}, {"num_layers": 3}]
    options = [{**criterion, "rule": rule} for criterion in criteria for rule in ("strict", "authors")]
    passed = all(
        torch.equal(
            functional.select_layers(cosines, **option, backend=backend).cpu(),
            reference.select_layers(cosines.cpu(), **option),
        )
        for option in options
    )
    return Check(backend, "select_layers", "both rules, NaN and ties", passed)


def _outputs(backend: str, device: str) -> list[Tensor]:
    given = _Inputs(device, torch.float32)
    results = _project(given.layers, backend)
    outs = functional.project_out_layers(given.xs, given.bases, backend=backend)
    leaves = [t.requires_grad_() for t in given.salora]
    x, base_output, lora_A, lora_B, basis = leaves
    y = functional.salora_linear(x, base_output, lora_A, lora_B, basis, 0.5, backend=backend)
    flat = [t for result in results for t in result]
    xs, zs = given.gram
    outs += functional.gram_apply_layers(xs, zs, given.weights, backend=backend)
    return [*flat, *outs, y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def _deterministic(backend: str, device: str) -> Check:
    first, second = _outputs(backend, device), _outputs(backend, device)
    passed = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return Check(backend, "all", "same bits twice", passed)


def _compiles(backend: str, device: str) -> Check:
    given = _Inputs(device, torch.float32)

    def step(x: Tensor, base_output: Tensor, lora_A: Tensor, lora_B: Tensor, basis: Tensor) -> Tensor:
        projected = functional.project_out(lora_B, basis, backend=backend)
        return functional.salora_linear(x, base_output, lora_A, projected, basis, 0.5, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    try:
        passed = torch.equal(compiled(*given.salora), step(*given.salora))
    except Exception as error:  # what the compiler may raise is its own affair; the user wants to read it
        return Check(backend, "salora_linear", "torch.compile", False, detail=f"{type(error).__name__}: {error}"[:200])
    return Check(backend, "salora_linear", "torch.compile", passed)


def _median_seconds(call: Callable[[], object], device: str) -> float:
    """Median wall time, work on the device included; at least five calls and a fifth of a second."""
    call()
    samples: list[float] = []
    while len(samples) < _SMALLEST_SAMPLE or (sum(samples) < 0.2 and len(samples) < 50):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _speeds(backend: str, device: str) -> Iterator[Speed]:
    """Operands are larger than the caches: 256 MiB on a CPU, 1 GiB on a GPU."""
    count, d, rank = (8, 2048, 16) if device == "cpu" else (16, 4096, 16)
    layers: list[_Layer] = []
    for _ in range(count * (2 if device == "cpu" else 1)):
        base = torch.randn(d, d, device=device) * 0.02
        aligned = (base + torch.randn(d, d, device=device) * 0.002).bfloat16()
        factors = torch.randn(d, rank, device=device), torch.randn(rank, d, device=device)
        layers.append(_Layer(aligned, base.bfloat16(), *factors))
    weights = [w for layer in layers for w in layer[:2]]
    size = sum(w.nbytes for w in weights)
    read = _median_seconds(lambda: [w.view(torch.int64).sum() for w in weights], device)
    bandwidth = size / read
    yield Speed(backend, f"reading {size >> 20} MiB (torch)", read, bandwidth / 1e9, 1.0)
    seconds = _median_seconds(lambda: _project(layers, backend), device)
    yield Speed(
        backend,
        f"project_layers, {len(layers)} × {d}×{d} bf16, r={rank}",
        seconds,
        size / seconds / 1e9,
        size / seconds / bandwidth,
    )
    xs = [torch.randn(4096, 16, device=device) for _ in range(128)]
    bases = [torch.linalg.qr(torch.randn(4096, 32, device=device))[0].contiguous() for _ in xs]
    size = sum(2 * x.nbytes + u.nbytes for x, u in zip(xs, bases, strict=True))
    seconds = _median_seconds(lambda: functional.project_out_layers_(xs, bases, backend=backend), device)
    yield Speed(
        backend, "project_out_layers_, 128 × 4096×16, k=32", seconds, size / seconds / 1e9, size / seconds / bandwidth
    )


def examine(*, speed: bool = True) -> Examination:
    """Runs every check on every available backend, and the measurements unless ``speed`` is False."""
    checks: list[Check] = []
    speeds: list[Speed] = []
    for backend, device in _available():
        for dtype in _DTYPES:
            checks.extend(_accuracy(backend, device, dtype))
        checks.append(_selection(backend, device))
        checks.append(_deterministic(backend, device))
        checks.append(_compiles(backend, device))
        if speed and not (backend == "reference" and device == "cpu"):
            speeds.extend(_speeds(backend, device))
    statuses = {name: status._asdict() for name, status in backends().items()}
    return Examination(environment(), statuses, checks, speeds)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m safelora_kernels",
        description="Check the kernels on this machine: installed, right, fast. Paste the output into an issue.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-speed", action="store_true", help="leave out the measurements")
    arguments = parser.parse_args(argv)
    examination = examine(speed=not arguments.no_speed)
    sys.stdout.write((examination.to_json() if arguments.json else str(examination)) + "\n")
    return 0 if examination.healthy else 1
