"""gram_apply, gram_apply_layers and gram: values, defining properties, gradients, wrong arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import safelora_kernels as sk
from safelora_kernels.bench import baselines

from . import truth
from .truth import FLOATS, assert_accurate, relative_error

FP32_BOUND = 1e-5
FP64_BOUND = 1e-13

SHAPES = [
    (1, 1, 1),
    (0, 5, 3),
    (3, 0, 2),
    (7, 40, 8),
    (64, 16, 16),
    (65, 17, 1),
    (257, 129, 33),
    (30, 70, 512),
    (2100, 9, 5),
    (520, 260, 12),
]


def bound(*tensors: Tensor) -> float:
    return FP64_BOUND if torch.float64 in [t.dtype for t in tensors] else FP32_BOUND


@pytest.mark.parametrize("z_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_dtypes(backend: str, dtype: torch.dtype, z_dtype: torch.dtype, weighted: bool) -> None:
    x, z = torch.randn(150, 48).to(dtype), torch.randn(48, 6).to(z_dtype)
    weights = torch.rand(150) if weighted else None
    y = sk.gram_apply(x, z, weights, backend=backend)
    assert y.dtype == (torch.float64 if torch.float64 in (dtype, z_dtype) else torch.float32)
    assert_accurate(y, truth.gram_apply(x, z, weights), bound(x, z))


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_of_any_dtype_and_stride(backend: str, dtype: torch.dtype) -> None:
    x, z = torch.randn(90, 20), torch.randn(20, 4)
    for weights in (torch.randn(90).to(dtype), torch.randn(180).to(dtype)[::2], torch.tensor(0.5).to(dtype).expand(90)):
        y = sk.gram_apply(x, z, weights, backend=backend)
        assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_accurate(y, truth.gram_apply(x, z, weights), FP32_BOUND)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], weighted: bool) -> None:
    tokens, d, r = shape
    x, z = torch.randn(tokens, d).to(dtype), torch.randn(d, r)
    weights = torch.rand(tokens) if weighted else None
    assert_accurate(sk.gram_apply(x, z, weights, backend=backend), truth.gram_apply(x, z, weights), FP32_BOUND)


@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend: str, dtype: torch.dtype, kind: str) -> None:
    x, z, weights = torch.randn(170, 70).to(dtype), torch.randn(70, 9), torch.rand(170)
    other = sk.gram_apply(truth.layouts(x)[kind], truth.layouts(z)[kind], weights, backend=backend)
    assert_accurate(other, truth.gram_apply(x, z, weights), FP32_BOUND)
    assert other.is_contiguous()


def test_ragged_batch_with_shared_operands(backend: str) -> None:
    x, z = torch.randn(300, 48), torch.randn(48, 6)
    xs = [x, torch.randn(40, 20).half(), x, torch.randn(33, 48).bfloat16(), torch.randn(0, 48)]
    zs = [z, torch.randn(20, 1), torch.randn(48, 40), z, z]
    weights = [torch.rand(300), None, None, torch.rand(33), torch.rand(0)]
    results = sk.gram_apply_layers(xs, zs, weights, backend=backend)
    for result, *triple in zip(results, xs, zs, weights, strict=True):
        assert_accurate(result, truth.gram_apply(*triple), FP32_BOUND)
        assert torch.equal(result, sk.gram_apply(*triple, backend=backend))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            sk.gram_apply_layers(xs, zs, backend=backend),
            sk.gram_apply_layers(xs, zs, [None] * 5, backend=backend),
            strict=True,
        )
    )
    assert sk.gram_apply_layers([], [], backend=backend) == []


def test_map_is_linear_symmetric_and_positive(backend: str) -> None:
    x, weights = torch.randn(200, 60), torch.rand(200)
    u, v = torch.randn(60, 4), torch.randn(60, 4)

    def apply(t: Tensor) -> Tensor:
        return sk.gram_apply(x, t, weights, backend=backend).double()

    scale = float(truth.gram(x, weights).norm() * u.norm() * v.norm())
    assert abs(float((u * apply(v)).sum() - (v * apply(u)).sum())) <= FP32_BOUND * scale
    assert_accurate(apply(u + 2 * v), apply(u) + 2 * apply(v), 2 * FP32_BOUND)
    assert float((u * apply(u)).sum()) > 0
    assert_accurate(-sk.gram_apply(x, u, -weights, backend=backend), apply(u), FP32_BOUND)


def test_weight_zero_hides_a_token_and_order_does_not_matter(backend: str) -> None:
    x, z = torch.randn(130, 30), torch.randn(30, 5)
    weights = (torch.arange(130) % 3 != 0).float()
    masked = sk.gram_apply(x, z, weights, backend=backend)
    assert_accurate(masked, truth.gram_apply(x[weights > 0], z, None), FP32_BOUND)
    shuffled = torch.randperm(130)
    assert_accurate(sk.gram_apply(x[shuffled], z, weights[shuffled], backend=backend), masked.double(), FP32_BOUND)


def test_not_finite_input_shows(backend: str) -> None:
    x, z = torch.randn(50, 8), torch.randn(8, 3)
    z[2, 1] = torch.nan
    y = sk.gram_apply(x, z, backend=backend)
    assert bool(y[:, 1].isnan().all())
    assert bool(y[:, [0, 2]].isfinite().all())
    x[4, 3] = torch.inf
    assert not bool(sk.gram_apply(x, z, backend=backend).isfinite().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_more_than_twice_that_of_torch(backend: str, dtype: torch.dtype) -> None:
    """The chain of stock operations in fp32 on the same inputs: what a user would write with an upcast copy."""
    x, z, weights = torch.randn(4096, 512).to(dtype), torch.randn(512, 16), torch.rand(4096)
    expected = truth.gram_apply(x, z, weights)
    ours = relative_error(sk.gram_apply(x, z, weights, backend=backend), expected)
    assert ours <= 2 * relative_error(baselines.upcast_gram_apply(x, z, weights), expected)


# Gradients.


def test_gradients_of_both_orders(backend: str) -> None:
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def run(*args: Tensor) -> Tensor:
        return sk.gram_apply(*args, backend=backend)

    for args in ((x, z), (x, z, weights)):
        assert torch.autograd.gradcheck(run, args)
        assert torch.autograd.gradgradcheck(run, args)


def test_gradient_in_z_is_the_map_itself(backend: str) -> None:
    x, z, weights = torch.randn(90, 30).bfloat16(), torch.randn(30, 4).half().requires_grad_(), torch.rand(90)
    grad = torch.randn(30, 4)
    sk.gram_apply(x, z, weights, backend=backend).backward(grad)
    assert z.grad is not None
    assert z.grad.dtype == torch.float16
    assert_accurate(z.grad, truth.gram_apply(x, grad, weights), FP32_BOUND)


def test_gradients_of_a_batch_where_only_some_are_wanted(backend: str) -> None:
    x = torch.randn(600, 5, dtype=torch.float64, requires_grad=True)
    zs = [torch.randn(5, 2, dtype=torch.float64) for _ in range(3)]
    zs[1].requires_grad_()
    weights = [torch.rand(600, dtype=torch.float64, requires_grad=True), None, None]
    results = sk.gram_apply_layers([x, x, x.detach()], zs, weights, backend=backend)
    assert not results[2].requires_grad or results[2].grad_fn is not None
    (results[0].square().sum() + 2 * results[1].sum()).backward()
    got = [x.grad, zs[1].grad, weights[0].grad]  # type: ignore[union-attr]
    again = [t.detach().clone().requires_grad_() for t in (x, zs[1], weights[0])]  # type: ignore[union-attr]
    first = again[0].T @ (again[2][:, None] * (again[0] @ zs[0]))
    (first.square().sum() + 2 * (again[0].T @ (again[0] @ again[1])).sum()).backward()
    for a, e in zip(got, again, strict=True):
        assert_accurate(a, e.grad, 1e-12)  # type: ignore[arg-type]
    assert zs[0].grad is zs[2].grad is None


# The Gram matrix itself.


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (300, 40), (40, 300), (290, 1100)], ids=str)
def test_gram(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weights = torch.randn(shape).to(dtype), torch.randn(shape[0])
    for given in (None, weights):
        g = sk.gram(x, given)
        assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_accurate(g, truth.gram(x, given), bound(x))
        assert torch.equal(g, g.T)
        wide = sk.gram(x, given, out_dtype=torch.float64)
        assert_accurate(wide, truth.gram(x, given), FP64_BOUND)


def test_gram_stays_definite_under_autocast() -> None:
    """In bf16, as a matrix product under autocast comes out, the smallest eigenvalue falls far below zero."""
    x = (torch.randn(600, 24) @ torch.diag(torch.logspace(0, -2, 24)) @ torch.randn(24, 96)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        g, naive = sk.gram(x), (x.T @ x)
        wide = sk.gram(x, out_dtype=torch.float64)
    assert (g.dtype, naive.dtype, wide.dtype) == (torch.float32, torch.bfloat16, torch.float64)
    top = float(torch.linalg.eigvalsh(wide)[-1])
    assert float(torch.linalg.eigvalsh(wide)[0]) >= -1e-14 * top
    assert float(torch.linalg.eigvalsh(g.double())[0]) >= -1e-6 * top
    assert float(torch.linalg.eigvalsh(naive.double())[0]) < -1e-4 * top
    torch.linalg.cholesky(wide + 1e-10 * top * torch.eye(96, dtype=torch.float64))


def test_gram_gradients() -> None:
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sk.gram, (x,))
    assert torch.autograd.gradcheck(sk.gram, (x, weights))
    assert torch.autograd.gradgradcheck(sk.gram, (x, weights))
    narrow = torch.randn(8, 5, dtype=torch.bfloat16, requires_grad=True)
    sk.gram(narrow).sum().backward()
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16


def test_gram_agrees_with_gram_apply(backend: str) -> None:
    x, weights = torch.randn(140, 33), torch.rand(140)
    applied = sk.gram_apply(x, torch.eye(33), weights, backend=backend)
    assert_accurate(applied, sk.gram(x, weights, out_dtype=torch.float64), FP32_BOUND)


def test_wrong_arguments_are_named(backend: str) -> None:
    x, z, w = torch.randn(8, 3), torch.randn(3, 2), torch.rand(8)

    def refused(error: type[Exception], match: str, *args: object) -> None:
        with pytest.raises(error, match=match):
            sk.gram_apply_layers(*args, backend=backend)  # type: ignore[arg-type]

    refused(ValueError, r"zs\[0\] must have shape \(3, 2\) \(columns of xs\[0\], r\), got \(8, 2\)", [x], [x[:, :2]])
    refused(
        ValueError, r"weights\[0\] must have shape \(8,\) \(one per row of x \(8, 3\)\), got \(7,\)", [x], [z], [w[1:]]
    )
    refused(ValueError, r"zs\[0\] has no columns", [x], [z[:, :0]])
    refused(ValueError, "2 xs, 1 zs", [x, x], [z])
    refused(ValueError, "1 xs, 1 zs, 2 weights", [x], [z], [w, w])
    refused(TypeError, "xs must be a list", x, [z])
    refused(TypeError, "weights must be a list", [x], [z], w)
    refused(TypeError, r"zs\[0\].dtype.*int64", [x], [z.long()])
    refused(TypeError, r"weights\[0\] must be a torch.Tensor or None, got float", [x], [z], [1.0])
    refused(ValueError, "move them to one device", [x, x.to("meta")], [z, z])
    refused(ValueError, "move them to one device", [x], [z], [w.to("meta")])
    with pytest.raises(ValueError, match="x must be 2-D"):
        sk.gram(x[0])
    with pytest.raises(TypeError, match="out_dtype must be float32 or float64, got torch.bfloat16"):
        sk.gram(x, out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="weights must have shape"):
        sk.gram(x, w[:3])
