"""Tile sizes by target and rank: a small table, no search.

``SAFELORA_TRITON_AUTOTUNE=1`` lets Triton measure the alternatives that leave the partition of the work alone, and
keep its choice in its cache on disk.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

AUTOTUNE = os.environ.get("SAFELORA_TRITON_AUTOTUNE", "").strip().lower() in ("1", "true", "yes", "on")

# Shared memory that one block may take, in bytes; LDS for gfx.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}


def target(device: torch.device) -> str:
    """The name of the chip's architecture; "interpreter" for CPU tensors."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":", maxsplit=1)[0]
    return f"sm_{properties.major}{properties.minor}"


def processors(device: torch.device) -> int:
    """Multiprocessors (compute units) of the device; 1 under the interpreter."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def roomy(arch: str) -> dict[str, int]:
    """Options for small kernels: 128 registers a thread, where ptxas would spill a few to fit more threads."""
    return {} if arch.startswith("gfx") else {"maxnreg": 128}


class Project(NamedTuple):
    """Tiles of the projection: ``V`` is read as rows × columns for ``Y = VᵀB`` and block_rows × step for ``V Y``.

    ``step`` divides ``columns``.
    """

    rows: int
    columns: int
    block_rows: int
    step: int
    num_warps: int
    num_stages: int
    programs: int  # per multiprocessor


SMALL = ("sm_86", "sm_89", "sm_120")  # 99 KiB of shared memory, no fp64 matrix units


def panels(arch: str, split: bool, half: bool) -> tuple[int, ...]:
    """The widths of a panel of factor columns, the widest last; ``half``: weights of two bytes an element.

    Elsewhere a panel of 64 spills registers.
    """
    if not split:
        return 16, 32
    return (8, 16, 32) if arch in SMALL or not half else (8, 16, 32, 64)


def project(arch: str, rank: int, split: bool) -> Project:
    """Tiles for panels of ``rank`` columns."""
    if not split:
        return Project(32, 32, 32, 32, 4, 3, 4)
    if arch.startswith("gfx"):
        return Project(32, 64, 64, 32, 4, 2, 2)
    return Project(32, 64, 64, 32, 4, 3, 2 if rank == 64 else 3)


class Gram(NamedTuple):
    """Side of a block of a Gram matrix, and the rows of a factor that enter it at a time."""

    block: int
    step: int
    num_warps: int


def gram(arch: str, rank: int) -> Gram:
    """Chips without fp64 matrix units keep both operands of a product in registers."""
    if arch in SMALL:
        return Gram(16, 16, 2)
    return Gram(16, 32, 2) if rank <= 16 else Gram(32, 32, 4)
