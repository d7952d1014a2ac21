"""``python -m safelora_kernels``: what is installed, whether it is right, and how fast it is on this machine.

Every operator is run on every backend that is available and compared with :mod:`safelora_kernels.reference` in fp64;
gradients, determinism and ``torch.compile`` are checked, and speeds are set against the ceilings measured in turns with
them. On a machine with a GPU all of it runs there too. The exit status is 0 when every check passed, 1 when one failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional, reference
from .backends import backends, cpu, cuda, explain
from .bench.measure import interleaved, matmul_probe, median
from .text import markdown_table
from .types import LayerFactors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The relative errors, in the Frobenius norm, that docs/numerics.md promises before the result is rounded.
_BOUNDS = {
    "project_layers": 1e-5,
    "update_cosine": 1e-12,
    "project_out_layers": 1e-6,
    "salora_linear": 1e-5,
    "gram_apply_layers": 1e-5,
}
# What the kernels or torch's own products choose by.
_CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "bf16",
)  # fmt: skip
_MOVING, _MATMUL = "moving the operands", "torch.mm"


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
    """Median seconds of a call, its rates, and their shares of what was measured in turns with it.

    The ceilings are moving the operands once, and fp32 ``torch.mm``.
    """

    backend: str
    what: str
    seconds: float
    gigabytes_per_second: float
    share_of_bandwidth: float
    gigaflop_per_second: float
    share_of_matmul: float


@dataclass(frozen=True)
class Examination:
    """All of it, as printed by ``python -m safelora_kernels``."""

    environment: dict[str, str]
    libraries: dict[str, str]
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
            markdown_table(("shared object", ""), self.libraries.items()),
            markdown_table(
                ("backend", "runs", "reason"),
                ((name, "yes" if b["available"] else "no", b["reason"]) for name, b in self.backends.items()),
            ),
            markdown_table(("backend", "operator", "check", "", "error", "bound"), map(_cells, self.checks)),
        ]
        if self.speeds:
            rows = (
                (s.backend, s.what, f"{s.seconds * 1e3:.3g} ms", f"{s.gigabytes_per_second:.1f}",
                 f"{s.share_of_bandwidth:.0%}", f"{s.gigaflop_per_second:.0f}", f"{s.share_of_matmul:.0%}")
                for s in self.speeds
            )  # fmt: skip
            head = ("backend", "speed", "median", "GB/s", "of bandwidth", "GFLOP/s", "of torch.mm, fp32")
            sections.append(markdown_table(head, rows))
        failed = sum(not check.passed for check in self.checks)
        verdict = f"{len(self.checks)} checks, " + ("all passed" if self.healthy else f"{failed} FAILED")
        return "\n\n".join([*sections, verdict])


def _cells(check: Check) -> tuple[str, ...]:
    numbers = ("" if value is None else f"{value:.1e}" for value in (check.error, check.bound))
    outcome = "ok" if check.passed else f"FAILED {check.detail}".rstrip()
    return (check.backend, check.op, check.what, outcome, *numbers)


def environment() -> dict[str, str]:
    """Versions, processor and its code path, GPUs, and the environment variables that change what runs."""
    found = {"safelora-kernels": _version("safelora-kernels"), "torch": torch.__version__}
    for package in ("triton", "transformers", "peft"):
        found[package] = _version(package)
    found["cuda / rocm of torch"] = f"{torch.version.cuda or '–'} / {torch.version.hip or '–'}"
    found["python"] = platform.python_version()
    found["system"] = platform.platform()
    found["processor"] = f"{_processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    found["cpu features"] = _cpu_features()
    found["caches"] = _caches()
    found["cpu code path"] = cpu.code_path()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            found[f"gpu {index}"] = (
                f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
                f"{p.total_memory >> 30} GiB"
            )
    else:
        found["gpu"] = "none that torch can use"
    found |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("SAFELORA_")}
    return found


def libraries() -> dict[str, str]:
    """The shared objects of the package: loaded, or why not."""
    found = {}
    for backend in (cpu, cuda):
        library, reason = backend.LIBRARY, backend.STATUS[1]
        if str(library) in torch.ops.loaded_libraries:
            found[library.name] = f"loaded, {library.stat().st_size >> 10} KiB, from {library.parent}"
        else:
            found[library.name] = f"not loaded: {reason if library.exists() else backend.build_reason()}"
    return found


def _cpu_features() -> str:
    """Of the features that matter, those that the operating system reports."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return "unknown (no /proc/cpuinfo)"
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    return " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "none of those that matter"


