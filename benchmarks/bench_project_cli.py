"""`safelora project` on a pair of 1.1-billion-parameter checkpoints, against merely reading the bytes it needs.

The pair (2 × 2.2 GB, bf16, sharded) and an adapter on q_proj and v_proj (r = 16) are generated in a temporary directory
and deleted afterwards. Printed, as medians of interleaved runs: `import torch` alone, reading the needed bytes from the
page cache into a small buffer, the whole command, and the ratio (command − import torch) / read. The command saves part
of what `import torch` costs a script (no garbage collection meanwhile, no teardown at exit), so the ratio is also given
against an import that saves the same. The result is checked against dense fp64 arithmetic before anything is timed.

    python benchmarks/bench_project_cli.py [--runs 7] [--dir DIR]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAYERS, D, KV, FFN, VOCAB, RANK = 22, 2048, 256, 5632, 32000, 16
TARGETS = {"q_proj": (D, D), "v_proj": (KV, D)}
PAIR_BYTES = 4_400_000_000
LIMIT_RATIO = 1.5


def shapes() -> list[dict[str, tuple[int, int]]]:
    """Tensor shapes by shard."""
    shards: list[dict[str, tuple[int, int]]] = [{"model.embed_tokens.weight": (VOCAB, D)}, {}, {}]
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}."
        shard = shards[layer * 3 // LAYERS]
        for name, shape in {
            "self_attn.q_proj": (D, D), "self_attn.k_proj": (KV, D), "self_attn.v_proj": (KV, D),
            "self_attn.o_proj": (D, D), "mlp.gate_proj": (FFN, D), "mlp.up_proj": (FFN, D), "mlp.down_proj": (D, FFN),
        }.items():  # fmt: skip
            shard[f"{stem}{name}.weight"] = shape
    shards[2]["lm_head.weight"] = (VOCAB, D)
    return shards


def generate(root: Path) -> None:
    """Write base, aligned and adapter. Only the adapted weights get fresh random numbers; the rest repeat a block."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    filler = torch.randn(VOCAB * D, generator=draw).mul_(0.02).bfloat16()
    for name in ("base", "aligned"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shapes()):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        base, aligned = {}, {}
        for name, (rows, columns) in shard.items():
            base[name] = filler[: rows * columns].view(rows, columns).clone()
            if name.split(".")[-2] in TARGETS:
                base[name] = torch.randn(rows, columns, generator=draw).mul_(0.02).bfloat16()
                delta = torch.randn(rows, columns, generator=draw).mul_(1e-3)
                aligned[name] = (base[name].float() + delta).bfloat16()
            else:
                aligned[name] = base[name]
        save_file(base, root / "base" / file, {"format": "pt"})
        save_file(aligned, root / "aligned" / file, {"format": "pt"})
    for name in ("base", "aligned"):
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (root / name / "model.safetensors.index.json").write_text(index)
    factors = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in TARGETS.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            factors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw) * 0.02
            factors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw) * 0.02
    (root / "adapter").mkdir()
    save_file(factors, root / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "base_model_name_or_path": str(root / "aligned")}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def check(root: Path, out: Path) -> float:
    """Relative error of one projected factor against dense fp64."""
    from safetensors import safe_open

    name = "model.layers.3.self_attn.v_proj"
    index = json.loads((root / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    weights = []
    for model in ("aligned", "base"):
        with safe_open(root / model / index[f"{name}.weight"], "pt") as file:
            weights.append(file.get_tensor(f"{name}.weight").double())
    results = []
    for adapter in (root / "adapter", out):
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            results.append(file.get_tensor(f"base_model.model.{name}.lora_B.weight").double())
    V = weights[0] - weights[1]
    expected = V @ (V.T @ results[0]) / V.norm()
    return float((results[1] - expected).norm() / expected.norm())


def needed_ranges(root: Path) -> list[tuple[str, int, int]]:
    """File, offset and length of every tensor the command has to read."""
    sys.path[:0] = [str(ROOT / "python")]
    from safelora import Checkpoint

    return [
        (str(info.file), info.begin, info.nbytes)
        for model in ("aligned", "base")
        for name, info in Checkpoint.open(root / model).tensors.items()
        if name.split(".")[-2] in TARGETS
    ]


def read_all(ranges: list[tuple[str, int, int]]) -> None:
    """Read the ranges one after another into one buffer that is used again and again."""
    buffer = memoryview(bytearray(max(length for _, _, length in ranges)))
    files = {name: open(name, "rb", buffering=0) for name, _, _ in ranges}  # noqa: SIM115, closed below
    for name, offset, length in ranges:
        files[name].seek(offset)
        if files[name].readinto(buffer[:length]) != length:
            raise RuntimeError(f"short read of {name}")
    for file in files.values():
        file.close()


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def apart(work: Callable[..., Any], *arguments: object) -> Any:
    """Call in a process of its own: a child's peak memory counts that of the parent it was forked from."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def run(command: list[str]) -> int:
    """Run a command; returns its peak resident memory in bytes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python")))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}")
    return usage.ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--dir", type=Path, default=None, help="where to put the temporary directory")
    parser.add_argument("--keep", action="store_true", help="leave the generated files for another run")
    arguments = parser.parse_args()
    place = arguments.dir or Path(tempfile.gettempdir())
    root = place / "safelora-bench-pair"
    if not (root / "adapter" / "adapter_config.json").exists():
        free = shutil.disk_usage(place).free
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if min(free, memory) < 1.3 * PAIR_BYTES:
            print(f"skipped: needs {1.3 * PAIR_BYTES / 1e9:.1f} GB of disk and page cache; free: {free / 1e9:.1f} GB "
                  f"and {memory / 1e9:.1f} GB")  # fmt: skip
            return 0
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        apart(generate, root)
    try:
        measure(root, arguments.runs)
    finally:
        if not arguments.keep:
            shutil.rmtree(root, ignore_errors=True)
    return 0


def measure(root: Path, runs: int) -> None:
    """Check the result, then time and print."""
    out = root / "out"
    project = [sys.executable, "-m", "safelora", "project", str(root / "adapter"), "--base", str(root / "base"),
               "--out", str(out), "--threshold", "1"]  # fmt: skip
    ranges = needed_ranges(root)
    shutil.rmtree(out, ignore_errors=True)
    run(project)
    error = apart(check, root, out)
    if error > 1e-5:
        raise RuntimeError(f"wrong result: relative error {error:.2e}")
    baselines = {
        "import torch": "import torch",
        "import torch, quick exit": "import gc, os; gc.disable(); import torch; os._exit(0)",
    }
    times: dict[str, list[float]] = {name: [] for name in (*baselines, "read needed bytes", "safelora project")}
    peak = 0
    for _ in range(runs):
        shutil.rmtree(out)
        for name, code in baselines.items():
            times[name].append(seconds(partial(run, [sys.executable, "-c", code])))
        times["read needed bytes"].append(seconds(lambda: read_all(ranges)))
        start = time.perf_counter()
        peak = max(peak, run(project))
        times["safelora project"].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    total = sum(length for _, _, length in ranges)
    for name, median in medians.items():
        print(f"{name:32s} {median * 1e3:8.1f} ms   (min {min(times[name]) * 1e3:.1f})")
    print(f"{'needed bytes':32s} {total / 1e6:8.1f} MB   ({total / medians['read needed bytes'] / 1e9:.1f} GB/s)")
    for name in baselines:
        extra = medians["safelora project"] - medians[name]
        ratio = extra / medians["read needed bytes"]
        limit = f", limit {LIMIT_RATIO}" if name == "import torch" else ""
        print(f"{'beyond ' + name:32s} {extra * 1e3:8.1f} ms   ({ratio:.2f} × the read{limit})")
    print(f"{'peak memory':32s} {peak / 2**20:8.0f} MiB")
    print(f"{'relative error':32s} {error:8.1e}")


if __name__ == "__main__":
    sys.exit(main())
