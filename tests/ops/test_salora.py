"""salora_linear: values, gradients against the dense autograd form, and the invariant over training steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import safelora_kernels as sk
from safelora_kernels.bench import baselines

from . import truth
from .truth import FLOATS, assert_accurate, random_basis

FP32_BOUND = 1e-5
FP64_BOUND = 1e-12
NAMES = ("x", "base_output", "lora_A", "lora_B", "basis")
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 7, 5, 2, 1),
    (16, 64, 64, 16, 32),
    (33, 130, 70, 12, 7),
    (100, 24, 300, 64, 5),
    (5, 20, 30, 512, 3),
]


def inputs(
    tokens: int,
    d_in: int,
    d_out: int,
    rank: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    factor: torch.dtype | None = None,
) -> list[Tensor]:
    factor = factor or dtype
    return [
        torch.randn(tokens, d_in).to(dtype),
        torch.randn(tokens, d_out).to(dtype),
        (torch.randn(rank, d_in) / d_in**0.5).to(factor),
        torch.randn(d_out, rank).to(factor),
        random_basis(d_out, min(k, d_out), torch.float64 if factor == torch.float64 else torch.float32),
    ]


def dense_gradients(tensors: list[Tensor], scaling: float, grad: Tensor) -> list[Tensor]:
    """Autograd through the dense fp64 forward."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    truth.salora(*wide, scaling).backward(grad.double())  # type: ignore[arg-type]
    return [t.grad for t in wide]  # type: ignore[misc]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: str, shape: tuple[int, int, int, int, int]) -> None:
    tensors = inputs(*shape)
    y = sk.salora_linear(*tensors, 0.7, backend=backend)  # type: ignore[arg-type]
    assert_accurate(y, truth.salora(*tensors, 0.7), FP32_BOUND)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_forward_and_backward(backend: str, dtype: torch.dtype, factor: torch.dtype) -> None:
    tensors = [t.requires_grad_() for t in inputs(40, 48, 64, 8, 6, dtype, factor)]
    y = sk.salora_linear(*tensors, 1.5, backend=backend)  # type: ignore[arg-type]
    assert y.dtype == dtype
    bound = FP64_BOUND if dtype == factor == torch.float64 else FP32_BOUND
    assert_accurate(y.detach(), truth.salora(*(t.detach() for t in tensors), 1.5), bound)  # type: ignore[arg-type]
    grad = torch.randn(40, 64).to(dtype)
    y.backward(grad)
    for name, tensor, expected in zip(NAMES, tensors, dense_gradients(tensors, 1.5, grad), strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        assert_accurate(tensor.grad, expected, bound, f"gradient of {name}")


# Whole and partial blocks of tokens, of columns and of ranks.
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (64, 64, 128, 16, 8), (70, 67, 33, 5, 3), (200, 130, 259, 33, 7)], ids=str
)
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16])
def test_rows_of_bf16(backend: str, shape: tuple[int, int, int, int, int], factor: torch.dtype) -> None:
    """Rows that lie apart and start anywhere, with NaN between them."""
    plain = inputs(*shape, torch.bfloat16, factor)
    grad = torch.randn(shape[0], shape[2]).bfloat16()
    rows = [
        torch.full((t.shape[0], t.shape[1] + 3), torch.nan, dtype=t.dtype)[:, 1:-2].copy_(t) for t in (*plain, grad)
    ]
    tensors = [t.detach().requires_grad_() for t in rows[:5]]
    y = sk.salora_linear(*tensors, 0.7, backend=backend)  # type: ignore[arg-type]
    assert_accurate(y.detach(), truth.salora(*plain, 0.7), FP32_BOUND)  # type: ignore[arg-type]
    y.backward(rows[5])
    for name, tensor, expected in zip(NAMES, tensors, dense_gradients(plain, 0.7, grad), strict=True):
        assert_accurate(tensor.grad, expected, FP32_BOUND, f"gradient of {name}")  # type: ignore[arg-type]


def thin_bound(left: Tensor, thin: Tensor, right: Tensor, thin_error: Tensor, right_error: Tensor) -> Tensor:
    """Of ``left·thin·right`` before rounding, with ``thin`` and ``right`` off by their errors: docs/numerics.md."""
    depth = right.shape[0]
    h = left @ thin
    gamma = (left.shape[1] + depth + 3) * 2.0**-24
    sums = left.abs() @ (gamma * thin.abs() + thin_error) @ right.abs() + h.abs() @ right_error
    return sums + depth**0.5 * 2.0**-15 * h.norm(dim=1, keepdim=True) * right.norm(dim=0, keepdim=True)


