"""The CUDA kernels of every operator but the projection, on emulated devices, against fp64 truth.

Each result must be accurate, and the same bits in every order in which threads, blocks and copies may go, for every
number of multiprocessors and of blocks that run at the same time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from safelora_kernels import reference

from ..ops import truth
from ..ops.truth import FLOATS, assert_accurate, random_basis
from .emulated import ORDERS, Device, emulator, need, run, run_all

FP64_BOUND = 1e-13
PROJECT_OUT_BOUND = 1e-6
SALORA_BOUND = 1e-5
COSINE_BOUND = 1e-12
NAN = float("nan")

# An A100 with few multiprocessors, and an H100 with many.
A100 = Device(arch=80, sm_count=2)
H100 = Device(arch=90, sm_count=7, l2_bytes=50 << 20, shared_bytes=227 << 10, resident=21)
TARGETS = [
    pytest.param(("simt", A100), id="simt"),
    pytest.param(("ptx", A100), id="sm_80"),
    pytest.param(("ptx", H100), id="sm_90a"),
]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> tuple[str, Device]:
    """A driver and its device."""
    return request.param  # type: ignore[no-any-return]


def call(target: tuple[str, Device], op: str, *args: Any) -> Any:
    """In one order."""
    driver, device = target
    return run(op, *args, driver=driver, device=device)


def call_without_tensors(target: tuple[str, Device], op: str, *args: Any) -> Any:
    """The CUDA implementation, which no tensor names."""
    need(target[0])
    overload = getattr(emulator(target[0]).ops, op).default
    return overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)


def every_order(target: tuple[str, Device], op: str, *args: Any) -> Any:
    """In all orders of the driver, and on another device: the bits must agree."""
    driver, device = target
    results = run_all(op, *args, drivers=[driver], device=device)[driver]
    elsewhere = run(op, *args, driver=driver, device=Device(device.arch, 9, 1 << 20, device.shared_bytes, 50))
    for first, second in zip(tensors_of(results), tensors_of(elsewhere), strict=True):
        assert torch.equal(first, second)
    return results


def tensors_of(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for item in value for t in tensors_of(item)]


# update_cosine.


def cosine_factors(
    d_out: int, d_in: int, rank: int, kinds: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3
) -> list[Tensor]:
    old = torch.randn(d_out, rank)
    return [
        t.to(kind)
        for t, kind in zip((old + torch.randn(d_out, rank), old, torch.randn(rank, d_in)), kinds, strict=True)
    ]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 9, 3), (64, 128, 16), (97, 30, 17), (1100, 700, 8), (40, 1500, 33)], ids=str
)
def test_cosine_shapes(target: tuple[str, Device], shape: tuple[int, int, int]) -> None:
    factors = cosine_factors(*shape)
    (found,) = call(target, "update_cosine", *([t] for t in factors))
    assert abs(float(found - truth.cosine(*factors))) <= COSINE_BOUND


def test_cosines_of_many_dtypes_and_layouts_in_every_order(target: tuple[str, Device]) -> None:
    kinds = [(new, old, FLOATS[i % 4]) for i, new in enumerate(FLOATS) for old in FLOATS]
    items = [cosine_factors(20 + 9 * i, 70 - 3 * i, 1 + i, kind) for i, kind in enumerate(kinds)]
    items.append(cosine_factors(600, 1100, 18))
    items += [
        [truth.layouts(t)[kind] for t in cosine_factors(33, 40, 9)] for kind in ("transposed", "strided", "offset")
    ]
    items.append([t.t().contiguous().t() for t in cosine_factors(32, 64, 16, (torch.bfloat16,) * 3)])
    found = every_order(target, "update_cosine", *(list(ts) for ts in zip(*items, strict=True)))
    for cosine, factors in zip(found, items, strict=True):
        assert abs(float(cosine - truth.cosine(*factors))) <= COSINE_BOUND


def test_cosine_of_more_items_than_one_launch_holds(target: tuple[str, Device]) -> None:
    items = [cosine_factors(3, 4, 2) for _ in range(241)]
    found = call(target, "update_cosine", *(list(ts) for ts in zip(*items, strict=True)))
    expected = torch.stack([truth.cosine(*factors) for factors in items])
    assert float((found - expected).abs().max()) <= COSINE_BOUND


def test_cosine_special_values(target: tuple[str, Device]) -> None:
    new, old, a = cosine_factors(20, 12, 3)
    zero, bad = torch.zeros(20, 3), old.clone()
    bad[4, 1] = NAN
    endless = a.clone()
    endless[0, 0] = torch.inf
    news = [zero, new, old, -old, bad, new, new, new[:0], new[:, :0]]
    olds = [old, zero, old, old, old, bad, old, old[:0], old[:, :0]]
    found = call(target, "update_cosine", news, olds, [a, a, a, a, a, a, endless, a, a[:0]])
    assert found[:2].tolist() == [0.0, 0.0]
    assert abs(float(found[2]) - 1) <= COSINE_BOUND
    assert abs(float(found[3]) + 1) <= COSINE_BOUND
    assert float(found.nan_to_num(0).abs().max()) <= 1
    assert bool(found[4:7].isnan().all())
    assert found[7:].tolist() == [0.0, 0.0]
    assert call_without_tensors(target, "update_cosine", [], [], []).shape == (0,)


def test_cosine_of_tiny_fp16_factors(target: tuple[str, Device]) -> None:
    factors = [(1e-6 * t).half() for t in cosine_factors(300, 80, 4)]
    (found,) = call(target, "update_cosine", *([t] for t in factors))
    assert abs(float(found - truth.cosine(*factors))) <= COSINE_BOUND


# select_layers.


def selections(n: int) -> list[tuple[float | None, int | None, str]]:
    counts = sorted({0, 1, n // 3, n - 1, n, n + 5})
    modes: list[tuple[float | None, int | None]] = [(t, None) for t in (-1.0, 0.0, 0.35, 2.0)]
    return [(t, k, rule) for t, k in modes + [(None, k) for k in counts] for rule in ("strict", "authors")]


def assert_selects_as_reference(target: tuple[str, Device], cosines: Tensor) -> None:
    for threshold, num_layers, rule in selections(len(cosines)):
        found = call(target, "select_layers", cosines, threshold, num_layers, rule)
        expected = reference.select_layers(cosines, threshold=threshold, num_layers=num_layers, rule=rule)  # type: ignore[arg-type]
        assert torch.equal(found, expected), (threshold, num_layers, rule)


@pytest.mark.parametrize("n", [1, 2, 31, 224, 1500])
def test_selection_equals_the_reference(target: tuple[str, Device], n: int) -> None:
    assert_selects_as_reference(target, torch.rand(n, dtype=torch.float64))


def test_selection_with_ties_nan_and_signed_zeros(target: tuple[str, Device]) -> None:
    choices = torch.tensor([0.2, 0.2, 0.200004, 0.200006, 0.35, -0.0, 0.0, -0.5, NAN, torch.inf, -torch.inf, 1e-320])
    assert_selects_as_reference(target, choices.double()[torch.randint(len(choices), (1100,))])
    assert_selects_as_reference(target, torch.full((40,), NAN, dtype=torch.float64))
    assert_selects_as_reference(target, torch.full((1030,), 0.25, dtype=torch.float64))
    assert_selects_as_reference(target, torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=torch.float64))


def test_selection_rounds_as_torch_does(target: tuple[str, Device]) -> None:
    # Halves of the fifth decimal, and their neighbours in fp64.
    halves = torch.arange(34900, 35100, dtype=torch.float64) * 1e-5 + 0.5e-5
    around = torch.cat([halves, halves.nextafter(torch.tensor(1.0)), halves.nextafter(torch.tensor(0.0))])
    for threshold in (0.35, 0.35001):
        found = call(target, "select_layers", around, threshold, None, "authors")
        assert torch.equal(found, torch.round(around, decimals=5) <= threshold)


def test_selection_of_a_hundred_thousand(target: tuple[str, Device]) -> None:
    cosines = torch.rand(100_000, dtype=torch.float64).mul(500).round().div(500)
    cosines[::7] = NAN
    for threshold, num_layers in ((None, 30_011), (0.35, None)):
        found = call(target, "select_layers", cosines, threshold, num_layers, "strict")
        assert torch.equal(found, reference.select_layers(cosines, threshold=threshold, num_layers=num_layers))


def test_selection_in_every_order(target: tuple[str, Device]) -> None:
    cosines = torch.rand(1300, dtype=torch.float64).mul(50).round().div(50)
    every_order(target, "select_layers", cosines, None, 400, "strict")
    assert call(target, "select_layers", cosines[:0], None, 4, "strict").shape == (0,)
    assert call(target, "select_layers", cosines[:0], 0.5, None, "strict").shape == (0,)


# project_out_layers and project_out_layers_.


def oriented(x: Tensor, side: str) -> Tensor:
    return x if side == "left" else x.t().contiguous()


def project_out_bound(*tensors: Tensor) -> float:
    return FP64_BOUND if all(t.dtype == torch.float64 for t in tensors) else PROJECT_OUT_BOUND


SHAPES = [
    (1, 1, 1),
    (7, 1, 3),
    (64, 16, 32),
    (65, 17, 1),
    (128, 5, 128),
    (300, 33, 7),
    (40, 150, 8),
    (512, 3, 70),
    (9, 4, 0),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_project_out_shapes(target: tuple[str, Device], side: str) -> None:
    """All in one launch. Half of a whole space's basis, so that the complement of a full one is not zero."""
    xs = [oriented(torch.randn(d, m), side) for d, m, _ in SHAPES]
    bases = [0.5 * random_basis(d, k) for d, _, k in SHAPES]
    for x, u, y in zip(xs, bases, every_order(target, "project_out_layers", xs, bases, side), strict=True):
        assert_accurate(y, truth.project_out(x, u, side), PROJECT_OUT_BOUND)


