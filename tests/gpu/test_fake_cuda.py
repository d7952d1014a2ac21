"""Shapes, dtypes and devices of every operator on "cuda" tensors, by fake tensors: no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import safelora_kernels as sk

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def same_kind(result: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (tuple(result.shape), result.dtype, result.device.type) == (shape, dtype, "cuda")
    assert result.is_contiguous()


@pytest.mark.parametrize("factor", FLOATS)
@pytest.mark.parametrize("weight", FLOATS)
def test_project_layers(weight: torch.dtype, factor: torch.dtype) -> None:
    w, w0 = cuda(24, 40, dtype=weight), cuda(40, 24, dtype=weight).t()
    b, a = cuda(24, 3, dtype=factor), cuda(3, 40, dtype=factor)
    (one,) = sk.project_layers([(w, w0, b, a)])
    same_kind(one.lora_B, (24, 3), factor)  # type: ignore[arg-type]
    same_kind(one.v_norm, (), torch.float64)
    same_kind(one.cosine, (), torch.float64)  # type: ignore[arg-type]
    (several,) = sk.project_layers([(w, w0, [b, b], [a, None])], out_dtype=torch.bfloat16)
    for new in several.lora_B:
        same_kind(new, (24, 3), torch.bfloat16)
    assert isinstance(several.cosine, list)
    assert several.cosine[1] is None


@pytest.mark.parametrize("dtype", FLOATS)
def test_update_cosine_and_select_layers(dtype: torch.dtype) -> None:
    b, a = cuda(24, 3, dtype=dtype), cuda(3, 40, dtype=dtype)
    cosines = sk.update_cosine([b, b], [b, b], [a, a])
    same_kind(cosines, (2,), torch.float64)
    same_kind(sk.select_layers(cosines, threshold=0.5), (2,), torch.bool)
    same_kind(sk.select_layers(cosines.to(dtype), num_layers=1), (2,), torch.bool)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_project_out(dtype: torch.dtype, side: str) -> None:
    x = cuda(24, 3, dtype=dtype) if side == "left" else cuda(24, 3, dtype=dtype).t()
    u = cuda(24, 5)
    for y in sk.project_out_layers([x, x], [u, u], side=side):  # type: ignore[arg-type]
        same_kind(y, tuple(x.shape), dtype)
    assert sk.project_out_layers_([x], [u], side=side) is None  # type: ignore[arg-type,func-returns-value]


@pytest.mark.parametrize("factor", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gram_apply(dtype: torch.dtype, factor: torch.dtype) -> None:
    x, z = cuda(24, 40, dtype=dtype).t(), cuda(24, 5, dtype=factor)
    wide = torch.float64 if torch.float64 in (dtype, factor) else torch.float32
    for weights in (None, [cuda(40), None]):
        for y in sk.gram_apply_layers([x, x], [z, z], weights):
            same_kind(y, (24, 5), wide)


@pytest.mark.parametrize("factor", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_salora_linear_and_its_gradients(dtype: torch.dtype, factor: torch.dtype) -> None:
    x, base = cuda(2, 7, 40, dtype=dtype), cuda(2, 7, 24, dtype=dtype)
    a, b, u = cuda(3, 40, dtype=factor), cuda(24, 3, dtype=factor), cuda(24, 5)
    same_kind(sk.salora_linear(x, base, a, b, u, 0.5), (2, 7, 24), dtype)
    rows = x.view(14, 40)
    wide = torch.float64 if torch.float64 == dtype else torch.float32
    y, h, projected = torch.ops.safelora.salora_linear(rows, base.view(14, 24), a, b, u, 0.5)
    for result, shape, expected in [(y, (14, 24), dtype), (h, (14, 3), wide), (projected, (24, 3), wide)]:
        same_kind(result, shape, expected)
    # The operator and not autograd, whose engine looks for the device of the tensors.
    grads = torch.ops.safelora.salora_linear_backward(y, rows, h, a, b, projected, u, 0.5, [True] * 4)
    for grad, owner in zip(grads, (rows, a, b, u), strict=True):
        same_kind(grad, tuple(owner.shape), owner.dtype)


def test_gradients_that_are_not_wanted_are_empty() -> None:
    dy, x, h = cuda(7, 24), cuda(7, 40), cuda(7, 3)
    a, b, u = cuda(3, 40), cuda(24, 3), cuda(24, 5)
    grads = torch.ops.safelora.salora_linear_backward(dy, x, h, a, b, b, u, 0.5, [False, True, False, False])
    assert [tuple(grad.shape) for grad in grads] == [(0,), (3, 40), (0,), (0,)]


def test_project_selected_layers() -> None:
    w, b, a = cuda(24, 40), cuda(24, 3, dtype=torch.bfloat16), cuda(3, 40)
    (new,), norms, cosines, selected = torch.ops.safelora.project_selected_layers([w], [w], [b], [a], [0], 0.5)
    same_kind(new, (24, 3), torch.bfloat16)
    same_kind(norms, (1,), torch.float64)
    same_kind(cosines, (1,), torch.float64)
    same_kind(selected, (1,), torch.bool)