@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "parallel", "outliers"])
@pytest.mark.parametrize("rank", [1, 16, 33, 300])
def test_every_element_of_bf16_results_is_within_its_bound(
    backend: str, rank: int, kind: str, factor: torch.dtype
) -> None:
    """Parallel vectors make the largest sums there can be, outliers the widest range of numbers in one vector."""
    x, base, a, b, u = inputs(40, 70, 50, rank, 4, torch.bfloat16, torch.float32)
    if kind == "parallel":
        x, a, b, u = x.abs(), a[:1].abs().expand(rank, -1).contiguous(), torch.full_like(b, 0.3), torch.zeros(50, 0)
    elif kind == "outliers":
        x[:, ::7] *= 1000
        a, b = a * 10 ** (3 * torch.randn(rank, 1)), b * 10 ** (2 * torch.randn(50, 1))
    base, x, a, b = base.mul_(0.01), x.requires_grad_(), a.to(factor), b.to(factor)
    y = sk.salora_linear(x, base, a, b, u, 0.7, backend=backend)
    grad = torch.randn(40, 50).bfloat16()
    (dx,) = torch.autograd.grad(y, x, grad)
    wx, wa, wb, wu = (t.detach().double() for t in (x, a, b, u))
    projected, s = truth.project_out(b, u), 0.7
    off = (50 + u.shape[1] + 2) * 2.0**-24 * (wb.abs() + wu.abs() @ wu.abs().T @ wb.abs())
    none = torch.zeros(1, 1, dtype=torch.float64)
    for result, expected, bound in [
        (y, base.double() + s * wx @ wa.T @ projected.T, thin_bound(wx, wa.T, projected.T, none, off.T)),
        (dx, s * grad.double() @ projected @ wa, thin_bound(grad.double(), projected, wa, off, 0 * wa)),
    ]:
        allowed = 1.01 * s * bound + 2.0**-8 * expected.abs()
        error = (result.detach().double() - expected).abs()
        assert bool((error <= allowed).all()), float((error / allowed).max())


@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16])
def test_error_is_no_more_than_that_of_torch_in_bf16(backend: str, factor: torch.dtype) -> None:
    plain = inputs(150, 300, 260, 16, 8, torch.bfloat16, factor)
    grad = torch.randn(150, 260).bfloat16()
    expected = [truth.salora(*plain, 2.0), *dense_gradients(plain, 2.0, grad)]  # type: ignore[arg-type]

    def errors(tensors: list[Tensor], *, ours: bool) -> list[float]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = sk.salora_linear(*leaves, 2.0, backend=backend) if ours else baselines.torch_salora(*leaves, 2.0)  # type: ignore[arg-type]
        results = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
        return [truth.relative_error(result, e) for result, e in zip(results, expected, strict=True)]

    theirs = errors([t.bfloat16() for t in plain], ours=False)
    for name, error, limit in zip(("y", *NAMES), errors(plain, ours=True), theirs, strict=True):
        assert error <= limit, f"{name}: {error:.1e} exceeds torch's {limit:.1e}"


def test_adapter_and_activations_of_other_dtypes(backend: str) -> None:
    x, base, a, b, u = inputs(12, 20, 30, 4, 3)
    for x_dtype, base_dtype in [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]:
        y = sk.salora_linear(x.to(x_dtype), base.to(base_dtype), a, b, u, 1.0, backend=backend)
        assert y.dtype == base_dtype
        assert_accurate(y, truth.salora(x.to(x_dtype), base.to(base_dtype), a, b, u, 1.0), FP32_BOUND)


def test_leading_dimensions(backend: str) -> None:
    x, base, a, b, u = inputs(24, 10, 14, 3, 2)
    flat = sk.salora_linear(x, base, a, b, u, 0.5, backend=backend)
    for lead in [(2, 3, 4), (24, 1)]:
        y = sk.salora_linear(x.view(*lead, 10), base.view(*lead, 14), a, b, u, 0.5, backend=backend)
        assert y.shape == (*lead, 14)
        assert torch.equal(y.reshape(24, 14), flat)
    assert_accurate(sk.salora_linear(x[0], base[0], a, b, u, 0.5, backend=backend), flat[0].double(), FP32_BOUND)
    assert sk.salora_linear(x[:0], base[:0], a, b, u, 0.5, backend=backend).shape == (0, 14)