@pytest.mark.parametrize("side", ["left", "right"])
def test_project_out_dtypes(target: tuple[str, Device], side: str) -> None:
    xs = [oriented(torch.randn(150, 24), side).to(dtype) for dtype in FLOATS for _ in FLOATS]
    bases = [random_basis(150, 12, dtype) for _ in FLOATS for dtype in FLOATS]
    for x, u, y in zip(xs, bases, call(target, "project_out_layers", xs, bases, side), strict=True):
        assert y.dtype == x.dtype
        assert_accurate(y, truth.project_out(x, u, side), project_out_bound(x, u))


@pytest.mark.parametrize("side", ["left", "right"])
def test_project_out_layouts_in_place(target: tuple[str, Device], side: str) -> None:
    """Every layout of both operands: the same values out of place and in place, and nothing between the elements."""
    kinds = ["contiguous", "transposed", "strided", "offset"]
    x, u = oriented(torch.randn(70, 19), side), random_basis(70, 9)
    expected = truth.project_out(x, u, side)
    pairs = [(truth.layouts(x.clone())[i], truth.layouts(u)[j]) for i in kinds for j in kinds]
    xs, bases = [list(ts) for ts in zip(*pairs, strict=True)]
    results = call(target, "project_out_layers", xs, bases, side)
    call(target, "project_out_layers_", xs, bases, side)
    for x, y in zip(xs, results, strict=True):
        assert_accurate(y, expected, PROJECT_OUT_BOUND)
        assert torch.equal(x, y)
    for x in xs[2 * len(kinds) :]:
        whole = torch.empty(0).set_(x.untyped_storage())  # type: ignore[call-overload]
        mine = torch.zeros_like(whole)
        mine.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(1)
        assert bool((whole[mine == 0] == 0).all())


