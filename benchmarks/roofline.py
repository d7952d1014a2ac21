"""Predicted times of the GPU kernels, from bytes and operations counted in their code, and measured ones beside them.

    python benchmarks/roofline.py --write    # measures on this machine's GPU, and puts the table into docs/roofline.md
    python benchmarks/roofline.py --predict  # the predictions alone, as docs/roofline.md has them

A time is the largest of the bytes that memory moves, the bytes that L2 moves and the operations, each over what of the
maker's figure is taken to be within reach. The tests hold the counts to those that the CUDA code plans with.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import safelora_kernels as sk

PAGE = Path(__file__).resolve().parent.parent / "docs" / "roofline.md"
MEASURED = ("<!-- measured -->", "<!-- end of measured -->")
ARITHMETIC = 0.5  # of the maker's figure


@dataclass(frozen=True)
class Chip:
    """Makers' figures in TB/s and dense TFLOP/s, the part of the bandwidth within reach, an assumed L2 bandwidth."""

    name: str
    kernel: str  # that the projection takes: "ticket", "cluster" or "triton"
    memory: float
    within_reach: float
    l2: float
    bf16: float
    tf32: float
    fp64: float


CHIPS = (
    Chip("A100", "ticket", 2.04, 0.85, 4.5, 312, 156, 9.7),
    Chip("H100", "cluster", 3.35, 0.85, 5.5, 989, 494, 34),
    Chip("H200", "cluster", 4.8, 0.85, 5.5, 989, 494, 34),
    Chip("MI300X", "triton", 5.3, 0.75, 10, 1307, 653, 81.7),
)


class Cost(NamedTuple):
    """Bytes every operand and result has, bytes that memory and L2 move, operations by the unit that does them."""

    compulsory: int
    memory: int
    l2: int = 0
    bf16: int = 0
    tf32: int = 0
    fp64: int = 0

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> Cost:
        return Cost(*(count * value for value in self))

    def seconds(self, chip: Chip) -> tuple[float, str]:
        """The predicted time, and what bounds it."""
        limits = {
            "memory": self.memory / (chip.memory * chip.within_reach),
            "L2": self.l2 / chip.l2,
            "tensor cores": (self.bf16 / chip.bf16 + self.tf32 / chip.tf32) / ARITHMETIC,
            "fp64": self.fp64 / chip.fp64 / ARITHMETIC,
        }
        bound = max(limits, key=lambda name: limits[name])
        return limits[bound] * 1e-12, bound


