"""The Triton SaLoRA kernels in the interpreter: output and gradients against the dense autograd form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from safelora_kernels.backends import reference
from safelora_kernels.triton import salora
from tests.ops import truth
from tests.ops.test_salora import SHAPES, dense_gradients, inputs
from tests.ops.truth import assert_accurate

pytestmark = pytest.mark.interpreted

BOUND = 1e-5
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OWNERS = (0, 2, 3, 4)
# Sums in several parts: over d_in and d_out, over the tokens, over the rank.
PARTS = [(20, 1100, 300, 5, 3), (530, 24, 40, 4, 3), (33, 130, 70, 40, 7)]


def check(tensors: list[Tensor], scaling: float, dy: Tensor, needs: tuple[bool, ...] = (True,) * 4) -> None:
    x, base, a, b, u = tensors
    y, h, projected = salora.salora_linear(*tensors, scaling)  # type: ignore[arg-type]
    assert y.is_contiguous()
    assert y.dtype == base.dtype
    assert_accurate(y, truth.salora(*tensors, scaling), BOUND)  # type: ignore[arg-type]
    assert_accurate(h, x.double() @ a.double().T, BOUND, "h")
    assert_accurate(projected, truth.project_out(b, u), BOUND, "projected B")
    grads = salora.salora_linear_backward(dy, x, h, a, b, projected, u, scaling, needs)
    expected = dense_gradients(tensors, scaling, dy)
    for grad, owner, needed in zip(grads, OWNERS, needs, strict=True):
        if needed:
            assert grad.is_contiguous()
            assert grad.dtype == tensors[owner].dtype
            assert_accurate(grad, expected[owner], BOUND, f"gradient {owner}")
        else:
            assert grad.shape == (0,)


@pytest.mark.parametrize("shape", SHAPES[:-2] + PARTS, ids=str)
def test_shapes(shape: tuple[int, int, int, int, int]) -> None:
    tensors = inputs(*shape)
    check(tensors, 0.7, torch.randn(shape[0], shape[2]))


@pytest.mark.parametrize("shape", [(33, 130, 70, 12, 7), (40, 300, 260, 17, 3)], ids=str)
def test_shapes_in_bf16(shape: tuple[int, int, int, int, int]) -> None:
    tensors = inputs(*shape, torch.bfloat16, torch.float32)
    check(tensors, 0.7, torch.randn(shape[0], shape[2]).bfloat16())


@pytest.mark.parametrize("factor", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype: torch.dtype, factor: torch.dtype) -> None:
    check(inputs(40, 48, 64, 8, 6, dtype, factor), 1.5, torch.randn(40, 64).to(dtype))


def test_operands_of_different_dtypes() -> None:
    x, base, a, b, u = inputs(12, 20, 30, 4, 3)
    check([x.bfloat16(), base, a.half(), b, u], 1.0, torch.randn(12, 30).half())
    check([x, base.half(), a, b.bfloat16(), u.half()], 1.0, torch.randn(12, 30))


@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
def test_layouts(kind: str) -> None:
    tensors = [truth.layouts(t)[kind] for t in inputs(30, 20, 26, 5, 4)]
    check(tensors, 2.0, truth.layouts(torch.randn(30, 26))[kind])


def test_expanded_output_gradient() -> None:
    check(inputs(30, 20, 26, 5, 4), 2.0, torch.ones(()).expand(30, 26))


def test_no_tokens() -> None:
    check(inputs(0, 10, 14, 3, 2), 0.5, torch.zeros(0, 14))


def test_empty_basis_is_plain_lora() -> None:
    x, base, a, b, _ = inputs(6, 10, 14, 3, 2)
    check([x, base, a, b, torch.zeros(14, 0)], 2.0, torch.randn(6, 14))


@pytest.mark.parametrize("wanted", range(4), ids=["x", "lora_A", "lora_B", "basis"])
def test_only_the_gradients_wanted(wanted: int) -> None:
    needs = tuple(i == wanted for i in range(4))
    check(inputs(12, 10, 14, 3, 2), 0.7, torch.randn(12, 14), needs)


def test_fp64_goes_to_the_reference() -> None:
    tensors = inputs(6, 10, 14, 3, 2, torch.float64)
    expected = reference.salora_linear(*tensors, 0.5)
    results = salora.salora_linear(*tensors, 0.5)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    x, _, a, b, u = tensors
    backward = (torch.randn(6, 14, dtype=torch.float64), x, results[1], a, b, results[2], u, 0.5, [True] * 4)
    for ours, theirs in zip(
        salora.salora_linear_backward(*backward), reference.salora_linear_backward(*backward), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_not_finite_input_shows() -> None:
    x, base, a, b, u = inputs(6, 10, 14, 3, 2)
    x[2, 3] = torch.nan
    y = salora.salora_linear(x, base, a, b, u, 1.0)[0]
    assert bool(y[2].isnan().all())
    assert bool(y[[0, 1, 3, 4, 5]].isfinite().all())


def test_gradient_of_the_factor_stays_out_of_the_subspace() -> None:
    x, base, a, b, u = inputs(64, 20, 30, 4, 5)
    _, h, projected = salora.salora_linear(x, base, a, b, u, 1.5)
    dB = salora.salora_linear_backward(torch.randn(64, 30), x, h, a, b, projected, u, 1.5, [False, False, True, False])[
        2
    ]
    assert float((u.double().T @ dB.double()).norm()) <= 1e-6 * float(dB.norm())