@pytest.mark.parametrize("side", ["left", "right"])
def test_project_out_in_place_in_every_order(target: tuple[str, Device], side: str) -> None:
    driver, device = target
    # Several chunks of rows, several units of columns, several panels of the basis.
    sources = [
        oriented(torch.randn(*shape), side).to(t)
        for shape, t in [((600, 40), torch.float32), ((530, 7), torch.bfloat16)]
    ]
    bases = [random_basis(600, 40), random_basis(530, 5)]
    expected = call(target, "project_out_layers", sources, bases, side)
    for order in ORDERS[driver]:
        xs = [x.clone() for x in sources]
        run("project_out_layers_", xs, bases, side, driver=driver, device=device, order=order)
        for x, y in zip(xs, expected, strict=True):
            assert torch.equal(x, y), order


def test_project_out_result_does_not_depend_on_the_other_items(target: tuple[str, Device]) -> None:
    xs = [torch.randn(300, 20), torch.randn(20, 1).half(), torch.randn(260, 70)]
    bases = [random_basis(x.shape[0], 6) for x in xs]
    together = call(target, "project_out_layers", xs, bases, "left")
    alone = [call(target, "project_out_layers", [x], [u], "left")[0] for x, u in zip(xs, bases, strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(together, alone, strict=True))


def test_project_out_of_more_items_than_one_launch_holds(target: tuple[str, Device]) -> None:
    shared = random_basis(12, 3)
    xs = [torch.randn(12, 2) for _ in range(243)]
    call(target, "project_out_layers_", xs, [shared] * len(xs), "left")
    for x in xs:
        assert float((shared.double().T @ x.double()).norm()) <= PROJECT_OUT_BOUND * 5


def test_project_out_special_values(target: tuple[str, Device]) -> None:
    x, u = torch.randn(30, 4), random_basis(30, 3)
    x[3, 1] = NAN
    x[5, 2] = torch.inf
    (y,) = call(target, "project_out_layers", [x], [u], "left")
    assert bool((~y[:, 1:3].isfinite()).all())
    assert bool(y[:, [0, 3]].isfinite().all())
    for x, basis in [(torch.randn(6, 5), torch.zeros(6, 0)), (torch.randn(6, 0), random_basis(6, 2))]:
        (y,) = call(target, "project_out_layers", [x], [basis], "left")
        assert torch.equal(x, y)
    assert call_without_tensors(target, "project_out_layers", [], [], "left") == []
    call_without_tensors(target, "project_out_layers_", [], [], "right")


def test_project_out_of_a_long_matrix(target: tuple[str, Device]) -> None:
    """More rows than chunks of the usual height."""
    x, u = torch.randn(17_000, 3, dtype=torch.float32).bfloat16(), random_basis(17_000, 4)
    (y,) = call(target, "project_out_layers", [x], [u], "left")
    wide = u.double()
    assert_accurate(y, x.double() - wide @ (wide.T @ x.double()), PROJECT_OUT_BOUND)


# salora_linear and its gradients.


def salora_inputs(
    tokens: int, d_in: int, d_out: int, rank: int, k: int, activation: torch.dtype, factor: torch.dtype
) -> list[Tensor]:
    basis = torch.float64 if factor == torch.float64 else torch.float32
    return [
        torch.randn(tokens, d_in).to(activation),
        torch.randn(tokens, d_out).to(activation),
        (torch.randn(rank, d_in) / d_in**0.5).to(factor),
        torch.randn(d_out, rank).to(factor),
        random_basis(d_out, min(k, d_out), basis),
    ]


def forward_and_backward(
    tensors: list[Tensor], scaling: float, grad: Tensor, needs: list[bool], apply: Any
) -> tuple[list[Tensor], list[Tensor]]:
    x, _, a, b, u = tensors
    y, h, projected_B = apply("salora_linear", *tensors, scaling)
    gradients = apply("salora_linear_backward", grad, x, h, a, b, projected_B, u, scaling, needs)
    return [y, h, projected_B], gradients


def dense(tensors: list[Tensor], scaling: float, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The dense fp64 forward, and autograd through it: gradients of x, lora_A, lora_B and the basis."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y = truth.salora(*wide, scaling)  # type: ignore[arg-type]
    y.backward(grad.double())
    return y.detach(), [wide[i].grad for i in (0, 2, 3, 4)]  # type: ignore[misc]


def assert_salora(target: tuple[str, Device], tensors: list[Tensor], grad: Tensor, apply: Any, bound: float) -> None:
    expected, gradients = dense(tensors, 0.7, grad)
    (y, h, projected_B), found = forward_and_backward(tensors, 0.7, grad, [True] * 4, apply)
    x, base, a, b, u = tensors
    assert (y.dtype, h.dtype, projected_B.dtype) == (base.dtype, h.dtype, h.dtype)
    assert_accurate(y, expected, bound, "y")
    assert_accurate(h, x.double() @ a.double().T, bound, "h")
    assert_accurate(projected_B, truth.project_out(b, u), bound, "projected_B")
    for name, tensor, result, exact in zip("xABU", (x, a, b, u), found, gradients, strict=True):
        assert result.dtype == tensor.dtype
        assert_accurate(result, exact, bound, f"gradient of {name}")


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (3, 7, 5, 2, 1),
        (16, 64, 64, 16, 32),
        (33, 130, 70, 17, 7),
        (100, 24, 300, 64, 5),
        (5, 20, 30, 150, 3),
    ],
    ids=str,
)
def test_salora_shapes(target: tuple[str, Device], shape: tuple[int, int, int, int, int]) -> None:
    tensors = salora_inputs(*shape, torch.float32, torch.float32)
    grad = torch.randn(shape[0], shape[2])
    assert_salora(target, tensors, grad, lambda op, *args: call(target, op, *args), SALORA_BOUND)


