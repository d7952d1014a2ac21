"""What the CUDA code plans for a call (csrc/cuda/plan.h), asked through the emulated library."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from .emulated import emulator, need

FIELDS = (
    "compulsory_bytes",
    "dram_bytes",
    "l2_bytes",
    "flops",
    "mma_flops",
    "l2_window",
    "workspace_bytes",
    "shared_bytes",
)


class Plan(ctypes.Structure):
    """safelora::cuda::OpPlan."""

    _fields_ = tuple((name, ctypes.c_int64) for name in FIELDS)


class Gpu(NamedTuple):
    arch: int
    processors: int
    l2_mib: int


F32, BF16 = 0, 1  # of safelora::DType


def _call(op: str, sizes: tuple[int, ...], dtypes: tuple[int, ...], gpu: Gpu | None, results: list[Plan]) -> None:
    need("simt")
    device = [] if gpu is None else [gpu.arch, gpu.processors, ctypes.c_int64(gpu.l2_mib << 20)]
    function = getattr(emulator("simt").library, f"safelora_plan_{op}")
    function(*map(ctypes.c_int64, sizes), *dtypes, *device, *map(ctypes.byref, results))


def planned(op: str, sizes: tuple[int, ...], dtypes: tuple[int, ...], gpu: Gpu | None = None) -> Plan:
    plan = Plan()
    _call(op, sizes, dtypes, gpu, [plan])
    return plan


def planned_salora(tokens: int, d: int, rank: int, k: int, gpu: Gpu) -> tuple[Plan, Plan]:
    """Forward and backward of bf16 activations and fp32 factors."""
    forward, backward = Plan(), Plan()
    _call("salora", (tokens, d, d, rank, k), (BF16, F32), gpu, [forward, backward])
    return forward, backward
