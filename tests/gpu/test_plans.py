"""What the CUDA code plans, the predictions of benchmarks/roofline.py and the page they stand on: one and the same."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from .plans import BF16, F32, Gpu, planned, planned_salora

ROOT = Path(__file__).resolve().parents[2]
A100, H100 = Gpu(80, 108, 40), Gpu(90, 132, 50)


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("roofline", ROOT / "benchmarks" / "roofline.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("gpu", "kernel"), [(A100, "ticket"), (H100, "cluster")], ids=["A100", "H100"])
@pytest.mark.parametrize("rank", [8, 16, 24, 64, 100])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (11008, 4096), (4096, 11008), (1000, 3000)], ids=str)
def test_projection(roofline: ModuleType, shape: tuple[int, int], rank: int, gpu: Gpu, kernel: str) -> None:
    plan, cost = planned("project", (*shape, rank), (BF16, F32), gpu), roofline.projection(*shape, rank, kernel)
    assert (cost.compulsory, cost.bf16) == (plan.compulsory_bytes, plan.mma_flops)
    # The norm's partial sums are left out, and a strip more or less of a short last unit.
    assert cost.memory == pytest.approx(plan.dram_bytes, rel=2e-3)
    assert cost.l2 == pytest.approx(plan.l2_bytes, rel=2e-3)


@pytest.mark.parametrize("sizes", [(4096, 16, 32), (1024, 16, 32), (4096, 8, 32)], ids=str)
def test_project_out(roofline: ModuleType, sizes: tuple[int, int, int]) -> None:
    plan, cost = planned("project_out", sizes, (F32, F32), A100), roofline.project_out(*sizes)
    d, m, k = sizes
    assert plan.compulsory_bytes == plan.dram_bytes == cost.compulsory == cost.memory == 4 * d * (2 * m + k)
    assert plan.flops == 4 * d * m * k
    assert (plan.mma_flops, plan.l2_bytes) == (cost.tf32, cost.l2)


def test_project_out_reads_twice_what_leaves_the_cache() -> None:
    sizes = (1 << 20, 16, 32)
    small, large = (planned("project_out", sizes, (F32, F32), Gpu(80, 108, mib)) for mib in (1, 400))
    assert small.l2_window == large.l2_window > 1 << 20
    assert small.dram_bytes - large.dram_bytes == 4 * sizes[0] * (16 + 32)


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("tokens", [4096, 1024])
def test_salora(roofline: ModuleType, tokens: int, rank: int) -> None:
    plans, costs = planned_salora(tokens, 4096, rank, 32, A100), roofline.salora(tokens, 4096, rank, 32)
    for plan, cost, products in zip(plans, costs, (2, 4), strict=True):
        assert cost.compulsory == plan.compulsory_bytes
        assert cost.memory == plan.dram_bytes <= 1.05 * plan.compulsory_bytes
        assert plan.flops == products * 2 * tokens * 4096 * rank + 4 * 4096 * rank * 32
        assert (cost.tf32, cost.l2) == (plan.mma_flops, plan.l2_bytes)


def test_salora_counts_partial_sums_that_leave_the_cache() -> None:
    (_, small), (_, large) = (planned_salora(4096, 4096, 16, 32, Gpu(80, 108, mib)) for mib in (1, 40))
    assert small.l2_window == large.l2_window <= 20 << 20
    # t's, the gradients of B̃'s and of A's: 16 ranges of columns or groups of tokens, each with 16 columns of sums.
    assert small.dram_bytes - large.dram_bytes == 3 * 2 * 16 * 4096 * 16 * 4


@pytest.mark.parametrize("sizes", [(4096, 4096, 16), (4096, 11008, 16), (4096, 4096, 64), (300, 200, 5)], ids=str)
def test_update_cosine(roofline: ModuleType, sizes: tuple[int, int, int]) -> None:
    d_out, d_in, rank = sizes
    plan = planned("update_cosine", sizes, (F32,))
    assert plan.compulsory_bytes == plan.dram_bytes == 4 * rank * (2 * d_out + d_in) + 8
    assert plan.flops == 2 * rank**2 * (3 * d_out + d_in)
    if d_out == d_in:
        cost = roofline.update_cosine(d_out, rank)
        assert (cost.compulsory, cost.fp64) == (plan.compulsory_bytes, plan.mma_flops)


def test_what_is_left_out_of_a_prediction_is_no_bound(roofline: ModuleType) -> None:
    plan = planned("update_cosine", (4096, 4096, 16), (F32,))
    for chip in roofline.CHIPS:
        seconds, _ = roofline.update_cosine(4096, 16).seconds(chip)
        assert plan.l2_bytes / chip.l2 * 1e-12 <= seconds


def test_shared_memory_fits_the_smallest_chip() -> None:
    plans = [
        planned("project", (4096, 4096, 64), (BF16, F32), A100),
        planned("project_out", (4096, 64, 32), (F32, F32), A100),
        *planned_salora(4096, 4096, 64, 32, A100),
        planned("update_cosine", (4096, 4096, 64), (F32,)),
    ]
    assert all(0 < plan.shared_bytes <= 99 << 10 for plan in plans)
    assert all(plan.workspace_bytes > 0 for plan in plans)


# ---- the page, and the command


def test_the_page_has_the_predictions(roofline: ModuleType) -> None:
    assert roofline.predictions() in roofline.PAGE.read_text(encoding="utf-8")


def test_the_page_states_the_ceilings(roofline: ModuleType) -> None:
    page = roofline.PAGE.read_text(encoding="utf-8")
    for chip in roofline.CHIPS:
        row = [chip.name, f"{chip.memory:g}", f"{chip.within_reach:.0%}", f"{chip.l2:g}"]
        assert "| " + " | ".join([*row, f"{chip.bf16:g}", f"{chip.tf32:g}", f"{chip.fp64:g}"]) + " |" in page


def test_a_prediction_is_its_largest_bound(roofline: ModuleType) -> None:
    (chip, *_) = roofline.CHIPS
    terabyte = 10**12
    for cost, seconds, bound in [
        (roofline.Cost(0, terabyte), 1 / (2.04 * 0.85), "memory"),
        (roofline.Cost(0, terabyte, 9 * terabyte), 2, "L2"),
        (roofline.Cost(0, terabyte, bf16=156 * terabyte, tf32=78 * terabyte), 2, "tensor cores"),
        (roofline.Cost(0, terabyte, fp64=97 * terabyte), 20, "fp64"),
    ]:
        found, name = cost.seconds(chip)
        assert (found, name) == (pytest.approx(seconds), bound)


def timed(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_measurements_stand_beside_predictions(roofline: ModuleType) -> None:
    """On the CPU, with small calls and the host's clock."""
    cases = [
        roofline.projection_case("tiny", [(64, 48), (32, 40)], 4),
        roofline.project_out_case(2, 40, 4, 3),
        roofline.salora_case(16, 32, 4, 3, backward=False),
        roofline.salora_case(16, 32, 4, 3, backward=True),
        roofline.cosine_case(2, 40, 4),
    ]
    table = roofline.measurements(cases, "cpu", "NVIDIA A100-SXM4-80GB", 2, timed)
    first, *rows = table.splitlines()[3:]
    assert first == "|---|---|---|---|---|"
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [case.title for case in cases]
    assert all("no prediction" not in row for row in rows)
    assert "no prediction for this chip" in roofline.measurements(cases[:1], "cpu", "RTX 9090", 1, timed)
    page = roofline.written(roofline.PAGE.read_text(encoding="utf-8"), table)
    assert table in page
    assert roofline.predictions() in page
    assert table not in roofline.written(page, "a second table")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_the_command_says_so(roofline: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main([]) == 2
    assert "no GPU that this torch can use" in capsys.readouterr().err
    assert roofline.main(["--predict"]) == 0
    assert capsys.readouterr().out.strip() == roofline.predictions()
