"""The cases of `safelora bench` under pytest-benchmark, one kernel call each: for before and after a change.

    pytest benchmarks -k "project_layers and 4096" --benchmark-save=before
    pytest benchmarks -k "project_layers and 4096" --benchmark-compare

A wrong result fails before it is timed, a case that does not fit into half of the free memory is skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelora import bench
from safelora_kernels.bench import Case, suite
from safelora_kernels.bench.case import OURS, Draw
from safelora_kernels.bench.measure import available_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [case for case in (*suite.cases(DEVICE), *bench.cases()) if not case.axis]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_ours(case: Case, benchmark: Any) -> None:
    if case.memory > available_memory(DEVICE) // 2:
        pytest.skip(f"needs about {case.memory / 1e9:.1f} GB")
    (ours,) = (variant for variant in case.prepare(Draw(DEVICE)).variants if variant.name == OURS)
    assert ours.error is not None and ours.bound is not None
    error = ours.error()
    assert error <= ours.bound, f"relative error {error:.1e} against fp64 is over {ours.bound:.1e}: nothing is timed"
    benchmark.group = case.op
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, error=error, **case.parameters)
    benchmark.pedantic(ours.call, rounds=7, warmup_rounds=1)
