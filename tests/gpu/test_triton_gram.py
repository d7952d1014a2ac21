"""The Triton Gram kernel in the interpreter: values, layouts, batches, the partition and order of its tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from safelora_kernels.backends import reference
from safelora_kernels.triton import gram, tables
from tests.ops import truth
from tests.ops.truth import assert_accurate

pytestmark = pytest.mark.interpreted

BOUND = 1e-6
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NONE = torch.empty(0)
SHAPES = [
    (1, 1, 1),
    (7, 40, 8),
    (64, 64, 16),
    (65, 17, 1),
    (600, 129, 33),
    (30, 70, 80),
    (1100, 9, 5),
    (130, 1050, 12),
]


def apply(x: Tensor, z: Tensor, weights: Tensor = NONE) -> Tensor:
    (y,) = gram.gram_apply_layers([x], [z], [weights])
    return y


def expected(x: Tensor, z: Tensor, weights: Tensor = NONE) -> Tensor:
    return truth.gram_apply(x, z, weights if weights.numel() else None)


@pytest.mark.parametrize("z_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype: torch.dtype, z_dtype: torch.dtype) -> None:
    x, z, weights = torch.randn(96, 72).to(dtype), torch.randn(72, 12).to(z_dtype), torch.rand(96)
    y = apply(x, z, weights)
    assert y.dtype == torch.float32
    assert_accurate(y, expected(x, z, weights), BOUND)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], weighted: bool) -> None:
    tokens, d, r = shape
    x, z = torch.randn(tokens, d), torch.randn(d, r)
    weights = torch.rand(tokens) if weighted else NONE
    y = apply(x, z, weights)
    assert y.is_contiguous()
    assert_accurate(y, expected(x, z, weights), BOUND)


@pytest.mark.parametrize("shape", [(0, 3, 2), (5, 0, 2)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    tokens, d, r = shape
    assert torch.equal(apply(torch.randn(tokens, d), torch.randn(d, r)), torch.zeros(d, r))
    assert gram.gram_apply_layers([], [], []) == []


@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
def test_layouts(kind: str) -> None:
    x, z, weights = torch.randn(70, 80), torch.randn(80, 9), torch.rand(140)[::2]
    y = apply(truth.layouts(x)[kind], truth.layouts(z)[kind], weights)
    assert_accurate(y, expected(x, z, weights), BOUND)


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_of_any_dtype(dtype: torch.dtype) -> None:
    x, z, weights = torch.randn(70, 20), torch.randn(20, 4), torch.randn(70).to(dtype)
    assert_accurate(apply(x, z, weights), expected(x, z, weights), BOUND)


def test_batch_gives_the_bits_of_single_calls() -> None:
    shapes = [(600, 48, 6), (40, 20, 1), (600, 48, 40), (33, 48, 6), (0, 48, 6), (20, 16, 4)]
    dtypes = [torch.float32, torch.float16, torch.float32, torch.bfloat16, torch.float32, torch.float64]
    xs = [torch.randn(t, d).to(dtype) for (t, d, _), dtype in zip(shapes, dtypes, strict=True)]
    zs = [torch.randn(d, r) for _, d, r in shapes]
    weights = [torch.rand(600), NONE, NONE, torch.rand(33), NONE, NONE]
    for result, x, z, w in zip(gram.gram_apply_layers(xs, zs, weights), xs, zs, weights, strict=True):
        assert_accurate(result, expected(x, z, w), BOUND)
        assert torch.equal(result, apply(x, z, w))


def test_fp64_goes_to_the_reference() -> None:
    x, z = torch.randn(20, 3, dtype=torch.float64), torch.randn(3, 4)
    assert torch.equal(apply(x, z), reference.gram_apply_layers([x], [z], [NONE])[0])
    assert apply(x.float(), z, torch.rand(20, dtype=torch.float64)).dtype == torch.float64


def test_not_finite_input_shows() -> None:
    x, z = torch.randn(50, 8), torch.randn(8, 3)
    z[2, 1] = torch.nan
    y = apply(x, z)
    assert bool(y[:, 1].isnan().all())
    assert bool(y[:, [0, 2]].isfinite().all())


def test_bits_depend_neither_on_the_programs_nor_on_the_workspace() -> None:
    triples = [(torch.randn(t, d), torch.randn(d, r), torch.rand(t)) for t, d, r in [(1100, 72, 8), (90, 600, 4)]]
    results = []
    for programs, workspace in [(1, 1 << 24), (50, 1 << 24), (2, 1)]:
        outs = [torch.full_like(z, torch.nan) for _, z, _ in triples]
        items = [gram.Item(*triple, out) for triple, out in zip(triples, outs, strict=True)]
        made = list(gram.launches(items, "sm_80", programs, workspace))
        assert len(made) == (2 if workspace == 1 else 1)
        tables.run(made, torch.device("cpu"))
        results.append(outs)
    for outs in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], outs, strict=True))


def test_hundreds_of_layers_are_one_launch() -> None:
    items = []
    for i in range(210):
        x, z = torch.randn(8 * (i % 5 + 1), 16), torch.randn(16, 4 * (i % 4 + 1))
        items.append(gram.Item(x, z, None, torch.empty_like(z)))
    assert len(list(gram.launches(items, "sm_90", 264))) == 1


@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_a_task_waits_only_for_earlier_ones(programs: int) -> None:
    firsts, seconds = torch.randint(1, 9, (40,)), torch.randint(1, 9, (40,))
    seen = [0] * len(firsts)
    drawn = tables.in_turns(firsts, seconds, programs).tolist()
    assert len(set(drawn)) == len(drawn) == int(firsts.sum() + seconds.sum())
    for task in drawn:
        group, number, kind = task >> 32, (task & 0xFFFFFFFF) >> 1, task & 1
        assert number < (seconds if kind else firsts)[group]
        if kind == 0:
            seen[group] += 1
        else:
            assert seen[group] == firsts[group]


@pytest.mark.parametrize("shape", [(8192, 4096, 16), (1, 1, 1), (300000, 4096, 16), (4096, 11008, 512), (100, 576, 8)])
def test_plan_covers_the_rows_and_keeps_to_its_memory(shape: tuple[int, int, int]) -> None:
    tokens, d, r = shape
    cut = gram.plan(tokens, d, r)
    assert (cut.spans - 1) * cut.span < tokens <= cut.spans * cut.span
    assert cut.spans <= gram.MOST_SPANS
    assert cut.spans == 1 or 4 * cut.spans * cut.blocks * gram.COLUMNS * cut.ranks <= gram.SUMS
    if tokens >= 8192 and r <= 16:  # what the sums add to one reading of X in bf16
        assert 8 * cut.spans * d * cut.ranks <= 0.15 * 2 * tokens * d
