"""Times, peak memory and ceilings of this machine."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

MATMUL_SIZE = 1024


def on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Seconds that one call takes: wall time on the CPU, time between two events on a GPU with a cold L2 cache."""
    if not on_gpu(device):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    cold = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    torch.empty(cold, dtype=torch.int8, device=device).zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The device stays busy while the host gets ahead, so that launch latency is not measured.
    torch.cuda._sleep(2_000_000)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: str, budget: float, least: int = 3, most: int = 50
) -> dict[str, list[float]]:
    """Seconds of every call of every variant: they take turns, and each round starts with the next one.

    A first round warms up and shows how many more ``budget`` seconds allow; there are at least ``least`` and at most
    ``most``.
    """
    names = list(calls)
    started = time.perf_counter()
    for name in names:
        seconds_of(calls[name], device)
    rounds = min(most, max(least, int(budget / (time.perf_counter() - started))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(seconds_of(calls[name], device))
    return samples


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def quantiles(samples: Sequence[float]) -> tuple[float, float]:
    """The 20 % and 80 % quantiles."""
    if len(samples) < 2:
        return samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], fifths[-1]


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _give_back() -> None:
    """Freed memory that the allocator kept would hide what a call takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call takes at its peak beyond what was there before, its result included; None if unknown.

    On the CPU this is the growth of the resident set, which counts the kernels' own scratch too.
    """
    if on_gpu(device):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS:")
        result = call()
        peak = _status("VmHWM:")
        del result
    except (OSError, StopIteration):
        return None
    return max(0, peak - before)


def available_memory(device: str) -> int:
    """Bytes that can be taken without swapping."""
    if on_gpu(device):
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def matmul_probe(dtype: torch.dtype, device: str) -> tuple[Callable[[], object], float]:
    """A square product as torch does it, and its FLOP."""
    size = MATMUL_SIZE * (4 if on_gpu(device) else 1)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3
