"""What the launchers share: tables of addresses on the device, launches, and device code that reads through a table.

A kernel that serves many layers finds their matrices in an int64 table: the address and the two strides of each.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


_NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    """One kernel call; ``args`` stand in the order of the signature, before the constexprs."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]

    def signature(self) -> dict[str, str]:
        """The types of the arguments, as Triton's compiler names them."""
        declared = self.kernel.fn.__annotations__
        return {
            name: _NAMES[value.dtype]
            if isinstance(value, Tensor)
            else str(declared.get(name, "i32")).replace("tl.int", "i")
            for name, value in zip(self.kernel.arg_names, self.args, strict=False)
        }


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Puts the launches on the current stream of ``device``, in order."""
    with on(device):
        for kernel, grid, args, constexprs, options in launches:
            kernel[grid](*args, **constexprs, **options)


def on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def address(tensor: Tensor) -> int:
    """Every address in a table passes through here."""
    return tensor.data_ptr()


def view(matrix: Tensor) -> list[int]:
    """The three entries of a matrix in a table: address, row stride, column stride."""
    return [address(matrix), *matrix.stride()]


def is_wide(matrix: Tensor, elements: int) -> bool:
    """Whether each row is a run of aligned vectors of ``elements``, at least 16 bytes long."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) % elements == 0
        and matrix.shape[1] % elements == 0
        and matrix.data_ptr() % 16 == 0
    )


def upload(device: torch.device, *tables: Sequence[int] | Tensor) -> list[Tensor]:
    """int64 tables on the device, each 16-byte aligned: one staging buffer, one copy that the host does not await."""
    parts = [torch.as_tensor(table, dtype=torch.int64).flatten() for table in tables]
    sizes = [part.numel() + part.numel() % 2 for part in parts]
    staging = torch.zeros(max(sum(sizes), 2), dtype=torch.int64, pin_memory=device.type == "cuda")
    first = 0
    firsts = []
    for part, size in zip(parts, sizes, strict=True):
        staging[first : first + part.numel()] = part
        firsts.append(first)
        first += size
    there = staging.to(device, non_blocking=True)
    return [there[start : start + max(part.numel(), 1)] for start, part in zip(firsts, parts, strict=True)]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def load_view(table, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """A matrix's entries in a table. WIDE > 1: rows are runs of aligned vectors of so many elements."""
    pointer = tl.load(table).to(tl.pointer_type(DTYPE))
    row_stride = tl.load(table + 1)
    if WIDE > 1:
        pointer = tl.multiple_of(pointer, 16)
        row_stride = tl.multiple_of(row_stride, WIDE)
        column_stride = 1
    else:
        column_stride = tl.load(table + 2)
    return pointer, row_stride, column_stride


@triton.jit
def tile(pointer, row_stride, column_stride, rows, columns):
    """Pointers to ``rows`` × ``columns`` with 64-bit offsets."""
    return pointer + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride


@triton.jit
def frobenius_norm(squares, count):
    """√Σ squares in a fixed order; NaN where it is not finite."""
    i = tl.arange(0, 256)
    total = tl.zeros((256,), tl.float64)
    for first in range(0, count, 256):
        total += tl.load(squares + first + i, mask=first + i < count, other=0.0)
    norm = tl.sqrt(tl.sum(total, axis=0))
    return tl.where(norm < float("inf"), norm, float("nan"))
