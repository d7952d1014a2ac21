"""Speed of the kernels beside the published formulation, stock torch and the memory of this machine, CPU or GPU.

Every row is checked against fp64 before it is timed; where the check fails nothing is timed. The variants of a section
take turns in one process, and the medians of their times are compared as ratios. The limit is the time in which the
same threads, or the GPU, read (and write) the operands once. On a GPU, times are those of events around the call on the
device, with the L2 cache overwritten before each.
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


def timed_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed_on_gpu(call: Callable[[], object]) -> float:
    """Seconds between two events on the stream; what an earlier call left in L2 is gone."""
    torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8).zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The device stays busy while the host gets ahead, so that launch latency is not measured.
    torch.cuda._sleep(2_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant, one call of each per round, after one round to warm up."""
    timed = timed_on_gpu if torch.get_default_device().type == "cuda" else timed_on_cpu
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            value = timed(call)
            if turn > 0:
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def device_name(device: str, threads: int) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {threads} threads"


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def read_all(tensors: Sequence[Tensor]) -> Tensor:
    """Touches every byte once: 8-byte words summed, which is memory-bound."""
    return torch.stack([t.view(torch.int64).sum() for t in tensors])


def projection_layers(count: int, d: int, rank: int) -> list[sk.LayerFactors]:
    layers = []
    for _ in range(count):
        base = torch.randn(d, d) * 0.02
        aligned = base + torch.randn(d, d) * 0.002
        lora_B, lora_A = torch.randn(d, rank), torch.randn(rank, d)
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
        chains = {"best torch chain": baselines.torch_project, "published formulation": baselines.authors_project}
        if layers[0].aligned.is_cuda:
            chains["torch.compile of the chain"] = torch.compile(baselines.torch_project)
        for name, call in chains.items():
            few = 1 if call is baselines.authors_project else 4
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


def print_ratios(console: Console, title: str, seconds: dict[str, float], error: float) -> None:
    """One line per variant; the first is the memory limit."""
    table = Table(title=title, title_justify="left")
    for column in ("variant", "ms", "× operands", "speed-up of ours"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    limit, ours = next(iter(seconds.values())), seconds["safelora_kernels"]
    for name, value in seconds.items():
        table.add_row(name, f"{value * 1e3:.2f}", f"{value / limit:.2f}", f"{value / ours:.2f}")
    console.print(table)
    console.print(f"relative error of ours against fp64: {error:.1e}\n")


def bench_project_out(console: Console, rounds: int) -> None:
    count, d, n, k = 224, 4096, 16, 32
    xs = [torch.randn(d, n) for _ in range(count)]
    bases = [torch.linalg.qr(torch.randn(d, k))[0].contiguous() for _ in range(count)]
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
    title = f"project_out_layers_: {count} × ({d}×{n}), basis rank {k}, fp32"
    print_ratios(console, title, interleaved(variants, rounds), error)


def bench_salora(console: Console, tokens: int, rounds: int) -> None:
    """Forward and backward of one 4096×4096 layer on bf16 activations."""
    d, r, k, scaling = 4096, 16, 32, 2.0
    x, base_output, dy = (torch.randn(tokens, d).bfloat16() for _ in range(3))
    lora_A, lora_B = torch.randn(r, d) / d**0.5, torch.randn(d, r)
    basis = torch.linalg.qr(torch.randn(d, k))[0].contiguous()
    narrow_A, narrow_B, narrow_basis = (t.bfloat16() for t in (lora_A, lora_B, basis))
    dense = (torch.eye(d) - basis @ basis.T).bfloat16()

    def step(form: Callable[..., Tensor], lora_A: Tensor, lora_B: Tensor, operand: Tensor) -> Tensor:
        leaves = [t.detach().requires_grad_() for t in (x, lora_A, lora_B)]
        y = form(leaves[0], base_output, leaves[1], leaves[2], operand, scaling)
        torch.autograd.grad(y, leaves, dy)
        return y.detach()

    ours = partial(step, sk.salora_linear, lora_A, lora_B, basis)
    wide = [t.double() for t in (x, base_output, lora_A, lora_B, basis)]
    error = relative_error(ours(), baselines.torch_salora(*wide, scaling))
    if error > 2.0**-8:
        raise SystemExit(f"salora_linear: relative error {error:.1e} against fp64 is over 2⁻⁸; nothing is timed")
    variants: dict[str, Callable[[], object]] = {
        "read and write operands": lambda: (x.clone(), base_output.clone(), read_all([x, dy])),
        "safelora_kernels": ours,
        "best torch form, bf16": partial(step, baselines.torch_salora, narrow_A, narrow_B, narrow_basis),
        "published form, dense C, bf16": partial(step, baselines.dense_salora, narrow_A, narrow_B, dense),
    }
    title = f"salora_linear, forward and backward: {tokens} tokens, {d}×{d}, rank {r}, basis rank {k}"
    print_ratios(console, title, interleaved(variants, rounds), error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads for every variant")
    parser.add_argument("--layers", type=int, default=16, help="layers of 4096×4096, 64 MiB of bf16 weights each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-baselines", action="store_true", help="leave out the slow baselines of the projection")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    torch.manual_seed(0)
    console = Console(width=110)
    layers = projection_layers(args.layers, 4096, 16)
    console.print(
        f"{device_name(args.device, args.threads)}, torch {torch.__version__}, "
        f"{sk.explain('project_layers', *layers[0])}\n",
        highlight=False,
    )
    base_rank = bench_projection(console, layers, 16, args.rounds, not args.no_baselines)
    wide = [layer._replace(lora_B=torch.randn(4096, 64), lora_A=torch.randn(64, 4096)) for layer in layers]
    wide_rank = bench_projection(console, wide, 64, args.rounds, baseline=False)
    console.print(f"rank 64 takes {wide_rank / base_rank:.2f} × the time of rank 16\n")
    del layers, wide
    bench_project_out(console, 3 * args.rounds)
    bench_salora(console, 2048 if args.device == "cpu" else 8192, args.rounds)


if __name__ == "__main__":
    main()
