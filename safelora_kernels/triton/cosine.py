"""``⟨B_new A, B A⟩ / (‖B_new A‖ ‖B A‖)`` of many pairs of updates from r×r Gram matrices in fp64.

``cos = ⟨B_newᵀ B, K⟩ / √(⟨B_newᵀ B_new, K⟩ ⟨BᵀB, K⟩)`` with ``K = A Aᵀ``. One launch forms the Grams of all items by
blocks and chunks of the long side, a second one adds the chunks in order and takes the inner products.

Source: the selection score of Safe LoRA, arXiv 2405.16833.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..validation import check_matrix, check_same_length, check_shape
from . import config, tables
from .aot import TARGETS, Entry, Example, close
from .tables import Launch, cdiv, frobenius_norm, load_view, tile

CHUNK = 1024  # rows of B (columns of A) of one program, times the number of blocks of the Gram
# B_new 0-2, B 3-5, A 6-8, d_out, d_in, rank, chunk, first partial sum, result, squares of V and their count
ITEM = tl.constexpr(18)
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def factor_tile(
    item, rows, columns, rows_inside, rank, d_out, DTYPE: tl.constexpr, PANEL: tl.constexpr, VIEW: tl.constexpr
):
    """A tile of a factor in fp64. PANEL > 0: it stands in panels of that many columns, from a given column on."""
    inside = rows_inside[:, None] & (columns < rank)[None, :]
    if PANEL > 0:
        pointer = tl.load(item + VIEW).to(tl.pointer_type(DTYPE))
        at = (tl.load(item + VIEW + 1) + columns)[None, :]
        pointers = pointer + (at // PANEL * d_out + rows[:, None]) * PANEL + at % PANEL
    else:
        pointer, row_stride, column_stride = load_view(item + VIEW, DTYPE, 0)
        pointers = tile(pointer, row_stride, column_stride, rows, columns)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["most"])
def gram_kernel(
    items,
    partial,
    most,
    NEW: tl.constexpr,
    OLD: tl.constexpr,
    A: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Blocks of ``BᵀB``, ``B_newᵀB``, ``B_newᵀB_new`` over a chunk of rows, or of ``A Aᵀ`` over a chunk of columns."""
    item = items + tl.program_id(0) // most * ITEM
    work = tl.program_id(0) % most
    d_out = tl.load(item + 9)
    d_in = tl.load(item + 10)
    rank = tl.load(item + 11)
    chunk = tl.load(item + 12)
    side = tl.cdiv(rank, BLOCK)
    pairs = side * side
    chunks = tl.cdiv(d_out, chunk)
    columns_of_A = work - chunks * pairs
    i = tl.arange(0, BLOCK)
    k = tl.arange(0, STEP)
    lane = i[:, None] * BLOCK + i[None, :]
    target = partial + tl.load(item + 13)
    if columns_of_A < 0:
        pair = work % pairs
        left = pair // side * BLOCK + i
        right = pair % side * BLOCK + i
        old_old = tl.zeros((BLOCK, BLOCK), tl.float64)
        new_old = tl.zeros((BLOCK, BLOCK), tl.float64)
        new_new = tl.zeros((BLOCK, BLOCK), tl.float64)
        begin = work // pairs * chunk
        for first in range(begin, tl.minimum(begin + chunk, d_out), STEP):
            rows = first + k
            known = rows < d_out
            new_left = tl.trans(factor_tile(item, rows, left, known, rank, d_out, NEW, PANEL, 0))
            old_left = tl.trans(factor_tile(item, rows, left, known, rank, d_out, OLD, 0, 3))
            new_right = factor_tile(item, rows, right, known, rank, d_out, NEW, PANEL, 0)
            old_right = factor_tile(item, rows, right, known, rank, d_out, OLD, 0, 3)
            old_old = tl.dot(old_left, old_right, old_old, out_dtype=tl.float64)
            new_old = tl.dot(new_left, old_right, new_old, out_dtype=tl.float64)
            new_new = tl.dot(new_left, new_right, new_new, out_dtype=tl.float64)
        at = target + (work // pairs * 3 * pairs + pair) * (BLOCK * BLOCK) + lane
        tl.store(at, old_old)
        tl.store(at + pairs * (BLOCK * BLOCK), new_old)
        tl.store(at + 2 * pairs * (BLOCK * BLOCK), new_new)
    elif columns_of_A < tl.cdiv(d_in, chunk) * pairs:
        pair = columns_of_A % pairs
        left = pair // side * BLOCK + i
        right = pair % side * BLOCK + i
        kernel = tl.zeros((BLOCK, BLOCK), tl.float64)
        pointer, row_stride, column_stride = load_view(item + 6, A, 0)
        begin = columns_of_A // pairs * chunk
        for first in range(begin, tl.minimum(begin + chunk, d_in), STEP):
            columns = first + k
            known = (columns < d_in)[None, :]
            a_left = tl.load(
                tile(pointer, row_stride, column_stride, left, columns), mask=(left < rank)[:, None] & known, other=0.0
            )
            a_right = tl.load(
                tile(pointer, row_stride, column_stride, right, columns),
                mask=(right < rank)[:, None] & known,
                other=0.0,
            )
            kernel = tl.dot(a_left.to(tl.float64), tl.trans(a_right.to(tl.float64)), kernel, out_dtype=tl.float64)
        tl.store(target + (3 * chunks * pairs + columns_of_A) * (BLOCK * BLOCK) + lane, kernel)


@triton.jit
def clamp(x, low, high):
    """As torch.clamp: NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def cosine_kernel(items, partial, squares, cosines, PROJECTED: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the chunks in order, block by block, and divides. PROJECTED: NaN unless V is finite and not 0."""
    item = items + tl.program_id(0) * ITEM
    chunk = tl.load(item + 12)
    side = tl.cdiv(tl.load(item + 11), BLOCK)
    pairs = side * side
    chunks = tl.cdiv(tl.load(item + 9), chunk)
    chunks_of_A = tl.cdiv(tl.load(item + 10), chunk)
    lane = tl.arange(0, BLOCK * BLOCK)
    source = partial + tl.load(item + 13) + lane
    over_A = source + 3 * chunks * pairs * (BLOCK * BLOCK)
    old_old = tl.zeros((BLOCK * BLOCK,), tl.float64)
    new_old = tl.zeros((BLOCK * BLOCK,), tl.float64)
    new_new = tl.zeros((BLOCK * BLOCK,), tl.float64)
    for pair in range(pairs):
        kernel = tl.zeros((BLOCK * BLOCK,), tl.float64)
        for q in range(chunks_of_A):
            kernel += tl.load(over_A + (q * pairs + pair) * (BLOCK * BLOCK))
        oo = tl.zeros((BLOCK * BLOCK,), tl.float64)
        no = tl.zeros((BLOCK * BLOCK,), tl.float64)
        nn = tl.zeros((BLOCK * BLOCK,), tl.float64)
        for q in range(chunks):
            at = source + (q * 3 * pairs + pair) * (BLOCK * BLOCK)
            oo += tl.load(at)
            no += tl.load(at + pairs * (BLOCK * BLOCK))
            nn += tl.load(at + 2 * pairs * (BLOCK * BLOCK))
        old_old += oo * kernel
        new_old += no * kernel
        new_new += nn * kernel
    new_norm = tl.sqrt(clamp(tl.sum(new_new, axis=0), 0.0, float("inf")))
    old_norm = tl.sqrt(clamp(tl.sum(old_old, axis=0), 0.0, float("inf")))
    norms = new_norm * old_norm
    result = tl.where(norms == 0, 0.0, clamp(tl.sum(new_old, axis=0) / norms, -1.0, 1.0))
    if PROJECTED:
        norm = frobenius_norm(squares + tl.load(item + 15), tl.load(item + 16))
        result = tl.where(norm > 0, result, float("nan"))
    tl.store(cosines + tl.load(item + 14), result)


class Item(NamedTuple):
    """One cosine.

    ``new`` is a view as in :func:`tables.view`, or (address, column, 0) in panels, ``place`` the index in the result;
    ``squares`` blocks from ``first_square`` on hold ‖V‖².
    """

    new: list[int]
    new_dtype: torch.dtype
    lora_B: Tensor
    lora_A: Tensor
    place: int
    first_square: int = 0
    squares: int = 0


def launches(
    items: Sequence[Item], cosines: Tensor, arch: str, squares: Tensor | None = None, panel: int = 0
) -> list[Launch]:
    """Writes ``cosines`` at the index of every item of rank 1 or more; with ``squares``, those of projections."""
    groups: dict[tuple[torch.dtype, torch.dtype, torch.dtype, config.Gram], list[Item]] = {}
    for item in items:
        rank = item.lora_B.shape[1]
        if rank:
            key = (item.new_dtype, item.lora_B.dtype, item.lora_A.dtype, config.gram(arch, rank))
            groups.setdefault(key, []).append(item)
    found = []
    for (new, old, a, (block, step, num_warps)), members in groups.items():
        table: list[int] = []
        size = most = 0
        for item in members:
            (d_out, rank), d_in = item.lora_B.shape, item.lora_A.shape[1]
            pairs = cdiv(rank, block) ** 2
            chunk = CHUNK * pairs
            table += [*item.new, *tables.view(item.lora_B), *tables.view(item.lora_A), d_out, d_in, rank, chunk]
            table += [size, item.place, item.first_square, item.squares, 0]
            size += (3 * cdiv(d_out, chunk) + cdiv(d_in, chunk)) * pairs * block * block
            most = max(most, (cdiv(d_out, chunk) + cdiv(d_in, chunk)) * pairs)
        (there,) = tables.upload(cosines.device, table)
        sums = torch.empty(max(size, 1), dtype=torch.float64, device=cosines.device)
        types = {"NEW": tables.TYPES[new], "OLD": tables.TYPES[old], "A": tables.TYPES[a]}
        constexprs = {**types, "PANEL": panel, "BLOCK": block, "STEP": step}
        options = {**OPTIONS, "num_warps": num_warps}
        if most:
            found.append(Launch(gram_kernel, (len(members) * most,), (there, sums, most), constexprs, options))
        args = (there, sums, sums if squares is None else squares, cosines)
        constexprs = {"PROJECTED": squares is not None, "BLOCK": block}
        found.append(Launch(cosine_kernel, (len(members),), args, constexprs, OPTIONS))
    return found


def update_cosine(lora_B_new: Sequence[Tensor], lora_B: Sequence[Tensor], lora_A: Sequence[Tensor]) -> Tensor:
    """The operator of that name."""
    check_same_length(lora_B_new=lora_B_new, lora_B=lora_B, lora_A=lora_A)
    if not lora_B:
        return torch.zeros(0, dtype=torch.float64)
    device = lora_B_new[0].device
    items = []
    for i, (new, old, a) in enumerate(zip(lora_B_new, lora_B, lora_A, strict=True)):
        check_matrix("lora_B_new", new, device, i)
        check_matrix("lora_B", old, device, i)
        check_matrix("lora_A", a, device, i)
        check_shape(f"lora_B_new[{i}]", new, tuple(old.shape), "that of lora_B")
        check_shape(f"lora_A[{i}]", a, (old.shape[1], a.shape[1]), "rank of lora_B, d_in")
        items.append(Item(tables.view(new), new.dtype, old, a, i))
    cosines = lora_B_new[0].new_full((len(items),), 0.0, dtype=torch.float64)
    tables.run(launches(items, cosines, config.target(device)), device)
    return cosines


Opcodes: TypeAlias = dict[str, tuple[str, ...]]  # by target
_TENSOR_CORES: Opcodes = {
    "sm_80": ("DMMA",),
    "sm_90": ("DMMA",),
    "sm_100": ("DMMA",),
    "gfx942": ("v_mfma_f64_16x16x4_f64",),
}
_PLAIN: Opcodes = {"sm_86": ("DFMA",), "sm_89": ("DFMA",), "sm_120": ("DFMA",)}


Types: TypeAlias = tuple[torch.dtype, torch.dtype, torch.dtype]  # of B_new, B and A


def example_items(shapes: Sequence[tuple[int, int, int]], types: Types) -> tuple[list[Item], list[Tensor], Tensor]:
    """Items of shapes (d_out, d_in, rank) with updates that are close to each other, their tensors, their cosines."""
    generator = torch.Generator().manual_seed(len(shapes))
    items, reachable, truths = [], [], []
    for index, (d_out, d_in, rank) in enumerate(shapes):
        old = torch.randn(d_out, rank, generator=generator)
        new = (old + torch.randn(d_out, rank, generator=generator)).to(types[0])
        old, a = old.to(types[1]), torch.randn(rank, d_in, generator=generator).to(types[2])
        items.append(Item(tables.view(new), types[0], old, a, index))
        reachable += [new, old, a]
        truths.append(reference.gram_cosine(new, old, a))
    return items, reachable, torch.stack(truths)


def example_partials(launch: Launch, factors: Sequence[Tensor]) -> Tensor:
    """What the Gram kernel has to leave for the cosine kernel, item by item."""
    block, found = launch.constexprs["BLOCK"], []
    for new, old, a in zip(factors[::3], factors[1::3], factors[2::3], strict=True):
        side = cdiv(old.shape[1], block)
        step = CHUNK * side * side

        def blocks(gram: Tensor, side: int = side) -> Tensor:
            more = side * block - len(gram)
            padded = torch.nn.functional.pad(gram, (0, more, 0, more))
            return padded.reshape(side, block, side, block).transpose(1, 2).flatten()

        for first in range(0, len(old), step):
            n, o = new[first : first + step].double(), old[first : first + step].double()
            found += [blocks(o.mT @ o), blocks(n.mT @ o), blocks(n.mT @ n)]
        for first in range(0, a.shape[1], step):
            part = a[:, first : first + step].double()
            found.append(blocks(part @ part.mT))
    return torch.cat(found)


def _example(kernel: Any, types: Types, arch: str, shapes: Sequence[tuple[int, int, int]]) -> Example:
    items, factors, truth = example_items(shapes, types)
    cosines = torch.full((len(items),), torch.nan, dtype=torch.float64)
    gram, cosine = launches(items, cosines, arch)
    partials = example_partials(gram, factors)
    if kernel is gram_kernel:
        return Example(list(gram.args), gram.grid, factors, lambda: close(gram.args[1], partials, 1e-13))
    gram.args[1].copy_(partials)
    return Example(list(cosine.args), cosine.grid, factors, lambda: close(cosines, truth, 1e-12))


def _entry(name: str, kernel: Any, types: Types, *shapes: Sequence[tuple[int, int, int]], opcodes: Opcodes) -> Entry:
    arch = next(iter(opcodes))
    gram, cosine = launches(example_items(shapes[0], types)[0], torch.zeros(len(shapes[0]), dtype=torch.float64), arch)
    launch = gram if kernel is gram_kernel else cosine
    return Entry(
        name,
        kernel,
        launch.signature(),
        launch.constexprs,
        launch.options,
        tuple(partial(_example, kernel, types, arch, group) for group in shapes),
        opcodes,
        wide_loads=False,
        targets=tuple(opcodes),
    )


_FP32, _BF16, _FP16, _FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
_SMALL = ([(130, 70, 8), (1, 1, 1), (64, 2100, 16)], [(1025, 3, 5)])
_LARGE = ([(70, 90, 40), (33, 65, 33)],)
_ANY: Opcodes = {target: () for target in TARGETS}


def _manifest() -> list[Entry]:
    return [
        _entry("gram_mixed", gram_kernel, (_FP32, _BF16, _FP16), *_SMALL, opcodes=_TENSOR_CORES),
        _entry("gram_mixed_plain", gram_kernel, (_FP32, _BF16, _FP16), *_SMALL, opcodes=_PLAIN),
        _entry("gram_large_fp64", gram_kernel, (_FP64, _FP64, _BF16), *_LARGE, opcodes=_TENSOR_CORES),
        _entry("gram_large_fp64_plain", gram_kernel, (_FP64, _FP64, _BF16), *_LARGE, opcodes=_PLAIN),
        _entry("cosine_small", cosine_kernel, (_FP32, _BF16, _FP16), *_SMALL, opcodes=_ANY),
        _entry("cosine_large", cosine_kernel, (_FP32, _FP32, _FP32), *_LARGE, opcodes=_ANY),
    ]


def __getattr__(name: str) -> list[Entry]:
    # The examples take time to draw, and a call of the operators has no use for them.
    if name != "ENTRIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = entries = _manifest()
    return entries
