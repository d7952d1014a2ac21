"""project_layers on layers of 128 rows and columns and more, which AVX-512 and AMX walk row by row, in cells of 16×128.

Inner cells, edges, and layouts that cannot be read in vectors are different code, and so is every weight dtype.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import safelora_kernels as sk

from . import truth
from .test_determinism import THREADS, threads
from .test_project import COSINE_BOUND, FP32_BOUND, check
from .truth import assert_accurate, random_layer

__all__ = ["threads"]

WEIGHTS = [torch.bfloat16, torch.float16, torch.float32]
# Inner cells alone; an edge of one row or column, or all but one, on either side; nothing but edges beyond one cell.
SHAPES = [(128, 128), (256, 384), (129, 256), (143, 255), (160, 129), (145, 257), (272, 383), (131, 1000)]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_whole_cells_and_edges(backend: str, shape: tuple[int, int], weight: torch.dtype) -> None:
    check(random_layer(*shape, 5, weight), backend)


@pytest.mark.parametrize("rank", [1, 16, 17, 64])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_panels_of_sixteen_ranks(backend: str, weight: torch.dtype, rank: int) -> None:
    check(random_layer(150, 310, rank, weight), backend)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
def test_layouts_of_both_weights_and_of_one(backend: str, kind: str, weight: torch.dtype) -> None:
    """Conv1D weights are transposed; slices of fused projections lie off the start of their rows."""
    layer = random_layer(147, 270, 9, weight)
    other = truth.Layer(*(truth.layouts(t)[kind] for t in layer))
    check(other, backend)
    check(layer._replace(base=other.base), backend)
    check(other._replace(base=layer.base), backend)


@pytest.mark.parametrize(
    ("aligned", "base"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
def test_weights_of_two_dtypes(backend: str, aligned: torch.dtype, base: torch.dtype) -> None:
    check(random_layer(144, 260, 6, aligned, base_weight=base), backend)


@pytest.mark.parametrize("factor", [torch.bfloat16, torch.float16])
def test_factors_in_half_precision(backend: str, factor: torch.dtype) -> None:
    check(random_layer(144, 260, 6, torch.bfloat16, factor), backend)


def test_several_adapters_share_panels(backend: str) -> None:
    """Ranks 8, 3, 17 and 30 lie in panels of 16 without gaps: each factor gets its own columns back."""
    layer = random_layer(200, 300, 8, torch.bfloat16)
    lora_B = [layer.lora_B, torch.randn(200, 3).bfloat16(), torch.randn(200, 17), torch.randn(30, 200).t()]
    lora_A = [layer.lora_A, None, torch.randn(17, 300), torch.randn(30, 300).half()]
    (result,) = sk.project_layers([sk.LayerFactors(layer.aligned, layer.base, lora_B, lora_A)], backend=backend)
    for new, cosine, b, a in zip(result.lora_B, result.cosine, lora_B, lora_A, strict=True):  # type: ignore[arg-type]
        expected = truth.project(layer.aligned, layer.base, b)
        assert_accurate(new, expected, FP32_BOUND)
        assert (cosine is None) == (a is None)
        if cosine is not None:
            assert abs(float(cosine - truth.cosine(expected, b, a))) <= COSINE_BOUND


# In tiles of 16, pairs of columns, groups of 32 and cells of 128: first and last, inner cells and edges.
ENTRIES = [(0, 0), (0, 1), (15, 16), (16, 31), (17, 32), (37, 127), (143, 128), (144, 255), (159, 256), (159, 287)]


def test_a_difference_of_one_entry_goes_where_it_belongs(backend: str) -> None:
    """V = v·e_i·e_jᵀ, so that B' is row i of B times |v|, in the same row, and exactly zero elsewhere."""
    base = torch.randn(160, 288).bfloat16()
    lora_B = torch.randn(160, 20)
    for i, j in ENTRIES:
        aligned = base.clone()
        aligned[i, j] += 1
        expected = truth.project(aligned, base, lora_B)
        result = sk.project_lowrank(aligned, base, lora_B, backend=backend).lora_B
        assert_accurate(result, expected, FP32_BOUND, f"entry {i}, {j}")  # type: ignore[arg-type]
        assert torch.equal(result != 0, expected != 0)


@pytest.mark.parametrize("scale", [1e-13, 1e-3, 1e19])
def test_weights_far_from_one(backend: str, scale: float) -> None:
    """Squares of the first and the last leave the range of fp32."""
    layer = random_layer(144, 260, 4)
    check(layer._replace(aligned=layer.aligned * scale, base=layer.base * scale), backend)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("at", [(3, 5), (143, 7), (7, 270), (143, 270)], ids=str)
def test_a_weight_that_is_not_finite_spoils_its_layer_alone(
    backend: str, at: tuple[int, int], weight: torch.dtype
) -> None:
    good, bad = random_layer(144, 271, 4, weight), random_layer(144, 271, 4, weight)
    for value in (torch.nan, torch.inf):
        bad.aligned[at] = value
        first, spoiled, last = sk.project_layers([sk.LayerFactors(*x) for x in (good, bad, good)], backend=backend)
        assert bool(spoiled.lora_B.isnan().all()) and bool(spoiled.v_norm.isnan())  # type: ignore[union-attr]
        assert torch.equal(first.lora_B, last.lora_B)  # type: ignore[arg-type]
        assert_accurate(first.lora_B, truth.project(*good[:3]), FP32_BOUND)  # type: ignore[arg-type]


# The NaN that CPUs make, the one that GPUs make, and those with the fewest and the most bits set.
NANS = [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1]


@pytest.mark.parametrize("bits", NANS, ids=hex)
def test_any_nan_in_a_factor_spoils_its_column_alone(backend: str, bits: int) -> None:
    layer = random_layer(144, 271, 20, torch.bfloat16)
    expected = truth.project(*layer[:3])
    layer.lora_B.view(torch.int32)[100, 17] = bits
    result = sk.project_lowrank(*layer, backend=backend)
    assert isinstance(result.lora_B, Tensor) and isinstance(result.cosine, Tensor)
    assert bool(result.cosine.isnan())
    assert not bool(result.lora_B[:, 17].isfinite().any())
    others = [c for c in range(20) if c != 17]
    assert_accurate(result.lora_B[:, others], expected[:, others], FP32_BOUND)


def test_bits_do_not_depend_on_threads_or_company(backend: str, threads: object) -> None:
    """Layers of one part and of eight, of one panel and of five, alone and together."""
    shapes = [(128, 128, 5), (300, 530, 70), (140, 1100, 16), (513, 260, 33)]
    layers = [random_layer(*s, weight=w) for s, w in zip(shapes, [*WEIGHTS, torch.bfloat16], strict=True)]
    runs = []
    for count in THREADS.get(backend, (1, 2, 7, 7)):
        threads(count)  # type: ignore[operator]
        runs.append(sk.project_layers([sk.LayerFactors(*layer) for layer in layers], backend=backend))
    runs.append([sk.project_lowrank(*layer, backend=backend) for layer in layers])
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))  # type: ignore[arg-type]
