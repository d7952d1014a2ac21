"""project_selected_layers: the published decisions, its parts, the operator as PyTorch sees it, and refusals."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import safelora_kernels as sk

from . import truth
from .truth import assert_accurate, random_layer

FP32_BOUND = 1e-5
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


def layers_that_differ(dtype: torch.dtype = torch.float32) -> list[truth.Layer]:
    """Two layers that tie, one whose update lies along the leading direction of V, and others between."""
    shapes = [(24, 32, 4), (24, 32, 4), (16, 24, 2), (40, 24, 4), (24, 24, 8), (8, 64, 8)]
    layers = [random_layer(*shape, weight=dtype, factor=dtype) for shape in shapes]
    layers[1] = layers[0]
    v = truth.difference(layers[3].aligned, layers[3].base)
    layers[3] = layers[3]._replace(lora_B=torch.linalg.svd(v).U[:, :4].to(dtype))
    return layers


def factors(layers: list[truth.Layer]) -> list[sk.LayerFactors]:
    return [sk.LayerFactors(*layer) for layer in layers]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", [{"threshold": 0.8}, {"threshold": 0.0}, {"num_layers": 3}, {"num_layers": 1}])
def test_decisions_and_factors_of_the_published_code(backend: str, mode: dict[str, Any], dtype: torch.dtype) -> None:
    layers = layers_that_differ(dtype)
    final, _, chosen = truth.authors_safe_lora(layers, **mode)
    result = sk.project_selected_layers(factors(layers), rule="authors", backend=backend, **mode)
    assert isinstance(result, sk.SelectedProjection)
    assert result.selected.tolist() == chosen
    for ours, expected in zip(result.lora_B, final, strict=True):
        assert isinstance(ours, Tensor)
        assert_accurate(ours, expected, 1e-6 if dtype == torch.float64 else FP32_BOUND)


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["frobenius", "none"])
@pytest.mark.parametrize("mode", [{"threshold": 0.8}, {"num_layers": 2}, {"num_layers": 3, "rule": "authors"}])
def test_is_the_projection_where_selected_and_the_factor_elsewhere(
    backend: str, mode: dict[str, Any], normalize: Any, out_dtype: torch.dtype | None
) -> None:
    layers = factors(layers_that_differ(torch.bfloat16))
    options: dict[str, Any] = {"normalize": normalize, "out_dtype": out_dtype, "backend": backend}
    result = sk.project_selected_layers(layers, **mode, **options)
    projections = sk.project_layers(layers, **options)
    cosines = torch.stack([p.cosine for p in projections])  # type: ignore[arg-type]
    assert torch.equal(result.cosine, cosines)
    assert torch.equal(result.v_norm, torch.stack([p.v_norm for p in projections]))
    assert torch.equal(result.selected, sk.select_layers(cosines, backend=backend, **mode))
    assert 0 < int(result.selected.sum()) < len(layers)
    for final, projection, layer, taken in zip(result.lora_B, projections, layers, result.selected, strict=True):
        expected = projection.lora_B if taken else layer.lora_B.to(final.dtype)  # type: ignore[union-attr]
        assert torch.equal(final, expected)  # type: ignore[arg-type]


def test_adapters_keep_their_places(backend: str) -> None:
    layer, other = random_layer(40, 50, 4, torch.bfloat16), random_layer(30, 20, 2)
    lora_B = [layer.lora_B, torch.randn(40, 3).bfloat16()]
    nested = [sk.LayerFactors(layer.aligned, layer.base, lora_B, [layer.lora_A, None]), sk.LayerFactors(*other)]
    result = sk.project_selected_layers(nested, num_layers=5, backend=backend)
    assert [isinstance(b, list) for b in result.lora_B] == [True, False]
    assert result.v_norm.shape == (2,)
    assert result.selected.tolist() == [True, False, True]
    assert bool(result.cosine[1].isnan())
    kept = result.lora_B[0][1]
    assert torch.equal(kept, lora_B[1])
    assert kept.untyped_storage().data_ptr() != lora_B[1].untyped_storage().data_ptr()


def test_special_values_keep_the_factor(backend: str) -> None:
    good, equal, bad = (random_layer(20, 30, 3) for _ in range(3))
    equal = equal._replace(base=equal.aligned.clone())
    bad.aligned[2, 2] = torch.nan
    result = sk.project_selected_layers(factors([good, equal, bad]), num_layers=3, backend=backend)
    assert result.selected.tolist() == [True, False, False]
    assert torch.equal(result.lora_B[1], equal.lora_B)  # type: ignore[arg-type]
    assert torch.equal(result.lora_B[2], bad.lora_B)  # type: ignore[arg-type]


def test_no_layers(backend: str) -> None:
    result = sk.project_selected_layers([], threshold=0.5, backend=backend)
    assert result.lora_B == []
    assert [tuple(t.shape) for t in result[1:]] == [(0,)] * 3
    assert result.selected.dtype == torch.bool


def test_the_reference_has_the_same_function() -> None:
    layers = factors(layers_that_differ())
    plain = sk.reference.project_selected_layers(layers, num_layers=2)
    ours = sk.project_selected_layers(layers, num_layers=2)
    assert torch.equal(plain.selected, ours.selected)
    for left, right in zip(plain.lora_B, ours.lora_B, strict=True):
        assert_accurate(right, left.double(), FP32_BOUND)  # type: ignore[arg-type, union-attr]


def test_the_native_kernels_do_the_work_on_the_cpu() -> None:
    if not sk.backends()["cpu"].available:
        pytest.skip(f"no native kernels: {sk.backends()['cpu'].reason}")
    with torch.device("cpu"):
        layers = factors(layers_that_differ())
    assert sk.explain("project_selected_layers", layers, num_layers=2).backend == "cpu"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sk.project_selected_layers(layers, num_layers=2)
    names = {event.name for event in profile.events()}
    assert {"safelora::project_layers", "safelora::select_layers"} <= names
    assert "aten::linalg_vector_norm" not in names


def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
    columns = [
        list(column) for column in zip(random_layer(12, 20, 3, dtype), random_layer(9, 9, 2, dtype), strict=True)
    ]
    return (*columns, [0, 1], None, 1, "strict", "frobenius", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.safelora.project_selected_layers.default, arguments(dtype))


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_compile() -> None:
    @torch.compile(fullgraph=True)
    def run(layers: list[sk.LayerFactors]) -> tuple[list[Any], Tensor]:
        result = sk.project_selected_layers(layers, num_layers=2)
        return result.lora_B, result.selected

    for extra in (0, 1):
        layers = factors(layers_that_differ())[: 4 + extra]
        final, selected = run(layers)
        expected = sk.project_selected_layers(layers, num_layers=2)
        assert torch.equal(selected, expected.selected)
        for left, right in zip(final, expected.lora_B, strict=True):
            assert_accurate(left, right.double(), 1e-6)  # type: ignore[union-attr]


def test_wrong_arguments_are_named() -> None:
    layer = random_layer(6, 8, 2)

    def refused(error: type[Exception], match: str, layers: Any = None, **options: Any) -> None:
        with pytest.raises(error, match=match):
            sk.project_selected_layers(layers or factors([layer]), **options)

    refused(ValueError, "exactly one of threshold and num_layers, got neither")
    refused(ValueError, "exactly one of threshold and num_layers, got both", threshold=0.5, num_layers=1)
    refused(ValueError, "rule must be one of", threshold=0.5, rule="paper")
    refused(ValueError, "num_layers must be 0 or more", num_layers=-1)
    refused(ValueError, "normalize must be one of", threshold=0.5, normalize="spectral")
    refused(TypeError, "out_dtype must be", threshold=0.5, out_dtype=torch.int8)
    refused(
        ValueError, r"layers\[0\].base must have shape", factors([layer._replace(base=layer.base[:5])]), threshold=0.5
    )
    refused(ValueError, "names no backend", threshold=0.5, backend="gpu")
    grad = factors([layer._replace(lora_B=layer.lora_B.requires_grad_())])
    refused(RuntimeError, "project_selected_layers records no gradients", grad, threshold=0.5)
    with pytest.raises(RuntimeError, match="records no gradients"):
        torch.ops.safelora.project_selected_layers.default(*([t] for t in grad[0]), [0], 0.5)
