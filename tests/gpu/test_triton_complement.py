"""The Triton complement kernel in the interpreter: values, layouts, batches, writing in place, the order of tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from safelora_kernels.backends import reference
from safelora_kernels.triton import complement, tables
from tests.ops import truth
from tests.ops.truth import assert_accurate, random_basis

pytestmark = pytest.mark.interpreted

BOUND = 1e-6
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
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
    (290, 70, 33),
]


def oriented(x: Tensor, side: str) -> Tensor:
    return x if side == "left" else x.t().contiguous()


def pair(d: int, m: int, k: int, side: str = "left", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    # Half of a whole space's basis, so that the complement of a full basis is not zero.
    return oriented(torch.randn(d, m), side).to(dtype), 0.5 * random_basis(d, k)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("basis_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype: torch.dtype, basis_dtype: torch.dtype, side: str) -> None:
    x, u = oriented(torch.randn(96, 24), side).to(dtype), random_basis(96, 12, basis_dtype)
    (y,) = complement.project_out_layers([x], [u], side)
    assert y.dtype == dtype
    assert_accurate(y, truth.project_out(x, u, side), BOUND)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], side: str) -> None:
    x, u = pair(*shape, side)
    (y,) = complement.project_out_layers([x], [u], side)
    assert y.is_contiguous()
    assert_accurate(y, truth.project_out(x, u, side), BOUND)


@pytest.mark.parametrize("shape", [(0, 3, 0), (5, 0, 2)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    d, m, k = shape
    (y,) = complement.project_out_layers([torch.randn(d, m)], [torch.randn(d, k)])
    assert y.shape == (d, m)
    assert complement.project_out_layers([], []) == []
    complement.project_out_layers_([], [])


@pytest.mark.parametrize("kind", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_layouts(side: str, kind: str) -> None:
    x, u = oriented(torch.randn(70, 19), side), random_basis(70, 9)
    other_x, other_u = truth.layouts(x)[kind], truth.layouts(u)[kind]
    expected = truth.project_out(x, u, side)
    (y,) = complement.project_out_layers([other_x], [other_u], side)
    assert y.is_contiguous()
    assert_accurate(y, expected, BOUND)
    complement.project_out_layers_([other_x], [other_u], side)
    assert_accurate(other_x, expected, BOUND)


def test_rows_of_vectors_that_start_off_a_boundary() -> None:
    whole, u = torch.randn(40, 40), random_basis(40, 8)
    for x in (whole[:, 1:17], whole[:, :16], whole.flatten()[2:642].view(40, 16)):
        assert_accurate(complement.project_out_layers([x], [u])[0], truth.project_out(x, u), BOUND)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_gives_the_bits_of_single_calls_in_and_out_of_place(side: str) -> None:
    shared = 0.5 * random_basis(48, 6)
    shapes = [(48, 8, 6), (20, 1, 3), (48, 30, 6), (33, 2, 0), (300, 20, 40), (20, 16, 4)]
    dtypes = [torch.float32, torch.float16, torch.float32, torch.float32, torch.bfloat16, torch.float64]
    pairs = [pair(*shape, side, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    xs, bases = [x for x, _ in pairs], [shared if len(u) == 48 else u for _, u in pairs]
    results = complement.project_out_layers(xs, bases, side)
    for x, u, y in zip(xs, bases, results, strict=True):
        assert y.dtype == x.dtype
        assert_accurate(y, truth.project_out(x, u, side), BOUND)
        assert torch.equal(y, complement.project_out_layers([x], [u], side)[0])
    assert complement.project_out_layers_(xs, bases, side) is None  # type: ignore[func-returns-value]
    assert all(torch.equal(x, y) for x, y in zip(xs, results, strict=True))


def test_fp64_goes_to_the_reference() -> None:
    x, u = torch.randn(20, 3, dtype=torch.float64), random_basis(20, 4, torch.float64)
    (expected,) = reference.project_out_layers([x], [u])
    assert torch.equal(complement.project_out_layers([x], [u])[0], expected)
    complement.project_out_layers_([x], [u])
    assert torch.equal(x, expected)


def test_in_place_leaves_what_lies_between_the_elements() -> None:
    whole = torch.randn(20, 12)
    before = whole.clone()
    complement.project_out_layers_([whole[:, 2:5], whole[:, 7:12]], [random_basis(20, 3)] * 2)
    kept = [0, 1, 5, 6]
    assert torch.equal(whole[:, kept], before[:, kept])
    assert not torch.equal(whole[:, 2:5], before[:, 2:5])


def test_not_finite_input_shows() -> None:
    x, u = torch.randn(30, 4), random_basis(30, 3)
    x[3, 1] = torch.nan
    (y,) = complement.project_out_layers([x], [u])
    assert bool(y[:, 1].isnan().all())
    assert bool(y[:, [0, 2, 3]].isfinite().all())


def test_bits_depend_neither_on_the_programs_nor_on_the_workspace() -> None:
    inputs = [pair(*shape) for shape in [(600, 40, 40), (300, 32, 8), (520, 72, 12)]]
    results = []
    for programs, workspace in [(1, 1 << 24), (50, 1 << 24), (2, 1)]:
        outs = [torch.empty_like(x) for x, _ in inputs]
        pairs = [complement.Pair(x, u, out) for (x, u), out in zip(inputs, outs, strict=True)]
        made = list(complement.launches(pairs, "left", "sm_80", programs, workspace))
        assert len(made) == (3 if workspace == 1 else 1)
        tables.run(made, torch.device("cpu"))
        results.append(outs)
    for outs in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], outs, strict=True))


def test_hundreds_of_factors_are_one_launch() -> None:
    shapes = [(8 * (i % 5 + 1), 8, 4 * (i % 4 + 1)) for i in range(300)]
    xs, bases = [torch.randn(d, m) for d, m, _ in shapes], [torch.randn(d, k) for d, _, k in shapes]
    pairs = [complement.Pair(x, u, x) for x, u in zip(xs, bases, strict=True)]
    assert len(list(complement.launches(pairs, "left", "sm_90", 264))) == 1


@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_a_task_waits_only_for_earlier_ones(programs: int) -> None:
    chunks = torch.randint(1, 9, (40,))
    seen = [0] * len(chunks)
    drawn = tables.in_turns(chunks, chunks, programs).tolist()
    assert len(set(drawn)) == len(drawn) == 2 * int(chunks.sum())
    for task in drawn:
        group, chunk, kind = task >> 32, (task & 0xFFFFFFFF) >> 1, task & 1
        assert chunk < chunks[group]
        if kind == 0:
            seen[group] += 1
        else:
            assert seen[group] == chunks[group]
