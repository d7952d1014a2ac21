"""The operators as PyTorch sees them: opcheck, fakes, refusal of gradients, torch.compile and autocast."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import safelora_kernels as sk
from safelora_kernels.schemas import SCHEMAS

from . import truth
from .truth import FLOATS, assert_accurate, random_basis, random_layer

LAYOUTS = ("contiguous", "transposed", "strided")
# Inductor generates C++ for the CPU.
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


def arguments(op: str, dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
    """A call of each operator, weights in ``dtype`` and some of the factors in another."""

    def arrange(*tensors: Tensor) -> list[Tensor]:
        return [truth.layouts(t)[layout] for t in tensors]

    first, second = random_layer(12, 20, 3, dtype), random_layer(9, 9, 2, dtype, dtype)
    aligned, base, lora_B, lora_A = (arrange(*pair) for pair in zip(first, second, strict=True))
    xs = arrange(torch.randn(12, 4).to(dtype), torch.randn(12, 3))
    bases = arrange(random_basis(12, 2), random_basis(12, 5).to(dtype))
    x, base_output, a, b, u = arrange(
        torch.randn(6, 10).to(dtype),
        torch.randn(6, 14).to(dtype),
        torch.randn(3, 10),
        torch.randn(14, 3),
        random_basis(14, 2),
    )
    if op == "project_layers":
        return aligned, base, lora_B, lora_A, [0, 1], "frobenius", torch.bfloat16
    if op == "project_selected_layers":
        return aligned, base, lora_B, lora_A, [0, 1], None, 1, "strict", "frobenius", torch.bfloat16
    if op == "update_cosine":
        return lora_B, [b.to(dtype) for b in lora_B], lora_A
    if op == "select_layers":
        return torch.rand(7).to(dtype)[:: 1 if layout == "contiguous" else 2], None, 2, "strict"
    if op in ("project_out_layers", "project_out_layers_"):
        return xs, bases, "left"
    if op == "gram_apply_layers":
        left, right = arrange(torch.randn(12, 7).to(dtype), torch.randn(9, 5))
        thin = arrange(torch.randn(7, 4), torch.randn(5, 2).to(dtype))
        return [left, right], thin, [torch.rand(24)[::2], torch.empty(0)]
    if op == "salora_linear":
        return x, base_output, a, b, u, 0.5
    y, h, projected_B = torch.ops.safelora.salora_linear.default(x, base_output, a, b, u, 0.5)
    return arrange(torch.randn_like(y))[0], x, h, a, b, projected_B, u, 0.5, [True, False, True, True]


def overload(op: str) -> Any:
    return getattr(torch.ops.safelora, op).default


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op: str, dtype: torch.dtype, layout: str) -> None:
    torch.library.opcheck(overload(op), arguments(op, dtype, layout))


def test_opcheck_without_lora_A() -> None:
    aligned, base, lora_B, lora_A, *options = arguments("project_layers", torch.float32, "contiguous")
    args = (aligned, base, lora_B, [lora_A[0], lora_A[1][:0]], *options)
    # Tracing is left out: opcheck takes two NaN for a difference.
    torch.library.opcheck(overload("project_layers"), args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", SCHEMAS)
def test_results_are_contiguous_and_fresh(op: str) -> None:
    args = arguments(op, torch.float32, "transposed")
    given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)}
    for result in torch.utils._pytree.tree_leaves(overload(op)(*args)):
        if isinstance(result, Tensor) and result.numel():
            assert result.is_contiguous()
            assert result.untyped_storage().data_ptr() not in given


@pytest.mark.parametrize("op", [op for op in SCHEMAS if op != "project_out_layers_"])
def test_fake_and_meta_tensors(op: str) -> None:
    args = arguments(op, torch.bfloat16, "strided")
    real = torch.utils._pytree.tree_leaves(overload(op)(*args))
    tree = torch.utils._pytree

    def described(value: Any) -> Any:
        return [(t.shape, t.dtype, t.stride()) for t in tree.tree_leaves(value)]

    meta = tree.tree_map_only(Tensor, lambda t: t.to("meta"), args)
    assert described(overload(op)(*meta)) == described(real)
    with FakeTensorMode() as mode:
        fake = tree.tree_map_only(Tensor, mode.from_tensor, args)
        assert described(overload(op)(*fake)) == described(real)


def test_public_functions_take_meta_tensors() -> None:
    w, b, a = (torch.empty(shape, device="meta") for shape in [(8, 12), (8, 2), (2, 12)])
    result = sk.project_lowrank(w, w, b, a)
    assert isinstance(result.lora_B, Tensor)
    assert result.lora_B.is_meta
    assert sk.project_out(b, b).is_meta
    assert sk.project_out_layers_([b], [w]) is None  # type: ignore[func-returns-value]
    assert sk.update_cosine(b, b, a).is_meta
    assert sk.gram_apply(w, a.T, w[:, 0]).is_meta
    assert sk.gram(w).shape == (12, 12)
    x = torch.empty((3, 12), device="meta", requires_grad=True)
    y = sk.salora_linear(x, torch.empty((3, 8), device="meta"), a, b, b, 1.0)
    assert y.is_meta
    assert y.requires_grad


@pytest.mark.parametrize("op", SCHEMAS)
def test_raw_operators_refuse_gradients(op: str) -> None:
    args = arguments(op, torch.float32, "contiguous")
    first = args[0][0] if isinstance(args[0], list) else args[0]
    first.requires_grad_()
    with pytest.raises(RuntimeError, match=rf"safelora\.{op} records no gradients"):
        overload(op)(*args)
    with torch.no_grad():
        overload(op)(*args)


def test_raw_operators_check_the_lengths_of_their_lists() -> None:
    w, b = torch.empty(8, 12, device="meta"), torch.empty(8, 2, device="meta")
    with pytest.raises(RuntimeError, match="2 aligned and 1 base"):
        overload("project_layers")([w, w], [w], [b], [w], [0])
    with pytest.raises(RuntimeError, match="2 xs and 1 bases"):
        overload("project_out_layers")([b, b], [w])


# torch.compile. Two sizes: the second compiles with symbolic shapes.


def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """With Inductor round the native operators; the reference is inlined, and generating its C++ takes minutes."""
    torch._dynamo.reset()
    inductor = HAS_COMPILER and backend != "reference"
    options: dict[str, Any] = {"backend": "inductor", "options": {"compile_threads": 1}} if inductor else {}
    return torch.compile(function, fullgraph=True, **(options or {"backend": "aot_eager"}))


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def test_compiled_training_step(backend: str) -> None:
    """Forward and backward of every differentiable function in one graph."""

    def step(x: Tensor, base: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
        left = sk.project_out_layers([b, b * 2], [u, u], backend=backend)[1]
        right = sk.project_out(a, v, side="right", backend=backend)
        return sk.salora_linear(x, base, right, left, u, 0.5, backend=backend)

    fast = compiled(step, backend)
    for tokens, d_in, d_out in [(5, 24, 40), (9, 31, 56)]:
        tensors = [torch.randn(tokens, d_in), torch.randn(tokens, d_out), torch.randn(4, d_in), torch.randn(d_out, 4)]
        tensors += [random_basis(d_out, 3), random_basis(d_in, 3)]
        grad = torch.randn(tokens, d_out)
        eager, traced = leaves(tensors), leaves(tensors)
        expected, actual = step(*eager), fast(*traced)
        assert_accurate(actual.detach(), expected.detach().double(), 1e-6)
        expected.backward(grad)
        actual.backward(grad)
        for e, t in zip(eager, traced, strict=True):
            assert_accurate(t.grad, e.grad.double(), 1e-6)  # type: ignore[union-attr, arg-type]


def test_compiled_gram_apply(backend: str) -> None:
    def step(x: Tensor, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        first, second = sk.gram_apply_layers([x, x], [z, z * 2], [weights, None], backend=backend)
        return first + second, sk.gram(x, weights)

    fast = compiled(step, backend)
    for tokens, d in [(20, 24), (31, 40)]:
        tensors = [torch.randn(tokens, d), torch.randn(d, 3), torch.rand(tokens)]
        grad = torch.randn(d, 3)
        eager, traced = leaves(tensors), leaves(tensors)
        expected, actual = step(*eager), fast(*traced)
        for (a, e), g in zip(zip(actual, expected, strict=True), (grad, torch.ones(d, d)), strict=True):
            assert_accurate(a.detach(), e.detach().double(), 1e-6)
            e.backward(g, retain_graph=True)
        torch.autograd.backward(actual, [grad, torch.ones(d, d)])
        for e, t in zip(eager, traced, strict=True):
            assert_accurate(t.grad, e.grad.double(), 1e-6)  # type: ignore[union-attr, arg-type]


def test_compiled_projection_and_selection(backend: str) -> None:
    def run(layers: list[truth.Layer]) -> tuple[list[Any], Tensor, Tensor]:
        results = sk.project_layers([sk.LayerFactors(*layer) for layer in layers], backend=backend)
        projected: list[Any] = [result.lora_B for result in results]
        cosines: list[Any] = [result.cosine for result in results]
        _, _, old, lora_A = zip(*layers, strict=True)
        again = sk.update_cosine(projected, old, lora_A, backend=backend)
        return projected, again, sk.select_layers(torch.stack(cosines), num_layers=1, backend=backend)

    fast = compiled(run, backend)
    for d_out, d_in in [(24, 40), (32, 57)]:
        layers = [random_layer(d_out, d_in, 4, torch.bfloat16) for _ in range(2)]
        (actual, again, selected), (expected, cosines, chosen) = fast(layers), run(layers)
        for a, e in zip(actual, expected, strict=True):
            assert_accurate(a, e.double(), 1e-6)
        # Triton's projection has the cosine of the sums before their rounding to fp32.
        assert_accurate(again, cosines, 1e-6 if backend == "triton" else 1e-12)
        assert torch.equal(selected, chosen)


def test_compiled_in_place(backend: str) -> None:
    def run(x: Tensor, other: Tensor, u: Tensor) -> Tensor:
        sk.project_out_layers_([x, other], [u, u], backend=backend)
        return x + other

    fast = compiled(run, backend)
    for d in (24, 40):
        tensors = [torch.randn(d, 4), torch.randn(d, 6)[:, :4]]
        u = random_basis(d, 3)
        expected = [truth.project_out(t, u) for t in tensors]
        result = fast(*tensors, u)
        for t, e in zip(tensors, expected, strict=True):
            assert_accurate(t, e, 1e-6)
        assert_accurate(result, expected[0] + expected[1], 1e-6)


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    layer = random_layer(40, 60, 4)
    x, base, a, b = torch.randn(12, 60), torch.randn(12, 40), layer.lora_A, layer.lora_B
    u = random_basis(40, 3)

    def run() -> list[Tensor]:
        projection = sk.project_lowrank(*layer, backend=backend)
        tensors = leaves([x, base, a, b, u])
        y = sk.salora_linear(*tensors, 0.5, backend=backend)  # type: ignore[arg-type]
        z = sk.project_out(tensors[3], tensors[4], backend=backend)
        grads = torch.autograd.grad((y.sum() + z.square().sum()), tensors)
        factor, rows = leaves([a.T, u.sum(1)[:12]])
        applied, dense = sk.gram_apply(x, factor, rows, backend=backend), sk.gram(tensors[0], rows)
        grads += torch.autograd.grad(applied.square().sum() + dense.sum(), (factor, rows, tensors[0]))
        cosine = sk.update_cosine(projection.lora_B, b, a, backend=backend)
        return [projection.lora_B, projection.v_norm, projection.cosine, y, z, cosine, applied, dense, *grads]  # type: ignore[list-item]

    plain = run()
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        inside = run()
    for left, right in zip(plain, inside, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def test_inference_mode(backend: str) -> None:
    layer = random_layer(20, 30, 2)
    with torch.inference_mode():
        x, u = torch.randn(20, 3), random_basis(20, 2)
        expected = truth.project_out(x, u)
        sk.project_out_layers_([x], [u], backend=backend)
        assert_accurate(x, expected, 1e-6)
        inside = sk.project_lowrank(*layer, backend=backend).lora_B
    assert torch.equal(inside, sk.project_lowrank(*layer, backend=backend).lora_B)  # type: ignore[arg-type]