@pytest.mark.parametrize("factor", FLOATS)
@pytest.mark.parametrize("activation", FLOATS)
def test_salora_dtypes(target: tuple[str, Device], activation: torch.dtype, factor: torch.dtype) -> None:
    tensors = salora_inputs(40, 48, 64, 8, 6, activation, factor)
    grad = torch.randn(40, 64).to(activation)
    bound = 1e-12 if activation == factor == torch.float64 else SALORA_BOUND
    assert_salora(target, tensors, grad, lambda op, *args: call(target, op, *args), bound)


def test_salora_in_every_order(target: tuple[str, Device]) -> None:
    """Two chunks of tokens, ranges of columns and panels of ranks; bf16 activations and fp32 factors."""
    tensors = salora_inputs(140, 270, 40, 70, 9, torch.bfloat16, torch.float32)
    grad = torch.randn(140, 40).bfloat16()
    assert_salora(target, tensors, grad, lambda op, *args: every_order(target, op, *args), SALORA_BOUND)


@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
def test_salora_layouts(target: tuple[str, Device], kind: str) -> None:
    plain = salora_inputs(30, 40, 48, 5, 4, torch.bfloat16, torch.float32)
    tensors, grad = [truth.layouts(t)[kind] for t in plain], truth.layouts(torch.randn(30, 48).bfloat16())[kind]
    assert_salora(target, tensors, grad, lambda op, *args: call(target, op, *args), SALORA_BOUND)


