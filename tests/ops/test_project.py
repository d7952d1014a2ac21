"""project_lowrank, project_layers and update_cosine against the dense fp64 truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import safelora_kernels as sk
from safelora_kernels.bench import baselines

from . import truth
from .truth import FLOATS, assert_accurate, random_layer

# Relative Frobenius error of B' before it is rounded to its dtype.
FP32_BOUND = 1e-5
FP64_BOUND = 1e-12
COSINE_BOUND = 1e-6

SHAPES = [
    (1, 1, 1),
    (5, 123, 3),
    (64, 64, 64),
    (130, 70, 12),
    (33, 257, 17),
    (17, 1000, 1),
    (300, 5, 2),
    (256, 512, 128),
    (100, 60, 512),
]


def bound(*dtypes: torch.dtype) -> float:
    return FP64_BOUND if torch.float64 in dtypes else FP32_BOUND


def check(layer: truth.Layer, backend: str, **options: object) -> sk.Projection:
    result = sk.project_lowrank(*layer, backend=backend, **options)  # type: ignore[arg-type]
    expected = truth.project(layer.aligned, layer.base, layer.lora_B, str(options.get("normalize", "frobenius")))
    assert isinstance(result.lora_B, Tensor)
    assert isinstance(result.cosine, Tensor)
    assert_accurate(result.lora_B, expected, bound(*(t.dtype for t in layer[:3])), "lora_B")
    norm = truth.difference(layer.aligned, layer.base).norm()
    assert result.v_norm.dtype == result.cosine.dtype == torch.float64
    assert result.v_norm.shape == result.cosine.shape == ()
    assert abs(float(result.v_norm / norm) - 1) <= 1e-6
    assert abs(float(result.cosine - truth.cosine(expected, layer.lora_B, layer.lora_A))) <= COSINE_BOUND
    return result


@pytest.mark.parametrize("factor", FLOATS)
@pytest.mark.parametrize("weight", FLOATS)
def test_dtypes(backend: str, weight: torch.dtype, factor: torch.dtype) -> None:
    layer = random_layer(96, 160, 8, weight, factor)
    result = check(layer, backend)
    assert isinstance(result.lora_B, Tensor)
    assert result.lora_B.dtype == factor


@pytest.mark.parametrize(
    ("aligned", "base"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float64, torch.bfloat16)],
)
def test_weights_of_two_dtypes(backend: str, aligned: torch.dtype, base: torch.dtype) -> None:
    check(random_layer(70, 150, 6, aligned, base_weight=base), backend)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: str, shape: tuple[int, int, int], weight: torch.dtype) -> None:
    check(random_layer(*shape, weight=weight), backend)


@pytest.mark.parametrize("size", [1, 2, 4, 16, 32, 63])
def test_small_layers_do_not_rely_on_errors_averaging_out(backend: str, size: int) -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        layer = random_layer(size, size, 1)
        v = truth.difference(layer.aligned, layer.base)
        expected = truth.project(layer.aligned, layer.base, layer.lora_B)
        error = sk.project_lowrank(*layer, backend=backend).lora_B.double() - expected  # type: ignore[union-attr]
        scale = (v.abs() @ (v.abs().T @ layer.lora_B.double().abs())) / v.norm()
        assert bool((error.abs() <= 2e-6 * scale).all())


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 200])
def test_ranks(backend: str, rank: int) -> None:
    check(random_layer(150, 310, rank, torch.bfloat16), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(backend: str, dtype: torch.dtype) -> None:
    layer = random_layer(128, 192, 8, dtype, dtype)
    layer = layer._replace(lora_B=layer.lora_B * 100)
    expected = truth.project(*layer[:3])
    ours = sk.project_lowrank(*layer, backend=backend).lora_B
    theirs = baselines.same_dtype_project(*layer[:3])
    assert isinstance(ours, Tensor)
    floor = truth.rounding_floor(expected, dtype)
    assert truth.relative_error(ours, expected) <= 2 * truth.relative_error(theirs, expected) + floor


def test_small_update_in_half_precision(backend: str) -> None:
    layer = random_layer(64, 128, 8, torch.float16, torch.float16)
    layer = layer._replace(lora_B=(torch.randn(64, 8) * 1e-6).half(), lora_A=(torch.randn(8, 128) * 1e-3).half())
    check(layer, backend)


def test_tiny_difference_survives(backend: str) -> None:
    base = torch.randn(64, 96).bfloat16()
    aligned = base.clone()
    aligned[::7, ::5] += 2e-2
    check(truth.Layer(aligned, base, torch.randn(64, 4), torch.randn(4, 96)), backend)


@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_layouts(backend: str, weight: torch.dtype, kind: str) -> None:
    layer = random_layer(67, 133, 9, weight)
    other = truth.Layer(*(truth.layouts(t)[kind] for t in layer))
    check(other, backend)
    check(layer._replace(base=other.base, lora_B=other.lora_B), backend)


def test_expanded_inputs(backend: str) -> None:
    layer = random_layer(40, 90, 4)
    check(layer._replace(base=layer.base[:1].expand(40, 90), lora_B=layer.lora_B[:, :1].expand(40, 4)), backend)


@pytest.mark.parametrize("normalize", ["frobenius", "none"])
def test_normalize(backend: str, normalize: str) -> None:
    check(random_layer(48, 80, 5), backend, normalize=normalize)


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_out_dtype(backend: str, out_dtype: torch.dtype) -> None:
    layer = random_layer(48, 80, 5, torch.bfloat16, torch.bfloat16)
    result = check(layer, backend, out_dtype=out_dtype)
    assert isinstance(result.lora_B, Tensor)
    assert result.lora_B.dtype == out_dtype


def test_without_lora_A(backend: str) -> None:
    layer = random_layer(48, 80, 5)
    with_A, without_A = (sk.project_lowrank(*layer[:n], backend=backend) for n in (4, 3))
    assert without_A.cosine is None
    assert isinstance(with_A.lora_B, Tensor)
    assert isinstance(without_A.lora_B, Tensor)
    assert torch.equal(with_A.lora_B, without_A.lora_B)


def test_arguments_are_left_alone(backend: str) -> None:
    layer = random_layer(48, 80, 5, torch.bfloat16)
    before = [t.clone() for t in layer]
    result = sk.project_lowrank(*layer, backend=backend)
    assert all(torch.equal(t, b) for t, b in zip(layer, before, strict=True))
    assert isinstance(result.lora_B, Tensor)
    assert all(result.lora_B.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in layer)


def test_a_ragged_batch_gives_each_layer_the_bits_it_has_alone(backend: str) -> None:
    layers = [
        random_layer(64, 96, 8, torch.bfloat16),
        random_layer(1, 7, 1),
        random_layer(130, 40, 16, torch.float16, torch.bfloat16),
        random_layer(33, 300, 5, torch.float32, torch.float64),
    ]
    together = sk.project_layers([sk.LayerFactors(*layer) for layer in layers], backend=backend)
    for layer, result in zip(layers, together, strict=True):
        alone = sk.project_lowrank(*layer, backend=backend)
        assert torch.equal(result.lora_B, alone.lora_B)  # type: ignore[arg-type]
        assert torch.equal(result.v_norm, alone.v_norm)
        assert torch.equal(result.cosine, alone.cosine)  # type: ignore[arg-type]


def test_several_adapters_over_one_pair(backend: str) -> None:
    layer = random_layer(72, 110, 8, torch.bfloat16)
    lora_B = [layer.lora_B, torch.randn(72, 3).bfloat16(), torch.randn(72, 17)]
    lora_A = [layer.lora_A, None, torch.randn(17, 110)]
    result, single = sk.project_layers(
        [sk.LayerFactors(layer.aligned, layer.base, lora_B, lora_A), sk.LayerFactors(*layer)], backend=backend
    )
    assert isinstance(result.lora_B, list)
    assert isinstance(result.cosine, list)
    assert result.cosine[1] is None
    for new, cosine, b, a in zip(result.lora_B, result.cosine, lora_B, lora_A, strict=True):
        expected = truth.project(layer.aligned, layer.base, b)
        assert new.dtype == b.dtype
        assert_accurate(new, expected, FP32_BOUND)
        if a is not None and cosine is not None:
            assert abs(float(cosine - truth.cosine(expected, b, a))) <= COSINE_BOUND
    assert isinstance(single.lora_B, Tensor)
    assert_accurate(single.lora_B, truth.project(*layer[:3]), FP32_BOUND)


def test_empty_batch(backend: str) -> None:
    assert sk.project_layers([], backend=backend) == []
    assert sk.update_cosine([], [], [], backend=backend).shape == (0,)


# The properties that define the map.


def apply(layer: truth.Layer, lora_B: Tensor, backend: str) -> Tensor:
    result = sk.project_lowrank(layer.aligned, layer.base, lora_B, backend=backend).lora_B
    assert isinstance(result, Tensor)
    return result


def test_linear_symmetric_and_homogeneous(backend: str) -> None:
    layer = random_layer(60, 90, 6, torch.float64, torch.float64)
    other = torch.randn(60, 6, dtype=torch.float64)
    mixed = apply(layer, 2 * layer.lora_B - 3 * other, backend)
    assert_accurate(mixed, 2 * apply(layer, layer.lora_B, backend) - 3 * apply(layer, other, backend), 1e-11)
    swapped = layer._replace(aligned=layer.base, base=layer.aligned)
    assert_accurate(apply(swapped, other, backend), apply(layer, other, backend), FP64_BOUND)
    scaled = layer._replace(aligned=layer.base - 2.5 * (layer.aligned - layer.base))
    assert_accurate(apply(scaled, other, backend), 2.5 * apply(layer, other, backend), 1e-11)


def test_positive_and_bounded(backend: str) -> None:
    layer = random_layer(60, 90, 6)
    v, b = truth.difference(layer.aligned, layer.base), layer.lora_B.double()
    result = apply(layer, layer.lora_B, backend).double()
    inner = (b * result).sum()
    assert abs(float(inner / ((v.T @ b).square().sum() / v.norm())) - 1) <= FP32_BOUND
    assert inner >= 0
    limit = torch.linalg.matrix_norm(v, 2).square() / v.norm() * b.norm()
    assert result.norm() <= limit * (1 + FP32_BOUND)


def test_rank_one_difference(backend: str) -> None:
    base = torch.zeros(50, 70)
    u, w, b = torch.randn(50), torch.randn(70), torch.randn(50, 4)
    aligned = torch.outer(u.double(), w.double())
    unit = u.double() / u.double().norm()
    expected = u.double().norm() * w.double().norm() * torch.outer(unit, unit @ b.double())
    result = sk.project_lowrank(aligned, base, b.double(), backend=backend).lora_B
    assert isinstance(result, Tensor)
    assert_accurate(result, expected, FP64_BOUND)


def test_orthogonal_difference_turns_nothing(backend: str) -> None:
    c = 0.25
    v = c * truth.random_basis(64, 64)
    b, a = torch.randn(64, 6), torch.randn(6, 64)
    result = sk.project_lowrank(v, torch.zeros(64, 64), b, a, backend=backend)
    assert isinstance(result.lora_B, Tensor)
    assert_accurate(result.lora_B, c**2 * b.double() / v.double().norm(), FP32_BOUND)
    assert abs(float(result.cosine) - 1) <= COSINE_BOUND  # type: ignore[arg-type]


def test_cosine_does_not_depend_on_scales_or_on_the_split_of_the_update(backend: str) -> None:
    layer = random_layer(60, 90, 6)

    def cosine(other: truth.Layer) -> float:
        return float(sk.project_lowrank(*other, backend=backend).cosine)  # type: ignore[arg-type]

    mix = torch.eye(6) + 0.3 * torch.randn(6, 6)
    same = [
        layer._replace(lora_B=32 * layer.lora_B),
        layer._replace(lora_A=-0.01 * layer.lora_A),
        layer._replace(aligned=layer.base + 3 * (layer.aligned - layer.base)),
        layer._replace(lora_B=layer.lora_B @ mix, lora_A=torch.linalg.solve(mix, layer.lora_A)),
    ]
    for other in same:
        assert abs(cosine(other) - cosine(layer)) <= 2 * COSINE_BOUND
    assert 0 <= cosine(layer) <= 1


# Degenerate values.


def test_equal_weights_leave_nothing_to_project_on(backend: str) -> None:
    layer = random_layer(40, 60, 4)
    for normalize in ("frobenius", "none"):
        result = sk.project_lowrank(
            layer.base, layer.base.clone(), layer.lora_B, layer.lora_A, normalize=normalize, backend=backend
        )
        assert float(result.v_norm) == 0
        assert isinstance(result.lora_B, Tensor)
        assert torch.equal(result.lora_B, torch.zeros_like(layer.lora_B))
        assert isinstance(result.cosine, Tensor)
        assert bool(result.cosine.isnan())


@pytest.mark.parametrize("zero", ["lora_B", "lora_A", "projected"])
def test_zero_update_has_cosine_zero(backend: str, zero: str) -> None:
    layer = random_layer(40, 60, 4)
    if zero == "projected":
        aligned, lora_B = layer.base.clone(), torch.zeros(40, 4)
        aligned[:20] += 1.0
        lora_B[20:] = torch.randn(20, 4)
        layer = layer._replace(aligned=aligned, lora_B=lora_B)
    else:
        layer = layer._replace(**{zero: torch.zeros_like(getattr(layer, zero))})
    result = sk.project_lowrank(*layer, backend=backend)
    assert float(result.cosine) == 0  # type: ignore[arg-type]
    assert float(result.v_norm) > 0
    if zero != "lora_A":
        assert isinstance(result.lora_B, Tensor)
        assert torch.equal(result.lora_B, torch.zeros(40, 4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["aligned", "base", "lora_B", "lora_A"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_input_gives_nan(backend: str, where: str, value: float, dtype: torch.dtype) -> None:
    layer = random_layer(40, 60, 4, dtype)
    bad = getattr(layer, where).clone()
    bad[1, 2] = value
    for normalize in ("frobenius", "none"):
        result = sk.project_lowrank(*layer._replace(**{where: bad}), normalize=normalize, backend=backend)
        assert isinstance(result.cosine, Tensor)
        assert isinstance(result.lora_B, Tensor)
        assert bool(result.cosine.isnan())
        assert bool(result.v_norm.isnan()) == (where in ("aligned", "base"))
        if where in ("aligned", "base"):
            assert bool(result.lora_B.isnan().all())
        elif where == "lora_B":
            assert not bool(result.lora_B[:, 2].isfinite().any())


def test_a_bad_layer_does_not_spoil_its_neighbours(backend: str) -> None:
    good, bad = random_layer(40, 60, 4), random_layer(40, 60, 4)
    bad.aligned[3, 3] = torch.nan
    results = sk.project_layers([sk.LayerFactors(*layer) for layer in (good, bad, good)], backend=backend)
    alone = sk.project_lowrank(*good, backend=backend)
    assert all(torch.equal(results[i].lora_B, alone.lora_B) for i in (0, 2))  # type: ignore[arg-type]


# update_cosine by itself.


@pytest.mark.parametrize("dtype", FLOATS)
def test_update_cosine(backend: str, dtype: torch.dtype) -> None:
    new, old, a = torch.randn(70, 6).to(dtype), torch.randn(70, 6).to(dtype), torch.randn(6, 45).to(dtype)
    single = sk.update_cosine(new, old, a, backend=backend)
    assert single.shape == ()
    assert single.dtype == torch.float64
    assert abs(float(single - truth.cosine(new, old, a))) <= 1e-12
    ragged = sk.update_cosine(
        [new, truth.layouts(old)["strided"], -old],
        [old, old, old],
        [a, a, truth.layouts(a)["transposed"]],
        backend=backend,
    )
    assert ragged.shape == (3,)
    assert abs(float(ragged[0] - single)) <= 1e-15
    assert abs(float(ragged[1]) - 1) <= 1e-12
    assert abs(float(ragged[2]) + 1) <= 1e-12


def test_update_cosine_of_nearly_equal_updates_keeps_its_digits(backend: str) -> None:
    old, a = torch.randn(200, 8, dtype=torch.float64), torch.randn(8, 300, dtype=torch.float64)
    new = old + 1e-4 * torch.randn(200, 8, dtype=torch.float64)
    ours, expected = sk.update_cosine(new, old, a, backend=backend), truth.cosine(new, old, a)
    assert abs(float((1 - ours) / (1 - expected)) - 1) <= 1e-5


@pytest.mark.parametrize("which", [0, 1, 2])
def test_update_cosine_special_values(backend: str, which: int) -> None:
    factors = [torch.randn(30, 4), torch.randn(30, 4), torch.randn(4, 20)]
    zero = [torch.zeros_like(t) if i == which else t for i, t in enumerate(factors)]
    assert float(sk.update_cosine(*zero, backend=backend)) == 0
    for value in (torch.nan, torch.inf):
        bad = [t.clone() for t in factors]
        bad[which][2, 1] = value
        assert bool(sk.update_cosine(*bad, backend=backend).isnan())


# The published decisions.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", [{"threshold": 0.8}, {"threshold": 0.0}, {"num_layers": 3}, {"num_layers": 1}])
def test_decisions_and_weights_of_the_published_code(backend: str, mode: dict[str, float], dtype: torch.dtype) -> None:
    shapes = [(24, 32, 4), (24, 32, 4), (16, 24, 2), (40, 24, 4), (24, 24, 8), (8, 64, 8)]
    layers = [random_layer(*shape, weight=dtype, factor=dtype) for shape in shapes]
    # Two layers that tie, and one whose update lies along the leading direction of V.
    layers[1] = layers[0]
    v = truth.difference(layers[3].aligned, layers[3].base)
    layers[3] = layers[3]._replace(lora_B=torch.linalg.svd(v).U[:, :4].to(dtype))

    final, cosines, chosen = truth.authors_safe_lora(layers, **mode)  # type: ignore[arg-type]
    results = sk.project_layers([sk.LayerFactors(*layer) for layer in layers], backend=backend)
    ours = torch.stack([r.cosine for r in results])  # type: ignore[arg-type]
    selected = sk.select_layers(ours, rule="authors", backend=backend, **mode)  # type: ignore[arg-type]

    assert selected.tolist() == chosen
    # Their cosine is rounded to five decimals.
    assert (ours - torch.tensor(cosines, dtype=torch.float64)).abs().max() <= 0.5e-5 + COSINE_BOUND
    for layer, result, taken, expected in zip(layers, results, selected, final, strict=True):
        applied = result.lora_B if taken else layer.lora_B
        assert isinstance(applied, Tensor)
        assert_accurate(applied, expected, 1e-6 if dtype == torch.float64 else FP32_BOUND)


# Refusals.


def test_wrong_arguments_are_named(backend: str) -> None:
    w, b, a = torch.randn(8, 12), torch.randn(8, 2), torch.randn(2, 12)

    def refused(error: type[Exception], match: str, *layer: object, **options: object) -> None:
        with pytest.raises(error, match=match):
            sk.project_lowrank(*layer, backend=backend, **options)  # type: ignore[arg-type]

    refused(ValueError, r"layers\[0\].base must have shape \(8, 12\).*got \(12, 8\)", w, w.t(), b)
    refused(ValueError, r"lora_B must have shape \(8, 2\).*got \(7, 2\)", w, w, b[:7])
    refused(ValueError, r"lora_A must have shape \(2, 12\).*got \(2, 11\)", w, w, b, a[:, :11])
    refused(ValueError, "2-D, got shape", w[0], w, b)
    refused(ValueError, "rank 0", w, w, b[:, :0])
    refused(TypeError, "int64", w.long(), w, b)
    refused(TypeError, "complex64", w, w, b.to(torch.complex64))
    refused(TypeError, "sparse_coo: call to_dense", w.to_sparse(), w, b)
    refused(TypeError, "must be a torch.Tensor, got ndarray", w.cpu().numpy(), w, b)
    refused(TypeError, "lora_A must be a tensor or None", w, w, b, [a])
    refused(ValueError, "1 lora_B, 2 lora_A", w, w, [b], [a, a])
    refused(ValueError, "no adapter", w, w, [], [])
    refused(ValueError, "normalize must be one of 'frobenius', 'none', got 'l2'", w, w, b, normalize="l2")
    refused(TypeError, "out_dtype", w, w, b, out_dtype=torch.int8)
    refused(ValueError, f"meta.*{w.device}: move", w, w.to("meta"), b)
    with pytest.raises(ValueError, match=r"lora_B_new\[0\] must have shape"):
        sk.update_cosine(b[:7], b, a, backend=backend)
    with pytest.raises(ValueError, match="2 lora_B_new, 1 lora_B"):
        sk.update_cosine([b, b], [b], [a], backend=backend)
    with pytest.raises(TypeError, match="lora_B must be a list"):
        sk.update_cosine([b], b, a, backend=backend)


def test_gradients_are_refused_not_dropped(backend: str) -> None:
    layer = random_layer(20, 30, 2)
    b = layer.lora_B.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        sk.project_lowrank(layer.aligned, layer.base, b, backend=backend)
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        sk.update_cosine(b, layer.lora_B, layer.lora_A, backend=backend)
    with torch.no_grad():
        sk.project_lowrank(layer.aligned, layer.base, b, backend=backend)
    sk.project_lowrank(layer.aligned, layer.base, b.detach(), backend=backend)
