"""Small launches of the complement, Gram and SaLoRA kernels, with their truth, for the manifest of :mod:`.aot`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import reference
from . import complement, gram, salora
from .aot import CUDA_TARGETS, Entry, Example, close
from .tables import PIECE, Launch, writes

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HIP_TARGETS = ("gfx942",)
# One target for each way of compiling: by mma.sync and by wgmma.
TWO_TARGETS = ("sm_80", "sm_90")
AMD, NVIDIA = "gfx942", "sm_80"

Types = tuple[torch.dtype, torch.dtype]
Made = tuple[Launch, list[Tensor], Callable[[], None]]


def _entry(
    name: str, examples: Sequence[Callable[[], Made]], opcode: str, wide_loads: bool, targets: Sequence[str]
) -> Entry:
    """The variant that serves every one of ``examples``."""
    launch = examples[0]()[0]

    def example(make: Callable[[], Made]) -> Example:
        other, reachable, check = make()
        if (other.kernel, other.constexprs, other.options) != (launch.kernel, launch.constexprs, launch.options):
            raise ValueError(f"an example of {name} takes {other.constexprs}, the first one {launch.constexprs}")
        return Example(list(other.args), other.grid, reachable, check)

    return Entry(
        name,
        launch.kernel,
        launch.signature(),
        launch.constexprs,
        launch.options,
        tuple(partial(example, make) for make in examples),
        {target: (opcode,) for target in targets} if opcode else {},
        wide_loads,
        tuple(targets),
    )


def _pairs(
    shapes: Sequence[tuple[int, int, int]], types: Types, side: str, arch: str, in_place: bool, programs: int = 3
) -> Made:
    """A batch of pairs of shapes (d, m, k) in one launch."""
    generator = torch.Generator().manual_seed(len(shapes))
    pairs, truths = [], []
    for d, m, k in shapes:
        x = torch.randn((d, m) if side == "left" else (m, d), generator=generator).to(types[0])
        # Half of an orthonormal basis, so that the complement of a whole space is not zero.
        basis = 0.5 * torch.linalg.qr(torch.randn(d, k, generator=generator))[0].contiguous()
        u = basis.to(types[1])
        truths.append(reference.project_out_layers([x.double()], [u.double()], side)[0])
        pairs.append(complement.Pair(x, u, x if in_place else torch.full_like(x, torch.nan)))
    (launch,) = complement.launches(pairs, side, arch, programs)

    def check() -> None:
        for pair, truth in zip(pairs, truths, strict=True):
            close(pair.out, truth, 1e-6)

    return launch, [tensor for pair in pairs for tensor in pair], check


def _complement_entries(arch: str) -> list[Entry]:
    vendor, opcode = ("amd", "v_mfma_f32") if arch == AMD else ("nvidia", "HMMA")
    every, some = (HIP_TARGETS, HIP_TARGETS) if arch == AMD else (CUDA_TARGETS, TWO_TARGETS)
    many, one = [(520, 16, 32), (72, 8, 8), (256, 16, 16)], [(264, 16, 32)]
    variants: list[tuple[str, list[list[tuple[int, int, int]]], Types, str, str, bool, tuple[str, ...]]] = [
        ("fp32", [many, one], (FP32, FP32), "left", opcode, True, every),
        ("bf16", [many, one], (BF16, FP32), "left", opcode, True, some),
        ("right", [many, one], (FP32, FP32), "right", opcode, True, every),
        ("blocks", [[(264, 72, 136)], [(136, 64, 64), (64, 80, 72)]], (BF16, BF16), "left", opcode, True, some),
        ("odd", [[(261, 5, 7), (33, 1, 0), (1, 1, 1)]], (FP16, FP32), "left", opcode, False, some),
        ("odd_right", [[(261, 5, 35), (33, 1, 0)]], (BF16, FP16), "right", opcode, False, some),
    ]
    return [
        _entry(
            f"project_out_{name}_{vendor}",
            [partial(_pairs, shapes, types, side, arch, bool(i % 2)) for i, shapes in enumerate(batches)],
            matrix,
            wide,
            targets,
        )
        for name, batches, types, side, matrix, wide, targets in variants
    ]


def _applications(shapes: Sequence[tuple[int, int, int]], types: Types, arch: str, programs: int = 3) -> Made:
    """A batch of (tokens, d, r) in one launch, every other one without weights."""
    generator = torch.Generator().manual_seed(len(shapes))
    items, truths = [], []
    for i, (tokens, d, r) in enumerate(shapes):
        x = torch.randn(tokens, d, generator=generator).to(types[0])
        z = torch.randn(d, r, generator=generator).to(types[1])
        weights = None if i % 2 else torch.rand(tokens, generator=generator)
        items.append(gram.Item(x, z, weights, torch.full((d, r), torch.nan)))
        none = torch.empty(0) if weights is None else weights.double()
        truths.append(reference.gram_apply_layers([x.double()], [z.double()], [none])[0])
    (launch,) = gram.launches(items, arch, programs)
    for workspace in launch.args[2:5]:
        workspace.fill_(torch.nan)

    def check() -> None:
        for item, truth in zip(items, truths, strict=True):
            close(item.out, truth, 1e-6)

    return launch, [tensor for item in items for tensor in item if tensor is not None], check


def _gram_entries(arch: str) -> list[Entry]:
    vendor, opcode = ("amd", "v_mfma_f32") if arch == AMD else ("nvidia", "MMA")
    every, some = (HIP_TARGETS, HIP_TARGETS) if arch == AMD else (CUDA_TARGETS, TWO_TARGETS)
    variants: list[tuple[str, list[list[tuple[int, int, int]]], Types, bool, tuple[str, ...]]] = [
        ("bf16", [[(580, 16, 16), (70, 72, 8)], [(72, 520, 16)]], (BF16, FP32), True, every),
        ("fp32", [[(130, 72, 16), (9, 520, 4)]], (FP32, FP32), True, every),
        ("ranks_bf16", [[(70, 80, 48), (130, 16, 64)]], (BF16, FP32), True, every),
        ("ranks_fp32", [[(70, 80, 48)]], (FP32, FP32), True, every),
        ("narrow", [[(70, 80, 16)]], (BF16, BF16), True, some),
        ("odd", [[(67, 35, 5), (1, 1, 1)]], (FP16, FP32), False, some),
    ]
    return [
        _entry(
            f"gram_apply_{name}_{vendor}",
            [partial(_applications, shapes, types, arch) for shapes in batches],
            opcode,
            wide,
            targets,
        )
        for name, batches, types, wide, targets in variants
    ]


class _Call(NamedTuple):
    """Inputs of one SaLoRA call on the CPU, for the variants that ``arch`` takes."""

    x: Tensor
    base: Tensor
    dy: Tensor
    lora_A: Tensor
    projected_B: Tensor
    h: Tensor
    t: Tensor
    arch: str


def _call(shape: tuple[int, int, int, int], types: Types, arch: str) -> _Call:
    """``shape`` is (tokens, d_in, d_out, rank), ``types`` are those of activations and of lora_A."""
    tokens, d_in, d_out, rank = shape
    generator = torch.Generator().manual_seed(tokens)

    def random(rows: int, columns: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(dtype)

    return _Call(
        x=random(tokens, d_in, types[0]),
        base=random(tokens, d_out, types[0]),
        dy=random(tokens, d_out, types[0]),
        lora_A=random(rank, d_in, types[1]),
        projected_B=random(d_out, rank),
        h=random(tokens, rank),
        t=random(tokens, rank),
        arch=arch,
    )


def _unwritten(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan)


def _down(call: _Call) -> Made:
    y, h = _unwritten(call.base), _unwritten(call.h)
    launch = salora.forward_launches(call.x, call.base, call.lora_A, call.projected_B, 0.7, y, h, call.arch)[0]
    parts = launch.args[4].fill_(torch.nan)
    return launch, [], lambda: close(parts.double().sum(0), call.x.double() @ call.lora_A.double().T, 1e-6)


def _up(call: _Call) -> Made:
    y, h = _unwritten(call.base), _unwritten(call.h)
    launch = salora.forward_launches(call.x, call.base, call.lora_A, call.projected_B, 0.7, y, h, call.arch)[1]
    parts = launch.args[0]
    parts.copy_(call.h / parts.shape[0])

    def check() -> None:
        hidden = parts.double().sum(0)
        close(h, hidden, 1e-6)
        close(y, call.base.double() + 0.7 * hidden @ call.projected_B.double().T, 1e-6)

    return launch, [], check


def _output_gradient(call: _Call) -> Made:
    t, g = _unwritten(call.t), _unwritten(call.projected_B)
    launch = salora.output_gradient_launches(call.dy, call.h, call.projected_B, 0.7, t, g, call.arch)[0]
    t_parts, g_parts = (parts.fill_(torch.nan) for parts in launch.args[4:6])

    def check() -> None:
        close(t_parts.double().sum(0), call.dy.double() @ call.projected_B.double(), 1e-6)
        close(g_parts.double().sum(0), call.dy.double().T @ call.h.double(), 1e-6)

    return launch, [], check


def _input_gradient(call: _Call) -> Made:
    dx, dA = _unwritten(call.x), _unwritten(call.lora_A)
    launch = salora.input_gradient_launches(call.x, call.t, call.lora_A, dx, dA, call.arch)[0]
    a_parts = launch.args[6].fill_(torch.nan)

    def check() -> None:
        close(dx, call.t.double() @ call.lora_A.double(), 1e-6)
        close(a_parts.double().sum(0), call.t.double().T @ call.x.double(), 1e-6)

    return launch, [], check


def _sum(call: _Call) -> Made:
    parts = torch.stack([call.h, 2 * call.h, -call.h])
    out = torch.full(call.h.shape, torch.nan, dtype=call.lora_A.dtype)
    return salora.sum_launch(parts, out, 3, 0.7), [], lambda: close(out, 0.7 * parts.double().sum(0), 1e-6)


def _salora_entries(arch: str) -> list[Entry]:
    vendor = "amd" if arch == AMD else "nvidia"
    every, some = (HIP_TARGETS, HIP_TARGETS) if arch == AMD else (CUDA_TARGETS, TWO_TARGETS)
    wide, odd = [(72, 1040, 272, 16), (24, 48, 144, 8)], [(37, 21, 33, 5)]
    makers: list[tuple[str, Callable[[_Call], Made]]] = [
        ("down", _down),
        ("up", _up),
        ("output_gradient", _output_gradient),
        ("input_gradient", _input_gradient),
    ]

    def entry(
        name: str,
        make: Callable[[_Call], Made],
        shapes: Sequence[tuple[int, int, int, int]],
        types: Types,
        targets: Sequence[str],
        matrix: bool = True,
    ) -> Entry:
        def example(shape: tuple[int, int, int, int]) -> Made:
            return make(_call(shape, types, arch))

        opcode = ("v_mfma" if arch == AMD else "MMA") if matrix else ""
        examples = [partial(example, shape) for shape in shapes]
        return _entry(f"salora_{name}_{vendor}", examples, opcode, shapes is wide, targets)

    return [
        *(entry(f"{name}_bf16", make, wide, (BF16, FP32), every) for name, make in makers),
        *(entry(f"{name}_odd", make, odd, (FP16, FP32), some) for name, make in makers),
        entry("sum", _sum, wide, (BF16, BF16), every, matrix=False),
    ]


def _write(part: int) -> Made:
    """One launch of two."""
    values = torch.tensor([0, 1, -1, 16, 1 << 47, -(1 << 40)]).repeat(85)[: 2 * PIECE - 5]
    table = torch.full((2 * PIECE,), 7)
    truth = torch.full_like(table, 7)
    own = slice(part * PIECE, (part + 1) * PIECE)
    truth[own] = torch.nn.functional.pad(values, (0, 5))[own]

    def check() -> None:
        if not torch.equal(table, truth):
            raise AssertionError(f"wrote {table.tolist()}, expected {truth.tolist()}")

    return list(writes(values, table))[part], [], check


ENTRIES = [
    _entry("write_table", [partial(_write, 0), partial(_write, 1)], "", False, ()),
    *_complement_entries(NVIDIA),
    *_gram_entries(NVIDIA),
    *_salora_entries(NVIDIA),
    *_complement_entries(AMD),
    *_gram_entries(AMD),
    *_salora_entries(AMD),
]