def test_no_tokens_give_zero_gradients(backend: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(0, 10, 14, 3, 2)]
    sk.salora_linear(*tensors, 0.5, backend=backend).sum().backward()  # type: ignore[arg-type]
    for tensor in tensors:
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
def test_layouts_forward_and_backward(backend: str, kind: str) -> None:
    plain = inputs(30, 20, 26, 5, 4)
    tensors = [truth.layouts(t)[kind].detach().requires_grad_() for t in plain]
    y = sk.salora_linear(*tensors, 2.0, backend=backend)  # type: ignore[arg-type]
    assert_accurate(y.detach(), truth.salora(*plain, 2.0), FP32_BOUND)  # type: ignore[arg-type]
    grad = truth.layouts(torch.randn(30, 26))[kind]
    y.backward(grad)
    for name, tensor, expected in zip(NAMES, tensors, dense_gradients(plain, 2.0, grad), strict=True):
        assert_accurate(tensor.grad, expected, FP32_BOUND, f"gradient of {name}")  # type: ignore[arg-type]


def test_expanded_output_gradient(backend: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(30, 20, 26, 5, 4)]
    sk.salora_linear(*tensors, 2.0, backend=backend).sum().backward()  # type: ignore[arg-type]
    for name, tensor, expected in zip(NAMES, tensors, dense_gradients(tensors, 2.0, torch.ones(30, 26)), strict=True):
        assert_accurate(tensor.grad, expected, FP32_BOUND, f"gradient of {name}")  # type: ignore[arg-type]


def test_empty_basis_is_plain_lora(backend: str) -> None:
    x, base, a, b, _ = inputs(6, 10, 14, 3, 2)
    y = sk.salora_linear(x, base, a, b, torch.zeros(14, 0), 2.0, backend=backend)
    assert_accurate(y, base.double() + 2.0 * x.double() @ a.double().T @ b.double().T, FP32_BOUND)


def test_gradcheck(backend: str) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in [(3, 5), (3, 4), (2, 5), (4, 2), (4, 2)]]
    for t in tensors:
        t.requires_grad_()

    def run(*args: Tensor) -> Tensor:
        return sk.salora_linear(*args, 0.7, backend=backend)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("wanted", range(5), ids=NAMES)
def test_only_the_gradients_wanted(backend: str, wanted: int) -> None:
    tensors = inputs(12, 10, 14, 3, 2)
    tensors[wanted].requires_grad_()
    grad = torch.randn(12, 14)
    sk.salora_linear(*tensors, 0.7, backend=backend).backward(grad)  # type: ignore[arg-type]
    expected = dense_gradients(tensors, 0.7, grad)[wanted]
    assert_accurate(tensors[wanted].grad, expected, FP32_BOUND)  # type: ignore[arg-type]


def test_second_order(backend: str) -> None:
    """Also through a constant output gradient, as in a penalty on gradients."""
    tensors = [t.requires_grad_() for t in inputs(6, 10, 14, 3, 2)]

    def penalised(*args: Tensor) -> Tensor:
        y = sk.salora_linear(*args, 0.7, backend=backend)  # type: ignore[arg-type]
        return y.sum() + torch.autograd.grad(y.sum(), args[0], create_graph=True)[0].square().sum()

    def dense(*args: Tensor) -> Tensor:
        y = truth.salora(*args, 0.7)  # type: ignore[arg-type]
        return y.sum() + torch.autograd.grad(y.sum(), args[0], create_graph=True)[0].square().sum()

    ours = torch.autograd.grad(penalised(*tensors), tensors)
    expected = torch.autograd.grad(dense(*tensors), tensors)
    for name, grad, truly in zip(NAMES, ours, expected, strict=True):
        assert_accurate(grad, truly.double(), FP32_BOUND, f"gradient of {name}")


def test_second_order_gradcheck(backend: str) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in [(3, 5), (3, 4), (2, 5), (4, 2), (4, 2)]]
    for t in tensors:
        t.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *args: sk.salora_linear(*args, 0.7, backend=backend), tensors)


