"""project_out, project_out_layers and project_out_layers_: values, defining properties, gradients, writing in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import safelora_kernels as sk

from . import truth
from .truth import FLOATS, assert_accurate, random_basis

FP32_BOUND = 1e-6
FP64_BOUND = 1e-13

SHAPES = [
    (1, 1, 1),
    (7, 1, 3),
    (64, 16, 32),
    (65, 17, 1),
    (128, 5, 128),
    (300, 33, 7),
    (40, 512, 8),
    (512, 3, 70),
    (9, 4, 0),
]


def bound(*tensors: Tensor) -> float:
    return FP64_BOUND if all(t.dtype == torch.float64 for t in tensors) else FP32_BOUND


def oriented(x: Tensor, side: str) -> Tensor:
    return x if side == "left" else x.t().contiguous()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("basis_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(backend: str, dtype: torch.dtype, basis_dtype: torch.dtype, side: str) -> None:
    x, u = oriented(torch.randn(96, 24), side).to(dtype), random_basis(96, 12, basis_dtype)
    y = sk.project_out(x, u, side=side, backend=backend)  # type: ignore[arg-type]
    assert y.dtype == dtype
    assert_accurate(y, truth.project_out(x, u, side), bound(x, u))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: str, shape: tuple[int, int, int], side: str) -> None:
    d, m, k = shape
    # Half of a whole space's basis, so that the complement of a full basis is not zero.
    x, u = oriented(torch.randn(d, m), side), 0.5 * random_basis(d, k)
    assert_accurate(sk.project_out(x, u, side=side, backend=backend), truth.project_out(x, u, side), FP32_BOUND)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_layouts(backend: str, side: str, kind: str) -> None:
    x, u = oriented(torch.randn(70, 19), side), random_basis(70, 9)
    other_x, other_u = truth.layouts(x)[kind], truth.layouts(u)[kind]
    expected = truth.project_out(x, u, side)
    assert_accurate(sk.project_out(other_x, other_u, side=side, backend=backend), expected, FP32_BOUND)  # type: ignore[arg-type]
    with torch.no_grad():
        sk.project_out_layers_([other_x], [other_u], side=side, backend=backend)  # type: ignore[arg-type]
    assert_accurate(other_x, expected, FP32_BOUND)


def test_ragged_batch_with_shared_basis(backend: str) -> None:
    shared = random_basis(48, 6)
    bases = [shared, random_basis(20, 3), shared, random_basis(33, 0)]
    xs = [torch.randn(48, 8), torch.randn(20, 1).half(), torch.randn(48, 30), torch.randn(33, 2)]
    results = sk.project_out_layers(xs, bases, backend=backend)
    for x, u, y in zip(xs, bases, results, strict=True):
        assert_accurate(y, truth.project_out(x, u), FP32_BOUND)
        assert torch.equal(y, sk.project_out(x, u, backend=backend))
    assert sk.project_out_layers([], [], backend=backend) == []
    sk.project_out_layers_([], [], backend=backend)


def test_empty_basis_is_the_identity_and_a_copy(backend: str) -> None:
    x = torch.randn(6, 5)
    y = sk.project_out(x, torch.zeros(6, 0), backend=backend)
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()


def test_orthogonal_projection(backend: str) -> None:
    x, other, u = torch.randn(90, 12), torch.randn(90, 12), random_basis(90, 20)

    def p(t: Tensor) -> Tensor:
        return sk.project_out(t, u, backend=backend)

    y, wide = p(x), u.double()
    assert float((wide.T @ y.double()).norm() / x.norm()) <= FP32_BOUND
    assert_accurate(p(y), y.double(), FP32_BOUND)
    lost = (wide.T @ x.double()).square().sum()
    assert abs(float((y.double().square().sum() + lost) / x.double().square().sum()) - 1) <= 2 * FP32_BOUND
    left, right = (y.double() * other).sum(), (x.double() * p(other)).sum()
    assert abs(float(left - right)) <= FP32_BOUND * float(x.norm() * other.norm())


def test_left_and_right_are_transposes(backend: str) -> None:
    x, u = torch.randn(40, 11), random_basis(40, 5)
    left = sk.project_out(x, u, backend=backend)
    right = sk.project_out(x.t(), u, side="right", backend=backend)
    assert_accurate(right, left.t().double(), FP32_BOUND)


def test_not_finite_input_shows(backend: str) -> None:
    x, u = torch.randn(30, 4), random_basis(30, 3)
    x[3, 1] = torch.nan
    y = sk.project_out(x, u, backend=backend)
    assert bool(y[:, 1].isnan().all())
    assert bool(y[:, [0, 2, 3]].isfinite().all())


# Gradients.


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_both_orders(backend: str, side: str) -> None:
    x = oriented(torch.randn(6, 3, dtype=torch.float64), side).requires_grad_()
    # Not orthonormal: the formula must not lean on it.
    u = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, u: Tensor) -> Tensor:
        return sk.project_out(x, u, side=side, backend=backend)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, (x, u))
    assert torch.autograd.gradgradcheck(run, (x, u))


def test_gradients_of_a_batch_where_only_some_are_wanted(backend: str) -> None:
    xs = [torch.randn(5, 2, dtype=torch.float64) for _ in range(3)]
    us = [torch.randn(5, 2, dtype=torch.float64) for _ in range(3)]
    xs[0].requires_grad_()
    us[1].requires_grad_()
    results = sk.project_out_layers(xs, us, backend=backend)
    (results[0].sum() * 2 + results[1].square().sum()).backward()
    assert_accurate(xs[0].grad, 2 * truth.project_out(torch.ones(5, 2), us[0]), FP64_BOUND)  # type: ignore[arg-type]
    again = us[1].detach().clone().requires_grad_()
    (xs[1] - again @ (again.T @ xs[1])).square().sum().backward()
    assert_accurate(us[1].grad, again.grad, 1e-12)  # type: ignore[arg-type]
    assert xs[1].grad is xs[2].grad is us[0].grad is us[2].grad is None


def test_shared_basis_collects_its_gradient(backend: str) -> None:
    xs = [torch.randn(5, 2, dtype=torch.float64) for _ in range(2)]
    u = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    sum(y.square().sum() for y in sk.project_out_layers(xs, [u, u], backend=backend)).backward()  # type: ignore[union-attr]
    again = u.detach().clone().requires_grad_()
    sum((x - again @ (again.T @ x)).square().sum() for x in xs).backward()  # type: ignore[union-attr]
    assert_accurate(u.grad, again.grad, 1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_come_in_the_dtype_of_their_tensor(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(40, 8).to(dtype).requires_grad_()
    u = random_basis(40, 4).requires_grad_()
    grad = torch.randn(40, 8).to(dtype)
    sk.project_out(x, u, backend=backend).backward(grad)
    assert x.grad is not None
    assert u.grad is not None
    assert (x.grad.dtype, u.grad.dtype) == (dtype, torch.float32)
    assert_accurate(x.grad, truth.project_out(grad, u.detach()), FP32_BOUND)
    wide_x, wide_u, wide_g = x.detach().double(), u.detach().double(), grad.double()
    assert_accurate(u.grad, -(wide_g @ (wide_x.T @ wide_u) + wide_x @ (wide_g.T @ wide_u)), FP32_BOUND)


# In place.


def test_in_place_writes_the_same_bits(backend: str) -> None:
    xs = [torch.randn(48, 8), torch.randn(20, 3).bfloat16(), torch.randn(30, 100, dtype=torch.float64)]
    bases = [random_basis(x.shape[0], 4) for x in xs]
    expected = sk.project_out_layers(xs, bases, backend=backend)
    places, versions = [x.data_ptr() for x in xs], [x._version for x in xs]
    assert sk.project_out_layers_(xs, bases, backend=backend) is None  # type: ignore[func-returns-value]
    assert all(torch.equal(x, y) for x, y in zip(xs, expected, strict=True))
    assert [x.data_ptr() for x in xs] == places
    assert all(x._version > version for x, version in zip(xs, versions, strict=True))


def test_in_place_spoils_a_graph_that_saved_the_tensor(backend: str) -> None:
    x = torch.randn(6, 3)
    weight = torch.randn(6, 3, requires_grad=True)
    loss = (weight * x).sum()
    with torch.no_grad():
        sk.project_out_layers_([x], [random_basis(6, 2)], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_leaves_what_lies_between_the_elements(backend: str) -> None:
    whole = torch.randn(20, 12)
    before = whole.clone()
    sk.project_out_layers_([whole[:, 2:5], whole[:, 7:12]], [random_basis(20, 3)] * 2, backend=backend)
    kept = [0, 1, 5, 6]
    assert torch.equal(whole[:, kept], before[:, kept])
    assert not torch.equal(whole[:, 2:5], before[:, 2:5])


def test_in_place_refuses_what_requires_grad(backend: str) -> None:
    x, u = torch.randn(6, 3, requires_grad=True), random_basis(6, 2)
    for tensor in (x, x * 2):
        with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
            sk.project_out_layers_([tensor], [u], backend=backend)
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        sk.project_out_layers_([x.detach()], [u.clone().requires_grad_()], backend=backend)
    expected = truth.project_out(x.detach(), u)
    with torch.no_grad():
        sk.project_out_layers_([x], [u], backend=backend)
    assert_accurate(x.detach(), expected, FP32_BOUND)


def test_in_place_refuses_overlap_before_writing(backend: str) -> None:
    whole, u = torch.randn(12, 12), random_basis(12, 2)
    before = whole.clone()
    for match, xs, bases in [
        ("expanded", [whole[:, :1].expand(12, 4)], [u]),
        (r"xs\[0\] and xs\[1\] overlap", [whole[:, :5], whole[:, 4:9]], [u, u]),
        (r"xs\[0\] and xs\[2\] overlap", [whole, torch.randn(12, 2), whole], [u, u, u]),
        ("overlap", [whole[:, :5]], [whole[:, 3:8]]),
        ("overlap", [whole.t()], [whole[:, 11:]]),
    ]:
        with pytest.raises(ValueError, match=match):
            sk.project_out_layers_(xs, bases, backend=backend)
    assert torch.equal(whole, before)


def test_wrong_arguments_are_named(backend: str) -> None:
    x, u = torch.randn(8, 3), torch.randn(8, 2)
    for function in (sk.project_out_layers, sk.project_out_layers_):

        def refused(error: type[Exception], match: str, *args: object, **options: object) -> None:
            with pytest.raises(error, match=match):
                function(*args, backend=backend, **options)  # type: ignore[operator] # noqa: B023

        refused(ValueError, r"bases\[0\] must have 8 rows, one per row of xs\[0\]", [x], [u[:7]])
        refused(ValueError, "must have 3 rows, one per column", [x], [u], side="right")
        refused(ValueError, "side must be one of 'left', 'right', got 'top'", [x], [u], side="top")
        refused(ValueError, "2 xs, 1 bases", [x, x.clone()], [u])
        refused(TypeError, "xs must be a list", x, [u])
        refused(TypeError, r"bases\[0\].dtype.*int64", [x], [u.long()])
        refused(ValueError, "xs\\[0\\] must be 2-D", [x[0]], [u])
        refused(ValueError, "move them to one device", [x, x.to("meta")], [u, u])
