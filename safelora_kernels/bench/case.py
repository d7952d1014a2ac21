"""What a benchmark is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OURS = "safelora_kernels"
MOVING = "moving the operands"


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case.

    ``error`` gives the relative error of the result against fp64, in the Frobenius norm. With a ``bound``, an error
    over it keeps the whole case from being timed. ``share`` is the part of the case's work that one call does: slow
    variants do one layer of many, and their times are divided by it. ``peak`` False leaves out the measurement of
    memory. ``at`` is the variant's place on the horizontal axis of a curve.
    """

    name: str
    call: Callable[[], object]
    error: Callable[[], float] | None = None
    bound: float | None = None
    share: float = 1.0
    peak: bool = True
    at: float | None = None


@dataclass(frozen=True)
class Prepared:
    """The variants of a case with their operands. ``moving`` reads and writes all operands once, and nothing else."""

    variants: Sequence[Variant]
    moving: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """Some work, and how to prepare it.

    Args:
        op: the operator or command, for the table that the case belongs to.
        name: unique within the op.
        bytes: that have to be moved at least, each operand once.
        flops: of the formula, multiplications and additions each counted.
        memory: bytes that preparing, checking and running it takes at most.
        prepare: called with the device and a seeded source of numbers.
        arithmetic: dtype of the products, whose matmul ceiling applies.
        parameters: for the record.
        default: whether it belongs to the run without ``--full``.
        axis: for a curve, what is on the horizontal axis.
    """

    op: str
    name: str
    bytes: int
    flops: float
    memory: int
    prepare: Callable[[Draw], Prepared]
    arithmetic: torch.dtype = torch.float32
    parameters: Mapping[str, Any] = field(default_factory=dict)
    default: bool = False
    axis: str = ""

    @property
    def key(self) -> str:
        return f"{self.op}/{self.name}"


class Draw:
    """Normal numbers on a device, fast: windows of one block drawn once. Times do not depend on independence."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)
        self._block = torch.empty(0, device=device)
        self._drawn = 0

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        count = int(torch.Size(shape).numel())
        slack = 1 << 16
        if self._block.numel() < count + slack:
            block = torch.randn(count + slack, generator=self._generator)
            self._block = block.to(self.device)
        self._drawn += 1
        offset = self._drawn * 7919 % slack
        return (self._block[offset : offset + count] * scale).to(dtype).view(shape)

    def basis(self, d: int, k: int) -> Tensor:
        """k orthonormal columns, fp32."""
        return torch.linalg.qr(self.normal(d, k))[0].contiguous()

    def release(self) -> None:
        self._block = torch.empty(0, device=self.device)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """In the Frobenius norm, taken in fp64."""
    truth = truth.double()
    scale = float(truth.norm())
    error = float((value.detach().double() - truth).norm())
    return error / scale if scale else error


def read_all(tensors: Sequence[Tensor]) -> Tensor:
    """Touches every byte once: 8-byte words summed, which is memory-bound."""
    return torch.stack([t.view(-1).view(torch.int64).sum() for t in tensors])


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
