"""The complement of a subspace, ``Y = X − U (Uᵀ X)`` or ``Y = X − (X U) Uᵀ``, for many pairs in one launch.

X is cut into blocks of columns (left; of rows on the right), each block into chunks along d. One kind of task forms a
chunk's part of the block's coefficients ``C = Uᵀ X``; the last of them to arrive adds the parts in order. Another
forms ``X − U C`` on a chunk and owns what it overwrites, so that writing in place is safe. Persistent programs draw
tasks in order from one counter: a task waits only for tasks that some program already holds, and a chunk is read for
the second time while it is still in L2. DRAM sees X and U once and Y once.

Source: C = I − U Uᵀ of SaLoRA, arXiv 2501.01765.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import reference
from . import config, tables
from .project import signal, wait_until
from .tables import Launch, cdiv, load_view, tile

CHUNK = 256  # elements along d of one task
STEP = 32  # of which so many at a time
BASIS_COLUMNS = 32  # of a block of coefficients
PROGRAMS = 4  # per multiprocessor
WORKSPACE = 256 << 20  # bytes of partial sums in one launch

GROUP = tl.constexpr(16)  # x 0-2, u 3-5, y 6-8, d, m, k, first column, offset of partials, offset of C, chunks


@triton.jit
def load_tile(pointer, row_stride, column_stride, rows, columns, n_rows, n_columns):
    """The fp32 values of a tile, zero outside the matrix."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(tile(pointer, row_stride, column_stride, rows, columns), mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_groups", "n_tasks"])
