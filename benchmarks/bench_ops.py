"""Speed of the CPU kernels beside the published formulation, stock torch and the memory of this machine.

Every row is checked against fp64 before it is timed; where the check fails nothing is timed. The variants of a section
take turns in one process, and the medians of their times are compared as ratios. The limit is the time in which the
same threads read (and write) the operands once.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import safelora_kernels as sk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.ops import baselines

MIB = 1 << 20


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant, one call of each per round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def read_all(tensors: Sequence[Tensor]) -> Tensor:
    """Touches every byte once on torch's threads: 8-byte words summed, which is memory-bound."""
    return torch.stack([t.view(torch.int64).sum() for t in tensors])


def projection_layers(count: int, d: int, rank: int, seed: int) -> list[sk.LayerFactors]:
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(count):
        base = torch.randn(d, d, generator=generator) * 0.02
        aligned = base + torch.randn(d, d, generator=generator) * 0.002
        lora_B, lora_A = torch.randn(d, rank, generator=generator), torch.randn(rank, d, generator=generator)
        layers.append(sk.LayerFactors(aligned.bfloat16(), base.bfloat16(), lora_B, lora_A))
    return layers


def projection_error(layer: sk.LayerFactors, projected: Tensor) -> float:
    v = layer.aligned.double() - layer.base.double()
    return relative_error(projected, v @ (v.T @ layer.lora_B.double()) / v.norm())


def each_alone(project: Callable[..., object], layers: Sequence[sk.LayerFactors]) -> None:
    for layer in layers:
        project(*layer)


def bench_projection(console: Console, layers: list[sk.LayerFactors], rank: int, rounds: int, baseline: bool) -> float:
    d, count = layers[0].aligned.shape[0], len(layers)
    weights = [w for layer in layers for w in (layer.aligned, layer.base)]
    gigabytes = sum(w.numel() * w.element_size() for w in weights) / 1e9
    error = projection_error(layers[-1], sk.project_layers(layers[-1:])[0].lora_B)
    if error > 1e-5:
        raise SystemExit(f"projection: relative error {error:.1e} against fp64 is over 1e-5; nothing is timed")
    ours_call = partial(sk.project_layers, layers)
    seconds = interleaved({"read both weights": partial(read_all, weights), "safelora_kernels": ours_call}, rounds)
    per_layer = {name: value / count for name, value in seconds.items()}
    if baseline:  # a few layers are enough: the baselines take each layer alone, and are slow
        for name, call, few in (
            ("best torch chain", baselines.torch_project, 4),
            ("published formulation", baselines.authors_project, 1),
        ):
            few_seconds = interleaved({"ours": ours_call, name: partial(each_alone, call, layers[:few])}, 3)
            per_layer[name] = few_seconds[name] / few
    table = Table(title=f"Projection: {count} layers of {d}×{d} bf16, rank {rank}, fp32 factors", title_justify="left")
    for column in ("variant", "ms per layer", "GB/s of weights", "× reading", "speed-up of ours"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    ours, limit = per_layer["safelora_kernels"], per_layer["read both weights"]
    for name, value in per_layer.items():
        bandwidth = gigabytes / count / value
        table.add_row(name, f"{value * 1e3:.2f}", f"{bandwidth:.1f}", f"{value / limit:.2f}", f"{value / ours:.1f}")
    console.print(table)
    console.print(f"relative error of ours against fp64: {error:.1e}\n")
    return ours


def bench_project_out(console: Console, rounds: int) -> None:
    count, d, n, k = 224, 4096, 16, 32
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(d, n, generator=generator) for _ in range(count)]
    bases = [torch.linalg.qr(torch.randn(d, k, generator=generator))[0].contiguous() for _ in range(count)]
    stacked_x, stacked_basis = torch.stack(xs), torch.stack(bases)
    truth = xs[0].double() - bases[0].double() @ (bases[0].double().T @ xs[0].double())
    error = relative_error(sk.project_out(xs[0], bases[0]), truth)
    if error > 1e-6:
        raise SystemExit(f"project_out: relative error {error:.1e} against fp64 is over 1e-6; nothing is timed")
    variants: dict[str, Callable[[], object]] = {
        "read and write operands": lambda: (read_all(bases), [x.neg_() for x in xs]),
        "safelora_kernels": lambda: sk.project_out_layers_(xs, bases),
        "torch loop": lambda: baselines.loop_project_out_(xs, bases),
        "torch addmm_": lambda: baselines.addmm_project_out_(xs, bases),
        "torch baddbmm_ (stacked)": lambda: baselines.baddbmm_project_out_(stacked_x, stacked_basis),
    }
    seconds = interleaved(variants, rounds)
    table = Table(title=f"project_out_layers_: {count} × ({d}×{n}), basis rank {k}, fp32", title_justify="left")
    for column in ("variant", "ms", "× operands", "speed-up of ours"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    limit, ours = seconds["read and write operands"], seconds["safelora_kernels"]
    for name, value in seconds.items():
        table.add_row(name, f"{value * 1e3:.2f}", f"{value / limit:.2f}", f"{value / ours:.2f}")
    console.print(table)
    console.print(f"relative error of ours against fp64: {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads for every variant")
    parser.add_argument("--layers", type=int, default=16, help="layers of 4096×4096, 64 MiB of bf16 weights each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-baselines", action="store_true", help="leave out the slow baselines of the projection")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=110)
    console.print(
        f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}, "
        f"{sk.explain('project_layers')}\n",
        highlight=False,
    )
    layers = projection_layers(args.layers, 4096, 16, seed=0)
    base_rank = bench_projection(console, layers, 16, args.rounds, not args.no_baselines)
    generator = torch.Generator().manual_seed(1)
    wide = [
        layer._replace(
            lora_B=torch.randn(4096, 64, generator=generator), lora_A=torch.randn(64, 4096, generator=generator)
        )
        for layer in layers
    ]
    wide_rank = bench_projection(console, wide, 64, args.rounds, baseline=False)
    console.print(f"rank 64 takes {wide_rank / base_rank:.2f} × the time of rank 16\n")
    del layers, wide
    bench_project_out(console, 3 * args.rounds)


if __name__ == "__main__":
    main()
