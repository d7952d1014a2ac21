"""`project_adapter` over two ranks of one thread each against one.

A pair of checkpoints (bf16, sharded, in the page cache) and an adapter are generated in a temporary directory and
projected by one process and by two, interleaved; the outputs have to be equal byte by byte. Times are those of the
call, without starting Python. The critical path is that of the slowest rank. What two processors of the machine can
give at all is measured by two processes that each project one half of the adapter and know nothing of each other.
Beside the wall clock stands processor time, which other work on the machine disturbs less: that of the slowest rank,
and of both together, which says what the sharing costs. benchmarks/scaling.py does the same on paper for many nodes.

    python benchmarks/bench_distributed.py [--runs 5] [--layers 6] [--dir DIR]
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

D, KV, FFN, RANK = 2048, 512, 5632, 16


def linear_shapes(d: int, kv: int, ffn: int) -> dict[str, tuple[int, int]]:
    """The linear modules of one Llama layer, (d_out, d_in)."""
    return {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (ffn, d), "mlp.up_proj": (ffn, d), "mlp.down_proj": (d, ffn),
    }  # fmt: skip


def generate(root: Path, layers: int) -> None:
    """Write base, aligned (two shards each) and an adapter on every linear module."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    factors = {}
    names: dict[str, str] = {}
    for place in ("base", "aligned"):
        (root / place).mkdir()
        (root / place / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for shard in range(2):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        base, aligned = {}, {}
        for layer in range(shard, layers, 2):
            for module, (rows, columns) in linear_shapes(D, KV, FFN).items():
                name = f"model.layers.{layer}.{module}"
                weight = torch.randn(rows, columns, generator=draw).mul_(0.02).bfloat16()
                delta = torch.randn(rows, columns, generator=draw).mul_(1e-3)
                base[f"{name}.weight"], aligned[f"{name}.weight"] = weight, (weight.float() + delta).bfloat16()
                factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw)
                factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw)
        names.update(dict.fromkeys(base, file))
        save_file(base, root / "base" / file)
        save_file(aligned, root / "aligned" / file)
    for place in ("base", "aligned"):
        (root / place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = {"peft_type": "LORA", "r": RANK, "base_model_name_or_path": str(root / "aligned")}
    halves = {"adapter": factors, "half0": {}, "half1": {}}
    for name, factor in factors.items():
        halves[f"half{int(name.split('.')[4]) % 2}"][name] = factor
    for place, part in halves.items():
        (root / place).mkdir()
        save_file(part, root / place / "adapter_model.safetensors")
        (root / place / "adapter_config.json").write_text(json.dumps(config))


def rank_times(root: Path, runs: int, rank: int, port: int, results: Any) -> None:
    """One of two processes, of one thread; puts {what: [(wall, processor) seconds of each call]}.

    What: "alone" (rank 0 does everything, rank 1 nothing), "ranks", and "halves" (no exchange between the two).
    """
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank), OMP_NUM_THREADS="1"
    )
    import torch

    from safelora.distributed import launched
    from safelora.project import project_adapter

    torch.set_num_threads(1)
    times: dict[str, list[tuple[float, float]]] = {"alone": [], "ranks": [], "halves": []}
    with launched() as ranks:
        for _ in range(runs + 1):
            for name, entries in times.items():
                half = name == "halves"
                adapter, out = (f"half{rank}", f"out-half{rank}") if half else ("adapter", f"out-{name}")
                ranks.gather(None)
                wall, processor = time.perf_counter(), time.process_time()
                if name != "alone" or rank == 0:
                    project_adapter(
                        root / adapter, root / "base", out=root / out, threshold=1, overwrite=True,
                        ranks=ranks if name == "ranks" else None,
                    )  # fmt: skip
                entries.append((time.perf_counter() - wall, time.process_time() - processor))
        ranks.gather(None)
    results.put({name: entries[1:] for name, entries in times.items()})  # the first call imports what comes late


def project(root: Path, runs: int) -> dict[str, list[tuple[float, float, float]]]:
    """Wall seconds of the slower of the two processes, its processor seconds, and those of both, for each run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=rank_times, args=(root, runs, rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a rank exited with {process.exitcode}")
    both = [results.get() for _ in ranks]
    return {
        name: [
            (max(a[0], b[0]), max(a[1], b[1]), a[1] + b[1]) for a, b in zip(both[0][name], both[1][name], strict=True)
        ]
        for name in both[0]
    }


def measure(place: Path | None, layers: int, runs: int) -> None:
    """Time one rank against two, and print."""
    total = 2 * 2 * layers * sum(rows * columns for rows, columns in linear_shapes(D, KV, FFN).values())
    free = shutil.disk_usage(place or tempfile.gettempdir()).free
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if min(free, memory) < 2 * total:
        print(f"measurement skipped: {2 * total / 1e9:.1f} GB of disk and memory are needed")
        return
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        root = Path(temporary)
        generate(root, layers)
        times = project(root, runs)
        file = "adapter_model.safetensors"
        if not filecmp.cmp(root / "out-alone" / file, root / "out-ranks" / file, shallow=False):
            raise RuntimeError("two ranks and one wrote different adapters")
    print(
        f"{total / 1e9:.2f} GB of bf16 weights, {7 * layers} modules, r = {RANK}, {runs} runs, {os.cpu_count()} CPUs, "
        f"load average {os.getloadavg()[0]:.1f}; outputs equal byte by byte"
    )
    for column, what in enumerate(("wall clock", "processor time of the slowest", "processor time of both")):
        one, two, halves = (statistics.median(entry[column] for entry in entries) * 1e3 for entries in times.values())
        print(
            f"{what:30s} 1 rank {one:7.1f} ms   2 ranks {two:7.1f} ms (ratio {one / two:.2f})   "
            f"2 independent halves {halves:7.1f} ms (ratio {one / halves:.2f})"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--layers", type=int, default=6, help="layers of the generated model (180 MB each for the pair)"
    )
    parser.add_argument("--dir", type=Path, default=None, help="where to put the temporary directory")
    arguments = parser.parse_args()
    measure(arguments.dir, arguments.layers, arguments.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