def _caches() -> str:
    """Of the first core."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found) or "unknown"


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
        self.salora = [place(normal(*shape)) for shape in ((70, 96), (70, 130), (8, 96), (130, 8))]
        self.salora.append(torch.linalg.qr(normal(130, 9))[0].float().to(device))
        self.gram_xs = [place(normal(*shape)) for shape in ((700, 96), (130, 41))]
        self.gram_zs = [place(normal(*shape)) for shape in ((96, 16), (41, 5))]
        self.weights: list[Tensor | None] = [normal(700).square().float().to(device), None]


def _project(layers: Sequence[_Layer], backend: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """B', ‖V‖_F and the cosine of every layer."""
    results = functional.project_layers([LayerFactors(*layer) for layer in layers], backend=backend)
    return [(r.lora_B, r.v_norm, r.cosine) for r in results]  # type: ignore[misc]


def _projection(backend: str, given: _Inputs, kind: str) -> Iterator[Check]:
    results = _project(given.layers, backend)
    truths = [reference.project_lowrank(*_wide(layer)) for layer in given.layers]
    pairs = [(r[0], t.lora_B) for r, t in zip(results, truths, strict=True)]
    yield _judge(backend, "project_layers", f"B', {kind}", pairs, _BOUNDS["project_layers"])  # type: ignore[arg-type]
    scalars = [pair for r, t in zip(results, truths, strict=True) for pair in ((r[1], t.v_norm), (r[2], t.cosine))]
    yield _judge(backend, "project_layers", f"norm and cosine, {kind}", scalars, 1e-6)  # type: ignore[arg-type]
    lowest = int(torch.stack([r[2] for r in results]).argmin())
    final = functional.project_selected_layers([LayerFactors(*x) for x in given.layers], num_layers=1, backend=backend)
    expected = [r[0] if i == lowest else given.layers[i].lora_B for i, r in enumerate(results)]
    passed = all(torch.equal(b, e) for b, e in zip(_tensors(final.lora_B), expected, strict=True))
    yield Check(backend, "project_selected_layers", f"projected and kept, {kind}", passed)
    new, old = [r[0] for r in results], [layer.lora_B for layer in given.layers]
    a = [layer.lora_A for layer in given.layers]
    cosines = functional.update_cosine(new, old, a, backend=backend)
    truth = reference.update_cosine(_wide(new), _wide(old), _wide(a))
    yield _judge(backend, "update_cosine", kind, [(cosines, truth)], _BOUNDS["update_cosine"])


def _complement(backend: str, given: _Inputs, kind: str) -> Iterator[Check]:
    bound = _BOUNDS["project_out_layers"]
    for side in ("left", "right"):
        xs = [x if side == "left" else x.mT for x in given.xs]
        leaves = [t.detach().requires_grad_() for t in (*xs, *given.bases)]
        outs = functional.project_out_layers(leaves[: len(xs)], leaves[len(xs) :], side=side, backend=backend)
        wide = [t.requires_grad_() for t in _wide(leaves)]
        truths = reference.project_out_layers(wide[: len(xs)], wide[len(xs) :], side=side)
        pairs = [(y.detach(), t.detach()) for y, t in zip(outs, truths, strict=True)]
        yield _judge(backend, "project_out_layers", f"{side}, {kind}", pairs, bound)
        dys = [y.detach() for y in outs]
        grads = torch.autograd.grad(outs, leaves, dys)
        wide_grads = torch.autograd.grad(truths, wide, [dy.double().cpu() for dy in dys])
        # The gradient of U sums over the columns of X as well.
        yield _judge(
            backend, "project_out_layers", f"gradients, {side}, {kind}", zip(grads, wide_grads, strict=True), 10 * bound
        )
    copies = [x.clone() for x in given.xs]
    functional.project_out_layers_(copies, given.bases, backend=backend)
    truths = reference.project_out_layers(_wide(given.xs), _wide(given.bases))
    yield _judge(backend, "project_out_layers_", f"in place, {kind}", zip(copies, truths, strict=True), bound)


def _gram(backend: str, given: _Inputs, kind: str) -> Iterator[Check]:
    count, bound = len(given.weights), _BOUNDS["gram_apply_layers"]
    leaves = [t.detach().requires_grad_() for t in (*given.gram_xs, *given.gram_zs)]
    outs = functional.gram_apply_layers(leaves[:count], leaves[count:], given.weights, backend=backend)
    wide = [t.requires_grad_() for t in _wide(leaves)]
    weights = [None if w is None else w.double().cpu() for w in given.weights]
    truths = reference.gram_apply_layers(wide[:count], wide[count:], weights)
    pairs = [(y.detach(), t.detach()) for y, t in zip(outs, truths, strict=True)]
    yield _judge(backend, "gram_apply_layers", f"forward, {kind}", pairs, bound)
    dys = [y.detach() / (y.shape[0] * y.detach().norm()) for y in outs]  # fp16 holds what follows
    grads = torch.autograd.grad(outs, leaves, dys)
    wide_grads = torch.autograd.grad(truths, wide, [dy.double().cpu() for dy in dys])
    yield _judge(backend, "gram_apply_layers", f"gradients, {kind}", zip(grads, wide_grads, strict=True), bound)


