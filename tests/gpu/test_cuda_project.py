"""The CUDA projection against dense fp64, and in every order of blocks, warps and copies."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.ops import truth
from tests.ops.truth import FLOATS, assert_accurate, random_layer

from .emulated import Device, run, run_all
from .plans import Gpu, Plan, planned

FP32_BOUND = 1e-5
FP64_BOUND = 1e-12
NORM_BOUND = COSINE_BOUND = 1e-6

DRIVERS = ("simt", "ptx")
HALVES_AND_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


class Pair(NamedTuple):
    """One weight pair and the adapters over it."""

    aligned: Tensor
    base: Tensor
    lora_B: list[Tensor]
    lora_A: list[Tensor]


def pair(layer: truth.Layer) -> Pair:
    return Pair(layer.aligned, layer.base, [layer.lora_B], [layer.lora_A])


def arguments(pairs: list[Pair]) -> tuple[Any, ...]:
    return (
        [p.aligned for p in pairs],
        [p.base for p in pairs],
        [b for p in pairs for b in p.lora_B],
        [a for p in pairs for a in p.lora_A],
        [i for i, p in enumerate(pairs) for _ in p.lora_B],
    )


def judge(pairs: list[Pair], result: Any, normalize: str = "frobenius") -> None:
    projected, v_norm, cosine = result
    assert v_norm.dtype == cosine.dtype == torch.float64
    assert v_norm.shape == (len(pairs),)
    i = 0
    for number, p in enumerate(pairs):
        norm = truth.difference(p.aligned, p.base).norm()
        assert abs(float(v_norm[number] / norm) - 1) <= NORM_BOUND
        for lora_B, lora_A in zip(p.lora_B, p.lora_A, strict=True):
            wide = torch.float64 in (p.aligned.dtype, p.base.dtype, lora_B.dtype, lora_A.dtype)
            expected = truth.project(p.aligned, p.base, lora_B, normalize)
            assert projected[i].is_contiguous()
            assert_accurate(projected[i], expected, FP64_BOUND if wide else FP32_BOUND, f"lora_B {i}")
            if lora_A.numel():
                assert abs(float(cosine[i] - truth.cosine(expected, lora_B, lora_A))) <= COSINE_BOUND
            else:
                assert math.isnan(float(cosine[i]))
            i += 1


def check(
    pairs: list[Pair], normalize: str = "frobenius", driver: str = "simt", device: Device | None = None, **options: Any
) -> Any:
    result = run("project_layers", *arguments(pairs), normalize, driver=driver, device=device, **options)
    judge(pairs, result, normalize)
    return result


# ---- values


@pytest.mark.parametrize("factor", FLOATS)
@pytest.mark.parametrize("weight", FLOATS)
def test_dtypes(weight: torch.dtype, factor: torch.dtype) -> None:
    large, small = (random_layer(d_out, 200, 5, weight, factor) for d_out in (140, 40))
    projected, *_ = check([pair(large), pair(small)])
    assert all(p.dtype == factor for p in projected)


@pytest.mark.parametrize(
    ("aligned", "base"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float64, torch.bfloat16)],
)
def test_weights_of_two_dtypes(aligned: torch.dtype, base: torch.dtype) -> None:
    check([pair(random_layer(170, 210, 20, aligned, base_weight=base))])


SMALL = [
    (1, 1, 1),
    (5, 123, 3),
    (64, 64, 64),
    (127, 128, 16),
    (128, 127, 3),
    (17, 1000, 1),
    (300, 5, 2),
    (100, 60, 130),
]
LARGE = [(128, 128, 16), (129, 131, 17), (130, 701, 8), (520, 264, 33), (256, 384, 80), (160, 160, 160)]


@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=str)
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32], ids=str)
def test_shapes(shape: tuple[int, int, int], weight: torch.dtype) -> None:
    check([pair(random_layer(*shape, weight=weight))])


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80, 200, 512])
def test_ranks(rank: int) -> None:
    check([pair(random_layer(140, 264, rank, torch.bfloat16))])


def test_long_sums() -> None:
    check([pair(random_layer(1100, 640, 4, torch.bfloat16))])
    check([pair(random_layer(192, 4168, 4, torch.float16))])


@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("weight", HALVES_AND_SINGLE, ids=str)
def test_layouts(weight: torch.dtype, kind: str) -> None:
    for shape in ((140, 232, 9), (67, 133, 9)):
        layer = random_layer(*shape, weight)
        other = truth.Layer(*(truth.layouts(t)[kind] for t in layer))
        check([pair(other), pair(layer._replace(base=other.base, lora_B=other.lora_B))])


def test_rows_of_no_stride_and_rows_off_a_16_byte_boundary() -> None:
    layer = random_layer(140, 264, 4, torch.bfloat16)
    shifted = torch.empty(140 * 272 + 1, dtype=torch.bfloat16)[1:].view(140, 272)[:, :264].copy_(layer.aligned)
    check([pair(layer._replace(base=layer.base[:1].expand(140, 264))), pair(layer._replace(aligned=shifted))])


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_out_dtype_and_no_normalization(out_dtype: torch.dtype) -> None:
    layers = [random_layer(140, 180, 5, torch.bfloat16, torch.bfloat16), random_layer(30, 50, 3)]
    projected, *_ = check([pair(layer) for layer in layers], "none", out_dtype=out_dtype)
    assert all(p.dtype == out_dtype for p in projected)


def test_several_adapters_over_one_pair() -> None:
    for rows in (150, 90):
        layer = random_layer(rows, 210, 8, torch.bfloat16)
        lora_B = [layer.lora_B, torch.randn(rows, 3).bfloat16(), torch.randn(rows, 77), torch.randn(rows, 1).half()]
        lora_A = [layer.lora_A, torch.empty(0, 210), torch.randn(77, 210), torch.randn(1, 210).bfloat16()]
        check([Pair(layer.aligned, layer.base, lora_B, lora_A), pair(random_layer(140, 150, 2))])


def test_small_layers_do_not_rely_on_errors_averaging_out() -> None:
    for size in (1, 3, 16, 63):
        for seed in range(8):
            torch.manual_seed(seed)
            layer = random_layer(size, size, 1)
            v = truth.difference(layer.aligned, layer.base)
            (new,), *_ = run("project_layers", *arguments([pair(layer)]))
            scale = (v.abs() @ (v.abs().T @ layer.lora_B.double().abs())) / v.norm()
            assert bool(((new.double() - truth.project(*layer[:3])).abs() <= 2e-6 * scale).all())


def test_nothing_to_do() -> None:
    layer = random_layer(140, 150, 0, torch.bfloat16)
    check([Pair(layer.aligned, layer.base, [], [])])
    projected, v_norm, _ = run("project_layers", *arguments([pair(layer)]))
    assert projected[0].shape == (140, 0)
    assert float(v_norm) > 0
    for rows, cols in ((0, 150), (150, 0), (0, 0)):
        empty = torch.empty(rows, cols)
        result = run("project_layers", [empty], [empty], [torch.ones(rows, 2)], [torch.empty(0, cols)], [0])
        assert float(result[1]) == 0
        assert torch.equal(result[0][0], torch.zeros(rows, 2))


# ---- the plan


def plan(d_out: int, d_in: int, rank: int, gpu: Gpu, weight: int = 1, factor: int = 0) -> Plan:
    return planned("project", (d_out, d_in, rank), (weight, factor), gpu)


LLAMA = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (11008, 4096)]
GPUS = [Gpu(80, 108, 40), Gpu(89, 128, 72), Gpu(90, 132, 50), Gpu(100, 148, 126), Gpu(120, 170, 96)]


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("shape", LLAMA, ids=str)
@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_dram_sees_each_weight_about_once(shape: tuple[int, int], gpu: Gpu, rank: int) -> None:
    made = plan(*shape, rank, gpu)
    d_out, d_in = shape
    assert made.compulsory_bytes == 4 * d_out * d_in + 8 * rank * d_out
    assert made.flops == 4 * d_out * d_in * rank
    assert made.l2_window <= 0.7 * (gpu.l2_mib << 20)
    most = 1.05 if rank == 16 and gpu.arch in (90, 100) else 1.1
    assert made.dram_bytes <= most * made.compulsory_bytes


def test_the_plan_counts_a_second_read_where_strips_do_not_fit() -> None:
    made = plan(500_000, 4096, 16, GPUS[0])
    assert made.dram_bytes > 1.9 * made.compulsory_bytes


# ---- special values


@pytest.mark.parametrize("rows", [140, 50])
def test_equal_weights_give_zeros(rows: int) -> None:
    layer = random_layer(rows, 180, 4, torch.bfloat16)
    (new,), v_norm, cosine = run("project_layers", *arguments([pair(layer._replace(aligned=layer.base))]))
    assert float(v_norm) == 0
    assert torch.equal(new, torch.zeros_like(new))
    assert math.isnan(float(cosine))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [140, 50])
def test_a_weight_that_is_not_finite(rows: int, value: float) -> None:
    layer = random_layer(rows, 180, 4, torch.bfloat16)
    aligned = layer.aligned.clone()
    aligned[3, 170] = value
    fine = random_layer(140, 180, 4)
    (new, other), v_norm, cosine = run(
        "project_layers", *arguments([pair(layer._replace(aligned=aligned)), pair(fine)])
    )
    assert bool(new.isnan().all())
    assert v_norm.isnan().tolist() == cosine.isnan().tolist() == [True, False]
    assert_accurate(other, truth.project(*fine[:3]), FP32_BOUND)


@pytest.mark.parametrize("rows", [140, 50])
def test_a_factor_that_is_not_finite_spoils_its_own_column(rows: int) -> None:
    layer = random_layer(rows, 180, 20, torch.bfloat16)
    lora_B = layer.lora_B.clone()
    lora_B[7, 17] = math.nan
    (new,), v_norm, _ = run("project_layers", *arguments([pair(layer._replace(lora_B=lora_B))]))
    assert float(v_norm) > 0
    assert new.isnan().any(dim=0).tolist() == [j == 17 for j in range(20)]


def test_a_zero_update_has_cosine_zero() -> None:
    layer = random_layer(140, 180, 4, torch.bfloat16)
    (new,), _, cosine = run("project_layers", *arguments([pair(layer._replace(lora_B=torch.zeros(140, 4)))]))
    assert torch.equal(new, torch.zeros(140, 4))
    assert float(cosine) == 0


@pytest.mark.parametrize("scale", [1e-17, 1e17])
def test_squares_outside_the_range_of_fp32(scale: float) -> None:
    check([pair(random_layer(140, 180, 4)._replace(aligned=scale * torch.randn(140, 180), base=torch.zeros(140, 180)))])


# ---- order


def mixture() -> list[Pair]:
    """Layers of every kernel, with strips and blocks of all sizes."""
    layers = [
        random_layer(164, 200, 8, torch.bfloat16),
        random_layer(7, 30, 2),
        random_layer(300, 392, 16, torch.bfloat16),
        random_layer(129, 2180, 5),  # more units than sums
        random_layer(140, 130, 40, torch.float16, torch.bfloat16),
        random_layer(130, 140, 70, torch.bfloat16),
        random_layer(140, 70, 3, torch.float64),
        random_layer(128, 1160, 12, torch.bfloat16),
    ]
    return [pair(layer) for layer in layers]


@pytest.mark.parametrize("driver", DRIVERS)
def test_no_order_changes_a_bit(driver: str) -> None:
    pairs = mixture()
    device = Device(sm_count=6, l2_bytes=1 << 20)  # blocks enough to have some wait for others, strips for all buffers
    for result in run_all("project_layers", *arguments(pairs), drivers=(driver,), device=device).values():
        judge(pairs, result)


def same_bits(result: Any, expected: Any) -> bool:
    pairs = zip((*result[0], *result[1:]), (*expected[0], *expected[1:]), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def test_neither_blocks_nor_processors_nor_the_cache_change_a_bit() -> None:
    pairs = mixture()
    expected = check(pairs, device=Device(sm_count=1, resident=1))
    for device in (Device(sm_count=3), Device(sm_count=108, resident=5), Device(sm_count=16, l2_bytes=1 << 20)):
        assert same_bits(run("project_layers", *arguments(pairs), device=device), expected)


def test_a_layer_has_the_bits_that_it_has_alone() -> None:
    pairs = mixture()
    together = run("project_layers", *arguments(pairs))
    for i, p in enumerate(pairs):
        alone = run("project_layers", *arguments([p]))
        assert torch.equal(alone[0][0], together[0][i])
        assert float(alone[1]) == float(together[1][i])
        assert float(alone[2]) == float(together[2][i])


@pytest.mark.parametrize("weight", HALVES_AND_SINGLE, ids=str)
@pytest.mark.parametrize("rank", [8, 20, 50])
def test_compiled_kernels_agree_with_the_emulated_ones(weight: torch.dtype, rank: int) -> None:
    pairs = [pair(random_layer(140, 328, rank, weight)), pair(random_layer(133, 133, rank, weight))]
    check(pairs, driver="ptx")


@pytest.mark.parametrize("driver", ["asan", "tsan"])
def test_sanitizers_find_nothing(driver: str) -> None:
    layers = [random_layer(130, 590, 18, torch.bfloat16), random_layer(129, 133, 3), random_layer(40, 50, 2)]
    device = Device(l2_bytes=1 << 17)  # three strips of the first, so that its buffers go round
    results = run_all("project_layers", *arguments([pair(layer) for layer in layers]), drivers=(driver,), device=device)
    judge([pair(layer) for layer in layers], results[driver])
