"""SaLoRA's linear update ``y = base_output + s (x Aᵀ) B̃ᵀ``, ``B̃ = B − U (Uᵀ B)``, and its gradients.

Forward: B̃ by the complement kernel, ``h = x Aᵀ`` in parts over d_in, and the update inside the read-modify-write of
``base_output``. Backward: one pass over dy forms ``t = s dy B̃`` (in parts over d_out) and ``G = s dyᵀ h`` (in parts
over the tokens), one pass over x forms ``dx = t A`` and ``dA = tᵀ x``; the parts are added in order, and
``dB = G − U (Uᵀ G)``. The number of parts depends on the shapes alone.

All products are exact or keep fp32 accuracy: an fp32 operand meets a bf16 one as the sum of three bf16 numbers, which
is exact in the normal range and costs half of what fp32 products do.

Source: SaLoRA, arXiv 2501.01765.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import reference
from ..reference import basis_gradient
from . import complement, config, tables
from .tables import Launch, cdiv

RANKS = 16  # of a block; further ones find dy and x in L2
SPLITS = 8  # most parts of h, as many as give DOWN_PROGRAMS programs
DOWN_PROGRAMS = 256
SPLIT_COLUMNS = 512  # fewest columns of x in one of them
TOKENS = 512  # of one part of G and dA
DOWN_STEP = 64  # columns of x at a time
DOWN_ROWS = 64  # tokens at a time, of bf16 and up to RANKS ranks
UP_ROWS = 32  # tokens of y in one block
OUT_COLUMNS = 128  # of y in one block, of bf16
OUT_GRAD_ROWS, OUT_GRAD_COLUMNS = 64, 128  # of dy at a time, of bf16
IN_GRAD_ROWS, IN_GRAD_COLUMNS = 16, 128  # of x at a time
SUM_BLOCK = 1024
MAX_STRIDE = 1 << 22  # elements between rows


@triton.jit
def bf16_parts(x):
    """``x`` as a sum of three bf16 numbers."""
    hi = x.to(tl.bfloat16)
    rest = x - hi.to(tl.float32)
    mid = rest.to(tl.bfloat16)
    return hi, mid, (rest - mid.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr):
    """``a b`` in fp32, for sums to be added to apart, since matrix units cut off where they accumulate."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, max_num_imprecise_acc=1)
    elif a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        hi, mid, lo = bf16_parts(b)
        return tl.dot(a, hi, tl.dot(a, mid, tl.dot(a, lo)))
    elif a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        hi, mid, lo = bf16_parts(a)
        return tl.dot(hi, b, tl.dot(mid, b, tl.dot(lo, b)))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION, max_num_imprecise_acc=1)


@triton.jit
def block(pointer, stride, first, rows, columns):
    """Pointers to rows ``first + rows`` × ``columns``; one 64-bit offset for all, unit column stride."""
    return pointer + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])


@triton.jit
def within(rows, columns, n_rows, n_columns):
    return (rows < n_rows)[:, None] & (columns < n_columns)[None, :]


@triton.jit
def load(pointer, stride, first, rows, columns, n_rows, n_columns):
    inside = within(first + rows, columns, n_rows, n_columns)
    return tl.load(block(pointer, stride, first, rows, columns), mask=inside, other=0.0)