def _salora(backend: str, given: _Inputs, kind: str) -> Iterator[Check]:
    leaves = [t.detach().requires_grad_() for t in given.salora]
    x, base_output, lora_A, lora_B, basis = leaves
    y = functional.salora_linear(x, base_output, lora_A, lora_B, basis, 0.5, backend=backend)
    dy = torch.ones_like(y) + y.detach().sign() / 2
    grads = torch.autograd.grad(y, leaves, dy)
    wide = [t.requires_grad_() for t in _wide(given.salora)]
    x, base_output, lora_A, lora_B, basis = wide
    truth = reference.salora_linear(x, base_output, lora_A, lora_B, basis, 0.5)
    wide_grads = torch.autograd.grad(truth, wide, dy.double().cpu())
    bound = _BOUNDS["salora_linear"]
    yield _judge(backend, "salora_linear", f"forward, {kind}", [(y.detach(), truth.detach())], bound)
    yield _judge(backend, "salora_linear", f"gradients, {kind}", zip(grads, wide_grads, strict=True), bound)


def _selection(backend: str, device: str) -> Iterator[Check]:
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
    yield Check(backend, "select_layers", "both rules, NaN and ties", passed)


def _outputs(backend: str, device: str) -> list[Tensor]:
    given = _Inputs(device, torch.float32)
    results = _project(given.layers, backend)
    outs = functional.project_out_layers(given.xs, given.bases, backend=backend)
    leaves = [t.requires_grad_() for t in given.salora]
    x, base_output, lora_A, lora_B, basis = leaves
    y = functional.salora_linear(x, base_output, lora_A, lora_B, basis, 0.5, backend=backend)
    flat = [t for result in results for t in result]
    grams = functional.gram_apply_layers(given.gram_xs, given.gram_zs, given.weights, backend=backend)
    return [*flat, *outs, *grams, y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def _deterministic(backend: str, device: str) -> Iterator[Check]:
    first, second = _outputs(backend, device), _outputs(backend, device)
    passed = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    yield Check(backend, "all", "same bits twice", passed)


def _compiles(backend: str, device: str) -> Iterator[Check]:
    """Every public function in one graph, with the bits of the eager call."""
    given = _Inputs(device, torch.float32)
    layers = [LayerFactors(*layer) for layer in given.layers]
    x, y, a, b, u = given.salora
    cosines = torch.linspace(0, 1, 7, dtype=torch.float64, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "project_layers": lambda: functional.project_layers(layers, backend=backend),
        "select_layers": lambda: functional.select_layers(cosines, num_layers=3, backend=backend),
        "project_out_layers": lambda: functional.project_out_layers(given.xs, given.bases, backend=backend),
        "salora_linear": lambda: functional.salora_linear(x, y, a, b, u, 0.5, backend=backend),
        "gram_apply_layers": lambda: functional.gram_apply_layers(
            given.gram_xs, given.gram_zs, given.weights, backend=backend
        ),
    }
    for op, call in calls.items():
        try:
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")()
            pairs = zip(_tensors(compiled), _tensors(call()), strict=True)
            yield Check(backend, op, "torch.compile", all(torch.equal(a, b) for a, b in pairs))
        except Exception as error:  # what the compiler may raise is its own affair; the user wants to read it
            yield _raised(backend, op, "torch.compile", error)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _raised(backend: str, op: str, what: str, error: Exception) -> Check:
    detail = " ".join(f"{type(error).__name__}: {error}".split())  # one line of a table
    return Check(backend, op, what, False, detail=detail[:200])


class _Load(NamedTuple):
    """A call to time, with the work that it has to do."""

    what: str
    call: Callable[[], object]
    bytes: int
    flops: float


def _loads(backend: str, device: str) -> Iterator[_Load]:
    """Operands are larger than the caches: 256 MiB of weights on a CPU, 1 GiB on a GPU."""
    count, d, rank, modules, tokens = (16, 2048, 16, 128, 4096) if device == "cpu" else (16, 4096, 16, 128, 32768)
    layers: list[_Layer] = []
    for _ in range(count):
        base = torch.randn(d, d, device=device) * 0.02
        aligned = (base + torch.randn(d, d, device=device) * 0.002).bfloat16()
        factors = torch.randn(d, rank, device=device), torch.randn(rank, d, device=device)
        layers.append(_Layer(aligned, base.bfloat16(), *factors))
    weights = [w for layer in layers for w in layer[:2]]
    size = sum(w.nbytes for w in weights)
    yield _Load(_MOVING, lambda: [w.view(torch.int64).sum() for w in weights], size, 0.0)
    flops = 4.0 * count * d * d * rank
    yield _Load(f"project_layers, {count} × {d}×{d} bf16, r={rank}", lambda: _project(layers, backend), size, flops)
    xs = [torch.randn(4096, 16, device=device) for _ in range(modules)]
    bases = [torch.linalg.qr(torch.randn(4096, 32, device=device))[0].contiguous() for _ in xs]
    yield _Load(
        f"project_out_layers_, {modules} × 4096×16, k=32",
        lambda: functional.project_out_layers_(xs, bases, backend=backend),
        sum(2 * x.nbytes + u.nbytes for x, u in zip(xs, bases, strict=True)),
        4.0 * modules * 4096 * 16 * 32,
    )
    x, base_output = (torch.randn(tokens, 2048, device=device) for _ in range(2))
    lora_A, lora_B = torch.randn(rank, 2048, device=device), torch.randn(2048, rank, device=device)
    basis = torch.linalg.qr(torch.randn(2048, 32, device=device))[0].contiguous()
    yield _Load(
        f"salora_linear, forward, {tokens} tokens, 2048², r={rank}, fp32",
        lambda: functional.salora_linear(x, base_output, lora_A, lora_B, basis, 1.0, backend=backend),
        3 * x.nbytes,
        4.0 * tokens * 2048 * rank,
    )
    z = torch.randn(2048, rank, device=device)
    yield _Load(
        f"gram_apply, {tokens}×2048 fp32, r={rank}",
        lambda: functional.gram_apply(x, z, backend=backend),
        x.nbytes + 2 * z.nbytes,
        4.0 * tokens * 2048 * rank,
    )


def _speeds(backend: str, device: str) -> Iterator[Speed]:
    """All calls take turns with moving the operands of the projection, and with a square product in fp32."""
    loads = list(_loads(backend, device))
    matmul, matmul_flops = matmul_probe(torch.float32, device)
    loads.append(_Load(_MATMUL, matmul, 0, matmul_flops))
    seconds = {
        what: median(samples)
        for what, samples in interleaved({load.what: load.call for load in loads}, device, 1.0, least=5).items()
    }
    bandwidth = next(load.bytes / seconds[load.what] for load in loads if load.what == _MOVING)
    peak = matmul_flops / seconds[_MATMUL]
    for load in loads:
        taken = seconds[load.what]
        rate, flops = load.bytes / taken, load.flops / taken
        yield Speed(backend, load.what, taken, rate / 1e9, rate / bandwidth, flops / 1e9, flops / peak)


def _examined(backend: str, device: str) -> Iterator[Check]:
    """Every check of one backend; a check that raises has failed, and the others go on."""
    for dtype in _DTYPES:
        given, kind = _Inputs(device, dtype), str(dtype).removeprefix("torch.")
        for op, check in (
            ("project_layers", _projection),
            ("project_out_layers", _complement),
            ("salora_linear", _salora),
            ("gram_apply_layers", _gram),
        ):
            try:
                yield from check(backend, given, kind)
            except Exception as error:
                yield _raised(backend, op, kind, error)
    for op, what, look in (
        ("select_layers", "both rules, NaN and ties", _selection),
        ("all", "same bits twice", _deterministic),
        ("all", "torch.compile", _compiles),
    ):
        try:
            yield from look(backend, device)
        except Exception as error:
            yield _raised(backend, op, what, error)


def examine(*, speed: bool = True) -> Examination:
    """Runs every check on every available backend, and the measurements unless ``speed`` is False."""
    checks: list[Check] = []
    speeds: list[Speed] = []
    for backend, device in _available():
        found = list(_examined(backend, device))
        checks.extend(found)
        # No speed of what is wrong; the reference is there to be right.
        if speed and not (backend == "reference" and device == "cpu") and all(check.passed for check in found):
            speeds.extend(_speeds(backend, device))
    statuses = {name: status._asdict() for name, status in backends().items()}
    return Examination(environment(), libraries(), statuses, checks, speeds)


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
