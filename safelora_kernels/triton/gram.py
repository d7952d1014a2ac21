"""The Gram matrix of tall X applied to thin Z, ``Xᵀ diag(w) X Z``, for many layers in one launch.

X is cut into spans of rows. One kind of task forms a part of ``Y = X Z`` for a block of rows and a chunk of columns;
the last chunk of a block to arrive adds the parts in order and weighs the rows. Another forms ``X_spanᵀ (w ∘ Y_span)``
for a block of columns of a span; the last span of a layer to arrive adds them in order. Persistent programs draw tasks
in order from one counter: a task waits only for tasks that some program already holds, and a span is read for the
second time while it is still in L2. DRAM sees X once, the sums twice for every SPAN rows.

Products are exact or keep fp32 accuracy, as in :mod:`.salora`: Z and Y meet bf16 inputs as sums of three bf16 numbers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import reference
from . import config, tables
from .complement import precision, vector
from .project import signal, wait_until
from .salora import multiply
from .tables import Launch, cdiv, load_view, tile

ROWS = 64  # of a block at most
LENGTH = 512  # columns of a task of the first kind
COLUMNS = 64  # of a task of the second kind
SPAN = 512  # rows of such a task: enough for the sums to be few, few enough for X to stay in L2
MOST_SPANS = 64  # of a layer, whose sums the last of them to arrive adds
SUMS = 64 << 20  # bytes of them
PROGRAMS = 2  # per multiprocessor
WORKSPACE = 256 << 20  # bytes of everything in one launch

# x 0-2, z 3-5, weights, out, rows here, d, r, first row, offsets of parts, of Y and of sums, span, spans, two counters
GROUP = tl.constexpr(19)


@triton.jit
def load_part(pointer, row_stride, column_stride, rows, columns, n_rows, n_columns):
    """A tile in its own dtype, zero outside the matrix."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(tile(pointer, row_stride, column_stride, rows, columns), mask=inside, other=0.0)