def test_arguments_are_left_alone(backend: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(12, 10, 14, 3, 2)]
    before = [t.detach().clone() for t in tensors]
    y = sk.salora_linear(*tensors, 0.7, backend=backend)  # type: ignore[arg-type]
    grad = torch.randn(12, 14)
    kept = grad.clone()
    y.backward(grad)
    assert torch.equal(grad, kept)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert y.data_ptr() != tensors[1].data_ptr()


def test_training_never_enters_the_subspace(backend: str) -> None:
    """``Uᵀ ∂B = 0`` at every step, and ``Uᵀ (W_eff − W) = 0`` after many."""
    x, base, a, b, u = inputs(64, 20, 30, 4, 5)
    lora_A, lora_B = a.clone().requires_grad_(), sk.project_out(b, u).requires_grad_()
    optimizer = torch.optim.SGD([lora_A, lora_B], lr=0.05)
    target = torch.randn(64, 30)
    for _ in range(20):
        optimizer.zero_grad()
        y = sk.salora_linear(x, base, lora_A, lora_B, u, 1.5, backend=backend)
        (y - target).square().mean().backward()
        assert lora_B.grad is not None
        assert float((u.double().T @ lora_B.grad.double()).norm()) <= 1e-5 * float(lora_B.grad.norm())
        optimizer.step()
    update = 1.5 * truth.project_out(lora_B.detach(), u) @ lora_A.detach().double()
    ours = sk.salora_linear(torch.eye(20), torch.zeros(20, 30), lora_A, lora_B, u, 1.5, backend=backend)
    leak = (u.double().T @ ours.detach().double().T).norm()
    assert float(leak) <= 1e-5 * float(update.norm())
    assert float((lora_A.detach() - a).norm()) > 1e-2


def test_output_at_the_published_start_equals_the_base(backend: str) -> None:
    """With the residual weight ``W' = W − s C B₀ A₀`` nothing changes, whatever s is."""
    x, _, a, b, u = inputs(16, 20, 30, 4, 5, torch.float64)
    w = torch.randn(30, 20, dtype=torch.float64)
    for scaling in (0.5, 2.0, 16.0):
        residual = w - scaling * truth.project_out(b, u) @ a
        y = sk.salora_linear(x, x @ residual.T, a, b, u, scaling, backend=backend)
        assert_accurate(y, x @ w.T, 1e-6)


def test_not_finite_input_shows(backend: str) -> None:
    x, base, a, b, u = inputs(6, 10, 14, 3, 2)
    x[2, 3] = torch.nan
    y = sk.salora_linear(x, base, a, b, u, 1.0, backend=backend)
    assert bool(y[2].isnan().all())
    assert bool(y[[0, 1, 3, 4, 5]].isfinite().all())
    y = sk.salora_linear(x.bfloat16(), base.bfloat16(), a, b, u, 1.0, backend=backend)
    assert bool(y[2].isnan().all())
    assert bool(y[[0, 1, 3, 4, 5]].isfinite().all())


def test_wrong_arguments_are_named(backend: str) -> None:
    x, base, a, b, u = inputs(6, 10, 14, 3, 2)

    def refused(error: type[Exception], match: str, *args: object) -> None:
        with pytest.raises(error, match=match):
            sk.salora_linear(*args, backend=backend)  # type: ignore[arg-type]

    refused(ValueError, "agree in all but the last dimension", x[:5], base, a, b, u, 1.0)
    refused(ValueError, r"lora_A must have shape \(3, 10\)", x, base, a[:, :9], b, u, 1.0)
    refused(ValueError, r"lora_B must have shape \(14, 3\)", x, base, a, b.t(), u, 1.0)
    refused(ValueError, r"basis must have shape \(14, 2\)", x, base, a, b, u[:13], 1.0)
    refused(ValueError, "rank 0", x, base, a[:0], b[:, :0], u, 1.0)
    refused(ValueError, "scalar", x[0, 0], base, a, b, u, 1.0)
    refused(TypeError, "scaling must be a float", x, base, a, b, u, "1")
    refused(TypeError, "scaling must be a float", x, base, a, b, u, torch.tensor(1.0))
    refused(TypeError, "base_output must be a torch.Tensor", x, None, a, b, u, 1.0)
    refused(TypeError, "complex64", x, base, a.to(torch.complex64), b, u, 1.0)
    refused(ValueError, "move them to one device", x, base, a, b.to("meta"), u, 1.0)