def test_salora_expanded_output_gradient(target: tuple[str, Device]) -> None:
    tensors = salora_inputs(30, 20, 32, 5, 4, torch.float32, torch.float32)
    for grad in (torch.ones(()).expand(30, 32), torch.randn(32).expand(30, 32)):
        assert_salora(target, tensors, grad, lambda op, *args: call(target, op, *args), SALORA_BOUND)


@pytest.mark.parametrize("wanted", range(4))
def test_salora_only_the_gradients_wanted(target: tuple[str, Device], wanted: int) -> None:
    tensors = salora_inputs(20, 30, 40, 3, 4, torch.float32, torch.float32)
    grad = torch.randn(20, 40)
    needs = [i == wanted for i in range(4)]
    found = forward_and_backward(tensors, 0.7, grad, needs, lambda op, *args: call(target, op, *args))[1]
    assert [t.numel() > 0 for t in found] == needs
    assert_accurate(found[wanted], dense(tensors, 0.7, grad)[1][wanted], SALORA_BOUND)


def test_salora_edges(target: tuple[str, Device]) -> None:
    def apply(op: str, *args: Any) -> Any:
        return call(target, op, *args)

    # no tokens: nothing to add, zero gradients
    tensors = salora_inputs(0, 10, 14, 3, 2, torch.float32, torch.float32)
    (y, h, projected_B), found = forward_and_backward(tensors, 0.5, torch.zeros(0, 14), [True] * 4, apply)
    assert (y.shape, h.shape) == ((0, 14), (0, 3))
    assert_accurate(projected_B, truth.project_out(tensors[3], tensors[4]), SALORA_BOUND)
    for tensor, result in zip((tensors[0], *tensors[2:]), found, strict=True):
        assert torch.equal(result, torch.zeros_like(tensor))
    # an empty basis: plain LoRA
    tensors = salora_inputs(6, 10, 14, 3, 0, torch.float32, torch.float32)
    assert_salora(target, tensors, torch.randn(6, 14), apply, SALORA_BOUND)
    # what is not finite shows in its own row
    x, base, a, b, u = salora_inputs(6, 10, 14, 3, 2, torch.bfloat16, torch.float32)
    x[2, 3] = NAN
    x[4, 1] = torch.inf
    y = apply("salora_linear", x, base, a, b, u, 1.0)[0]
    assert bool((~y[[2, 4]].isfinite()).all())
    assert bool(y[[0, 1, 3, 5]].isfinite().all())


