"""Safe LoRA's projection ``B' = V (Vᵀ B) / ‖V‖_F``, ``V = aligned − base``, for many layers in one launch.

The columns of a layer are cut into strips. Per strip ``s``, one kind of task forms ``Y_s = V_sᵀ B`` (a block of
columns, a chunk of rows), another adds ``V_s Y_s`` to a block of rows of the accumulator, reading the strip again while
it is still in L2. Persistent programs draw the tasks in order from one counter, so that a task waits only for tasks
that some program already holds, whatever is resident. The order of all sums depends on the shapes alone.

Where both sides of a layer have ``SPLIT_FROM`` elements, V, B and Y are multiplied as two bf16 parts each, hi + lo, on
matrix units with fp32 accumulation; elsewhere, where the errors of the split would not average out, in fp32. Ranks fill
panels of 8 to 64 columns, each its own pass over a strip.

Source: Safe LoRA, arXiv 2405.16833, eq. for C = V Vᵀ / ‖V‖_F.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..validation import check_matrix, check_same_length, check_shape
from . import config, cosine, select, tables
from .aot import CUDA_TARGETS, TARGETS, Entry, Example, close
from .tables import Launch, cdiv, frobenius_norm, load_view, tile

SPLIT_FROM = 128
CHUNK = 512  # rows of one task of Y = VᵀB
STRIP_BYTES = 8 << 20  # of both weights; a few strips are live at a time
STRIP_COLUMNS = 2048
LAG = 2  # strips by which Y runs ahead of V Y
RING = 8  # strips that have Y and its partial sums in memory at a time
BUCKET = 16  # tickets per entry of the table that finds a ticket's step

LAYER = tl.constexpr(8)  # aligned 0-2, base 3-5, d_out, d_in
# layer, column, blocks, offsets of B, accumulator and Y, counters, squares, signals of its tasks
STRIP = tl.constexpr(10)
# matrix 0-2, d_out, rank, width, column, offsets of panels and accumulator, squares and their count, layer, result,
# index, whether it is the first of its layer
FACTOR = tl.constexpr(16)


@triton.jit
def halves(x):
    """``x`` as a sum of two bf16 numbers, each rounded to nearest."""
    hi = x.to(tl.bfloat16)
    return hi, (x - hi.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def multiply(v, x, acc, SPLIT: tl.constexpr):
    """``acc + v x``; with SPLIT, the columns of x and acc come in pairs (hi, lo) whose sum is meant."""
    if SPLIT:
        hi, lo = halves(v)
        acc = tl.dot(hi, x, acc)
        return tl.dot(lo, x, acc)
    else:
        return tl.dot(v, x, acc, input_precision="ieee")


@triton.jit
def merge(acc, SPLIT: tl.constexpr):
    """Adds the pairs of columns that SPLIT makes."""
    if SPLIT:
        hi, lo = tl.split(acc.reshape(acc.shape[0], acc.shape[1] // 2, 2))
        return hi + lo
    else:
        return acc


@triton.jit
def wait_until(counter, value):
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < value:
        pass


@triton.jit
def signal(counter, value):
    """Adds ``value`` for programs that wait on ``counter``, after all that this program wrote before."""
    tl.debug_barrier()
    return tl.atomic_add(counter, value, sem="acq_rel", scope="gpu")


@triton.jit
def panel_offset(rows, columns, d_out, R: tl.constexpr):
    """Where element (row, column) of a factor lies in panels of R columns, each d_out × R."""
    panel = (columns // R).to(tl.int64)[None, :]
    return (panel * d_out + rows[:, None]) * R + (columns % R)[None, :]


@triton.jit(do_not_specialize=["blocks"])
def pack_kernel(factors, packed, blocks, DTYPE: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    """Copies the factors into panels of R columns, zeros to the right; with SPLIT each number as a pair (hi, lo)."""
    factor = factors + tl.program_id(0) // blocks * FACTOR
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    pointer, row_stride, column_stride = load_view(factor, DTYPE, 0)
    d_out = tl.load(factor + 3)
    rank = tl.load(factor + 4)
    width = tl.load(factor + 5)
    column = tl.load(factor + 6)
    WIDTH: tl.constexpr = 2 if SPLIT else 1
    target = packed + tl.load(factor + 7)
    lane = tl.arange(0, 16 * WIDTH)
    for first in range(0, width, 16):
        j = first + tl.arange(0, 16)
        inside = (rows < d_out)[:, None] & (j < rank)[None, :]
        b = tl.load(tile(pointer, row_stride, column_stride, rows, j), mask=inside, other=0.0).to(tl.float32)
        to = first + lane // WIDTH
        offsets = panel_offset(rows, column + to, d_out, R) * WIDTH + (lane % WIDTH)[None, :]
        if SPLIT:
            hi, lo = halves(b)
            values = tl.join(hi, lo).reshape(ROWS, 16 * WIDTH)
        else:
            values = b
        tl.store(target + offsets, values, mask=(rows < d_out)[:, None] & (to < width)[None, :])


@triton.jit
def form_y(
    layer,
    strip,
    index,
    task,
    packed,
    y,
    partial,
    partial_squares,
    squares,
    arrived,
    ready,
    before,
    signals_before,
    slot_size,
    slot_squares,
    A: tl.constexpr,
    B: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Task of the first kind: a block of columns of ``Y = VᵀB`` over a chunk of rows, and the squares of V there.

    The last chunk of a block to arrive adds all of them in order.
    """
    N: tl.constexpr = 2 * R if SPLIT else R
    pa, a_row, a_column = load_view(layer, A, WIDE)
    pb, b_row, b_column = load_view(layer + 3, B, WIDE)
    d_out = tl.load(layer + 6).to(tl.int32)
    d_in = tl.load(layer + 7).to(tl.int32)
    if WIDE > 1:
        d_in = tl.multiple_of(d_in, WIDE)
    blocks = tl.load(strip + 2).to(tl.int32)
    block = task % blocks
    chunk = task // blocks
    x_at = tl.multiple_of(packed + tl.load(strip + 3), 16)
    columns = tl.multiple_of(tl.load(strip + 1).to(tl.int32), COLUMNS) + block * COLUMNS + tl.arange(0, COLUMNS)
    n = tl.arange(0, N)
    k = tl.arange(0, R)

    # The slot of Y and its partial sums was last used by the strip SLOTS before this one.
    wait_until(before, signals_before)
    acc = tl.zeros((COLUMNS, N), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    last = tl.minimum((chunk + 1) * CHUNK_ROWS, d_out)
    for first in tl.range(chunk * CHUNK_ROWS, last, ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < d_out)[:, None] & (columns < d_in)[None, :]
        a = tl.load(tile(pa, a_row, a_column, rows, columns), mask=inside, other=0.0)
        b = tl.load(tile(pb, b_row, b_column, rows, columns), mask=inside, other=0.0)
        x = tl.load(x_at + rows[:, None] * N + n[None, :], mask=(rows < d_out)[:, None], other=0.0)
        v = a.to(tl.float32) - b.to(tl.float32)
        square += v * v
        acc = multiply(tl.trans(v), x, acc, SPLIT)
    total = tl.sum(square.to(tl.float64))

    ring = (index % SLOTS).to(tl.int64)
    local = tl.arange(0, COLUMNS)
    offsets = local[:, None] * R + k[None, :]
    at = partial + ring * slot_size + block * (COLUMNS * R)
    squares_at = partial_squares + ring * slot_squares + block
    tl.store(at + chunk * blocks * (COLUMNS * R) + offsets, merge(acc, SPLIT))
    tl.store(squares_at + chunk * blocks, total)
    chunks = tl.cdiv(d_out, CHUNK_ROWS)
    if signal(arrived + block, 1) == chunks - 1:
        whole = tl.zeros((COLUMNS, R), tl.float32)
        total = tl.zeros((), tl.float64)
        for q in range(0, chunks, 4):
            for i in tl.static_range(4):
                at_q = (q + i) * blocks
                known = tl.full((COLUMNS, 1), q + i, tl.int32) < chunks
                whole += tl.load(at + at_q * (COLUMNS * R) + offsets, mask=known, other=0.0, cache_modifier=".cg")
                total += tl.load(squares_at + at_q, mask=q + i < chunks, other=0.0, cache_modifier=".cg")
        y_at = tl.multiple_of(y + tl.load(strip + 5), 16) + block * (COLUMNS * N)
        if SPLIT:
            hi, lo = halves(whole)
            values = tl.join(hi, lo).reshape(COLUMNS, N)
        else:
            values = whole
        tl.store(y_at + local[:, None] * N + n[None, :], values)
        square_at = tl.load(strip + 8)
        tl.store(squares + square_at + block, total, mask=square_at >= 0)
        signal(ready, 1)


@triton.jit
def apply_y(
    layer,
    strip,
    task,
    y,
    accumulator,
    ready,
    link,
    A: tl.constexpr,
    B: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Task of the second kind: adds ``V_s Y_s`` to a block of rows, after the strips to the left have done so."""
    N: tl.constexpr = 2 * R if SPLIT else R
    pa, a_row, a_column = load_view(layer, A, WIDE)
    pb, b_row, b_column = load_view(layer + 3, B, WIDE)
    d_out = tl.load(layer + 6).to(tl.int32)
    d_in = tl.load(layer + 7).to(tl.int32)
    if WIDE > 1:
        d_in = tl.multiple_of(d_in, WIDE)
    column = tl.multiple_of(tl.load(strip + 1).to(tl.int32), COLUMNS)
    blocks = tl.load(strip + 2).to(tl.int32)
    y_at = tl.multiple_of(y + tl.load(strip + 5), 16)
    rows = task * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.arange(0, N)

    wait_until(ready, blocks)
    acc = tl.zeros((BLOCK_ROWS, N), tl.float32)
    for first in tl.range(0, blocks * COLUMNS, STEP, num_stages=STAGES):
        local = first + tl.arange(0, STEP)
        columns = column + local
        inside = (rows < d_out)[:, None] & (columns < d_in)[None, :]
        a = tl.load(tile(pa, a_row, a_column, rows, columns), mask=inside, other=0.0)
        b = tl.load(tile(pb, b_row, b_column, rows, columns), mask=inside, other=0.0)
        x = tl.load(y_at + local[:, None] * N + n[None, :])
        acc = multiply(a.to(tl.float32) - b.to(tl.float32), x, acc, SPLIT)
    result = merge(acc, SPLIT)

    before = column // COLUMNS
    at = accumulator + tl.load(strip + 4) + rows[:, None] * R + tl.arange(0, R)[None, :]
    inside = (rows < d_out)[:, None]
    wait_until(link, before)
    known = (rows < tl.where(before > 0, d_out, 0))[:, None]
    result += tl.load(at, mask=known, other=0.0, cache_modifier=".cg")
    tl.store(at, result, mask=inside)
    signal(link, blocks)
    signal(ready, 1)


@triton.jit(do_not_specialize=["total", "first_ready", "first_link", "slot_size", "slot_squares"])
def main_kernel(
    layers,
    strips,
    steps,
    buckets,
    packed,
    y,
    accumulator,
    partial,
    partial_squares,
    squares,
    counters,
    total,
    first_ready,
    first_link,
    slot_size,
    slot_squares,
    A: tl.constexpr,
    B: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    TICKETS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``accumulator = V (Vᵀ B)`` and the squares of V by blocks of columns, for every layer of the table.

    ``steps`` holds (first ticket, 2·strip + kind) in the order of tickets, ``buckets`` the step of every TICKETS-th
    ticket. Counters: the next ticket; chunks arrived per block of Y; per strip the blocks of Y that are ready, and then
    the blocks of rows that are done with it; and per block of rows the blocks of columns that its accumulator holds.
    """
    ready = counters + first_ready
    ticket = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    while ticket < total:
        step = tl.load(buckets + ticket // TICKETS)
        while tl.load(steps + 2 * step + 2) <= ticket:
            step += 1
        task = (ticket - tl.load(steps + 2 * step)).to(tl.int32)
        code = tl.load(steps + 2 * step + 1)
        index = code // 2
        strip = strips + index * STRIP
        layer = layers + tl.load(strip) * LAYER
        if code % 2 == 0:
            earlier = tl.maximum(index - SLOTS, 0)
            signals_before = tl.load(strips + earlier * STRIP + 9).to(tl.int32)
            form_y(
                layer,
                strip,
                index,
                task,
                packed,
                y,
                partial,
                partial_squares,
                squares,
                counters + tl.load(strip + 6),
                ready + index,
                ready + earlier,
                tl.where(index < SLOTS, 0, signals_before),
                slot_size,
                slot_squares,
                A,
                B,
                WIDE,
                SPLIT,
                R,
                CHUNK_ROWS,
                SLOTS,
                ROWS,
                COLUMNS,
                STAGES,
            )
        else:
            link = counters + first_link + tl.load(strip + 7) + task
            apply_y(
                layer,
                strip,
                task,
                y,
                accumulator,
                ready + index,
                link,
                A,
                B,
                WIDE,
                SPLIT,
                R,
                COLUMNS,
                BLOCK_ROWS,
                STEP,
                STAGES,
            )
        ticket = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")


@triton.jit(do_not_specialize=["blocks"])
def finish_kernel(
    factors,
    squares,
    accumulator,
    v_norm,
    selected,
    blocks,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    FROBENIUS: tl.constexpr,
    SELECT: tl.constexpr,
):
    """``B' = accumulator / ‖V‖`` (1 without FROBENIUS), or with SELECT the factor itself where it is not selected."""
    factor = factors + tl.program_id(0) // blocks * FACTOR
    block = tl.program_id(0) % blocks
    rows = block * ROWS + tl.arange(0, ROWS)
    pointer, row_stride, column_stride = load_view(factor, DTYPE, 0)
    d_out = tl.load(factor + 3)
    rank = tl.load(factor + 4)
    column = tl.load(factor + 6)
    source = accumulator + tl.load(factor + 8)
    count = tl.load(factor + 10)
    out = tl.load(factor + 12).to(tl.pointer_type(OUT))
    norm = frobenius_norm(squares + tl.load(factor + 9), count)
    scale = tl.where(norm == 0, 0.0, 1 / norm) if FROBENIUS else tl.where(norm == norm, 1.0, norm)
    tl.store(v_norm + tl.load(factor + 11), norm, mask=(block == 0) & (tl.load(factor + 14) != 0))
    projected = tl.full((), 1, tl.int1)
    if SELECT:
        projected = tl.load(selected + tl.load(factor + 13)) != 0
    for first in range(0, rank, 16):
        j = first + tl.arange(0, 16)
        inside = (rows < d_out)[:, None] & (j < rank)[None, :]
        to = out + rows.to(tl.int64)[:, None] * rank + j[None, :]
        if projected:
            at = source + panel_offset(rows, column + j, d_out, R)
            known = inside & (rows < tl.where(count > 0, d_out, 0))[:, None]
            values = tl.load(at, mask=known, other=0.0) * scale.to(tl.float32)
            tl.store(to, values.to(OUT), mask=inside)
        else:
            kept = tl.load(tile(pointer, row_stride, column_stride, rows, j), mask=inside, other=0.0)
            tl.store(to, kept.to(OUT), mask=inside)


class Kind(NamedTuple):
    """What layers of one launch have in common; ``wide`` as in :func:`tables.load_view`."""

    aligned: torch.dtype
    base: torch.dtype
    wide: int
    split: bool
    rank: int


def kind(aligned: Tensor, base: Tensor, rank: int, arch: str) -> Kind:
    split = min(aligned.shape) >= SPLIT_FROM
    elements = 16 // min(aligned.element_size(), base.element_size())
    wide = elements if tables.is_wide(aligned, elements) and tables.is_wide(base, elements) else 0
    panels = config.panels(arch, split, aligned.element_size() == base.element_size() == 2)
    panel = next((r for r in panels if rank <= r), panels[-1])
    return Kind(aligned.dtype, base.dtype, wide, split, panel)


class Batch(NamedTuple):
    """The arguments of the operator, with the adapters of each layer, and what it returns."""

    aligned: Sequence[Tensor]
    base: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    lora_A: Sequence[Tensor]
    owned: list[list[int]]
    outputs: list[Tensor]
    v_norm: Tensor
    cosines: Tensor


class Plan:
    """The tables, the workspace and the launches for the layers ``members`` of a batch, all of one kind."""

    def __init__(self, batch: Batch, of: Kind, members: Sequence[int], arch: str) -> None:
        self.batch, self.kind, self.arch = batch, of, arch
        self.device = batch.v_norm.device
        self.bytes_per_pair = of.aligned.itemsize + of.base.itemsize
        self.tiles = config.project(arch, of.rank, of.split)
        self.pair = 2 if of.split else 1
        stored = torch.bfloat16 if of.split else torch.float32

        layer_table: list[int] = []
        weights: list[list[int]] = []  # of the layers that have elements
        records: dict[tuple[torch.dtype, torch.dtype], list[list[int]]] = {}
        size = squares = 0  # of the panels of factors, and of the blocks of columns, so far
        for here, layer in enumerate(members):
            aligned = batch.aligned[layer]
            d_out, d_in = aligned.shape
            owned = batch.owned[layer]
            layer_table += [*tables.view(aligned), *tables.view(batch.base[layer]), d_out, d_in]
            panels = max(1, cdiv(sum(batch.lora_B[f].shape[1] for f in owned), of.rank))
            blocks = cdiv(d_in, self.tiles.columns) if d_out else 0
            if blocks:
                weights.append([here, d_out, blocks, panels, size, squares])
            column = 0
            # A layer without adapters is projected for its norm alone.
            for place, f in enumerate(owned or [-1]):
                b, out = (batch.lora_B[f], batch.outputs[f]) if owned else (None, None)
                rank = b.shape[1] if b is not None else 0
                width = rank if place + 1 < len(owned) else panels * of.rank - column
                record = [*(tables.view(b) if b is not None else (0, 0, 0)), d_out, rank, width, column]
                record += [size * self.pair, size, squares, blocks, layer]
                record += [tables.address(out) if out is not None else 0, f, int(place == 0), 0]
                types = (b.dtype, out.dtype) if b is not None and out is not None else (torch.float32, torch.float32)
                records.setdefault(types, []).append(record)
                column += width
            size += panels * d_out * of.rank
            squares += blocks
        self.records = [record for of_type in records.values() for record in of_type]
        scheduled = self._schedule(torch.tensor(weights, dtype=torch.int64).reshape(-1, 6))
        factor_table = [entry for record in self.records for entry in record]
        uploaded = tables.upload(self.device, layer_table, factor_table, *scheduled)
        self.layer_table, self.factor_table, self.strips, self.steps, self.buckets = uploaded
        self.by_type: list[tuple[torch.dtype, torch.dtype, Tensor, int, int]] = []
        first = 0
        for (dtype, out_dtype), of_type in records.items():
            part = self.factor_table[first * FACTOR.value : (first + len(of_type)) * FACTOR.value]
            first += len(of_type)
            blocks = max(1, cdiv(max(record[3] for record in of_type), BLOCK))
            self.by_type.append((dtype, out_dtype, part, len(of_type), blocks))

        def workspace(elements: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(max(elements, 1), dtype=dtype, device=self.device)

        self.packed = workspace(size * self.pair, stored)
        self.accumulator = workspace(size, torch.float32)
        self.squares = workspace(squares, torch.float64)
        self.y = workspace(self.y_size, stored)
        self.partial = workspace(RING * self.slot_squares * self.tiles.columns * of.rank, torch.float32)
        self.partial_squares = workspace(RING * self.slot_squares, torch.float64)
        self.counters = torch.zeros(self.counters_size, dtype=torch.int32, device=self.device)

    def _schedule(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The strips of all layers, panels of one strip side by side, and the order in which tickets are drawn."""
        columns, n = self.tiles.columns, self.kind.rank * self.pair
        here, d_out, blocks, panels, offset, squares = weights.unbind(1)
        width = (STRIP_BYTES // (d_out * self.bytes_per_pair * columns)).clamp(1, STRIP_COLUMNS // columns)
        row_blocks = -(-d_out // self.tiles.block_rows)
        chunks = -(-d_out // CHUNK)
        count = -(-blocks // width) * panels

        owner = torch.repeat_interleave(torch.arange(len(here)), count)
        within = torch.arange(len(owner)) - _starts(count)[owner]
        panel = within % panels[owner]
        first = within // panels[owner] * width[owner]
        size = torch.minimum(width[owner], blocks[owner] - first)
        offset = offset[owner] + panel * d_out[owner] * self.kind.rank
        y_slot = int(size.max()) * columns * n if len(owner) else 0
        links = panels * row_blocks
        table = [
            here[owner],
            first * columns,
            size,
            offset * self.pair,
            offset,
            torch.arange(len(owner)) % RING * y_slot,
            1 + _starts(size),
            _starts(links)[owner] + panel * row_blocks[owner],
            torch.where(panel == 0, squares[owner] + first, -1),
            size + row_blocks[owner],
        ]
        self.y_size = min(len(owner), RING) * y_slot
        self.first_ready = 1 + int(size.sum())
        self.first_link = self.first_ready + len(owner)
        self.counters_size = self.first_link + int(links.sum())
        self.slot_squares = int((size * chunks[owner]).max()) if len(owner) else 0

        strip, lag = torch.arange(len(owner)), min(LAG, len(owner))
        forming = torch.where(strip < lag, strip, 2 * strip - lag)
        applying = torch.where(strip < len(owner) - lag, 2 * strip + lag + 1, strip + len(owner))
        tasks = torch.empty(2 * len(owner), dtype=torch.int64)
        codes = torch.zeros(2 * len(owner) + 1, dtype=torch.int64)
        tasks[forming], tasks[applying] = size * chunks[owner], row_blocks[owner]
        codes[forming], codes[applying] = 2 * strip, 2 * strip + 1
        self.tickets = int(tasks.sum())
        begins = torch.cat([_starts(tasks), torch.tensor([self.tickets])])
        buckets = torch.searchsorted(begins, torch.arange(0, self.tickets, BUCKET), right=True) - 1
        return torch.stack(table, dim=1), torch.stack([begins, codes], dim=1), buckets

    def project(self) -> list[Launch]:
        """``V (Vᵀ B)`` into the accumulator, and the squares of V."""
        of, launches = self.kind, []
        for dtype, _, part, factors, blocks in self.by_type:
            constexprs = {"DTYPE": tables.TYPES[dtype], "SPLIT": of.split, "R": of.rank, "ROWS": BLOCK}
            launches.append(Launch(pack_kernel, (factors * blocks,), (part, self.packed, blocks), constexprs, OPTIONS))
        if not self.tickets:
            return launches
        tiles = self.tiles
        args: tuple[Any, ...] = (self.layer_table, self.strips, self.steps, self.buckets)
        args += (self.packed, self.y, self.accumulator, self.partial, self.partial_squares, self.squares)
        args += (self.counters, self.tickets, self.first_ready, self.first_link)
        args += (self.slot_squares * tiles.columns * of.rank, self.slot_squares)
        constexprs = {
            "A": tables.TYPES[of.aligned],
            "B": tables.TYPES[of.base],
            "WIDE": of.wide,
            "SPLIT": of.split,
            "R": of.rank,
            "CHUNK_ROWS": CHUNK,
            "SLOTS": RING,
            "TICKETS": BUCKET,
            "COLUMNS": tiles.columns,
            "BLOCK_ROWS": tiles.block_rows,
        }
        programs = min(self.tickets, tiles.programs * config.processors(self.device))
        if config.AUTOTUNE:
            return [*launches, Launch(tuned_kernel(), (programs,), args, constexprs, {"enable_fp_fusion": True})]
        constexprs.update(ROWS=tiles.rows, STEP=tiles.step, STAGES=tiles.num_stages)
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True}
        if not of.split:
            options.update(config.roomy(self.arch))
        return [*launches, Launch(main_kernel, (programs,), args, constexprs, options)]

    def compare(self) -> list[Launch]:
        """The cosines, from the accumulator in fp32."""
        items = []
        for record in self.records:
            lora_A = self.batch.lora_A[record[13]]
            if record[13] >= 0 and lora_A.shape[0] > 0:
                panels = [tables.address(self.accumulator) + 4 * record[8], record[6], 0]
                lora_B = self.batch.lora_B[record[13]]
                items.append(cosine.Item(panels, torch.float32, lora_B, lora_A, record[13], record[9], record[10]))
        return cosine.launches(items, self.batch.cosines, self.arch, self.squares, self.kind.rank)

    def finish(self, normalize: str, selected: Tensor | None = None) -> list[Launch]:
        """The norms, and the results in their dtype: projected where ``selected`` is not 0, or everywhere."""
        launches = []
        for dtype, out_dtype, part, factors, blocks in self.by_type:
            constexprs = {
                "DTYPE": tables.TYPES[dtype],
                "OUT": tables.TYPES[out_dtype],
                "R": self.kind.rank,
                "ROWS": BLOCK,
                "FROBENIUS": normalize == "frobenius",
                "SELECT": selected is not None,
            }
            chosen = self.counters.view(torch.uint8) if selected is None else selected
            args = (part, self.squares, self.accumulator, self.batch.v_norm, chosen, blocks)
            launches.append(Launch(finish_kernel, (factors * blocks,), args, constexprs, OPTIONS))
        return launches


@functools.cache
def tuned_kernel() -> Any:
    """The main kernel with steps, stages and warps that Triton measures; the partition of the work stays the same."""
    configs = [
        triton.Config({"ROWS": step, "STEP": step, "STAGES": stages}, num_warps=warps, num_stages=stages)
        for step, stages, warps in ((32, 2, 4), (32, 3, 4), (32, 4, 4), (32, 3, 8), (16, 4, 4))
    ]
    key = ["A", "B", "WIDE", "SPLIT", "R"]
    return triton.autotune(configs, key, reset_to_zero=["counters"], cache_results=True)(main_kernel)


BLOCK = 64  # rows of one program that packs or finishes
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def _starts(sizes: Tensor) -> Tensor:
    return sizes.cumsum(0) - sizes


def _batch(
    aligned: Sequence[Tensor],
    base: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    layer_of: Sequence[int],
    out_dtype: torch.dtype | None,
) -> Batch:
    check_batch(aligned, base, lora_B, lora_A, layer_of)
    owned: list[list[int]] = [[] for _ in aligned]
    for f, layer in enumerate(layer_of):
        owned[layer].append(f)
    outputs = [b.new_empty(b.shape, dtype=out_dtype or b.dtype) for b in lora_B]
    v_norm = aligned[0].new_empty((len(aligned),), dtype=torch.float64)
    cosines = aligned[0].new_full((len(lora_B),), torch.nan, dtype=torch.float64)
    return Batch(aligned, base, lora_B, lora_A, owned, outputs, v_norm, cosines)


def plans(batch: Batch, arch: str | None = None) -> list[Plan]:
    """One plan for each kind of layer, with the tiles of ``arch``, by default that of the device."""
    arch = arch or config.target(batch.v_norm.device)
    groups: dict[Kind, list[int]] = {}
    for layer, (aligned, base) in enumerate(zip(batch.aligned, batch.base, strict=True)):
        rank = sum(batch.lora_B[f].shape[1] for f in batch.owned[layer])
        groups.setdefault(kind(aligned, base, rank, arch), []).append(layer)
    return [Plan(batch, of, members, arch) for of, members in groups.items()]


def project_layers(
    aligned: Sequence[Tensor],
    base: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    layer_of: Sequence[int],
    normalize: str = "frobenius",
    out_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The operator of that name."""
    if not aligned:
        return [], torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    batch = _batch(aligned, base, lora_B, lora_A, layer_of, out_dtype)
    for plan in plans(batch):
        tables.run([*plan.project(), *plan.compare(), *plan.finish(normalize)], plan.device)
    return batch.outputs, batch.v_norm, batch.cosines


def project_selected_layers(
    aligned: Sequence[Tensor],
    base: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    layer_of: Sequence[int],
    threshold: float | None = None,
    num_layers: int | None = None,
    rule: str = "strict",
    normalize: str = "frobenius",
    out_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The operator of that name: the factors are written once, after the selection, which stays on the device."""
    if not aligned:
        none = torch.zeros(0, dtype=torch.float64)
        return [], none, none.clone(), none.bool()
    batch = _batch(aligned, base, lora_B, lora_A, layer_of, out_dtype)
    work = plans(batch)
    for plan in work:
        tables.run([*plan.project(), *plan.compare()], plan.device)
    selected = select.select_layers(batch.cosines, threshold, num_layers, rule)
    for plan in work:
        tables.run(plan.finish(normalize, selected.view(torch.uint8)), plan.device)
    return batch.outputs, batch.v_norm, batch.cosines, selected


def check_batch(
    aligned: Sequence[Tensor],
    base: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    layer_of: Sequence[int],
) -> None:
    """What a raw call of the operator could get wrong, and a kernel would read past the end for."""
    check_same_length(aligned=aligned, base=base)
    check_same_length(lora_B=lora_B, lora_A=lora_A, layer_of=layer_of)
    for i, (a, b) in enumerate(zip(aligned, base, strict=True)):
        check_matrix("aligned", a, aligned[0].device, i)
        check_matrix("base", b, aligned[0].device, i)
        check_shape(f"base[{i}]", b, tuple(a.shape), "that of aligned")
    for f, (b, a, layer) in enumerate(zip(lora_B, lora_A, layer_of, strict=True)):
        if not 0 <= layer < len(aligned):
            raise ValueError(f"layer_of[{f}] = {layer} is no layer; there are {len(aligned)}")
        check_matrix("lora_B", b, aligned[0].device, f)
        check_matrix("lora_A", a, aligned[0].device, f)
        d_out, d_in = aligned[layer].shape
        check_shape(f"lora_B[{f}]", b, (d_out, b.shape[1]), "d_out of aligned, rank")
        if a.shape[0]:
            check_shape(f"lora_A[{f}]", a, (b.shape[1], d_in), "rank of lora_B, d_in of aligned")


Shape: TypeAlias = tuple[int, int, tuple[int, ...]]  # d_out, d_in, ranks of the adapters


class _Case:
    """A plan for random layers on the CPU, with what its kernels have to leave."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        types: tuple[torch.dtype, torch.dtype, torch.dtype],
        wide: bool,
        arch: str,
    ) -> None:
        generator = torch.Generator().manual_seed(len(shapes))

        def draw(rows: int, columns: int, size: float) -> Tensor:
            return size * torch.randn(rows, columns, generator=generator)

        aligned, base, lora_B, lora_A = [], [], [], []
        layer_of: list[int] = []
        for layer, (d_out, d_in, ranks) in enumerate(shapes):
            w = draw(d_out, d_in, 0.02)
            pair = [(w + draw(d_out, d_in, 0.004)).to(types[0]), w.to(types[1])]
            aligned.append(pair[0] if wide else pair[0].t().contiguous().t())
            base.append(pair[1] if wide else pair[1].t().contiguous().t())
            lora_B += [draw(d_out, rank, 0.01).to(types[2]) for rank in ranks]
            lora_A += [torch.zeros(0, d_in) for _ in ranks]
            layer_of += [layer] * len(ranks)
        self.batch = _batch(aligned, base, lora_B, lora_A, layer_of, None)
        (self.plan,) = plans(self.batch, arch)
        self.reachable = [*aligned, *base, *lora_B, *self.batch.outputs]
        plan = self.plan
        workspace = (plan.packed, plan.y, plan.accumulator, plan.squares, plan.partial, plan.partial_squares)
        for tensor in (*self.batch.outputs, self.batch.v_norm, *workspace):
            tensor.fill_(torch.nan)

        rank, self.norms, self.results = self.plan.kind.rank, [], []
        factors: list[Tensor] = []
        accumulators: list[Tensor] = []
        squares: list[Tensor] = []
        for a, w, owned in zip(aligned, base, self.batch.owned, strict=True):
            v = a.double() - w.double()
            together = torch.cat([lora_B[f].double() for f in owned], dim=1)
            projected = v @ (v.mT @ together)
            self.norms.append(v.norm())
            self.results += (projected / v.norm()).split([lora_B[f].shape[1] for f in owned], dim=1)
            for matrix, found in ((together, factors), (projected, accumulators)):
                padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % rank))
                found.append(padded.reshape(len(matrix), -1, rank).transpose(0, 1).flatten())
            squares += [part.square().sum() for part in v.split(self.plan.tiles.columns, dim=1)]
        self.accumulator, self.squares = torch.cat(accumulators), torch.stack(squares)
        self.packed = torch.cat(factors).float()
        if self.plan.kind.split:
            hi = self.packed.bfloat16()
            self.packed = torch.stack([hi, (self.packed - hi.float()).bfloat16()], dim=1).flatten()

    def launch(self, kernel: Any) -> Launch:
        every = [*self.plan.project(), *self.plan.finish("frobenius")]
        (found,) = [launch for launch in every if launch.kernel is kernel]
        return found

    def example(self, kernel: Any) -> Example:
        plan, launch = self.plan, self.launch(kernel)
        if kernel is main_kernel:
            plan.packed.copy_(self.packed)
        elif kernel is finish_kernel:
            plan.accumulator.copy_(self.accumulator)
            plan.squares.copy_(self.squares)
        grid = (min(launch.args[11], 4),) if kernel is main_kernel else launch.grid
        return Example(list(launch.args), grid, self.reachable, partial(self._check, kernel))

    def _check(self, kernel: Any) -> None:
        if kernel is pack_kernel:
            close(self.plan.packed, self.packed.double(), 0)
        elif kernel is main_kernel:
            close(self.plan.accumulator, self.accumulator, 1e-5)
            close(self.plan.squares, self.squares, 1e-6)
        else:
            close(self.batch.v_norm, torch.stack(self.norms), 1e-13)
            for result, truth in zip(self.batch.outputs, self.results, strict=True):
                close(result, truth, 2e-7)


def _example(
    kernel: Any, types: tuple[torch.dtype, torch.dtype, torch.dtype], wide: bool, arch: str, shapes: Sequence[Shape]
) -> Example:
    return _Case(shapes, types, wide, arch).example(kernel)


def _entry(
    name: str,
    kernel: Any,
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    *shapes: list[Shape],
    wide: bool = True,
    arch: str = "sm",
) -> Entry:
    case = _Case(shapes[0], types, wide, arch)
    launch, split = case.launch(kernel), case.plan.kind.split
    opcodes: dict[str, tuple[str, ...]] = {}
    targets: tuple[str, ...] = ()
    if kernel is main_kernel:
        rank = case.plan.kind.rank
        targets = tuple(t for t in CUDA_TARGETS if rank < 64 or t not in config.SMALL) if arch == "sm" else (arch,)
        if split:
            mfma = "v_mfma_f32_16x16x16_bf16" if rank == 8 else "v_mfma_f32_32x32x8_bf16"
            matrix = {**dict.fromkeys(TARGETS, "HMMA"), "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": mfma}
        else:
            mfma = "v_mfma_f32_32x32x2_f32" if rank == 32 else "v_mfma_f32_16x16x4_f32"
            matrix = {**dict.fromkeys(TARGETS, "FFMA"), "gfx942": mfma}
        opcodes = {target: (opcode,) for target, opcode in matrix.items()}
    return Entry(
        name,
        kernel,
        launch.signature(),
        launch.constexprs,
        launch.options,
        tuple(partial(_example, kernel, types, wide, arch, group) for group in shapes),
        opcodes,
        wide_loads=kernel is main_kernel and wide,
        targets=targets,
    )


def _entries(arch: str) -> list[Entry]:
    """The main kernel in its variants, with the tiles of an architecture."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16

    def entry(
        name: str, types: tuple[torch.dtype, torch.dtype, torch.dtype], *shapes: list[Shape], wide: bool = True
    ) -> Entry:
        return _entry(f"project_{name}_{arch}", main_kernel, types, *shapes, wide=wide, arch=arch)

    return [
        entry("bf16_r8", (bf16, bf16, bf16), [(136, 200, (8,)), (560, 136, (3, 2))], [(130, 136, (1,))]),
        entry("bf16_r16", (bf16, bf16, bf16), [(136, 2120, (16,))]),
        entry("bf16_r32", (bf16, bf16, bf16), [(200, 136, (20,))]),
        entry("bf16_r64", (bf16, bf16, bf16), [(136, 264, (100,))]),
        entry("fp16_r16", (fp16, fp16, bf16), [(136, 200, (16,))]),
        entry("fp32_r16", (fp32, fp32, fp32), [(136, 200, (16,)), (140, 132, (9,))]),
        entry("fp32_r32", (fp32, fp32, fp32), [(136, 132, (40,))]),
        entry("mixed", (bf16, fp32, fp16), [(136, 200, (12,))]),
        entry("strided", (bf16, bf16, fp32), [(133, 201, (16,)), (129, 131, (11,))], wide=False),
        entry(
            "small", (fp32, fp32, fp32), [(100, 60, (16,)), (600, 8, (3,)), (4, 300, (1,))], [(4, 8, (1,))] * (RING + 2)
        ),
        entry("small_r32", (fp32, fp32, fp32), [(100, 60, (100,))]),
        entry("small_strided", (bf16, bf16, bf16), [(5, 123, (3,)), (1, 1, (1,))], wide=False),
    ]


_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16


def _manifest() -> list[Entry]:
    return [
        *_entries("sm"),
        *_entries("gfx942"),
        _entry(
            "pack_split", pack_kernel, (_FP32, _FP32, _FP32), [(200, 136, (3, 5)), (130, 128, (8,))], [(129, 132, (7,))]
        ),
        _entry("pack_fp16", pack_kernel, (_FP32, _FP32, _FP16), [(70, 10, (3, 20))]),
        _entry("finish_fp32", finish_kernel, (_FP32, _FP32, _FP32), [(200, 136, (3, 5)), (130, 128, (8,))]),
        _entry("finish_bf16", finish_kernel, (_BF16, _BF16, _BF16), [(70, 10, (3, 20))]),
    ]


def __getattr__(name: str) -> list[Entry]:
    # The examples take time to draw, and a call of the operators has no use for them.
    if name != "ENTRIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = entries = _manifest()
    return entries