@triton.jit
def store(pointer, stride, first, rows, columns, n_rows, n_columns, values):
    inside = within(first + rows, columns, n_rows, n_columns)
    tl.store(block(pointer, stride, first, rows, columns), values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def matrix_of(parts, part, rows, columns):
    """The ``part``-th of dense rows × columns matrices that stand one after the other."""
    return parts + tl.cast(part, tl.int64) * rows * columns


@triton.jit(do_not_specialize=["tokens"])
def down_kernel(
    x,
    x_stride,
    lora_A,
    a_stride,
    parts,
    tokens,
    d_in,
    rank,
    length,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``parts[p] = x[:, p] A[:, p]ᵀ`` (tokens, rank) for the p-th ``length`` columns. Grid: tokens, rank, parts."""
    token = tl.program_id(0) * BT
    first = tl.program_id(1) * BR
    part = tl.program_id(2)
    rows = tl.arange(0, BT)
    ranks = tl.arange(0, BR)
    start = part * length
    acc = tl.zeros((BT, BR), tl.float32)
    for k in tl.range(start, tl.minimum(start + length, d_in), BK, num_stages=STAGES):
        columns = k + tl.arange(0, BK)
        values = load(x, x_stride, token, rows, columns, tokens, d_in)
        factor = load(lora_A, a_stride, first, ranks, columns, rank, d_in)
        acc += multiply(values, tl.trans(factor), PRECISION)
    store(matrix_of(parts, part, tokens, rank), rank, token, rows, first + ranks, tokens, rank, acc)


@triton.jit(do_not_specialize=["tokens", "scaling"])
def up_kernel(
    parts,
    n_parts,
    projected_B,
    base_output,
    base_stride,
    y,
    h,
    tokens,
    d_out,
    rank,
    scaling,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """``y = base_output + scaling · h B̃ᵀ`` with h the sum of its parts, which it also writes. Grid: d_out, tokens."""
    column = tl.program_id(0) * BN
    token = tl.program_id(1) * BT
    rows = tl.arange(0, BT)
    columns = tl.arange(0, BN)
    before = load(base_output, base_stride, token, rows, column + columns, tokens, d_out)
    acc = tl.zeros((BT, BN), tl.float32)
    for first in range(0, rank, BR):
        ranks = first + tl.arange(0, BR)
        total = tl.zeros((BT, BR), tl.float32)
        for part in range(n_parts):
            total += load(matrix_of(parts, part, tokens, rank), rank, token, rows, ranks, tokens, rank)
        # The programs of the first columns alone write h.
        store(h, rank, token, rows, ranks, tl.where(column == 0, tokens, 0), rank, total)
        factor = load(projected_B, rank, column, columns, ranks, d_out, rank)
        acc += multiply(total, tl.trans(factor), PRECISION)
    after = before.to(tl.float32) + scaling * acc
    store(y, d_out, token, rows, column + columns, tokens, d_out, after)


@triton.jit(do_not_specialize=["tokens"])
def output_gradient_kernel(
    dy,
    dy_stride,
    h,
    projected_B,
    t_parts,
    g_parts,
    tokens,
    d_out,
    rank,
    PRECISION: tl.constexpr,
    WANT_T: tl.constexpr,
    WANT_G: tl.constexpr,
    LENGTH: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Both products of dy from one read: ``t_parts[n] = dy[:, n] B̃[n]`` (tokens, rank) for the n-th BN columns, and
    ``g_parts[c] = dy[c]ᵀ h[c]`` (d_out, rank) for the c-th LENGTH tokens. Grid: d_out, rank, tokens."""
    column = tl.program_id(0) * BN
    part = tl.program_id(2)
    rows = tl.arange(0, BT)
    columns = tl.arange(0, BN)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    start = part * LENGTH
    if WANT_T:
        factor = load(projected_B, rank, column, columns, ranks, d_out, rank)
        t_part = matrix_of(t_parts, tl.program_id(0), tokens, rank)
    acc = tl.zeros((BN, BR), tl.float32)
    for token in tl.range(start, tl.minimum(start + LENGTH, tokens), BT, num_stages=STAGES):
        grad = load(dy, dy_stride, token, rows, column + columns, tokens, d_out)
        if WANT_G:
            hidden = load(h, rank, token, rows, ranks, tokens, rank)
            acc += multiply(tl.trans(grad), hidden, PRECISION)
        if WANT_T:
            store(t_part, rank, token, rows, ranks, tokens, rank, multiply(grad, factor, PRECISION))
    if WANT_G:
        store(matrix_of(g_parts, part, d_out, rank), rank, column, columns, ranks, d_out, rank, acc)


@triton.jit(do_not_specialize=["tokens"])
def input_gradient_kernel(
    x,
    x_stride,
    t,
    lora_A,
    a_stride,
    dx,
    a_parts,
    tokens,
    d_in,
    rank,
    PRECISION: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_A: tl.constexpr,
    LENGTH: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``dx = t A``, and ``a_parts[c] = t[c]ᵀ x[c]`` (rank, d_in) for the c-th LENGTH tokens. Grid: d_in, rank, tokens.

    The programs of the first ranks alone form dx.
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * BR
    part = tl.program_id(2)
    rows = tl.arange(0, BT)
    ranks = tl.arange(0, BR)
    start = part * LENGTH
    acc = tl.zeros((BR, BN), tl.float32)
    rank_of_dx = tl.where(first == 0, rank, 0)
    for token in tl.range(start, tl.minimum(start + LENGTH, tokens), BT, num_stages=STAGES):
        if WANT_A:
            values = load(x, x_stride, token, rows, columns, tokens, d_in)
            hidden = load(t, rank, token, rows, first + ranks, tokens, rank)
            acc += multiply(tl.trans(hidden), values, PRECISION)
        if WANT_X:
            grad = tl.zeros((BT, BN), tl.float32)
            for other in range(0, rank_of_dx, BR):
                factor = load(lora_A, a_stride, other, ranks, columns, rank, d_in)
                every = load(t, rank, token, rows, other + ranks, tokens, rank)
                grad += multiply(every, factor, PRECISION)
            store(dx, d_in, token, rows, columns, tl.where(first == 0, tokens, 0), d_in, grad)
    if WANT_A:
        store(matrix_of(a_parts, part, rank, d_in), d_in, first, ranks, columns, rank, d_in, acc)


@triton.jit(do_not_specialize=["n_parts", "scaling"])
def sum_kernel(parts, out, size, n_parts, scaling, BLOCK: tl.constexpr):
    """``out = scaling · Σ parts``, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(n_parts):
        total += tl.load(parts + tl.cast(part, tl.int64) * size + i, mask=i < size, other=0.0)
    tl.store(out + i, (scaling * total).to(out.dtype.element_ty), mask=i < size)


def _shrink(matrix: Tensor) -> int:
    """By what to make tiles smaller, for the registers: all but bf16 is multiplied as fp32."""
    return 1 if matrix.dtype == torch.bfloat16 else 2


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with unit column stride, and rows so close that offsets within a block have 32 bits."""
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) <= MAX_STRIDE else matrix.contiguous()


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _options(num_warps: int) -> dict[str, Any]:
    return {"num_warps": num_warps, "num_stages": 3, "enable_fp_fusion": True}


def forward_launches(
    x: Tensor,
    base_output: Tensor,
    lora_A: Tensor,
    projected_B: Tensor,
    scaling: float,
    y: Tensor,
    h: Tensor,
    arch: str,
) -> list[Launch]:
    """``h = x Aᵀ`` in parts, then the update; ``projected_B`` is fp32 and contiguous, as are the results."""
    x, base_output, lora_A = _rows(x), _rows(base_output), _rows(lora_A)
    (tokens, d_in), d_out, rank = x.shape, y.shape[1], lora_A.shape[0]
    precision = complement.precision(arch)
    few = tokens <= 16
    ranks = RANKS if rank <= RANKS else 2 * RANKS
    rows = 16 if few else DOWN_ROWS * RANKS // ranks // _shrink(x)
    blocks = cdiv(tokens, rows)
    n_parts = max(1, min(cdiv(d_in, SPLIT_COLUMNS), SPLITS, DOWN_PROGRAMS // max(blocks, 1)))
    step = DOWN_STEP // _shrink(x)
    length = cdiv(cdiv(d_in, n_parts), DOWN_STEP) * DOWN_STEP
    parts = _empty(x, n_parts, tokens, rank)
    down = Launch(
        down_kernel,
        (blocks, cdiv(rank, ranks), n_parts),
        (x, x.stride(0), lora_A, lora_A.stride(0), parts, tokens, d_in, rank, length),
        {"PRECISION": precision, "BT": rows, "BR": ranks, "BK": step, "STAGES": stages(arch)},
        _options(rows // 16),
    )
    rows = 16 if few else UP_ROWS
    columns = OUT_COLUMNS // _shrink(base_output)
    up = Launch(
        up_kernel,
        (max(1, cdiv(d_out, columns)), cdiv(tokens, rows)),
        (parts, n_parts, projected_B, base_output, base_output.stride(0), y, h, tokens, d_out, rank, scaling),
        {"PRECISION": precision, "BT": rows, "BR": RANKS, "BN": columns},
        _options(4),
    )
    return [down, up] if tokens else []


def stages(arch: str) -> int:
    return 2 if arch.startswith("gfx") else 3


def output_gradient_launches(
    dy: Tensor, h: Tensor, projected_B: Tensor, scaling: float, t: Tensor | None, g: Tensor | None, arch: str
) -> list[Launch]:
    """``t = s dy B̃`` (tokens, rank) and ``g = s dyᵀ h`` (d_out, rank), both fp32, either of which may be left out."""
    dy, h, projected_B = _rows(dy), h.contiguous(), projected_B.contiguous()
    (tokens, d_out), rank = dy.shape, h.shape[1]
    columns = OUT_GRAD_COLUMNS // _shrink(dy) ** 2
    n_columns, n_tokens = max(1, cdiv(d_out, columns)), max(1, cdiv(tokens, TOKENS))
    t_parts = _empty(dy, n_columns, tokens, rank) if t is not None else _empty(dy, 1)
    g_parts = _empty(dy, n_tokens, d_out, rank) if g is not None else _empty(dy, 1)
    launches = [
        Launch(
            output_gradient_kernel,
            (n_columns, cdiv(rank, RANKS), n_tokens),
            (dy, dy.stride(0), h, projected_B, t_parts, g_parts, tokens, d_out, rank),
            {
                "PRECISION": complement.precision(arch),
                "WANT_T": t is not None,
                "WANT_G": g is not None,
                "LENGTH": TOKENS,
                "BT": OUT_GRAD_ROWS,
                "BR": RANKS,
                "BN": columns,
                "STAGES": stages(arch),
            },
            _options(4),
        )
    ]
    launches += [sum_launch(t_parts, t, n_columns, scaling)] if t is not None else []
    launches += [sum_launch(g_parts, g, n_tokens, scaling)] if g is not None else []
    return launches


def input_gradient_launches(
    x: Tensor, t: Tensor, lora_A: Tensor, dx: Tensor | None, dA: Tensor | None, arch: str
) -> list[Launch]:
    """``dx = t A`` and ``dA = tᵀ x``, either of which may be left out."""
    x, lora_A = _rows(x), _rows(lora_A)
    (tokens, d_in), rank = x.shape, lora_A.shape[0]
    n_tokens = max(1, cdiv(tokens, TOKENS))
    a_parts = _empty(x, n_tokens, rank, d_in) if dA is not None else _empty(x, 1)
    launches = [
        Launch(
            input_gradient_kernel,
            (max(1, cdiv(d_in, IN_GRAD_COLUMNS)), cdiv(rank, RANKS) if dA is not None else 1, n_tokens),
            (x, x.stride(0), t, lora_A, lora_A.stride(0), t if dx is None else dx, a_parts, tokens, d_in, rank),
            {
                "PRECISION": complement.precision(arch),
                "WANT_X": dx is not None,
                "WANT_A": dA is not None,
                "LENGTH": TOKENS,
                "BT": IN_GRAD_ROWS,
                "BR": RANKS,
                "BN": IN_GRAD_COLUMNS,
                "STAGES": stages(arch),
            },
            _options(8),
        )
    ]
    return launches + ([sum_launch(a_parts, dA, n_tokens, 1.0)] if dA is not None else [])


def sum_launch(parts: Tensor, out: Tensor, n_parts: int, scaling: float) -> Launch:
    size = out.numel()
    arguments = (parts, out, size, n_parts, scaling)
    return Launch(sum_kernel, (max(1, cdiv(size, SUM_BLOCK)),), arguments, {"BLOCK": SUM_BLOCK}, _options(4))


def salora_linear(
    x: Tensor, base_output: Tensor, lora_A: Tensor, lora_B: Tensor, basis: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator; a call with anything in fp64 is left to the reference."""
    if any(t.dtype == torch.float64 for t in (x, base_output, lora_A, lora_B, basis)):
        return reference.LAUNCHERS["salora_linear"](x, base_output, lora_A, lora_B, basis, scaling)
    projected_B = lora_B.new_empty(lora_B.shape, dtype=torch.float32)
    h = x.new_empty((x.shape[0], lora_A.shape[0]), dtype=torch.float32)
    y = base_output.new_empty(base_output.shape)
    complement.project_out_into([projected_B], [lora_B], [basis], "left")
    arch = config.target(x.device)
    tables.run(forward_launches(x, base_output, lora_A, projected_B, scaling, y, h, arch), x.device)
    return y, h, projected_B


def salora_linear_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    projected_B: Tensor,
    basis: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The operator; a call with anything in fp64 is left to the reference."""
    tensors = (dy, x, h, lora_A, lora_B, projected_B, basis)
    if any(t.dtype == torch.float64 for t in tensors):
        return reference.LAUNCHERS["salora_linear_backward"](*tensors, scaling, needs)
    need_x, need_A, need_B, need_U = needs
    owners = (x, lora_A, lora_B, basis)
    dx, dA, dB, dU = (o.new_empty(o.shape if need else (0,)) for o, need in zip(owners, needs, strict=True))
    arch = config.target(x.device)
    t = _empty(dy, *h.shape) if need_x or need_A else None
    g = _empty(dy, *lora_B.shape) if need_B or need_U else None
    if t is not None or g is not None:
        tables.run(output_gradient_launches(dy, h, projected_B, scaling, t, g, arch), dy.device)
    if t is not None:
        wanted = (dx if need_x else None, dA if need_A else None)
        tables.run(input_gradient_launches(x, t, lora_A, *wanted, arch), dy.device)
    if g is not None and need_B:
        complement.project_out_into([dB], [g], [basis], "left")
    if g is not None and need_U:
        # In fp64, so that no global setting of torch's matrix products reaches it; small, and seldom asked for.
        dU.copy_(basis_gradient(g.double(), lora_B.double(), basis.double()))
    return dx, dA, dB, dU


LAUNCHERS: dict[str, Callable[..., Any]] = {
    "salora_linear": salora_linear,
    "salora_linear_backward": salora_linear_backward,
}