def test_salora_gradient_stays_out_of_the_subspace(target: tuple[str, Device]) -> None:
    tensors = salora_inputs(64, 20, 96, 4, 5, torch.bfloat16, torch.float32)
    apply = lambda op, *args: call(target, op, *args)  # noqa: E731
    needs = [False, False, True, False]
    grad_B = forward_and_backward(tensors, 1.5, torch.randn(64, 96).bfloat16(), needs, apply)[1][2]
    assert float((tensors[4].double().T @ grad_B.double()).norm()) <= PROJECT_OUT_BOUND * float(grad_B.norm())


def test_salora_with_long_sums(target: tuple[str, Device]) -> None:
    """Sums of one sign over many entries, where cutting off in tensor cores would pile up."""
    x, a = torch.rand(16, 4096) + 0.5, torch.rand(8, 4096)
    base, b, u = torch.zeros(16, 32), torch.rand(32, 8), torch.zeros(32, 1)
    y = call(target, "salora_linear", x, base, a, b, u, 1.0)[0]
    assert_accurate(y, truth.salora(x, base, a, b, u, 1.0), 1e-6)


# gram_apply_layers.


def applied(target: tuple[str, Device], triples: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    return list(call(target, "gram_apply_layers", *map(list, zip(*triples, strict=True))))


def gram_truth(x: Tensor, z: Tensor, weights: Tensor) -> Tensor:
    return truth.gram_apply(x, z, weights if weights.numel() else None)


def test_gram_apply_shapes(target: tuple[str, Device]) -> None:
    """All in two launches: several spans, chunks, panels and blocks of columns; every other one without weights."""
    shapes = [(1, 1, 1), (7, 40, 8), (64, 64, 16), (65, 17, 1), (1100, 9, 5), (30, 530, 3), (130, 70, 33), (0, 5, 2)]
    xs, zs = [torch.randn(t, d) for t, d, _ in shapes], [torch.randn(d, r) for _, d, r in shapes]
    weights = [torch.rand(t) if i % 2 else torch.empty(0) for i, (t, _, _) in enumerate(shapes)]
    for *triple, y in zip(xs, zs, weights, every_order(target, "gram_apply_layers", xs, zs, weights), strict=True):
        assert_accurate(y, gram_truth(*triple), SALORA_BOUND)


def test_gram_apply_dtypes(target: tuple[str, Device]) -> None:
    triples = []
    for i, dtype in enumerate(FLOATS):
        for j, other in enumerate(FLOATS):
            weights = torch.rand(80).to(FLOATS[(i + j) % 4]) if j else torch.empty(0)
            triples.append((torch.randn(80, 24).to(dtype), torch.randn(24, 5).to(other), weights))
    for triple, y in zip(triples, applied(target, triples), strict=True):
        wide = torch.float64 in [t.dtype for t in triple]
        assert y.dtype == (torch.float64 if wide else torch.float32)
        assert_accurate(y, gram_truth(*triple), FP64_BOUND if wide else SALORA_BOUND)


def test_gram_apply_layouts(target: tuple[str, Device]) -> None:
    kinds = ["contiguous", "transposed", "strided", "offset"]
    x, z, weights = torch.randn(70, 19), torch.randn(19, 9), torch.rand(140)[::2]
    triples = [(truth.layouts(x)[i], truth.layouts(z)[j], weights) for i in kinds for j in kinds]
    for y in applied(target, triples):
        assert_accurate(y, gram_truth(x, z, weights), SALORA_BOUND)


def test_gram_apply_result_does_not_depend_on_the_other_items(target: tuple[str, Device]) -> None:
    triples = [
        (torch.randn(600, 20), torch.randn(20, 4), torch.rand(600)),
        (torch.randn(40, 30).half(), torch.randn(30, 20), torch.empty(0)),
        (torch.randn(70, 130).bfloat16(), torch.randn(130, 16), torch.rand(70)),
    ]
    alone = [applied(target, [triple])[0] for triple in triples]
    assert all(torch.equal(a, b) for a, b in zip(applied(target, triples), alone, strict=True))


def test_gram_apply_of_more_items_than_one_launch_holds(target: tuple[str, Device]) -> None:
    x, z = torch.randn(9, 12), torch.randn(12, 2)
    results = applied(target, [(x, z, torch.empty(0))] * 130)
    assert_accurate(results[0], gram_truth(x, z, torch.empty(0)), SALORA_BOUND)
    assert all(torch.equal(results[0], y) for y in results)


def test_gram_apply_special_values(target: tuple[str, Device]) -> None:
    x, z = torch.randn(30, 6), torch.randn(6, 3)
    z[2, 1] = NAN
    (y,) = applied(target, [(x, z, torch.empty(0))])
    assert bool((~y[:, 1].isfinite()).all())
    assert bool(y[:, [0, 2]].isfinite().all())
    (y,) = applied(target, [(torch.randn(0, 6), z, torch.empty(0))])
    assert torch.equal(y, torch.zeros(6, 3))
    assert call_without_tensors(target, "gram_apply_layers", [], [], []) == []


def test_gram_apply_with_long_sums(target: tuple[str, Device]) -> None:
    """Sums of one sign over many entries, where cutting off in tensor cores would pile up."""
    x, z = torch.rand(2100, 520) + 0.5, torch.rand(520, 2)
    (y,) = applied(target, [(x, z, torch.empty(0))])
    assert_accurate(y, x.double().T @ (x.double() @ z.double()), 1e-6)


# Under sanitizers.


@pytest.mark.parametrize("driver", ["asan", "tsan"])
def test_sanitized(driver: str) -> None:
    """No access out of bounds or misaligned, no race within blocks or between them."""
    tokens, width = 70, 40
    x, u = torch.randn(tokens, width).bfloat16(), random_basis(tokens, 5)
    run_all("project_out_layers", [x, x.t()], [u, random_basis(width, 3)], "left", drivers=[driver])
    run_all("project_out_layers", [x.t(), x], [u, random_basis(width, 3)], "right", drivers=[driver])
    run_all("update_cosine", *([t] for t in cosine_factors(70, 30, 18)), drivers=[driver])
    run_all("select_layers", torch.rand(50, dtype=torch.float64), None, 20, "strict", drivers=[driver])
    xs, zs = [torch.randn(530, 20).bfloat16(), x.t()], [torch.randn(20, 5), torch.randn(tokens, 18)]
    run_all("gram_apply_layers", xs, zs, [torch.rand(530), torch.empty(0)], drivers=[driver])
    tensors = salora_inputs(70, 36, 44, 5, 3, torch.bfloat16, torch.float32)
    y, h, projected_B = run_all("salora_linear", *tensors, 0.5, drivers=[driver])[driver]
    x, _, a, b, u = tensors
    backward = ("salora_linear_backward", torch.randn(70, 44), x, h, a, b, projected_B, u, 0.5, [True] * 4)
    run_all(*backward, drivers=[driver])
    assert bool(y.isfinite().all())