def project_out_kernel(
    groups,
    tasks,
    partials,
    coefficients,
    counters,
    n_groups,
    n_tasks,
    X: tl.constexpr,
    U: tl.constexpr,
    Y: tl.constexpr,
    WIDE_X: tl.constexpr,
    WIDE_U: tl.constexpr,
    WIDE_Y: tl.constexpr,
    RIGHT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    LENGTH: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``Y = X − U C`` with ``C = Uᵀ X`` in blocks of BK × BM; with RIGHT ``Yᵀ = Xᵀ − U C`` and ``C = Uᵀ Xᵀ``.

    ``groups``: one row of GROUP entries for each block of columns. ``tasks``: group, chunk, and 1 for the second kind,
    as ``group << 32 | chunk << 1 | kind``. ``counters``: tickets, then for each group the chunks that have arrived and
    whether C is there; zero before the launch.
    """
    block = tl.arange(0, BK)[:, None] * BM + tl.arange(0, BM)[None, :]
    along_d = tl.arange(0, BD)
    along_k = tl.arange(0, BK)
    ticket = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    while ticket < n_tasks:
        task = tl.load(tasks + ticket)
        group = task >> 32
        chunk = ((task & 0xFFFFFFFF) >> 1).to(tl.int32)
        row = groups + group * GROUP
        x, x_row, x_column = load_view(row, X, WIDE_X)
        u, u_row, u_column = load_view(row + 3, U, WIDE_U)
        y, y_row, y_column = load_view(row + 6, Y, WIDE_Y)
        d = tl.load(row + 9).to(tl.int32)
        m = tl.load(row + 10).to(tl.int32)
        k = tl.load(row + 11).to(tl.int32)
        if RIGHT:
            # X and Y are read as their transposes.
            x_row, x_column = x_column, x_row
            y_row, y_column = y_column, y_row
            if WIDE_X > 1:
                d = tl.multiple_of(d, WIDE_X)
        elif WIDE_X > 1:
            m = tl.multiple_of(m, WIDE_X)
        if WIDE_U > 1:
            k = tl.multiple_of(k, WIDE_U)
        columns = tl.multiple_of(tl.load(row + 12).to(tl.int32), 16) + tl.arange(0, BM)
        parts = tl.multiple_of(partials + tl.load(row + 13), 16)
        c = tl.multiple_of(coefficients + tl.load(row + 14), 16)
        chunks = tl.load(row + 15).to(tl.int32)
        arrived = counters + 1 + group
        ready = arrived + n_groups
        k_blocks = tl.cdiv(k, BK)
        size = k_blocks * (BK * BM)
        first = tl.multiple_of(chunk * LENGTH, LENGTH)
        length = tl.minimum(LENGTH, d - first)
        if task & 1 == 0:
            for k_block in range(k_blocks):
                ks = k_block * BK + along_k
                acc = tl.zeros((BK, BM), tl.float32)
                for start in tl.range(0, length, BD, num_stages=STAGES):
                    ds = first + start + along_d
                    basis = load_tile(u, u_row, u_column, ds, ks, d, k)
                    values = load_tile(x, x_row, x_column, ds, columns, d, m)
                    acc += tl.dot(tl.trans(basis), values, input_precision=PRECISION, max_num_imprecise_acc=1)
                tl.store(parts + chunk.to(tl.int64) * size + k_block * (BK * BM) + block, acc)
            if signal(arrived, 1) == chunks - 1:
                for k_block in range(k_blocks):
                    total = tl.zeros((BK, BM), tl.float32)
                    at = parts + k_block * (BK * BM) + block
                    for _ in range(chunks):
                        total += tl.load(at, cache_modifier=".cg")
                        at += size
                    tl.store(c + k_block * (BK * BM) + block, total)
                signal(ready, 1)
        else:
            wait_until(ready, 1)
            steps = tl.maximum(k_blocks, 1)
            rest = tl.zeros((BD, BM), tl.float32)
            for step in tl.range(0, tl.cdiv(length, BD) * steps, num_stages=STAGES):
                k_block = step % steps
                ks = k_block * BK + along_k
                ds = first + step // steps * BD + along_d
                # x counts for the first block of k alone, the result leaves after the last.
                m_read = tl.where(k_block == 0, m, 0)
                m_written = tl.where(k_block == steps - 1, m, 0)
                basis = load_tile(u, u_row, u_column, ds, ks, d, k)
                at = k_block * (BK * BM) + block
                coefficient = tl.load(c + at, mask=at < size, other=0.0, cache_modifier=".cg")
                values = load_tile(x, x_row, x_column, ds, columns, d, m_read)
                known = tl.dot(basis, coefficient, input_precision=PRECISION)
                rest = tl.where(k_block == 0, values, rest) - known
                inside = (ds < d)[:, None] & (columns < m_written)[None, :]
                tl.store(tile(y, y_row, y_column, ds, columns), rest.to(Y), mask=inside)
        ticket = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")


class Pair(NamedTuple):
    """X, U and where Y goes; ``out`` is x itself to write in place. Nothing in it is fp64."""

    x: Tensor
    basis: Tensor
    out: Tensor


def precision(arch: str) -> str:
    """How fp32 operands are multiplied: AMD's matrix units take them whole, NVIDIA's as three tf32 products."""
    return "ieee" if arch.startswith("gfx") else "tf32x3"


def vector(matrix: Tensor) -> int:
    """Elements in the 16-byte vectors that the rows of a matrix are made of; 0 where they are not."""
    elements = 16 // matrix.element_size()
    return elements if tables.is_wide(matrix, elements) else 0


def block_columns(m: int) -> int:
    """Columns of X (left; rows on the right) in one block."""
    return 16 if m <= 16 else 32


OPTIONS = {"num_warps": 2, "num_stages": 3, "enable_fp_fusion": True}


def launches(
    pairs: Sequence[Pair], side: str, arch: str, programs: int, workspace: int = WORKSPACE
) -> Iterator[Launch]:
    """One launch for each combination of dtypes, layouts and block columns, or more where the partial sums would take
    more than ``workspace`` bytes. The result of a pair does not depend on the other pairs."""
    groups: dict[Any, list[Pair]] = {}
    sizes: dict[Any, int] = {}
    for pair in pairs:
        if not pair.x.numel():
            continue
        m = pair.x.shape[1] if side == "left" else pair.x.shape[0]
        d, k = pair.basis.shape
        columns = block_columns(m)
        key = (tuple(t.dtype for t in pair), tuple(vector(t) for t in pair), columns)
        size = 4 * cdiv(d, CHUNK) * cdiv(k, BASIS_COLUMNS) * BASIS_COLUMNS * cdiv(m, columns) * columns
        if key in groups and sizes[key] + size > workspace:
            yield _launch(groups.pop(key), key, side, arch, programs)
        if key not in groups:
            groups[key], sizes[key] = [], 0
        groups[key].append(pair)
        sizes[key] += size
    for key, members in groups.items():
        yield _launch(members, key, side, arch, programs)


def _launch(pairs: Sequence[Pair], key: Any, side: str, arch: str, programs: int) -> Launch:
    types, vectors, columns = key
    device = pairs[0].x.device
    rows = []
    for x, basis, out in pairs:
        d, k = basis.shape
        m = x.shape[1] if side == "left" else x.shape[0]
        rows.append([*tables.view(x), *tables.view(basis), *tables.view(out), d, m, k, 0, 0, 0, cdiv(d, CHUNK)])
    items = torch.tensor(rows, dtype=torch.int64)
    group_table, block = tables.expanded(items, (items[:, 10] + columns - 1) // columns)
    group_table[:, 12] = block * columns
    sizes = (group_table[:, 11] + BASIS_COLUMNS - 1) // BASIS_COLUMNS * (BASIS_COLUMNS * columns)
    chunks = group_table[:, 15]
    group_table[:, 13] = tables.starts(sizes * chunks)
    group_table[:, 14] = tables.starts(sizes)
    task_table = tables.in_turns(chunks, chunks, programs)
    n_groups, n_tasks = len(group_table), len(task_table)
    on_device = tables.upload(device, group_table, task_table)
    arguments = (
        *on_device,
        torch.empty(max(int((sizes * chunks).sum()), 1), dtype=torch.float32, device=device),
        torch.empty(max(int(sizes.sum()), 1), dtype=torch.float32, device=device),
        torch.zeros(1 + 2 * n_groups, dtype=torch.int32, device=device),
        n_groups,
        n_tasks,
    )
    x, u, y = (tables.TYPES[dtype] for dtype in types)
    constexprs = {
        "X": x,
        "U": u,
        "Y": y,
        "WIDE_X": vectors[0],
        "WIDE_U": vectors[1],
        "WIDE_Y": vectors[2],
        "RIGHT": side == "right",
        "BM": columns,
        "BK": BASIS_COLUMNS,
        "BD": STEP,
        "LENGTH": CHUNK,
        "PRECISION": precision(arch),
        "STAGES": 4 if all(vectors) and columns == 16 and not arch.startswith("gfx") else 2,
    }
    return Launch(project_out_kernel, (min(programs, n_tasks),), arguments, constexprs, OPTIONS)


def project_out_into(outs: Sequence[Tensor], xs: Sequence[Tensor], bases: Sequence[Tensor], side: str) -> None:
    """The complement of each pair written to ``outs``: the xs, or tensors of any dtype. Nothing may be fp64."""
    if not xs:
        return
    device = xs[0].device
    programs = PROGRAMS * config.processors(device)
    pairs = [Pair(*pair) for pair in zip(xs, bases, outs, strict=True)]
    tables.run(launches(pairs, side, config.target(device), programs), device)


def project_out_layers(xs: Sequence[Tensor], bases: Sequence[Tensor], side: str = "left") -> list[Tensor]:
    """The operator; pairs with anything in fp64 are left to the reference."""
    wide = [torch.float64 in (x.dtype, basis.dtype) for x, basis in zip(xs, bases, strict=True)]
    results = [x if is_wide else x.new_empty(x.shape) for x, is_wide in zip(xs, wide, strict=True)]
    narrow = [i for i, is_wide in enumerate(wide) if not is_wide]
    project_out_into([results[i] for i in narrow], [xs[i] for i in narrow], [bases[i] for i in narrow], side)
    for i, is_wide in enumerate(wide):
        if is_wide:
            results[i] = reference.project_out_layers([xs[i]], [bases[i]], side)[0]
    return results


def project_out_layers_(xs: Sequence[Tensor], bases: Sequence[Tensor], side: str = "left") -> None:
    """The operator; pairs with anything in fp64 are left to the reference."""
    narrow = []
    for i, (x, basis) in enumerate(zip(xs, bases, strict=True)):
        if torch.float64 in (x.dtype, basis.dtype):
            reference.project_out_layers_([x], [basis], side)
        else:
            narrow.append(i)
    written = [xs[i] for i in narrow]
    project_out_into(written, written, [bases[i] for i in narrow], side)


LAUNCHERS: dict[str, Callable[..., Any]] = {
    "project_out_layers": project_out_layers,
    "project_out_layers_": project_out_layers_,
}