@triton.jit(do_not_specialize=["n_tasks"])
def gram_apply_kernel(
    groups,
    tasks,
    parts,
    applied,
    sums,
    counters,
    n_tasks,
    X: tl.constexpr,
    Z: tl.constexpr,
    WIDE_X: tl.constexpr,
    WIDE_Z: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    LENGTH: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``out = Σ_span X_spanᵀ (w ∘ (X_span Z))`` in blocks of BR columns of Z.

    ``groups``: one row of GROUP entries for each span. ``tasks``: group, number, and 1 for the second kind, as
    ``group << 32 | number << 1 | kind``. ``counters``: tickets, then by table for each block of rows the chunks and for
    each span the blocks that have arrived, and for each block of a layer's columns the spans; zero before the launch.
    """
    along_t = tl.arange(0, BT)
    along_r = tl.arange(0, BR)
    along_d = tl.arange(0, BD)
    along_c = tl.arange(0, BC)
    row_tile = along_t[:, None] * BR + along_r[None, :]
    column_tile = along_c[:, None] * BR + along_r[None, :]
    ticket = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    while ticket < n_tasks:
        task = tl.load(tasks + ticket)
        number = ((task & 0xFFFFFFFF) >> 1).to(tl.int32)
        row = groups + (task >> 32) * GROUP
        x, x_row, x_column = load_view(row, X, WIDE_X)
        rows_here = tl.load(row + 8).to(tl.int32)
        d = tl.load(row + 9).to(tl.int32)
        r = tl.load(row + 10).to(tl.int32)
        if WIDE_X > 1:
            d = tl.multiple_of(d, WIDE_X)
        x += tl.load(row + 11) * x_row
        if WIDE_X > 1:
            x = tl.multiple_of(x, 16)
        y = tl.multiple_of(applied + tl.load(row + 13), 16)
        ready = counters + tl.load(row + 17)
        row_blocks = tl.cdiv(rows_here, BT)
        r_blocks = tl.cdiv(r, BR)
        size = r_blocks * (BT * BR)
        if task & 1 == 0:
            z, z_row, z_column = load_view(row + 3, Z, WIDE_Z)
            if WIDE_Z > 1:
                r = tl.multiple_of(r, WIDE_Z)
            chunks = tl.cdiv(d, LENGTH)
            row_block = number // chunks
            chunk = number % chunks
            rows = row_block * BT + along_t
            first = tl.multiple_of(chunk * LENGTH, LENGTH)
            length = tl.minimum(LENGTH, d - first)
            at = tl.multiple_of(parts + tl.load(row + 12), 16) + row_block.to(tl.int64) * chunks * size
            for r_block in range(r_blocks):
                rs = r_block * BR + along_r
                acc = tl.zeros((BT, BR), tl.float32)
                for start in tl.range(0, length, BD, num_stages=STAGES):
                    ds = first + start + along_d
                    values = load_part(x, x_row, x_column, rows, ds, rows_here, d)
                    factor = load_part(z, z_row, z_column, ds, rs, d, r)
                    acc += multiply(values, factor, PRECISION)
                tl.store(at + chunk * size + r_block * (BT * BR) + row_tile, acc)
            if signal(ready + 1 + row_block, 1) == chunks - 1:
                address = tl.load(row + 6)
                weights = address.to(tl.pointer_type(tl.float32)) + tl.load(row + 11)
                given = tl.where(address == 0, 0, rows_here)
                weight = tl.load(weights + rows, mask=rows < given, other=1.0)
                for r_block in range(r_blocks):
                    total = tl.zeros((BT, BR), tl.float32)
                    part = at + r_block * (BT * BR) + row_tile
                    for _ in range(chunks):
                        total += tl.load(part, cache_modifier=".cg")
                        part += size
                    tl.store(y + row_block * size + r_block * (BT * BR) + row_tile, total * weight[:, None])
                signal(ready, 1)
        else:
            columns = tl.multiple_of(number * BC, BC) + along_c
            span = tl.load(row + 15)
            spans = tl.load(row + 16).to(tl.int32)
            blocks = tl.cdiv(d, BC)
            of_span = blocks.to(tl.int64) * r_blocks * (BC * BR)
            sum_of = tl.multiple_of(sums + tl.load(row + 14), 16) + number.to(tl.int64) * r_blocks * (BC * BR)
            wait_until(ready, row_blocks)
            for r_block in range(r_blocks):
                acc = tl.zeros((BC, BR), tl.float32)
                for row_block in tl.range(0, row_blocks, num_stages=STAGES):
                    rows = row_block * BT + along_t
                    values = load_part(x, x_row, x_column, rows, columns, rows_here, d)
                    factor = tl.load(y + row_block * size + r_block * (BT * BR) + row_tile, cache_modifier=".cg")
                    acc += multiply(tl.trans(values), factor, PRECISION)
                tl.store(sum_of + span * of_span + r_block * (BC * BR) + column_tile, acc)
            if signal(counters + tl.load(row + 18) + number, 1) == spans - 1:
                out = tl.load(row + 7).to(tl.pointer_type(tl.float32))
                for r_block in range(r_blocks):
                    rs = r_block * BR + along_r
                    total = tl.zeros((BC, BR), tl.float32)
                    part = sum_of + r_block * (BC * BR) + column_tile
                    for _ in range(spans):
                        total += tl.load(part, cache_modifier=".cg")
                        part += of_span
                    inside = (columns < d)[:, None] & (rs < r)[None, :]
                    tl.store(out + columns.to(tl.int64)[:, None] * r + rs[None, :], total, mask=inside)
        ticket = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")


class Item(NamedTuple):
    """One application: weights fp32 of unit stride or None, out fp32 contiguous. Nothing in it is fp64 or empty."""

    x: Tensor
    z: Tensor
    weights: Tensor | None
    out: Tensor


class Plan(NamedTuple):
    """How a layer is cut; depends on its shape alone, as the order of summation does."""

    span: int
    spans: int
    ranks: int  # padded
    chunks: int
    blocks: int  # of columns

    def workspace(self, d: int) -> int:
        """Bytes."""
        rows = self.spans * self.span
        return 4 * self.ranks * ((self.chunks + 1) * rows + self.spans * self.blocks * COLUMNS)


def block_ranks(r: int) -> int:
    """Columns of Z in one block."""
    return 16 if r <= 16 else 32


def block_rows(dtype: torch.dtype, r: int) -> int:
    """Rows of X in one block, and its columns at a time; more of what is multiplied in parts would spill registers."""
    return ROWS if dtype == torch.bfloat16 and r <= 16 else ROWS // 2


def plan(tokens: int, d: int, r: int) -> Plan:
    ranks = cdiv(r, block_ranks(r)) * block_ranks(r)
    blocks = cdiv(d, COLUMNS)
    most = max(1, min(MOST_SPANS, SUMS // (4 * ranks * blocks * COLUMNS), cdiv(tokens, SPAN)))
    span = cdiv(cdiv(tokens, most), ROWS) * ROWS
    return Plan(span, cdiv(tokens, span), ranks, cdiv(d, LENGTH), blocks)


OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def launches(items: Sequence[Item], arch: str, programs: int, workspace: int = WORKSPACE) -> Iterator[Launch]:
    """One launch for each combination of dtypes, layouts and block of ranks, or more where they would take more than
    ``workspace`` bytes. The result of an item does not depend on the others."""
    groups: dict[Any, list[Item]] = {}
    sizes: dict[Any, int] = {}
    for item in items:
        (tokens, d), r = item.x.shape, item.z.shape[1]
        key = (item.x.dtype, item.z.dtype, vector(item.x), vector(item.z), block_ranks(r))
        size = plan(tokens, d, r).workspace(d)
        if key in groups and sizes[key] + size > workspace:
            yield _launch(groups.pop(key), key, arch, programs)
        if key not in groups:
            groups[key], sizes[key] = [], 0
        groups[key].append(item)
        sizes[key] += size
    for key, members in groups.items():
        yield _launch(members, key, arch, programs)


def _launch(items: Sequence[Item], key: Any, arch: str, programs: int) -> Launch:
    x_type, z_type, wide_x, wide_z, ranks = key
    block = block_rows(x_type, ranks)
    device = items[0].x.device
    rows, firsts, seconds = [], [], []
    parts = applied = sums = 0
    counters = 1
    for x, z, weights, out in items:
        (tokens, d), r = x.shape, z.shape[1]
        cut = plan(tokens, d, r)
        of_layer = counters
        counters += cut.blocks
        for span in range(cut.spans):
            first = span * cut.span
            here = min(cut.span, tokens - first)
            row_blocks = cdiv(here, block)
            row = [*tables.view(x), *tables.view(z), 0 if weights is None else tables.address(weights)]
            row += [tables.address(out), here, d, r, first, parts, applied, sums, span, cut.spans]
            rows.append([*row, counters, of_layer])
            counters += 1 + row_blocks
            parts += row_blocks * block * cut.chunks * cut.ranks
            applied += row_blocks * block * cut.ranks
            firsts.append(row_blocks * cut.chunks)
            seconds.append(cut.blocks)
        sums += cut.spans * cut.blocks * COLUMNS * cut.ranks
    task_table = tables.in_turns(torch.tensor(firsts), torch.tensor(seconds), programs)
    n_tasks = len(task_table)
    arguments = (
        *tables.upload(device, torch.tensor(rows, dtype=torch.int64), task_table),
        *(torch.empty(size, dtype=torch.float32, device=device) for size in (parts, applied, sums)),
        torch.zeros(counters, dtype=torch.int32, device=device),
        n_tasks,
    )
    constexprs = {
        "X": tables.TYPES[x_type],
        "Z": tables.TYPES[z_type],
        "WIDE_X": wide_x,
        "WIDE_Z": wide_z,
        "BT": block,
        "BR": ranks,
        "BD": block,
        "BC": COLUMNS,
        "LENGTH": LENGTH,
        "PRECISION": precision(arch),
        "STAGES": 2 if not wide_x or (x_type == torch.bfloat16 and ranks > 16) or arch.startswith("gfx") else 3,
    }
    return Launch(gram_apply_kernel, (min(programs, n_tasks),), arguments, constexprs, OPTIONS)


def gram_apply_layers(xs: Sequence[Tensor], zs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """The operator; items with anything in fp64 are left to the reference."""
    results: list[Tensor] = []
    items: list[Item] = []
    for x, z, weight in zip(xs, zs, weights, strict=True):
        if torch.float64 in (x.dtype, z.dtype, weight.dtype):
            results += reference.gram_apply_layers([x], [z], [weight])
            continue
        results.append(z.new_empty(z.shape, dtype=torch.float32))
        if not z.numel():
            continue
        if x.shape[0] == 0:
            results[-1].zero_()
            continue
        given = weight.float().contiguous() if weight.numel() else None
        items.append(Item(x, z, given, results[-1]))
    if items:
        device = xs[0].device
        programs = PROGRAMS * config.processors(device)
        tables.run(launches(items, config.target(device), programs), device)
    return results
