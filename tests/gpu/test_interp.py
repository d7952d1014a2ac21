"""The repairs of the interpreter: each case is right with them and wrong without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

from .interpreted import HERE

pytestmark = pytest.mark.interpreted

if HERE:
    from . import interp


@pytest.fixture(params=[True, False], ids=["repaired", "as_it_comes"])
def repaired(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(interpreter.interpreter_builder, "__class__", interpreter.InterpreterBuilder)
    return bool(request.param)


@triton.jit
def _cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def _multiply_add(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(y + i, value * value + value)


@triton.jit
def _negate(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, -tl.load(x + i))


@triton.jit
def _fma(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(y + i, tl.fma(value, value, value))


@triton.jit
def _less(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(y + i, tl.where(value < -value, 1.0, 0.0))


@triton.jit
def _dot(x, y, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    value = tl.load(x + at)
    tl.store(y + at, tl.dot(value, value, input_precision=PRECISION))


@triton.jit
def _sum(x, y, N: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, N)), axis=0))


@triton.jit
def _copy(x, y, n, N: tl.constexpr, MASKED: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i, mask=i < n) if MASKED else tl.load(x + i)
    tl.store(y + i, value, mask=i < n)


@triton.jit
def _store(x, y, N: tl.constexpr):
    tl.store(y + tl.arange(0, N), 1.0)


@triton.jit
def _count(x, y):
    tl.atomic_add(y + 1, 1)


@triton.jit
def _through_table(table, y, N: tl.constexpr):
    x = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(y + tl.arange(0, N), tl.load(x + tl.arange(0, N)))


def values(dtype: torch.dtype, count: int = 256) -> Tensor:
    special = torch.tensor([0.0, -0.0, 1e-40, 1e-30, 6e-5, 3e-8, 65504.0, 1e38, torch.inf, -torch.inf])
    return torch.cat([torch.randn(count - len(special)), special]).to(dtype)


CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.bfloat16),
    (torch.int32, torch.bfloat16),
]


@pytest.mark.parametrize(("source", "target"), CASTS, ids=lambda dtype: str(dtype)[6:])
def test_casts_round(repaired: bool, source: torch.dtype, target: torch.dtype) -> None:
    x = values(source) if source.is_floating_point and target.is_floating_point else torch.arange(256).to(source)
    y = torch.zeros(256, dtype=target)
    _cast[(1,)](x, y, N=256)
    expected = x.float().to(target) if source == torch.float64 else x.to(target)
    assert torch.equal(y, expected) == repaired


OPERATIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "multiply_add": (_multiply_add, lambda x: (x * x) + x),
    "negate": (_negate, lambda x: -x),
    "fma": (_fma, lambda x: (x.double() * x.double() + x.double()).float().bfloat16()),
    "less": (_less, lambda x: (x < -x).bfloat16()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_bf16_is_computed_as_numbers(repaired: bool, name: str) -> None:
    kernel, reference = OPERATIONS[name]
    x, y = torch.randn(256).bfloat16(), torch.zeros(256, dtype=torch.bfloat16)
    kernel[(1,)](x, y, N=256)
    assert torch.equal(y, reference(x)) == repaired


def test_bf16_dot(repaired: bool) -> None:
    x, y = torch.randn(64, 64).bfloat16(), torch.zeros(64, 64)
    _dot[(1,)](x, y, N=64, PRECISION="tf32")
    expected = x.double() @ x.double()
    assert (float((y - expected).norm() / expected.norm()) < 1e-6) == repaired


def test_tf32_dot_rounds_its_operands(repaired: bool) -> None:
    x, y = torch.randn(64, 64), torch.zeros(64, 64)
    expected = x.double() @ x.double()
    _dot[(1,)](x, y, N=64, PRECISION="tf32")
    error = float((y - expected).norm() / expected.norm())
    assert (1e-4 < error < 1e-3) == repaired
    _dot[(1,)](x, y, N=64, PRECISION="tf32x3")
    assert float((y - expected).norm() / expected.norm()) < 1e-6


def test_bf16_sum_is_refused() -> None:
    with pytest.raises(Exception, match="cast to fp32 first"):
        _sum[(1,)](torch.ones(8).bfloat16(), torch.zeros(1, dtype=torch.bfloat16), N=8)


def test_access_outside_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    heap = torch.zeros(64)
    x, y = heap[:24], heap[32:56]
    for kernel, args, what in [
        (_copy, (x, y, 24, 32, False), r"load of 8 element"),
        (_copy, (x, y, 25, 32, True), r"load of 1 element"),
        (_store, (x, y, 32), r"store of 8 element"),
        (_count, (x, torch.zeros(2, dtype=torch.int32)[:1]), r"atomic of 1 element"),
    ]:
        with pytest.raises(Exception, match=f"out-of-bounds {what}"):
            kernel[(1,)](*args)
    _copy[(1,)](x, y, 24, 32, True)
    monkeypatch.setattr(interpreter.interpreter_builder, "__class__", interpreter.InterpreterBuilder)
    _copy[(1,)](x, y, 24, 32, False)


def test_tensors_behind_a_table_must_be_reachable() -> None:
    x, y = torch.randn(16), torch.zeros(16)
    table = torch.tensor([x.data_ptr()])
    with pytest.raises(Exception, match="out-of-bounds load of 16"):
        _through_table[(1,)](table, y, N=16)
    interp.reach(x)
    _through_table[(1,)](table, y, N=16)
    assert torch.equal(x, y)


def test_a_view_reaches_no_further_than_its_elements() -> None:
    whole, y = torch.randn(64), torch.zeros(16)
    interp.reach(whole[:8])
    with pytest.raises(Exception, match="out-of-bounds load of 8"):
        _through_table[(1,)](torch.tensor([whole.data_ptr()]), y, N=16)
