"""Which layers to project, decided on the device: below a threshold, or the K smallest cosines.

A layer is among the K smallest if fewer than K come before it, so counting replaces sorting: n² comparisons for n
layers, without a second pass and without the host.

Source: Safe LoRA, arXiv 2405.16833, and the authors' code for the rounding and the ties.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import struct
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..types import Rule
from . import config, tables
from .aot import Entry, Example
from .tables import Launch, cdiv

BLOCK = 128  # cosines of one program
STEP = 16  # with which it compares them at a time


@triton.jit
def rounded(x, AUTHORS: tl.constexpr):
    """``x``, or with AUTHORS its nearest multiple of 1e-5, ties to even as torch.round has them."""
    if AUTHORS:
        scaled = x * 1e5
        # Adding 1.5·2⁵² rounds to an integer; from 2⁵¹ on there is nothing to round.
        shift: tl.constexpr = 6755399441055744.0
        nearest = (scaled + shift) - shift
        return tl.where(tl.abs(scaled) < 2251799813685248.0, nearest, scaled) / 1e5
    else:
        return x


@triton.jit(do_not_specialize=["stride", "n", "bound"])
def select_kernel(
    cosines,
    selected,
    stride,
    n,
    bound: tl.int64,
    COUNT: tl.constexpr,
    AUTHORS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """``rounded(cosine) <= bound``, ``bound`` being the bits of an fp64; with COUNT, fewer than ``bound`` come before.

    Without AUTHORS a tie comes before at a lower index. A NaN comes before nothing and is never selected.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = rounded(tl.load(cosines + i * stride, mask=i < n, other=float("nan")).to(tl.float64), AUTHORS)
    if COUNT:
        before = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, n, STEP):
            j = first + tl.arange(0, STEP)
            other = rounded(tl.load(cosines + j * stride, mask=j < n, other=float("nan")).to(tl.float64), AUTHORS)
            precedes = other[None, :] < mine[:, None]
            if not AUTHORS:
                precedes = precedes | ((other[None, :] == mine[:, None]) & (j[None, :] < i[:, None]))
            before += tl.sum(precedes.to(tl.int32), axis=1)
        chosen = (before.to(tl.int64) < bound) & (mine == mine)
    else:
        chosen = mine <= bound.to(tl.int64).to(tl.float64, bitcast=True)
    tl.store(selected + i, chosen.to(tl.uint8), mask=i < n)


def launches(
    cosines: Tensor, selected: Tensor, threshold: float | None, num_layers: int | None, rule: str
) -> list[Launch]:
    """``selected`` is (n,) uint8."""
    n = len(cosines)
    if not n:
        return []
    bound = num_layers if threshold is None else struct.unpack("<q", struct.pack("<d", threshold))[0]
    constexprs = {"COUNT": threshold is None, "AUTHORS": rule == "authors", "BLOCK": BLOCK, "STEP": STEP}
    args = (cosines, selected, cosines.stride(0), n, bound)
    # x·1e5 + 1.5·2⁵² must round twice.
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    options.update(config.roomy(config.target(cosines.device)))
    return [Launch(select_kernel, (cdiv(n, BLOCK),), args, constexprs, options)]


def select_layers(
    cosines: Tensor, threshold: float | None = None, num_layers: int | None = None, rule: str = "strict"
) -> Tensor:
    """The operator of that name."""
    check_selection(threshold, num_layers, rule)
    if cosines.dim() != 1:
        raise ValueError(f"cosines must be 1-D, got shape {tuple(cosines.shape)}")
    selected = cosines.new_empty(cosines.shape, dtype=torch.bool)
    tables.run(launches(cosines, selected.view(torch.uint8), threshold, num_layers, rule), cosines.device)
    return selected


def check_selection(threshold: float | None, num_layers: int | None, rule: str) -> None:
    """What a raw call of the operator could get wrong."""
    if (threshold is None) == (num_layers is None):
        raise ValueError("give exactly one of threshold and num_layers")
    if num_layers is not None and num_layers < 0:
        raise ValueError(f"num_layers must be 0 or more, got {num_layers}")
    if rule not in ("strict", "authors"):
        raise ValueError(f"rule must be 'strict' or 'authors', got {rule!r}")


def _example(dtype: torch.dtype, n: int, threshold: float | None, num_layers: int | None, rule: Rule) -> Example:
    """Cosines with ties, near-ties and NaN among them."""
    cosines = torch.rand(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    cosines[::3] = cosines[n // 2].clone()
    cosines[1::7] = cosines[n // 2] + 3e-6
    cosines[5::11] = torch.nan
    truth = reference.select_layers(cosines, threshold=threshold, num_layers=num_layers, rule=rule)
    selected = torch.full((n,), 255, dtype=torch.uint8)
    (launch,) = launches(cosines, selected, threshold, num_layers, rule)

    def check() -> None:
        if not torch.equal(selected, truth.to(torch.uint8)):
            raise AssertionError(f"selected {selected.tolist()}, expected {truth.tolist()}")

    return Example(list(launch.args), launch.grid, [], check)


def _entry(name: str, dtype: torch.dtype, rule: Rule, *criteria: tuple[int, float | None, int | None]) -> Entry:
    n, threshold, num_layers = criteria[0]
    (launch,) = launches(torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=torch.uint8), threshold, num_layers, rule)
    examples = tuple(partial(_example, dtype, *criterion, rule) for criterion in criteria)
    types = launch.signature()
    return Entry(name, select_kernel, types, launch.constexprs, launch.options, examples, {}, wide_loads=False)


def _manifest() -> list[Entry]:
    return [
        _entry("select_threshold", torch.float64, "strict", (300, 0.4, None), (1, 0.0, None), (7, 1.0, None)),
        _entry("select_threshold_authors", torch.float64, "authors", (300, 0.35, None)),
        _entry("select_lowest", torch.float64, "strict", (300, None, 40), (5, None, 9), (33, None, 0)),
        _entry("select_lowest_authors", torch.float32, "authors", (300, None, 40), (17, None, 1)),
    ]


def __getattr__(name: str) -> list[Entry]:
    # The examples take time to draw, and a call of the operators has no use for them.
    if name != "ENTRIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = entries = _manifest()
    return entries
