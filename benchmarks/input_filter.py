"""The input filter's solvers on one layer: conjugate gradients on the tokens against the dense Cholesky.

    python benchmarks/input_filter.py --dim 2048 8192 --tokens 8192 --rank 16

Inputs are synthetic: a common mean and a spectrum that falls like 1/i, as activations have, in bf16. Each solver runs
in a process of its own, so that its peak memory is its own; the bandwidth is that of reading the tokens, measured in
the same process between the solves. Processor time is given beside wall time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import safelora_kernels as sk
from safelora.filter.solve import Gram, Problem, Rows, solve


def inputs(tokens: int, dim: int, seed: int) -> torch.Tensor:
    """Tokens of one side. The two sides share their mean in part, and have their main directions in another order."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1).float().reciprocal()
    scale = scale[torch.randperm(dim, generator=draw)] if seed else scale
    mean = torch.ones(dim) + 0.3 * torch.randn(dim, generator=draw)
    return torch.cat(
        [(torch.randn(rows, dim, generator=draw) * scale * dim**0.5 + mean).bfloat16() for rows in _split(tokens)]
    )


def _split(tokens: int) -> list[int]:
    return [min(1024, tokens - start) for start in range(0, tokens, 1024)]


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def one(solver: str, dim: int, tokens: int, rank: int, repeats: int) -> dict[str, float]:
    """Figures of one solver in this process."""
    half = tokens // 2
    weights = torch.full((half,), 1 / half)
    task, safety = (Rows(inputs(half, dim, seed), weights) for seed in (0, 1))
    lora_A = torch.randn(rank, dim, generator=torch.Generator().manual_seed(2)) * dim**-0.5
    nbytes = 2 * task.x.numel() * task.x.element_size()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    walls, processors, reads = [], [], []
    found = None
    for _ in range(repeats):
        reads.append(timed(lambda: [side.x.view(torch.int16).max() for side in (task, safety)])[1])

        def run() -> None:
            nonlocal found
            sides = (task, safety)
            moments = sides if solver != "cholesky" else [Gram(sk.gram(side.x, side.weights)) for side in sides]
            found = solve(Problem(*moments, 100.0, 0.1, 1e-4, "keep"), lora_A, solver)  # type: ignore[arg-type]

        wall, processor = timed(run)
        walls.append(wall)
        processors.append(processor)
    return {
        "wall_s": statistics.median(walls),
        "processor_s": statistics.median(processors),
        "read_s": statistics.median(reads),
        "read_GB_s": nbytes / statistics.median(reads) / 1e9,
        "iterations": found.iterations,
        "residual": found.residual,
        "peak_MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "tokens_MiB": nbytes / 2**20,
        "norm": float(found.lora_A.norm()),
        "kept": float(found.lora_A.norm() / lora_A.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--solver", choices=("cholesky", "dual", "cg"), nargs="+", default=["cg", "cholesky"])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        (dim,), (solver,) = arguments.dim, arguments.solver
        print(json.dumps(one(solver, dim, arguments.tokens, arguments.rank, arguments.repeats)))
        return
    for dim in arguments.dim:
        norms = {}
        for solver in arguments.solver:
            command = [sys.executable, __file__, "--child", "--dim", str(dim), "--solver", solver]
            for name in ("tokens", "rank", "repeats", "threads"):
                command += [f"--{name}", str(getattr(arguments, name))]
            row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            norms[solver] = row.pop("norm")
            print(f"d={dim} {solver:9}", "  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
        spread = max(norms.values()) / min(norms.values()) - 1
        if spread > 1e-3:
            raise SystemExit(f"the solvers disagree: norms {norms}")


if __name__ == "__main__":
    main()
