"""`project_adapter` over two ranks of one thread each against one, and what the same division gives on many nodes.

Measured: a pair of checkpoints (bf16, sharded, in the page cache) and an adapter are generated in a temporary directory
and projected by one process and by two, interleaved; the outputs have to be equal byte by byte. Times are those of the
call in the slowest rank, without starting Python. What two processors of the machine can give at all is measured by two
processes that each project one half of the adapter and know nothing of each other. Beside the wall clock stands the
processor time of the slowest rank, which other work on the machine disturbs less.

On paper: 70 and 405 billion parameters on 8 nodes of 8 ranks, from the shapes of the models, the package's own
assignment and the rates that are printed with the table.

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
NODES, PER_NODE = 8, 8
STORAGE = 10e9  # bytes/s that a node reads from a parallel file system
MEMORY = 200e9  # bytes/s that the ranks of a node read from its page cache
NETWORK = 12.5e9  # bytes/s into rank 0 (100 Gbit/s)
LATENCY = 50e-6  # seconds per message
MODELS = {"70B": (80, 8192, 1024, 28672), "405B": (126, 16384, 1024, 53248)}


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


def project(root: Path, runs: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of the slower of the two processes, for each run."""
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
        name: [(max(a[0], b[0]), max(a[1], b[1])) for a, b in zip(both[0][name], both[1][name], strict=True)]
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
    for column, what in enumerate(("wall clock", "processor time of the slowest")):
        one, two, halves = (statistics.median(entry[column] for entry in entries) * 1e3 for entries in times.values())
        print(
            f"{what:30s} 1 rank {one:7.1f} ms   2 ranks {two:7.1f} ms (ratio {one / two:.2f})   "
            f"2 independent halves {halves:7.1f} ms (ratio {one / halves:.2f})"
        )


def on_paper() -> None:
    """The division of two large models over 64 ranks, by the package's own assignment."""
    from safelora.distributed import assign

    size = NODES * PER_NODE
    print(
        f"\n{NODES} nodes × {PER_NODE} ranks, LoRA r = {RANK} on every linear module, bf16 checkpoints and factors, "
        f"every lora_B projected;\na node reads {STORAGE / 1e9:g} GB/s from storage, or projects {MEMORY / 1e9:g} GB/s "
        f"from its page cache; rank 0 receives {NETWORK / 1e9:g} GB/s, {LATENCY * 1e6:g} µs per message"
    )
    heads = ("model", "modules", "GB in all", "GB, busiest rank", "of an even share", "lora_B, MB", "storage, s",
             "cached, s", "efficiency")  # fmt: skip
    print("  ".join(heads))
    for name, (layers, d, kv, ffn) in MODELS.items():
        shapes = list(linear_shapes(d, kv, ffn).values()) * layers
        costs = [2 * 2 * rows * columns for rows, columns in shapes]
        loads = [0] * size
        for cost, owner in zip(costs, assign(costs, size), strict=True):
            loads[owner] += cost
        busiest, total = max(loads), sum(costs)
        factors = sum(2 * rows * RANK for rows, _ in shapes)
        exchange = factors / NETWORK + len(shapes) * LATENCY
        from_storage, cached = (busiest / (rate / PER_NODE) + exchange for rate in (STORAGE, MEMORY))
        efficiency = total / (STORAGE / PER_NODE) / size / from_storage
        cells = (name, str(len(shapes)), f"{total / 1e9:.1f}", f"{busiest / 1e9:.2f}", f"{busiest * size / total:.3f}",
                 f"{factors / 1e6:.0f}", f"{from_storage:.1f}", f"{cached:.2f}", f"{efficiency:.1%}")  # fmt: skip
        print("  ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--layers", type=int, default=6, help="layers of the generated model (180 MB each for the pair)"
    )
    parser.add_argument("--dir", type=Path, default=None, help="where to put the temporary directory")
    parser.add_argument("--paper", action="store_true", help="only the model on paper")
    arguments = parser.parse_args()
    if not arguments.paper:
        measure(arguments.dir, arguments.layers, arguments.runs)
    on_paper()
    return 0


if __name__ == "__main__":
    sys.exit(main())