def up(value: int, unit: int = 64) -> int:
    return -(-value // unit) * unit


def panels(rank: int, narrowest: int) -> list[int]:
    """The panels of columns that an adapter of this rank is cut into."""
    widths = [64] * (rank // 64)
    if rest := rank % 64:
        widths.append(next(width for width in (narrowest, 16, 32, 64) if rest <= width))
    return widths


def projection(d_out: int, d_in: int, rank: int, kernel: str) -> Cost:
    """One pair of bf16 weights with an fp32 adapter."""
    weights, factors = 4 * d_out * d_in, 8 * d_out * rank
    cost = Cost(weights + factors, factors)
    rows, columns = up(d_out), up(d_in)
    for panel in panels(rank, 8 if kernel == "triton" else 16):
        packed, y, sums = 4 * rows * panel, 4 * columns * panel, 4 * rows * panel
        tensor = 12 * rows * columns * panel
        unit = min(max((8 << 20) // (4 * rows) // 64 * 64, 64), 256)
        if kernel == "triton":
            chunks, strips = -(-d_out // 512), -(-d_in // min(max((8 << 20) // (256 * d_out), 1) * 64, 2048))
            # The factor once more, and the sums twice, for the cosine and the result.
            moved = weights + 2 * packed + 3 * sums + 4 * d_out * rank
            through_l2 = 2 * weights + columns // 64 * packed + rows // 64 * y + 2 * chunks * y + 2 * strips * sums
        elif kernel == "cluster" and d_out <= 4096:
            slots = max(1, (d_in + 32 * panel) // (64 * panel))
            moved = weights + 2 * packed + 2 * slots * sums
            through_l2 = moved + (-(-panel // 32) - 1) * weights
        else:
            chunk = min(max(up(-(-d_out // 32)), 256), 1024)
            slots = min(max(1, -(-32 // (rows // 64))), -(-d_in // unit), 16)
            moved = weights + 2 * packed + 2 * slots * sums
            through_l2 = 2 * weights + columns // 64 * packed + rows // 64 * y + y
            through_l2 += 2 * -(-d_out // chunk) * y + 2 * -(-d_in // unit) * sums
        cost += Cost(0, moved, through_l2, bf16=tensor)
    return cost


def project_out(d: int, m: int, k: int) -> Cost:
    """One fp32 pair, in place, of up to 16384 rows: three tf32 products for each of the two."""
    x, basis = 4 * d * m, 4 * d * k
    units = -(-m // 16) if m <= 32 else -(-m // 32)
    width, tasks = 16 if m <= 32 else 32, units * -(-d // 256)
    block = 4 * up(k, 32) * width
    size = 2 * x + basis
    through_l2 = 3 * x + 2 * units * basis + (3 * tasks + units) * block
    return Cost(size, size, through_l2, tf32=12 * up(d, 128) * up(k, 32) * units * width)


def salora(tokens: int, d: int, rank: int, k: int) -> tuple[Cost, Cost]:
    """Forward and backward of a d×d layer: bf16 activations, fp32 factors of a rank up to 16."""
    activations, factor, kept, basis = 2 * tokens * d, 4 * d * rank, 4 * tokens * rank, 4 * d * k
    complement = project_out(d, rank, k)
    # A group of 256 tokens and a range of 256 columns leave partial sums of 16 columns behind.
    groups, ranges = -(-tokens // 256), -(-d // 256)
    row_sums, column_sums = 2 * ranges * groups * 256 * 64, 2 * groups * ranges * 256 * 64
    expand = up(d) // 64 * kept + up(tokens) // 64 * factor + activations
    products, wide = 2 * up(tokens) * up(d) * 16, 2 * up(tokens) * up(d) * 32
    # h, t and the gradient of B̃ are written, and read again.
    forward = Cost(
        3 * activations + 3 * factor + kept + basis,
        3 * activations + 4 * factor + 2 * kept + basis,
        2 * activations + groups * factor + kept + row_sums + expand + complement.l2,
        tf32=2 * products + 3 * wide + complement.tf32,
    )
    backward = Cost(
        3 * activations + 5 * factor + kept + basis,
        3 * activations + 6 * factor + 4 * kept + basis,
        2 * activations
        + (groups + 2) * factor
        + (2 * ranges + 1) * kept
        + row_sums
        + 2 * column_sums
        + expand
        + complement.l2,
        tf32=(4 + 2) * products + 3 * wide + complement.tf32,
    )
    return forward, backward


def update_cosine(d: int, rank: int) -> Cost:
    size = 12 * d * rank + 8
    return Cost(size, size, fp64=8 * up(rank, 16) ** 2 * d)


# ---- what is predicted and measured


class Case(NamedTuple):
    title: str
    cost: Callable[[str], Cost]  # for the kernel that the projection takes
    call: Callable[[str], Callable[[], object]]  # on a device


LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def projection_case(title: str, shapes: Sequence[tuple[int, int]], rank: int) -> Case:
    def cost(kernel: str) -> Cost:
        return sum((projection(*shape, rank, kernel) for shape in shapes), Cost(0, 0))

    def call(device: str) -> Callable[[], object]:
        layers = []
        for d_out, d_in in shapes:
            base = 0.02 * torch.randn(d_out, d_in, device=device)
            aligned = base + 0.002 * torch.randn(d_out, d_in, device=device)
            lora_B, lora_A = torch.randn(d_out, rank, device=device), torch.randn(rank, d_in, device=device)
            layers.append(sk.LayerFactors(aligned.bfloat16(), base.bfloat16(), lora_B, lora_A))
        return lambda: sk.project_layers(layers)

    return Case(title, cost, call)


def project_out_case(count: int, d: int, m: int, k: int) -> Case:
    def call(device: str) -> Callable[[], object]:
        xs = [torch.randn(d, m, device=device) for _ in range(count)]
        bases = [torch.linalg.qr(torch.randn(d, k, device=device))[0].contiguous() for _ in range(count)]
        return lambda: sk.project_out_layers_(xs, bases)

    title = f"`project_out_layers_`, {count} × ({d}×{m}), k = {k}, fp32"
    return Case(title, lambda kernel: project_out(d, m, k).times(count), call)


def salora_case(tokens: int, d: int, rank: int, k: int, backward: bool) -> Case:
    def call(device: str) -> Callable[[], object]:
        x, base_output, dy = (torch.randn(tokens, d, device=device).bfloat16() for _ in range(3))
        lora_A, lora_B = torch.randn(rank, d, device=device) / d**0.5, torch.randn(d, rank, device=device)
        basis = torch.linalg.qr(torch.randn(d, k, device=device))[0].contiguous()
        if not backward:
            return lambda: sk.salora_linear(x, base_output, lora_A, lora_B, basis, 1.0)
        leaves = [tensor.requires_grad_() for tensor in (x, lora_A, lora_B)]
        y = sk.salora_linear(leaves[0], base_output, leaves[1], leaves[2], basis, 1.0)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    name = "its backward" if backward else f"`salora_linear`, {tokens} tokens, {d}×{d}, r = {rank}, bf16"
    return Case(name, lambda kernel: salora(tokens, d, rank, k)[backward], call)


def cosine_case(count: int, d: int, rank: int) -> Case:
    def call(device: str) -> Callable[[], object]:
        new, old = ([torch.randn(d, rank, device=device) for _ in range(count)] for _ in range(2))
        lora_A = [torch.randn(rank, d, device=device) for _ in range(count)]
        return lambda: sk.update_cosine(new, old, lora_A)

    title = f"`update_cosine`, {count} × r = {rank}, d = {d}, fp32"
    return Case(title, lambda kernel: update_cosine(d, rank).times(count), call)


CASES = (
    projection_case("`project_layers`, 7B q and v, r = 8", [(4096, 4096)] * 64, 8),
    projection_case("`project_layers`, 7B q and v, r = 16", [(4096, 4096)] * 64, 16),
    projection_case("`project_layers`, 7B q and v, r = 64", [(4096, 4096)] * 64, 64),
    projection_case("`project_layers`, 7B all linears, r = 16", LLAMA_7B * 32, 16),
    projection_case("`project_layers`, 7B all linears, r = 64", LLAMA_7B * 32, 64),
    project_out_case(224, 4096, 16, 32),
    salora_case(4096, 4096, 16, 32, backward=False),
    salora_case(4096, 4096, 16, 32, backward=True),
    cosine_case(224, 4096, 16),
)


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def predictions() -> str:
    """The table of docs/roofline.md."""
    lines = ["| call | compulsory | " + " | ".join(chip.name for chip in CHIPS) + " |", "|---" * (len(CHIPS) + 2) + "|"]
    for case in CASES:
        cells = []
        for chip in CHIPS:
            cost = case.cost(chip.kernel)
            seconds, bound = cost.seconds(chip)
            cells.append(f"{duration(seconds)}, {bound}, × {cost.memory / cost.compulsory:.3f}")
        lines.append(f"| {case.title} | {case.cost('ticket').compulsory / 1e9:.3g} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- measuring


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Between two events on the stream, with nothing of the call in L2."""
    torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device).zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(2_000_000)  # so that the host gets ahead
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def median(call: Callable[[], object], device: str, rounds: int, timed: Callable[..., float] = seconds_of) -> float:
    call()
    return statistics.median(timed(call, device) for _ in range(rounds))


def copy_bandwidth(device: str, rounds: int, timed: Callable[..., float] = seconds_of, size: int = 1 << 30) -> float:
    """TB/s read and written by a copy."""
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median(lambda: target.copy_(source), device, rounds, timed) * 1e-12


def chip_of(device_name: str) -> Chip | None:
    return next((chip for chip in CHIPS if chip.name in device_name.upper()), None)


def measurements(
    cases: Sequence[Case], device: str, device_name: str, rounds: int, timed: Callable[..., float] = seconds_of
) -> str:
    """Predicted beside measured, for the chip that the device's name names."""
    chip = chip_of(device_name)
    bandwidth = copy_bandwidth(device, rounds, timed, 1 << (30 if timed is seconds_of else 20))
    backends = {sk.explain("project_layers", torch.empty(2, 2, device=device)).backend}
    lines = [
        f"{device_name}, torch {torch.__version__}, backend {', '.join(map(str, backends))}; a copy moves "
        f"{bandwidth:.2f} TB/s. Medians of {rounds}, L2 cold.",
        "",
        "| call | predicted | measured | measured / predicted | of the copy's bandwidth |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        cost = case.cost(chip.kernel if chip else "ticket")
        predicted = cost.seconds(chip)[0] if chip else math.nan
        found = median(case.call(device), device, rounds, timed)
        share = cost.memory / found * 1e-12 / bandwidth
        ahead = duration(predicted) if chip else "no prediction for this chip"
        ratio = f"{found / predicted:.2f}" if chip else ""
        lines.append(f"| {case.title} | {ahead} | {duration(found)} | {ratio} | {share:.0%} |")
    return "\n".join(lines)


def written(page: str, table: str) -> str:
    """The page with the table in its place."""
    begin, end = MEASURED
    if not re.search(f"{begin}.*{end}", page, re.DOTALL):
        raise SystemExit(f"roofline: {PAGE} has no section from {begin} to {end}")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table}\n{end}", page, count=1, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true", help="print the predictions and stop")
    parser.add_argument("--write", action="store_true", help=f"put the measurements into {PAGE.name}")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    if options.predict:
        print(predictions())
        return 0
    if not torch.cuda.is_available():
        print(
            "roofline: no GPU that this torch can use, so there is nothing to measure. Run this on a machine with one "
            "and a torch built for CUDA or ROCm, or print the predictions with --predict",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    table = measurements(CASES, "cuda", torch.cuda.get_device_name(), options.rounds)
    print(table)
    if options.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
