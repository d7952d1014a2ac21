"""What the launchers share: tables of addresses on the device, launches, and device code that reads through a table.

A kernel that serves many layers finds their matrices in an int64 table: the address and the two strides of each.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
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

    def signature(self) -> dict[str, Any]:
        """The types of the arguments, as Triton's compiler names them."""
        declared = self.kernel.fn.__annotations__

        def type_of(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return ("i64",) * len(value)
            if isinstance(value, float):
                return "fp32"
            return (
                _NAMES[value.dtype] if isinstance(value, Tensor) else declared.get(name, "i32").replace("tl.int", "i")
            )

        return {name: type_of(name, value) for name, value in zip(self.kernel.arg_names, self.args, strict=False)}


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


def capturing(device: torch.device) -> bool:
    """Whether launches on the current stream of ``device`` go into a graph that is replayed later."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(device: torch.device, *tables: Sequence[int] | Tensor) -> list[Tensor]:
    """int64 tables on the device, each 16-byte aligned, without the host awaiting anything.

    A graph must keep what it replays, and it keeps the arguments of kernels, not memory of the host: during a capture
    the tables travel as arguments. Otherwise as one copy, from memory that PyTorch gives out again only behind it.
    """
    parts = [torch.as_tensor(table, dtype=torch.int64).flatten() for table in tables]
    sizes = [part.numel() + part.numel() % 2 for part in parts]
    with on(device):
        captured = capturing(device)
        staging = torch.zeros(max(sum(sizes), 2), dtype=torch.int64, pin_memory=device.type == "cuda" and not captured)
        first = 0
        firsts = []
        for part, size in zip(parts, sizes, strict=True):
            staging[first : first + part.numel()] = part
            firsts.append(first)
            first += size
        if captured:
            there = torch.empty(cdiv(len(staging), PIECE) * PIECE, dtype=torch.int64, device=device)
            run(writes(staging, there), device)
        else:
            _load_write_kernel(device)
            there = staging.to(device, non_blocking=True)
    return [there[start : start + max(part.numel(), 1)] for start, part in zip(firsts, parts, strict=True)]


PIECE = 256  # of a table in one launch: 2 KiB of arguments, of the 4 that every chip takes


def writes(values: Tensor, table: Tensor) -> Iterator[Launch]:
    """Launches that write ``values`` to ``table``, whose length is a multiple of PIECE."""
    # Odd and beyond 32 bits: Triton compiles a kernel anew for arguments that differ in being 1, a multiple of 16 or
    # an int32.
    encoded = torch.nn.functional.pad(values, (0, len(table) - len(values))) * 2 + OFFSET.value
    for number, part in enumerate(encoded.split(PIECE)):
        yield Launch(write_kernel, (1,), (table, number, tuple(part.tolist())), {"N": PIECE}, {"num_warps": 1})


@functools.cache
def _load_write_kernel(device: torch.device) -> None:
    """Compiles and loads it, which a capture may not allow."""
    if device.type == "cuda":
        run(writes(torch.zeros(1, dtype=torch.int64), torch.empty(PIECE, dtype=torch.int64, device=device)), device)


def starts(sizes: Tensor) -> Tensor:
    """Where each of some runs begins that follow one another."""
    return sizes.cumsum(0) - sizes


def expanded(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as often as ``counts`` says, and the number of each copy among those of its row."""
    copies = rows.repeat_interleave(counts, dim=0)
    return copies, torch.arange(len(copies)) - starts(counts).repeat_interleave(counts)


def in_turns(firsts: Tensor, seconds: Tensor, programs: int) -> Tensor:
    """The tasks of groups that have so many of a first and of a second kind, as ``group << 32 | number << 1 | kind`` in
    the order in which they are drawn: a group's second kind comes as many first ones after its own as there are
    programs, so that it seldom waits and seldom finds its memory gone from L2."""

    def codes(counts: Tensor) -> tuple[Tensor, Tensor]:
        group, number = expanded(torch.arange(len(counts)), counts)
        return group, (group << 32) | (number << 1)

    (_, first), (group, second) = codes(firsts), codes(seconds)
    at = torch.cat([2 * torch.arange(len(first)), 2 * (firsts.cumsum(0)[group] - 1 + programs) + 1])
    return torch.cat([first, second | 1])[at.argsort(stable=True)]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


OFFSET = tl.constexpr((1 << 62) + 1)


@triton.jit(do_not_specialize=["part", "values"])
def write_kernel(table, part, values, N: tl.constexpr):
    """Entries [part N, part N + N) of a table; ``values`` hold 2 x + OFFSET for an entry x."""
    for i in tl.static_range(N):
        tl.store(table + part * N + i, (values[i] - OFFSET) >> 1)


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
